"""Every refusal of the support table says what was given, what is allowed and what to change, by the names given."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
from argparse import Namespace

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from regate_megatron import ReGateError, attach, compat, support
from regate_megatron.config import ReGateConfig, flag
from regate_megatron.integrations.flags import run_of
from regate_megatron.support import RULES, Setting, check_support, hints
from regate_megatron.support.setting import Fields, flag_of


def _setting(config: dict | None = None, model: dict | None = None, args: dict | None = None, **chunk) -> Setting:
    """A GPTModel without weights (only its settings are looked at), with some settings changed after construction."""
    transformer = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, calculate_per_token_loss=True)
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
    flags = Namespace(**{"load": None, "save": None, "async_save": False, "micro_batch_size": rows, **(args or {})})
    run = run_of(flags, has_adapters=chunk.get("has_adapters", False))
    return Setting(chunks, settings, run, rows, chunk.get("is_multimodal", False))


def _other_model():
    module = torch.nn.Linear(1, 1)
    module.config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
    module.position_embedding_type = "rope"
    return module


def _layout(text: str, stages: int):
    return PipelineParallelLayerLayout(text, stages)


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
    "balanced budget with gathered experts": (
        {"config": {"budget": "balanced"}, "model": {"num_moe_experts": 4, "expert_model_parallel_size": 4}},
        "given balanced with allgather dispatch over several replicas",
    ),
    "per-sample budget with experts cut wider than the rest": (
        {"config": {"budget": "per-sample"}, "model": {"num_moe_experts": 4, "expert_tensor_parallel_size": 2}},
        "given per-sample with allgather dispatch over several replicas",
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
    "replayed routing": ({"model": {"moe_enable_routing_replay": True}}, "given moe_enable_routing_replay=True"),
    "experts padded to capacity": (
        {"model": {"moe_pad_expert_input_to_capacity": True}},
        "given moe_pad_expert_input_to_capacity=True",
    ),
    "a variant of attention": (
        {"model": {"experimental_attention_variant": "dsa"}},
        "given experimental_attention_variant=dsa",
    ),
    "layers offloaded": ({"model": {"cpu_offloading_num_layers": 2}}, "given cpu_offloading_num_layers=2"),
    "fine-grained offloading": (
        {"model": {"fine_grained_activation_offloading": True}},
        "given fine_grained_activation_offloading=True",
    ),
    "PyTorch's FSDP": ({"args": {"use_torch_fsdp2": True}}, "given --use-torch-fsdp2"),
    "no layer beside the embedding": (
        {
            "config": {"dense_layers": 1},
            "model": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": _layout("E|tt|tt|L", 4)},
        },
        "given 1 with 0 layers in the first pipeline chunk",
    ),
    "more dense layers than the first stage of a layout": (
        {
            "config": {"dense_layers": 3},
            "model": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": _layout("Ett|ttL", 2)},
        },
        "given 3 with 2 layers in the first pipeline chunk",
    ),
    "expert capacity": ({"model": {"moe_expert_capacity_factor": 1.25}}, "given moe_expert_capacity_factor=1.25"),
    "capacity per expert rank": (
        {"model": {"moe_expert_rank_capacity_factor": 1.5}},
        "given moe_expert_rank_capacity_factor=1.5",
    ),
    "flex dispatcher": (
        {"model": {"num_moe_experts": 4, "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "ncclep"}},
        "given moe_token_dispatcher_type=flex with ncclep",
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
    "multi-token prediction over context ranks": (
        {"model": {"mtp_num_layers": 1, "context_parallel_size": 2}},
        "given mtp_num_layers=1 with context parallelism",
    ),
    "multi-token prediction in a larger model": (
        {"model": {"mtp_num_layers": 1}, "is_multimodal": True},
        "given mtp_num_layers=1 in a multimodal model",
    ),
    "multi-token prediction on a stage of its own": (
        {
            "model": {
                "mtp_num_layers": 1,
                "pipeline_model_parallel_size": 3,
                "pipeline_model_parallel_layout": _layout("Ett|ttm|L", 3),
            }
        },
        "given mtp_num_layers=1 on a stage of their own",
    ),
    "linear attention": ({"model": {"linear_attention_freq": 2}}, "given linear_attention_freq=2"),
    "FP4": ({"model": {"fp4": "e2m1"}}, "given fp4=e2m1"),
    "document masks with a teacher": (
        {"config": {"score": "regate", "teacher_load": "student"}, "args": {"reset_attention_mask": True}},
        "given --reset-attention-mask",
    ),
    "one CUDA graph of a step": (
        {"model": {"cuda_graph_impl": "full_iteration"}},
        "given cuda_graph_impl=full_iteration",
    ),
    "one CUDA graph of a step by its old names": (
        {"model": {"enable_cuda_graph": True, "cuda_graph_scope": ["attn", "full_iteration"]}},
        "given full_iteration in cuda_graph_scope",
    ),
    "combined 1F1B": (
        {"model": {"overlap_moe_expert_parallel_comm": True}},
        "given overlap_moe_expert_parallel_comm=True",
    ),
    "TP overlap by fused operations": (
        {"model": {"tp_comm_overlap": True, "use_transformer_engine_op_fuser": True}},
        "given tp_comm_overlap=True with use_transformer_engine_op_fuser",
    ),
    "packed rows of several with stages": (
        {"args": {"sft": True}, "model": {"pipeline_model_parallel_size": 2}, "micro_batch_size": 2},
        "given --sft with pipeline stages and micro-batch size 2",
    ),
    "documents with context parallelism": (
        {"args": {"dataloader_inter_document_masking": True}, "model": {"context_parallel_size": 2}},
        "given --dataloader-inter-document-masking with context parallelism",
    ),
    "packed rows of pictures with sequence parallelism": (
        {"args": {"packing_buffer_size": 8}, "model": {"sequence_parallel": True}},
        "given --packing-buffer-size with sequence or context parallelism, where train.py forgets where samples start",
    ),
    "hybrid context parallelism": ({"args": {"hybrid_context_parallel": True}}, "given --hybrid-context-parallel"),
    "adapters in the student as teacher": (
        {"config": {"score": "regate", "teacher_load": "student"}, "has_adapters": True},
        "given student, whose adapters cannot be switched off",
    ),
    "loss scaled per turn": ({"args": {"use_loss_scaling": True}}, "given --use-loss-scaling"),
    "FSDP": ({"args": {"use_megatron_fsdp": True}}, "given --use-megatron-fsdp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_given_allowed_and_change(name):
    options, given = REFUSED[name]
    supported, reason = check_support(_setting(**options))
    assert not supported
    assert reason.startswith("regate: ") and "\n" not in reason
    assert f": {given}; allowed " in reason and "; change " in reason


# Names a refusal may use for what was given in another way than by one field or flag.
OTHER_NAMES = {
    "pattern": {"--hybrid-layer-pattern"},
    "position_embedding_type": {"--position-embedding-type"},
    "model_class": {"model class"},
    "micro_batch_size": {"--micro-batch-size"},
    "peft": {"--regate-teacher-load"},  # the adapters are wanted, the teacher is what can change
}


def _names_of(options: dict) -> set[str]:
    """Every name under which what a case gives could be changed."""
    names = {flag(name) for name in options.get("config", {})}
    for name in (*options.get("model", {}), *options.get("args", {}), *options):
        names |= OTHER_NAMES.get(name, set())
    for name in (*options.get("model", {}), *options.get("args", {})):
        names |= {name, flag_of(name)}
    return names


@pytest.mark.parametrize("name", REFUSED)
def test_what_to_change_is_named_as_it_was_given(name):
    options, _ = REFUSED[name]
    _, reason = check_support(_setting(**options))
    what = reason.removeprefix("regate: ").split(":")[0]
    change = reason.rpartition("; change ")[2]
    change = change.replace("it to", f"{what} to") if change.startswith("it to") else change
    assert [one for one in _names_of(options) if one in change], f"{reason} | {sorted(_names_of(options))}"


def _fields_of_rules() -> set[str]:
    modules = (support.decoder, support.training)
    fields = [value for module in modules for value in vars(module).values() if isinstance(value, Fields)]
    fields += [rule.find for rule in RULES if isinstance(rule.find, Fields)]
    return {name for one in fields for name in one.names}


def test_every_field_that_a_rule_looks_at_is_given_once():
    """A field that no case gives could be refused under another's name."""
    given = {name for options, _ in REFUSED.values() for name in options.get("model", {})}
    assert _fields_of_rules() - given == set()


