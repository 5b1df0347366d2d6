"""The line at the first sparse step: whether elision is worth it on the data that were seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regate_megatron.config import ReGateConfig, flag
from regate_megatron.method.worth import Decoder, Outlook, Rows, outlook
from regate_megatron.step.counters import Counters, reduce_counters

if TYPE_CHECKING:
    from regate_megatron.step.session import Session

_MUCH = 0.3  # of the positions


def first_look(session: Session) -> str | None:
    """What to expect, said once, after the first sparse step; None before and after. All ranks call this."""
    own, session.first_sparse = session.first_sparse, None
    if own is None:
        return None
    counters = reduce_counters(own, session.topology)
    model = session.language_models[0]
    decoder = decoder_of(model.config, session.config, int(getattr(model, "vocab_size", None) or 0))
    return f"[regate] {describe(counters, outlook_of(counters, decoder, session.config), session.config)}"


def decoder_of(transformer: Any, config: ReGateConfig, vocabulary: int) -> Decoder:
    """A language model in numbers, from its transformer config."""
    ffn = transformer.ffn_hidden_size
    if transformer.num_moe_experts:
        shared = transformer.moe_shared_expert_intermediate_size or 0
        ffn = transformer.moe_router_topk * (transformer.moe_ffn_hidden_size or ffn) + shared
    groups = transformer.num_query_groups or transformer.num_attention_heads
    return Decoder(
        layers=transformer.num_layers,
        dense_layers=config.dense_layers + config.dense_last_layers,
        hidden=transformer.hidden_size,
        ffn=ffn,
        kv=groups * (transformer.kv_channels or transformer.hidden_size // transformer.num_attention_heads),
        vocabulary=vocabulary,
        gated=bool(transformer.gated_linear_unit),
    )


def outlook_of(counters: Counters, decoder: Decoder, config: ReGateConfig) -> Outlook:
    """What to expect of steps like one that was counted, over all ranks."""
    dense = Rows(counters.positions_dense, counters.layer_squares_dense / decoder.layers)
    short_layers = decoder.layers - decoder.dense_layers
    squares = (counters.layer_squares_run - decoder.dense_layers * dense.squares) / max(short_layers, 1)
    left = 1 - counters.visual_total / max(counters.positions_dense, 1) if config.teacher_visual == "drop" else 1.0
    slowest, slowest_dense = counters.sparse_positions_slowest, counters.sparse_positions_dense
    return outlook(
        decoder,
        dense=dense,
        short=Rows(counters.positions_run, squares),
        text=Rows(left * dense.positions, left**2 * dense.squares) if config.needs_teacher else None,
        imbalance=(slowest / counters.sparse_positions) / (slowest_dense / counters.positions_dense),
        **shares(config),
    )


def shares(config: ReGateConfig) -> dict[str, float]:
    """Which share of a cycle's steps is sparse, and in which the teacher is asked."""
    sparse = 1 - config.dense_steps / config.cycle_steps
    return {"sparse": sparse, "taught": 1.0 if config.by_kind else sparse}


def describe(counters: Counters, found: Outlook, config: ReGateConfig) -> str:
    """One line: what could go, what it saves, what to change where it is little."""
    positions = max(counters.positions_dense, 1)
    targets, visual = counters.targets_total / positions, counters.visual_total / positions
    gone = counters.targets_total - counters.targets_kept + counters.visual_total - counters.visual_kept
    return (
        f"is it worth it? Of the positions {targets:.1%} are answer tokens and {visual:.1%} visual;"
        f" {gone / positions:.1%} went; {found.words()}{advice(found, targets, visual, config)}"
    )


def advice(found: Outlook, targets: float, visual: float, config: ReGateConfig) -> str:
    """What to change where little is saved; targets and visual positions as shares of all."""
    if found.verdict() == "worth it":
        return ""
    if visual > _MUCH and config.visual_keep_ratio == 1.0:
        return f"; much is visual: {flag('recipe')} pictures"
    if targets > _MUCH and config.budget != "dealt":
        return f"; the slowest rank decides: {flag('budget')} dealt"
    return ""
