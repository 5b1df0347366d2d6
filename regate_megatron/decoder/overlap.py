"""Transformer Engine's overlap of tensor-parallel communication, off where sequences are short.

With ``tp_comm_overlap`` a linear layer gathers and scatters through user buffers, which are as long as the dense
sequence. Whether it does so are instance attributes of the layer, set when it is built and read in every forward; the
backward of a forward does as that did. So the short layers have them off for the whole of a sparse step (recompute runs
them again in backward): they communicate as without the flag. Dense steps overlap as ever, and so do the dense layers
of a sparse one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from regate_megatron.decoder.switches import Switch

_PREFIX = "ub_"


def overlapping(modules: Iterable[nn.Module]) -> list[Switch]:
    """What to switch off so that none of the modules uses user buffers."""
    return [Switch(one, name, False) for one in modules for name, value in vars(one).items() if _is_on(name, value)]


def _is_on(name: str, value: object) -> bool:
    return name.startswith(_PREFIX) and value is True
