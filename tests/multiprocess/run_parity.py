"""Worker of test_parity: sparse steps on real Megatron models against the masked full-length step, in one layout each.

The oracle is independent of the hooks: the plain model at full length, where an explicit attention mask hides inactive
keys in every elided layer, and the loss is taken at active targets only. What inactive positions compute there is read
by nobody; before last dense layers, which read them again, they pass elided layers by on the residual path.

    torchrun --nproc-per-node 4 tests/multiprocess/run_parity.py CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.decoder.cutting import places
from regate_megatron.decoder.positions import layers_ahead
from regate_megatron.memory.references import RecentLosses
from tests.multiprocess.ahead import ahead_at, logged_ahead
from tests.multiprocess.cores import router_metrics
from tests.multiprocess.models import (
    LAYERS,
    Step,
    build,
    language_models,
    parallel,
    routers,
    run,
    shared_store,
    under_ddp,
)
from tests.multiprocess.parity import GRADIENT_BOUND, LOSS_BOUND


def router_counts(models) -> dict[str, torch.Tensor]:
    """Tokens per expert, which move the expert bias, and the auxiliary losses that were logged."""
    counted = {
        f"tokens of layer {number}": router.local_tokens_per_expert.clone()
        for number, router in routers(models)
        if router.enable_expert_bias
    }
    return counted | router_metrics() | logged_ahead()


def local_slice(mask_BS: torch.Tensor, case: dict) -> torch.Tensor:
    """This rank's part of the sequence, where it is sharded."""
    if not case.get("sp"):
        return mask_BS
    return mask_BS.chunk(case["tp"], dim=1)[mpu.get_tensor_model_parallel_rank()]


def masked_full_length(
    case: dict, models: list, plan, dense_layers: int, loss_masks: list, own: list | None
) -> tuple[Step, dict]:
    """The oracle's step, see the module's docstring, and what its routers would have counted of the kept tokens.

    Args:
        own: the batches, where they were dealt; else this replica's own.
    """
    done: dict[int, int] = {}
    step = Step(loss_masks)
    counts: dict[str, torch.Tensor] = {}
    for model in language_models(models):
        model.config.recompute_granularity = None  # the hooks below are gone when layers would run again

    def forward_step(iterator, model):
        index = done.get(id(model), 0)
        done[id(model)] = index + 1
        kept_BS = plan.microbatches[index].kept_mask()
        length = kept_BS.shape[1]
        hidden_BSS = ~kept_BS[:, None, :] | torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden_BSS[:, range(length), range(length)] = False  # no row may be empty: softmax of nothing is NaN

        own = places(segments(plan.microbatches[index]), cp_size=mpu.get_context_parallel_world_size())
        own_BqS = hidden_BSS[:, own.positions_of(mpu.get_context_parallel_rank())]

        kept_LB1 = local_slice(kept_BS[:, own.positions_of(mpu.get_context_parallel_rank())], case).t()[..., None]

        def is_elided(module):
            return dense_layers < module.layer_number <= LAYERS - case.get("dense_last", 0)

        def pass_by(layer, _, kwargs, output):
            if not is_elided(layer) or not case.get("dense_last"):
                return None
            is_tuple = isinstance(output, tuple)
            hidden_LBH = torch.where(kept_LB1, output[0] if is_tuple else output, kwargs["hidden_states"])
            return (hidden_LBH, *output[1:]) if is_tuple else hidden_LBH

        chunk = language_models([model])[0]
        ahead = layers_ahead(chunk)

        def mask_keys(layer, args, kwargs):
            if is_elided(layer) or layer in ahead:
                kwargs = dict(kwargs, attention_mask=own_BqS[:, None])
                if case.get("aux"):
                    kwargs["padding_mask"] = local_slice(~kept_BS, case)
            return args, kwargs

        def count_kept(router, _, output):
            routing_NE = output[1]
            number = next(number for number, one in routers([model]) if one is router)
            if number > dense_layers and number <= LAYERS - case.get("dense_last", 0) or number > LAYERS:
                routing_NE = routing_NE & local_slice(kept_BS, case).t().reshape(-1, 1)
            name = f"tokens of layer {number}"
            counts[name] = counts.get(name, 0) + routing_NE.sum(dim=0).float()

        layers = chunk.decoder.layers
        hooks = [layer.register_forward_pre_hook(mask_keys, with_kwargs=True) for layer in (*layers, *ahead)]
        hooks += [layer.register_forward_hook(pass_by, with_kwargs=True) for layer in layers]
        hooks += [r.register_forward_hook(count_kept) for _, r in routers([model]) if r.enable_expert_bias]
        try:
            length_N = segments(plan.microbatches[index])
            segment_S = torch.arange(len(length_N)).repeat_interleave(length_N)
            with ahead_at(kept_BS, segment_S, counts) if ahead else nullcontext():
                return step(iterator, model)
        finally:
            for hook in hooks:
                hook.remove()

    run(case, models, get_forward_backward_func(), forward_step, own)
    logged = {key: value for key, value in router_counts(models).items() if not key.startswith("tokens")}
    return step, counts | logged


