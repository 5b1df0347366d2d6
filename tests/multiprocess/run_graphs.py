"""Worker of test_graphs: CUDA graphs are on in dense steps and off in sparse ones, on two ranks.

torchrun --nproc-per-node 2 tests/multiprocess/run_graphs.py [WORD ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unittest import mock

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import megatron.core
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from regate_megatron import ReGateConfig, ReGateError, attach, describe, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.compat import language_model_of
from tests.multiprocess import graphs_without_cuda as graphs
from tests.multiprocess import models as small
from tests.multiprocess.models import LAYERS, Step, batches, build, parallel, run, shared_store

LOCAL = {"cuda_graph_impl": "local"}
TE = {"cuda_graph_impl": "transformer_engine"}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
EXPERTS |= {"moe_token_dispatcher_type": "alltoall"}
DP2 = {"model": "gpt", "tp": 1, "pp": 1, "dp": 2}
# Megatron does not free an output that is a view, and what it puts behind a recorded layer makes one.
PP2 = {"model": "gpt", "tp": 1, "pp": 2, "set": {"deallocate_pipeline_outputs": False}}
VPP2 = PP2 | {"vpp": 2, "config": {"overlap_p2p_comm": True, "batch_p2p_comm": False}}  # as Megatron asks of two stages


def config(**options) -> ReGateConfig:
    """Sparse steps at 0 and 2, dense ones at 1 and 3."""
    phases = {"warmup_steps": 0, "cycle_steps": 100, "dense_steps": 0, "score": "random", "dense_layers": 1}
    return ReGateConfig(**phases | options)


def with_graphs(case: dict, **more) -> dict:
    return case | {"config": case.get("config", {}) | LOCAL | more}


def without_graphs(case: dict) -> dict:
    return case | {"config": {name: value for name, value in case["config"].items() if "cuda_graph" not in name}}


def train(case: dict, steps: str, models: list | None = None, teacher=None, **options) -> tuple[list, list]:
    """What was recorded, captured and replayed in each step ("s" is sparse, "d" dense); and losses and gradients."""
    models = build(case) if models is None else models
    attach(models, config(**options), teacher=teacher, pad_token=0)
    session, schedule = session_of(models), wrap_forward_backward(get_forward_backward_func())
    counts, found = [], []
    for phase in steps:
        session.restore(session.steps_done, session.steps_done + (phase == "d"), session.totals)
        step = Step()
        run(case, models, schedule, step)
        assert session.step.plan.is_sparse == (phase == "s")
        counts.append(graphs.take())
        gradients = [parameter.grad.clone() for model in models for parameter in model.parameters()]
        found.append(step.losses + gradients)
        session.finish()
    detach(models)
    return counts, found


def same(one: list, two: list) -> bool:
    return all(torch.equal(a, b) for s, t in zip(one, two, strict=True) for a, b in zip(s, t, strict=True))


def graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone(case: dict) -> None:
    case = with_graphs(case)
    layers, microbatches = LAYERS // case["pp"], run_length(case)
    runners = layers * (microbatches if case["pp"] > 1 else 1)
    counts, found = train(case, "ssdsd")
    none = (0, 0, 0)
    assert counts == [none, none, (runners, runners, 0), none, (0, 0, layers * microbatches)], counts
    assert same(found, train(without_graphs(case), "ssdsd")[1])


def a_run_that_begins_dense_replays_in_its_next_dense_step(case: dict) -> None:
    case = with_graphs(case)
    counts, _ = train(case, "dsd", dense_layers=2, **({"dense_last_layers": 1} if case["pp"] == 1 else {}))
    assert counts[1] == (0, 0, 0) and counts[0][0] and counts[2][2] == (LAYERS // case["pp"]) * run_length(case), counts


def layers_that_predict_ahead_replay_in_dense_steps_alone(case: dict) -> None:
    case = with_graphs(case | {"config": {"mtp_num_layers": 1}})
    counts, found = train(case, "sdsd")
    one, none = LAYERS + 1, (0, 0, 0)
    assert counts == [none, (one, one, 0), none, (0, 0, one * run_length(case))], counts
    assert same(found, train(without_graphs(case), "sdsd")[1])


def dense_steps_that_are_watched_for_gradients_replay(case: dict) -> None:
    """They run the decoder in two ranges of layers, every one of them."""
    case, none = with_graphs(case | {"model": "llava"}), (0, 0, 0)
    options = {"visual_keep_ratio": 0.5, "visual_score": "gradient", "warmup_steps": 1}
    counts, found = train(case, "dsd", **options)
    assert counts == [(LAYERS, LAYERS, 0), none, (0, 0, LAYERS * run_length(case))], counts
    assert same(found, train(without_graphs(case), "dsd", **options)[1])


def after_a_sparse_step_that_died_dense_ones_replay_and_so_does_evaluation_always(case: dict) -> None:
    models = build(with_graphs(case))
    attach(models, config(), pad_token=0)
    session, schedule = session_of(models), wrap_forward_backward(get_forward_backward_func())

    def dies(*_):
        raise KeyError("in the middle")

    def evaluate() -> tuple[int, int, int]:
        for model in models:
            model.eval()
        with torch.no_grad():
            run(case, models, lambda **given: schedule(**given | {"forward_only": True}), Step())
        for model in models:
            model.train()
        return graphs.take()

    try:
        run(case, models, schedule, dies)
    except KeyError:
        counts = [evaluate()]
    for phase in "dsd":
        session.restore(session.steps_done, session.steps_done + (phase == "d"), session.totals)
        run(case, models, schedule, Step())
        counts += [graphs.take(), evaluate()]
        session.finish()
    every, none = (0, 0, LAYERS * run_length(case)), (0, 0, 0)
    assert counts == [none, (LAYERS, LAYERS, 0), every, none, every, every, every], counts
    detach(models)


def a_short_sequence_would_find_no_graph(case: dict) -> None:
    """What is tested here can fail: with the switches taken away, Megatron's own check stops the sparse step."""
    models = build(with_graphs(case))
    attach(models, config(), pad_token=0)
    session, schedule = session_of(models), wrap_forward_backward(get_forward_backward_func())
    session.restore(0, 1, session.totals)
    run(case, models, schedule, Step())
    session.hooks._graphed.clear()
    try:
        run(case, models, schedule, Step())
    except AssertionError as error:
        assert "no matching cudagraph" in str(error), error
    else:
        raise AssertionError("nothing stopped it")
    detach(models)


