"""Worker of test_megatron_bridge: a tiny GPT trained by Megatron-Bridge's own loop, with and without ReGATE.

torchrun --nproc-per-node 1 tests/frameworks/run_bridge.py CASE RESULTS.json [TRACE]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.frameworks import bridge_on_cpu

bridge_on_cpu.install()

import torch
from megatron.bridge.data.base import DatasetProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
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
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from regate_megatron import ReGateConfig
from regate_megatron.api import session_of
from regate_megatron.integrations import megatron_bridge

TEXT, VOCAB, SAMPLES, STEPS = 24, 64, 64, 6


class Rows(torch.utils.data.Dataset):
    """A prompt of eight tokens without loss, then an answer; the same rows for every size and rank."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % SAMPLES)
        text = torch.randint(1, VOCAB, (TEXT + 1,), generator=generator)
        mask = torch.ones(TEXT)
        mask[:8] = 0
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask, "position_ids": torch.arange(TEXT)}


@dataclass(kw_only=True)
class Data(DatasetProvider):
    """Bridge's contract for a dataset of one's own."""

    seq_length: int = TEXT
    skip_getting_attention_mask_from_dataset: bool = True

    def build_datasets(self, context):
        return Rows(context.train_samples), Rows(context.valid_samples), None


class Record(Callback):
    """What happened, step by step; the model as it is when training ends."""

    def __init__(self) -> None:
        self.losses, self.steps, self.lengths = [], [], []
        self.seen: dict = {"evaluations": 0}

    def on_train_start(self, context):
        decoder = context.model[0].module.module if hasattr(context.model[0].module, "module") else None
        block = (decoder or context.model[0].module).decoder
        block.layers[-1].register_forward_pre_hook(
            lambda layer, args, kwargs: self.lengths.append(
                (layer.training, torch.is_grad_enabled(), kwargs["hidden_states"].shape[0])
            ),
            with_kwargs=True,
        )

    def on_train_step_end(self, context):
        self.losses.append(float(context.loss_dict["lm loss"]))
        session = session_of(context.model)
        if session is not None:
            self.steps.append([session.phase, session.totals.steps, session.totals.sparse_steps])
            self.seen["totals"] = dataclasses.asdict(session.totals)

    def on_eval_end(self, context):
        self.seen["evaluations"] += 1

    def on_train_end(self, context):
        self.seen["attached at the end"] = session_of(context.model) is not None


def settings(folder: Path) -> ConfigContainer:
    model = GPTModelProvider(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        seq_length=TEXT,
        vocab_size=VOCAB,
        position_embedding_type="rope",
        transformer_layer_spec=local_layer_spec,
        share_embeddings_and_output_weights=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
    )
    return ConfigContainer(
        model=model,
        train=TrainingConfig(micro_batch_size=2, global_batch_size=4, train_iters=STEPS),
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
        dataset=Data(dataloader_type="single", num_workers=0, pin_memory=False, persistent_workers=False),
        logger=LoggerConfig(log_interval=2, tensorboard_dir=str(folder / "tensorboard")),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1),
        checkpoint=CheckpointConfig(save=None, load=None),
        rerun_state_machine=RerunStateMachineConfig(rerun_mode="disabled"),
    )


CASES = {
    "plain": None,
    "all kept": {"keep_ratio": 1.0, "teacher_load": "student"},
    "regate": {"keep_ratio": 0.5, "teacher_load": "student"},
}


def main(case: str, results: str) -> None:
    record, folder = Record(), Path(results).parent
    callbacks: list[Callback] = [record]
    original = loop.get_forward_backward_func
    if CASES[case] is not None:
        config = ReGateConfig(warmup_steps=2, cycle_steps=100, dense_steps=0, trace=str(folder / case), **CASES[case])
        callbacks = [megatron_bridge.install(config), record]
    pretrain(settings(folder), forward_step, callbacks=callbacks)
    record.seen["loop restored"] = loop.get_forward_backward_func is original
    found = {"losses": record.losses, "steps": record.steps, "lengths": record.lengths, **record.seen}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
