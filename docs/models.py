"""Write docs/models.md: which family of models, in which host, with what; every cell from one run of the tests.

    REGATE_TEST_RESULTS=out/frameworks.jsonl make test-frameworks && python docs/models.py out/frameworks.jsonl

A cell names tests. It reads "passed" where all of them ran and passed, else the program stops and names them; what is
refused says why.
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
NONE = "–"
BROKEN, NO_EXPERTS, AS_CORE = "refused, broken in plain Bridge", NONE, "as in Megatron-LM"
_GPT, _Q25, _Q3 = "test_megatron_bridge.py::", "test_qwen_vl.py::", "test_qwen3_vl.py::"
_FAMILY, _MIMO, _BITS = "test_bridge_families.py::", "test_parity_mimo.py::", "test_bitwise.py::"
_RECIPE, _MCORE, _SWIFT = "test_recipes.py::", "test_mcore_bridge.py::", "test_ms_swift.py::"
_LAYOUT, _SIX = "test_every_layout_keeps_the_same_positions", "test_three_steps_and_three_more_are_six"
_ONE, _ORACLE = "test_keep_ratio_1_trains_bit_for_bit_as_without", "test_a_sparse_step_is_the_masked_full_length_step"
_STEP, _LIKE_PADDED = (
    "test_rows_packed_by_the_step_or_the_collator_keep_what_padded_rows_keep",
    "packed_rows_keep_what_padded",
)
_EXPERTS = "test_every_layout_of_experts_keeps_the_same_positions"
_CONTEXT = "test_context_ranks_keep_what_one_rank_keeps"
_BASE = "test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint"


def _mcore(name: str, *, experts: bool = False) -> tuple[str, ...]:
    ep2 = f"{_MCORE}test_expert_parallel_ranks_keep_the_same_positions[{name}]" if experts else NO_EXPERTS
    tp2, pp2, dp2 = (f"{_MCORE}{_LAYOUT}[{name}-{layout}]" for layout in ("tp2", "pp2", "dp2"))
    cp2 = f"{_MCORE}{_CONTEXT}[{name}-"
    visual = f"{_MCORE}test_visual_positions_of_packed_rows_are_those_of_padded_rows[{name}]"
    ones = f"{_MCORE}{_ONE}[{name}-", f"{_MCORE}{_ORACLE}[{name}-"
    packed = f"{_MCORE}test_{_LIKE_PADDED}_rows_keep[{name}]"
    resume = f"{_MCORE}test_two_steps_and_two_more_are_four[{name}]"
    lora = f"{_MCORE}test_the_frozen_base_is_the_teacher_that_the_model_without_adapters_is[{name}]"
    return (*ones, tp2, pp2, cp2, ep2, dp2, packed, visual, resume, lora)


def _swift(name: str, packed: str) -> tuple[str, ...]:
    ones = f"{_SWIFT}{_ONE}[{name} full]", "as in mcore-bridge"
    visual = f"{_SWIFT}test_every_sample_keeps_half_of_its_targets_and_of_its_picture[{name} full]"
    full, lora = (f"{_SWIFT}test_two_steps_and_two_more_are_four[{name} {tuner}]" for tuner in ("full", "lora"))
    tp2, pp2, dp2 = (f"{_SWIFT}{_LAYOUT}[{name}-{to}]" for to in ("tp2", "pp2", "dp2"))
    cp2 = f"{_SWIFT}{_CONTEXT}[{name}]"
    return (*ones, tp2, pp2, cp2, NO_EXPERTS, dp2, _SWIFT + packed, visual, full, lora)


def _bridge(name: str, packed: str, ep2: str) -> tuple[str, ...]:
    """A family of test_bridge_families.py."""
    layouts = [f"{_FAMILY}{_LAYOUT}[{name}-{layout}]" for layout in ("tp2", "tp2 pp2", "dp2")]
    visual = f"{_FAMILY}test_visual_positions_of_packed_rows_are_those_of_padded_rows[{packed}]"
    ones = f"{_FAMILY}{_ONE}[{name}]", f"{_FAMILY}{_ORACLE}[{name}-"
    rows = f"{_FAMILY}test_{_LIKE_PADDED}_rows_keep[{packed}-"
    resume, lora = f"{_FAMILY}{_SIX}[{name}]", f"{_FAMILY}{_BASE}[{name}]"
    return (*ones, *layouts[:2], BROKEN, ep2, layouts[2], rows, visual, resume, lora)


_MIMO_LAYOUT = f"{_MIMO}test_layout_keeps_the_positions_of_one_rank_and_is_exact"
_MIMO_RESUMES = "test_session.py::test_claim_holds[own_loop_of_mimo_continues_what_it_saved]"

ROWS = {
    ("GPT", "Megatron-Bridge"): (
        *(_GPT + _ONE, AS_CORE, f"{_GPT}{_LAYOUT}[tp2]", f"{_GPT}{_LAYOUT}[pp2]", _GPT + _CONTEXT, NO_EXPERTS),
        *(f"{_GPT}{_LAYOUT}[dp2]", f"{_GPT}test_packed_rows_of_text", NONE, _GPT + _SIX, _GPT + _BASE),
    ),
    ("Qwen2.5-VL", "Megatron-Bridge"): (
        *(
            _Q25 + _ONE,
            f"{_Q25}test_a_sparse_step_over_pictures",
            f"{_Q25}{_LAYOUT}[tp2]",
            f"{_Q25}{_LAYOUT}[tp2 pp2]",
            BROKEN,
            NO_EXPERTS,
        ),
        *(f"{_Q25}{_LAYOUT}[dp2]", f"{_Q25}test_{_LIKE_PADDED}_rows_keep"),
        *(f"{_Q25}test_visual_positions_of_packed_rows", _Q25 + _SIX, f"{_RECIPE}{_BASE}[qwen25 peft]"),
    ),
    ("Qwen3-VL", "Megatron-Bridge"): (
        *(_Q3 + _ONE, f"{_Q3}{_ORACLE}[qwen3-", f"{_Q3}{_LAYOUT}[tp2-", f"{_Q3}{_LAYOUT}[tp2 pp2-"),
        *(_Q3 + _CONTEXT, NO_EXPERTS),
        *(f"{_Q3}{_LAYOUT}[dp2-", _Q3 + _STEP, f"{_Q3}test_visual_positions_of_packed_rows", f"{_Q3}{_SIX}[qwen3]"),
        f"{_RECIPE}{_BASE}[qwen3 peft]",
    ),
    ("Qwen3-VL MoE", "Megatron-Bridge"): (
        *(
            f"{_Q3}test_keep_ratio_1_with_experts",
            f"{_Q3}{_ORACLE}[qwen3_moe-",
            f"{_Q3}{_EXPERTS}[tp2]",
            f"{_Q3}{_EXPERTS}[pp2]",
            f"{_Q3}test_context_ranks_of_experts_keep_what_one_rank_keeps",
        ),
        *(f"{_Q3}{_EXPERTS}[dp2 ep2]",),
        *(f"{_Q3}{_EXPERTS}[dp2]", f"{_Q3}test_packed_experts_keep"),
        *(f"{_Q3}test_half_of_the_visual_positions_are_kept[qwen3_moe]", f"{_Q3}{_SIX}[qwen3_moe]", _Q3 + _BASE),
    ),
    ("GLM-4.5V", "Megatron-Bridge"): _bridge("glm", "glm", f"{_FAMILY}{_LAYOUT}[glm-dp2 ep2]"),
    ("Ministral 3", "Megatron-Bridge"): _bridge("ministral", "ministral_short", NO_EXPERTS),
    ("LLaVA", "MIMO of Megatron-LM (`attach`)"): (
        *(f"{_BITS}test_steps_of_mimo_at_keep_ratio_one", f"{_MIMO}test_sparse_step_equals_masked_dense_step["),
        *(f"{_MIMO_LAYOUT}[targets-n1@tp2-sp]", "refused (MIMO has none on shared ranks)"),
        *(f"{_MIMO_LAYOUT}[targets-n1@cp2]", NO_EXPERTS, f"{_MIMO_LAYOUT}[targets-n1@dp2]"),
        *(f"{_MIMO}test_packed_rows_keep_what_rows_of_their_own_keep[", f"{_MIMO_LAYOUT}[visual-n1@"),
        *(_MIMO_RESUMES, NONE),
    ),
    ("Qwen2-VL", "mcore-bridge (`attach`)"): _mcore("qwen2"),
    ("Qwen2.5-VL", "mcore-bridge (`attach`)"): _mcore("qwen25"),
    ("Qwen3-VL", "mcore-bridge (`attach`)"): _mcore("qwen3"),
    ("Qwen3-VL MoE", "mcore-bridge (`attach`)"): _mcore("qwen3_moe", experts=True),
    ("InternVL (Hugging Face's format) over Qwen2", "mcore-bridge (`attach`)"): _mcore("internvl"),
    ("InternVL (Hugging Face's format) over Qwen3", "mcore-bridge (`attach`)"): _mcore("internvl_qwen3"),
    ("InternVL 2.5 to 3.5 (own format; a test tower)", "mcore-bridge (`attach`)"): _mcore("internvl_chat"),
    ("LLaVA-OneVision 1.5 (a test tower)", "mcore-bridge (`attach`)"): _mcore("llava_onevision"),
    ("GLM-4V, GLM-4.1V", "mcore-bridge (`attach`)"): _mcore("glm4v"),
    ("GLM-4.5V", "mcore-bridge (`attach`)"): _mcore("glm4v_moe", experts=True),
    ("Kimi-VL (a test tower)", "mcore-bridge (`attach`)"): _mcore("kimi", experts=True),
    ("Kimi-K2.5, pictures (a test tower)", "mcore-bridge (`attach`)"): _mcore("kimi_k25", experts=True),
    ("Qwen2.5-VL", "ms-swift's command line"): _swift("qwen25", "test_padded_rows_keep_what_packed_ones_keep"),
    ("Qwen3-VL", "ms-swift's command line"): _swift("qwen3", "test_sparse_steps_run_shorter[qwen3 full]"),
}

HEAD = """# Models, hosts and what was run

