"""Worker of the tests of Megatron-Bridge: imports it once, then trains every case in forked ranks of their own.

    python -m tests.frameworks.run_bridge FOLDER [CASE …]

Each case leaves FOLDER/CASE.json (what its last rank saw), FOLDER/CASE.log.RANK, its trace and its checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.frameworks import bridge_on_cpu

bridge_on_cpu.install()

import torch
import torch.distributed as dist
from megatron.bridge.models.glm_vl.modeling_glm_45v import GLM45VModel
from megatron.bridge.models.qwen_vl import qwen3_vl_step
from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel
from megatron.bridge.peft import utils as peft_utils
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import checkpointing, gpt_step, vlm_step
from megatron.bridge.training import train as loop
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    LoggerConfig,
    OptimizerConfig,
    RerunStateMachineConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.pretrain import pretrain
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import ReGateConfig, attach, compat, step_done, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.batches import adapter_for
from regate_megatron.errors import ReGateError
from regate_megatron.integrations import megatron_bridge
from tests.frameworks import bridge_energon, bridge_models, exactness
from tests.frameworks.forked import run

STEPS, SAVE_AT = 6, 3
IN_PROCESS = {"num_workers": 0, "pin_memory": False, "persistent_workers": False}


@dataclass(frozen=True)
class Case:
    """One training of six steps, from the weights that the case ``begin`` has left.

    Attributes:
        regate: settings; None for plain Bridge.
        tp, pp, dp, cp, ep, vp: the layout.
        batch: rows of the global batch.
        per_token: whether the loss is the mean over the tokens of the global batch, as context parallelism asks.
        rows: the class of rows; None: the model's usual one.
        offline: rows are packed before they are loaded, each sample to a multiple of this many positions.
        packs: whether the step is to pack the rows (``enable_in_batch_packing`` without a collator that does).
        step: the forward step; None: the model's usual one.
        lora: whether adapters alone learn.
        energon: whether rows come by way of Megatron-energon; "packed": it packs them.
        ahead: tokens that are predicted beyond the next (MTP).
        resume: a case whose checkpoint of the third step is continued.
    """

    model: str = "gpt"
    regate: dict[str, Any] | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1
    begin: str | None = "start"
    resume: str | None = None
    dataloader: str = "single"
    rows: str | None = None
    packs: bool = False
    step: str | None = None
    ep: int = 1
    cp: int = 1
    per_token: bool = False
    batch: int = 4
    offline: int | None = None
    vp: int | None = None
    lora: bool = False
    ahead: int = 0
    energon: str | None = None


PREFIX = {"gpt": ""} | {name: f"{name} " for name in ("qwen", "qwen3", "qwen3_moe", "glm", "ministral")}
PREFIX |= {"ministral_short": "ministral_short "}
ROWS = {"gpt": "Rows", "glm": "GlmRows", "ministral": "MinistralRows", "ministral_short": "MinistralRows"}
STUDENT, CHECKPOINT = {"teacher_load": "student"}, {"teacher_load": "start"}
ALL_KEPT = {"keep_ratio": 1.0, "teacher_load": "student"}
BOTH = {
    "start": Case(begin=None),
    "plain": Case(),
    "all kept": Case(regate=ALL_KEPT),
    "regate": Case(regate=STUDENT),
    "checkpoint teacher": Case(regate=CHECKPOINT),
    "resumed": Case(regate=STUDENT, resume="regate"),
    "tp2": Case(regate=STUDENT, tp=2),
    "dp2": Case(regate=STUDENT, dp=2),
    "tp2 pp2": Case(regate=STUDENT, tp=2, pp=2),
}
# Qwen2.5-VL at PP2 alone: plain Bridge sends a tensor there that gloo does not take.
CASES = BOTH | {
    "pp2": Case(regate=STUDENT, pp=2),
    "pp2 vp2": Case(regate=STUDENT, pp=2, vp=2),
    "cp2": Case(regate=STUDENT, cp=2),
    "cp2 plain": Case(cp=2),
    "finetuning batches": Case(regate=STUDENT, dataloader="batch"),
    "resumed tp2": Case(regate=STUDENT, resume="regate", tp=2),
    "resumed dp2": Case(regate=STUDENT, resume="regate", dp=2),
    "plain after regate": Case(resume="regate"),
}
CASES |= {f"qwen {name}": dataclasses.replace(case, model="qwen") for name, case in BOTH.items()}
EACH = STUDENT | {"budget": "per-sample"}  # others give a row what its microbatch has room for, and packing is room
VISUAL = {"visual_keep_ratio": 0.5, "visual_score": "random"}
DEALT = STUDENT | {"budget": "dealt", "visual_keep_ratio": 0.5, "visual_score": "detail"}
PACKED = {
    "packed plain": Case(rows="PackedPictureRows"),
    "packed all kept": Case(rows="PackedPictureRows", regate=ALL_KEPT),
    "packed": Case(rows="PackedPictureRows", regate=EACH),
    "packed filled": Case(rows="FilledPictureRows", regate=EACH),
    "packed tp2": Case(rows="FilledPictureRows", regate=EACH, tp=2),
    "packed dp2": Case(rows="PackedPictureRows", regate=EACH, dp=2),
    "packed tp2 pp2": Case(rows="FilledPictureRows", regate=EACH, tp=2, pp=2),
    "packed visual": Case(rows="PackedPictureRows", regate=EACH | VISUAL),
    "each": Case(regate=EACH),
    "visual": Case(regate=EACH | VISUAL),
    "dealt": Case(rows="UnevenPictureRows", regate=DEALT, batch=8),
    "dealt dp2": Case(rows="UnevenPictureRows", regate=DEALT, batch=8, dp=2),
}
CASES |= {f"qwen {name}": dataclasses.replace(case, model="qwen") for name, case in PACKED.items()}
CASES |= {
    "each": Case(regate=EACH),
    "packed plain": Case(rows="PackedRows"),
    "packed all kept": Case(rows="PackedRows", regate=ALL_KEPT),
    "packed": Case(rows="PackedRows", regate=EACH),
}
CASES |= {
    "lora plain": Case(lora=True),
    "lora all kept": Case(lora=True, regate=ALL_KEPT),
    "lora": Case(lora=True, regate=STUDENT),
    "lora checkpoint teacher": Case(lora=True, regate=CHECKPOINT),
    "lora reference": Case(lora=True, regate=STUDENT | {"score": "reference"}),
    "lora tp2": Case(lora=True, regate=STUDENT | {"score": "reference"}, tp=2),
    "lora pp2": Case(lora=True, regate=STUDENT | {"score": "reference"}, pp=2),
    "lora resumed": Case(lora=True, regate=STUDENT, resume="lora"),
}
CASES |= {
    "ahead start": Case(ahead=1, begin=None),
    "ahead plain": Case(ahead=1, begin="ahead start"),
    "ahead all kept": Case(ahead=1, begin="ahead start", regate=ALL_KEPT),
    "ahead": Case(ahead=1, begin="ahead start", regate=STUDENT),
    "ahead tp2 pp2": Case(ahead=1, begin="ahead start", regate=STUDENT, tp=2, pp=2),
}
REFERENCE = EACH | {"score": "reference"}  # whatever the order of samples, a sample keeps the same positions
CASES |= {
    "reference": Case(regate=REFERENCE, batch=32),  # all samples in two steps
    "offline plain": Case(offline=1, batch=2),
    "offline all kept": Case(offline=1, batch=2, regate=ALL_KEPT),
    "offline": Case(offline=1, batch=2, regate=REFERENCE),
    "offline padded": Case(offline=5, batch=2, regate=REFERENCE),
    "offline padded dp2": Case(offline=5, batch=2, regate=REFERENCE, dp=2),
}
CASES |= {f"qwen3 {name}": dataclasses.replace(case, model="qwen3") for name, case in BOTH.items()}
DEEP = {"dense_layers": 3}
QWEN3 = {
    "plain tp2": Case(tp=2),
    "deep": Case(regate=STUDENT | DEEP),
    "nothing dense": Case(regate=STUDENT | {"dense_layers": 0}),
    "packs": Case(regate=STUDENT, packs=True),
    "packs plain": Case(packs=True),
    "packs all kept": Case(regate=ALL_KEPT, packs=True),
    "packs tp2": Case(regate=STUDENT, packs=True, tp=2),
    "each": Case(regate=EACH),
    "packed": Case(regate=EACH, rows="PackedPictureRows", step="vlm_step"),
    "visual": Case(regate=EACH | VISUAL),
    "packs visual": Case(regate=EACH | VISUAL, packs=True),
}
QWEN3 |= {
    "tokens": Case(regate=STUDENT, per_token=True),
    "tokens each": Case(regate=EACH, per_token=True),
    "tokens visual": Case(regate=EACH | VISUAL, per_token=True),
    "cp2 plain": Case(cp=2),
    "cp2 all kept": Case(regate=ALL_KEPT, cp=2),
    "cp2": Case(regate=STUDENT, cp=2),
    "cp2 pp2": Case(regate=STUDENT, cp=2, pp=2),
    "cp2 packs": Case(regate=STUDENT, cp=2, packs=True),
    "cp2 packed": Case(regate=EACH, cp=2, rows="FilledPictureRows", step="vlm_step"),
    "cp2 visual": Case(regate=EACH | VISUAL, cp=2),
    "cp2 packs visual": Case(regate=EACH | VISUAL, cp=2, packs=True),
}
CASES |= {f"qwen3 {name}": dataclasses.replace(case, model="qwen3") for name, case in QWEN3.items()}
QWEN3_MOE = {name: BOTH[name] for name in ("start", "plain", "all kept", "regate", "dp2", "resumed")}
ADAPTERS = {
    "lora": Case(lora=True, regate=STUDENT),
    "lora checkpoint teacher": Case(lora=True, regate=CHECKPOINT),
}
QWEN3_MOE |= ADAPTERS | {
    "pp2": Case(regate=STUDENT, pp=2),
    "tokens": Case(regate=STUDENT, per_token=True),
    "cp2 plain": Case(cp=2),
    "cp2": Case(regate=STUDENT, cp=2),
    "dp2 ep2": Case(regate=STUDENT, dp=2, ep=2),
    "tp2": Case(regate=STUDENT, tp=2),
    "packs": Case(regate=STUDENT, packs=True),
    "visual": Case(regate=EACH | VISUAL),
}
CASES |= {f"qwen3_moe {name}": dataclasses.replace(case, model="qwen3_moe") for name, case in QWEN3_MOE.items()}
CASES |= {"qwen tp2 pp2 vp2": Case(model="qwen", regate=STUDENT, tp=2, pp=2, vp=2)}
ENERGON = {
    "energon": Case(energon="rows", regate=REFERENCE),
    "energon visual": Case(energon="rows", regate=REFERENCE | VISUAL),
    "energon packed plain": Case(energon="packed"),
    "energon packed all kept": Case(energon="packed", regate=ALL_KEPT),
    "energon packed": Case(energon="packed", regate=REFERENCE),
    "energon packed visual": Case(energon="packed", regate=REFERENCE | VISUAL),
}
CASES |= {f"qwen {name}": dataclasses.replace(case, model="qwen") for name, case in ENERGON.items()}
OF_QWEN_ALONE = ("packed filled", "packed tp2 pp2", "dealt", "dealt dp2")
SHORT = {name: case for name, case in PACKED.items() if name not in OF_QWEN_ALONE}
MORE = {("glm", name): case for name, case in (BOTH | SHORT | ADAPTERS).items()}
MORE |= {("glm", "dp2 ep2"): Case(regate=STUDENT, dp=2, ep=2)}
MORE |= {("ministral", name): case for name, case in (BOTH | ADAPTERS).items()}
MORE |= {("ministral", "cp2 plain"): Case(cp=2)}
MORE |= {("ministral_short", name): case for name, case in ({"start": BOTH["start"]} | SHORT).items()}
CASES |= {
    f"{model} {name}": dataclasses.replace(
        case, model=model, rows=case.rows and case.rows.replace("Picture", model.split("_")[0].capitalize())
    )
    for (model, name), case in MORE.items()
}


class Record(Callback):
    """What happened, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[list] = []
        self.lengths: list[tuple] = []
        self.seen: dict[str, Any] = {"evaluations": 0}

    def on_train_start(self, context):
        last = compat.language_model_of(compat.unwrap(context.model[-1])).decoder.layers[-1]
        last.register_forward_pre_hook(
            lambda layer, args, kwargs: self.lengths.append(
                (layer.training, torch.is_grad_enabled(), kwargs["hidden_states"].shape[0])
            ),
            with_kwargs=True,
        )

    def on_train_step_end(self, context):
        if context.loss_dict:  # the last stage's ranks
            self.losses.append(float(context.loss_dict["lm loss"]))
        session = session_of(context.model)
        if session is not None:
            self.steps.append([session.phase, session.totals.steps, session.totals.sparse_steps])
            self.seen["totals"] = dataclasses.asdict(session.totals)

    def on_eval_end(self, context):
        self.seen["evaluations"] += 1

    def on_train_end(self, context):
        self.seen["attached at the end"] = session_of(context.model) is not None


