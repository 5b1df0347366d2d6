"""Worker of test_session: claims about one rank's session, each a function here. Real GPTModel, real schedule.

torchrun --nproc-per-node 1 tests/multiprocess/run_session.py CLAIM [CLAIM ...]
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import (
    ReGateConfig,
    ReGateError,
    attach,
    describe,
    detach,
    load_state,
    save_state,
    step_done,
    wrap_forward_backward,
)
from regate_megatron.api import session_of
from regate_megatron.batches import BatchAdapter
from regate_megatron.teacher.settings import settings_of, settle
from regate_megatron.teacher.stated import stated_settings
from regate_megatron.teacher.values import NEUTRAL
from regate_megatron.teacher.weights import LanguageModelCheckpoint, save_language_model
from tests.claims import check
from tests.multiprocess.models import Step, build, run
from tests.tools.run_convert import build as build_of_arguments
from tests.tools.run_convert import megatron_arguments

GPT = {"model": "gpt", "tp": 1, "pp": 1, "dense_layers": 1}
LLAVA = dict(GPT, model="llava")
MIMO = dict(GPT, model="mimo")


def config(**options) -> ReGateConfig:
    return ReGateConfig(
        **{"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 0, "score": "regate", "teacher_load": "student"}
        | options
    )


def attached(case: dict = GPT, **options):
    models = attach(build(case), config(**options), pad_token=0)
    session_of(models).prepare(2)
    return models, session_of(models), wrap_forward_backward(get_forward_backward_func())


def values_of(session) -> torch.Tensor:
    """All that a session's store holds, in the order it came in; float16."""
    snapshot = session.planner.learned.snapshot()
    session.planner.learned.release()
    return torch.cat([torch.from_numpy(piece.value_X.copy()) for piece in snapshot.pieces()])


def replayed_step_has_the_same_plan_and_counts_once() -> None:
    """Megatron's rerun state machine calls the schedule again for the same step."""
    models, session, schedule = attached()
    session.counts_own_steps = False
    run(GPT, models, schedule, Step())
    session.finish()
    run(GPT, models, schedule, Step())
    first = session.step.plan.digest()
    records = values_of(session)
    run(GPT, models, schedule, Step())
    assert session.step.plan.digest() == first
    assert torch.equal(records, values_of(session)) and len(records)
    session.finish()
    assert session.totals.steps == 2 and session.steps_done == 2
    session.finish(counted=False)


def skipped_step_teaches_nothing() -> None:
    models, session, schedule = attached()
    session.counts_own_steps = False
    run(GPT, models, schedule, Step())
    session.finish(counted=False)
    assert (
        len(session.planner.learned) == 0 and not session.planner.learned.prior.any_seen and session.totals.steps == 0
    )


def non_finite_reference_runs_dense_and_is_counted() -> None:
    models, session, schedule = attached()
    run(GPT, models, schedule, Step())
    with torch.no_grad():
        next(session.reference.run.chunks[-1].output_layer.parameters())[0, 0] = torch.nan
    step = Step()
    run(GPT, models, schedule, step)
    assert session.step.fallback and not session.step.plan.is_sparse
    session.finish()
    assert session.totals.fallback_steps == 1 and session.totals.targets_kept == session.totals.targets_total
    assert bool(values_of(session).isfinite().all())


def evaluation_is_never_elided() -> None:
    models, session, schedule = attached(LLAVA)
    run(LLAVA, models, schedule, Step())
    plain, ours = Step(), Step()
    evaluate = lambda function, step: run(LLAVA, models, lambda **a: function(**dict(a, forward_only=True)), step)  # noqa: E731
    evaluate(get_forward_backward_func(), plain)
    evaluate(schedule, ours)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, ours.losses, strict=True))
    assert session.step.number == 0, "an evaluation counted as a step"


