"""A teacher made by the caller, checked before it is needed. Any rank, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regate_megatron.compat import is_one_of
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.support.decoder import LANGUAGE_MODELS

_CUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def check_given(teacher: Any, students: Sequence[Any], vocab_size: int | None) -> None:
    """A caller's model can score what the students of this rank are trained on.

    Args:
        teacher: this rank's chunk of it, or the list of its chunks.
        students: this rank's language-model chunks.
        vocab_size: the student tokenizer's true size, where it is known.

    Raises:
        ReGateError: it cannot.
    """
    chunks = teacher if isinstance(teacher, list) else [teacher]
    others = [type(one).__name__ for one in chunks if not is_one_of(one, LANGUAGE_MODELS)]
    if others:
        allowed = "the bare GPTModel or HybridModel, below DDP and Float16Module"
        raise _refused(", ".join(others), allowed, "it to that model, or to the list of its chunks")
    ends = [[(one.pre_process, one.post_process) for one in models] for models in (chunks, students)]
    if ends[0] != ends[1]:
        given = f"{len(chunks)} chunk(s) with (first, last) {ends[0]}"
        raise _refused(given, f"the student's {len(students)}, {ends[1]}", "how it is cut into pipeline stages")
    for chunk, student in zip(chunks, students, strict=True):
        cuts = {name: (getattr(chunk.config, name, None), getattr(student.config, name, None)) for name in _CUT}
        odd = [f"{name} {own} where the student has {other}" for name, (own, other) in cuts.items() if own != other]
        if odd:
            raise _refused(", ".join(odd), "a teacher cut like the student", "its configuration")
        if chunk.config.sequence_parallel and chunk.config.tensor_model_parallel_size > 1:
            words = getattr(chunk, "embedding", None)
            if words is not None and not words.scatter_to_sequence_parallel:
                given = "sequence_parallel=True where the model does not cut its words itself"
                raise _refused(given, "False, or a model that does", "its configuration")
        dropout = max(chunk.config.hidden_dropout, chunk.config.attention_dropout)
        if chunk.training and dropout:
            raise _refused(f"training mode with dropout {dropout}", "evaluation mode", "it by teacher.eval()")
    least = vocab_size or students[0].vocab_size
    if chunks[0].vocab_size < least:
        given = f"a vocabulary of {chunks[0].vocab_size}"
        raise _refused(given, f"all {least} ids of the student's tokenizer", "the teacher, or pass vocab_size")


def _refused(given: str, allowed: str, change: str) -> ReGateError:
    return refuse("attach(teacher=...)", given=given, allowed=allowed, change=change)
