"""CLIP's vision tower and LLaVA's projector: what they are, and which tensors are which in the two frameworks.

Megatron's CLIPViTModel is CLIP up to its last layer: no norm after it, no pooling. Hugging Face's LLaVA reads what
layer ``vision_feature_layer`` gives; layers after that one, and ``post_layernorm``, have no part in the result.

Shapes: H hidden, F feed-forward, P patch, N patches, T hidden size of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regate_megatron.checkpoints.hf_config import check_numbers
from regate_megatron.checkpoints.names import LAYERS, Rule
from regate_megatron.errors import refuse

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
MEGATRON_TOWER = "vision_model."
MEGATRON_PROJECTOR = "vision_projection."
_CONFIG = "config.json"
# CLIPVisionConfig's defaults, for what a configuration leaves out.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

_COUNTS = tuple(name for name, value in _DEFAULTS.items() if isinstance(value, int))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP tower as a LLaVA uses it, and the two linear layers behind it.

    Attributes:
        num_layers: layers up to the one whose output is used.
        image_size: pixels along one side of the square image.
        patch_size: pixels along one side of a patch.
        keeps_class_token: whether the language model sees the class token.
        text_hidden_size: width of the language model, and of the projector.
        projector_bias: whether the projector's layers have a bias.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    keeps_class_token: bool
    text_hidden_size: int
    projector_bias: bool
    heads_per_group: int = 1  # each head has a key and a value of its own

    @property
    def num_groups(self) -> int:
        """Key-value heads."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def num_positions(self) -> int:
        """Patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def num_embeddings(self) -> int:
        """Positions that an image takes in the language model."""
        return self.num_positions - (not self.keeps_class_token)

    def __str__(self) -> str:
        """What a model provider has to be told."""
        return (
            f"CLIP, {self.num_layers} layers, hidden {self.hidden_size}, feed-forward {self.ffn_hidden_size}, "
            f"{self.num_heads} heads, {self.activation}, LayerNorm {self.norm_eps}, biases; image {self.image_size}, "
            f"patch {self.patch_size}, class token {'kept' if self.keeps_class_token else 'dropped'}; projector of two "
            f"layers, feed-forward {self.text_hidden_size}, gelu, {'biases' if self.projector_bias else 'no biases'}"
        )


def _both(megatron: str, source: str, merge: str, weight: Any, bias: Any) -> list[Rule]:
    """The rules of a weight and its bias; ``bias`` gives one source's shape for each of theirs."""
    separator = "" if megatron.endswith("_") else "."
    sources = [source.replace("qkv", part) for part in "qkv"] if merge == "qkv" else [source]
    return [
        Rule(f"{megatron}{separator}{kind}", tuple(f"{name}.{kind}" for name in sources), merge, shapes)
        for kind, shapes in (("weight", weight), ("bias", bias))
    ]


def _hidden(c: Clip) -> tuple[tuple[int, ...], ...]:
    return ((c.hidden_size,),)