Written by `docs/models.py` from the results of `make test-frameworks`: on CPU and gloo, tiny models with random weights
in their host's own classes, Megatron's own layers in place of Transformer Engine's. *passed* means that all tests
behind the cell ran and passed; (n): tests behind the cell; –: does not apply. `python -m regate_megatron doctor --model
NAME_OR_FOLDER` answers for a model.

GPT, HybridModel and LLaVA in Megatron-LM's own scripts: [what is supported](../README.md#what-is-supported), held by
`tests/multiprocess`. The official recipes of Megatron-Bridge, Qwen2.5-VL 3B and Qwen3-VL 8B, SFT and PEFT, train
through its `finetune` with our callback alone: {recipes}.

"""

TAIL = """
*Oracle*: the same model at full length in which nobody reads what was left out; losses to 1e-6, gradients to 1e-5, with
0, 1 and 3 dense layers. *Packed* rows keep what padded rows keep. *TP2+SP, PP2, CP2, EP2, DP2*: keep the positions that
one rank keeps. PP2 stands for TP2×PP2 in Megatron-Bridge for Qwen2.5-VL, of which plain Bridge, too, sends a tensor in
PP2 alone that gloo does not take, dense Qwen3-VL, GLM-4.5V and Ministral 3. *Ministral 3* runs past its original
maximum, from where on queries are scaled by their place; packed, it ends before: Bridge counts the places of a packed
row through all its samples.
*LoRA*: the frozen base, adapters off, is the teacher that its checkpoint, or the model without adapters, is, bit for
bit. Adapters of mcore-bridge (peft's) hold the other columns, too, on layers, experts and routers (in TP2 those of
routers train otherwise than on one rank, without ReGATE, too: {routers}); ms-swift's command line trains and resumes
them. Megatron-LM, MIMO in it, has no adapters.

