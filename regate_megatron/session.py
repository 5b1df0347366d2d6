"""One training step from end to end, on one rank.

Phase from the step number → each rank that has data pulls exactly this step's microbatches → the planner reads them,
the teacher scores what is new, the planner selects → the plan reaches every rank of the replica and its hash is
compared → the framework's own schedule runs on fresh copies of the batches, whose only edit is a loss mask of 0 at
elided targets → per-token losses update the difficulty once the step counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from regate_megatron import compat
from regate_megatron.batches import BatchAdapter, GPTBatches, LLaVABatches, MicrobatchFacts
from regate_megatron.checkpoint import LanguageModelCheckpoint
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.hooks import CurrentMicrobatch, DecoderHook, LossHook
from regate_megatron.metrics import Counters, Trace, count_step
from regate_megatron.plan import MicrobatchPlan, StepPlan, share_plan
from regate_megatron.planner import Planner
from regate_megatron.schedule import Phase, phase_of
from regate_megatron.teacher import ReferenceLosses, build_teacher
from regate_megatron.topology import Topology


class Session:
    """ReGATE on one rank: its hooks, and on planners the planner. Made by :func:`attach`."""

    def __init__(self, models: Sequence[Any], config: ReGateConfig, topology: Topology, args: Any) -> None:
        self.config, self.topology = config, topology
        self.models = [compat.unwrap(model) for model in models]
        self.language_models = [compat.language_model_of(model) for model in self.models]
        self.current = CurrentMicrobatch()
        self.hooks: list[Any] = []
        self.step = 0
        self.totals, self.interval = Counters(), Counters()
        self.phase = "warmup"
        self.reference: ReferenceLosses | None = None
        self.counts_own_steps = True
        self.dense_until = 0
        self._pending: _Pending | None = None
        self._teacher_source: tuple[Any, LanguageModelCheckpoint | None, int | None] | None = None
        self._is_prepared = False
        self.adapter = _adapter_for(self.models[0])
        transformer = self.language_models[0].config
        self._has_pipeline = transformer.pipeline_model_parallel_size > 1
        self._args = args
        self.planner = self.trace = None
        if topology.is_planner:
            self.planner = Planner(config, topology, compat.length_alignment(transformer))
            self.trace = Trace(config.trace, topology.dp_rank) if config.trace else None

    def attach_hooks(self) -> None:
        """Put the hooks on this rank's language-model chunks."""
        for model in self.language_models:
            self.hooks.append(DecoderHook(model, self.current, dense_layers=self.config.dense_layers))
            if model.post_process:
                self.hooks.append(LossHook(model, self.current))

    def detach_hooks(self) -> None:
        """Take every hook off again, last first."""
        while self.hooks:
            self.hooks.pop().detach()
        if self.trace:
            self.trace.close()

    def teach_with(self, teacher: Any, checkpoint: LanguageModelCheckpoint | None, pad_token: int | None) -> None:
        """Say where the teacher comes from; it is built by :meth:`prepare`, when the student's weights are loaded."""
        self._teacher_source = (teacher, checkpoint, pad_token)

    def prepare(self, micro_batch_size: int) -> None:
        """What needs loaded weights and a known batch; once, before the first step. All ranks call this.

        Raises:
            ReGateError: the batch size rules something out; on every rank.
        """
        if self._is_prepared:
            return
        is_multimodal = self.language_models[0] is not self.models[0]
        setting = compat.Setting(self.language_models, self.config, self._args, micro_batch_size, is_multimodal)
        supported, reason = compat.check_support(setting)
        if not supported:
            raise ReGateError(reason, everywhere=True)
        if self._teacher_source is not None:
            teacher, checkpoint, pad_token = self._teacher_source
            teacher = teacher or build_teacher(self.language_models[0], checkpoint)
            self.reference = ReferenceLosses(
                teacher, self.topology, visual=self.config.teacher_visual, pad_token=pad_token
            )
        self._is_prepared = True

    def resume(self, step: int) -> None:
        """Continue a run of which ``step`` steps are done, of which nothing learned is left: the next ``dense_steps``
        steps (one at least) run dense and refresh difficulty.
        """
        self.step = step
        if self.config.learns:
            self.dense_until = step + max(1, self.config.dense_steps)
        if self.trace:
            self.trace.continues = True

    def restore(self, step: int, dense_until: int, totals: Counters) -> None:
        """Continue a run of which ``step`` steps are done, with what it had learned and counted."""
        self.step, self.dense_until, self.totals = step, dense_until, totals
        if self.trace:
            self.trace.continues = True

    def run(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run one training step of ``schedule`` with ``arguments`` (keywords of Megatron's forward-backward)."""
        self.prepare(arguments["micro_batch_size"])
        self.phase = self._phase()
        batches, facts, seconds = self._gather(arguments)
        plan, scores, fallback, teacher_seconds = StepPlan(self.step), None, False, 0.0
        if self.phase == "sparse" and self.config.elides:
            start = time.perf_counter()
            plan, scores, fallback, teacher_seconds = self._plan(facts, arguments["micro_batch_size"])
            seconds += time.perf_counter() - start - teacher_seconds
        counters = Counters(steps=1)
        if self.planner:
            counters = count_step(
                facts,
                plan,
                num_layers=self.language_models[0].config.num_layers,
                dense_layers=self.config.dense_layers,
                fallback=fallback,
            )
        counters.planning_ms, counters.teacher_ms = round(1000 * seconds), round(1000 * teacher_seconds)
        losses: list[torch.Tensor] = []
        result = self._run_schedule(schedule, arguments, batches, plan, losses)
        self._pending = _Pending(self.step, self.phase, facts, plan, scores, fallback, losses, counters)
        return result

    def _phase(self) -> Phase:
        phase = phase_of(
            self.step,
            warmup_steps=self.config.warmup_steps,
            cycle_steps=self.config.cycle_steps,
            dense_steps=self.config.dense_steps,
        )
        return "dense" if phase == "sparse" and self.step < self.dense_until else phase

    def _gather(self, arguments: dict[str, Any]) -> tuple[list[list[Any] | None], list[MicrobatchFacts] | None, float]:
        """Pull this step's batches and read them on the planner; returns both and the seconds of reading.

        Raises:
            ReGateError: a rank could not; on every rank.
        """
        batches, facts, error, seconds = [], None, None, 0.0
        try:
            batches = [_pull(one, arguments["num_microbatches"]) for one in _as_list(arguments["data_iterator"])]
            if self.planner:
                start = time.perf_counter()
                own = next(pulled for pulled in reversed(batches) if pulled is not None)
                facts = [self.adapter.read(batch) for batch in own]
                seconds = time.perf_counter() - start
        except Exception as fault:  # any fault here would leave the other ranks waiting
            form = {"allowed": "the layout of pretrain_gpt.py or pretrain_vlm.py batches", "change": "the data loader"}
            error = str(refuse("batch", given=f"{type(fault).__name__}: {fault}", **form))
        self.topology.agree(error)
        return batches, facts, seconds

    def _plan(
        self, facts: list[MicrobatchFacts] | None, micro_batch_size: int
    ) -> tuple[StepPlan, list[torch.Tensor] | None, bool, float]:
        """Ask the teacher, plan, and share the plan; returns it, the scores, fallback, and the teacher's seconds."""
        plan, scores, fallback, reference, error, seconds = None, None, False, None, None, 0.0
        if self.reference is not None:
            before = self.reference.seconds
            reference = self.reference.fetch(facts, micro_batch_size)
            seconds = self.reference.seconds - before
        if self.planner:
            try:
                plan, scores, fallback = self.planner.plan(self.step, facts, reference)
                _check_static_lengths(plan, self._has_pipeline)
            except Exception as fault:  # the replica waits for this plan
                error = str(fault) if isinstance(fault, ReGateError) else f"regate: planner: {fault!r}"
        return share_plan(plan, self.topology, error), scores, fallback, seconds

    def commit(self) -> None:
        """The step counted: learn from it, count it, trace it. All ranks call this."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self.step = pending.step + 1
        if self.planner:
            losses = _to_host(pending.losses)  # waits for the device, so before the clock starts
            start = time.perf_counter()
            if self.config.learns:
                self.planner.learn(pending.facts, pending.plan, losses, is_dense=not pending.plan.is_sparse)
            if self.trace:
                self.trace.write(
                    iteration=pending.step + 1,
                    phase=pending.phase,
                    fallback=pending.fallback,
                    dp_rank=self.topology.dp_rank,
                    facts=pending.facts,
                    plan=pending.plan,
                    scores=pending.scores,
                )
            pending.counters.planning_ms += round(1000 * (time.perf_counter() - start))
        self.interval.add(pending.counters)
        self.totals.add(pending.counters)

    @property
    def has_step(self) -> bool:
        """Whether a step has run that is neither committed nor discarded."""
        return self._pending is not None

    def discard(self) -> None:
        """The step did not count (skipped, replayed or aborted): forget it."""
        self._pending = None

    def describe(self) -> str:
        """What is attached where, one line per hook."""
        lines = [f"regate on data-parallel rank {self.topology.dp_rank}" + (", planner" if self.planner else "")]
        lines += [hook.describe() for hook in self.hooks]
        if self.planner:
            lines.append(self.planner.difficulty.describe())
        if self.reference is not None:
            lines.append(self.reference.describe())
        return "\n".join(lines)

    def _run_schedule(
        self,
        schedule: Callable[..., Any],
        arguments: dict[str, Any],
        batches: list[list[Any] | None],
        plan: StepPlan,
        losses: list[torch.Tensor],
    ) -> Any:
        device_plans: Sequence[MicrobatchPlan | None] = [None] * arguments["num_microbatches"]
        if plan.is_sparse:
            batches = [self._elide(pulled, plan) for pulled in batches]
            device = next(self.language_models[0].parameters()).device
            device_plans = [_to_device(one, device) for one in plan.microbatches]
            if self._has_pipeline:
                length = plan.microbatches[0].length
                arguments = dict(arguments, seq_length=length)
                if arguments.get("decoder_seq_length") is not None:
                    arguments["decoder_seq_length"] = length
        iterators = [None if pulled is None else iter([_fresh(batch) for batch in pulled]) for pulled in batches]
        is_list = isinstance(arguments["data_iterator"], list)
        arguments = dict(arguments, data_iterator=iterators if is_list else iterators[0])
        step, observe = arguments["forward_step_func"], losses.append if self.planner else None
        done: dict[int, int] = {}

        def forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            index = done.get(id(model), 0)
            done[id(model)] = index + 1
            with self.current.running(device_plans[index], observe):
                return step(data_iterator, model, *args, **kwargs)

        return schedule(**dict(arguments, forward_step_func=forward_step))

    def _elide(self, pulled: list[Any] | None, plan: StepPlan) -> list[Any] | None:
        """Batches whose loss mask is 0 wherever a position does not run (context has none anyway)."""
        if pulled is None:
            return None
        return [self.adapter.elide(b, ~p.kept_mask()) for b, p in zip(pulled, plan.microbatches, strict=True)]


class _Pending:
    """A step that ran and has not been counted yet."""

    def __init__(self, step, phase, facts, plan, scores, fallback, losses, counters) -> None:
        self.step, self.phase, self.facts, self.plan = step, phase, facts, plan
        self.scores, self.fallback, self.losses, self.counters = scores, fallback, losses, counters


def _adapter_for(model: Any) -> BatchAdapter:
    if getattr(model, "language_model", None) is None:
        return GPTBatches()
    return LLaVABatches(
        image_length=model.img_seq_len,
        image_token=model.image_token_index,
        max_length=model._language_max_sequence_length,
        pads_to_max=model._language_is_pipeline_parallel,
    )


def _as_list(iterators: Any) -> list[Any]:
    return iterators if isinstance(iterators, list) else [iterators]


def _pull(iterator: Iterator[Any] | None, count: int) -> list[Any] | None:
    return None if iterator is None else [next(iterator) for _ in range(count)]


def _fresh(batch: Any) -> Any:
    """A shallow copy: the framework's batch code empties the dict it is given."""
    return dict(batch) if isinstance(batch, dict) else batch


def _to_device(plan: MicrobatchPlan, device: torch.device) -> MicrobatchPlan:
    if device.type == "cpu":
        return plan
    keep_idx_BK = plan.keep_idx_BK.pin_memory().to(device, non_blocking=True)
    return MicrobatchPlan(plan.dense_length, keep_idx_BK, plan.num_kept_B.pin_memory().to(device, non_blocking=True))


def _to_host(losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Per-token losses of all microbatches on the CPU, in one copy; float32 [B, S] each."""
    flat = torch.cat([loss_BS.float().reshape(-1) for loss_BS in losses]).cpu()
    pieces = flat.split([loss_BS.numel() for loss_BS in losses])
    return [piece.view(loss_BS.shape) for piece, loss_BS in zip(pieces, losses, strict=True)]


def _check_static_lengths(plan: StepPlan, has_pipeline: bool) -> None:
    lengths = {one.length for one in plan.microbatches}
    if has_pipeline and len(lengths) > 1:
        raise refuse(
            "pipeline parallelism",
            given=f"microbatches of lengths {sorted(lengths)}",
            allowed="one length per step (rows of equal dense length)",
            change="the data loader, or --pipeline-model-parallel-size to 1",
        )
