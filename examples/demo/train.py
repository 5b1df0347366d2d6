"""Train the demo's language model, then a LLaVA on top of it, through Megatron's own `pretrain`.

An ordinary Megatron script: it knows nothing of ReGATE. `--stage text` trains a GPTModel on the captions without their
pictures, then saves a LLaVAModel that holds it, with a CLIP vision tower and a projector from the seed; `--stage llava`
trains a LLaVAModel, and loads that one, so that every run has one start. Layouts: tensor and data parallel.

    torchrun --nproc-per-node 4 -m regate_megatron --cpu examples/demo/train.py --stage text --demo-data DIR \\
        --save-llava START ...
    torchrun --nproc-per-node 4 -m regate_megatron --cpu examples/demo/train.py --stage llava --demo-data DIR \\
        --load START --finetune --no-load-optim --no-load-rng --eval-log FILE ... [--regate ...]

A batch has the keys of Megatron's own vision-language batches: `tokens` [B, S] with one placeholder for the picture at
the start, `labels` (already shifted), `loss_mask`, `position_ids`, `image` [B, 3, H, W]; and `needs_image` [B, S] for
the evaluation. Every evaluation of the training loop also writes one JSON line to `--eval-log`: iteration, eval_loss,
image_word_accuracy (labels that need the picture; where `needs_image` tells several kinds apart, also
accuracy_by_kind, from kind 1 up) and all_word_accuracy (all targets), all on held-out samples and teacher-forced: each
token is predicted from the true ones before it; and cpu_seconds, what this process has spent on training so far,
evaluations left out; and weights, a hash of rank 0's, so that two runs can be told to be one bit by bit.
`--stop-at KIND:SHARE` ends the training once the held-out accuracy of a kind is there, and fails when it never is.
`--eval-losses FILE` keeps the last evaluation's loss of every token, as `losses` and `labels`
[N, S] in the order of the held-out file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tower
from dataset import IMAGE_TOKEN, Captions, collate
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.utils import Split
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args, pretrain, print_rank_last
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

NUM_KINDS = 8  # values of `needs_image`, 0 included


def model_provider(built: list, pre_process=True, post_process=True, config=None, **_) -> GPTModel | LLaVAModel:
    """Build the model of `--stage` and add it to `built`; the language model is the same in both stages."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    spec = get_gpt_layer_local_spec(normalization=config.normalization)  # its names are those of converted weights
    if args.stage == "text":
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
        )
        built.append(model)
        return model

    # As in Megatron's own script: seq_length becomes the vision model's, decoder_seq_length is the language model's.
    num_visual = get_num_image_embeddings(args.img_h, args.img_w, args.patch_dim, "clip", True, 1, False)
    args.decoder_seq_length = args.seq_length + args.frames * num_visual
    args.seq_length = args.encoder_seq_length = num_visual
    args.max_position_embeddings = max(args.max_position_embeddings, args.decoder_seq_length)

    vision_config = deepcopy(config)
    vision_config.num_layers = args.vision_num_layers
    vision_config.vision_model_type = "clip"
    model = LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=spec,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.decoder_seq_length,
        vision_transformer_config=vision_config,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=deepcopy(config),
        vision_projection_layer_spec=deepcopy(get_submodules(spec.submodules.mlp)),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        language_position_embedding_type="rope",
        pre_process=pre_process,
        post_process=post_process,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
        image_token_index=IMAGE_TOKEN,
    )
    if pre_process:  # torch's N(0, 1) for places would drown the picture for hundreds of iterations
        with torch.no_grad():
            model.vision_model.position_embeddings.weight.mul_(args.init_method_std)
            model.vision_model.class_token.mul_(args.init_method_std)
    built.append(model)
    return model


def save_llava(language_model: GPTModel, folder: str) -> None:
    """Save a LLaVAModel that holds `language_model`, the rest of it from the seed. All ranks call this."""
    args = get_args()
    args.stage, args.save, args.no_save_optim, args.no_save_rng = "llava", folder, True, True
    torch.manual_seed(args.seed)  # whatever the training drew
    model = model_provider([])
    model.language_model.load_state_dict(language_model.state_dict())
    if args.vision_until:
        wanted = {"until": args.vision_until, "most": args.vision_steps, "kind": args.vision_kind, "seed": args.seed}
        steps, recall = tower.teach(model.vision_model, Path(args.vision_data or args.demo_data), **wanted)
        if args.eval_log and torch.distributed.get_rank() == 0:
            append(args.eval_log, {"vision_steps": steps, "vision_recall": recall})
    save_checkpoint(1, [model], None, None, 0)