def routers_with_graphs_of_their_own_are_off_and_dispatchers_keep_their_notes(case: dict) -> None:
    """Lengths differ between microbatches, and a dense dispatcher goes by what the capture left in it."""
    case, spec = with_graphs(case, **{graphs.SCOPE: ["moe_router"]}), small.get_gpt_decoder_block_spec

    def in_parts(*args, **kwargs):
        block = spec(*args, **kwargs)
        for layer in block.layer_specs:
            layer.module = MoETransformerLayer  # as hybrid models have them, which not every version can build here
        return block

    with mock.patch.object(small, "get_gpt_decoder_block_spec", in_parts):
        models = build(case)
    layers = models[0].decoder.layers
    experts = [layer.mlp for layer in layers]
    own = [one.token_dispatcher for one in experts]
    notes: list[list] = []

    def shapes() -> list:
        return [tuple(one.hidden_shape) for one in own if hasattr(one, "hidden_shape")]

    attach(models, config(budget="per-sample"), pad_token=0)
    session, schedule = session_of(models), wrap_forward_backward(get_forward_backward_func())
    counts, found = [], []
    for phase in "sdsd":
        session.restore(session.steps_done, session.steps_done + (phase == "d"), session.totals)
        step = Step()
        run(case, models, schedule, step)
        counts.append(graphs.take())
        notes.append(shapes())
        found.append(step.losses)
        session.finish()
    parts = 2 * len(layers)
    assert counts == [(0, 0, 0), (parts, parts, 0), (0, 0, 0), (0, 0, parts * run_length(case))], counts
    assert notes[0] == [] and len(notes[1]) == len(layers) and notes[1] == notes[2] == notes[3], notes
    detach(models)
    assert [one.token_dispatcher for one in experts] == own
    assert all(layer.use_partial_cudagraphs for layer in layers)
    assert same(found, [one[: len(found[0])] for one in train(without_graphs(case), "sdsd", budget="per-sample")[1]])


def graphs_of_transformer_engine_are_replayed_in_dense_steps_alone(case: dict) -> None:
    """Which call goes through one is asked of real layers; their graphs are there before the first step."""
    case = case | {"config": TE}
    models, calls = build(case), []
    layers = models[0].decoder.layers
    for layer in layers:
        layer.cuda_graphs = [None]

    def replay(self, *args, **kwargs):
        calls.append((self.layer_number, kwargs["hidden_states"].shape[0]))
        return self.forward(*args, **kwargs)

    real, TransformerLayer._te_cuda_graph_replay = TransformerLayer._te_cuda_graph_replay, replay
    try:
        lengths = []
        for phase in "sds":
            train(case, phase, models)
            lengths.append({length for _, length in calls})
            calls.clear()
    finally:
        TransformerLayer._te_cuda_graph_replay = real
    assert lengths == [set(), {24}, set()], lengths


def a_tower_is_without_graphs_in_sparse_steps(case: dict) -> None:
    """Its layers record in the same place: a first sparse step must not leave the language model's out of it."""
    case = with_graphs(case | {"model": "llava"})
    models = build(case)
    for layer in models[0].vision_model.decoder.layers:
        layer.cudagraph_manager = CudaGraphManager(language_model_of(models[0]).config)
    counts, _ = train(case, "sdsd", models, dense_layers=1)
    layers = LAYERS + 1
    assert counts == [(0, 0, 0), (layers, layers, 0), (0, 0, 0), (0, 0, layers * run_length(case))], counts


