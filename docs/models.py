"""Write docs/models.md: which family of models, in which host, with what; every cell from one run of the tests.

    REGATE_TEST_RESULTS=out/frameworks.jsonl make test-frameworks && python docs/models.py out/frameworks.jsonl

A cell names tests. It reads "passed" where all of them ran and passed, else the program stops and names them. What no
test runs says so, and what is refused says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from regate_megatron.support.models import REFUSED  # noqa: E402

COLUMNS = (
    "ratio 1.0 bitwise",
    "sparse = oracle",
    "TP2+SP",
    "PP2",
    "CP2",
    "EP2",
    "DP2",
    "packed",
    "visual",
    "resume",
    "LoRA",
)
NOT_RUN, NONE = "not run", "–"
MROPE, NO_EXPERTS, AS_CORE = "refused (mRoPE)", NONE, "as in Megatron-LM"
_GPT, _Q25, _Q3 = "test_megatron_bridge.py::", "test_qwen_vl.py::", "test_qwen3_vl.py::"
_RECIPE, _MCORE, _SWIFT = "test_recipes.py::", "test_mcore_bridge.py::", "test_ms_swift.py::"
_LAYOUT, _SIX = "test_every_layout_keeps_the_same_positions", "test_three_steps_and_three_more_are_six"
_ONE, _ORACLE = "test_keep_ratio_1_trains_bit_for_bit_as_without", "test_a_sparse_step_is_the_masked_full_length_step"
_STEP, _LIKE_PADDED = (
    "test_rows_packed_by_the_step_or_the_collator_keep_what_padded_rows_keep",
    "packed_rows_keep_what_padded",
)
_BASE = "test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint"


def _mcore(name: str, cp2: str = MROPE, *, experts: bool = False) -> tuple[str, ...]:
    ep2 = f"{_MCORE}test_expert_parallel_ranks_keep_the_same_positions[{name}]" if experts else NO_EXPERTS
    tp2, pp2, dp2 = (f"{_MCORE}{_LAYOUT}[{name}-{layout}]" for layout in ("tp2", "pp2", "dp2"))
    visual = f"{_MCORE}test_visual_positions_of_packed_rows_are_those_of_padded_rows[{name}]"
    ones = f"{_MCORE}{_ONE}[{name}-", f"{_MCORE}{_ORACLE}[{name}-"
    packed = f"{_MCORE}test_{_LIKE_PADDED}_rows_keep[{name}]"
    resume = f"{_MCORE}test_two_steps_and_two_more_are_four[{name}]"
    return (*ones, tp2, pp2, cp2, ep2, dp2, packed, visual, resume, "refused")


ROWS = {
    ("GPT", "Megatron-Bridge"): (
        *(_GPT + _ONE, AS_CORE, f"{_GPT}{_LAYOUT}[tp2]", f"{_GPT}{_LAYOUT}[pp2]", NOT_RUN, NOT_RUN),
        *(f"{_GPT}{_LAYOUT}[dp2]", f"{_GPT}test_packed_rows_of_text", NONE, _GPT + _SIX, NOT_RUN),
    ),
    ("Qwen2.5-VL", "Megatron-Bridge"): (
        *(_Q25 + _ONE, AS_CORE, f"{_Q25}{_LAYOUT}[tp2]", f"{_Q25}{_LAYOUT}[tp2 pp2]", MROPE, NO_EXPERTS),
        *(f"{_Q25}{_LAYOUT}[dp2]", f"{_Q25}test_{_LIKE_PADDED}_rows_keep"),
        *(f"{_Q25}test_visual_positions_of_packed_rows", _Q25 + _SIX, f"{_RECIPE}{_BASE}[qwen25 peft]"),
    ),
    ("Qwen3-VL", "Megatron-Bridge"): (
        *(_Q3 + _ONE, f"{_Q3}{_ORACLE}[qwen3-", f"{_Q3}{_LAYOUT}[tp2-", f"{_Q3}{_LAYOUT}[tp2 pp2-", MROPE, NO_EXPERTS),
        *(f"{_Q3}{_LAYOUT}[dp2-", _Q3 + _STEP, f"{_Q3}test_visual_positions_of_packed_rows", f"{_Q3}{_SIX}[qwen3]"),
        f"{_RECIPE}{_BASE}[qwen3 peft]",
    ),
    ("Qwen3-VL MoE", "Megatron-Bridge"): (
        *(f"{_Q3}test_keep_ratio_1_with_experts", f"{_Q3}{_ORACLE}[qwen3_moe-", NOT_RUN, NOT_RUN, MROPE),
        *(f"{_Q3}test_every_layout_of_experts_keeps_the_same_positions[dp2 ep2]",),
        *(f"{_Q3}test_every_layout_of_experts_keeps_the_same_positions[dp2]", f"{_Q3}test_packed_experts_keep"),
        *(f"{_Q3}test_half_of_the_visual_positions_are_kept[qwen3_moe]", f"{_Q3}{_SIX}[qwen3_moe]", NOT_RUN),
    ),
    ("Qwen2-VL", "mcore-bridge (`attach`)"): _mcore("qwen2"),
    ("Qwen2.5-VL", "mcore-bridge (`attach`)"): _mcore("qwen25"),
    ("Qwen3-VL", "mcore-bridge (`attach`)"): _mcore("qwen3"),
    ("InternVL (Hugging Face's format) over Qwen2", "mcore-bridge (`attach`)"): _mcore("internvl", NOT_RUN),
    ("InternVL (Hugging Face's format) over Qwen3", "mcore-bridge (`attach`)"): _mcore("internvl_qwen3", NOT_RUN),
    ("InternVL 2.5 to 3.5 (own format; a test tower)", "mcore-bridge (`attach`)"): _mcore("internvl_chat", NOT_RUN),
    ("LLaVA-OneVision 1.5 (a test tower)", "mcore-bridge (`attach`)"): _mcore("llava_onevision", NOT_RUN),
    ("GLM-4V, GLM-4.1V", "mcore-bridge (`attach`)"): _mcore("glm4v"),
    ("GLM-4.5V", "mcore-bridge (`attach`)"): _mcore("glm4v_moe", experts=True),
    ("Qwen2.5-VL", "ms-swift's trainer"): (
        *(_SWIFT + _ONE, "as in mcore-bridge", NOT_RUN, NOT_RUN, MROPE, NO_EXPERTS, NOT_RUN),
        *(
            f"{_SWIFT}test_sparse_steps_run_shorter",
            f"{_SWIFT}test_visual_positions",
            f"{_SWIFT}test_two_steps",
            "refused",
        ),
    ),
}

HEAD = """# Models, hosts and what was run

