"""Worker of test_energon: a small webdataset, read by Megatron-energon, through attached models on one rank.

The task encoder's batches have the layout of Megatron-LM's examples/multimodal: unshifted labels, no loss mask, flat
tiles, dummies where there is nothing; and the forward step makes of them what that script's ``get_batch`` makes.

    torchrun --nproc-per-node 1 tests/frameworks/run_energon.py FOLDER RESULTS.json
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import sys
import tarfile
from pathlib import Path

if importlib.util.find_spec("transformer_engine"):  # Megatron must use none of it here
    from tests.frameworks import bridge_on_cpu

    bridge_on_cpu.install()
else:
    from regate_megatron.cpu import emulation

    emulation.set_environment()
    emulation.install()

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, IGNORE_INDEX
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.energon import (
    Batch,
    CaptioningSample,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.task_encoder.base import stateless

from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.batches.facts import key_hex
from tests.multiprocess.models import IMAGE, TEXT, VISUAL, build

PAD, PROMPT, SAMPLES, ROWS, MICROBATCHES, STEPS = 0, [3, 4], 12, 2, 2, 5


def write_dataset(folder: Path) -> None:
    """Two shards of captions, every third without a picture, and energon's metadata."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(SAMPLES // 2):
                picture = generator.standard_normal((3, IMAGE, IMAGE)).astype(np.float32)
                if index % 3 == 2:
                    picture = np.zeros((0, IMAGE, IMAGE), np.float32)
                array = io.BytesIO()
                np.save(array, picture)
                words = generator.integers(5, 60, generator.integers(6, 14)).tolist()
                for name, content in (("npy", array.getvalue()), ("txt", " ".join(map(str, words)).encode())):
                    entry = tarfile.TarInfo(f"{shard}{index:03d}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    BaseWebdatasetFactory.prepare_dataset(folder, ["0.tar", "1.tar"], split_parts_ratio=[("train", 1)], workers=1)
    (folder / ".nv-meta/dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: CaptioningSample}\n"
        "field_map: {image: npy, caption: txt}\n"
    )


@dataclasses.dataclass
class Encoded(Sample):
    """One row, in the fields of examples/multimodal's ``ImageTaskSample``."""

    imgs: list
    tokens: torch.Tensor
    labels: torch.Tensor
    ends: list | None = None


@dataclasses.dataclass
class Collated(Batch):
    """Fields of examples/multimodal's ``ImageTaskBatchPacked``."""

    tokens: torch.Tensor
    labels: torch.Tensor
    imgs: torch.Tensor
    num_tiles: torch.Tensor
    cu_lengths: torch.Tensor
    max_lengths: torch.Tensor


class Encoder(DefaultTaskEncoder):
    """A picture, a prompt and a caption to learn; for a text model the picture is left out."""

    def __init__(self, *, with_pictures: bool) -> None:
        super().__init__()
        self.with_pictures = with_pictures

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> Encoded:
        picture = torch.as_tensor(np.asarray(sample.image))
        has_picture = self.with_pictures and len(picture) == 3
        prompt = ([DEFAULT_IMAGE_TOKEN_INDEX] if has_picture else []) + PROMPT
        words = [int(word) for word in sample.caption.split()]
        return Encoded.derive_from(
            sample,
            imgs=[picture] if has_picture else [],
            tokens=torch.tensor(prompt + words),
            labels=torch.tensor([IGNORE_INDEX] * len(prompt) + words),
        )

    @stateless
    def batch(self, samples: list[Encoded]) -> Collated:
        length = TEXT - 1
        tokens, labels = torch.full((len(samples), length), PAD), torch.full((len(samples), length + 1), PAD)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample.tokens)], labels[row, : len(sample.labels)] = sample.tokens, sample.labels
        imgs = [image for sample in samples for image in sample.imgs]
        dummy = torch.zeros(1, 1, dtype=torch.int32)
        return Collated.from_samples(
            samples,
            tokens=tokens,
            labels=labels,
            imgs=torch.stack(imgs) if imgs else torch.zeros(1, 1),
            num_tiles=torch.ones(len(imgs), dtype=torch.int32) if imgs else dummy,
            cu_lengths=dummy,
            max_lengths=dummy,
        )

    def encode_batch(self, batch: Collated) -> dict:
        return dataclasses.asdict(batch)


class PackingEncoder(Encoder):
    """As examples/multimodal packs with ``--packing-buffer-size``: two samples in a row, with where each starts."""

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        return [samples[start : start + ROWS] for start in range(0, len(samples), ROWS)]

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Encoded:
        lengths = [len(one.tokens) + len(one.imgs) * (VISUAL - 1) for one in samples]
        return Encoded.derive_from(
            samples[0],
            imgs=[image for one in samples for image in one.imgs],
            tokens=torch.cat([one.tokens for one in samples]),
            labels=torch.cat([one.labels for one in samples]),
            ends=[0, *itertools.accumulate(lengths)],
        )

    @stateless
    def batch(self, samples: list[Encoded]) -> Collated:
        (row,) = samples
        return Collated.from_samples(
            samples,
            tokens=row.tokens[None],
            labels=torch.cat([row.labels, torch.tensor([PAD])])[None],
            imgs=torch.stack(row.imgs) if row.imgs else torch.zeros(1, 1),
            num_tiles=torch.ones(max(1, len(row.imgs)), dtype=torch.int32),
            cu_lengths=torch.tensor([row.ends], dtype=torch.int32),
            max_lengths=torch.tensor(row.ends).diff().max()[None].int(),
        )