def ratio_moves_from_one_and_the_cool_down_is_dense() -> None:
    """Cycles of two from 1.0 to 0.25: whole, then shorter and shorter; then dense, where every step would elide."""
    moving = {"keep_ratio": 1.0, "keep_ratio_end": 0.25, "keep_ratio_steps": 4, "cycle_steps": 2, "dense_from": 6}
    models, session, schedule = attached(score="student", budget="per-sample", length_multiple=1, **moving)
    kept = []
    for _ in range(7):
        run(GPT, models, schedule, Step())
        session.finish()
        interval = session.take_interval()
        share = interval.targets_kept / interval.targets_total
        kept.append((session.phase, round(share, 1), interval.sparse_steps))
    ones = [("warmup", 1.0, 0), ("sparse", 1.0, 0), ("sparse", 1.0, 0)]
    assert kept == [*ones, ("sparse", 0.6, 1), ("sparse", 0.6, 1), ("sparse", 0.3, 1), ("dense", 1.0, 0)], kept


def gradients_that_were_learned_are_those_of_plain_megatron_and_come_back() -> None:
    """At the input of layer n of the plain model, per visual position, relative to the mean of the sample; also where
    recompute runs the layers again, where nothing below is trained, and where the last layers are dense again.
    """
    rule = {"keep_ratio": 1.0, "visual_keep_ratio": 0.25, "visual_score": "gradient", "score": "random"}
    frozen = {"frozen": ["vision_model", "vision_projection"]}
    cases = (
        (LLAVA | {"side": 32}, {"dense_layers": 1}),
        (LLAVA | {"side": 32, **frozen}, {"dense_layers": 0}),
        (LLAVA | {"side": 32, "recompute": "uniform"}, {"dense_layers": 2, "dense_last_layers": 1}),
    )
    for case, options in cases:
        models, session, schedule = attached(case, **rule, **options)
        ours = Step()
        run(case, models, schedule, ours)
        weights = {
            name: weight.grad.clone() for name, weight in models[0].named_parameters() if weight.grad is not None
        }
        facts = session.step.whole
        session.finish()
        count_N = torch.full((len(facts.key_N2),), 16)
        found_NV = session.learned.look_up_gradients(facts.key_N2, count_N, 1).view(-1, 16)
        with tempfile.TemporaryDirectory() as folder:
            save_state(models, f"{folder}/state")
            other, again, _ = attached(case, **rule, **options)
            load_state(other, f"{folder}/state")
            same = again.learned.look_up_gradients(facts.key_N2, count_N, 1)
        assert torch.equal(same.view(-1, 16).nan_to_num(), found_NV.nan_to_num())

        run(case, models, schedule, Step())  # the next step ranks by what this one has shown
        kept_P = session.step.plan.kept_P[facts.is_visual_P].view(-1, 16)
        for found_V, kept_V in zip(found_NV, kept_P, strict=True):
            if not found_V.isnan().any():
                assert found_V[kept_V].min() >= found_V[~kept_V].max(), (found_V, kept_V)

        plain, states, step = build(case), [], Step()
        plain[0].language_model.decoder.config.recompute_granularity = None  # or what is watched would be run again

        def watch(_, args, kwargs, states=states):
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if not hidden.requires_grad:
                hidden.requires_grad_()
            hidden.retain_grad()
            states.append(hidden)

        layer = plain[0].language_model.decoder.layers[options["dense_layers"]]
        layer.register_forward_pre_hook(watch, with_kwargs=True)
        run(case, plain, get_forward_backward_func(), step)
        assert all(torch.equal(a, b) for a, b in zip(ours.losses, step.losses, strict=True)), "a dense step has changed"
        for name, weight in plain[0].named_parameters():
            assert weight.grad is None or torch.equal(weight.grad, weights[name]), name
        norm_P = torch.cat([one.grad.norm(dim=-1).t().reshape(-1) for one in states])
        norm_NV = norm_P[facts.is_visual_P].view(-1, 16)
        has_any_N = norm_NV.sum(dim=1) > 0
        assert has_any_N.sum() == 7, "the row without targets gets no gradient"
        assert bool(found_NV[~has_any_N].isnan().all())
        expected_NV = norm_NV / norm_NV.mean(dim=1, keepdim=True)
        torch.testing.assert_close(found_NV[has_any_N].float(), expected_NV[has_any_N], rtol=1e-3, atol=1e-3)


