"""Speed without checkpoints: time to first token in a real shape, and what selectors cost by themselves."""
