"""Small Megatron models, batches for them and one step of Megatron's schedule: what workers of tests share.

Weights are made from the names of tensors, so every layout starts from the same ones. A case is a dictionary; what it
may say is what :func:`build`, :func:`batches` and :func:`parallel` ask it for. A worker installs the emulation first.

Shapes: B rows, S positions, N segments.
"""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import get_submodules

from regate_megatron.compat import unwrap
from regate_megatron.decoder.positions import layers_ahead
from regate_megatron.method.budget import align_up
from tests.multiprocess import dynamic, fused_rope
from tests.multiprocess.ahead import forget_ahead
from tests.multiprocess.cores import flat_rows, forget_router_metrics, own_part
from tests.multiprocess.mimo import end_to_end, mimo_model, put_pictures
from tests.multiprocess.qwen_like import QwenLike, put_media
from tests.multiprocess.scaled_by_place import ScaledByPlace

LAYERS, HIDDEN, VOCAB, TEXT, GLOBAL_ROWS = 4, 32, 64, 24, 8
IMAGE, PATCH = 16, 8
VISUAL = (IMAGE // PATCH) ** 2  # positions of a picture, unless a case has larger ones ("side", in pixels)


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
        if config.apply_rope_fusion:
            fused_rope.install()
        make = {"llava": _llava, "hybrid": _hybrid, "qwen": _qwen, "mimo": _mimo}.get(case["model"], _gpt)
        chunks.append(make(config, case, first, last, vp_stage if virtual else None))
        if case.get("scaled"):
            for layer in chunks[-1].decoder.layers:
                layer.self_attention.core_attention.__class__ = ScaledByPlace
    for chunk in chunks:
        chunk.model_type = ModelType.encoder_or_decoder  # Megatron's get_model sets it
        fill_by_name(chunk)
        for name in case.get("frozen", ()):
            if getattr(chunk, name) is not None:
                getattr(chunk, name).requires_grad_(False)
    return chunks


def under_ddp(models: list, **optimizer) -> tuple[list, object]:
    """Megatron's own DDP and distributed optimizer round them: gradients are reduced while the schedule runs."""
    gathers = optimizer.get("overlap_param_gather", False)
    reducing = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 2000}
    ddp = DistributedDataParallelConfig(overlap_param_gather=gathers, **reducing)
    models = [DistributedDataParallel(m.config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(models)]
    optimizer = get_megatron_optimizer(OptimizerConfig(use_distributed_optimizer=True, **optimizer), models)
    transformer, several = models[0].config, len(models) > 1
    for ours, theirs in (("no_sync_func", "no_sync"), ("grad_sync_func", "start_grad_sync")):
        calls = [getattr(model, theirs) for model in models]
        setattr(transformer, ours, calls if several else calls[0])
    if gathers:
        transformer.param_sync_func = [m.start_param_sync for m in models] if several else models[0].start_param_sync
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    return models, optimizer


def merged_length(case: dict) -> int:
    """Positions of a row inside the model; a LLaVAModel pads its own to what SP and CP cut."""
    if case["model"] != "llava":
        return TEXT
    if "longest" in case:
        return case["longest"]
    cp = case.get("cp", 1)
    visual = (case.get("side", IMAGE) // PATCH) ** 2 * max(case.get("tiles", [1]))
    return align_up(TEXT - 1 + visual, (2 * cp if cp > 1 else 1) * (case["tp"] if case.get("sp") else 1))


def recompute(method: str | None) -> dict:
    """Full recompute, "uniform" or "block" (two layers of each stage), or of the modules named, joined by "+"."""
    if not method:
        return {}
    if method not in ("uniform", "block"):
        return {"recompute_granularity": "selective", "recompute_modules": method.split("+")}
    num = 1 if method == "uniform" else 2
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num}


def _gpt(config, case, first, last, vp_stage):
    where = {"use_transformer_engine": False, "vp_stage": vp_stage}
    layers = get_gpt_decoder_block_spec(config, **where)
    ahead = {}
    if config.mtp_num_layers:  # which are as the last layer of their stage, or the plain one where there is none
        last_layer = layers if layers.layer_specs else get_gpt_layer_local_spec()
        ahead = {"mtp_block_spec": get_gpt_mtp_block_spec(config, last_layer, **where)}
    return GPTModel(
        config,
        layers,
        VOCAB,
        TEXT,
        pre_process=first,
        post_process=last,
        position_embedding_type=case.get("positions", "rope"),
        share_embeddings_and_output_weights=case.get("tied", False),
        vp_stage=vp_stage,
        **ahead,
        **case.get("gpt", {}),
    )


def _hybrid(config, case, first, last, vp_stage):
    from tests.multiprocess.hybrid import hybrid_model  # core 0.17 has no such model

    return hybrid_model(config, {"vocab": VOCAB, "length": TEXT, **case}, first, last, vp_stage)


def _qwen(config, case, first, last, vp_stage):
    return QwenLike(_gpt(config, {"positions": "mrope", **case}, first, last, vp_stage))


def _vision(case):
    """The transformer configs of a tower and of its projection."""
    sizes = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4, "use_cpu_initialization": True}
    sizes |= {"tensor_model_parallel_size": case["tp"]}
    vision = TransformerConfig(hidden_dropout=0.0, attention_dropout=0.0, **sizes)
    vision.vision_model_type = "clip"
    projection = TransformerConfig(ffn_hidden_size=HIDDEN, **sizes)
    return vision, projection, get_submodules(decoder_model_with_local_default_spec(None, False).submodules.mlp)