Not ours: under context parallelism Qwen2.5-VL and GLM-4.5V of Megatron-Bridge give every rank the whole row with its
own part of the rotary table, and fail: {qwen25_cp}, {glm_cp}; Ministral 3 counts places from 0 on each: {ministral_cp}.
Qwen3-VL of mcore-bridge fails there in rows that are padded, several to a microbatch, with pictures in others than the
first ({qwen3_cp}, of all families): take packed rows. Without context parallelism it adds features of one picture to
another there: {qwen3_padded}.

Nor is this: Qwen3-VL of Megatron-Bridge, in TP2 with Megatron's own layers in it, trains otherwise than on one rank,
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
    broken = cell(f"{_Q25}test_plain_bridge_itself_cannot_run_it_on_two_context_ranks")
    padded = cell(f"{_SWIFT}test_plain_ms_swift_itself_mixes_up_the_pictures_of_padded_rows_of_qwen3")
    upstream = cell(f"{_Q3}test_dense_steps_in_tp2")
    routers = cell(f"{_MCORE}test_adapters_of_routers_train_otherwise_in_tp2_without_regate")
    not_ours = {"qwen25_cp": broken, "qwen3_padded": padded, "upstream": upstream, "routers": routers}
    not_ours["glm_cp"] = cell(f"{_FAMILY}test_plain_bridge_itself_cannot_run_glm_on_two_context_ranks")
    not_ours["qwen3_cp"] = cell(f"{_MCORE}test_plain_mcore_bridge_fails_over_two_padded_pictures_of_qwen3")
    not_ours["ministral_cp"] = cell(f"{_FAMILY}test_plain_bridge_itself_scales_queries_of_ministral")
    tail = TAIL.format(**not_ours, refused=refused)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    (ROOT / "docs" / "models.md").write_text(head + "\n".join(lines) + "\n" + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