def loader(folder: Path, *, with_pictures: bool, packs: bool = False):
    """Batches without end, as examples/multimodal's ``EnergonDataloader`` gives them."""
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        folder,
        batch_size=1 if packs else ROWS,
        batch_drop_last=True,
        packing_buffer_size=SAMPLES // 2 if packs else None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=workers,
        task_encoder=(PackingEncoder if packs else Encoder)(with_pictures=with_pictures),
    )
    return iter(get_savable_loader(dataset, worker_config=workers))


def llava_step(iterator, model):
    """What examples/multimodal/train.py makes of a batch."""
    batch = next(iterator)
    tokens, labels = batch["tokens"], batch["labels"][:, 1 : batch["tokens"].shape[1] + 1]
    loss_mask = torch.ones(labels.shape)
    loss_mask[labels == PAD] = 0.0
    loss_mask[labels == IGNORE_INDEX] = 0.0
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    imgs, num_tiles = batch["imgs"], batch["num_tiles"]
    if imgs.shape == torch.Size([1, 1]):
        imgs, num_tiles = torch.tensor([]), torch.tensor([], dtype=torch.int)
    packing = None
    if (ends := batch["cu_lengths"]).shape != torch.Size([1, 1]):
        longest = batch["max_lengths"][0]
        packing = PackedSeqParams("thd", ends[0], ends[0], max_seqlen_q=longest, max_seqlen_kv=longest)
    options = {"num_image_tiles": num_tiles, "packed_seq_params": packing}
    losses, merged_mask = model(imgs, tokens, positions, None, labels, loss_mask, **options)
    return losses, masked_mean(merged_mask)


def gpt_step(iterator, model):
    batch = next(iterator)
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    losses = model(batch["tokens"], positions, None, labels=batch["labels"])
    return losses, masked_mean(batch["loss_mask"])


def masked_mean(mask_BS):
    def loss_func(loss_BS):
        total, count = (loss_BS * mask_BS).sum(), mask_BS.sum().int()
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return loss_func


def as_gpt(batches):
    """The layout of pretrain_gpt.py, from the same rows."""
    for batch in batches:
        labels = batch["labels"][:, 1:]
        is_target = (labels != PAD) & (labels != IGNORE_INDEX)
        yield {"tokens": batch["tokens"], "labels": labels.clamp_min(0), "loss_mask": is_target.float()}


def train(case: dict, step, batches, score: str = "regate", budget: str = "dealt") -> dict:
    """A few steps on energon's batches; what ran, every sample's key of every step, and what each kept at last."""
    models = build(case)
    own = {"score": score, "budget": budget, "teacher_load": "student"}
    config = ReGateConfig(warmup_steps=2, cycle_steps=100, dense_steps=0, **own)
    attach(models, config, pad_token=PAD)
    session, schedule = session_of(models), wrap_forward_backward(get_forward_backward_func())
    keys, losses, counted, kept = [], [], 0, {}
    for _ in range(STEPS):
        reports = schedule(
            forward_step_func=step,
            data_iterator=batches,
            model=models[0],
            num_microbatches=MICROBATCHES,
            seq_length=TEXT - 1 + (VISUAL if case["model"] == "llava" else 0),
            micro_batch_size=ROWS,
            forward_only=False,
        )
        total, count = sum(report["lm loss"] for report in reports)
        losses.append(float(total / count))
        counted += int(count)
        keys += [key_hex(key) for facts in session.step.facts for key in facts.difficulty_key_N2]
        kept |= kept_of(session.step) if session.step.plan.is_sparse else {}
    session.finish()
    totals = dataclasses.asdict(session.totals)
    detach(models)
    return {"keys": keys, "losses": losses, "counted": counted, "totals": totals, "kept": kept}


def kept_of(step) -> dict[str, list[int]]:
    """By key the positions that ran of each sample, from its first."""
    found = {}
    for plan, facts in zip(step.plan.microbatches, step.facts, strict=True):
        is_real_BS = plan.kept_mask() & (facts.is_target_BS | facts.is_context_BS)
        for sample, key in enumerate(facts.difficulty_key_N2):
            row_S = is_real_BS[facts.row_N[sample]]
            own_S = True if facts.sample_BS is None else facts.sample_BS[0] == sample
            found[key_hex(key)] = (torch.where(row_S & own_S)[0] - facts.start_N[sample]).tolist()
    return found


def main(folder: str, results: str) -> None:
    dist.init_process_group(backend="gloo")
    mpu.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    path = Path(folder) / "captions"
    write_dataset(path)
    case = {"tp": 1, "pp": 1}
    found = {
        "llava": train(dict(case, model="llava"), llava_step, loader(path, with_pictures=True)),
        "gpt": train(dict(case, model="gpt"), gpt_step, as_gpt(loader(path, with_pictures=False))),
    }
    each = {"score": "reference", "budget": "per-sample"}  # whatever the order of samples, each keeps the same
    case |= {"model": "llava", "longest": 2 * TEXT + 2 * VISUAL}
    found["each"] = train(case, llava_step, loader(path, with_pictures=True), **each)
    found["packed"] = train(case, llava_step, loader(path, with_pictures=True, packs=True), **each)
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
