"""``python -m milkernels bench``: how fast the ops go on this machine, and how far from its limits."""
