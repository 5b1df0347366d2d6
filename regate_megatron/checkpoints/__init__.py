"""Checkpoints between Hugging Face and Megatron, and out of vision-language models; one process, no GPU.

Tables (``families``, ``names``, ``clip``) say what corresponds to what; ``hf_config`` and ``arguments`` translate a
model's description; ``safetensors_folder`` and ``torch_dist`` read and write one format each, tensor by tensor, so that
memory use is that of the largest tensor or output file; ``to_megatron``, ``to_huggingface``, ``llava_to_megatron``,
``llava_to_huggingface`` and ``extraction`` make plans of them, which ``writing`` carries out and ``command`` reports.
Importing this package imports no Megatron.
"""
