"""Worker of test_parity: sparse steps on real Megatron models against the masked full-length step, in one layout each.

The oracle is independent of the hooks: the plain model at full length, where an explicit attention mask hides inactive
keys in every elided layer, and the loss is taken at active targets only. What inactive positions compute there is read
by nobody; before last dense layers, which read them again, they pass elided layers by on the residual path. Weights are
made from the names of tensors, so every layout starts from the same ones.

    torchrun --nproc-per-node 4 tests/multiprocess/run_parity.py CASES.json RESULTS.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from regate_megatron import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import get_submodules

from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.budget import align_up
from regate_megatron.compat import unwrap
from regate_megatron.sharding import places
from regate_megatron.teacher.memory import RecentLosses
from tests.multiprocess.cores import flat_rows, forget_router_metrics, own_part, router_metrics
from tests.multiprocess.parity import GRADIENT_BOUND, LOSS_BOUND

LAYERS, HIDDEN, VOCAB, TEXT, GLOBAL_ROWS = 4, 32, 64, 24, 8
IMAGE, PATCH = 16, 8
VISUAL = (IMAGE // PATCH) ** 2


def build(case: dict) -> list[torch.nn.Module]:
    """This rank's chunks of the case's model, with weights that depend on tensor names alone."""
    chunks, virtual = [], case.get("vpp")
    for vp_stage in range(virtual or 1):
        first = mpu.is_pipeline_first_stage(ignore_virtual=True) and vp_stage == 0
        last = mpu.is_pipeline_last_stage(ignore_virtual=True) and vp_stage == (virtual or 1) - 1
        own = {**case.get("config", {}), **recompute(case.get("recompute"))}
        config = (MLATransformerConfig if case.get("mla") else TransformerConfig)(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_query_groups=case.get("groups", 4),
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=case["tp"],
            pipeline_model_parallel_size=case["pp"],
            virtual_pipeline_model_parallel_size=virtual,
            microbatch_group_size_per_vp_stage=case["pp"],
            pipeline_dtype=torch.float32,
            context_parallel_size=case.get("cp", 1),
            sequence_parallel=case.get("sp", False),
            calculate_per_token_loss=case.get("per_token_loss", True),
            deallocate_pipeline_outputs=True,
            expert_model_parallel_size=case.get("ep", 1),
            expert_tensor_parallel_size=case.get("etp"),
            **{"add_bias_linear": not own.get("num_moe_experts"), **own},
        )
        for name, value in case.get("set", {}).items():  # what Megatron's scripts set on a finished config
            setattr(config, name, value)
        make = {"llava": _llava, "hybrid": _hybrid}.get(case["model"], _gpt)
        chunks.append(make(config, case, first, last, vp_stage if virtual else None))
    for chunk in chunks:
        chunk.model_type = ModelType.encoder_or_decoder  # Megatron's get_model sets it
        fill_by_name(chunk)
        for name in case.get("frozen", ()):
            if getattr(chunk, name) is not None:
                getattr(chunk, name).requires_grad_(False)
    return chunks


def merged_length(case: dict) -> int:
    """Positions of a row inside the model; a LLaVAModel pads its own to what SP and CP cut."""
    if case["model"] != "llava":
        return TEXT
    cp = case.get("cp", 1)
    return align_up(TEXT - 1 + VISUAL, (2 * cp if cp > 1 else 1) * (case["tp"] if case.get("sp") else 1))


def recompute(method: str | None) -> dict:
    """Full recompute, "uniform" or "block" (two layers of each stage), or of the modules named, joined by "+"."""
    if not method:
        return {}
    if method not in ("uniform", "block"):
        return {"recompute_granularity": "selective", "recompute_modules": method.split("+")}
    num = 1 if method == "uniform" else 2
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num}


def _gpt(config, case, first, last, vp_stage):
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage),
        VOCAB,
        TEXT,
        pre_process=first,
        post_process=last,
        position_embedding_type=case.get("positions", "rope"),
        share_embeddings_and_output_weights=case.get("tied", False),
        vp_stage=vp_stage,
        **case.get("gpt", {}),
    )


def _hybrid(config, case, first, last, vp_stage):
    from tests.multiprocess.hybrid import hybrid_model

    return hybrid_model(config, {"vocab": VOCAB, "length": TEXT, **case}, first, last, vp_stage)


def _llava(config, case, first, last, _):
    spec = decoder_model_with_local_default_spec(config.num_moe_experts, False)
    vision = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case["tp"],
    )
    vision.vision_model_type = "clip"
    projection = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case["tp"],
    )
    return LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=spec,
        language_vocab_size=VOCAB,
        language_max_sequence_length=merged_length(case),
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=get_submodules(decoder_model_with_local_default_spec(None, False).submodules.mlp),
        language_position_embedding_type=case.get("positions", "rope"),
        pre_process=first,
        post_process=last,
        add_encoder=first,
        add_decoder=True,
        img_h=IMAGE,
        img_w=IMAGE,
        patch_dim=PATCH,
    )


@torch.no_grad()
def fill_by_name(model: torch.nn.Module) -> None:
    """Give every tensor values drawn from a seed made of its global name."""
    for value in model.sharded_state_dict().values():
        if not isinstance(value, ShardedTensor) or not value.data.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(value.key.encode()))
        full = torch.randn(value.global_shape, generator=generator) * 0.15
        if "norm" in value.key and value.key.endswith("weight"):
            full += 1
        value.data.copy_(full[value.global_slice()].reshape(value.data.shape))


def batches(case: dict) -> list[dict]:
    """This replica's share of one global batch; rows without targets, all targets, one target, and padding."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, VOCAB, (GLOBAL_ROWS, TEXT + 1), generator=generator)
    mask = (torch.rand(GLOBAL_ROWS, TEXT, generator=generator) < 0.6).float()
    mask[1], mask[2] = 0, 1
    mask[3], mask[3, 5] = 0, 1
    for row, end in ((1, 9), (3, 11), (4, 15)):  # padded: a row's context sets the least length of all
        tokens[row, end:], mask[row, end - 1 :] = 0, 0
    image = torch.randn(GLOBAL_ROWS, 3, IMAGE, IMAGE, generator=generator)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    own, num_rows = [], case.get("rows", 2)
    for start in range(rank * num_rows, GLOBAL_ROWS, size * num_rows):
        rows = slice(start, start + num_rows)
        batch = {
            "tokens": tokens[rows, :-1].clone(),
            "labels": tokens[rows, 1:].clone(),
            "loss_mask": mask[rows].clone(),
        }
        batch["position_ids"] = torch.arange(TEXT).expand(num_rows, -1)
        if case.get("positions") == "mrope":  # a grid of pictures: places repeat and go back, one per axis
            axes = [torch.arange(TEXT) // d % 7 for d in (1, 2, 5)]
            batch["position_ids"] = torch.stack(axes)[:, None].expand(-1, num_rows, -1)
        if case["model"] == "llava":
            place = 0 if start // 2 % 2 else 3  # a picture first, or after some text
            batch["tokens"][:, place] = DEFAULT_IMAGE_TOKEN_INDEX
            batch["labels"] = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1).clamp_min(0)
            batch["loss_mask"][:, : place + 1] = 0
            batch["image"] = image[rows]
        if case.get("packed"):
            pack(batch, start)
        own.append(batch)
    return own


