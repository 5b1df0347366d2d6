"""The settings of a teacher: its own checkpoint's where they can differ, the student's elsewhere.

Those that can differ without another architecture are taken from its checkpoint (:mod:`.stated`), any other difference
from the student is refused by name. What a checkpoint does not say is the student's, and told. Which settings count at
all: :mod:`.values`; rotary frequencies count as they are in the model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regate_megatron.teacher.rotary import constants_of, rotary_of
from regate_megatron.teacher.stated import OWN_FILE
from regate_megatron.teacher.values import PATTERN, another, counting, layers_of, pattern_of, plain, same

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
            raise another(checkpoint, name, theirs, own)
        setattr(config, name, stated[name])
        settings.adopted.append(f"{name} {theirs} ({own})")
    kind, own = stated.get("position_embedding_type"), student.position_embedding_type
    if kind is not None and kind != own and {kind, own} != {"rope", "mrope"}:  # the same frequencies
        raise another(checkpoint, "position_embedding_type", kind, own)
    theirs, own = stated.get(PATTERN), pattern_of(student)
    if theirs and own and layers_of(theirs) != layers_of(own):
        raise another(checkpoint, PATTERN, theirs, own)
    if rotary is not None:
        settings = dataclasses.replace(settings, rotary=rotary_of(rotary, stated, settings, checkpoint))
    return settings


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
    if pattern := pattern_of(model):
        found[PATTERN] = layers_of(pattern)
    if rotary is not None:
        found["rotary"] = constants_of(rotary)
    return found


def write_own(folder: Path, model: Any) -> None:
    """Write into a checkpoint what :func:`.stated.stated_settings` reads; one rank calls this."""
    rotary = getattr(model, "rotary_pos_emb", None)
    stated = counting(model.config) | {"position_embedding_type": model.position_embedding_type}
    stated |= {PATTERN: pattern_of(model)}
    if rotary is not None:
        stated["rotary"] = constants_of(rotary)
    (folder / OWN_FILE).write_text(json.dumps(stated, indent=1))


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
