"""Build the teacher: the student's language-model architecture, frozen, sharded like it, outside DDP and optimizer.

Its weights come from a Megatron torch_dist checkpoint (of a GPT, or the language model inside a LLaVA), or from the
student itself at the first start; so do the settings a loss depends on (:mod:`.settings`). Building leaves the
student's random state untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regate_megatron.decoder.hybrid import is_hybrid
from regate_megatron.teacher.settings import settle
from regate_megatron.teacher.weights import LanguageModelCheckpoint, load_language_model

_NO_CALLBACKS = {
    "timers": None,
    "grad_scale_func": None,
    "no_sync_func": None,
    "grad_sync_func": None,
    "param_sync_func": None,
    "finalize_model_grads_func": None,
    # The teacher runs in bf16 beside an FP8 student: TE would register its amax in the student's all-reduce.
    "fp8": None,
    "fp4": None,
    "fp8_param": False,  # asks for a recipe, and there is none
    "fp4_param": False,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "overlap_p2p_comm": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "defer_embedding_wgrad_compute": False,
    "variable_seq_lengths": False,
}

# What says which layers a GPTModel and a HybridModel have; rotary options come with the rotary module.
_LAYERS_OF = {False: ("transformer_layer_spec",), True: ("hybrid_stack_spec", "hybrid_layer_pattern")}


def build_teacher(student: Any, checkpoint: LanguageModelCheckpoint | None) -> Any:
    """A frozen copy of the student's language-model chunk; all ranks call this (embeddings are tied across stages).

    Args:
        student: this rank's ``GPTModel`` or ``HybridModel`` chunk, its weights loaded.
        checkpoint: where the weights come from; None: from ``student`` itself.

    Raises:
        ReGateError: see :func:`.settings.settle`; or the data cannot be read.
    """
    settings = settle(student, checkpoint)
    config = settings.config
    for name, value in _NO_CALLBACKS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    vocab_size = student.vocab_size if checkpoint is None else checkpoint.vocab_size
    with random_state_untouched(), torch.no_grad():
        options = {
            "config": config,
            "vocab_size": vocab_size,
            "max_sequence_length": student.max_sequence_length,
            "pre_process": student.pre_process,
            "post_process": student.post_process,
            "fp16_lm_cross_entropy": student.fp16_lm_cross_entropy,
            "parallel_output": student.parallel_output,
            "share_embeddings_and_output_weights": student.share_embeddings_and_output_weights,
            "position_embedding_type": student.position_embedding_type,
            "pg_collection": student.pg_collection,
            "vp_stage": getattr(student, "vp_stage", None),
        }
        options |= {name: getattr(student, name) for name in _LAYERS_OF[is_hybrid(student.decoder)]}
        known = inspect.signature(type(student)).parameters  # mcore-bridge's class has most of them from the config
        teacher = type(student)(**{name: value for name, value in options.items() if name in known})
        if getattr(config, "mtp_num_layers", None):  # not before: it says on which stage the final norm is
            config.mtp_num_layers = None  # it predicts the next token alone
        if settings.rotary is not None:
            teacher.rotary_pos_emb = settings.rotary  # no weights; keeps every rope option
        parameter = next(student.parameters(), None)
        if parameter is not None:
            teacher.to(device=parameter.device, dtype=parameter.dtype)
        if checkpoint is None:
            weights = {key: value for key, value in student.state_dict().items() if "_extra_state" not in key}
            missing, _ = teacher.load_state_dict(weights, strict=False)
            assert all("_extra_state" in key for key in missing), missing
        else:
            load_language_model(teacher, checkpoint)
    teacher.requires_grad_(False)
    return teacher.eval()


@contextmanager
def random_state_untouched() -> Iterator[None]:
    """Restore torch's and Megatron's random states afterwards."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = {name: _snapshot(state) for name, state in tracker.get_states().items()}
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        tracker.set_states(states)
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)


def _snapshot(state: Any) -> Any:
    """Megatron replaces a tensor when it draws; a generator (Transformer Engine's tracker) draws in place."""
    return state.clone_state() if isinstance(state, torch.Generator) else state
