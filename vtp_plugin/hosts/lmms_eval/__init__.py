"""lmms-eval: `--pruning` on its command line, pruned models in its registry, the proof in its results."""
