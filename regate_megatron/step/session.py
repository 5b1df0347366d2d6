"""ReGATE on one rank: runs training steps from end to end, and keeps what lasts longer than a step.

Phase from the step number → each rank that has data pulls exactly this step's microbatches → the planner reads them,
the teacher scores what is new, the planner selects → the plan reaches every rank of the replica and its hash is
compared → the framework's own schedule runs on fresh copies of the batches, whose only edit is a loss mask of 0 at
elided targets → what it showed is learned from once the step counted.

Hosts and saved state use the verbs of :class:`Session`; nobody else sets its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from regate_megatron import compat
from regate_megatron.batches import BatchAdapter
from regate_megatron.config import ReGateConfig
from regate_megatron.decoder import Hooks, ShardedPlan, gather_context, own_norms, put_together, to_host
from regate_megatron.errors import ReGateError
from regate_megatron.memory.learned import Learned
from regate_megatron.method.plan import StepPlan
from regate_megatron.method.schedule import Phase, phase_of
from regate_megatron.ranks.together import Stage
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.attached_line import attached_line
from regate_megatron.step.counters import (
    Counters,
    count_plan,
    count_step,
    has_history,
    no_history,
    reduce_counters,
)
from regate_megatron.step.dealing import Dealing
from regate_megatron.step.peek import check_lengths, pull
from regate_megatron.step.planner import Planner
from regate_megatron.step.sharing import share_loss_masks, share_plan
from regate_megatron.step.step import Step
from regate_megatron.step.trace import Trace
from regate_megatron.support import HostRun, Setting, check_support, hints
from regate_megatron.support.alignment import (
    experts_span_replicas,
    gathers_over_replicas,
    length_alignment,
    segment_alignment,
)
from regate_megatron.teacher import ReferenceLosses, TeacherSource, open_reference


class Session:
    """ReGATE on one rank: its hooks, and on planners the planner. Made by :func:`~regate_megatron.api.attach`.

    Attributes:
        step: the step that ran last and is neither counted nor forgotten; None between steps.
        steps_done: steps done before the next one.
        totals: counts of this rank since the run began.
        work: the lengths that Megatron's FLOP count, when asked now, has to count.
        first_sparse: counts of the first sparse step, until somebody took them.
        counts_own_steps: whether a step counts as soon as the next one begins; False where a host says whether it did.
    """

    def __init__(
        self,
        models: Sequence[Any],
        config: ReGateConfig,
        topology: Topology,
        run: HostRun,
        adapter: BatchAdapter,
        teacher: TeacherSource | None = None,
    ) -> None:
        self.config, self.topology = config, topology
        self.models = [compat.unwrap(model) for model in models]
        self.language_models = [compat.language_model_of(model) for model in self.models]
        self.hooks = Hooks(self.language_models, config, self.models)
        self.step: Step | None = None
        self.steps_done, self.dense_until = 0, 0
        self.totals, self.work = Counters(), Counters()
        self.first_sparse: Counters | None = None
        self._has_been_sparse = False
        self.reference: ReferenceLosses | None = None
        self.counts_own_steps = True
        self.adapter, self.teacher_source = adapter, teacher
        self._phase: Phase = "warmup"
        self._interval, self._is_advised = Counters(), False
        self._run_of_host, self._is_prepared = run, False
        transformer = self.language_models[0].config
        self.planner = self.trace = None
        if topology.is_planner:
            multiples = length_alignment(transformer), segment_alignment(transformer)
            gathers = config.budget == "dealt" and gathers_over_replicas(transformer)
            self.planner = Planner(config, topology, *multiples, evens_columns=gathers)
            self.trace = Trace(config.trace, topology.dp_rank, topology.dp_size) if config.trace else None
        self.dealing = None
        if config.budget == "dealt" and config.elides and topology.dp_size > 1:
            shares_experts = bool(transformer.num_moe_experts) and experts_span_replicas(transformer)
            self.dealing = Dealing(topology, self.planner, in_columns=shares_experts)

    def detach(self) -> None:
        """Take the hooks off and close what is open."""
        self.hooks.detach()
        if self.dealing:
            self.dealing.close()
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
        if self.reference is not None:
            self.reference.close()
        self.teacher_source, self.reference = source, None

    def open_teacher(self) -> ReferenceLosses | None:
        """The reference losses, opened now if they are not; None where the score needs none. All ranks call this."""
        if self.reference is None and self.teacher_source is not None:
            self.reference = open_reference(
                self.teacher_source, self.language_models, self.config, self.topology, self.hooks
            )
        return self.reference

    def prepare(self, micro_batch_size: int) -> None:
        """What needs loaded weights and a known batch; once, before the first step. All ranks call this.

        Raises:
            ReGateError: the batch size rules something out; on every rank.
        """
        if self._is_prepared:
            return
        is_multimodal = self.language_models[0] is not self.models[0]
        setting = Setting(self.language_models, self.config, self._run_of_host, micro_batch_size, is_multimodal)
        with self.topology.together("attach"):
            supported, reason = check_support(setting)
            if not supported:
                raise ReGateError(reason)
        self.open_teacher()
        self._is_prepared = True

    def go_on_at(self, steps_done: int) -> None:
        """Say how many steps are done, where a host counts them (it may skip data)."""
        self.steps_done = steps_done

    def resume(self, steps_done: int) -> None:
        """Continue a run of which nothing learned is left: the next ``dense_steps`` steps (one at least) run dense and
        refresh difficulty.
        """
        until = steps_done + max(1, self.config.dense_steps) if self.config.learns else self.dense_until
        self.restore(steps_done, until, self.totals)

    def restore(self, steps_done: int, dense_until: int, totals: Counters) -> None:
        """Continue a run with what it had counted; its steps before ``dense_until`` are dense."""
        self.steps_done, self.dense_until, self.totals = steps_done, dense_until, totals
        if self.trace:
            self.trace.continues = True

    @property
    def learned(self) -> Learned | None:
        """What this rank's planner has learned of the data; None on ranks that are no planner."""
        return self.planner.learned if self.planner else None

    @property
    def phase(self) -> Phase:
        """The phase of the step that began last."""
        return self._phase

    @property
    def has_news(self) -> bool:
        """Whether a step has counted since :meth:`take_interval`."""
        return self._interval.steps > 0

    def take_interval(self) -> Counters:
        """What all data-parallel ranks counted since the last call, which begins anew. All ranks call this."""
        interval, self._interval = reduce_counters(self._interval, self.topology), Counters()
        self.work = interval
        return interval

    def advice(self, interval: Counters, total: Counters) -> str | None:
        """What to do where no sample ever comes back, of reduced counters; said once, two cycles in at the earliest."""
        if self._is_advised or total.sparse_steps < 2 * self.config.cycle_steps or not interval.targets_scored:
            return None
        self._is_advised = True
        return None if has_history(total) or has_history(interval) else no_history(interval)

    def describe(self) -> str:
        """What is attached where, one line per hook."""
        lines = [attached_line(self)]
        lines += [f"regate on data-parallel rank {self.topology.dp_rank}" + (", planner" if self.planner else "")]
        lines += self.hooks.describe()
        lines += hints(Setting(self.language_models, self.config, self._run_of_host))
        if self.planner and self.config.learns:
            lines.append(self.learned.describe())
        if self.reference is not None:
            lines.append(self.reference.describe())
        return "\n".join(lines)

    def run(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run one training step of ``schedule`` with ``arguments`` (keywords of Megatron's forward-backward)."""
        self.prepare(arguments["micro_batch_size"])
        step = self._begin()
        self._read(step, arguments, self.dealing)
        sharded = self._plan(step)
        self.work = count_plan(step.plan, **self._layers)
        with step.enter("run"):
            observe = step.losses.append if self.topology.sees_losses else None
            step.norms = {} if self.config.learns_gradients and not step.plan.is_sparse else None
            result = self.hooks.run(schedule, arguments, step.batches, sharded, observe, step.norms)
            if self.hooks.layout.cp_size > 1 and self.topology.sees_losses:
                step.losses = gather_context(step.losses, self.hooks.layout)
        step.batches = []  # their memory is free from here
        self.step = step
        return result

    def finish(self, counted: bool = True) -> None:
        """Say what became of the step that ran: learn from it, count and trace it; or, where it did not count (skipped,
        replayed, aborted), forget it. All ranks call this.

        Raises:
            ReGateError: a planner could not learn or write its trace; on every rank.
        """
        step, self.step = self.step, None
        if step is None:
            return
        if not counted:
            step.stage = "forgotten"
            return
        self.steps_done = step.number + 1
        counters = Counters(steps=1)
        with self.topology.together("learning"):
            layout = self.hooks.layout
            sent = None if step.norms is None else self.topology.gather_at_planner(own_norms(step.norms, layout))
            if self.planner:
                losses = to_host(step.losses, step.facts)  # waits for the device, so before the clock starts
                with step.enter("learned"):
                    norm_P = None if sent is None else put_together(sent, step.facts, layout)
                    if self.config.learns:
                        self.planner.learn(step, losses, norm_P)
                    if self.trace:
                        self.trace.write(step)
                counters = count_step(step, **self._layers)
        if step.plan.is_sparse and not self._has_been_sparse:
            self._has_been_sparse, self.first_sparse = True, counters
        planning = ("read", "deal", "plan", "learned")
        counters.planning_us = round(1e6 * sum(step.seconds.get(stage, 0.0) for stage in planning))
        counters.teacher_us = round(1e6 * step.seconds.get("reference", 0.0))
        self._interval.add(counters)
        self.totals.add(counters)

    def score_only(self, arguments: dict[str, Any]) -> None:
        """Have the reference losses of a step's batches in the store, and run nothing else. All ranks call this."""
        step = Step(self.steps_done, "sparse", elides=True)
        self._read(step, arguments, dealing=None)

    def _begin(self) -> Step:
        self._phase = phase_of(self.steps_done, self.config.schedule)
        if self._phase == "sparse" and self.steps_done < self.dense_until:
            self._phase = "dense"
        elides = self._phase == "sparse" and self.config.elides_in(self.steps_done)
        return Step(self.steps_done, self._phase, elides, elides and self.config.keep_ratio_in(self.steps_done) < 1.0)

    def _read(self, step: Step, arguments: dict[str, Any], dealing: Dealing | None) -> None:
        """Pull this step's batches, read them on the planner, have them dealt where that is asked for, and get the
        reference losses of a step that ranks targets.

        Raises:
            ReGateError: a rank could not; on every rank.
        """
        deals = dealing is not None and (step.elides or self.config.deal_dense)
        # Where rows go follows from scores then.
        asks_scores = deals and step.elides and step.ranks_targets and self.config.share == "batch"
        allowed = f"a dictionary with {self.adapter.keys}"
        with self.topology.together("batch", allowed=allowed, change="the data loader") as stage:
            with step.enter("peek"):
                given = arguments["data_iterator"]
                iterators = given if isinstance(given, list) else [given]
                stage.count = arguments["num_microbatches"]
                step.batches = [pull(one, stage.count) for one in iterators]
            if self.planner:
                self._read_facts(step)
                if asks_scores or not deals:
                    stage.wish = self._look_up(step)
        if dealing:
            dealing.meet(step)
        if asks_scores:
            self._fetch(step, arguments, stage)
        if deals:
            stage = self._deal(step, dealing, stage.counts, looks_up=not asks_scores)
        if not asks_scores:
            self._fetch(step, arguments, stage)

    def _fetch(self, step: Step, arguments: dict[str, Any], stage: Stage) -> None:
        """Get the reference losses that were looked up in ``stage``; all ranks call this."""
        if self._asks_teacher(step):
            with step.enter("reference"):
                step.reference = self.reference.fetch(arguments["micro_batch_size"], anyone_misses=stage.anyone_wishes)

    def _read_facts(self, step: Step) -> None:
        """Read the batches whose facts are not known; planners only."""
        with step.enter("read"):
            known = step.facts or [None] * len(step.own)
            unread = [one for one, facts in zip(step.own, known, strict=True) if facts is None]
            read = iter(self.adapter.read_all(unread) if unread else ())
            step.take_facts([next(read) if facts is None else facts for facts in known])
            check_lengths(step.facts, self.hooks.has_one_dense_length, self.planner.segment_multiple)
            longest = max(int(one.segment_length_N.max()) for one in step.facts)
            self.hooks.check_rows(longest, is_packed=any(one.sample_BS is not None for one in step.facts))
            self.planner.check(step.whole)

    def _look_up(self, step: Step) -> bool:
        """Whether reference losses are missing; planners only."""
        if not self._asks_teacher(step):
            return False
        with step.enter("reference"):
            before = self.reference.num_found, self.reference.num_computed
            misses = self.reference.look_up(step.facts)
            step.num_found = self.reference.num_found - before[0]
            step.num_asked = step.num_found + self.reference.num_computed - before[1]
        return misses

    def _asks_teacher(self, step: Step) -> bool:
        """Whether the step needs reference losses: to rank, or to learn by them."""
        return self.reference is not None and (step.ranks_targets or self.config.by_kind)

    def _deal(self, step: Step, dealing: Dealing, counts: tuple[int, int], *, looks_up: bool) -> Stage:
        """Have the microbatches that are dealt to this rank in place of its own; returns the stage that ends it.

        Args:
            looks_up: whether their reference losses are to be looked up; else they are scored already.

        Raises:
            ReGateError: a rank could not; on every rank.
        """
        with step.enter("deal"), self.topology.together("deal"):
            from_DM, packed = dealing.decide(step, counts)
        with self.topology.together("rows", allowed="what the other rank packed", change="nothing: restart") as stage:
            with step.enter("deal"):
                dealing.exchange(step, from_DM, packed)
            if self.planner:
                self._read_facts(step)
                if looks_up:
                    stage.wish = self._look_up(step)
                else:
                    self.planner.follow(step, from_DM)
        return stage

    def _plan(self, step: Step) -> list[ShardedPlan]:
        """Plan a step that elides, share the plan, and make this rank's part of it; nothing in a dense step.

        Raises:
            ReGateError: a rank could not, or plans differ; on every rank.
        """
        if not step.elides:
            return []
        with step.enter("plan"), self.topology.together("planner", allowed="a plan of every replica's planner"):
            if self.planner:
                self.planner.plan(step)
            step.plan = share_plan(step.plan, self.topology)
            masks = share_loss_masks(step.own, step.plan, self.topology) if self.hooks.predicts_ahead else []
            step.batches = [self._elide(pulled, step.plan) for pulled in step.batches]
            return self.hooks.lay_out(step.plan, masks)

    def _elide(self, pulled: list[Any] | None, plan: StepPlan) -> list[Any] | None:
        """Batches whose loss mask is 0 wherever a position does not run (context has none anyway)."""
        if pulled is None or not plan.is_sparse:
            return pulled
        elided = (~plan.kept_P).split([one.kept_mask().numel() for one in plan.microbatches])
        return [
            self.adapter.elide(batch, elided_Y.view_as(one.kept_mask()))
            for batch, one, elided_Y in zip(pulled, plan.microbatches, elided, strict=True)
        ]

    @property
    def _layers(self) -> dict[str, int]:
        return {
            "num_layers": self.language_models[0].config.num_layers,
            "dense_layers": self.config.dense_layers + self.config.dense_last_layers,
        }
