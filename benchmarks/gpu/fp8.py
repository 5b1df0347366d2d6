"""Part fp8: sparse steps under Transformer Engine's FP8 recipes: delayed, current (tensorwise), blockwise and MXFP8.

Which recipes the chip has is asked of Transformer Engine; the others are listed as skipped. Per recipe:

* ``lengths``: sparse steps at keep ratios that divide nothing. What holds: every kept length is a multiple of what the
  recipe asks for, Transformer Engine takes it, and losses and gradients are finite.
* ``losses``: twenty AdamW steps from the same weights on the same batches in bf16 and in FP8, the kept positions being
  the same (score random). What holds: all losses finite, both fall, and FP8 stays within 5 % of bf16 at every step.
* ``teacher``: a step with a teacher taken from the student. What holds: scoring leaves every scale and amax history of
  the student bit for bit as it was and adds nothing to what Transformer Engine will reduce; the teacher has no FP8.
* ``region``: how often Transformer Engine rolls its amax histories in a dense and in a sparse step. What holds: equally
  often.
* ``params``: a student with FP8 parameters (``--fp8-param-gather``) as the source of its teacher. What holds: the
  teacher's weights are bf16 and equal the student's dequantised ones.
* ``conv``: the 3B decoder at 2 rows of 8192 positions, as in the part step_time, both arms in FP8.

In a rehearsal there is no FP8: the recipe ``none`` runs the same code in bf16 with lengths aligned to 16.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.gpu import machine, models, step_time
from benchmarks.gpu.results import Results
from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
KEEP_RATIOS = (0.31, 0.5, 0.77)
STEPS, TOLERANCE = {"cuda": 20, "cpu": 4}, 0.05
ALWAYS_SPARSE = {"warmup_steps": 0, "dense_steps": 0, "cycle_steps": 1}


def run(options: Any, device: torch.device) -> int:
    """The part; returns the exit code."""
    results = Results(
        options, steps=STEPS[device.type], tolerance=TOLERANCE, keep_ratios=KEEP_RATIOS, conv_claim=step_time.CONV
    )
    recipes = ["none"] if options.cpu_rehearsal else list(RECIPES)
    ready = []
    for recipe in recipes:
        ok, reason = (True, "") if recipe == "none" else machine.check_recipe(recipe)
        if ok:
            ready.append(recipe)
        else:
            results.skip(recipe, reason)
    needs = 5 if options.cpu_rehearsal else 25
    for check in (lengths, teacher, region, losses, params, conv):
        for recipe in ready:
            if recipe == "none" and check is conv:
                results.skip("conv-none", "the part step_time rehearses it")
                continue
            results.measure(f"{check.__name__}-{recipe}", needs, functools.partial(check, recipe, device))
            gc.collect()
            torch.cuda.empty_cache()
    return results.finish()


class Small:
    """A small decoder under one recipe, and its batches.

    Args:
        recipe: Megatron's name of it, or "none".
    """

    def __init__(self, recipe: str, device: torch.device, **options: Any) -> None:
        on_gpu = device.type == "cuda"
        self.size, self.length, self.rows = models.SIZES["small" if on_gpu else "tiny"], 512 if on_gpu else 128, 2
        self.device, self.align = device, 16 if recipe == "none" else get_fp8_align_size(recipe)
        self.model = build(self.size, recipe, self.length, device, **options)
        self.schedule = get_forward_backward_func()

    def batch(self, seed: int) -> dict[str, torch.Tensor]:
        return models.text_batch(self.size, self.rows, self.length, 0.125, seed, self.device)

    def step(self, schedule: Any, batch: dict[str, torch.Tensor]) -> float:
        """Forward and backward; the mean loss."""
        losses = models.forward_backward(
            schedule, models.forward_step, self.model, [batch], rows=self.rows, length=self.length
        )
        return float(losses[0]["lm loss"])

    @contextlib.contextmanager
    def attached(self, **config: Any) -> Iterator[Any]:
        """Yields the session and the wrapped schedule."""
        multiple = self.align if self.model.config.fp8 is None else 1  # under FP8 ReGATE knows by itself
        attach([self.model], ReGateConfig(**{**ALWAYS_SPARSE, "length_multiple": multiple, **config}), pad_token=0)
        try:
            yield session_of([self.model]), wrap_forward_backward(self.schedule)
        finally:
            detach([self.model])


def build(size: models.Size, recipe: str, length: int, device: torch.device, **options: Any) -> Any:
    """A GPTModel in bf16 with FP8 matrices; "none" in a rehearsal: without them, and flash layers."""
    on_gpu = device.type == "cuda"
    if recipe != "none":
        options |= {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    options["use_cpu_initialization"] = not on_gpu
    config = models.transformer_config(size, dtype=torch.bfloat16, fused=on_gpu, **options)
    return models.gpt(size, "te" if on_gpu else "flash", length, device, config)


def lengths(recipe: str, device: torch.device) -> dict[str, Any]:
    """Odd keep ratios give lengths that the recipe takes."""
    small, found = Small(recipe, device), {}
    finite = True
    for keep_ratio in KEEP_RATIOS:
        with small.attached(score="random", keep_ratio=keep_ratio) as (session, schedule):
            small.model.zero_grad(set_to_none=True)
            loss = small.step(schedule, small.batch(0))
            found[str(keep_ratio)] = session.step.plan.microbatches[0].length
        finite &= math.isfinite(loss)
        finite &= all(bool(p.grad.isfinite().all()) for p in small.model.parameters() if p.grad is not None)
    aligned = all(small.rows * length % small.align == 0 for length in found.values())
    shorter = all(length < small.length for length in found.values())
    return {
        "holds": aligned and finite and shorter,
        "kept_lengths": found,
        "multiple_of": small.align,
        "finite": finite,
    }


def losses(recipe: str, device: torch.device) -> dict[str, Any]:
    """Losses in FP8 beside those in bf16, step by step."""
    curves = {}
    for name in ("none", recipe):
        small = Small(name, device)
        optimizer = torch.optim.AdamW(small.model.parameters(), lr=1e-3)
        align = get_fp8_align_size("delayed" if recipe == "none" else recipe)
        with small.attached(score="random", length_multiple=align) as (_, schedule):
            curve = []
            for index in range(STEPS[device.type]):
                optimizer.zero_grad(set_to_none=True)
                curve.append(small.step(schedule, small.batch(index % 2)))
                optimizer.step()
        curves[name if name == recipe else "bf16"] = curve
    plain, ours = curves.get("bf16", curves[recipe]), curves[recipe]
    finite = all(map(math.isfinite, plain + ours))
    apart = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True)) if finite else math.inf
    falls = all(curve[-1] < curve[0] for curve in (plain, ours))
    return {
        "holds": finite and falls and apart <= TOLERANCE,
        "largest_relative_difference": round(apart, 5),
        "first_and_last": {"bf16": [plain[0], plain[-1]], recipe: [ours[0], ours[-1]]},
        "curves": {name: [round(value, 5) for value in curve] for name, curve in curves.items()},
    }


def teacher(recipe: str, device: torch.device) -> dict[str, Any]:
    """Scoring with a teacher changes nothing of the student's FP8 state."""
    small = Small(recipe, device)
    seen: dict[str, Any] = {}
    with small.attached(score="regate", teacher_load="student", warmup_steps=1) as (session, schedule):
        small.step(schedule, small.batch(0))  # dense: the student's scales are there from now on
        fetch = session.reference.fetch

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen["before"] = fp8_state(small.model), waiting_amaxes()
            result = fetch(*args, **kwargs)
            seen["after"] = fp8_state(small.model), waiting_amaxes()
            return result

        session.reference.fetch = watched
        small.step(schedule, small.batch(1))
        own_fp8 = [len(fp8_state(chunk)) for chunk in session.reference.run.chunks]
        computed = session.reference.num_computed
    (before, waiting), (after, waiting_after) = seen["before"], seen["after"]
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected = bool(before) if recipe == "delayed" else True  # only delayed scaling keeps state between steps
    return {
        "holds": same and waiting == waiting_after and not any(own_fp8) and computed > 0 and expected,
        "tensors_of_state": len(before),
        "waiting_amaxes": [waiting, waiting_after],
        "samples_scored": computed,
    }