def last_layers_that_are_dense_again_are_told_and_counted() -> None:
    models, session, schedule = attached(score="student", dense_layers=1, dense_last_layers=2)
    assert "layers 1-4): compacts after 1 dense layers, the last 2 are dense again" in describe(models)
    run(GPT, models, schedule, Step())
    session.finish()
    before = session.totals.layer_positions_run
    run(GPT, models, schedule, Step())
    dense = sum(one.keep_idx_BK.shape[0] * one.dense_length for one in session.step.plan.microbatches)
    short = sum(one.keep_idx_BK.numel() for one in session.step.plan.microbatches)
    session.finish()
    assert session.totals.layer_positions_run - before == 3 * dense + short and short < dense


def a_padding_mask_that_is_not_cut_for_its_context_rank_is_refused_in_the_first_forward() -> None:
    """Whether a script passes one is known when it does: in a dense step already, not after the warm-up."""
    models, session, _ = attached(dict(GPT, config={"num_moe_experts": 2}), score="student")
    decoder = models[0].decoder
    forward = lambda length: decoder(  # noqa: E731
        torch.zeros(24, 2, 32), None, padding_mask=torch.zeros(2, length, dtype=torch.bool)
    )
    forward(24)
    decoder.config.context_parallel_size = 2
    refused("given one of 48 positions on a context rank that has 24", lambda: forward(48))
    decoder.config.context_parallel_size = 1


def building_a_teacher_leaves_the_random_state() -> None:
    models = build(GPT)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before, states = torch.get_rng_state(), {k: v.clone() for k, v in tracker.get_states().items()}
    attach(models, config())
    session_of(models).prepare(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[k], v) for k, v in tracker.get_states().items())