_STACK, _LAYER = f"{MEGATRON_TOWER}{LAYERS}", f"{TOWER}encoder.layers.{{}}."
_EMBEDDINGS = f"{TOWER}embeddings."
TOWER_RULES = (
    Rule(f"{MEGATRON_TOWER}class_token", (f"{_EMBEDDINGS}class_embedding",), "token", _hidden),
    Rule(
        f"{MEGATRON_TOWER}conv1.weight",
        (f"{_EMBEDDINGS}patch_embedding.weight",),
        "copy",
        lambda c: ((c.hidden_size, 3, c.patch_size, c.patch_size),),
    ),
    Rule(
        f"{MEGATRON_TOWER}position_embeddings.weight",
        (f"{_EMBEDDINGS}position_embedding.weight",),
        "copy",
        lambda c: ((c.num_positions, c.hidden_size),),
    ),
    *_both(f"{MEGATRON_TOWER}ln_pre", f"{TOWER}pre_layrnorm", "copy", _hidden, _hidden),
    *_both(f"{_STACK}self_attention.linear_qkv.layer_norm_", f"{_LAYER}layer_norm1", "copy", _hidden, _hidden),
    *_both(
        f"{_STACK}self_attention.linear_qkv",
        f"{_LAYER}self_attn.qkv_proj",
        "qkv",
        lambda c: ((c.hidden_size, c.hidden_size),) * 3,
        lambda c: ((c.hidden_size,),) * 3,
    ),
    *_both(
        f"{_STACK}self_attention.linear_proj",
        f"{_LAYER}self_attn.out_proj",
        "copy",
        lambda c: ((c.hidden_size, c.hidden_size),),
        _hidden,
    ),
    *_both(f"{_STACK}mlp.linear_fc1.layer_norm_", f"{_LAYER}layer_norm2", "copy", _hidden, _hidden),
    *_both(
        f"{_STACK}mlp.linear_fc1",
        f"{_LAYER}mlp.fc1",
        "copy",
        lambda c: ((c.ffn_hidden_size, c.hidden_size),),
        lambda c: ((c.ffn_hidden_size,),),
    ),
    *_both(
        f"{_STACK}mlp.linear_fc2",
        f"{_LAYER}mlp.fc2",
        "copy",
        lambda c: ((c.hidden_size, c.ffn_hidden_size),),
        _hidden,
    ),
)
PROJECTOR_RULES = tuple(
    rule
    for number, width in ((1, "hidden_size"), (2, "text_hidden_size"))
    for rule in _both(
        f"{MEGATRON_PROJECTOR}encoder.linear_fc{number}",
        f"{PROJECTOR}linear_{number}",
        "copy",
        lambda c, width=width: ((c.text_hidden_size, getattr(c, width)),),
        lambda c: ((c.text_hidden_size,),),
    )
)
# The norm behind the last layer: Hugging Face builds it, LLaVA does not use it.
UNUSED_NORM = f"{TOWER}post_layernorm"


def clip_rules(clip: Clip) -> list[Rule]:
    """The rows of the table that apply."""
    projector = [rule for rule in PROJECTOR_RULES if clip.projector_bias or rule.megatron.endswith("weight")]
    return [*TOWER_RULES, *projector]


def from_llava_config(config: dict[str, Any], text_hidden_size: int) -> Clip:
    """The tower and the projector that a LLaVA's ``config.json`` describes.

    Raises:
        ReGateError: no LLaVA, or one that Megatron's LLaVAModel with a CLIPViTModel is not.
    """
    vision = config.get("vision_config") or {}
    kind = vision.get("model_type", "clip_vision_model") if isinstance(vision, dict) else repr(vision)
    if config.get("model_type") != "llava" or kind != "clip_vision_model":
        given = f"model_type {config.get('model_type')!r} with a vision tower {kind!r}"
        raise _refuse(given, "'llava' with 'clip_vision_model'")
    vision = _DEFAULTS | {key: value for key, value in vision.items() if value is not None}
    check_numbers(vision, _COUNTS, ("layer_norm_eps",))
    if vision["hidden_size"] % vision["num_attention_heads"]:
        raise _refuse(
            f"{vision['num_attention_heads']} heads for a hidden size of {vision['hidden_size']}", "a divisor"
        )
    if not isinstance(config.get("vision_feature_layer", -2), int):
        raise _refuse(f"vision_feature_layer {config['vision_feature_layer']!r}", "the number of one layer")
    layers, feature = vision["num_hidden_layers"], config.get("vision_feature_layer", -2)
    num_layers = feature if feature >= 0 else layers + 1 + feature
    strategy = config.get("vision_feature_select_strategy", "default")
    projector = config.get("projector_hidden_act", "gelu")
    for name, found, allowed in (
        ("vision_feature_layer", num_layers, range(1, layers + 1)),
        ("hidden_act", vision["hidden_act"], ("quick_gelu", "gelu")),
        ("projector_hidden_act", projector, ("gelu",)),
        ("vision_feature_select_strategy", strategy, ("default", "full")),
        ("num_channels", vision.get("num_channels", 3), (3,)),
    ):
        if found not in allowed:
            raise _refuse(f"{name} {found!r}", " or ".join(map(str, allowed)))
    return Clip(
        num_layers=num_layers,
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        keeps_class_token=strategy == "full",
        text_hidden_size=text_hidden_size,
        projector_bias=config.get("multimodal_projector_bias", True),
    )


def _refuse(given: str, allowed: str) -> Exception:
    return refuse(_CONFIG, given=given, allowed=allowed, change="the model")
