"""The small line's flags, made from the cluster's."""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import Any

from regate_megatron.config import ReGateConfig, flag
from regate_megatron.cpu.dry_run import shrink
from regate_megatron.cpu.dry_run.line import LaunchLine
from regate_megatron.cpu.emulation.arguments import PRECISION, take_out, what_goes, without
from regate_megatron.support import setting_of_flags, unproven

SMALL_VOCABULARY = 127  # padded to 128; some versions count an end of document too
_MULTIMODAL = ("--img-h", "--img-w", "--patch-dim", "--dataloader-seq-length")
_FOLDERS = {"--regate-trace": "trace", "--regate-reference-cache": "cache", "--save": "save"}


@functools.cache
def parser_of_megatron() -> argparse.ArgumentParser:
    """Megatron's own parser, with our flags."""
    from megatron.training import arguments

    from regate_megatron.flags import add_arguments

    return add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def small_flags(
    line: LaunchLine,
    cluster: Any,
    config: ReGateConfig | None,
    *,
    replicas: int,
    folder: Path,
    keeps_lengths: bool = False,
) -> tuple[list[str], list[str]]:
    """The flags to run here, and what to say of them.

    Args:
        cluster: Megatron's validated namespace of the line.
        replicas: data-parallel replicas to run.
        folder: a temporary folder for everything the run writes.
        keeps_lengths: see :func:`.shrink.shrink`.
    """
    known = parser_of_megatron()._option_string_actions
    small = _shrunk(line, cluster, config, replicas, keeps_lengths)
    fp8 = _fp8_multiple(line)
    cluster_replicas = cluster.world_size // shrink.dense_group(cluster)
    if replicas != cluster_replicas:
        small.said.insert(0, f"data-parallel-size {cluster_replicas} -> {replicas}")
    flags, went = take_out(line.flags, what_goes() | PRECISION, known)
    small.said += [f"{', '.join(dict.fromkeys(names))} taken out: {why}" for why, names in went.items()]
    if config is not None:
        small.said += _unproven(line, config)
    names = " ".join(shrink.DROPPED).split()
    flags = without(flags, [*names, *(f"{name}*" for name in names)], known)
    flags = _data(flags, line.flags, small.said)
    values = {name: value for name, value in small.values.items() if name in known or name in _MULTIMODAL}
    values |= {"--train-iters": shrink.TRAIN_STEPS, "--eval-iters": 1, "--eval-interval": shrink.TRAIN_STEPS}
    values |= {"--log-interval": 1, "--num-workers": 0}
    if config is not None:
        values |= _regate(config, fp8)
        sparse = "the last two sparse" if config.elides else "none sparse, as in the whole run"
        small.said.append(f"schedule to {shrink.TRAIN_STEPS} steps, {sparse}" + _ratio(config))
    values |= {name: folder / place for name, place in _FOLDERS.items() if name in line.options}
    if "--data-cache-path" in known:  # index files go beside the data otherwise
        values["--data-cache-path"] = folder / "data-cache"
    if "--save" in values:
        values["--save"].mkdir()  # core 0.17 writes its progress before it makes the folder
        values["--save-interval"] = shrink.TRAIN_STEPS
    flags = without(flags, values, known)
    for name, value in values.items():
        flags += [name, *str(value).split()]
    if fp8 > 1:
        small.said.append(f"FP8 to the precision beside it; lengths stay multiples of {fp8}")
    return flags, small.said


def small_values(line: LaunchLine, cluster: Any) -> dict[str, Any]:
    """The sizes of the small model, for an estimate of its weight."""
    return _shrunk(line, cluster, None, 1).values


def _shrunk(
    line: LaunchLine, cluster: Any, config: ReGateConfig | None, replicas: int, keeps_lengths: bool = False
) -> shrink.Shrunk:
    return shrink.shrink(
        cluster,
        replicas=replicas,
        dense_layers=config.dense_layers + config.dense_last_layers if config else 0,
        is_multimodal="vlm" in Path(line.script).name or not line.options.isdisjoint(_MULTIMODAL[:2]),
        fp8_multiple=_fp8_multiple(line),
        keeps_lengths=keeps_lengths,
    )


def _fp8_multiple(line: LaunchLine) -> int:
    """What FP8 asks of lengths, as :func:`regate_megatron.support.alignment.length_alignment` has it; 1 without FP8."""
    if "--fp8-format" not in line.options:
        return 1
    from megatron.core.fp8_utils import get_fp8_align_size

    options = parser_of_megatron().parse_known_args(line.flags)[0]
    return get_fp8_align_size(options.fp8_recipe)


def _unproven(line: LaunchLine, config: ReGateConfig) -> list[str]:
    """What of the line as given no GPU has shown with ReGATE: it is taken out here."""
    from regate_megatron.integrations.flags import run_of

    options = parser_of_megatron().parse_known_args(line.flags)[0]
    options.tp_comm_overlap |= "--decoder-tp-comm-overlap" in line.options  # pretrain_vlm.py's, of its language model
    return unproven(setting_of_flags(run_of(options), config, line.script))


def _regate(config: ReGateConfig, fp8_multiple: int) -> dict[str, Any]:
    dense = min(config.dense_steps, 1)
    values = {"--regate-warmup-steps": 2 - dense, "--regate-cycle-steps": 8, "--regate-dense-steps": dense}
    if config.dense_at != "start":
        values["--regate-dense-at"] = "start"  # the first sparse step is among the four
    if not config.elides:
        values["--regate-dense-steps"] = 8
    values |= {flag(name): least for name, _, least in _moving(config)}
    if fp8_multiple > 1:
        values["--regate-length-multiple"] = math.lcm(config.length_multiple or 1, fp8_multiple)
    if config.needs_teacher:
        values["--regate-teacher-load"] = "student"
    return values


def _ratio(config: ReGateConfig) -> str:
    changed = [f"{least:g}" for _, start, least in _moving(config) if least != start]
    text = f" with the ratio they end with, {' and '.join(changed)}" if changed else ""
    return text + ("; dense ones are not scattered here" if config.dense_at == "random" else "")


def _moving(config: ReGateConfig) -> list[tuple[str, float, float]]:
    """Ratios that move, their first value, and the least: the first cycle has the first one, which may be 1."""
    names = ("keep_ratio", "visual_keep_ratio")
    values = [(name, getattr(config, name), getattr(config, f"{name}_end")) for name in names]
    return [(name, start, min(start, end)) for name, start, end in values if end is not None]


def _data(flags: list[str], given: list[str], said: list[str]) -> list[str]:
    """Data and tokenizer as given where all their files are here, else mock data and a tokenizer of numbers."""
    options = parser_of_megatron().parse_known_args(given)[0]
    paths = []
    for name in f"{shrink.DATA} {shrink.TOKENIZER}".split():
        value = getattr(options, name.removeprefix("--").replace("-", "_"), None) or []
        paths += [word for word in ([value] if isinstance(value, str) else value) if not _is_number(word)]
    missing = [path for path in paths if not (Path(path).exists() or Path(f"{path}.idx").exists())]
    if paths and not missing and not options.mock_data:
        return flags
    said.append("data and tokenizer to mock data" + (f" ({missing[0]} is not here)" if missing else ""))
    names = shrink.REPLACED_WITH_DATA.split()
    replaced = [*names, *(f"{name}*" for name in names)]
    flags = without(flags, replaced, parser_of_megatron()._option_string_actions)
    mock = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {SMALL_VOCABULARY} --split 90,5,5"
    return [*flags, *mock.split()]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
