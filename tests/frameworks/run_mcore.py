"""Worker of the tests of mcore-bridge: ``attach`` on its models, over batches as ms-swift makes them.

    python -m tests.frameworks.run_mcore FOLDER [FAMILY …]

The loop is ms-swift's train step in small: its ``get_batch`` rolls labels and makes packing parameters, its loss is the
mean over labels that are not -100. One fork of ranks runs all cases of a family in a layout; each case leaves
FOLDER/CASE.json and its trace.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.frameworks import mcore_on_cpu

mcore_on_cpu.install()

import torch
import torch.distributed as dist
from mcore_bridge import split_cp_inputs
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import ReGateConfig, attach, detach, load_state, save_state, step_done, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.errors import ReGateError
from tests.frameworks import exactness, tiny_mcore
from tests.frameworks.forked import run
from tests.frameworks.mcore_models import Layout, bare, build

TEXT, STEPS, GONE_ON_AT = 20, 4, 2
FILLS = {"input_ids": 0, "labels": -100}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training of four steps.

    Attributes:
        regate: settings; None for plain mcore-bridge.
        packs: whether rows are packed (``padding_free``).
        fill: positions behind the samples of a packed row, in segments that context ranks cut.
        goes_on: the case whose first two steps it continues; None: it starts anew.
        is_still: whether weights stay as they are.
        adapts: whether adapters (LoRA) learn, and nothing else of the model.
        is_taught: whether the model as it is without adapters is given as teacher.
    """

    regate: dict[str, Any] | None = None
    packs: bool = False
    fill: int = 0
    goes_on: str | None = None
    is_still: bool = False
    adapts: bool = False
    is_taught: bool = False


EACH = {"teacher_load": "student", "budget": "per-sample"}
VISUAL = EACH | {"score": "regate", "visual_keep_ratio": 0.5, "visual_score": "random"}  # learns: it is gone on with
ALL_KEPT = {"keep_ratio": 1.0, "teacher_load": "student"}
ONE_RANK = {
    "plain": Case(),
    "all kept": Case(regate=ALL_KEPT),
    "regate": Case(regate=EACH),
    "visual": Case(regate=VISUAL),
    "packed plain": Case(packs=True),
    "packed all kept": Case(regate=ALL_KEPT, packs=True),
    "packed": Case(regate=EACH, packs=True),
    "packed visual": Case(regate=VISUAL, packs=True),
    "resumed": Case(regate=VISUAL, goes_on="visual"),
    "still": Case(regate=VISUAL, is_still=True),
}
WITH_ADAPTERS = {
    "lora plain": Case(adapts=True),
    "lora all kept": Case(regate=ALL_KEPT, adapts=True),
    "lora": Case(regate=EACH, adapts=True),
    "lora packed": Case(regate=EACH, adapts=True, packs=True),
    "lora visual": Case(regate=VISUAL, adapts=True),
    "lora taught": Case(regate=VISUAL, adapts=True, is_taught=True),
    "lora resumed": Case(regate=VISUAL, adapts=True, goes_on="lora visual"),
}
LAYOUTS = {"tp2": Layout(tp=2), "pp2": Layout(pp=2), "dp2": Layout(dp=2)}
OF_EXPERTS = {"ep2": Layout(dp=2, ep=2)}
ON_CONTEXT_RANKS = {
    "cp2 plain": Case(),
    "cp2 all kept": Case(regate=ALL_KEPT),
    "cp2": Case(regate=EACH),
    "packed cp2": Case(regate=EACH, packs=True),
    "packed visual cp2": Case(regate=VISUAL, packs=True),
    "filled plain cp2": Case(packs=True, fill=8),
    "filled all kept cp2": Case(regate=ALL_KEPT, packs=True, fill=8),
    "filled cp2": Case(regate=VISUAL, packs=True, fill=8),
    "lora cp2": Case(regate=VISUAL, adapts=True),
}


