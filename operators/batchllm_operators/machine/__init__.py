"""What the machine has: GPUs, cores, and what its processor is fast at."""
