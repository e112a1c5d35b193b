"""What a run will take before it starts: sizes, memory, FLOPs, useful shares, targets; and what it took."""
