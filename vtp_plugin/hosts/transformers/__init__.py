"""transformers: published shapes with random weights, the ideal that a pruned model is held against, zero-shot CLIP."""
