"""What is attached, in one line for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regate_megatron import compat
from regate_megatron.config import ReGateConfig

if TYPE_CHECKING:
    from regate_megatron.step.session import Session


def attached_line(session: Session) -> str:
    """What was attached, where, and to which versions."""
    config, transformer = session.config, session.language_models[0].config
    sizes = (transformer.tensor_model_parallel_size, transformer.pipeline_model_parallel_size, session.topology.dp_size)
    layout = " ".join(f"{name}{size}" for name, size in zip(("TP", "PP", "DP"), sizes, strict=True))
    for name, field in (("CP", "context"), ("EP", "expert_model"), ("VPP", "virtual_pipeline_model")):
        size = getattr(transformer, f"{field}_parallel_size", None) or 1
        layout += f" {name}{size}" if size > 1 else ""
    last = f" and the last {config.dense_last_layers}" if config.dense_last_layers else ""
    parts = [
        *([f"recipe {config.recipe}"] if config.recipe else []),
        *_kept_of(config),
        *([f"{' and '.join(config.idle)} not used: nothing reads it"] if config.idle else []),
        f"dense layers {config.dense_layers}{last} of {transformer.num_layers}",
        f"budget {config.budget} ({_why(config, session.topology.dp_size)})",
        config.schedule.describe(),
        _teacher_of(session),
        compat.versions(),
    ]
    return f"attached to {type(session.models[0]).__name__} ({layout}): " + "; ".join(parts)


def _why(config: ReGateConfig, replicas: int) -> str:
    """What the budget is taken for, where there are so many data-parallel replicas."""
    if config.budget == "dealt":
        also = ", in dense steps too" if config.deal_dense else ""
        several = f"rows move so that {replicas} replicas run alike{also}"
        return "every sample keeps its share, " + ("one replica has nothing to deal" if replicas == 1 else several)
    return {
        "uniform": "all rows are as long",
        "balanced": "no row moves, and replicas run the same total",
        "per-sample": "every sample keeps its share, and replicas wait for the longest",
    }[config.budget]


def _kept_of(config: ReGateConfig) -> list[str]:
    """What ranks which positions, and how many of them run."""
    kept = ["all targets"]
    if config.ranks_targets:
        ratio = _ratio(config.keep_ratio, config.keep_ratio_end, config)
        of_batch = " of the batch" if config.share == "batch" else ""
        of_batch += "" if config.least_score is None else f" that score above {config.least_score:g}"
        by_kind = " (difficulty by kind)" if config.by_kind else ""
        kept = [f"score {config.score}{by_kind}, keep {ratio} of the targets{of_batch}"]
    if config.ranks_visual:
        ratio = _ratio(config.visual_keep_ratio, config.visual_keep_ratio_end, config)
        drawn = f" (drawn, spread {config.visual_keep_ratio_spread:g})" if config.visual_keep_ratio_spread else ""
        kept.append(f"visual score {config.visual_score}, keep {ratio}{drawn} of the visual positions")
    return kept


def _ratio(start: float, end: float | None, config: ReGateConfig) -> str:
    return f"{start:g}" + ("" if end is None else f" to {end:g} (over {config.keep_ratio_steps} iterations)")


def _teacher_of(session: Session) -> str:
    if session.reference is None and session.teacher_source is None:
        unused = " and ".join(session.config.unused)
        return f"no teacher ({unused} not used: nothing asks it)" if unused else "no teacher"
    reads = {"drop": "reads rows without images", "pad": "reads pad tokens for images"}[session.config.teacher_visual]
    waits = ""
    if session.reference is not None and session.reference.run is None:
        waits = ", built when the cache lacks a loss"
    return f"teacher {session.config.teacher_load or 'of the caller'} ({reads}{waits})"
