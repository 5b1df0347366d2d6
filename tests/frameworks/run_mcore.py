"""Worker of the tests of mcore-bridge: ``attach`` on its models, over batches as ms-swift makes them.

    python -m tests.frameworks.run_mcore FOLDER [CASE …]

The loop is ms-swift's train step in small: its ``get_batch`` rolls labels and makes packing parameters, its loss is the
mean over labels that are not -100. Each case leaves FOLDER/CASE.json and its trace.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.frameworks import mcore_on_cpu

mcore_on_cpu.install()

import torch
from mcore_bridge import split_cp_inputs
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from regate_megatron import ReGateConfig, attach, step_done, wrap_forward_backward
from regate_megatron.api import session_of
from tests.frameworks import exactness, tiny_hf
from tests.frameworks.forked import run

TEXT, STEPS = 20, 4
GRID, VISUAL = (1, 4, 6), 6
FILLS = {"input_ids": 0, "labels": -100}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training of four steps.

    Attributes:
        family: the tiny folder's.
        regate: settings; None for plain mcore-bridge.
        packs: whether rows are packed (``padding_free``).
        cp: context ranks; each sample of a packed row is filled up to what they cut.
    """

    family: str = "qwen2_5_vl"
    regate: dict[str, Any] | None = None
    packs: bool = False
    tp: int = 1
    cp: int = 1


EACH = {"teacher_load": "student", "budget": "per-sample"}
CASES = {
    "plain": Case(),
    "all kept": Case(regate={"keep_ratio": 1.0, "teacher_load": "student"}),
    "regate": Case(regate=EACH),
    "visual": Case(regate=EACH | {"visual_keep_ratio": 0.5, "visual_score": "random"}),
    "packed plain": Case(packs=True),
    "packed all kept": Case(regate={"keep_ratio": 1.0, "teacher_load": "student"}, packs=True),
    "packed": Case(regate=EACH, packs=True),
    "packed visual": Case(regate=EACH | {"visual_keep_ratio": 0.5, "visual_score": "random"}, packs=True),
    "tp2": Case(regate=EACH, tp=2),
    "cp2 plain": Case(cp=2),
    "cp2 all kept": Case(regate={"keep_ratio": 1.0, "teacher_load": "student"}, cp=2),
    "cp2": Case(regate=EACH, cp=2),
    "packed cp2": Case(regate=EACH, packs=True, cp=2),
    "packed visual cp2": Case(regate=EACH | {"visual_keep_ratio": 0.5, "visual_score": "random"}, packs=True, cp=2),
}
CASES = {
    f"{short} {name}": dataclasses.replace(case, family=family)
    for family, short in (("qwen2_5_vl", "qwen25"), ("qwen3_vl", "qwen3"))
    for name, case in CASES.items()
}
EXACT = {"qwen25 exact": Case(), "qwen3 exact": Case(family="qwen3_vl")}
EXACT |= {f"{name} cp2": dataclasses.replace(case, cp=2) for name, case in EXACT.items()}


class Rows:
    """Rows of a picture and a caption, or of a caption alone, as ms-swift's template encodes them."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def row(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(20, 200, (TEXT,), generator=generator)
        labels, row = tokens.clone(), {}
        labels[:3] = -100
        if index % 2 == 0:
            tokens[1], tokens[2 : 2 + VISUAL] = self.config.vision_start_token_id, self.config.image_token_id
            labels[: 4 + VISUAL] = -100
            row["pixel_values"] = torch.randn(24, 3 * 2 * tiny_hf.PATCH**2, generator=generator)
        else:
            tokens, labels = tokens[:15], labels[:15]
        text = torch.arange(len(tokens))
        place = text.clone()
        place[2 : 2 + VISUAL] = 2  # of an image all stand at one time
        return row | {"input_ids": tokens, "labels": labels, "position_ids": torch.stack([text, place, text, text])}

    def batch(self, indices: list[int], packs: bool, multiple: int = 1) -> dict[str, Any]:
        """What ms-swift's collator makes."""
        rows = [_filled(self.row(index), multiple) for index in indices]
        lengths, pixels = [len(row["input_ids"]) for row in rows], [r["pixel_values"] for r in rows if len(r) > 3]
        most = 0 if packs else max(lengths)
        values = {
            name: [
                torch.nn.functional.pad(row[name], (0, max(0, most - length)), value=fill)
                for row, length in zip(rows, lengths, strict=True)
            ]
            for name, fill in (FILLS | {"position_ids": 0}).items()
        }
        join = partial(torch.cat, dim=-1) if packs else partial(torch.stack, dim=-2)
        joined = {name: join(one) for name, one in values.items()}
        positions = joined["position_ids"][:, None] if packs else joined["position_ids"]
        batch = {"input_ids": joined["input_ids"], "labels": joined["labels"]}
        batch = {name: value.view(-1, value.shape[-1]) for name, value in batch.items()}
        batch |= {"text_position_ids": positions[0], "position_ids": positions[1:], "seq_lens": lengths}
        if not packs:
            real_BS = torch.arange(most) < torch.tensor(lengths)[:, None]
            causal_SS = torch.ones(most, most, dtype=torch.bool).tril()
            batch |= {"attention_mask_2d": real_BS.long(), "attention_mask": ~(causal_SS & real_BS[:, None])[:, None]}
        if pixels:
            batch |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([GRID] * len(pixels))}
        return batch


