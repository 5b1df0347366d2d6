"""Pure method: which steps are sparse, how targets are scored, how many run, and which. No Megatron, no ranks."""