class RecordAndRead(Record):
    """Also how a batch is read."""

    def on_data_init_start(self, context):
        model = compat.unwrap(context.model[0])
        if dist.get_world_size() == 1:
            if isinstance(model, Qwen25VLModel):
                self.seen["reading"] = reading(model, bridge_models.PictureRows(2), 0)
            if isinstance(model, GLM45VModel):
                of_video = reading(model, bridge_models.GlmRows(4), 2)
                self.seen |= {"reading": reading(model, bridge_models.GlmRows(4), 0), "reading of a video": of_video}


def reading(model: Any, rows: bridge_models.PictureRows, first: int) -> dict[str, Any]:
    """What our adapter sees in two rows, and the positions, [3, B, S], that the model makes for its language model."""
    given: list[Any] = []
    batch = rows.collate_fn([rows[first], rows[first + 1]])
    facts, forward = adapter_for(model, None).read(batch), model.language_model.forward
    model.language_model.forward = lambda **inputs: (given.append(inputs["position_ids"]), forward(**inputs))[1]
    visual = batch.pop("visual_inputs").normalized_for_model()
    with torch.no_grad():
        model(attention_mask=None, **batch, **visual)
    del model.language_model.forward
    counts = {name: getattr(facts, f"is_{name}_BS").sum(dim=1).tolist() for name in ("target", "visual", "context")}
    return counts | {
        "positions": facts.position_id_BS.permute(2, 0, 1).tolist(),
        "positions of the model": given[0].tolist(),
    }


