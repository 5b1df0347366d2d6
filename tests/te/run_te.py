"""Worker of test_te_specs: claims about Transformer Engine's side of what the hooks rely on; no kernel runs.

Without a GPU Transformer Engine imports and builds modules, so names, signatures and attributes are checked on real
ones. What needs a kernel (forward, FP8) is checked nowhere here.

    torchrun --nproc-per-node 1 tests/te/run_te.py CLAIM [CLAIM ...]
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
from unittest import mock

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import transformer_engine.pytorch as te
from megatron.core import recompute, tensor_parallel
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_recipe
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_transformer_engine_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig, transformer_block
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.module import base as te_base
from transformer_engine.pytorch.module import layernorm_linear as te_layernorm_linear
from transformer_engine.pytorch.module import linear as te_linear

from regate_megatron import ReGateConfig, attach, describe, detach
from regate_megatron.api import session_of
from regate_megatron.decoder import CurrentMicrobatch, DecoderHook, Hooks, Layout, shard_plans
from regate_megatron.decoder.compaction import LayerRange
from regate_megatron.method.plan import MicrobatchPlan
from regate_megatron.teacher import build_teacher
from regate_megatron.teacher.build import random_state_untouched
from tests.claims import check

LAYERS, HIDDEN, VOCAB, TEXT = 4, 32, 64, 24
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def settings(**options) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        **options,
    )


def gpt(**options) -> GPTModel:
    config, spec = settings(**options), get_gpt_layer_with_transformer_engine_spec()
    return GPTModel(config, spec, VOCAB, TEXT, position_embedding_type="rope").bfloat16()


def llava() -> LLaVAModel:
    spec = decoder_model_with_transformer_engine_default_spec()
    vision = settings()
    vision.vision_model_type = "clip"
    return LLaVAModel(
        language_transformer_config=settings(),
        language_transformer_layer_spec=spec,
        language_vocab_size=VOCAB,
        language_max_sequence_length=TEXT,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_transformer_engine_spec(),
        drop_vision_class_token=True,
        vision_projection_config=settings(ffn_hidden_size=HIDDEN),
        vision_projection_layer_spec=get_submodules(spec.submodules.mlp),
        language_position_embedding_type="rope",
        img_h=16,
        img_w=16,
        patch_dim=8,
    )


def attach_keeps_names(model: torch.nn.Module) -> None:
    """Attach, look, detach; hooks come and go, no name changes."""
    names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    attach([model], ReGateConfig(score="regate", teacher_load="student"), pad_token=0)
    session = session_of([model])
    assert "compacts after 1 dense layers" in describe([model])
    hook = session.hooks.decoders[0]
    assert [layer.layer_number for layer in hook.dense.layers + hook.short.layers] == [1, 2, 3, 4]
    assert hook.dense.final_layernorm is None and hook.short.final_layernorm is hook.block.final_layernorm
    assert list(model.state_dict()) == names and [name for name, _ in model.named_parameters()] == parameters
    session.prepare(2)
    assert all("transformer_engine" in str(type(x.self_attention.core_attention).__mro__) for x in hook.short.layers)
    detach([model])
    assert "forward" not in vars(hook.block) and describe([model]) == "regate is not attached"


def gpt_of_te_layers_is_attached() -> None:
    model = gpt()
    layer = model.decoder.layers[0]
    assert isinstance(layer.self_attention.linear_qkv, extensions.TELayerNormColumnParallelLinear)
    assert isinstance(layer.self_attention.core_attention, extensions.TEDotProductAttention)
    assert isinstance(layer.mlp.linear_fc2, extensions.TERowParallelLinear)
    attach_keeps_names(model)


def llava_of_te_layers_is_attached() -> None:
    attach_keeps_names(llava())


def final_norm_is_te_s_own() -> None:
    """Megatron makes its output viewless; the short range must be the one that has it."""
    norm = gpt().decoder.final_layernorm
    assert isinstance(norm, (te.LayerNorm, te.RMSNorm)), type(norm)


def forward_of_the_block_has_the_hook_s_parameters() -> None:
    names = list(inspect.signature(transformer_block.TransformerBlock.forward).parameters)
    assert names[:3] == ["self", "hidden_states", "attention_mask"], names
    assert {"rotary_pos_emb", "packed_seq_params", "padding_mask", "attention_bias"} <= set(names), names


def layers_get_all_by_keyword() -> None:
    names = set(inspect.signature(TransformerLayer._forward_attention).parameters)
    assert {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params", "padding_mask"} <= names, names


def te_attention_takes_what_megatron_passes() -> None:
    names = list(inspect.signature(extensions.TEDotProductAttention.forward).parameters)[1:]
    first = ["query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"]
    assert names[: len(first)] == first, names


def te_recompute_saves_positional_arguments() -> None:
    """FP8 recompute is TE's; what a layer needs must come as a positional tensor after these four."""
    names = list(inspect.signature(extensions.te_checkpoint).parameters)
    expected = ["forward_func", "distribute_saved_activations", "get_rng_state_tracker", "tp_group", "args", "kwargs"]
    assert names == expected, names
    assert recompute.te_checkpoint is extensions.te_checkpoint