def segments(plan) -> torch.Tensor:
    """What context parallelism cuts by itself."""
    return plan.packing.dense_length_N if plan.packing else torch.tensor([plan.dense_length])


def whole(own_BS: torch.Tensor, plan) -> torch.Tensor:
    """Put rows together that the context ranks hold parts of."""
    group, size = mpu.get_context_parallel_group(), mpu.get_context_parallel_world_size()
    parts = [torch.empty_like(own_BS) for _ in range(size)]
    dist.all_gather(parts, own_BS.contiguous(), group=group)
    cut = places(segments(plan), cp_size=size)
    return torch.stack(parts)[cut.rank_L, :, cut.index_L].t().contiguous()


def gradients(models: list, optimizer=None) -> dict[str, torch.Tensor]:
    """Gradients by name, summed as Megatron sums them.

    Over the context group, and over the tensor group those of weights that sequence parallelism gives a part of. With
    an optimizer, which reduces them itself and keeps a part on each rank: by what they do to the weights.
    """
    found = {}
    if optimizer is not None:
        weights = {f"{chunk}.{n}": p for chunk, model in enumerate(models) for n, p in model.named_parameters()}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        assert optimizer.step()[0]
        for name, weight in weights.items():
            found[name] = before[name] - weight.detach()
            weight.data.copy_(before[name])
        return found
    for chunk, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            found[f"{chunk}.{name}"] = gradient = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(gradient, group=mpu.get_tensor_model_parallel_group())
            dist.all_reduce(gradient, group=mpu.get_context_parallel_group())
    return found


