"""Worker of test_reference: claims about reference losses and their cache, in one layout after another.

torchrun --nproc-per-node 4 tests/multiprocess/run_reference.py FOLDER RESULTS.json 1x1 2x1 2x2      (TP x PP)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
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
from regate_megatron.memory.references import ReferenceCache
from regate_megatron.teacher import values
from regate_megatron.teacher.fingerprint import fingerprint_of_checkpoint, fingerprint_of_model
from regate_megatron.teacher.manifest import read_probe
from regate_megatron.teacher.weights import open_language_model, save_language_model
from tests.multiprocess.models import Step, build, parallel, run, shared_store

STEPS = 3
SETTINGS = {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 0, "teacher_load": "student", "score": "regate"}
CONSTANTS = {
    "base": {"gpt": {"rotary_base": 100}},
    "percent": {"gpt": {"rotary_percent": 0.5}},
    "interpolation": {"gpt": {"seq_len_interpolation_factor": 4.0}},
    "epsilon": {"config": {"layernorm_epsilon": 0.1}},
    "softmax": {"config": {"softmax_scale": 1.5}},
}
OTHERS = {
    "positions": ({"positions": "none"}, "position_embedding_type none"),
    "activation": ({"config": {"activation_func": torch.nn.functional.silu}}, "activation_func silu"),
    "freq": ({"config": {"no_rope_freq": 2}}, "no_rope_freq [0, 1, 0, 1]"),
    "norms": ({"config": {"qk_layernorm": True}}, "layernorm.weight"),
    "output": ({"tied": True}, "output_layer.weight"),
}


def train(case: dict, *, models: list | None = None, before_sparse=None, **options) -> tuple[list, list[str]]:
    """One dense and some sparse steps; returns the models, still attached, and the plans' hashes."""
    models = models or build(case)
    attach(models, ReGateConfig(**{**SETTINGS, **options}), pad_token=0)
    schedule, hashes = wrap_forward_backward(get_forward_backward_func()), []
    for number in range(STEPS):
        if number == 1 and before_sparse:
            before_sparse(session_of(models))
        run(case, models, schedule, Step())
        hashes.append(session_of(models).step.plan.digest())
    return models, hashes


def losses_by_key(models: list) -> dict[str, list[float]]:
    """Every reference loss of the last step, over all replicas."""
    session, own = session_of(models), {}
    if session.planner:
        keys = torch.cat([one.reference_key_N2 for one in session.step.facts])
        own = {str(key): loss.tolist() for key, loss in zip(keys.tolist(), session.reference._found, strict=True)}
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def make_teacher(case: dict, folder: Path) -> str:
    save_language_model(build(case), folder / "teacher")
    return str(folder / "teacher")


def layouts_score_alike_whatever_the_students_dropout(case: dict, folder: Path) -> dict:
    results = {}
    for model in ("gpt", "llava"):
        models = build(dict(case, model=model))
        for one in models:
            for config in (one.config, getattr(one, "language_model", one).config):
                config.hidden_dropout = config.attention_dropout = 0.5
        models, _ = train(dict(case, model=model), models=models)
        results[model] = losses_by_key(models)
        assert all(value == value for losses in results[model].values() for value in losses)
        detach(models)
    return results


def fingerprint_is_of_the_weights_alone(case: dict, folder: Path) -> dict:
    """In memory, saved by this layout, inside a LLaVA, and again from the note."""
    model = build(dict(case, model="llava"))[0]
    models, _ = train(dict(case, model="llava"))
    topology = session_of(models).topology
    in_memory = fingerprint_of_model([model.language_model], topology)
    save_language_model([model.language_model], folder / "teacher")
    whole = folder / "whole"
    if dist.get_rank() == 0:
        whole.mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(whole))
    for source in (folder / "teacher", whole, whole):
        assert fingerprint_of_checkpoint(open_language_model(source), folder / "cache", topology) == in_memory, source
    assert dist.get_rank() or len(list((folder / "cache" / "fingerprints").iterdir())) == 2
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.view(-1)[-1] += 1
    assert fingerprint_of_model([model.language_model], topology) != in_memory
    detach(models)
    return {"weights": in_memory}


def teacher_that_predicts_ahead_is_its_main_head(case: dict, folder: Path) -> dict:
    """Taken from a student with such layers, or from a checkpoint with them, for a student with or without."""
    models, _ = train(case)
    expected = losses_by_key(models)
    detach(models)
    ahead = dict(case, config={**case.get("config", {}), "mtp_num_layers": 2})
    load = {"teacher_load": make_teacher(ahead, folder)}
    for student, options in ((ahead, {}), (ahead, load), (case, load)):
        models, _ = train(student, **options)
        assert losses_by_key(models) == expected
        detach(models)
    return expected