def dense_steps_are_bitwise_plain() -> None:
    """Warm-up and dense steps: losses and gradients as without ReGATE, with a teacher loaded."""
    plain_models, plain = build(LLAVA), Step()
    run(LLAVA, plain_models, get_forward_backward_func(), plain)
    models, _, schedule = attached(LLAVA)
    ours = Step()
    run(LLAVA, models, schedule, ours)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, ours.losses, strict=True))
    for (name, a), (_, b) in zip(plain_models[0].named_parameters(), models[0].named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def detach_restores_everything() -> None:
    models = build(LLAVA)
    modules = [module for model in models for module in model.modules()]
    before = [(set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    attach(models, config())
    session_of(models).prepare(2)
    assert "compacts after 1 dense layers" in describe(models) and "teacher:" in describe(models)
    detach(models)
    after = [(set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    assert before == after
    assert [module for model in models for module in model.modules()] == modules
    assert describe(models) == "regate is not attached"
    detach(models)  # twice is harmless


def refused(words: str, action) -> None:
    """``action`` must be refused in the one-line form, with ``words`` in it."""
    try:
        action()
    except ReGateError as error:
        assert str(error).startswith("regate: ") and words in str(error), error
        assert "allowed" in str(error) and "change" in str(error)
    else:
        raise AssertionError(f"not refused: {words}")


def attaching_twice_is_refused() -> None:
    models = attach(build(GPT), config(score="student"))
    refused("given a model that has ReGATE already", lambda: attach(models, config(score="student")))


def pad_without_a_pad_token_is_refused() -> None:
    for pad_token in (None, -1):
        settings = config(teacher_visual="pad")
        refused(f"whose pad id is {pad_token}", lambda: attach(build(LLAVA), settings, pad_token=pad_token))  # noqa: B023


def refused_attach_leaves_the_model_as_it_was() -> None:
    models = build(dict(GPT, dense_layers=9))
    before = set(vars(models[0])), set(vars(models[0].decoder))
    refused("given 9 with 4 decoder layers", lambda: attach(models, config(dense_layers=9)))
    assert before == (set(vars(models[0])), set(vars(models[0].decoder)))


def unwritable_trace_is_refused() -> None:
    with tempfile.NamedTemporaryFile() as file:  # a file where a folder should be
        settings = config(score="student", trace=f"{file.name}/trace")
        refused("--regate-trace: given", lambda: attach(build(GPT), settings))


def teacher_of_another_architecture_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(build(GPT), f"{folder}/teacher")
        attach(build(GPT), config(teacher_load=f"{folder}/teacher"))
        refused("with output_layer.weight of shape none", lambda: attach_tied_teacher(folder))


def truncated_teacher_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(build(GPT), f"{folder}/teacher")
        data = next(Path(folder, "teacher").glob("*.distcp"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        models = attach(build(GPT), config(teacher_load=f"{folder}/teacher"))
        refused("whose data cannot be read", lambda: session_of(models).prepare(2))


def teachers_of_other_models_come_from_their_checkpoints() -> None:
    moe = {"num_moe_experts": 4, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    latent = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16}
    for case in (
        dict(GPT, config=moe),
        dict(GPT, mla=True, config={**latent, "qk_layernorm": True}),
        dict(GPT, model="hybrid", pattern="*-*E", config=moe),
    ):
        (source,) = build(case)
        with torch.no_grad():
            for value in source.state_dict().values():  # expert bias is no parameter, and starts at 0
                if torch.is_tensor(value) and value.is_floating_point():
                    value.add_(0.25)
        with tempfile.TemporaryDirectory() as folder:
            save_language_model([source], f"{folder}/teacher")
            models = attach(build(case), config(teacher_load=f"{folder}/teacher"))
            session_of(models).prepare(2)
        found = session_of(models).reference.run.chunks[0].state_dict()
        for name, value in source.state_dict().items():
            assert not torch.is_tensor(value) or torch.equal(found[name], value), name


def every_setting_counts_unless_it_is_known_to_change_no_loss() -> None:
    """Each field of the config in turn, and each constant of the rotary modules."""
    import dataclasses

    from megatron.core.transformer import MLATransformerConfig

    latent = MLATransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    like = SimpleNamespace(position_embedding_type="rope", max_sequence_length=64)
    base = settings_of(latent, like, None)
    for field in dataclasses.fields(latent):
        if field.name.startswith("_"):
            continue
        other = copy.copy(latent)
        setattr(other, field.name, "another value")
        assert (settings_of(other, like, None) != base) == (field.name not in NEUTRAL), field.name
    learned = SimpleNamespace(position_embedding_type="learned_absolute", max_sequence_length=64)
    longer = SimpleNamespace(position_embedding_type="learned_absolute", max_sequence_length=128)
    assert settings_of(latent, learned, None) != settings_of(latent, longer, None)

    def rotary(**options):
        made = RotaryEmbedding(128, 1.0, use_cpu_initialization=True, **options)
        return settings_of(latent, like, made)["rotary"]

    scaled = {"rope_scaling": True, "rotary_base": 500000}
    kinds = [{}, {"rotary_base": 500000}, scaled, dict(scaled, rope_scaling_factor=32.0)]
    kinds += [{"seq_len_interpolation_factor": 2.0}, {"rotary_interleaved": True}]
    found = [rotary(**kind) for kind in kinds]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert rotary(**scaled) == found[2]


def default_arguments_of_megatron_say_no_difference() -> None:
    """A checkpoint's arguments and the config Megatron makes of them are one model, whatever its flags are."""
    base = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 --vocab-size 60"
    for flags in (
        "",
        "--swiglu --group-query-attention --num-query-groups 2 --position-embedding-type rope --rotary-base 500000 "
        "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --norm-epsilon 1e-6",
        "--position-embedding-type rope --num-experts 4 --moe-layer-freq [0,1,1,1] --disable-bias-linear "
        "--no-rope-freq 2",
        "--position-embedding-type rope --use-rope-scaling --rotary-percent 0.5 --squared-relu --use-mup",
        "--position-embedding-type rope --multi-latent-attention --swiglu --softmax-type off-by-one",
    ):
        args = megatron_arguments({"flags": f"{base} {flags}".split(), "tp": 1, "pp": 1})
        for name in [name for name in os.environ if name.startswith("NVTE_")]:  # Megatron sets them, and then checks
            del os.environ[name]
        student = build_of_arguments(args, 64)
        stated = stated_settings(Path("none"), args)
        found = settle(student, LanguageModelCheckpoint(Path("none"), "", {}, stated))
        assert (found.adopted, found.unstated, found.rotary) == ([], [], getattr(student, "rotary_pos_emb", None)), (
            flags
        )
        args.norm_epsilon = args.layernorm_epsilon = 0.25
        found = settle(student, LanguageModelCheckpoint(Path("none"), "", {}, stated_settings(Path("none"), args)))
        assert found.config.layernorm_epsilon == 0.25 and found.adopted[0].startswith("layernorm_epsilon 0.25 ("), flags


def scaling_that_a_script_may_not_have_passed_on_is_not_guessed() -> None:
    """Megatron's pretrain_gpt.py leaves two rotary flags where they are; a conversion says what the model has."""
    scaled = {"position_embedding_type": "rope", "rotary_base": 10000, "use_rope_scaling": True, "rotary_percent": 1.0}
    interpolated = dict(scaled, use_rope_scaling=False, rotary_seq_len_interpolation_factor=4.0)

    def teacher_of(stated: dict, **student):
        (model,) = build(dict(GPT, gpt=student))
        return model, settle(model, LanguageModelCheckpoint(Path("none"), "", {}, stated))

    for student in ({}, {"seq_len_interpolation_factor": 4.0}):  # as one reading of the flags has it
        model, found = teacher_of(interpolated, **student)
        assert found.rotary is model.rotary_pos_emb and not found.adopted
    refused("which not every script passes on", lambda: teacher_of(interpolated, rotary_base=77))
    certain = dict(interpolated, huggingface_model_type="qwen2")
    _, found = teacher_of(certain, rotary_base=77)
    assert found.rotary.seq_len_interpolation_factor == 4.0 and len(found.adopted) == 2
    _, found = teacher_of(dict(scaled, use_rope_scaling=False), rotary_base=77)
    assert found.adopted == ["rotary frequencies of base 10000"]


def what_a_checkpoint_does_not_say_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(build(GPT), f"{folder}/teacher")
        Path(folder, "teacher", "language_model.json").unlink()
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            models = attach(build(GPT), config(teacher_load=f"{folder}/teacher"))
            session_of(models).prepare(2)
        assert "does not say its settings (rotary base, norm epsilon …): the student's are used" in told.getvalue()
        Path(folder, "teacher", "language_model.json").write_text("{")
        refused("unreadable", lambda: attach(build(GPT), config(teacher_load=f"{folder}/teacher")))


def run_config_of_bridge_says_what_its_model_has() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(build(GPT), f"{folder}/teacher")
        Path(folder, "teacher", "language_model.json").unlink()
        text = "model:\n  _target_: some.Provider\n  layernorm_epsilon: 0.25\n  rotary_base: 500\n  rotary_percent: 1.0"
        text += "\n  activation_func: {_target_: torch.nn.functional.gelu, _call_: false}\n  seq_length: 9\n"
        Path(folder, "teacher", "run_config.yaml").write_text(text)
        models = attach(build(GPT), config(teacher_load=f"{folder}/teacher"))
        session_of(models).prepare(2)
        (teacher,) = session_of(models).reference.run.chunks
        assert teacher.config.layernorm_epsilon == 0.25
        want = RotaryEmbedding(8, 1.0, rotary_base=500, use_cpu_initialization=True).inv_freq
        torch.testing.assert_close(teacher.rotary_pos_emb.inv_freq, want)
        assert not torch.equal(models[0].rotary_pos_emb.inv_freq, want), "the student keeps its own"
        Path(folder, "teacher", "run_config.yaml").write_text(text.replace("gelu", "silu"))
        refused("activation_func silu", lambda: attach(build(GPT), config(teacher_load=f"{folder}/teacher")))


def difficulty_is_found_by_the_key_a_user_names() -> None:
    """Pictures that change every time: by content no sample has a history, by text or id all have theirs."""
    for how, known in (("content", 0), ("text", 1), ("sample_id", 1)):
        models, session, schedule = attached(LLAVA, score="student", sample_key=how)

        def augmented(iterator):
            for number, batch in enumerate(iterator):
                batch["image"] = batch["image"] + torch.rand(())
                yield dict(batch, sample_id=torch.arange(len(batch["tokens"])) + 10 * number)

        def step(**arguments):
            return schedule(**dict(arguments, data_iterator=augmented(arguments["data_iterator"])))  # noqa: B023

        for _ in range(3):
            run(LLAVA, models, step, Step())
        keys = torch.cat([one.difficulty_key_N2 for one in session.step.facts])
        counts = torch.cat([one.num_target_N for one in session.step.facts])
        values = session.planner.learned.difficulty.fetch(keys, counts, 2)
        assert bool(values.isfinite().all() if known else values.isnan().all()), how
    models, _, schedule = attached(LLAVA, score="student", sample_key="sample_id")
    refused("without the key 'sample_id'", lambda: run(LLAVA, models, schedule, Step()))


def attach_tied_teacher(folder: str) -> None:
    save_language_model(build(dict(GPT, tied=True)), f"{folder}/tied")
    attach(build(GPT), config(teacher_load=f"{folder}/tied"))


def drop_equals_masked_pad() -> None:
    """Dropping visual positions gives the losses of pads that nobody may attend to."""
    models, session, schedule = attached(LLAVA, teacher_visual="drop")
    run(LLAVA, models, schedule, Step())
    run(LLAVA, models, schedule, Step())
    facts = session.step.facts
    dropped = session.reference.fetch(2, anyone_misses=session.reference.look_up(facts))
    teacher = build(LLAVA)[0].language_model
    row = 0
    for one in facts:
        tokens = torch.where(one.is_visual_BS, 0, one.token_BS)
        length = one.dense_length
        hidden = one.is_visual_BS[:, None, :] | torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[:, range(length), range(length)] = False
        position = torch.arange(length).expand_as(tokens)
        with torch.no_grad():
            loss_BS = teacher(tokens, position, hidden[:, None], labels=one.label_BS)
        for loss_S, target_S in zip(loss_BS, one.is_target_BS, strict=True):
            torch.testing.assert_close(dropped[row], loss_S[target_S], rtol=1e-5, atol=1e-5)
            row += 1


def student_teacher_waits_for_loaded_weights() -> None:
    """Attached as a pre-wrap hook, before the checkpoint is loaded, the teacher still gets the loaded weights."""
    models = build(GPT)
    attach(models, config())
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(0.5)
    schedule = wrap_forward_backward(get_forward_backward_func())
    run(GPT, models, schedule, Step())
    for ours, theirs in zip(
        session_of(models).reference.run.chunks[0].parameters(), models[0].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def uninstall_restores_megatron() -> None:
    from megatron.training import training

    from regate_megatron.integrations import megatron_lm

    before = dict(vars(training))
    megatron_lm.install(config())
    changed = {name for name, value in vars(training).items() if before.get(name) is not value}
    wrapped = {"setup_model_and_optimizer", "get_forward_backward_func", "train_step", "training_log", "train"}
    wrapped |= {"save_checkpoint", "num_floating_point_operations"}
    assert changed == wrapped
    megatron_lm.install(config())  # again, as in-process restart does: still one wrapper deep
    assert all(getattr(training, name).__wrapped__ is before[name] for name in wrapped)
    megatron_lm.uninstall()
    assert dict(vars(training)) == before


def settings_that_say_off_wrap_nothing() -> None:
    """In Megatron-LM's integration as in ``attach``: off is absent, also after a run that was on."""
    from megatron.training import checkpointing, training

    from regate_megatron.integrations import megatron_lm, precompute

    off, before = ReGateConfig(enabled=False), (dict(vars(training)), dict(vars(checkpointing)))
    megatron_lm.install(off)
    assert (dict(vars(training)), dict(vars(checkpointing))) == before
    megatron_lm.install(config())
    megatron_lm.install(off)
    assert (dict(vars(training)), dict(vars(checkpointing))) == before
    models = build(GPT)
    attributes = set(vars(models[0]))
    assert attach(models, off) is models and set(vars(models[0])) == attributes and session_of(models) is None
    with_cache = ReGateConfig(enabled=False, reference_cache="nowhere", teacher_load="student")
    refused("given settings that say off", lambda: precompute.install(with_cache))
    assert (dict(vars(training)), dict(vars(checkpointing))) == before


def own_loop_continues_what_it_saved() -> None:
    """Four steps and three more, from a folder, are seven steps: for a loop without Megatron-LM."""
    continues(GPT)
    refused("save_state: given a model without ReGATE", lambda: save_state(build(GPT), "nowhere"))


def own_loop_of_mimo_continues_what_it_saved() -> None:
    """The same for a MimoModel, where visual positions are left out, too."""
    continues(MIMO, visual_keep_ratio=0.5, visual_score="random")


def continues(case: dict, **options) -> None:
    """Raises AssertionError where a resumed loop is another."""

    def steps(models, schedule, numbers):
        digests = []
        for number in numbers:
            run(case, models, schedule, Step())
            digests.append((session_of(models).phase, session_of(models).step.plan.digest()))
            step_done(models, counted=number != 2)  # one step was skipped
        return digests

    whole, session, schedule = attached(case, warmup_steps=2, score="student", **options)
    expected = steps(whole, schedule, range(7))
    first, _, schedule = attached(case, warmup_steps=2, score="student", **options)
    with tempfile.TemporaryDirectory() as folder:
        begun = steps(first, schedule, range(4))
        save_state(first, f"{folder}/state")
        save_state(first, f"{folder}/state")  # in the place of the one before
        rest, resumed, schedule = attached(case, warmup_steps=2, score="student", **options)
        assert load_state(rest, f"{folder}/state").startswith("difficulty of ")
        assert resumed.steps_done == 3 and resumed.totals.steps == 3
        assert begun + steps(rest, schedule, range(4, 7)) == expected
        save_state(rest, f"{folder}/ours")
        save_state(whole, f"{folder}/theirs")
        names = {path.name for path in Path(folder, "ours").iterdir()} - {"state.json"}
        assert {"difficulty-00000.records", "prior.table"} <= names
        for name in names:
            assert Path(folder, "ours", name).read_bytes() == Path(folder, "theirs", name).read_bytes()
        changed, _, _ = attached(case, warmup_steps=2, score="student", keep_ratio=0.25, **options)
        assert "settings changed: keep_ratio 0.5 -> 0.25" in load_state(changed, f"{folder}/ours")
        refused("saved difficulty: given", lambda: load_state(changed, f"{folder}/none"))
        Path(folder, "file").touch()
        refused("saving difficulty: given", lambda: save_state(whole, f"{folder}/file/state"))


def saves_write_first_into_folders_of_their_own_only() -> None:
    models, _, _ = attached(score="student")
    saves = {"state": lambda at: save_state(models, at), "model": lambda at: save_language_model(models, at)}
    for name, save in saves.items():
        with tempfile.TemporaryDirectory() as folder:
            target, aside = Path(folder, name), Path(folder, f"{name}.incomplete")
            aside.mkdir()
            (aside / "mine").touch()
            refused("which exists and is not of these tools", lambda save=save, at=target: save(at))
            assert (aside / "mine").exists() and not target.exists()
            (aside / ".regate-incomplete").touch()  # so a killed run leaves it
            save(target)
            assert list(Path(folder).iterdir()) == [target] and not (target / "mine").exists()


def run_without_saved_difficulty_refreshes_it_first() -> None:
    """A run that continues in a sparse phase with nothing learned begins with its dense steps."""
    models, session, schedule = attached(dense_steps=2, warmup_steps=0)
    session.resume(50)
    phases = []
    for _ in range(4):
        run(GPT, models, schedule, Step())
        phases.append((session.phase, session.step.plan.is_sparse))
    assert phases == [("dense", False), ("dense", False), ("sparse", True), ("sparse", True)]


def teacher_of_the_callers_own_is_given_back_as_it_was() -> None:
    teacher = build(GPT)[0].eval()

    def seen() -> tuple:
        return set(vars(teacher)), set(vars(teacher.decoder)), len(teacher.output_layer._forward_pre_hooks)

    before, digests = seen(), []
    for _ in range(2):  # the same object serves again
        models = attach(build(GPT), config(), teacher=teacher, pad_token=0)
        schedule = wrap_forward_backward(get_forward_backward_func())
        for _ in range(2):
            run(GPT, models, schedule, Step())
        digests.append(session_of(models).step.plan.digest())
        assert session_of(models).step.plan.is_sparse and seen() != before
        detach(models)
        assert seen() == before
    assert digests[0] == digests[1]


def teacher_of_the_callers_own_runs_without_user_buffers() -> None:
    """They are as long as dense rows; its rows have lengths of their own. Such attributes are Transformer Engine's."""
    teacher, seen = build(GPT)[0].eval(), []
    linear = teacher.decoder.layers[0].self_attention.linear_qkv
    linear.ub_overlap_ag_fprop = True
    linear.register_forward_pre_hook(lambda module, _: seen.append(module.ub_overlap_ag_fprop))
    models = attach(build(GPT), config(score="reference"), teacher=teacher, pad_token=0)
    schedule = wrap_forward_backward(get_forward_backward_func())
    for _ in range(2):
        run(GPT, models, schedule, Step())
    assert seen and not any(seen) and linear.ub_overlap_ag_fprop


def teacher_of_the_callers_own_that_cannot_serve_is_refused() -> None:
    def refusal(line: str, teacher, **more) -> None:
        student = build(GPT)
        refused(line, lambda: attach(student, config(**more.pop("settings", {})), teacher=teacher, **more))
        assert session_of(student) is None

    good = build(GPT)[0].eval()
    refusal("given Linear; allowed the bare GPTModel", torch.nn.Linear(2, 2))
    refusal("given 2 chunk(s) with (first, last) [(True, True), (True, True)]", [good, good])
    refusal("given a vocabulary of", good, vocab_size=good.vocab_size + 1)
    refusal("given pad with a tokenizer whose pad id is None", good, settings={"teacher_visual": "pad"})
    with patch.multiple(good.config, context_parallel_size=2):
        refusal("given context_parallel_size 2 where the student has 1", good)
    with patch.multiple(good.config, sequence_parallel=True, tensor_model_parallel_size=1):
        detach(attach(build(GPT), config(), teacher=good))  # means nothing on one tensor rank
    with patch.multiple(good.train().config, hidden_dropout=0.1):
        refusal("given training mode with dropout 0.1", good)


def another_length_than_planned_is_refused() -> None:
    models, session, schedule = attached(score="student")
    run(GPT, models, schedule, Step())
    read = session.adapter.read

    class Longer:
        keys, elide, read_all = session.adapter.keys, session.adapter.elide, BatchAdapter.read_all

        @staticmethod
        def read(batch):
            longer = {key: torch.nn.functional.pad(value, (0, 2)) for key, value in batch.items()}
            return read(longer)

    session.adapter = Longer()
    session.adapter.elide = lambda batch, where: batch
    refused("24 positions where the batch was read as 26", lambda: run(GPT, models, schedule, Step()))


def unreadable_batch_is_refused() -> None:
    models, _, schedule = attached(score="student")

    def broken(**arguments):
        return schedule(**dict(arguments, data_iterator=iter([{"tokens": torch.zeros(2, 4)}] * 4)))

    refused("batch: given KeyError: 'labels'", lambda: run(GPT, models, broken, Step()))


if __name__ == "__main__":
    check(sys.argv[1:], globals())