def region(recipe: str, device: torch.device) -> dict[str, Any]:
    """Rolls of the amax histories per step, dense and sparse."""
    small, rolls = Small(recipe, device), {}
    with counted_rolls() as count, small.attached(score="random", warmup_steps=1) as (_, schedule):
        for index, name in enumerate(("dense", "sparse")):
            before = len(count)
            small.step(schedule, small.batch(index))
            rolls[name] = len(count) - before
    return {"holds": rolls["dense"] == rolls["sparse"], "rolls": rolls}


def params(recipe: str, device: torch.device) -> dict[str, Any]:
    """A teacher in bf16 from a student whose parameters are FP8."""
    small = Small(recipe, device, **({} if recipe == "none" else {"fp8_param": True}))
    with small.attached(score="reference", teacher_load="student") as (session, schedule):
        small.step(schedule, small.batch(0))
        chunk = session.reference.run.chunks[0]
        kinds = sorted({type(p.data).__name__ for p in small.model.parameters()})
        ours = dict(small.model.named_parameters())
        pairs = [(value, dequantised(ours[name])) for name, value in chunk.named_parameters()]
    plain = all(value.dtype == torch.bfloat16 and type(value.data) is torch.Tensor for value, _ in pairs)
    equal = all(torch.equal(value, theirs) for value, theirs in pairs)
    return {"holds": plain and equal, "kinds_of_parameters": kinds, "plain": plain, "equal": equal}


