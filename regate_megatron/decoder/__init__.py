"""Instance hooks on the language model: run the decoder short after its dense layers, and the loss with it.

Nothing here is a class or module patch; every hook is an attribute of one instance and is removed by its ``detach``.
"""

from regate_megatron.decoder.attached import Hooks
from regate_megatron.decoder.compaction import DecoderHook
from regate_megatron.decoder.current import CurrentMicrobatch
from regate_megatron.decoder.exchange import Layout, ShardedPlan, shard_plans
from regate_megatron.decoder.gradients import own_norms, put_together
from regate_megatron.decoder.losses import LossHook
from regate_megatron.decoder.observed import gather_context, to_host

__all__ = [
    "CurrentMicrobatch",
    "DecoderHook",
    "Hooks",
    "Layout",
    "LossHook",
    "ShardedPlan",
    "gather_context",
    "own_norms",
    "put_together",
    "shard_plans",
    "to_host",
]
