"""The claim of test_parity for other decoders: positions, latent attention, experts, hybrid models, frozen parts."""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, parameters

YARN = {"yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 8, "yarn_beta_fast": 32.0}
YARN |= {"yarn_beta_slow": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
YARN |= {"yarn_correction_range_round_to_int": True}
MLA = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16}
MLA |= {"rotary_scaling_factor": 8.0, "original_max_position_embeddings": 8, "qk_layernorm": True}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
AUX = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"], "moe_z_loss_coeff": 1e-2}
AUX |= {"moe_aux_loss_coeff": [1e-2, 1e-2, 1e-2]}
MROPE = {"mrope_section": [2, 1, 1]}
BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


def _mla(name: str, **options) -> dict:
    return case(name, mla=True, config={**MLA, **options.pop("config", {})}, **options)


def _moe(name: str, **options) -> dict:
    return case(name, config={**MOE, **options.pop("config", {})}, **options)


def _hybrid(name: str, pattern: str, **options) -> dict:
    return case(name, model="hybrid", pattern=pattern, **options)


POSITIONS = [
    case("yarn", positions="yarn", set=YARN),
    case("rope-scaling-share", gpt={"rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_percent": 0.5}),
    case("rope-interleaved", config={"rotary_interleaved": True}),
    case("rope-not-in-every-layer", config={"no_rope_freq": [0, 1, 0, 1]}),
    case("mrope", positions="mrope", config=MROPE),
    case("mrope-last1", positions="mrope", dense_last=1, config=MROPE),
    case("mrope-n0", positions="mrope", dense_layers=0, config=MROPE),
    *(case(f"mrope-n{n}-by4", positions="mrope", dense_layers=n, config=MROPE, multiple=4) for n in (0, 1)),
    case("mrope-last1-by4", positions="mrope", dense_last=1, config=MROPE, multiple=4),
    case("none", positions="none"),
]
FUSED = {"apply_rope_fusion": True}
WITH_KERNELS = [  # which take one row of positions, or count them themselves
    case("fused", set=FUSED, multiple=2),
    case("fused-n0-uniform", set=FUSED, dense_layers=0, recompute="uniform"),
    case("fused-last1-one-row", set=FUSED, dense_last=1, rows=1),
    case("fused-packed", set=FUSED, packed=True, rows=1, budget="per-sample"),
    case("fused-llava", set=FUSED, model="llava", visual="pad"),
]
SCALED = [  # queries by their place, past a maximum of five positions, as Ministral 3 has it
    case("scaled", scaled=True, multiple=2),
    case("scaled-yarn-n0-uniform", scaled=True, positions="yarn", set=YARN, dense_layers=0, recompute="uniform"),
    case("scaled-last1-core", scaled=True, dense_last=1, recompute="core_attn"),
    case("scaled-packed", scaled=True, packed=True, rows=1, budget="per-sample"),
]
LATENT = [
    _mla("mla-yarn", config={"rope_type": "yarn"}, multiple=2),
    _mla("mla-rope-uniform", config={"rope_type": "rope"}, recompute="uniform"),
    _mla(
        "mla-yarn-no-q-lora-block",
        config={"q_lora_rank": None, "qk_layernorm": False},
        recompute="block",
        dense_layers=0,
    ),
    _mla("mla-yarn-last1", config={"rope_type": "yarn"}, dense_last=1, recompute="uniform"),
    _mla("mla-up-proj", recompute="mla_up_proj+core_attn"),
    _mla("mla-moe", config=MOE),
]
EXPERTS = [
    _moe("moe"),
    _moe("moe-forgets", forgets=True),
    _moe("moe-llava", model="llava"),
    _moe("moe-n0-uniform", dense_layers=0, recompute="uniform", config=AUX, aux=True),
    _moe("moe-aux", config=AUX, aux=True, multiple=5),
    _moe("moe-bias-alltoall", config={**BIAS, "moe_token_dispatcher_type": "alltoall"}, multiple=10),
    _moe(
        "moe-shared-frequency",
        config={"moe_shared_expert_intermediate_size": 32, "moe_layer_freq": [0, 1, 0, 1]},
        multiple=2,
    ),
    _moe("moe-last1-aux", config=AUX, aux=True, multiple=5, dense_last=1),
    _moe("moe-last1-bias", config=BIAS, multiple=5, dense_last=1),
    _moe("moe-selective", config=AUX, aux=True, recompute="moe+core_attn"),
]
HYBRID = [
    _hybrid("hybrid", "*-*-"),
    _hybrid("hybrid-last1", "*-*-", dense_last=1, recompute="uniform"),
    _hybrid("hybrid-n2-uniform", "*-*-", dense_layers=2, recompute="uniform"),
    _hybrid("hybrid-n0-block", "*-*-", dense_layers=0, recompute="block"),
    _hybrid("hybrid-moe", "*E*E", config={**MOE, **AUX}, aux=True, multiple=5),
    _hybrid("hybrid-mla", "+-+-", mla=True, config=MLA),
    _hybrid("hybrid-yarn-tied", "*-*-", positions="yarn", set=YARN, tied=True),
]
FROZEN = [
    *(
        case(f"frozen-{part}-{method or 'plain'}", model="llava", frozen=names, recompute=method)
        for part, names in {
            "language": ["language_model"],
            "vision": ["vision_model"],
            "all-but-projection": ["language_model", "vision_model"],
        }.items()
        for method in (None, "uniform")
    ),
    case("selective-core", recompute="core_attn"),
    # Without biases: Megatron's checkpoint returns the bias of an MLP as an output, and its backward never ends.
    case("selective-mlp-llava", model="llava", recompute="core_attn+mlp", config={"add_bias_linear": False}),
]
ONE_RANK = [*POSITIONS, *WITH_KERNELS, *SCALED, *LATENT, *EXPERTS, *HYBRID, *FROZEN]
FOUR_RANKS = [
    case("scaled@tp2-sp-pp2", scaled=True, tp=2, sp=True, pp=2, multiple=2),
    case("fused@tp2-sp-pp2", set=FUSED, tp=2, sp=True, pp=2, multiple=2),
    case("yarn@tp2-pp2", positions="yarn", set=YARN, tp=2, pp=2),
    case("mrope@tp2-pp2", positions="mrope", config=MROPE, tp=2, pp=2),
    case("mrope-n1-by4@tp2-sp-cp2", positions="mrope", config=MROPE, multiple=4, tp=2, sp=True, cp=2),
    case("mrope-n0-by4@cp2-pp2", positions="mrope", config=MROPE, multiple=4, dense_layers=0, cp=2, pp=2),
    case("mrope-last1-by4@cp2-dp2", positions="mrope", config=MROPE, multiple=4, dense_last=1, cp=2),
    _mla("mla-yarn@tp2-sp-pp2", config={"rope_type": "yarn"}, tp=2, pp=2, sp=True, multiple=2),
    _mla("mla-rope-uniform@tp2-pp2", config={"rope_type": "rope"}, recompute="uniform", tp=2, pp=2),
    _moe("moe@ep4", ep=4),
    _moe("moe-forgets@ep2-pp2", ep=2, pp=2, forgets=True),
    _moe("moe-n0-uniform@ep2-pp2", dense_layers=0, recompute="uniform", config=AUX, aux=True, ep=2, pp=2),
    _moe(
        "moe-bias-alltoall@tp2-sp-ep2",
        config={**BIAS, "moe_token_dispatcher_type": "alltoall"},
        tp=2,
        sp=True,
        ep=2,
        etp=1,
        multiple=10,
    ),
    _moe(
        "moe-shared-frequency@tp2-sp-ep2-etp2",
        config={"moe_shared_expert_intermediate_size": 32, "moe_layer_freq": [0, 1, 0, 1]},
        tp=2,
        sp=True,
        ep=2,
        etp=2,
        multiple=2,
    ),
    _moe("moe-llava@ep2", model="llava", ep=2),
    _hybrid("hybrid@tp2-pp2", "*-|*-", tp=2, pp=2),
    _hybrid("hybrid-moe@ep2-pp2", "*E|*E", config={**MOE, **AUX}, aux=True, ep=2, pp=2, multiple=5),
    case("frozen-language-uniform@tp2-pp2", model="llava", frozen=["language_model"], recompute="uniform", tp=2, pp=2),
]
one_rank = launched(1, ONE_RANK)
four_ranks = launched(4, FOUR_RANKS)


@pytest.mark.parametrize("name", parameters(ONE_RANK))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", parameters(FOUR_RANKS))
def test_sparse_step_equals_masked_dense_step_in_layout(four_ranks, name):
    assert_exact(four_ranks[name])


@pytest.mark.parametrize("name", parameters(FOUR_RANKS))
def test_layout_keeps_the_same_positions(one_rank, four_ranks, name):
    assert_keeps_the_same(one_rank[name.split("@")[0]], four_ranks[name], 8)