def test_flags_that_refusals_name_are_megatron_s_own():
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {option for action in parser._actions for option in action.option_strings}
    fields = _fields_of_rules()
    of_others = {flag_of(name) for name in fields if not hasattr(TransformerConfig, name)}  # versions
    assert {flag_of(name) for name in fields} - known - of_others == set()
    changes = [check_support(_setting(**options))[1].rpartition("; change ")[2] for options, _ in REFUSED.values()]
    named = {word for change in changes for word in re.findall(r"--[a-z0-9-]+", change)}
    of_scripts = {"--use-packed-sequence", "--use-loss-scaling", "--spec", "--packing-buffer-size"}
    of_scripts |= {"--dataloader-inter-document-masking"}  # core 0.18 and 0.19
    ours = {"--regate", *(flag(one.name) for one in dataclasses.fields(ReGateConfig))}
    assert named - known - ours - of_scripts - of_others == set()


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (REFUSED["no layer beside the embedding"][0], "it to 0, or take another --pipeline-model-parallel-layout"),
        (
            REFUSED["more dense layers than the first stage of a layout"][0],
            "it to 2, or to a smaller number, or take another --pipeline-model-parallel-layout",
        ),
        (REFUSED["as many dense layers as layers"][0], "it to 3, or to a smaller number"),
        (REFUSED["dense layers past the first stage"][0], "it to 2, or to a smaller number, or take more layers"),
        (REFUSED["all layers dense"][0], "it to 1, or --regate-dense-layers to a smaller number"),
    ],
)
def test_a_refused_number_of_layers_comes_with_one_that_runs(options, change):
    _, reason = check_support(_setting(**options))
    assert f"; change {change}" in reason


