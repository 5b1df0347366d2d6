"""What of a language model may change its losses, beside its weights, as plain values that can be compared.

Every field of a model's config counts unless it is known not to change a loss (:data:`NEUTRAL`): a list of those that
do would miss what the next version of Megatron adds.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch

from regate_megatron.config import flag
from regate_megatron.errors import ReGateError, refuse

PATTERN = "hybrid_layer_pattern"
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


def counting(config: Any) -> dict[str, Any]:
    """Every setting of a transformer config that may change a loss, as plain values."""
    return {
        name: plain(value) for name, value in vars(config).items() if name not in NEUTRAL and not name.startswith("_")
    }


def pattern_of(model: Any) -> str | None:
    """The layers of a HybridModel as they were given; None for a GPTModel."""
    return getattr(model, PATTERN, None)


def layers_of(pattern: str) -> str:
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


def another(checkpoint: Any, name: str, theirs: Any, own: Any) -> ReGateError:
    """The refusal of a checkpoint of a model that the student's architecture cannot be."""
    return refuse(
        flag("teacher_load"),
        given=f"{checkpoint.path}, trained with {name} {theirs}",
        allowed=f"the student's architecture ({name} {own})",
        change="the teacher to the student's own text backbone",
    )