def pack(batch: dict, start: int) -> None:
    """Make packed rows of a batch: two or three segments each, multiples of 4 as Megatron's SFT dataset cuts at CP2."""
    rows = len(batch["tokens"])
    cu_seqlens = torch.full((rows, TEXT + 1), TEXT)
    for row in range(rows):
        cuts = [[8, 20], [12], [4, 16], [16]][(start + row) % 4]
        starts = torch.tensor([0, *cuts, TEXT])
        cu_seqlens[row, : len(starts)] = starts
        batch["position_ids"] = batch["position_ids"].clone()
        batch["position_ids"][row] = torch.cat([torch.arange(size) for size in starts.diff().tolist()])
    batch["cu_seqlens_padded"] = None
    batch["cu_seqlens"], batch["max_seqlen"] = cu_seqlens.int(), cu_seqlens.diff(dim=1).amax(dim=1)


class Step:
    """Megatron's forward step; keeps per-token losses and the model's own loss mask."""

    def __init__(self, loss_masks: list | None = None) -> None:
        self.losses: list[torch.Tensor] = []
        self.loss_masks: list[torch.Tensor] = []
        self.forced_masks = loss_masks

    def __call__(self, iterator, model):
        batch = next(iterator)
        packed_seq_params = None
        if "cu_seqlens" in batch:
            batch = flat_rows(batch)
            lengths, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"])
            packed_seq_params = PackedSeqParams("thd", lengths, lengths, max_seqlen_q=longest, max_seqlen_kv=longest)
        if "image" not in batch:  # a LLaVAModel cuts its merged rows itself
            batch = own_part(batch)
        mask = batch["loss_mask"]
        if "image" in batch:
            output, mask = model(
                batch["image"], batch["tokens"], batch["position_ids"], None, batch["labels"], batch["loss_mask"]
            )
        else:
            output = model(
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                packed_seq_params=packed_seq_params,
            )

        def loss_func(loss_BS):
            mask_BS = self.forced_masks[len(self.losses)] if self.forced_masks else mask
            self.losses.append(loss_BS.detach().clone())
            self.loss_masks.append(mask_BS)
            total, count = (loss_BS * mask_BS).sum(), mask_BS.sum().int()
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss_func