def _filled(row: dict[str, torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    """A row as the template fills it up for context parallelism, before it gives it positions."""
    missing = -len(row["input_ids"]) % multiple
    after = row["position_ids"].amax() + 1 + torch.arange(missing)
    filled = {name: torch.nn.functional.pad(row[name], (0, missing), value=v) for name, v in FILLS.items()}
    return row | filled | {"position_ids": torch.cat([row["position_ids"], after.expand(4, -1)], dim=1)}


def forward_step(iterator: Any, model: Any, *, packs: bool) -> Any:
    """ms-swift's, in small."""
    data = dict(next(iterator))
    data["labels"] = labels = torch.roll(data["labels"], -1, dims=-1)
    data.pop("seq_lens"), data.pop("attention_mask_2d", None)
    text = data.pop("text_position_ids")
    data.setdefault("attention_mask", None)
    if packs:
        starts = torch.where(text[0] == 0)[0]
        ends = torch.cat([starts, torch.tensor([text.shape[1]])]).int()
        most = int(ends.diff().max())
        data["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=most, max_seqlen_kv=most
        )
    if parallel_state.get_context_parallel_world_size() > 1:
        labels = _cut(data)["labels"]
    losses = model(**data)

    def loss_function(losses_BS):
        mask_BS = labels != -100
        total, count = (losses_BS.float() * mask_BS).sum(), mask_BS.sum()
        return total, count.int(), {"loss": torch.stack([total.detach(), count.float()])}

    return losses, loss_function


def _cut(data: dict[str, Any]) -> dict[str, Any]:
    """As ms-swift cuts for context ranks (``get_batch_on_this_cp_rank``), in place; the mask as it does on NPUs."""
    packing = data.get("packed_seq_params")
    ends = None if packing is None else packing.cu_seqlens_q
    for name, axis in (("labels", -1), ("position_ids", -1), ("attention_mask", -2)):
        if data[name] is not None:
            data[name] = split_cp_inputs(data[name], ends, axis)
    return data


def build(case: Case, folder: Path) -> list[Any]:
    sizes = {"tensor_model_parallel_size": case.tp, "context_parallel_size": case.cp}
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    layout = sizes | {"sequence_parallel": case.tp > 1, "calculate_per_token_loss": True}
    chunks = mcore_on_cpu.model(folder / case.family, **layout)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    return [DistributedDataParallel(chunks[0].config, ddp, chunks[0])]


def train(name: str, case: Case, folder: Path) -> None:
    """One rank of a case."""
    torch.distributed.init_process_group("gloo")
    model = build(case, folder)
    config = model[0].module.config
    if case.regate is not None:
        chosen = case.regate | {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 1}
        attach(model, ReGateConfig(**chosen, trace=str(folder / name / "trace")))
    schedule, rows, losses = wrap_forward_backward(get_forward_backward_func()), Rows(config.hf_config), []
    for step in range(STEPS):
        model[0].zero_grad_buffer()
        first = 4 * (step % 2)
        multiple = 2 * case.cp if case.cp > 1 else 1
        batches = [rows.batch([one, one + 1], case.packs, multiple) for one in (first, first + 2)]
        found = schedule(
            forward_step_func=partial(forward_step, packs=case.packs),
            data_iterator=iter(batches),
            model=model,
            num_microbatches=2,
            seq_length=TEXT,
            micro_batch_size=1 if case.packs else 2,
            forward_only=False,
        )
        summed_2 = torch.stack([one["loss"] for one in found]).sum(dim=0)
        if case.cp > 1:
            for value in (summed_2, *(parameter.main_grad for parameter in model[0].parameters())):
                torch.distributed.all_reduce(value, group=parallel_state.get_context_parallel_group())
        total, count = summed_2.tolist()
        losses.append(total / count)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter -= 0.5 * parameter.main_grad / count
        step_done(model)
    found = {"losses": losses}
    if case.regate is not None:
        found["totals"] = dataclasses.asdict(session_of(model).totals)
    if int(os.environ["RANK"]) == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))


def exact(name: str, case: Case, folder: Path) -> None:
    """A sparse step against its oracle."""
    torch.distributed.init_process_group("gloo")
    model = build(case, folder)
    batch, schedule = Rows(model[0].module.config.hf_config).batch([0, 1], packs=False), get_forward_backward_func()

    def step(schedule: Any, batch: dict[str, Any]) -> torch.Tensor:
        (result,) = schedule(
            forward_step_func=partial(forward_step, packs=False),
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=TEXT,
            micro_batch_size=2,
            forward_only=False,
        )
        return result["loss"][0] / result["loss"][1]

    found = {layers: exactness.compare(model, step, schedule, batch, layers) for layers in (0, 1, 3)}
    (folder / f"{name}.json").write_text(json.dumps(found))


def main(folder: str, *names: str) -> int:
    """Run the cases; the number of those that failed."""
    here, failed = Path(folder), 0
    for family in ("qwen2_5_vl", "qwen3_vl"):
        tiny_hf.write(here / family, family)
    for name in names or CASES | EXACT:
        case, work = (EXACT[name], exact) if name in EXACT else (CASES[name], train)
        failed += not run(name, case.tp * case.cp, here / f"{name}.log", partial(work, name, case, here))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
