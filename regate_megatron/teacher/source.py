"""Where the teacher's weights come from, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.method.budget import align_up
from regate_megatron.method.scores import SCORES
from regate_megatron.support import HostRun
from regate_megatron.teacher.fingerprint import sharded_tensors
from regate_megatron.teacher.settings import settle
from regate_megatron.teacher.weights import (
    EMBEDDING,
    LanguageModelCheckpoint,
    canonical_name,
    open_language_model,
    saved_arguments,
)

TEACHER_FOLDER = "regate_teacher"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*")


def find_teacher(
    students: Sequence[Any], config: ReGateConfig, run: HostRun, *, pad_token: int | None, vocab_size: int | None
) -> LanguageModelCheckpoint | None:
    """The checkpoint of the teacher, or None for the student's own weights. Any rank, no communication.

    Args:
        students: this rank's language-model chunks.
        run: the host's, for the checkpoint folder of a resumed run.

    Raises:
        ReGateError: no such checkpoint, another architecture or vocabulary, or no pad token for "pad".
    """
    check_pad_token(config, pad_token)
    if config.teacher_load != STUDENT_AS_TEACHER:
        checkpoint = open_language_model(config.teacher_load, flag("teacher_load"))
        for student in students:
            _check_architecture(student, checkpoint)
            settle(student, checkpoint)
        _check_vocabulary(students[0], checkpoint, vocab_size)
        return checkpoint
    if takes_base(config, run):
        return None
    kept = teacher_of_resumed_run(run)
    if kept is None:
        _check_first_start(run)
        return None
    checkpoint = open_language_model(kept, flag("teacher_load"))
    for student in students:
        _check_architecture(student, checkpoint)
        settle(student, checkpoint)
    return checkpoint


def check_pad_token(config: ReGateConfig, pad_token: int | None) -> None:
    """A teacher that reads placeholders has one to read.

    Raises:
        ReGateError: it has none.
    """
    if config.teacher_visual == "pad" and (pad_token is None or pad_token < 0):
        raise refuse(
            flag("teacher_visual"),
            given=f"pad with a tokenizer whose pad id is {pad_token}",
            allowed="pad with a tokenizer that has a pad token",
            change="it to drop, or the tokenizer",
        )


def takes_base(config: ReGateConfig, run: HostRun) -> bool:
    """Whether the teacher is the frozen base of a student with adapters; the same on stages that have none."""
    return config.teacher_load == STUDENT_AS_TEACHER and run.switches_adapters


def teacher_of_resumed_run(run: HostRun) -> Path | None:
    """The teacher kept beside the checkpoints, when this run continues from one of them."""
    if run.load is None or not run.iteration:
        return None
    kept = run.load / TEACHER_FOLDER
    return kept if kept.is_dir() else None


def _check_first_start(run: HostRun) -> None:
    """Refuse to take the student as its teacher where a run with one continues: it has learned since.

    A checkpoint of a run without ReGATE, or with a score that needs no teacher, is a first start. Megatron's legacy
    format keeps its arguments in a pickle, which is not read here; what was learned is compared when it is loaded.
    """
    if run.load is None or not run.iteration:
        return
    iteration = run.load / f"iter_{run.iteration:07d}"
    saved = saved_arguments(iteration) if iteration.is_dir() else None
    score = SCORES.get(getattr(saved, "regate_score", None))
    needs_teacher = score is not None and score.needs_teacher(getattr(saved, "regate_difficulty", "own"))
    least = min(getattr(saved, "regate_keep_ratio", 1.0), getattr(saved, "regate_keep_ratio_end", None) or 1.0)
    if getattr(saved, "regate", False) and least < 1.0 and needs_teacher:
        raise teacher_is_gone(f"{iteration} of a run with a teacher, without {run.load / TEACHER_FOLDER}")


def teacher_is_gone(given: str) -> ReGateError:
    """The refusal of a student that would be its own teacher after it has learned."""
    return refuse(
        f"{flag('teacher_load')} {STUDENT_AS_TEACHER}",
        given=given,
        allowed="the student as it was when the run began",
        change=f"the copy (the folder {TEACHER_FOLDER} belongs to the checkpoints), or {flag('teacher_load')} to a "
        "checkpoint, which then is the teacher",
    )


def hash_of_tokenizer(tokenizer: Any, model: str | None) -> str | None:
    """A hash of what the tokenizer's ids mean: its vocabulary, else the files of its ``model``; None where neither can
    be had.
    """
    try:
        vocabulary = tokenizer.vocab
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else enumerate(vocabulary)
        text = repr(sorted((str(one), str(other)) for one, other in pairs))
        return xxhash.xxh3_128_hexdigest(text.encode())
    except Exception:  # tokenizers raise whatever they like
        pass
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
    """Student and checkpoint have the same tensors in this chunk's layers, of the same shapes but for the vocabulary.

    A tensor that only the checkpoint has (a bias, a norm, an output layer of its own) is a difference as well: the
    student's architecture would leave it out.
    """
    own = {}
    for tensor in sharded_tensors(student):
        key = checkpoint.key_of(tensor.key)
        found, want = checkpoint.shapes.get(key), tuple(tensor.global_shape)
        own[canonical_name(tensor.key)] = key
        if tensor.key in (EMBEDDING, "output_layer.weight") and found:
            found, want = found[1:], want[1:]
        if found != want:
            raise _another(checkpoint, tensor.key, found or "none", want)
    ours = {parts for name in own if (parts := _part_of(name))}
    for name, shape in checkpoint.shapes.items():
        if _part_of(canonical_name(name)) in ours and canonical_name(name) not in own:
            raise _another(checkpoint, name, shape, "none")


def _part_of(name: str) -> str:
    """What is on one stage as a whole or not at all: a layer (all, where they lie in one tensor), the output, words."""
    parts = name.split(".")
    if parts[0] == "decoder" and parts[1] == "layers":
        return ".".join(parts[:3]) if parts[2].isdigit() else "decoder.layers"
    return "output" if name.startswith(("decoder.final", "output_layer")) else parts[0]


def _another(checkpoint: LanguageModelCheckpoint, name: str, found: Any, want: Any) -> Exception:
    return refuse(
        flag("teacher_load"),
        given=f"{checkpoint.path} with {name} of shape {found}",
        allowed=f"the student's language-model architecture ({name} of shape {want})",
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