def settings(name: str, case: Case, folder: Path) -> ConfigContainer:
    """Bridge's settings of a case."""
    layout = {"tensor_model_parallel_size": case.tp, "pipeline_model_parallel_size": case.pp}
    layout["sequence_parallel"] = case.tp > 1
    if case.pp > 1 and case.model.startswith("qwen3"):
        layout["num_layers_in_first_pipeline_stage"] = 3  # which take visual features in
    layout |= {"expert_model_parallel_size": case.ep} if case.ep > 1 else {}
    layout |= {"context_parallel_size": case.cp} if case.cp > 1 else {}
    layout |= {"mtp_num_layers": case.ahead} if case.ahead else {}
    layout |= {"virtual_pipeline_model_parallel_size": case.vp} if case.vp else {}
    layout |= {"calculate_per_token_loss": True} if case.per_token else {}
    layout |= {"seq_length": bridge_models.PACK} if case.offline else {}
    micro_batch = 1 if case.offline else 2  # as Bridge asks of rows packed offline
    prefix = PREFIX[case.model]
    checkpoint = {"save": str(folder / name / "checkpoints"), "save_interval": SAVE_AT, "ckpt_format": "torch_dist"}
    if case.resume:
        checkpoint |= {"load": str(folder / (prefix + case.resume) / "checkpoints"), "ckpt_step": SAVE_AT}
    if case.begin and (case.lora or not case.resume):
        checkpoint |= {"pretrained_checkpoint": str(folder / (prefix + case.begin) / "checkpoints")}
    return ConfigContainer(
        model=getattr(bridge_models, case.model)(**layout),
        train=TrainingConfig(micro_batch_size=micro_batch, global_batch_size=case.batch, train_iters=STEPS),
        validation=ValidationConfig(eval_interval=3, eval_iters=1),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3, use_distributed_optimizer=False),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=STEPS,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
        ),
        dataset=dataset(name, case, folder),
        logger=LoggerConfig(log_interval=2, tensorboard_dir=str(folder / name / "tensorboard")),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=bridge_models.VOCAB - 1),
        checkpoint=CheckpointConfig(**checkpoint),
        rerun_state_machine=RerunStateMachineConfig(rerun_mode="disabled"),
        peft=LoRA(dim=4) if case.lora else None,
    )