Written by `docs/models.py` from the results of `make test-frameworks`: on CPU and gloo, tiny models with random weights
in their host's own classes, Megatron's own layers in place of Transformer Engine's. *passed* means that all tests
behind the cell ran and passed; (n): tests behind the cell; –: does not apply. What no test runs says so. `python -m
regate_megatron doctor --model NAME_OR_FOLDER` answers for a model.

GPT, HybridModel and LLaVA in Megatron-LM's own scripts: [what is supported](../README.md#what-is-supported), held by
`tests/multiprocess`. The official recipes of Megatron-Bridge, Qwen2.5-VL 3B and Qwen3-VL 8B, SFT and PEFT, train
through its `finetune` with our callback alone: {recipes}.

"""

TAIL = """
*Oracle*: the same model at full length in which nobody reads what was left out; losses to 1e-6, gradients to 1e-5,
with 0, 1 and 3 dense layers. *Packed* rows keep what padded rows keep. *TP2+SP, PP2, CP2, EP2, DP2*: keep the positions
that one rank keeps. PP2 stands for TP2×PP2 where a picture is: plain Bridge, too, sends a tensor in PP2 alone that gloo
does not take.
*LoRA*: the frozen base, adapters off, is the teacher of its checkpoint, bit for bit; adapters of peft, as ms-swift
has them, are refused.

Not ours: Qwen3-VL of Megatron-Bridge, in TP2 with Megatron's own layers in it, trains otherwise than on one rank,
without ReGATE as with it (losses 1e-3 apart from the second step on;
`test_dense_steps_in_tp2_are_those_of_plain_bridge`): {upstream}.

## Refused, by model type

| model type | why |
|---|---|
{refused}
"""


def main(file: str) -> int:
    """Write the page; 1 where a cell's tests did not all pass."""
    results = [json.loads(line) for line in Path(file).read_text().splitlines()]
    wrong: list[str] = []

    def cell(name: str) -> str:
        if "::test_" not in name:
            return name
        found = [outcome for node, outcome in results if name in node]
        if not found or set(found) != {"passed"}:
            wrong.append(f"{name}: {found or 'did not run'}")
        return f"passed ({len(found)})"

    lines = [f"| family | host | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [f"| {family} | {host} | {' | '.join(map(cell, cells))} |" for (family, host), cells in ROWS.items()]
    refused = "\n".join(f"| `{kind}` | {why} |" for kind, why in REFUSED.items())
    head = HEAD.format(recipes=cell(_RECIPE + "test_"))
    tail = TAIL.format(upstream=cell(f"{_Q3}test_dense_steps_in_tp2"), refused=refused)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    (ROOT / "docs" / "models.md").write_text(head + "\n".join(lines) + "\n" + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
