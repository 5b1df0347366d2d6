"""Checkpoints between Hugging Face and Megatron, and between Megatron's own formats; one process, no GPU.

Tables (``families``, ``names``, ``clip``) say what corresponds to what; ``hf_config`` and ``arguments`` translate a
model's description; ``safetensors_folder``, ``torch_dist`` and ``legacy`` read and write one format each, tensor by
tensor, so that memory use is that of the largest tensor or output shard; ``to_megatron``, ``to_huggingface``,
``llava_to_megatron``, ``llava_to_huggingface`` and ``reshard`` put them together. Importing this package imports no
Megatron.
"""
