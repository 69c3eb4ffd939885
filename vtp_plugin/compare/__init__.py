"""Many configurations through lmms-eval: sweeps that resume, and the smallest keep ratio within a drop."""
