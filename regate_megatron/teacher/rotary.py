"""The rotary frequencies of a teacher: the student's module, or a copy with those that its checkpoint says."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from regate_megatron.config import flag
from regate_megatron.errors import refuse
from regate_megatron.teacher.stated import CERTAIN
from regate_megatron.teacher.values import another, plain, same

if TYPE_CHECKING:
    from regate_megatron.teacher.settings import TeacherSettings

_SCALING = 8.0  # of Llama 3.1's frequencies; Megatron's own, before there was a flag


def constants_of(rotary: Any) -> dict[str, Any]:
    """All constants of a rotary module: its plain attributes and its frequencies."""
    found = {}
    for name, value in {**vars(rotary), **rotary._buffers}.items():
        if name.startswith("_") or name == "training" or name.endswith("_cached"):
            continue
        if torch.is_tensor(value):
            found[name] = value.detach().float().cpu().flatten().tolist()
        elif isinstance(value, int | float | str | list | tuple | None):
            found[name] = plain(value)
    return found


def rotary_of(rotary: Any, stated: dict[str, Any], settings: TeacherSettings, checkpoint: Any) -> Any:
    """The student's rotary module, or a copy with the teacher's frequencies."""
    own = constants_of(rotary)
    if "rotary" not in stated and "inv_freq" in own and "rotary_base" not in stated:
        settings.unstated.append("rotary_base")
        return rotary
    wanted = [one for one in _wanted(own, stated, settings.config) if one]
    if any(same(want, own) for want in wanted):
        return rotary
    want = wanted[0]
    changed = [name for name in want if not same(want[name], own[name])]
    taken = {"inv_freq": "rotary frequencies", "seq_len_interpolation_factor": "position interpolation"}
    taken |= {"rotary_interleaved": "rotary_interleaved"}
    if "inv_freq" not in own or set(changed) - set(taken):
        name = next((name for name in changed if name not in taken), changed[0])
        raise another(checkpoint, name, want[name], own[name])
    if not same(want, wanted[-1]):
        raise refuse(
            flag("teacher_load"),
            given=f"{checkpoint.path}, whose arguments say {_scaling_of(stated)}, which not every script passes on",
            allowed="rotary frequencies that are known: the student's, or as tools/convert_hf_teacher.py says them",
            change="the student to the same flags, or the teacher to a converted checkpoint",
        )
    mine = copy.copy(rotary)  # no deep copy: it holds a process group
    mine._buffers = dict(rotary._buffers)
    for name in changed:
        value = want[name]
        if name == "inv_freq":
            value = torch.tensor(value, dtype=torch.float32, device=rotary.inv_freq.device)
            base = f" of base {stated['rotary_base']:g}" if "rotary_base" in stated else ""
            settings.adopted.append(taken[name] + base)
        else:
            settings.adopted.append(f"{taken[name]} {value} ({own[name]})")
        setattr(mine, name, value)
    return mine


def _wanted(own: dict[str, Any], stated: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """What the teacher's rotary module holds; two answers where its arguments can mean two.

    Megatron's pretrain_gpt.py leaves ``--rope-scaling-factor`` and ``--rotary-seq-len-interpolation-factor`` where they
    are: a model trained with them has neither, unless its script was another.
    """
    if "rotary" in stated:  # as they are
        return [{name: stated["rotary"].get(name, own[name]) for name in own}]
    if "inv_freq" not in own:  # YaRN: by its attributes
        names = {"rotary_base": "rotary_base", "scaling_factor": "rotary_scaling_factor"}
        return [own | {ours: stated[one] for ours, one in names.items() if ours in own and stated.get(one) is not None}]

    def with_scaling(factor: float, interpolation: float | None) -> dict[str, Any]:
        found = {"inv_freq": _frequencies(stated, config, factor), "seq_len_interpolation_factor": interpolation}
        found |= {"rotary_interleaved": bool(stated.get("rotary_interleaved"))}
        return own | {name: value for name, value in found.items() if name in own}

    factor = stated.get("rope_scaling_factor") or _SCALING
    as_stated = with_scaling(factor, stated.get("rotary_seq_len_interpolation_factor"))
    return [as_stated] if stated.get(CERTAIN) else [as_stated, with_scaling(_SCALING, None)]


def _scaling_of(stated: dict[str, Any]) -> str:
    names = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
    return ", ".join(f"{name} {stated[name]}" for name in names if stated.get(name))


def _frequencies(stated: dict[str, Any], config: Any, factor: float) -> list[float]:
    """Frequencies as Megatron makes them from what is stated."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    made = RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=stated.get("rotary_percent", 1.0),
        rotary_base=stated["rotary_base"],
        rope_scaling=bool(stated.get("use_rope_scaling", False)),
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    return made.inv_freq.tolist()