def teachers_have_no_graphs(case: dict) -> None:
    """One that is built gets none; one that is given runs without its own, and counts for no step."""
    case = with_graphs(case)
    models = build(case)
    attach(models, config(score="reference", teacher_load="student"), pad_token=0)
    session_of(models).prepare(2)
    built = session_of(models).reference.run.chunks
    assert built[0] is not models[0] and not any(graphs.managers(one) for one in built)
    detach(models)
    given = build(case)
    for chunk in given:
        chunk.train()  # as a caller may leave it, where nothing drops out
    counts, found = train(case, "sdsd", teacher=given, score="reference")
    one, none = (LAYERS // case["pp"]) * (run_length(case) if case["pp"] > 1 else 1), (0, 0, 0)
    assert counts == [none, (one, one, 0), none, (0, 0, (LAYERS // case["pp"]) * run_length(case))], counts
    plain = [chunk.eval() for chunk in build(without_graphs(case))]
    assert same(found, train(without_graphs(case), "sdsd", teacher=plain, score="reference")[1])


def what_is_off_is_described_and_given_back_after_each_step(case: dict) -> None:
    models = build(with_graphs(case))

    def own() -> list[str]:
        return [name for module in models[0].modules() for name in vars(module) if name.startswith("_should_call")]

    attach(models, config(), pad_token=0)
    assert "CUDA graphs are off in sparse steps, in all of the model" in describe(models)
    assert "CUDA graphs: on in dense steps, off in sparse ones" in describe(models)
    during = []

    def step(*args):
        during.append(len(own()))
        return real(*args)

    real = Step()
    run(case, models, wrap_forward_backward(get_forward_backward_func()), step)
    assert own() == [] and min(during) >= LAYERS, (own(), during)
    detach(models)


def a_module_that_does_not_ask_is_refused(case: dict) -> None:
    models = build(with_graphs(case))
    models[0].decoder.layers[0].mlp.cudagraph_manager = CudaGraphManager(models[0].config)
    try:
        attach(models, config(), pad_token=0)
    except ReGateError as error:
        assert str(error).startswith("regate: CUDA graphs: given a MLP that has some; allowed "), error
    else:
        raise AssertionError("not refused")
    assert session_of(models) is None and "forward" not in vars(models[0].decoder)


def run_length(case: dict) -> int:
    """Microbatches of a step."""
    return len(batches(case))


CHECKS: list[tuple[Callable[[dict], None], dict, str]] = [
    (graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone, DP2, "dp2"),
    (graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone, PP2, "pp2"),
    (graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone, VPP2, "vpp2"),
    (layers_that_predict_ahead_replay_in_dense_steps_alone, DP2, "ahead"),
    (dense_steps_that_are_watched_for_gradients_replay, DP2, "llava"),
    (after_a_sparse_step_that_died_dense_ones_replay_and_so_does_evaluation_always, DP2, "dp2"),
    (a_run_that_begins_dense_replays_in_its_next_dense_step, DP2, "dp2"),
    (a_run_that_begins_dense_replays_in_its_next_dense_step, PP2, "pp2"),
    (a_short_sequence_would_find_no_graph, DP2, "dp2"),
    (routers_with_graphs_of_their_own_are_off_and_dispatchers_keep_their_notes, DP2 | {"config": EXPERTS}, "experts"),
    (graphs_of_transformer_engine_are_replayed_in_dense_steps_alone, DP2, "dp2"),
    (a_tower_is_without_graphs_in_sparse_steps, DP2, "llava"),
    (teachers_have_no_graphs, DP2, "dp2"),
    (teachers_have_no_graphs, PP2, "pp2"),
    (what_is_off_is_described_and_given_back_after_each_step, DP2, "dp2"),
    (a_module_that_does_not_ask_is_refused, DP2, "dp2"),
]

# Core 0.17 has such expert layers in Mamba models alone; 0.20 builds no layer that predicts ahead without TE.
MISSING = {"0.17": "experts", "0.20": "ahead"}.get(megatron.core.__version__.split("rc")[0].rpartition(".")[0])
CHECKS = [one for one in CHECKS if one[2] != MISSING]


def main() -> None:
    graphs.install()
    store = shared_store()
    for number, (check, case, name) in enumerate(CHECKS):
        if not all(word in f"{check.__name__} {name}" for word in sys.argv[1:]):
            continue
        graphs.forget()
        with parallel(dict(case, name=f"{name}-{number}"), store):
            check(case)
        if os.environ["RANK"] == "0":
            print("holds:", check.__name__, name, flush=True)


if __name__ == "__main__":
    main()