def run(case: dict, models: list, schedule, step: Step) -> None:
    own = batches(case)
    for model in models:
        model.zero_grad(set_to_none=True)
    reset_counts(models)

    def make():
        return iter([dict(batch) for batch in own])

    schedule(
        forward_step_func=step,
        data_iterator=[make() for _ in models] if case.get("vpp") else make(),
        model=models if case.get("vpp") else models[0],
        num_microbatches=len(own),
        seq_length=merged_length(case),
        micro_batch_size=case.get("rows", 2),
        forward_only=False,
    )


def routers(models) -> list:
    layers = [layer for model in language_models(models) for layer in model.decoder.layers]
    return [(layer, layer.mlp.router) for layer in layers if hasattr(getattr(layer, "mlp", None), "router")]


def reset_counts(models) -> None:
    """Forget what routers counted, as Megatron's training loop does after each step."""
    forget_router_metrics()
    for _, router in routers(models):
        router.reset_global_aux_loss_tracker()
        if router.enable_expert_bias:
            router.local_tokens_per_expert.zero_()


def router_counts(models) -> dict[str, torch.Tensor]:
    """Tokens per expert, which move the expert bias, and the auxiliary losses that were logged."""
    counted = {
        f"tokens of layer {layer.layer_number}": router.local_tokens_per_expert.clone()
        for layer, router in routers(models)
        if router.enable_expert_bias
    }
    return counted | router_metrics()


def local_slice(mask_BS: torch.Tensor, case: dict) -> torch.Tensor:
    """This rank's part of the sequence, where it is sharded."""
    if not case.get("sp"):
        return mask_BS
    return mask_BS.chunk(case["tp"], dim=1)[mpu.get_tensor_model_parallel_rank()]


def language_models(models):
    models = [unwrap(model) for model in models]
    return [getattr(model, "language_model", None) or model for model in models]


def masked_full_length(case: dict, models: list, plan, dense_layers: int, loss_masks: list) -> tuple[Step, dict]:
    """The oracle's step, see the module's docstring, and what its routers would have counted of the kept tokens."""
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

        def mask_keys(layer, args, kwargs):
            if is_elided(layer):
                kwargs = dict(kwargs, attention_mask=own_BqS[:, None])
                if case.get("aux"):
                    kwargs["padding_mask"] = local_slice(~kept_BS, case)
            return args, kwargs

        def count_kept(router, _, output):
            routing_NE = output[1]
            if is_elided(router):
                routing_NE = routing_NE & local_slice(kept_BS, case).t().reshape(-1, 1)
            name = f"tokens of layer {router.layer_number}"
            counts[name] = counts.get(name, 0) + routing_NE.sum(dim=0).float()

        layers = language_models([model])[0].decoder.layers
        hooks = [layer.register_forward_pre_hook(mask_keys, with_kwargs=True) for layer in layers]
        hooks += [layer.register_forward_hook(pass_by, with_kwargs=True) for layer in layers]
        hooks += [r.register_forward_hook(count_kept) for _, r in routers([model]) if r.enable_expert_bias]
        try:
            return step(iterator, model)
        finally:
            for hook in hooks:
                hook.remove()

    run(case, models, get_forward_backward_func(), forward_step)
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