def dataset(name: str, case: Case, folder: Path) -> Any:
    """Where a case has its rows from."""
    if case.offline:
        return bridge_models.offline_rows(folder / name, case.offline, **IN_PROCESS)
    if case.energon:
        packs = case.energon == "packed"
        bridge_energon.write(folder / name / "numbers")
        return bridge_energon.EnergonData(
            folder=str(folder / name / "numbers"),
            rows=bridge_models.PackedPictureRows if packs else bridge_models.PictureRows,
            packing_buffer_size=bridge_energon.BUFFER if packs else None,
            dataloader_type="external",
            **IN_PROCESS,
        )
    return bridge_models.Data(
        rows=getattr(bridge_models, case.rows or ROWS.get(case.model, "PictureRows")),
        dataloader_type=case.dataloader,
        enable_in_batch_packing=case.packs or case.rows is not None,
        **IN_PROCESS,
    )


def functions() -> list[Any]:
    """Everything callable in the modules where names are patched."""
    return [value for module in (loop, checkpointing) for value in vars(module).values() if callable(value)]


def train(name: str, case: Case, folder: Path) -> None:
    """One rank of a case."""
    record, before = RecordAndRead(), functions()
    callbacks: list[Callback] = [record]
    if case.regate is not None:
        chosen = {"score": "regate", **case.regate, "warmup_steps": 2, "cycle_steps": 100, "dense_steps": 1}
        chosen["trace"] = str(folder / name / "trace")
        if chosen["teacher_load"] != "student":
            chosen["teacher_load"] = str(folder / (PREFIX[case.model] + chosen["teacher_load"]) / "checkpoints")
        callbacks = [megatron_bridge.install(ReGateConfig(**chosen)), record]
    peft_utils.HAVE_TE = False  # no layer is one of its
    steps = {"gpt_step": gpt_step, "vlm_step": vlm_step, "qwen3_vl_step": qwen3_vl_step}
    usual = {"gpt": "gpt_step", "qwen3": "qwen3_vl_step", "qwen3_moe": "qwen3_vl_step"}.get(case.model, "vlm_step")
    pretrain(settings(name, case, folder), steps[case.step or usual].forward_step, callbacks=callbacks)
    record.seen["loop restored"] = functions() == before
    found = {"losses": record.losses, "steps": record.steps, "lengths": record.lengths, **record.seen}
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        (folder / f"{name}.json").write_text(json.dumps(found))