def _mimo(config, case, *_):
    sizes = {"side": case.get("side", IMAGE), "patch": PATCH, "vocabulary": VOCAB, "length": TEXT}
    return mimo_model(config, *_vision(case), packs="packed" in case, **sizes)


def _llava(config, case, first, last, _):
    spec = decoder_model_with_local_default_spec(config.num_moe_experts, False)
    vision, projection, layers = _vision(case)
    side = case.get("side", IMAGE)
    pictures = {"img_h": side, "img_w": side, "patch_dim": PATCH}
    if "dynamic" in case:
        pictures = dynamic.model_options(case, vision, PATCH)
    return LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=spec,
        language_vocab_size=VOCAB,
        language_max_sequence_length=merged_length(case),
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=layers,
        language_position_embedding_type=case.get("positions", "rope"),
        pre_process=first,
        post_process=last,
        add_encoder=first,
        add_decoder=True,
        **pictures,
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
        size = (1,) * value.prepend_axis_num + tuple(value.local_shape)
        own = tuple(slice(start, start + num) for start, num in zip(value.global_offset, size, strict=True))
        value.data.copy_(full[own].reshape(value.data.shape))


def batches(case: dict) -> list[dict]:
    """This replica's share of one global batch; rows without targets, all targets, one target, and padding."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, VOCAB, (GLOBAL_ROWS, TEXT + 1), generator=generator)
    mask = (torch.rand(GLOBAL_ROWS, TEXT, generator=generator) < 0.6).float()
    mask[1], mask[2] = 0, 1
    mask[3], mask[3, 5] = 0, 1
    for row, end in ((1, 9), (3, 11), (4, 15)):  # padded: a row's context sets the least length of all
        tokens[row, end:], mask[row, end - 1 :] = 0, 0
    side = case.get("side", IMAGE)
    tiles = torch.tensor(case.get("tiles", [1])).repeat(GLOBAL_ROWS)[:GLOBAL_ROWS]  # of each row's picture
    image = torch.randn(int(tiles.sum()), 3, side, side, generator=generator).split(tiles.tolist())
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    own, num_rows = [], case.get("rows", 2)
    starts = range(rank * num_rows, GLOBAL_ROWS, size * num_rows)
    if case.get("uneven"):  # the first ranks have the shorter rows
        starts = range(rank * GLOBAL_ROWS // size, (rank + 1) * GLOBAL_ROWS // size, num_rows)
    for start in starts:
        rows = slice(start, start + num_rows)
        batch = {
            "tokens": tokens[rows, :-1].clone(),
            "labels": tokens[rows, 1:].clone(),
            "loss_mask": mask[rows].clone(),
        }
        batch["position_ids"] = torch.arange(TEXT).expand(num_rows, -1)
        if case.get("places") == "backwards":
            batch["position_ids"] = torch.arange(TEXT).flip(0).expand(num_rows, -1)
        if case.get("positions") == "mrope":  # a grid of pictures: places repeat and go back, one per axis
            axes = [torch.arange(TEXT) // d % 7 for d in (1, 2, 5)]
            batch["position_ids"] = torch.stack(axes)[:, None].expand(-1, num_rows, -1)
        if "dynamic" in case:
            dynamic.put_pictures(batch, start, case, PATCH)
        elif case["model"] == "llava":
            place = 0 if start // 2 % 2 else 3  # a picture first, or after some text
            batch["tokens"][:, place] = DEFAULT_IMAGE_TOKEN_INDEX
            batch["labels"] = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1).clamp_min(0)
            batch["loss_mask"][:, : place + 1] = 0
            batch["image"] = torch.cat(image[rows])
            if "tiles" in case:  # of every other picture the frames of a clip
                batch["num_image_tiles"] = tiles[rows].int()
                batch["num_frames"] = torch.where(torch.arange(GLOBAL_ROWS) % 4 < 2, tiles, 1)[rows]
        if case["model"] == "mimo":
            put_pictures(batch, torch.cat(image[rows]), 0 if start // 2 % 2 else 3, PATCH)
        if case.get("unlabelled"):  # as Hugging Face marks what is no target, in prompts and padding; with a loss mask
            is_marked = (batch["loss_mask"] == 0) & (torch.arange(TEXT) % 3 == 0) & (torch.arange(TEXT) < 12)
            batch["labels"].masked_fill_(is_marked, -100)
            batch["loss_mask"].masked_fill_(is_marked, 1)
        if case["model"] == "qwen":
            put_media(batch, start)
        if case.get("packed"):
            pack_rows(case, batch, start)
        if case.get("ragged"):  # rows of two lengths, by global row
            batch = {name: values[:, : TEXT - 3 * (start // 2 % 2)] for name, values in batch.items()}
        own.append(batch)
    return own


def pack_rows(case: dict, batch: dict, start: int) -> None:
    """As the scripts of the case's model pack rows."""
    if case["model"] == "mimo":
        end_to_end(batch)
    elif case["model"] == "llava":
        dynamic.pack_entries(batch, start, (case.get("side", IMAGE) // PATCH) ** 2)
    else:
        pack(batch, start)


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
        if "image" not in batch and "modality_inputs" not in batch:  # these cut their merged rows themselves
            batch = own_part(batch)
        mask = batch["loss_mask"]
        needs_mask = getattr(model.config, "mtp_num_layers", None) and not hasattr(model.config, "tells_no_loss_mask")
        if "image" in batch:
            entries = (batch[name] for name in ("image", "tokens", "position_ids"))
            options = {"num_image_tiles": batch.get("num_image_tiles"), "packed_seq_params": dynamic.packing_of(batch)}
            if "imgs_sizes" in batch:
                options |= dynamic.forward_options(batch, PATCH, getattr(unwrap(model), "temporal_patch_dim", 1))
            output, mask = model(*entries, None, batch["labels"], batch["loss_mask"], **options)
        elif "modality_inputs" in batch:
            names = ("position_ids", "labels", "loss_mask", "modality_inputs", "packing_kwargs")
            output, mask = model(batch["tokens"], **{name: batch.get(name) for name in names})
        else:
            output = model(
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                packed_seq_params=packed_seq_params,
                **({"loss_mask": mask} if needs_mask else {}),
            )

        def loss_func(loss_BS):
            mask_BS = self.forced_masks[len(self.losses)] if self.forced_masks else mask
            self.losses.append(loss_BS.detach().clone())
            self.loss_masks.append(mask_BS)
            total, count = (loss_BS * mask_BS).sum(), mask_BS.sum().int()
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss_func


def run(case: dict, models: list, schedule, step: Step, own: list[dict] | None = None) -> None:
    """One step on this replica's batches, or on others."""
    own = batches(case) if own is None else own
    for model in models:
        model.zero_grad(set_to_none=True)
        if isinstance(model, DistributedDataParallel):
            model.zero_grad_buffer()
    reset_counts(models)

    def make():
        return iter([dict(batch) for batch in own])

    given = {}
    if case.get("communicator"):  # what a host passes that keeps its own
        stages = P2PCommunicator(mpu.get_pipeline_model_parallel_group(), language_models(models)[0].config)
        given = {"p2p_communicator": stages, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}
        before = dict(vars(stages))
    schedule(
        forward_step_func=step,
        data_iterator=[make() for _ in models] if case.get("vpp") else make(),
        model=models if case.get("vpp") else models[0],
        num_microbatches=len(own),
        seq_length=merged_length(case),
        micro_batch_size=case.get("rows", 2),
        forward_only=False,
        **given,
    )
    if given:
        assert vars(stages) == before, "something was left on the communicator"


def routers(models) -> list:
    """The routers of the chunks with the numbers of their layers; those that predict ahead come after the last."""
    found = []
    for model in language_models(models):
        layers = [(layer.layer_number, layer) for layer in model.decoder.layers]
        layers += [(LAYERS + layer.layer_number, layer) for layer in layers_ahead(model)]
        found += [(number, getattr(getattr(layer, "mlp", None), "router", None)) for number, layer in layers]
    return [(number, router) for number, router in found if router is not None]


def reset_counts(models) -> None:
    """Forget what routers counted, as Megatron's training loop does after each step."""
    forget_router_metrics()
    forget_ahead()
    for _, router in routers(models):
        router.reset_global_aux_loss_tracker()
        if router.enable_expert_bias:
            router.local_tokens_per_expert.zero_()


def language_models(models):
    models = [unwrap(model) for model in models]
    return [getattr(model, "language_model", None) or model for model in models]


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
    """A store for all ranks: torchrun keeps one; where there is none rank 0 does."""
    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    keeps = rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    return dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=keeps)
