"""Every refusal of the support table says what was given, what is allowed and what to change."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig

from regate_megatron.config import ReGateConfig
from regate_megatron.support import RULES, Setting, check_support


def _setting(config: dict | None = None, model: dict | None = None, args: dict | None = None, **chunk) -> Setting:
    """A GPTModel without weights (only its settings are looked at), with some settings changed after construction."""
    transformer = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
    for name, value in (model or {}).items():
        setattr(transformer, name, value)
    pattern = chunk.get("pattern")
    kind = HybridModel if pattern else GPTModel
    gpt = kind.__new__(kind)
    torch.nn.Module.__init__(gpt)
    gpt.config, gpt.position_embedding_type = transformer, chunk.get("position_embedding_type", "rope")
    gpt.hybrid_layer_pattern = pattern
    settings = ReGateConfig(**{"score": "student", **(config or {})})
    chunks, rows = [chunk.get("model_class", gpt)], chunk.get("micro_batch_size", 1)
    return Setting(chunks, settings, Namespace(**(args or {})), rows, chunk.get("is_multimodal", False))


def _other_model():
    module = torch.nn.Linear(1, 1)
    module.config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
    module.position_embedding_type = "rope"
    return module


REFUSED = {
    "another model class": ({"model_class": _other_model()}, "given Linear"),
    "as many dense layers as layers": ({"config": {"dense_layers": 4}}, "given 4 with 4 decoder layers"),
    "dense layers past the first stage": (
        {
            "config": {"dense_layers": 3},
            "model": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
        },
        "given 3 with 2 layers in the first pipeline chunk",
    ),
    "last layers dense behind pipeline stages": (
        {"config": {"dense_last_layers": 1}, "model": {"pipeline_model_parallel_size": 2}},
        "given 1 with 2 pipeline stages",
    ),
    "all layers dense": (
        {"config": {"dense_layers": 2, "dense_last_layers": 2}},
        "given 2 with --regate-dense-layers 2 of 4 decoder layers",
    ),
    "balanced budget with shared experts": (
        {"config": {"budget": "balanced"}, "model": {"expert_model_parallel_size": 4}},
        "given balanced with 4 ranks that share experts",
    ),
    "per-sample budget with stages": (
        {"config": {"budget": "per-sample"}, "model": {"pipeline_model_parallel_size": 2}},
        "given per-sample with 2 pipeline stages",
    ),
    "visual positions of a text model": (
        {"config": {"visual_keep_ratio": 0.25}},
        "given 0.25 for a language model by itself",
    ),
    "Mamba layers": ({"pattern": "M*-M*-"}, "given Mamba"),
    "layers of two kinds that carry state": ({"pattern": "GD|-E"}, "given sparse attention, gated delta net"),
    "more dense layers than the first segment": (
        {"pattern": "*-|*-", "config": {"dense_layers": 3}},
        "given 3 with 2 layers in the first pipeline chunk",
    ),
    "sinkhorn": ({"model": {"moe_router_load_balancing_type": "sinkhorn"}}, "given sinkhorn"),
    "quantile balancing among others": (
        {"model": {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}},
        "given quantile_balancing",
    ),
    "random routing": (
        {"model": {"moe_router_force_load_balancing": True}},
        "given moe_router_force_load_balancing=True",
    ),
    "expert capacity": ({"model": {"moe_expert_capacity_factor": 1.25}}, "given moe_expert_capacity_factor=1.25"),
    "capacity per expert rank": (
        {"model": {"moe_expert_rank_capacity_factor": 1.5}},
        "given moe_expert_rank_capacity_factor=1.5",
    ),
    "flex dispatcher": (
        {"model": {"num_moe_experts": 4, "moe_token_dispatcher_type": "flex"}},
        "given moe_token_dispatcher_type=flex",
    ),
    "paged stash": ({"model": {"moe_paged_stash": True}}, "given moe_paged_stash=True"),
    "positions of another kind": ({"position_embedding_type": "relative"}, "given relative"),
    "fused rope in latent attention": (
        {"model": {"multi_latent_attention": True, "apply_rope_fusion": True}},
        "given fused RoPE",
    ),
    "prediction depths in a layer pattern": ({"pattern": "*-*-/*-"}, "given 1 in the layer pattern"),
    "offloaded activations": ({"model": {"cpu_offloading": True}}, "given cpu_offloading=True"),
    "sliding window": ({"model": {"window_size": (128, 0)}}, "given window_size=(128, 0)"),
    "multi-token prediction": ({"model": {"mtp_num_layers": 1}}, "given mtp_num_layers=1"),
    "linear attention": ({"model": {"linear_attention_freq": 2}}, "given linear_attention_freq=2"),
    "FP4": ({"model": {"fp4": "e2m1"}}, "given fp4=e2m1"),
    "document masks with a teacher": (
        {"config": {"score": "regate", "teacher_load": "student"}, "args": {"reset_attention_mask": True}},
        "given --reset-attention-mask",
    ),
    "CUDA graphs": ({"model": {"cuda_graph_impl": "local"}}, "given cuda_graph_impl=local"),
    "old CUDA graph flag": ({"model": {"enable_cuda_graph": True}}, "given enable_cuda_graph=True"),
    "combined 1F1B": (
        {"model": {"overlap_moe_expert_parallel_comm": True}},
        "given overlap_moe_expert_parallel_comm=True",
    ),
    "TP overlap": ({"model": {"tp_comm_overlap": True}}, "given tp_comm_overlap=True"),
    "packed rows with fused rope": (
        {"args": {"sft": True}, "model": {"apply_rope_fusion": True}},
        "given --sft with fused RoPE",
    ),
    "packed rows of several with stages": (
        {"args": {"sft": True}, "model": {"pipeline_model_parallel_size": 2}, "micro_batch_size": 2},
        "given --sft with pipeline stages and micro-batch size 2",
    ),
    "documents with context parallelism": (
        {"args": {"dataloader_inter_document_masking": True}, "model": {"context_parallel_size": 2}},
        "given --dataloader-inter-document-masking with context parallelism",
    ),
    "hybrid context parallelism": ({"args": {"hybrid_context_parallel": True}}, "given --hybrid-context-parallel"),
    "adapters in the student as teacher": (
        {"config": {"score": "regate", "teacher_load": "student"}, "args": {"peft": "lora"}},
        "given student, which has adapters",
    ),
    "loss scaled per turn": ({"args": {"use_loss_scaling": True}}, "given --use-loss-scaling"),
    "mrope with context parallelism": (
        {"position_embedding_type": "mrope", "model": {"context_parallel_size": 2}},
        "given mrope with context parallelism",
    ),
    "FSDP": ({"args": {"use_megatron_fsdp": True}}, "given --use-megatron-fsdp"),
    "fused rope with two rows": (
        {"model": {"apply_rope_fusion": True}, "micro_batch_size": 2},
        "given fused RoPE with micro-batch size 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_given_allowed_and_change(name):
    options, given = REFUSED[name]
    supported, reason = check_support(_setting(**options))
    assert not supported
    assert reason.startswith("regate: ") and "\n" not in reason
    assert f": {given}; allowed " in reason and "; change " in reason


SUPPORTED = {
    "GPTModel": {},
    "hybrid of attention, MLP and experts": {"pattern": "*-|*E"},
    "hybrid of latent attention": {"pattern": "+-+-", "model": {"multi_latent_attention": True}},
    "dense layers first and last": {"config": {"dense_layers": 1, "dense_last_layers": 2}},
    "yarn": {"position_embedding_type": "yarn"},
    "mrope": {"position_embedding_type": "mrope"},
    "experts over ranks": {"model": {"num_moe_experts": 4, "expert_model_parallel_size": 2}},
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_model_is_not_refused(name):
    assert check_support(_setting(**SUPPORTED[name])) == (True, "")


def test_every_rule_is_tested():
    """A rule added without a case above that it is the first to refuse would go unnoticed."""

    def refusing(options: dict) -> int:
        setting = _setting(**options)
        return next(index for index, rule in enumerate(RULES) if rule.given(setting) is not None)

    tested = {refusing(options) for options, _ in REFUSED.values()}
    assert [rule.what for index, rule in enumerate(RULES) if index not in tested] == []
