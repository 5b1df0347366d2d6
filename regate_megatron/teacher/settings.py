"""The settings a language model's losses depend on, beside its weights: which they are, and what a checkpoint says.

Every field of a model's config counts unless it is known not to change a loss (:data:`NEUTRAL`): a list of those that
do would miss what the next version of Megatron adds. Rotary frequencies count as they are in the model.

A teacher has its own checkpoint's settings: those that can differ without another architecture are taken from it, any
other difference from the student is refused by name. What a checkpoint does not say is the student's, and told.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regate_megatron.config import flag
from regate_megatron.errors import refuse

OWN_FILE = "language_model.json"  # beside the weights in what save_language_model writes
_BRIDGE_FILE = "run_config.yaml"  # Megatron-Bridge's, in the folder of an iteration
_PATTERN = "hybrid_layer_pattern"
SETTINGS_FILES = (OWN_FILE, _BRIDGE_FILE)
_CERTAIN = "huggingface_model_type"  # said by conversions, which say what the model is and not what a script was given
_SCALING = 8.0  # of Llama 3.1's frequencies; Megatron's own, before there was a flag
_TOLERANCE = 1e-5  # of frequencies: devices round them differently

# Known not to change a loss. Layout and communication; how and in which fusion it is computed; memory; precision of the
# weights (told apart), of FP8 and FP4 (no teacher has them); what acts in training alone; the start of training.
NEUTRAL = frozenset(
    """
    tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size pipeline_model_parallel_size
    pipeline_model_parallel_comm_backend virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size
    hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel expert_model_parallel_size
    expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size cp_comm_type
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split mtp_standalone
    microbatch_group_size_per_vp_stage variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync
    use_ring_exchange_p2p deallocate_pipeline_outputs overlap_p2p_comm_warmup_flush dynamic_context_parallel
    tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
    tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm symmetric_ar_type
    nccl_all_reduce_for_prefill high_priority_a2a_comm_stream barrier_with_L1_time scatter_embedding_sequence_parallel
    moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_hybridep_pad_uneven_dispatch_inputs
    moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
    moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy
    moe_shared_expert_overlap ep_overlap_early_attn_memory_release

    attention_backend flash_attention_version transformer_impl cross_entropy_loss_fusion cross_entropy_fusion_impl
    bias_activation_fusion masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion
    apply_rope_fusion use_fused_weighted_squared_relu fused_single_qkv_rope fused_residual_rmsnorm mla_down_proj_fusion
    use_transformer_engine_op_fuser use_te_activation_func use_te_rng_tracker gradient_accumulation_fusion
    moe_permute_fusion moe_permute_fusion_into_hybridep moe_use_grouped_tensor gdp_cutedsl_kernel moe_router_fusion
    moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias use_grouped_gemm_for_shared_expert
    use_grouped_gemm_for_dense_mlp
    moe_router_padding_for_quantization moe_router_padding_for_fp8 use_mamba_mem_eff_path mlp_chunks_for_prefill
    mlp_chunks_for_training dsa_kernel_backend batch_invariant_mode deterministic_mode test_mode
    use_kitchen_attention kitchen_attention_backend disable_bf16_reduced_precision_matmul batch_invariant_backend
    gdp_num_chunk_states_to_recompute gtp_remat_opt_in_modules mhc_recompute_layer_num moe_dispatch_fwd_dtype
    moe_combine_bwd_dtype mtp_hsm

    recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
    moe_layer_recompute num_microbatches_with_partial_activation_checkpoints cpu_offloading cpu_offloading_num_layers
    cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
    cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules
    min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    activation_offload_fraction fine_grained_offloading_max_inflight_offloads moe_paged_stash moe_paged_stash_page_size
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu moe_expert_rank_capacity_factor
    activation_func_fp8_input_store enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
    cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl cuda_graph_modules cuda_graph_scope
    clone_scatter_output_in_embedding disable_parameter_transpose_cache

    params_dtype bf16 fp16 pipeline_dtype enable_autocast autocast_dtype
    fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
    fp8_wgrad fp8_output_proj fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_param fp4_quantizer_factory

    timers finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
    param_sync_func hidden_dropout attention_dropout calculate_per_token_loss defer_embedding_wgrad_compute
    wgrad_deferral_limit delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
    mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern
    moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate moe_router_quantile_balancing_ema
    moe_per_layer_logging dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss log_max_attention_logit
    experimental_attention_variant_loss_scale_func qk_clip qk_clip_alpha qk_clip_threshold config_logger_dir
    perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std
    embedding_init_method embedding_init_method_std init_model_with_meta_device hetereogenous_dist_checkpoint
    flash_decode inference_rng_tracker inference_sampling_seed inference_cuda_graph_scope use_inference_optimized_layers
    inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type cache_mla_latents
    moe_pad_experts_for_cuda_graph_inference mamba_training_ssm_states_dtype

    seq_length vocab_size should_pad_vocab make_vocab_size_divisible_by max_position_embeddings tp_only_amax_reduction
    transformer_layer_spec mamba_stack_spec hybrid_stack_spec generation_config hf_model_id restore_modelopt_state
    use_transformer_engine_full_layer_spec use_arbitrary_attention_mask fp16_lm_cross_entropy parallel_output
    share_embeddings_and_output_weights position_embedding_type vision_config hf_config
    language_model_type vision_model_type freeze_language_model freeze_vision_model freeze_vision_projection
    """.split()
)
# In a model that holds no expert these are never read; in one without latent attention the rotary module has its own.
_EXPERTS = "moe_"
# How precisely it is computed: the student's, as its own losses are; but another precision has another cache.
_PRECISION = {"fp32_residual_connection", "attention_softmax_in_fp32", "moe_router_dtype"}
_PRECISION |= {"apply_query_key_layer_scaling", "dsa_indexer_k_norm_fp32"}
# Read where a layer is built or run: a teacher may have its own.
_ADOPTED = {"layernorm_epsilon", "softmax_scale", "rotary_interleaved", "apply_residual_connection_post_layernorm"}
_ADOPTED |= {"glu_linear_offset", "activation_func_clamp_value", "moe_router_topk", "moe_router_score_function"}
_ADOPTED |= {"moe_router_pre_softmax", "moe_router_num_groups", "moe_router_group_topk"}
_ADOPTED |= {"moe_router_topk_scaling_factor", "rope_type", "rotary_base", "rotary_percent", "rotary_scaling_factor"}
_ADOPTED |= {"rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor"}  # Bridge's; see _rotary
_ADOPTED |= {"original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# What Megatron's YaRN reads off a config that has no such fields.
_YARN = {"yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"}
_YARN |= {"yarn_mscale", "yarn_mscale_all_dim", "yarn_correction_range_round_to_int"}
# Nothing stated means: as Megatron works it out.
_WORKED_OUT = {
    "kv_channels",
    "ffn_hidden_size",
    "num_query_groups",
    "moe_ffn_hidden_size",
    "mrope_section",
    "rope_type",
}
_WORKED_OUT |= {"moe_router_num_groups", "moe_router_group_topk", "is_hybrid_model", "heterogeneous_block_specs"}
_OF_MUP = {"mup_width_mult", "mup_output_mult", "mup_base_hidden_size", "softmax_scale"}
# What examples/multimodal sets on the language model's config by --language-model-type, over its arguments.
_SET_BY_MULTIMODAL = {"activation_func", "add_bias_linear", "add_qkv_bias", "ffn_hidden_size", "gated_linear_unit"}
_SET_BY_MULTIMODAL |= {"hidden_size", "kv_channels", "layernorm_epsilon", "layernorm_zero_centered_gamma"}
_SET_BY_MULTIMODAL |= {"mamba_head_dim", "mamba_num_heads", "mamba_state_dim", "normalization", "num_attention_heads"}
_SET_BY_MULTIMODAL |= {"num_layers", "num_query_groups", "qk_layernorm"}


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher is built.

    Attributes:
        config: the transformer config, a copy of the student's with the teacher's own values.
        rotary: the rotary module of its chunk, None where it has none.
        adopted: what it has otherwise than the student: a few words for each.
        unstated: settings its checkpoint does not say; None where it says none at all.
    """

    config: Any
    rotary: Any = None
    adopted: list[str] = field(default_factory=list)
    unstated: list[str] | None = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to tell of it, a line each."""
        found = [f"of its own, not the student's: {', '.join(self.adopted)}"] if self.adopted else []
        if self.unstated is None:
            found.append(
                "its checkpoint does not say its settings (rotary base, norm epsilon …): the student's are used"
            )
        elif self.unstated:
            found.append(f"its checkpoint does not say {', '.join(self.unstated)}: the student's are used")
        return found


def settle(student: Any, checkpoint: Any) -> TeacherSettings:
    """The settings of a teacher whose weights are in ``checkpoint``. Any rank, no communication.

    Args:
        student: this rank's language-model chunk.
        checkpoint: a ``LanguageModelCheckpoint``; None: the student itself.

    Raises:
        ReGateError: the checkpoint is of a model that the student's architecture cannot be; the setting is named.
    """
    config, rotary = copy.copy(student.config), getattr(student, "rotary_pos_emb", None)
    if checkpoint is None:
        return TeacherSettings(config, rotary)
    stated = checkpoint.stated
    if stated is None:
        return TeacherSettings(config, rotary, unstated=None)
    settings = TeacherSettings(config, rotary)
    no_experts = config.num_moe_experts is None and stated.get("num_moe_experts") is None
    defaults, of_core = _defaults(config), _fields_of_core(config)
    for name, own in counting(config).items():
        if name not in of_core and name not in _ADOPTED and name not in _YARN:
            continue  # of a framework's own config: what it is for is not known
        if name in _PRECISION or (no_experts and name.startswith(_EXPERTS)):
            continue
        if name in _OF_MUP and config.use_mup:
            continue
        if name not in stated:
            if not same(own, defaults.get(name)):
                settings.unstated.append(name)
            continue
        theirs = _expanded(name, stated[name], config)
        if same(own, theirs) or (theirs is None and name in _WORKED_OUT):
            continue
        if name not in _ADOPTED:
            raise _another(checkpoint, name, theirs, own)
        setattr(config, name, stated[name])
        settings.adopted.append(f"{name} {theirs} ({own})")
    kind, own = stated.get("position_embedding_type"), student.position_embedding_type
    if kind is not None and kind != own and {kind, own} != {"rope", "mrope"}:  # the same frequencies
        raise _another(checkpoint, "position_embedding_type", kind, own)
    theirs, own = stated.get(_PATTERN), _pattern_of(student)
    if theirs and own and _layers_of(theirs) != _layers_of(own):
        raise _another(checkpoint, _PATTERN, theirs, own)
    if rotary is not None:
        settings = dataclasses.replace(settings, rotary=_rotary(rotary, stated, settings, checkpoint))
    return settings


def counting(config: Any) -> dict[str, Any]:
    """Every setting of a transformer config that may change a loss, as plain values."""
    return {
        name: plain(value) for name, value in vars(config).items() if name not in NEUTRAL and not name.startswith("_")
    }


def settings_of(config: Any, model: Any, rotary: Any) -> dict[str, Any]:
    """What a model's losses depend on beside its weights and vocabulary, as plain values; the same in every layout.

    Settings that have their default are left out, so that a version of Megatron that knows more of them agrees.

    Args:
        config, rotary: the model's, see :class:`TeacherSettings`.
        model: a chunk of this architecture.
    """
    defaults = _defaults(config)
    found = {name: value for name, value in counting(config).items() if not same(value, defaults.get(name))}
    found["position_embedding_type"] = model.position_embedding_type
    if model.position_embedding_type == "learned_absolute":
        found["max_sequence_length"] = model.max_sequence_length
    if pattern := _pattern_of(model):
        found[_PATTERN] = _layers_of(pattern)
    if rotary is not None:
        found["rotary"] = _of_rotary(rotary)
    return found


def write_own(folder: Path, model: Any) -> None:
    """Write into a checkpoint what :func:`stated_settings` reads; one rank calls this."""
    rotary = getattr(model, "rotary_pos_emb", None)
    stated = counting(model.config) | {"position_embedding_type": model.position_embedding_type}
    stated |= {_PATTERN: _pattern_of(model)}
    if rotary is not None:
        stated["rotary"] = _of_rotary(rotary)
    (folder / OWN_FILE).write_text(json.dumps(stated, indent=1))


def stated_settings(path: Path, saved: Any) -> dict[str, Any] | None:
    """What the checkpoint at ``path`` says of its language model, by the names of Megatron's config; None: nothing.

    Args:
        path: the folder of the iteration.
        saved: Megatron's arguments in it, None where there are none.
    """
    own = path / OWN_FILE
    if own.is_file():
        try:
            return dict(json.loads(own.read_text()))
        except (OSError, ValueError, TypeError) as error:
            form = {"allowed": "a complete checkpoint", "change": "to one saved or copied in full"}
            raise refuse("checkpoint", given=f"{own}, unreadable ({type(error).__name__})", **form) from error
    if saved is not None:
        return _of_arguments(saved)
    try:
        return _model_of_bridge((path / _BRIDGE_FILE).read_text())
    except Exception:  # absent, or of a kind that only Bridge can read: it says nothing
        return None


def _pattern_of(model: Any) -> str | None:
    return getattr(model, _PATTERN, None)


def _layers_of(pattern: str) -> str:
    """The layers a HybridModel's pattern names, without where stages are cut and what follows for MTP."""
    return pattern.split("/")[0].replace("|", "")


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "__name__", None) or type(value).__name__