def warm_cache_builds_no_teacher_and_plans_alike(case: dict, folder: Path) -> dict:
    options = {"teacher_load": make_teacher(case, folder), "reference_cache": str(folder / "cache")}
    models, first = train(case, **options)
    assert session_of(models).reference.run is not None, "a new cache lets the teacher fail early"
    detach(models)
    models, second = train(case, **options)
    reference = session_of(models).reference
    assert second == first
    assert reference.run is None and "teacher: not built" in describe(models)
    assert reference.num_computed == 0 and (reference.num_found > 0) == session_of(models).topology.is_planner
    detach(models)
    return {}


def hits_here_and_misses_there_never_hang(case: dict, folder: Path) -> dict:
    options = {"teacher_load": make_teacher(case, folder), "reference_cache": str(folder / "cache")}
    models, first = train(case, **options)
    detach(models)
    dist.barrier()
    if dist.get_rank() == 0:
        for file in (folder / "cache" / "losses").glob("dp00000-*"):
            file.unlink()
    dist.barrier()
    models, second = train(case, **options)
    session = session_of(models)
    assert second == first
    assert session.reference.run is not None, "every rank builds its part"
    if session.planner:
        assert (session.reference.num_computed > 0) == (session.topology.dp_rank == 0)
    detach(models)
    return {}


def loss_that_is_not_finite_runs_all_ranks_dense_and_is_not_kept(case: dict, folder: Path) -> dict:
    def poison(session) -> None:
        if session.topology.dp_rank == 0:
            for parameter in session.reference.run.chunks[-1].parameters():
                parameter.data.fill_(torch.nan)

    options = {"teacher_load": make_teacher(case, folder), "reference_cache": str(folder / "cache")}
    models, _ = train(case, before_sparse=poison, **options)
    session = session_of(models)
    assert not session.step.plan.is_sparse
    if session.planner:
        assert session.step.fallback
        session.finish()
        assert session.totals.fallback_steps == STEPS - 1
    else:
        session.finish()
    size = session.topology.dp_size
    detach(models)
    dist.barrier()
    kept = {path.name[:7] for path in (folder / "cache" / "losses").iterdir()}
    assert kept == {f"dp{rank:05d}" for rank in range(1, size)}
    return {}


def offloaded_teacher_gives_the_same_losses(case: dict, folder: Path) -> dict:
    models, first = train(case)
    expected = losses_by_key(models)
    detach(models)
    models, second = train(case, teacher_offload=True)
    reference = session_of(models).reference
    assert not reference._offloaded.is_on_device and "on the host between uses" in describe(models)
    assert losses_by_key(models) == expected and first == second
    detach(models)
    return {}


def logits_exist_at_targets_only(case: dict, folder: Path) -> dict:
    seen: list[tuple[int, int]] = []

    def watch(session) -> None:
        teacher = session.reference.run.chunks[-1]
        if teacher.post_process:
            teacher.output_layer.register_forward_hook(lambda _l, i, o: seen.append((i[0].shape[0], o[0].shape[0])))

    for model in ("gpt", "llava"):
        models, _ = train(dict(case, model=model), before_sparse=watch)
        session = session_of(models)
        if session.planner:
            most = max(int(one.num_target_N.max()) for one in session.step.facts)
            length = session.step.facts[0].dense_length
            assert seen and all(rows == logits <= most for rows, logits in seen), (seen, most)
            assert most < length or model == "gpt"
        seen.clear()
        detach(models)
    return {}


def another_teacher_is_refused_on_every_rank(case: dict, folder: Path) -> dict:
    cache = str(folder / "cache")
    detach(train(case, reference_cache=cache)[0])
    models = build(case)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(1.5)
    try:
        train(case, models=models, reference_cache=cache)
    except ReGateError as error:
        assert "made with teacher" in str(error) and "weights" in str(error)
    else:
        raise AssertionError("not refused")
    return {}


def refused_on_every_rank(words: str, action) -> None:
    """``action`` must be refused in the one-line form on each rank, with ``words`` in it."""
    try:
        action()
    except ReGateError as error:
        assert words in str(error) and str(error).startswith("regate: "), error
    else:
        raise AssertionError(f"not refused: {words}")


def teacher_has_the_constants_of_its_own_checkpoint(case: dict, folder: Path) -> dict:
    """A checkpoint trained with other constants than the student's scores as the model that was trained did."""
    results = {}
    for name, own in CONSTANTS.items():
        trained = {**case, **own}
        models, _ = train(trained)  # a student with these constants is its own teacher
        expected = losses_by_key(models)
        save_language_model(session_of(models).reference.run.chunks, folder / name)
        detach(models)
        models, _ = train(case, teacher_load=str(folder / name))
        found = losses_by_key(models)
        detach(models)
        models, _ = train(case)
        wrong = losses_by_key(models)
        detach(models)
        assert found.keys() == expected.keys() == wrong.keys()
        pairs = [(a, b, c) for key in found for a, b, c in zip(found[key], expected[key], wrong[key], strict=True)]
        assert all(abs(a - b) < 1e-5 for a, b, _ in pairs), name
        assert max(abs(b - c) for _, b, c in pairs) > 1e-3, f"{name} makes no difference here"
        results[name] = found
    return results


