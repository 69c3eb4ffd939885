"""What pruning saves: token counts, FLOPs, time. Listens to calls; never inside a method."""