def check(case: dict) -> dict:
    """Run one case; returns what test_parity compares. Raises AssertionError when the step is not exact."""
    models, optimizer = build(case), None
    if case.get("ddp"):
        # Adam without memory, as the distributed optimizer takes no other: a step is g / (|g| + 1), times a rate.
        plain = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_eps": 1.0, "weight_decay": 0.0, "clip_grad": 0.0}
        models, optimizer = under_ddp(models, optimizer="adam", lr=64.0, **plain)
    names = [list(model.state_dict()) for model in models]
    config = ReGateConfig(
        warmup_steps=1,
        cycle_steps=100,
        dense_steps=0,
        keep_ratio=case.get("keep_ratio", 0.5),
        visual_keep_ratio=case.get("visual_keep", 1.0),
        visual_score=case.get("visual_score", "random"),
        dense_layers=case["dense_layers"],
        dense_last_layers=case.get("dense_last", 0),
        score=case.get("score", "regate"),
        budget=case.get("budget", "uniform"),
        share=case.get("share", "sample"),
        length_multiple=case.get("multiple", 1),
        context=case.get("context", "all"),
        teacher_load="student",
        teacher_visual=case.get("visual", "drop"),
    )
    attach(models, config, pad_token=0)
    assert [list(model.state_dict()) for model in models] == names, "attach changed names"
    session = session_of(models)
    schedule = wrap_forward_backward(get_forward_backward_func())
    run(case, models, schedule, Step())
    if case.get("forgets"):  # one replica alone has something to ask its teacher, whose experts lie on all ranks
        run(case, models, schedule, Step())
        if mpu.get_data_parallel_rank() == 0:
            session.reference.store = RecentLosses()
    sparse, dealt = Step(), watch_deals(session)
    run(case, models, schedule, sparse)
    pending = session.step
    plan, facts = pending.plan, pending.facts
    assert plan.is_sparse and pending.phase == "sparse"
    if session.planner and case.get("visual_score") == "gradient":
        assert bool(pending.is_visual_known.any()), "the dense step taught nothing"
    shortened = [one.length < one.dense_length for one in plan.microbatches]
    assert all(shortened) or (case.get("budget", "uniform") != "uniform" and any(shortened)), "nothing was shortened"
    if session.topology.sees_losses and case.get("cp", 1) == 1:
        assert len(pending.losses) == len(sparse.losses), "learned from other losses than the main head's"
        assert all(map(torch.equal, pending.losses, sparse.losses))
    sparse_gradients, sparse_counts = gradients(models, optimizer), router_counts(models)
    session.finish()
    detach(models)
    own = {key for model in models for module in model.modules() for key in vars(module)}
    hooked = {"forward", "compute_language_model_loss", "_apply_expert_bias", "_regate_session"}
    hooked |= {"_postprocess", "_get_embeddings"}
    assert not hooked & own, "detach left something behind"

    oracle, oracle_counts = masked_full_length(
        case, models, plan, case["dense_layers"], sparse.loss_masks, dealt.get("own")
    )
    for step in (sparse, oracle):
        step.losses = [whole(*pair) for pair in zip(step.losses, plan.microbatches[: len(step.losses)], strict=True)]
    sparse.loss_masks = [
        whole(*pair) for pair in zip(sparse.loss_masks, plan.microbatches[: len(sparse.loss_masks)], strict=True)
    ]
    loss_error = 0.0
    for index, (loss_BS, mask_BS, oracle_BS) in enumerate(
        zip(sparse.losses, sparse.loss_masks, oracle.losses, strict=True)
    ):
        kept_BS = plan.microbatches[index].kept_mask()
        assert not bool(((mask_BS > 0) & ~kept_BS).any()), "an elided target kept its loss"
        assert not bool(loss_BS[~kept_BS].any()), "an elided position has a loss"
        error_X = ((loss_BS - oracle_BS).abs() / oracle_BS.abs().clamp_min(1))[mask_BS > 0]
        assert bool((error_X <= LOSS_BOUND).all()), f"losses differ by {float(error_X.max())}"  # NaN is no smaller
        loss_error = max([loss_error, *error_X.tolist()])
    assert sparse_counts.keys() == oracle_counts.keys()
    for name, value in sparse_counts.items():
        if case.get("sp"):  # a rank's slice of the short sequence holds other tokens than its slice of the dense one
            dist.all_reduce(value, group=mpu.get_tensor_model_parallel_group())
            dist.all_reduce(oracle_counts[name], group=mpu.get_tensor_model_parallel_group())
        torch.testing.assert_close(value, oracle_counts[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    oracle_gradients = gradients(models, optimizer)
    assert sparse_gradients.keys() == oracle_gradients.keys()
    gradient_error = 0.0
    for name, gradient in sparse_gradients.items():
        scale = float(oracle_gradients[name].abs().max())
        difference = float((gradient - oracle_gradients[name]).abs().max())
        assert difference <= GRADIENT_BOUND * max(1.0, scale), f"{name}: {difference} of {scale}"
        gradient_error = max(gradient_error, difference / max(1.0, scale))
    kept, positions, samples = {}, 0, []
    if session.planner:
        positions = pending.balance.own
        for index, one in enumerate(facts):
            real_BS = plan.microbatches[index].kept_mask() & (one.is_target_BS | one.is_context_BS)
            loss_BS = sparse.losses[index] * sparse.loss_masks[index]
            samples += map(str, one.difficulty_key_N2.tolist())
            for sample, key in enumerate(one.difficulty_key_N2.tolist()):
                own_S = True if one.sample_BS is None else one.sample_BS[0] == sample
                row = int(one.row_N[sample])
                places_kept = torch.where(real_BS[row] & own_S)[0] - one.start_N[sample]
                total = (loss_BS[row] * own_S).sum()
                kept[str(key)] = [places_kept.tolist(), float(total), plan.microbatches[index].length]
    lengths = [one.length for one in plan.microbatches]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (kept, positions, lengths, samples))
    at_best: list = [None] * dist.get_world_size()
    dist.all_gather_object(at_best, pending.balance.achievable if pending.balance else None)
    at_best = next((one for one in at_best if one is not None), None)
    errors = torch.tensor([loss_error, gradient_error])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    merged = {key: value for part, *_ in gathered for key, value in part.items()}
    positions = [count for _, count, *_ in gathered if count]
    return {
        "kept": merged,
        "positions": positions,
        "lengths": [lengths for _, count, lengths, _ in gathered if count],
        "samples": sorted(key for *_, own in gathered for key in own),
        "loss_error": float(errors[0]),
        "gradient_error": float(errors[1]),
        "moved": dealt.get("moved", 0),
        "at_best": at_best,
        "gradient_sizes": {name: float(value.double().norm()) for name, value in sparse_gradients.items()},
    }


def watch_deals(session) -> dict:
    """What the step that follows deals: this rank's batches, and how many microbatches leave their rank."""
    seen: dict = {}
    if session.dealing:
        exchange = session.dealing.exchange

        def watched(step, from_DM, packed):
            exchange(step, from_DM, packed)
            home_D1 = torch.arange(len(from_DM))[:, None]
            seen["moved"] = int((torch.from_numpy(from_DM) // from_DM.shape[1] != home_D1).sum())
            seen["own"] = next((pulled for pulled in step.batches if pulled is not None), None)

        session.dealing.exchange = watched
    return seen


def main(cases_file: str, results_file: str) -> None:
    results, store = {}, shared_store()
    for case in json.loads(Path(cases_file).read_text()):
        with parallel(case, store):
            try:
                results[case["name"]] = check(case)
            except Exception:
                print(f"case {case['name']} failed on rank {dist.get_rank()}", file=sys.stderr, flush=True)
                raise
    if os.environ["RANK"] == "0":
        Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