def teacher_of_another_architecture_is_refused_by_name(case: dict, folder: Path) -> dict:
    for name, (own, words) in OTHERS.items():
        save_language_model(build({**case, **own}), folder / name)
        refused_on_every_rank(words, lambda name=name: train(case, teacher_load=str(folder / name)))
    return {}


def teacher_that_no_list_tells_apart_is_found_by_a_fixed_row(case: dict, folder: Path) -> dict:
    """The same weights, and a constant that (let us say) nobody thought of."""
    cache, neutral = str(folder / "cache"), values.NEUTRAL
    values.NEUTRAL = neutral | {"layernorm_epsilon"}
    try:
        detach(train(case, reference_cache=cache)[0])
        detach(train(case, reference_cache=cache)[0])  # the same one passes
        other = {**case, **CONSTANTS["epsilon"]}
        refused_on_every_rank("fixed row", lambda: train(other, reference_cache=cache))
    finally:
        values.NEUTRAL = neutral
    refused_on_every_rank("layernorm_epsilon", lambda: train(other, reference_cache=cache))
    dist.barrier()
    return {"losses": read_probe(folder / "cache")}


def samples_at_other_position_ids_have_losses_of_their_own(case: dict, folder: Path) -> dict:
    """With learned positions: a cache filled at usual ids gives nothing to the same tokens at others."""
    learned = dict(case, positions="learned_absolute")
    backwards, options = dict(learned, places="backwards"), {"reference_cache": str(folder / "cache")}
    found = []
    for one, more in ((learned, options), (backwards, options), (backwards, {}), (learned, options)):
        dist.barrier()
        models, _ = train(one, **more)
        found.append(losses_by_key(models))
        detach(models)
    usual, cached, fresh, again = found
    assert cached.keys() == fresh.keys() and again == usual
    with_targets = {key for key in usual if usual[key]}
    assert with_targets and not with_targets & cached.keys()
    assert all(abs(a - b) < 2e-3 * (1 + b) for key in fresh for a, b in zip(cached[key], fresh[key], strict=True))
    return {}


def teacher_taken_from_the_student_comes_back_with_saved_state(case: dict, folder: Path) -> dict:
    """In one's own loop: the student has learned since; its teacher is who it was, or the run is refused."""
    models, _ = train(case)
    expected = losses_by_key(models)
    save_state(models, folder / "state")
    detach(models)

    def go_on(prepares: bool, **options):
        models = build(case)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.mul_(1.5)
        attach(models, ReGateConfig(**{**SETTINGS, **options}), pad_token=0)
        if prepares:
            session_of(models).prepare(2)
        said = load_state(models, folder / "state")
        run(case, models, wrap_forward_backward(get_forward_backward_func()), Step())
        return models, said

    for prepares in (False, True):
        models, said = go_on(prepares)
        assert losses_by_key(models) == expected and "teacher" not in said
        save_state(models, folder / "again")  # and it goes on from folder to folder
        detach(models)
    save_language_model(build(case), folder / "named")
    models, said = go_on(False, teacher_load=str(folder / "named"))
    assert losses_by_key(models) == expected and "teacher" not in said, "the same one, from a checkpoint"
    detach(models)
    save_language_model(build({**case, **CONSTANTS["epsilon"]}), folder / "other")
    models, said = go_on(False, teacher_load=str(folder / "other"))
    assert "; the teacher is another one than before: layernorm_epsilon" in said, said
    detach(models)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "state" / "teacher")
    dist.barrier()
    refused_on_every_rank("goes on with another teacher than it had (weights", lambda: go_on(False))
    return {}


def two_replicas_share_after_a_refresh(case: dict, folder: Path) -> dict:
    models, _ = train(case, reference_cache=str(folder / "cache"))
    session = session_of(models)
    if session.planner:
        session.flush()
    dist.barrier()
    if session.planner:
        store: ReferenceCache = session.reference.store
        store.refresh()
        counts: list = [None] * session.topology.dp_size
        dist.all_gather_object(counts, len(store), group=session.topology.planner_group)
        assert len(set(counts)) == 1 and counts[0] >= 7  # of eight samples one has no target
    detach(models)
    return {}


CLAIMS = [value for value in list(globals().values()) if getattr(value, "__annotations__", {}).get("folder") == "Path"]
CLAIMS = [claim for claim in CLAIMS if claim is not make_teacher]


def main(folder: str, results_file: str, *layouts: str) -> None:
    results: dict[str, dict] = {}
    store = shared_store()
    for layout in layouts:
        tp, pp = map(int, layout.split("x"))
        case = {"name": layout, "model": "gpt", "tp": tp, "pp": pp, "dense_layers": 1}
        with parallel(case, store):
            for claim in CLAIMS:
                place = Path(folder) / f"{claim.__name__}-{layout}"
                place.mkdir(exist_ok=True)
                try:
                    results[f"{claim.__name__}@{layout}"] = claim(case, place)
                except BaseException:  # the other ranks cannot go on
                    print(f"{claim.__name__}@{layout} on rank {dist.get_rank()}", file=sys.stderr)
                    traceback.print_exc()
                    raise
    if os.environ["RANK"] == "0":
        Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