def train_valid_test_datasets_provider(num_samples: tuple[int, int, int]) -> tuple:
    """Called on tensor rank 0 only; the others get their batches from it.

    Datasets, or iterators with `--dataloader-type external`, which rows without a picture need.
    """
    args = get_args()
    with_image, folder = args.stage == "llava", Path(args.demo_data)
    train = Captions(
        folder / "train.npz",
        num_samples[0],
        with_image=with_image,
        shuffle=True,
        seed=args.seed,
        split=Split.train,
    )
    # One more evaluation than asked for: Megatron evaluates again when the training ends.
    num_valid = num_samples[1] + args.eval_iters * args.eval_global_batch_size
    valid = Captions(folder / "heldout.npz", num_valid, with_image=with_image, split=Split.valid)
    if args.dataloader_type == "external":
        return (
            loader(train, args.consumed_train_samples, args.micro_batch_size),
            loader(valid, args.consumed_valid_samples, args.eval_micro_batch_size),
            None,
        )
    return train, valid, None


def loader(rows: Captions, consumed: int, micro_batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in Megatron's order, but with fewer pictures than rows where some have none."""
    sampler = MegatronPretrainingSampler(
        total_samples=len(rows),
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    return iter(torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=collate))


def get_batch(data_iterator) -> dict[str, torch.Tensor]:
    """The next batch, broadcast over the tensor-parallel group."""
    data = next(data_iterator) if data_iterator is not None else None
    batch = tensor_parallel.broadcast_data(["tokens", "position_ids", "labels", "needs_image"], data, torch.int64)
    if get_args().frames > 1 and get_args().stage == "llava":
        if data is not None:  # [B, T, C, H, W] has one axis too many to be broadcast
            data = dict(data, image=data["image"].flatten(0, 1))
        batch |= tensor_parallel.broadcast_data(["num_image_tiles"], data, torch.int64)
    floats = ["loss_mask", "image"] if get_args().stage == "llava" else ["loss_mask"]
    return batch | tensor_parallel.broadcast_data(floats, data, torch.float32)


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Returns the summed loss, the number of targets, and both for the log; `losses` and `loss_mask` are [B, S]."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def append(file: str, found: dict) -> None:
    """One JSON line more."""
    with open(file, "a") as log:
        log.write(json.dumps(found) + "\n")


def weights_hash(chunks: list[torch.nn.Module]) -> str:
    """Sixteen digits that stand for the bits of this rank's weights."""
    digest = hashlib.sha256()
    for chunk in chunks:
        for name, weight in sorted(chunk.named_parameters()):
            digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class HeldOut:
    """Sums over one evaluation; `write` is the `non_loss_data_func` that ends every evaluation on all ranks."""

    def __init__(self):
        self.sums, self.written = self.zeros(), -1
        self.by_kind: dict[int, float] = {}
        self.rows: list[torch.Tensor] = []
        self.cpu_seconds, self.since = 0.0, None

    def clock(self, is_training: bool) -> None:
        """Count this process's CPU seconds from the first training step on, and not while it evaluates."""
        now = time.process_time()
        if is_training and self.since is None:
            self.since = now
        elif not is_training and self.since is not None:
            self.cpu_seconds, self.since = self.cpu_seconds + now - self.since, None

    @staticmethod
    def zeros() -> torch.Tensor:
        """Loss, hits and number of targets; then hits and number of each kind of `needs_image`, 0 first."""
        return torch.zeros(3 + 2 * NUM_KINDS)

    def loss_func(self, batch: dict[str, torch.Tensor], logits: torch.Tensor):
        """`logits` [B, S, V / TP]: this rank's part of the vocabulary, text positions only."""
        labels, mask, needs = batch["labels"], batch["loss_mask"], batch["needs_image"]
        best, token = logits.float().max(-1, keepdim=True)
        token = token + parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        best, token = map(tensor_parallel.gather_from_tensor_model_parallel_region, (best, token))  # [B, S, TP]
        hits = (token.gather(-1, best.argmax(-1, keepdim=True)).squeeze(-1) == labels).float()
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)
        by_kind = torch.zeros(2, NUM_KINDS)
        by_kind.index_add_(1, needs.flatten(), torch.stack((hits * mask, mask)).flatten(1))
        self.sums += torch.cat((torch.stack([x.sum() for x in (losses * mask, hits * mask, mask)]), by_kind.flatten()))
        self.rows.append(torch.stack((losses, labels.float())))
        return loss_func(mask, losses)

    def write(self, chunks: list[torch.nn.Module]) -> None:
        args = get_args()
        sums, self.sums, rows, self.rows = self.sums, self.zeros(), self.rows, []
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        loss, hits, num_targets = sums[:3].tolist()
        kind_hits, num_kind = sums[3:].view(2, NUM_KINDS)[:, 1:]
        iteration = args.consumed_train_samples // args.global_batch_size
        if iteration == self.written:  # the evaluation that ends the training repeats the last one
            return
        self.written = iteration
        found = {
            "iteration": iteration,
            "eval_loss": loss / num_targets,
            "image_word_accuracy": float(kind_hits.sum() / num_kind.sum()),
            "all_word_accuracy": hits / num_targets,
            "cpu_seconds": round(self.cpu_seconds, 2),
            "weights": weights_hash(chunks),
        }
        if num_kind[1:].any():
            found["accuracy_by_kind"] = [round(float(h / n), 5) for h, n in zip(kind_hits, num_kind, strict=True) if n]
        print_rank_last(f"held-out: {json.dumps(found)}")
        if args.eval_losses:
            self.write_losses(rows, args.eval_losses)
        if args.eval_log and torch.distributed.get_rank() == 0:
            append(args.eval_log, found)
        self.by_kind = {k: float(h / n) for k, (h, n) in enumerate(zip(kind_hits, num_kind, strict=True), 1) if n}
        if self.has_arrived:
            args.train_iters = iteration  # where Megatron's loop ends
        self.clock(is_training=True)  # the next step reads and plans its batch before the model is called

    @property
    def has_arrived(self) -> bool:
        """Whether the last evaluation was good enough for --stop-at; the same on all ranks."""
        stop_at = get_args().stop_at
        return stop_at is not None and self.by_kind.get(stop_at[0], 0.0) >= stop_at[1]

    def write_losses(self, rows: list[torch.Tensor], file: str) -> None:
        """Rank 0 writes all rows of an evaluation; `rows` holds [2, B, S] per microbatch, losses and labels."""
        own = torch.stack(rows).contiguous()  # microbatch, (loss, label), row, position
        parts = [torch.empty_like(own) for _ in range(parallel_state.get_data_parallel_world_size())]
        torch.distributed.all_gather(parts, own, group=parallel_state.get_data_parallel_group())
        if torch.distributed.get_rank() == 0:  # a microbatch of all ranks is one run of samples
            losses, labels = torch.stack(parts, dim=1).permute(2, 0, 1, 3, 4).flatten(1, 3).numpy()
            np.savez(file, losses=losses, labels=labels.astype(np.int64))


