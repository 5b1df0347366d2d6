"""Worker of test_rules: what is refused, ends or is given back on four ranks, at once on every rank.

torchrun --nproc-per-node 4 tests/multiprocess/run_rules.py
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import (
    ReGateConfig,
    ReGateError,
    attach,
    describe,
    detach,
    load_state,
    save_state,
    wrap_forward_backward,
)
from regate_megatron.api import session_of
from regate_megatron.support import HostRun
from tests.multiprocess.models import Step, batches, build, language_models, merged_length, parallel, run, shared_store

DP4 = {"name": "dp4", "model": "gpt", "tp": 1, "pp": 1}
TP2_PP2 = {"name": "tp2-pp2", "model": "gpt", "tp": 2, "pp": 2}
TP2 = {"name": "tp2", "model": "gpt", "tp": 2, "pp": 1}
CP2 = {"name": "cp2", "model": "gpt", "tp": 1, "pp": 1, "cp": 2}
PACKED_MROPE = CP2 | {"name": "packed-mrope", "positions": "mrope", "packed": True}
PACKED_MROPE["config"] = {"mrope_section": [2, 1, 1]}
NO_LAYER = {"name": "nolayer", "model": "gpt", "tp": 1, "pp": 4}
NO_LAYER["config"] = {"pipeline_model_parallel_layout": "E|tt|tt|L"}


def config(**options) -> ReGateConfig:
    return ReGateConfig(**{"warmup_steps": 1, "score": "student", **options})


def num_groups() -> int:
    """Process groups of this rank."""
    return len(dist.distributed_c10d._world.pg_map)


def refused(words: str, action: Callable[[], object]) -> None:
    """Every rank raises one line, the same, with ``words`` in it."""
    try:
        action()
    except ReGateError as error:
        line = str(error)
    else:
        line = "not refused"
    lines: list = [None] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    assert len(set(lines)) == 1 and words in line and line.startswith("regate: ") and "change" in line, lines


def detach_gives_back_the_groups_that_attach_made(case: dict) -> None:
    models, schedule = build(case), wrap_forward_backward(get_forward_backward_func())
    before = num_groups()
    settled = None
    for _ in range(4):
        attach(models, config())
        assert num_groups() > before
        for _ in range(2):
            run(case, models, schedule, Step())
        detach(models)
        assert num_groups() == before
        settled = settled or threading.active_count()
    assert threading.active_count() == settled
    detach(models)  # twice is harmless
    dist.barrier()  # the groups that were there still work


def refused_attach_leaves_no_group(case: dict) -> None:
    class GlmLike(type(build(case)[0])):
        def forward(self, *args, **kwargs):
            raise AssertionError

        def get_rope_index(self):
            """What Qwen2.5-VL of Megatron-Bridge has too."""

    before = num_groups()
    for _ in range(4):
        refused("given 9 with 4 decoder layers", lambda: attach(build(case), config(dense_layers=9)))
        assert num_groups() == before
        models = build(case)
        for model in models:
            model.__class__ = GlmLike
        refused("model: given GlmLike (", lambda: attach(models, config()))  # noqa: B023
        assert num_groups() == before
    on_one = config(trace="/proc/nowhere" if dist.get_rank() == 2 else None)  # a fault of one rank alone
    refused("--regate-trace: given", lambda: attach(build(case), on_one))
    assert num_groups() == before


class Switched(torch.nn.Module):
    """An adapter as Megatron-Bridge has it, as far as it is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self._adapter_enabled = torch.nn.Linear(1, 1), True

    def disable_adapter_layers(self) -> None:
        self._adapter_enabled = False

    def enable_adapter_layers(self) -> None:
        self._adapter_enabled = True


def a_stage_without_adapters_takes_the_frozen_base_as_teacher_where_another_has_some(case: dict) -> None:
    """Else it would save, or look for, a copy that the other stages know nothing of."""
    models = build(case)
    for language_model in language_models(models):
        language_model.requires_grad_(False)
        if language_model.pre_process:
            language_model.decoder.layers[0].switched = Switched()
    own = config(score="reference", teacher_load="student")
    attach(models, own, run=HostRun(has_adapters=True))
    assert session_of(models).teacher_source.is_base
    detach(models)