def same(one: Any, other: Any) -> bool:
    """Whether two plain settings are equal; numbers up to the rounding of devices."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    numbers = int | float
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(one, other, rel_tol=_TOLERANCE)
    return one == other


def _another(checkpoint: Any, name: str, theirs: Any, own: Any) -> Exception:
    return refuse(
        flag("teacher_load"),
        given=f"{checkpoint.path}, trained with {name} {theirs}",
        allowed=f"the student's architecture ({name} {own})",
        change="the teacher to the student's own text backbone",
    )


def _fields_of_core(config: Any) -> set[str]:
    """Names of the settings that Megatron-Core itself knows."""
    kinds = [kind for kind in type(config).__mro__ if dataclasses.is_dataclass(kind)]
    return {
        one.name for kind in kinds if kind.__module__.startswith("megatron.core") for one in dataclasses.fields(kind)
    }


def _defaults(config: Any) -> dict[str, Any]:
    found = {}
    for one in dataclasses.fields(config):
        if one.default is not dataclasses.MISSING:
            found[one.name] = plain(one.default)
        elif one.default_factory is not dataclasses.MISSING:
            found[one.name] = plain(one.default_factory())
    return found


def _expanded(name: str, value: Any, config: Any) -> Any:
    """A stated value as the config has it once it is finished."""
    if name == "no_rope_freq" and isinstance(value, int) and config.num_layers % max(1, value) == 0 and value > 0:
        return ([0] * (value - 1) + [1]) * (config.num_layers // value)
    return plain(value)


# Rotary frequencies


def _of_rotary(rotary: Any) -> dict[str, Any]:
    """All constants of a rotary module: its plain attributes and its frequencies."""
    found = {}
    for name, value in {**vars(rotary), **rotary._buffers}.items():
        if name.startswith("_") or name == "training" or name.endswith("_cached"):
            continue
        if torch.is_tensor(value):
            found[name] = value.detach().float().cpu().flatten().tolist()
        elif isinstance(value, int | float | str | list | tuple | None):
            found[name] = plain(value)
    return found


def _rotary(rotary: Any, stated: dict[str, Any], settings: TeacherSettings, checkpoint: Any) -> Any:
    """The student's rotary module, or a copy with the teacher's frequencies."""
    own = _of_rotary(rotary)
    if "rotary" not in stated and "inv_freq" in own and "rotary_base" not in stated:
        settings.unstated.append("rotary_base")
        return rotary
    wanted = [one for one in _wanted(own, stated, settings.config) if one]
    if any(same(want, own) for want in wanted):
        return rotary
    want = wanted[0]
    changed = [name for name in want if not same(want[name], own[name])]
    taken = {"inv_freq": "rotary frequencies", "seq_len_interpolation_factor": "position interpolation"}
    taken |= {"rotary_interleaved": "rotary_interleaved"}
    if "inv_freq" not in own or set(changed) - set(taken):
        name = next((name for name in changed if name not in taken), changed[0])
        raise _another(checkpoint, name, want[name], own[name])
    if not same(want, wanted[-1]):
        raise refuse(
            flag("teacher_load"),
            given=f"{checkpoint.path}, whose arguments say {_scaling_of(stated)}, which not every script passes on",
            allowed="rotary frequencies that are known: the student's, or as tools/convert_hf_teacher.py says them",
            change="the student to the same flags, or the teacher to a converted checkpoint",
        )
    mine = copy.copy(rotary)  # no deep copy: it holds a process group
    mine._buffers = dict(rotary._buffers)
    for name in changed:
        value = want[name]
        if name == "inv_freq":
            value = torch.tensor(value, dtype=torch.float32, device=rotary.inv_freq.device)
            base = f" of base {stated['rotary_base']:g}" if "rotary_base" in stated else ""
            settings.adopted.append(taken[name] + base)
        else:
            settings.adopted.append(f"{taken[name]} {value} ({own[name]})")
        setattr(mine, name, value)
    return mine


def _wanted(own: dict[str, Any], stated: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """What the teacher's rotary module holds; two answers where its arguments can mean two.

    Megatron's pretrain_gpt.py leaves ``--rope-scaling-factor`` and ``--rotary-seq-len-interpolation-factor`` where they
    are: a model trained with them has neither, unless its script was another.
    """
    if "rotary" in stated:  # as they are
        return [{name: stated["rotary"].get(name, own[name]) for name in own}]
    if "inv_freq" not in own:  # YaRN: by its attributes
        names = {"rotary_base": "rotary_base", "scaling_factor": "rotary_scaling_factor"}
        return [own | {ours: stated[one] for ours, one in names.items() if ours in own and stated.get(one) is not None}]

    def with_scaling(factor: float, interpolation: float | None) -> dict[str, Any]:
        found = {"inv_freq": _frequencies(stated, config, factor), "seq_len_interpolation_factor": interpolation}
        found |= {"rotary_interleaved": bool(stated.get("rotary_interleaved"))}
        return own | {name: value for name, value in found.items() if name in own}

    factor = stated.get("rope_scaling_factor") or _SCALING
    as_stated = with_scaling(factor, stated.get("rotary_seq_len_interpolation_factor"))
    return [as_stated] if stated.get(_CERTAIN) else [as_stated, with_scaling(_SCALING, None)]


def _scaling_of(stated: dict[str, Any]) -> str:
    names = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
    return ", ".join(f"{name} {stated[name]}" for name in names if stated.get(name))


def _frequencies(stated: dict[str, Any], config: Any, factor: float) -> list[float]:
    """Frequencies as Megatron makes them from what is stated."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    made = RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=stated.get("rotary_percent", 1.0),
        rotary_base=stated["rotary_base"],
        rope_scaling=bool(stated.get("use_rope_scaling", False)),
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    return made.inv_freq.tolist()