def forward_step(held_out: HeldOut, data_iterator, model):
    """One microbatch. Training asks the model for losses, evaluation for logits: they tell the accuracy, too."""
    held_out.clock(model.training)
    batch = get_batch(data_iterator)
    tokens, position_ids = batch["tokens"], batch["position_ids"]
    labels = batch["labels"] if model.training else None
    if "image" in batch:
        # The loss mask comes back in the order of the merged sequence, picture and text.
        image, loss_mask = batch["image"], batch["loss_mask"]
        tiles = batch["num_image_tiles"].int() if "num_image_tiles" in batch else None
        output, loss_mask = model(image, tokens, position_ids, None, labels, loss_mask, num_image_tiles=tiles)
    else:
        output, loss_mask = model(tokens, position_ids, None, labels=labels), batch["loss_mask"]
    if model.training:
        return output, partial(loss_func, loss_mask)
    # The placeholder stands for the last visual position, so the last S positions are those of `tokens`.
    return output[:, -tokens.shape[1] :].contiguous(), partial(held_out.loss_func, batch)


def kind_and_share(text: str) -> tuple[int, float]:
    """`3:0.8` as numbers."""
    kind, share = text.split(":")
    return int(kind), float(share)


def add_demo_args(parser):
    group = parser.add_argument_group(title="demo")
    group.add_argument("--stage", choices=["text", "llava"], required=True)
    group.add_argument("--demo-data", required=True, metavar="DIR", help="folder written by data.py")
    group.add_argument("--save-llava", metavar="DIR", help="where --stage text saves the start of --stage llava")
    group.add_argument("--frames", type=int, default=1, help="frames of a row's clip")
    group.add_argument("--vision-num-layers", type=int, default=1)
    group.add_argument("--vision-until", type=float, metavar="SHARE", help="recall that ends tower.py's start")
    group.add_argument("--vision-data", metavar="DIR", help="its pictures and words (default: those of --demo-data)")
    group.add_argument("--vision-steps", type=int, default=2000, help="the most steps of it")
    group.add_argument("--vision-kind", type=int, metavar="KIND", help="whose recall, by needs_image (default: all)")
    group.add_argument("--stop-at", type=kind_and_share, metavar="KIND:SHARE", help="held-out accuracy that ends it")
    group.add_argument("--repeatable", action="store_true", help="torch's deterministic algorithms where it has them")
    group.add_argument("--eval-log", metavar="FILE", help="append one JSON line per evaluation")
    group.add_argument("--eval-losses", metavar="FILE", help="write the last evaluation's loss of every token")
    return parser


if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=add_demo_args)
    if args.repeatable:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    if args.save or args.save_llava:
        get_write_results_queue("fork")  # saving makes one by spawn otherwise, and all is imported once more per rank
    held_out, built = HeldOut(), []
    pretrain(
        pretrain_cfg_container_from_args(args),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        partial(forward_step, held_out),
        partial(model_provider, built),
        non_loss_data_func=held_out.write,
    )
    if args.stop_at and not held_out.has_arrived:
        kind, share = args.stop_at
        sys.exit(
            f"held-out accuracy of kind {kind}: given {held_out.by_kind.get(kind, 0.0):.1%} after {args.train_iters} "
            f"iterations with seed {args.seed}; allowed {share:.1%} or more; "
            "change --train-iters, --stop-at or the seed"
        )
    if args.stage == "text" and args.save_llava:
        try:
            save_llava(built[0], args.save_llava)
        except tower.NotLearned as error:
            sys.exit(str(error))
    # A gloo thread that still releases a tensor while Python shuts down would abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
