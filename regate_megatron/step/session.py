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
from regate_megatron.batches import BatchAdapter, MicrobatchFacts, adapter_for
from regate_megatron.config import ReGateConfig
from regate_megatron.decoder import Hooks, gather_context, to_host
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.method.schedule import Phase, keep_ratio_of, phase_of
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.metrics import Counters, Trace, count_plan, count_step
from regate_megatron.step.plan import StepPlan, share_plan
from regate_megatron.step.planner import Planner
from regate_megatron.support import Setting, check_support
from regate_megatron.support.alignment import length_alignment, segment_alignment
from regate_megatron.teacher import ReferenceLosses, TeacherSource, open_reference


class Session:
    """ReGATE on one rank: its hooks, and on planners the planner. Made by :func:`attach`."""

    def __init__(
        self,
        models: Sequence[Any],
        config: ReGateConfig,
        topology: Topology,
        args: Any,
        pad_token: int | None = None,
    ) -> None:
        self.config, self.topology = config, topology
        self.models = [compat.unwrap(model) for model in models]
        self.language_models = [compat.language_model_of(model) for model in self.models]
        self.hooks = Hooks(self.language_models, config)
        self.step = 0
        self.totals, self.interval = Counters(), Counters()
        self.work_to_report = Counters()  # what a FLOP count asked for now should speak of
        self.phase = "warmup"
        self.reference: ReferenceLosses | None = None
        self.counts_own_steps = True
        self.dense_until = 0
        self._pending: _Pending | None = None
        self._teacher_source: TeacherSource | None = None
        self._is_prepared = False
        self.adapter: BatchAdapter = adapter_for(self.models[0], pad_token, args)
        transformer = self.language_models[0].config
        self._args = args
        self.planner = self.trace = None
        if topology.is_planner:
            self.planner = Planner(config, topology, length_alignment(transformer), segment_alignment(transformer))
            self.trace = Trace(config.trace, topology.dp_rank) if config.trace else None

    def detach(self) -> None:
        """Take the hooks off and close what is open."""
        self.hooks.detach()
        if self.trace:
            self.trace.close()
        if self.reference:
            self.reference.close()

    def flush(self) -> None:
        """Put on disk what waits for it (reference losses); any rank, no communication."""
        if self.reference:
            self.reference.flush()

    def teach_with(self, source: TeacherSource) -> None:
        """Say where the teacher comes from; :meth:`prepare` opens it, when the student's weights are loaded."""
        self._teacher_source = source

    def prepare(self, micro_batch_size: int) -> None:
        """What needs loaded weights and a known batch; once, before the first step. All ranks call this.

        Raises:
            ReGateError: the batch size rules something out; on every rank.
        """
        if self._is_prepared:
            return
        is_multimodal = self.language_models[0] is not self.models[0]
        setting = Setting(self.language_models, self.config, self._args, micro_batch_size, is_multimodal)
        supported, reason = check_support(setting)
        if not supported:
            raise ReGateError(reason, everywhere=True)
        if self._teacher_source is not None:
            self.reference = open_reference(self._teacher_source, self.language_models, self.config, self.topology)
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
        elides = self.phase == "sparse" and keep_ratio_of(self.step, self.config) < 1.0
        teacher_before = self.reference.seconds if self.reference else 0.0
        batches, facts, anyone_misses, seconds = self._gather(arguments, asks=elides)
        plan, scores, fallback = StepPlan(self.step), None, False
        if elides:
            start = time.perf_counter()
            reference = None
            if self.reference:
                reference = self.reference.fetch(arguments["micro_batch_size"], anyone_misses=anyone_misses)
            plan, scores, fallback = self._plan(facts, reference)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        layers = {
            "num_layers": self.language_models[0].config.num_layers,
            "dense_layers": self.config.dense_layers + self.config.dense_last_layers,
        }
        counters, self.work_to_report = Counters(steps=1), count_plan(plan, **layers)
        if self.planner:
            balance = self.planner.balance if plan.is_sparse else None
            counters = count_step(facts, plan, **layers, fallback=fallback, balance=balance)
        if plan.is_sparse:
            batches = [self._elide(pulled, plan) for pulled in batches]
        sharded = self.hooks.lay_out(plan)
        seconds += time.perf_counter() - start
        teacher_seconds = self.reference.seconds - teacher_before if self.reference else 0.0
        counters.teacher_ms = round(1000 * teacher_seconds)
        counters.planning_ms = round(1000 * (seconds - teacher_seconds))
        losses: list[torch.Tensor] = []
        observe = losses.append if self.topology.sees_losses else None
        result = self.hooks.run(schedule, arguments, batches, sharded, observe)
        if self.hooks.layout.cp_size > 1 and self.topology.sees_losses:
            losses = gather_context(losses, self.hooks.layout)
        self._pending = _Pending(self.step, self.phase, facts, plan, scores, fallback, losses, counters)
        return result

    def _phase(self) -> Phase:
        phase = phase_of(
            self.step,
            warmup_steps=self.config.warmup_steps,
            cycle_steps=self.config.cycle_steps,
            dense_steps=self.config.dense_steps,
            dense_from=self.config.dense_from,
        )
        return "dense" if phase == "sparse" and self.step < self.dense_until else phase

    def score_only(self, arguments: dict[str, Any]) -> None:
        """Have the reference losses of a step's batches in the store, and run nothing else. All ranks call this."""
        *_, anyone_misses, _ = self._gather(arguments, asks=True)
        self.reference.fetch(arguments["micro_batch_size"], anyone_misses=anyone_misses)

    def _gather(
        self, arguments: dict[str, Any], *, asks: bool
    ) -> tuple[list[list[Any] | None], list[MicrobatchFacts] | None, bool, float]:
        """Pull this step's batches, read them on the planner, and look their reference losses up if the step ``asks``.

        Returns:
            batches, facts, whether any planner misses a reference loss, and the seconds of reading and looking up.

        Raises:
            ReGateError: a rank could not; on every rank.
        """
        batches, facts, error, misses, seconds = [], None, None, False, 0.0
        try:
            batches = [_pull(one, arguments["num_microbatches"]) for one in _as_list(arguments["data_iterator"])]
            if self.planner:
                start = time.perf_counter()
                own = next(pulled for pulled in reversed(batches) if pulled is not None)
                facts = [self.adapter.read(batch) for batch in own]
                self._check_lengths(facts)
                misses = asks and self.reference is not None and self.reference.look_up(facts)
                seconds = time.perf_counter() - start
        except ReGateError as refusal:
            error = str(refusal)
        except Exception as fault:  # any fault here would leave the other ranks waiting
            form = {"allowed": f"a dictionary with {self.adapter.keys}", "change": "the data loader"}
            error = str(refuse("batch", given=f"{type(fault).__name__}: {fault}", **form))
        return batches, facts, self.topology.agree(error, misses), seconds

    def _check_lengths(self, facts: list[MicrobatchFacts]) -> None:
        """Refuse dense lengths that the layout cannot cut or send.

        Raises:
            ReGateError: on this planner; all ranks agree on it.
        """
        lengths = sorted({one.dense_length for one in facts})
        if self.hooks.has_pipeline and len(lengths) > 1:
            raise refuse(
                "pipeline parallelism",
                given=f"microbatches of lengths {lengths}",
                allowed="one length per step",
                change="the data loader, or --pipeline-model-parallel-size to 1",
            )
        multiple = self.planner.segment_multiple
        odd = [n for one in facts for n in one.segment_length_N.tolist() if n % multiple]
        if odd:
            raise refuse(
                "context parallelism",
                given=f"rows or segments of {sorted(set(odd))} positions",
                allowed=f"multiples of {multiple}",
                change="the data loader's padding",
            )

    def _plan(
        self, facts: list[MicrobatchFacts] | None, reference: list[torch.Tensor] | None
    ) -> tuple[StepPlan, list[torch.Tensor] | None, bool]:
        """Plan, and share the plan; returns it, the scores, and whether it fell back to dense."""
        plan, scores, fallback, error = None, None, False, None
        if self.planner:
            try:
                plan, scores, fallback = self.planner.plan(self.step, facts, reference)
            except Exception as fault:  # the replica waits for this plan
                error = str(fault if isinstance(fault, ReGateError) else _refusal_of(fault))
        plan = share_plan(plan, self.topology, error)
        # The other replicas wait here, on the host, where they hear at once of a replica that stopped.
        self.topology.agree(None)
        return plan, scores, fallback

    def commit(self) -> None:
        """The step counted: learn from it, count it, trace it. All ranks call this."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self.step = pending.step + 1
        if self.planner:
            losses = to_host(pending.losses, pending.facts)  # waits for the device, so before the clock starts
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
        lines += self.hooks.describe()
        if self.planner:
            lines.append(self.planner.difficulty.describe())
        if self.reference is not None:
            lines.append(self.reference.describe())
        return "\n".join(lines)

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


def _refusal_of(fault: Exception) -> ReGateError:
    """What to say of a fault in a planner; one that stops leaves the others in the middle of an exchange."""
    form = {"allowed": "a plan of every replica's planner"}
    if "by peer" in str(fault):  # gloo's words for a connection that another rank has closed
        given = "no answer from another replica's planner, which has stopped"
        return refuse("planner", given=given, **form, change="what the line of that rank says")
    return refuse("planner", given=f"{fault!r}", **form, change="nothing in the settings: please report this fault")


def _as_list(iterators: Any) -> list[Any]:
    return iterators if isinstance(iterators, list) else [iterators]


def _pull(iterator: Iterator[Any] | None, count: int) -> list[Any] | None:
    return None if iterator is None else [next(iterator) for _ in range(count)]