# What checkpoints say


def _of_arguments(saved: Any) -> dict[str, Any]:
    """Megatron's arguments by the names of its config; see ``core_transformer_config_from_args``."""
    given = dict(vars(saved))

    def says(name: str) -> bool:
        return given.get(name) is not None

    stated = {name: value for name, value in given.items() if name not in NEUTRAL}
    renamed = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon"}
    renamed |= {"apply_layernorm_1p": "layernorm_zero_centered_gamma"}
    for theirs, ours in renamed.items():
        if theirs in given:
            stated[ours] = given[theirs]
    if "swiglu" in given:
        stated["gated_linear_unit"] = bool(given["swiglu"] or given.get("quick_geglu"))
        kinds = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}
        stated["activation_func"] = next((kind for name, kind in kinds.items() if given.get(name)), "gelu")
    if not given.get("group_query_attention", True):
        stated["num_query_groups"] = given.get("num_attention_heads")
    if says("position_embedding_type") or given.get("use_rotary_position_embeddings"):
        is_rotary = given.get("use_rotary_position_embeddings")
        stated["position_embedding_type"] = "rope" if is_rotary else given["position_embedding_type"]
    if given.get("hybrid_layer_pattern") is not None:  # says both
        stated["is_hybrid_model"] = True
        stated.pop("experimental_attention_variant", None)
    if says("language_model_type"):
        stated = {name: value for name, value in stated.items() if name not in _SET_BY_MULTIMODAL}
    return stated


def _model_of_bridge(text: str) -> dict[str, Any]:
    """The model in Megatron-Bridge's own file, which names functions and classes by their paths."""
    import yaml

    model = yaml.safe_load(text)["model"]
    stated = {name: _named(value) for name, value in model.items() if not name.startswith("_")}
    names = {"rope_scaling": "use_rope_scaling", "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor"}
    stated |= {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    stated = {name: one for name, one in stated.items() if name not in NEUTRAL or name == "position_embedding_type"}
    return stated | {_CERTAIN: "Megatron-Bridge"}


def _named(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return str(value["_target_"]).rsplit(".", 1)[-1]
    return value
