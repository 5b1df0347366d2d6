"""Megatron without a GPU: the emulation that tests and demos run on, and the dry run."""