class Rows:
    """Rows of a picture and a caption, or of a caption alone, as ms-swift's template encodes them."""

    def __init__(self, family: tiny_mcore.Family, config: Any) -> None:
        self.family, self.placeholder = family, family.token(config)

    def row(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(20, 200, (TEXT,), generator=generator)
        labels, row, visual = tokens.clone(), {}, slice(2, 2 + self.family.visual)
        labels[:3] = -100
        if index % 2 == 0:
            tokens[1], tokens[visual] = 6, self.placeholder
            labels[: visual.stop + 2] = -100
            row = self.family.picture(generator)
        else:
            tokens, labels = tokens[:15], labels[:15]
        text = torch.arange(len(tokens))
        place = text.clone()
        place[visual] = 2  # of an image all stand at one time
        position = torch.stack([text, place, text, text]) if self.family.has_axes else text
        return {"input_ids": tokens, "labels": labels, "position_ids": position, "media": row}

    def batch(self, indices: list[int], packs: bool, multiple: int = 1, fill: int = 0) -> dict[str, Any]:
        """What ms-swift's collator makes."""
        counted = [self.row(index) for index in indices]  # and then filled up
        rows = [_filled(row, multiple) for row in counted]
        rows += [_fill_like(counted[0], multiple)] * (fill // multiple)
        lengths, media = [len(row["input_ids"]) for row in rows], [row["media"] for row in rows if row["media"]]
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
        batch = {name: joined[name].view(-1, joined[name].shape[-1]) for name in ("input_ids", "labels")}
        batch["seq_lens"] = [len(row["input_ids"]) for row in counted]
        if self.family.has_axes:
            positions = joined["position_ids"][:, None] if packs else joined["position_ids"]
            batch |= {"text_position_ids": positions[0], "position_ids": positions[1:]}
        else:
            batch["position_ids"] = joined["position_ids"].view_as(batch["labels"])
        if not packs:
            real_BS = torch.arange(most) < torch.tensor(lengths)[:, None]
            causal_SS = torch.ones(most, most, dtype=torch.bool).tril()
            batch |= {"attention_mask_2d": real_BS.long(), "attention_mask": ~(causal_SS & real_BS[:, None])[:, None]}
        return batch | {name: torch.cat([one[name] for one in media]) for name in (media[0] if media else ())}


def _fill_like(row: dict[str, torch.Tensor], length: int) -> dict[str, Any]:
    """A piece of what ms-swift fills a packed row up with for context ranks (``extended_position_ids``)."""
    values = {name: torch.full((length,), value) for name, value in FILLS.items()}
    return values | {"position_ids": torch.arange(length).expand(*row["position_ids"].shape[:-1], -1), "media": None}


def _filled(row: dict[str, torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    """A row as the template fills it up for context parallelism, before it gives it positions."""
    missing = -len(row["input_ids"]) % multiple
    if not missing:
        return row
    after = row["position_ids"].amax() + 1 + torch.arange(missing)
    filled = {name: torch.nn.functional.pad(row[name], (0, missing), value=v) for name, v in FILLS.items()}
    after = after.expand(*row["position_ids"].shape[:-1], -1)
    return row | filled | {"position_ids": torch.cat([row["position_ids"], after], dim=-1)}


def forward_step(iterator: Any, model: Any, *, packs: bool) -> Any:
    """ms-swift's, in small."""
    data = dict(next(iterator))
    labels = torch.roll(data["labels"], -1, dims=-1)
    data["labels"] = labels if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
    data.pop("seq_lens"), data.pop("attention_mask_2d", None)
    text = data.pop("text_position_ids", None)
    text = data["position_ids"] if text is None else text
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


class Training:
    """Trainings of a family in a layout; one rank.

    Args:
        name: the family's.
        folder: where its configuration lies, and where results go.
    """

    def __init__(self, name: str, family: tiny_mcore.Family, layout: Layout, folder: Path) -> None:
        dist.init_process_group("gloo")
        layout.initialize()
        self.name, self.family, self.layout, self.folder = name, family, layout, folder

    def cases(self, cases: dict[str, Case]) -> None:
        """Run them all."""
        for case, what in cases.items():
            found = self.train(f"{self.name} {case}", what)
            if dist.get_rank() == 0:
                (self.folder / f"{self.name} {case}.json").write_text(json.dumps(found))

    def train(self, name: str, case: Case) -> dict[str, Any]:
        """Four steps, or the last two of them."""
        where, weights = (self.folder / self.name, self.layout, self.family.kind), self.folder / f"{self.name}.pt"
        whole = torch.load(weights) if self.layout.pp > 1 or self.layout.ep > 1 else None
        model = build(*where, adapts=case.adapts, whole=whole)
        config = model[0].module.config
        config.finalize_model_grads_func = finalize_model_grads
        if self.layout == Layout() and not case.adapts:
            torch.save(model[0].module.state_dict(), weights)
        if case.regate is not None:
            chosen = case.regate | {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 1}
            teacher = bare(*where).language_model.eval() if case.is_taught else None
            attach(model, ReGateConfig(**chosen, trace=str(self.folder / name / "trace")), teacher=teacher)
        if case.goes_on:
            before = self.folder / f"{self.name} {case.goes_on}"
            model[0].load_state_dict(torch.load(before / "weights.pt"))
            load_state(model, before / "state")
        schedule, rows = wrap_forward_backward(get_forward_backward_func()), Rows(self.family, config.hf_config)
        losses = []
        for step in range(GONE_ON_AT if case.goes_on else 0, STEPS):
            model[0].zero_grad_buffer()
            losses.append(self.step(schedule, model, rows, step, packs=case.packs, fill=case.fill))
            with torch.no_grad():
                for parameter in () if case.is_still else filter(_learns, model[0].parameters()):
                    parameter -= 0.5 * parameter.main_grad
            step_done(model)
            if step + 1 == GONE_ON_AT and name.endswith(" visual") and not case.packs:
                torch.save(model[0].state_dict(), self.folder / name / "weights.pt")
                save_state(model, self.folder / name / "state")
        found: dict[str, Any] = {"losses": losses}
        if case.regate is not None:
            session = session_of(model)
            found["totals"] = dataclasses.asdict(session.totals) if session else None
            detach(model)
        return found

    def step(self, schedule: Any, model: list[Any], rows: Rows, step: int, *, packs: bool, fill: int) -> float:
        """Two microbatches of the step, this replica's rows of them; the loss of all."""
        first, each = 4 * (step % 2), 2 // self.layout.dp
        own = 2 * parallel_state.get_data_parallel_rank() // self.layout.dp
        many = self.layout.multiple
        batches = [rows.batch([first + at + own + one for one in range(each)], packs, many, fill) for at in (0, 2)]
        return self.run(schedule, model, batches, packs=packs)

    def run(self, schedule: Any, model: list[Any], batches: list[dict[str, Any]], *, packs: bool = False) -> float:
        """Run microbatches; the mean loss over all ranks."""
        found = schedule(
            forward_step_func=partial(forward_step, packs=packs),
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=batches[0]["input_ids"].shape[1],
            micro_batch_size=len(batches[0]["input_ids"]),
            forward_only=False,
        )
        sums = sum((one["loss"] for one in found), torch.zeros(2))
        dist.all_reduce(sums)  # stages before the last have none, tensor ranks have the same
        return float(sums[0] / sums[1])

    def exact(self, name: str = "exact", *, adapts: bool = False) -> None:
        """A sparse step against its oracle."""
        model = build(self.folder / self.name, self.layout, self.family.kind, adapts=adapts)
        with torch.no_grad():  # adapters as they begin add nothing
            for parameter in filter(_learns, model[0].parameters()) if adapts else ():
                parameter.normal_(std=0.1)
        batch = Rows(self.family, model[0].module.config.hf_config).batch([0, 1], False, self.layout.multiple)
        schedule = get_forward_backward_func()

        def step(schedule: Any, batch: dict[str, Any]) -> torch.Tensor:
            return torch.tensor(self.run(schedule, model, [batch]))

        found = {layers: exactness.compare(model, step, schedule, batch, layers) for layers in (0, 1, 3)}
        (self.folder / f"{self.name} {name}.json").write_text(json.dumps(found))

    def two_pictures(self) -> None:
        """What plain mcore-bridge says to padded rows with a picture each."""
        model, schedule = build(self.folder / self.name, self.layout, self.family.kind), get_forward_backward_func()
        batch = Rows(self.family, model[0].module.config.hf_config).batch([0, 2], False, self.layout.multiple)
        try:
            self.run(schedule, model, [batch])
            said = ""
        except RuntimeError as fault:
            said = str(fault)
        (self.folder / f"{self.name} two pictures.json").write_text(json.dumps(said))

    def refused(self) -> None:
        """What a training says that is refused."""
        try:
            self.train(f"{self.name} refused", Case(regate=EACH))
        except ReGateError as refusal:
            (self.folder / f"{self.name} refused.json").write_text(json.dumps(str(refusal)))


def _learns(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


def on_one_rank(name: str, family: tiny_mcore.Family, folder: Path) -> None:
    training = Training(name, family, Layout(), folder)
    training.cases(ONE_RANK)
    training.exact()
    training.cases(WITH_ADAPTERS)
    training.exact("lora exact", adapts=True)


def on_ranks(name: str, family: tiny_mcore.Family, layout: str, folder: Path) -> None:
    cases = {layout: Case(regate=VISUAL, is_still=not family.trains_alike), f"{layout} plain": Case()}
    cases |= {f"lora {layout}": Case(regate=VISUAL, adapts=True), f"lora {layout} plain": Case(adapts=True)}
    Training(name, family, (LAYOUTS | OF_EXPERTS)[layout], folder).cases(cases)


def on_context_ranks(name: str, family: tiny_mcore.Family, folder: Path) -> None:
    training = Training(name, family, Layout(cp=2), folder)
    some = ("cp2 plain", "cp2 all kept", "packed visual cp2")  # of families whose rows are made like another's
    training.cases(ON_CONTEXT_RANKS if family.is_first else {case: ON_CONTEXT_RANKS[case] for case in some})
    training.exact("exact cp2")
    training.two_pictures()


def too_long(folder: Path) -> None:
    Training("too long", tiny_mcore.TOO_LONG, Layout(), folder).refused()


def main(folder: str, *names: str) -> int:
    """Run the families; the number of forks that failed."""
    here, failed = Path(folder), 0
    for name in names or tiny_mcore.FAMILIES:
        family = tiny_mcore.FAMILIES[name]
        family.write(here / name)
        failed += not run(name, 1, here / f"{name}.log", partial(on_one_rank, name, family, here))
        for layout in LAYOUTS | (OF_EXPERTS if family.has_experts else {}):
            work = partial(on_ranks, name, family, layout, here)
            failed += not run(f"{name} {layout}", 2, here / f"{name} {layout}.log", work)
        failed += not run(f"{name} cp2", 2, here / f"{name} cp2.log", partial(on_context_ranks, name, family, here))
    tiny_mcore.TOO_LONG.write(here / "too long")
    return failed + (not run("too long", 1, here / "too long.log", partial(too_long, here)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
