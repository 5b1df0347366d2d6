"""The method: which steps are sparse, what may be left out, by which score, how much runs. No Megatron, no ranks."""