def own_loop(name: str, case: Case, folder: Path) -> None:
    """A loop of one's own over a provider of Bridge's, with ``attach`` as its pre-wrap hook."""
    config = ReGateConfig(**{"score": "regate", "warmup_steps": 1, "cycle_steps": 100, "dense_steps": 0} | case.regate)
    provider = getattr(bridge_models, case.model)()
    provider.finalize()
    provider.register_pre_wrap_hook(lambda chunks: attach(chunks, config))
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
    model = provider.provide_distributed_model(ddp_config=ddp_config, use_cpu_initialization=True)
    schedule, rows = wrap_forward_backward(get_forward_backward_func()), bridge_models.PictureRows(4)
    for _ in range(3):
        model[0].zero_grad_buffer()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter([rows.collate_fn([rows[0], rows[1]]), rows.collate_fn([rows[2], rows[3]])]),
            model=model,
            num_microbatches=2,
            seq_length=bridge_models.TEXT,
            micro_batch_size=2,
            forward_only=False,
        )
        step_done(model)
    (folder / f"{name}.json").write_text(json.dumps({"totals": dataclasses.asdict(session_of(model).totals)}))


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def exact(name: str, case: Case, folder: Path) -> None:
    """A sparse step against its oracle, with fewer and more dense layers than take visual features in."""
    model, batch = _model_and_batch(case, RECOMPUTE if "recomputed" in name else {})

    def run(schedule, batch):
        (result,) = schedule(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=bridge_models.TEXT,
            micro_batch_size=2,
            forward_only=False,
        )
        return result["lm loss"][0] if case.cp == 1 else result["lm loss"][0] / result["lm loss"][1]

    schedule = get_forward_backward_func()
    found = {
        f"{layers}{'' if rule == 'random' else f' {rule}'}": exactness.compare(
            model, run, schedule, batch, layers, rule
        )
        for layers in (0, 1, 3)
        for rule in (("random",) if case.rows is None else ("static", "even"))
    }
    (folder / f"{name}.json").write_text(json.dumps(found))