# What TransformerBlock.forward and its recompute read of the block. A range has its own of the first; the rest is the
# block's. A name that appears here later must be thought about, so the sets are closed.
OF_THE_RANGE = {"layers", "num_layers_per_pipeline_rank", "pre_process", "final_layernorm", "config"}
OF_THE_BLOCK = {
    "pg_collection",
    "vp_stage",
    "input_tensor",
    "training",
    "offload_context",
    "group_prefetch_offload_commit_async",
}


def layer_ranges_have_all_that_the_block_s_forward_reads() -> None:
    block = gpt().decoder
    read = set()
    for function in (transformer_block.TransformerBlock.forward, recompute.checkpointed_forward):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                read.add(node.attr)
    assert read <= OF_THE_RANGE | OF_THE_BLOCK, f"think about {read - OF_THE_RANGE - OF_THE_BLOCK}"
    block.input_tensor = torch.zeros(1)
    view = LayerRange(block, 1, LAYERS, takes_input=False, is_end=True)
    assert vars(view).keys() >= OF_THE_RANGE
    for name in OF_THE_BLOCK:
        assert getattr(view, name) is getattr(block, name), name
    block.eval()
    assert view.training is False


def lengths_are_aligned_as_te_asks() -> None:
    for recipe in RECIPES:
        ours = get_fp8_align_size(recipe)
        theirs = quantization.get_align_size_for_quantization(get_fp8_recipe(settings(fp8="hybrid", fp8_recipe=recipe)))
        assert ours % theirs == 0, f"{recipe}: {ours} where TE asks for {theirs}"


def te_s_own_check_of_fp8_lengths_is_met() -> None:
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    for recipe in RECIPES:
        assert_dim_for_fp8_exec(torch.empty(get_fp8_align_size(recipe), 1, HIDDEN))
    with contextlib.suppress(ValueError):
        assert_dim_for_fp8_exec(torch.empty(7, 1, HIDDEN))
        raise AssertionError("TE took 7 positions")


def first_and_last_layers_are_told_by_their_global_number() -> None:
    """``first_last_layers_bf16`` asks for the layer's own number, so a range does not shift it."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = settings(fp8="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=True)
    plain = [is_first_last_bf16_layer(config, number) for number in range(LAYERS)]
    block = gpt().decoder
    view = LayerRange(block, 1, LAYERS, takes_input=True, is_end=True)
    assert [is_first_last_bf16_layer(config, layer.layer_number - 1) for layer in view.layers] == plain[1:]


def teacher_of_an_fp8_student_has_no_fp8() -> None:
    for recipe in RECIPES:
        student = gpt(fp8="hybrid", fp8_recipe=recipe)
        student.config.fp8_param = True  # --fp8-param-gather; set late, because such parameters need a GPU
        teacher = build_teacher(student, None)
        assert teacher.config.fp8 is None and student.config.fp8 == "hybrid"
        assert not teacher.config.fp8_param and student.config.fp8_param
        assert not any(module.fp8_initialized for module in teacher.modules() if hasattr(module, "fp8_initialized"))
        ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(value.dtype == torch.bfloat16 and not value.requires_grad for value in ours.values())


def building_a_teacher_leaves_te_s_random_state() -> None:
    """TE's tracker (``--te-rng-tracker``) holds generators, which draw in place; here a CPU's in place of a GPU's."""
    tracker, generator = extensions.TECudaRNGStatesTracker(), torch.Generator().manual_seed(5)
    tracker.set_states({"model-parallel-rng": generator})
    before = generator.get_state()
    with mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker), random_state_untouched():
        torch.rand(3, generator=tracker.get_states()["model-parallel-rng"])
    assert torch.equal(tracker.get_states()["model-parallel-rng"].get_state(), before)


def communication_overlap_is_off_where_sequences_are_short() -> None:
    """Of real layers, with two tensor ranks in their arguments; buffers and kernels need a GPU, attributes do not."""
    with mock.patch.object(te_base, "_ub_initialized", True), mock.patch.object(te_base, "_ub_communicators", {}):
        model = gpt()
        for layer in model.decoder.layers:
            for parent, name, kind in (
                (layer.self_attention, "linear_qkv", "qkv"),
                (layer.self_attention, "linear_proj", "proj"),
            ):
                column = kind == "qkv"
                make = te.LayerNormLinear if column else te.Linear
                own = {"ub_overlap_rs_dgrad": True} if column else {"ub_overlap_rs": True}
                options = {"tp_size": 2, "sequence_parallel": True, "parallel_mode": "column" if column else "row"}
                new = make(HIDDEN, HIDDEN, ub_overlap_ag=True, ub_name=kind, device="cpu", **options, **own)
                setattr(parent, name, new)

    def states() -> list[tuple[bool, ...]]:
        names = ("ub_overlap_ag_fprop", "ub_overlap_rs_dgrad", "ub_overlap_rs_fprop", "ub_overlap_ag_dgrad")
        attentions = [layer.self_attention for layer in model.decoder.layers]
        return [tuple(getattr(one.linear_qkv, n) for n in names[:2]) for one in attentions] + [
            tuple(getattr(one.linear_proj, n) for n in names[2:]) for one in attentions
        ]

    hooks = Hooks([model], ReGateConfig(score="random"))
    hooks.attach()
    assert "overlap is off in sparse steps in 6 short modules" in hooks.describe()[-1]
    seen: list[list[tuple[bool, ...]]] = []

    def schedule(**arguments):
        seen.append(states())
        if len(seen) == 3:
            raise RuntimeError("in the middle of a step")

    on, off = (True, True), (False, False)
    given = {"data_iterator": None, "forward_step_func": None}
    short = [mock.Mock()]
    hooks.run(schedule, given, [None], [], None)
    hooks.run(schedule, given, [None], short, None)
    assert states() == [on] * 8
    with contextlib.suppress(RuntimeError):
        hooks.run(schedule, given, [None], short, None)
    assert seen == [[on] * 8, *[([on] + [off] * 3) * 2] * 2], seen
    assert states() == [on] * 8
    hooks.detach()


