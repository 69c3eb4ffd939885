"""Re-runs of what the poster, ATP and V-PRUNE claim. One file per study, one YAML in plugin_configs/studies each."""