def data_that_end_early_are_told_on_every_rank(case: dict, how: str) -> None:
    """Only the last rank runs out, in its last microbatch."""
    models, schedule = build(case), wrap_forward_backward(get_forward_backward_func())
    attach(models, config())
    own = batches(case)
    number = len(own)
    is_short = dist.get_rank() == dist.get_world_size() - 1

    def generator() -> Iterator[dict]:
        source = iter(own[: number - is_short])
        for _ in range(number):
            yield dict(next(source))  # Python makes a RuntimeError of it

    plain = iter([dict(one) for one in own[: number - is_short]])
    arguments = {
        "forward_step_func": Step(),
        "data_iterator": generator() if how == "generator" else plain,
        "model": models[0],
        "num_microbatches": number,
        "seq_length": merged_length(case),
        "micro_batch_size": 2,
        "forward_only": False,
    }
    words = (
        f"data iterator: given the end of its data after {number - 1} of {number} microbatches; allowed all {number} "
    )
    refused(words, lambda: schedule(**arguments))
    detach(models)


def negative_labels_train_and_a_ratio_of_one_leaves_them_alone(case: dict) -> None:
    """Labels of -100 under a loss mask of ones: the same losses and gradients as plain Megatron."""
    case = dict(case, unlabelled=True)
    plain, ours = build(case), build(case)
    before, after = Step(), Step()
    attach(ours, config(keep_ratio=1.0, dense_steps=0, warmup_steps=0))
    schedule = wrap_forward_backward(get_forward_backward_func())
    run(case, plain, get_forward_backward_func(), before)
    run(case, ours, schedule, after)
    assert all(torch.equal(a, b) for a, b in zip(before.losses, after.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.loss_masks, after.loss_masks, strict=True))
    for (name, a), (_, b) in zip(plain[0].named_parameters(), ours[0].named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    session_of(ours).finish()
    assert session_of(ours).dealing is None, "a run that elides nothing moves nothing"
    detach(ours)


def dense_steps_are_plain_unless_they_are_dealt_and_then_have_the_gradient_of_the_same_batch(case: dict) -> None:
    """Rows of two lengths, the longer ones on two of four ranks; a warm-up step."""
    case, losses = dict(case, rows=1, uneven=True, ragged=True), []
    schedule, found = wrap_forward_backward(get_forward_backward_func()), []
    for options in (None, {}, {"deal_dense": True}):
        models, step = build(case), Step()
        if options is not None:
            attach(models, config(**options))
        run(case, models, get_forward_backward_func() if options is None else schedule, step)
        found.append((step.losses, {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}))
        detach(models)
    (plain, before), (same, after), (dealt, summed) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert len({len(one[0]) for one in plain}) == 1 and sorted(len(one[0]) for one in dealt) == [21, 24]
    for one in (plain, dealt):
        losses.append([None] * dist.get_world_size())
        dist.all_gather_object(losses[-1], [float(loss_BS.sum()) for loss_BS in one])
    ours, theirs = (sorted(value for own in of_ranks for value in own) for of_ranks in losses)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=0.0)
    for name, gradient in before.items():
        for one in (gradient, summed[name]):
            dist.all_reduce(one)
        torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def a_cut_that_weighs_targets_is_described(case: dict) -> None:
    models = build(dict(case, per_token_loss=False))
    attach(models, config())
    assert "context parallelism without --calculate-per-token-loss" in describe(models)
    detach(models)
    models = build(case)
    attach(models, config())
    assert "--calculate-per-token-loss" not in describe(models)
    detach(models)


def a_first_stage_without_layers_is_refused_with_a_way_out(case: dict) -> None:
    models = build(case)
    words = "given 1 with 0 layers in the first pipeline chunk; "
    refused(words, lambda: attach(models, config()))
    refused("change it to 0, or take another --pipeline-model-parallel-layout", lambda: attach(models, config()))


def a_window_on_one_layer_is_refused(case: dict) -> None:
    """Only one pipeline stage has that layer: every rank hears of it."""
    models = build(case)
    for layer in language_models(models)[-1].decoder.layers:
        if layer.layer_number == 4:
            layer.config = copy.copy(layer.config)
            layer.config.window_size = (8, 0)
    refused("sliding-window attention: given window_size=(8, 0) in decoder.layers.", lambda: attach(models, config()))


def packed_rows_whose_positions_the_model_cuts_otherwise_are_refused_when_they_are_read(case: dict) -> None:
    """In the first step, be it dense: every rank of both replicas says so."""
    models, schedule = build(case), wrap_forward_backward(get_forward_backward_func())
    attach(models, config())
    words = "packed rows: given mrope and context parallelism in Megatron-Core's own GPTModel"
    refused(words, lambda: run(case, models, schedule, Step()))


KNOWN: dict[tuple, torch.Tensor] = {}  # by sample, what was learned in the claim before