def conv(recipe: str, device: torch.device) -> dict[str, Any]:
    """The step_time measurement of the 3B decoder, both arms in FP8."""
    setting = step_time.Setting("3B", "te", 8192, 2)
    return step_time.measure(setting, _Fp8Decoder(recipe, device), device)


class _Fp8Decoder(step_time.Lazy):
    def __init__(self, recipe: str, device: torch.device) -> None:
        super().__init__(models.SIZES["3B"], "te", device, torch.bfloat16)
        self._model = build(self.size, recipe, 8192, device)


def fp8_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors that Transformer Engine's modules keep for FP8: scales and amax histories."""
    found = {}
    for name, module in model.named_modules():
        for key, state in (getattr(module, "fp8_meta", None) or {}).items():
            for attribute, value in getattr(state, "__dict__", {}).items():
                if torch.is_tensor(value):
                    found[f"{name}.{key}.{attribute}"] = value.detach().clone()
    return found


def waiting_amaxes() -> int:
    """How many tensors Transformer Engine will reduce when its region ends; 0 without it."""
    with contextlib.suppress(ImportError):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        state = FP8GlobalStateManager.quantization_state
        return sum(len(amaxes) for amaxes in state.global_amax_buffer.values())
    return 0


@contextlib.contextmanager
def counted_rolls() -> Iterator[list[bool]]:
    """A list that grows by one with each roll of the amax histories."""
    count: list[bool] = []
    try:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager
    except ImportError:
        yield count
        return
    own = manager.__dict__["reduce_and_update_fp8_tensors"]
    roll = manager.reduce_and_update_fp8_tensors

    def counted(forward: bool = True) -> None:
        count.append(forward)
        roll(forward)

    manager.reduce_and_update_fp8_tensors = staticmethod(counted)
    try:
        yield count
    finally:
        manager.reduce_and_update_fp8_tensors = own


def dequantised(value: torch.Tensor) -> torch.Tensor:
    """A parameter's numbers in bf16, whatever holds them."""
    return value.dequantize(dtype=torch.bfloat16) if hasattr(value, "_quantizer") else value.data
