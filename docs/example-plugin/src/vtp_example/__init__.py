"""A strategy for vtp-plugin."""
