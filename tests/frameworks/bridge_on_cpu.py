"""Megatron-Bridge under the emulation: it imports Transformer Engine unconditionally, Megatron must not use it here.

Megatron-Core chooses its norms, optimizer and checkpointing when it is imported; while Transformer Engine is hidden it
takes torch's. Bridge, imported afterwards, finds the real package and uses none of it for a local layer spec. Core
attentions of its own, which are Transformer Engine's with something before the kernel, become Megatron's with the same.
"""

from __future__ import annotations

import sys

from regate_megatron.cpu import emulation


def install() -> None:
    """Put Megatron and Bridge on the CPU for the rest of this process."""
    emulation.set_environment()
    sys.modules["transformer_engine"] = None
    emulation.install()
    import megatron.core.extensions.transformer_engine as extensions
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.multimodal.llava_model
    import megatron.core.optimizer
    import megatron.training  # noqa: F401
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    assert not extensions.HAVE_TE
    extensions.TEDotProductAttention = DotProductAttention
    del sys.modules["transformer_engine"]