def cuda_graphs_are_replayed_in_dense_steps_alone() -> None:
    """Megatron's layers are asked what their next call does; graphs themselves need a GPU."""
    model = gpt(cuda_graph_impl="transformer_engine", cuda_graph_modules=["attn"])
    layers = model.decoder.layers
    hooks = Hooks([model], ReGateConfig(score="random"))
    hooks.attach()
    assert hooks.describe()[-1] == "CUDA graphs are off in sparse steps, in all of the model"
    for layer in layers:
        layer.cuda_graphs = [mock.Mock()]  # as Megatron's training loop leaves them, after hooks are on
    seen: list[list[bool]] = []

    def schedule(**arguments):
        seen.append([bool(layer._should_call_te_cudagraph()) for layer in layers])

    given = {"data_iterator": None, "forward_step_func": None}
    for plans in ([], [mock.Mock()], []):
        hooks.run(schedule, given, [None], plans, None)
    assert seen == [[True] * 4, [False] * 4, [True] * 4], seen
    hooks.detach()
    assert not any(hasattr(layer, "cuda_graphs") for layer in build_teacher(model, None).decoder.layers)


def the_backward_of_te_s_layers_overlaps_as_their_forward_did() -> None:
    """What the forward was told is kept for the backward: neither looks at the layer again."""
    for module in (te_linear, te_layernorm_linear):
        classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
        functions = [one for one in classes if issubclass(one, torch.autograd.Function)]
        for one in functions:
            assert "module.ub_" not in inspect.getsource(one) and "self.ub_" not in inspect.getsource(one)
        assert functions


def delayed_scaling_is_updated_once_per_microbatch() -> None:
    """TE rolls every amax history when the outermost FP8 region ends: two regions would roll it twice.

    The regions are TE's own; its layers need a GPU, so Megatron's local ones run in them, and TE is told that there is
    FP8 hardware.
    """
    model = GPTModel(settings(), get_gpt_layer_local_spec(), VOCAB, TEXT, position_embedding_type="rope").bfloat16()
    model.config.fp8, model.config.fp8_recipe = "hybrid", "delayed"
    model.decoder.final_layernorm = None  # TE's, even for local layers
    current, updates = CurrentMicrobatch(), []
    hook = DecoderHook(model, current, dense_layers=1)
    keep_idx_BK = torch.arange(0, TEXT, 2).expand(2, -1).contiguous()
    plan = MicrobatchPlan(TEXT, keep_idx_BK, torch.ones_like(keep_idx_BK, dtype=torch.bool))
    layout = Layout.of_model(model.config, sequence_parallel=False)
    (sharded,) = shard_plans([plan], layout, torch.device("cpu"), moves_hidden=True, moves_tokens=True)
    tokens = torch.ones(2, TEXT, dtype=torch.int64)
    manager = quantization.FP8GlobalStateManager
    with (
        mock.patch.object(manager, "is_fp8_available", lambda: (True, "")),
        mock.patch.object(manager, "reduce_and_update_fp8_tensors", lambda forward: updates.append(forward)),
        current.running(sharded, None),
    ):
        model(tokens, torch.arange(TEXT).expand_as(tokens), None)
    hook.detach()
    assert updates == [True], updates


def queries_without_a_latent_get_a_norm_of_their_own_which_kimi_vl_has_not() -> None:
    """In plain Megatron-Core, from the layers that mcore-bridge takes; the norm before attention is there as well."""
    spec = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True, qk_layernorm=True)
    attention = spec.submodules.self_attention.submodules
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        q_lora_rank=None,
        qk_layernorm=True,
        normalization="RMSNorm",
    )
    assert attention.linear_q_proj is extensions.TEColumnParallelLinear
    built = QKNormConfigResolver(config, attention).resolve()["linear_q_proj"]
    assert built is extensions.TELayerNormColumnParallelLinear


if __name__ == "__main__":
    check(sys.argv[1:], globals())
