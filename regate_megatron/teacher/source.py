"""Where the teacher's weights come from, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.errors import refuse
from regate_megatron.method.budget import align_up
from regate_megatron.teacher.weights import EMBEDDING, LanguageModelCheckpoint, open_language_model, saved_arguments

TEACHER_FOLDER = "regate_teacher"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*")


def find_teacher(
    students: Sequence[Any], config: ReGateConfig, args: Any, *, pad_token: int | None, vocab_size: int | None
) -> LanguageModelCheckpoint | None:
    """The checkpoint of the teacher, or None for the student's own weights. Any rank, no communication.

    Args:
        students: this rank's language-model chunks.
        args: Megatron's namespace, for the checkpoint folder of a resumed run.

    Raises:
        ReGateError: no such checkpoint, another architecture or vocabulary, or no pad token for "pad".
    """
    if config.teacher_visual == "pad" and (pad_token is None or pad_token < 0):
        raise refuse(
            flag("teacher_visual"),
            given=f"pad with a tokenizer whose pad id is {pad_token}",
            allowed="pad with a tokenizer that has a pad token",
            change="it to drop, or the tokenizer",
        )
    if config.teacher_load != STUDENT_AS_TEACHER:
        checkpoint = open_language_model(config.teacher_load, flag("teacher_load"))
        for student in students:
            _check_architecture(student, checkpoint)
        _check_vocabulary(students[0], checkpoint, vocab_size)
        return checkpoint
    kept = teacher_of_resumed_run(args)
    return open_language_model(kept, flag("teacher_load")) if kept else None


def teacher_of_resumed_run(args: Any) -> Path | None:
    """The teacher kept beside the checkpoints, when this run continues from one of them."""
    if args is None or not getattr(args, "load", None) or not getattr(args, "iteration", 0):
        return None
    kept = Path(args.load) / TEACHER_FOLDER
    return kept if kept.is_dir() else None


def hash_of_tokenizer(tokenizer: Any, args: Any) -> str | None:
    """A hash of what the tokenizer's ids mean: its vocabulary, else its files; None where neither can be had."""
    try:
        vocabulary = tokenizer.vocab
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else enumerate(vocabulary)
        text = repr(sorted((str(one), str(other)) for one, other in pairs))
        return xxhash.xxh3_128_hexdigest(text.encode())
    except Exception:  # tokenizers raise whatever they like
        pass
    model = getattr(args, "tokenizer_model", None)
    if not model or not Path(model).exists():
        return None
    root = Path(model)
    files = sorted({file for name in _TOKENIZER_FILES for file in root.glob(name)}) if root.is_dir() else [root]
    digest = xxhash.xxh3_128()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


def _check_architecture(student: Any, checkpoint: LanguageModelCheckpoint) -> None:
    """Every tensor of the student's chunk must be in the checkpoint with its global shape, the vocabulary aside."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for value in student.sharded_state_dict().values():
        if not isinstance(value, ShardedTensor):
            continue
        found = checkpoint.shapes.get(checkpoint.key_of(value.key))
        want = tuple(value.global_shape)
        if value.key in (EMBEDDING, "output_layer.weight") and found:
            found, want = found[1:], want[1:]
        if found != want:
            raise refuse(
                flag("teacher_load"),
                given=f"{checkpoint.path} with {value.key} of shape {found or 'none'}",
                allowed=f"the student's language-model architecture ({value.key} of shape {want})",
                change="the teacher to the student's own text backbone",
            )


def _check_vocabulary(student: Any, checkpoint: LanguageModelCheckpoint, vocab_size: int | None) -> None:
    """The teacher must score the same token ids.

    Megatron pads a tokenizer's vocabulary to a multiple of ``make_vocab_size_divisible_by · TP``, so one tokenizer has
    several padded sizes: the teacher's must be the student's, or what its own padding rule makes of the same tokenizer.
    """
    tensor_size = student.config.tensor_model_parallel_size
    teacher, padded = checkpoint.vocab_size, student.vocab_size
    saved = saved_arguments(checkpoint.path)
    if teacher != padded and not (vocab_size and saved and teacher == _padded(vocab_size, saved)):
        raise refuse(
            flag("teacher_load"),
            given=f"a teacher with a vocabulary of {teacher}",
            allowed=f"the student's tokenizer ({vocab_size or padded} tokens, here padded to {padded})",
            change="the teacher to one with the student's tokenizer",
        )
    if teacher % tensor_size:
        raise refuse(
            flag("teacher_load"),
            given=f"a teacher with a vocabulary of {teacher}",
            allowed=f"a multiple of the tensor-parallel size {tensor_size}",
            change="--make-vocab-size-divisible-by when the teacher is saved",
        )


def _padded(vocab_size: int, saved: Any) -> int | None:
    divisor = getattr(saved, "make_vocab_size_divisible_by", None)
    if not divisor:
        return None
    return align_up(vocab_size, divisor * getattr(saved, "tensor_model_parallel_size", 1))