def _model_and_batch(case: Case, options: dict[str, Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
    layout = {"context_parallel_size": case.cp} if case.cp > 1 else {}
    provider = getattr(bridge_models, case.model)(**layout, **(options or {}))
    provider.finalize()
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
    model = provider.provide_distributed_model(ddp_config=ddp_config, use_cpu_initialization=True)
    rows = getattr(bridge_models, case.rows or ROWS.get(case.model, "PictureRows"))(4)
    return model, rows.collate_fn([rows[2], rows[3]] if case.model == "glm" else [rows[0], rows[1]])


def forward_step(iterator, model):
    """What Bridge's ``vlm_step`` passes to the model."""
    batch = dict(next(iterator))
    losses = model(attention_mask=None, **batch.pop("visual_inputs").normalized_for_model(), **batch)
    losses, mask_BS = losses if isinstance(losses, tuple) else (losses, batch["loss_mask"])

    def loss_function(losses_BS):
        total, count = (losses_BS * mask_BS).sum(), mask_BS.sum().int()
        found = {"lm loss": torch.stack([total.detach(), count.float()])}
        return (total, count, found) if compat.unwrap(model).config.calculate_per_token_loss else (total / count, found)

    return losses, loss_function


def plain_fails(name: str, case: Case, folder: Path) -> None:
    """What the plain model says to a batch, and what ``attach`` says to the model."""
    model, batch = _model_and_batch(case)
    with contextlib.suppress(ReGateError):
        attach(model, ReGateConfig(score="random"))
        raise AssertionError("it was attached")
    try:
        forward_step(iter([batch]), model[0])
        said = "nothing"
    except RuntimeError as fault:
        said = str(fault)
    (folder / f"{name}.json").write_text(json.dumps({"said": said}))


def without_packing(name: str, case: Case, folder: Path) -> None:
    """What energon says to Bridge's own task encoders that are to pack."""
    (folder / f"{name}.json").write_text(json.dumps(bridge_energon.said_of_bridge_s_own()))


OWN_LOOPS = {
    "energon task encoders": (Case(), without_packing),
    "qwen own loop": (Case(regate=STUDENT, model="qwen"), own_loop),
    "qwen3 exact": (Case(model="qwen3"), exact),
    "qwen3_moe exact": (Case(model="qwen3_moe"), exact),
    "glm exact": (Case(model="glm"), exact),
    "ministral exact": (Case(model="ministral"), exact),
    "ministral recomputed exact": (Case(model="ministral"), exact),
    "qwen3 cp2 exact": (Case(model="qwen3", cp=2), exact),
    "qwen3_moe cp2 exact": (Case(model="qwen3_moe", cp=2), exact),
    "qwen media exact": (Case(model="qwen", rows="MediaRows"), exact),
    "qwen3 media exact": (Case(model="qwen3", rows="TimedMediaRows"), exact),
    "qwen cp2": (Case(model="qwen", cp=2), plain_fails),
    "glm cp2": (Case(model="glm", cp=2), plain_fails),
}
CASES |= {name: case for name, (case, _) in OWN_LOOPS.items()}


def main(folder: str, *names: str) -> int:
    """Run the cases; the number of those that failed."""
    failed = 0
    for name in names or CASES:
        case = CASES[name]
        work = partial(OWN_LOOPS[name][1] if name in OWN_LOOPS else train, name, case, Path(folder))
        failed += not run(name, case.tp * case.pp * case.dp * case.cp, Path(folder) / f"{name}.log", work)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