def gradients_learned_at_one_size_are_known_at_another(case: dict, folder: str) -> None:
    """A dense step teaches them on four replicas; on two, each with twice the rows, a sparse step knows the same."""
    models, schedule = build(case), wrap_forward_backward(get_forward_backward_func())
    rule = {"keep_ratio": 1.0, "visual_keep_ratio": 0.25, "visual_score": "gradient", "dense_steps": 0}
    attach(models, config(score="random", **rule))
    if KNOWN:
        load_state(models, folder)
    run(case, models, schedule, Step())
    session = session_of(models)
    facts = session.step.whole
    session.finish()
    found: dict[tuple, torch.Tensor] = {}
    if session.planner:
        count_N = torch.full((len(facts.key_N2),), 16)
        found_NV = session.learned.look_up_gradients(facts.key_N2, count_N, 2).view(-1, 16)
        found = {tuple(key): value_V for key, value_V in zip(facts.key_N2.tolist(), found_NV, strict=True)}
    if KNOWN:
        assert session.phase == "sparse"
        for key, value_V in found.items():
            torch.testing.assert_close(value_V, KNOWN[key], rtol=0, atol=0, equal_nan=True)
        return
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    for one in every:
        KNOWN.update(one)
    assert len(KNOWN) == 8 and sum(bool(value_V.isnan().all()) for value_V in KNOWN.values()) == 1
    save_state(models, folder)


def a_teacher_given_with_sequence_parallelism_scores_as_one_without(case: dict) -> None:
    """The student has none, so the teacher's own layout says what its rows' lengths divide by: here they are odd."""
    found, own = {}, [{name: values[:, :23] for name, values in batch.items()} for batch in batches(case)]
    for has_it in (False, True):
        teacher = [chunk.eval() for chunk in build(case | {"sp": has_it})]
        models = attach(
            build(case), config(score="reference", warmup_steps=0, dense_steps=0), teacher=teacher, pad_token=0
        )
        run(case, models, wrap_forward_backward(get_forward_backward_func()), Step(), own)
        step = session_of(models).step
        assert step.plan.is_sparse and bool(step.reference) == session_of(models).topology.is_planner
        found[has_it] = step.plan.digest(), step.reference
        detach(models)
    (plan, without), (other, with_it) = found[False], found[True]
    assert plan == other
    for one, two in zip(without or (), with_it or (), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    teacher = [
        chunk.eval() for chunk in build(case | {"sp": True, "gpt": {"scatter_embedding_sequence_parallel": False}})
    ]
    models = build(case)
    words = "given sequence_parallel=True where the model does not cut its words itself"
    refused(words, lambda: attach(models, config(score="reference"), teacher=teacher, pad_token=0))


def main() -> None:
    store = shared_store()
    if os.environ["RANK"] == "0":
        store.set("folder", tempfile.mkdtemp())
    folder = store.get("folder").decode()
    checks = [
        (detach_gives_back_the_groups_that_attach_made, DP4),
        (detach_gives_back_the_groups_that_attach_made, TP2_PP2),
        (refused_attach_leaves_no_group, DP4),
        (refused_attach_leaves_no_group, TP2_PP2),
        (data_that_end_early_are_told_on_every_rank, DP4, "iterator"),
        (data_that_end_early_are_told_on_every_rank, TP2_PP2, "generator"),
        (negative_labels_train_and_a_ratio_of_one_leaves_them_alone, DP4),
        (dense_steps_are_plain_unless_they_are_dealt_and_then_have_the_gradient_of_the_same_batch, DP4),
        (a_cut_that_weighs_targets_is_described, CP2),
        (a_first_stage_without_layers_is_refused_with_a_way_out, NO_LAYER),
        (a_stage_without_adapters_takes_the_frozen_base_as_teacher_where_another_has_some, TP2_PP2),
        (a_teacher_given_with_sequence_parallelism_scores_as_one_without, TP2),
        (a_window_on_one_layer_is_refused, TP2_PP2),
        (packed_rows_whose_positions_the_model_cuts_otherwise_are_refused_when_they_are_read, PACKED_MROPE),
        (gradients_learned_at_one_size_are_known_at_another, dict(DP4, model="llava", side=32), folder),
        (gradients_learned_at_one_size_are_known_at_another, TP2 | {"model": "llava", "side": 32}, folder),
    ]
    for number, (check, case, *more) in enumerate(checks):
        with parallel(dict(case, name=f"{case['name']}-{number}"), store):
            check(case, *more)
        if os.environ["RANK"] == "0":
            print("holds:", check.__name__, case["name"], flush=True)
    if os.environ["RANK"] == "0":
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