SUPPORTED = {
    "GPTModel": {},
    "multi-token prediction": {"model": {"mtp_num_layers": 2}},
    "multi-token prediction beside the loss": {
        "model": {
            "mtp_num_layers": 2,
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": _layout("Etttt|mmL", 2),
        }
    },
    "hybrid of attention, MLP and experts": {"pattern": "*-|*E"},
    "hybrid of latent attention": {"pattern": "+-+-", "model": {"multi_latent_attention": True}},
    "dense layers first and last": {"config": {"dense_layers": 1, "dense_last_layers": 2}},
    "yarn": {"position_embedding_type": "yarn"},
    "mrope": {"position_embedding_type": "mrope"},
    "mrope cut over context ranks": {"position_embedding_type": "mrope", "model": {"context_parallel_size": 2}},
    "a last stage with the loss only": {
        "model": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": _layout("Et|t|tt|L", 4)},
    },
    "two dense layers before a short last stage": {
        "config": {"dense_layers": 2},
        "model": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": _layout("Ettt|tL", 2)},
    },
    "a window without an end": {"model": {"window_size": (-1, -1)}},
    "dealt rows with gathered experts": {
        "config": {"budget": "dealt"},
        "model": {"num_moe_experts": 4, "expert_model_parallel_size": 4},
    },
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


# ------------------------------------------------------------------------------------------ one layer unlike the rest


def _gpt() -> GPTModel:
    """A GPTModel of four layers, without a process group."""
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
    model = GPTModel.__new__(GPTModel)
    torch.nn.Module.__init__(model)
    model.config, model.position_embedding_type = config, "rope"
    model.decoder = _bare(TransformerBlock, config)
    model.decoder.layers = torch.nn.ModuleList(_layer(config) for _ in range(4))
    return model


def _bare(kind: type, config: TransformerConfig):
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.config = config
    return module


def _layer(config: TransformerConfig):
    layer = _bare(TransformerLayer, config)
    layer.self_attention = _bare(SelfAttention, config)
    layer.self_attention.core_attention = _bare(DotProductAttention, config)
    return layer


def _refusal(model, **options) -> str:
    settings = ReGateConfig(score="student")
    return check_support(Setting([model], settings, micro_batch_size=options.get("micro_batch_size", 1)))[1]


def test_layers_that_share_the_model_s_config_are_supported():
    assert _refusal(_gpt()) == ""


PER_LAYER = {
    "a window": ({"window_size": (16, 0)}, {}, "window_size=(16, 0)"),
    "expert capacity": ({"moe_expert_capacity_factor": 1.5}, {}, "moe_expert_capacity_factor=1.5"),
    "routing": ({"moe_router_load_balancing_type": "sinkhorn"}, {}, "sinkhorn"),
    "communication overlap": (
        {"tp_comm_overlap": True, "use_transformer_engine_op_fuser": True},
        {},
        "tp_comm_overlap=True with use_transformer_engine_op_fuser",
    ),
    "linear attention": ({"experimental_attention_variant": "gated_delta_net"}, {}, "experimental_attention_variant"),
}


@pytest.mark.parametrize("name", PER_LAYER)
@pytest.mark.parametrize("where", ["decoder.layers.2", "decoder.layers.2.self_attention"])
def test_a_copy_of_the_config_on_one_layer_is_looked_at(name, where):
    """As Step-3.5's provider sets a window: on copies of the config, one per layer; the model's own says nothing."""
    change, options, given = PER_LAYER[name]
    model = _gpt()
    module = model.get_submodule(where)
    module.config = copy.copy(model.config)
    assert _refusal(model, **options) == "", "a copy that changes nothing is no reason"
    for field, value in change.items():
        setattr(module.config, field, value)
    reason = _refusal(model, **options)
    assert f"given {given}" in reason and f" in {where}; allowed " in reason
    assert model.config.window_size is None


def test_a_window_given_to_one_kernel_past_every_config_is_found():
    model = _gpt()
    kernel = model.decoder.layers[3].self_attention.core_attention
    kernel.window_size = (-1, 0)  # as Transformer Engine keeps a causal mask
    assert _refusal(model) == ""
    kernel.window_size = (64, 0)
    assert "given window_size=(64, 0) in decoder.layers.3.self_attention.core_attention; " in _refusal(model)


def test_another_module_in_the_place_of_attention_is_found():
    model = _gpt()
    model.decoder.layers[1].self_attention = torch.nn.Linear(2, 2)
    reason = _refusal(model)
    assert "linear or experimental attention: given Linear in decoder.layers.1.self_attention; " in reason


@pytest.mark.parametrize("changes", [True, False])
def test_a_core_attention_that_runs_otherwise_is_found_and_one_that_is_only_built_otherwise_is_not(changes):
    """As Gemma 2's caps its scores, and Gemma 3's only chooses a window when it is built."""

    class OwnCore(DotProductAttention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

        if changes:

            def forward(self, query, *args, **kwargs):
                return super().forward(query * torch.arange(len(query))[:, None, None, None], *args, **kwargs)

    model = _gpt()
    model.decoder.layers[1].self_attention.core_attention.__class__ = OwnCore
    place = "given OwnCore in decoder.layers.1.self_attention.core_attention; "
    assert (place in _refusal(model)) if changes else _refusal(model) == ""


def test_a_layer_of_another_kind_is_found():
    class OwnLayer(TransformerLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states.cumsum(0), None

    model = _gpt()
    model.decoder.layers[2].__class__ = OwnLayer
    assert "model: given OwnLayer as layer; " in _refusal(model)


def test_queries_scaled_by_their_place_are_refused_where_the_scale_cannot_travel():
    """Ministral 3's, which counts places from 0 on every context rank."""
    name = "MinistralTEDotProductAttention"
    module = "megatron.bridge.models.ministral3.ministral3_provider"
    scaled = type(name, (DotProductAttention,), {"__module__": module, "__qualname__": name})
    model = _gpt()
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.__class__ = scaled
    assert _refusal(model) == ""
    model.config.context_parallel_size = 2
    assert "attention: given queries scaled by their place, with context parallelism" in _refusal(model)
    model.config.context_parallel_size, model.position_embedding_type = 1, "none"
    assert "attention: given queries scaled by their place, without the rotary table" in _refusal(model)
    model.config.fused_single_qkv_rope, model.position_embedding_type = True, "rope"
    assert "attention: given queries scaled by their place, with fused_single_qkv_rope" in _refusal(model)


def test_another_block_in_the_place_of_the_decoder_is_found():
    class OwnBlock(TransformerBlock):
        def forward(self, hidden_states):
            return hidden_states

    model = _gpt()
    model.decoder.__class__ = OwnBlock
    assert "model: given OwnBlock as decoder; " in _refusal(model)


# ----------------------------------------------------------------------------------------------------- known classes


def test_a_class_below_a_known_one_is_known_while_it_changes_nothing_that_runs():
    class Saved(GPTModel):
        def sharded_state_dict(self, *args, **kwargs):
            return {}

    class Run(GPTModel):
        def _preprocess(self, *args, **kwargs):
            return None

    class Mixed(torch.nn.Module):
        def forward(self):
            return None

    class Mixture(Mixed, GPTModel):
        pass

    for kind, known in ((GPTModel, True), (Saved, True), (Run, False), (Mixture, False), (torch.nn.Linear, False)):
        instance = kind.__new__(kind)
        assert compat.is_one_of(instance, support.decoder.LANGUAGE_MODELS) is known, kind


@pytest.mark.parametrize(
    ("chunks", "settings", "line"),
    [
        (torch.nn.Linear(1, 1), ReGateConfig(score="random"), r"given a Linear by itself; .* change it to \[model\]$"),
        ([], ReGateConfig(score="random"), r"given no chunk; .* change it to \[model\]$"),
        ([torch.nn.Linear(1, 1)], {"score": "random"}, r"given settings of type dict; .* change them to ReGateConfig"),
        (
            [torch.nn.Linear(1, 1)],
            ReGateConfig(score="random"),
            "given a process without parallel state; .* that first$",
        ),
    ],
    ids=["no list", "no chunk", "no settings", "too early"],
)
def test_attach_refuses_in_one_line_what_it_is_not_given_rightly(chunks, settings, line):
    with pytest.raises(ReGateError, match=f"^regate: attach: {line}"):
        attach(chunks, settings)


# ------------------------------------------------------------------------------------------------------------- hints


def test_context_parallelism_without_the_loss_per_token_is_told():
    with_cp = {"context_parallel_size": 2, "calculate_per_token_loss": False}
    (line,) = hints(_setting(model=with_cp))
    assert "--calculate-per-token-loss" in line
    assert hints(_setting(model={**with_cp, "calculate_per_token_loss": True})) == []
    assert hints(_setting()) == []


def test_targets_left_out_without_the_loss_per_token_are_told():
    (line,) = hints(_setting(model={"calculate_per_token_loss": False}))
    assert line.startswith("--calculate-per-token-loss is off")
    assert hints(_setting(model={"calculate_per_token_loss": True})) == []


@pytest.mark.parametrize(("backend", "named"), [(None, "deepep"), ("hybridep", "hybridep")])
def test_the_flex_dispatcher_is_taken_and_told_to_be_unproven(backend, named):
    flex = {"num_moe_experts": 4, "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    assert check_support(_setting(model=flex)) == (True, "")
    (line,) = hints(_setting(model=flex))
    assert f"the flex dispatcher ({named}) was never run" in line


@pytest.mark.parametrize(
    "graphs",
    [
        {"cuda_graph_impl": "local"},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "attn,moe_router"},
        {"enable_cuda_graph": True},
        {"external_cuda_graph": True},
    ],
)
def test_cuda_graphs_of_layers_are_taken_and_told_to_be_unproven(graphs):
    assert check_support(_setting(model=graphs)) == (True, "")
    (line,) = hints(_setting(model=graphs))
    assert "on in dense steps, off in sparse ones" in line and "never run with ReGATE, for want of a GPU" in line


def test_overlap_of_tensor_parallel_communication_is_taken_and_told_to_be_unproven():
    overlaps = {"tp_comm_overlap": True}
    assert check_support(_setting(model=overlaps)) == (True, "")
    (line,) = hints(_setting(model=overlaps))
    assert "off where sequences are short" in line and "never run with ReGATE, for want of a GPU" in line
