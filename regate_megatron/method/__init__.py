"""The method: which steps are sparse, what may be left out, by which score, and how much runs. No Megatron, no ranks."""