def gradients(models: list) -> dict[str, torch.Tensor]:
    """Gradients by name, summed as Megatron sums them.

    Over the context group, and over the tensor group those of weights that sequence parallelism gives a part of.
    """
    found = {}
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
    models = build(case)
    names = [list(model.state_dict()) for model in models]
    config = ReGateConfig(
        warmup_steps=1,
        cycle_steps=100,
        dense_steps=0,
        dense_layers=case["dense_layers"],
        dense_last_layers=case.get("dense_last", 0),
        score=case.get("score", "regate"),
        budget=case.get("budget", "uniform"),
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
    sparse = Step()
    run(case, models, schedule, sparse)
    pending = session._pending
    plan, facts = pending.plan, pending.facts
    assert plan.is_sparse and pending.phase == "sparse"
    shortened = [one.length < one.dense_length for one in plan.microbatches]
    assert all(shortened) or (case.get("budget") == "balanced" and any(shortened)), "nothing was shortened"
    sparse_gradients, sparse_counts = gradients(models), router_counts(models)
    session.commit()
    detach(models)
    own = {key for model in models for module in model.modules() for key in vars(module)}
    hooked = {"forward", "compute_language_model_loss", "_apply_expert_bias", "_regate_session"}
    assert not hooked & own, "detach left something behind"

    oracle, oracle_counts = masked_full_length(case, models, plan, case["dense_layers"], sparse.loss_masks)
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
    oracle_gradients = gradients(models)
    assert sparse_gradients.keys() == oracle_gradients.keys()
    gradient_error = 0.0
    for name, gradient in sparse_gradients.items():
        scale = float(oracle_gradients[name].abs().max())
        difference = float((gradient - oracle_gradients[name]).abs().max())
        assert difference <= GRADIENT_BOUND * max(1.0, scale), f"{name}: {difference} of {scale}"
        gradient_error = max(gradient_error, difference / max(1.0, scale))
    kept, positions = {}, 0
    if session.planner:
        positions = session.planner.balance.own
        for index, one in enumerate(facts):
            real_BS = plan.microbatches[index].kept_mask() & (one.is_target_BS | one.is_context_BS)
            loss_BS = sparse.losses[index] * sparse.loss_masks[index]
            for sample, key in enumerate(one.difficulty_key_N2.tolist()):
                own_S = True if one.sample_BS is None else one.sample_BS[0] == sample
                row = int(one.row_N[sample])
                places_kept = torch.where(real_BS[row] & own_S)[0] - one.start_N[sample]
                total = (loss_BS[row] * own_S).sum()
                kept[str(key)] = [places_kept.tolist(), float(total), plan.microbatches[index].length]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (kept, positions))
    errors = torch.tensor([loss_error, gradient_error])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    merged = {key: value for part, _ in gathered for key, value in part.items()}
    positions = [count for _, count in gathered if count]
    return {
        "kept": merged,
        "positions": positions,
        "loss_error": float(errors[0]),
        "gradient_error": float(errors[1]),
    }


@contextlib.contextmanager
def parallel(case: dict, store: dist.Store):
    """Megatron's groups for one case, and none of them afterwards: each holds threads of gloo's."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore(case["name"], store), rank=rank, world_size=world_size)
    mpu.initialize_model_parallel(
        case["tp"],
        case["pp"],
        virtual_pipeline_model_parallel_size=case.get("vpp"),
        context_parallel_size=case.get("cp", 1),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=case.get("etp"),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    dist.barrier()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def shared_store() -> dist.Store:
    """The store that torchrun keeps for its ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=False)


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
