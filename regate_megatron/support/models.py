"""Which Hugging Face models can be trained with ReGATE, in which host, and how; by the model type that they state.

A table of what was run, and of what is refused by name with the reason. What a model's own configuration adds (sliding
windows, layers that keep a state) is looked at too. No weights are read, nothing is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regate_megatron.errors import nearest, refuse

BRIDGE = "Megatron-Bridge"
SWIFT = "ms-swift, over mcore-bridge"
MEGATRON = "Megatron-LM"


@dataclass(frozen=True)
class Host:
    """A host that trains a model.

    Attributes:
        name: of it.
        how: what to call or to pass.
    """

    name: str
    how: str


_CALLBACK = "finetune(config, {step}.forward_step, callbacks=[megatron_bridge.install(ReGateConfig(…))])"
_PACKED = "; rows may be packed (enable_in_batch_packing): with the default budget each sample keeps its own share"
_PLUGIN = (
    "ms_swift.install(ReGateConfig(…)) in a plugin, then megatron sft --external_plugins FILE --callbacks regate; full"
    " tuning or LoRA; padded or packed rows"
)
_GPT = Host(MEGATRON, "-m regate_megatron pretrain_gpt.py …; weights by tools/convert_hf_teacher.py or Megatron-Bridge")
_BRIDGE_GPT = Host(BRIDGE, _CALLBACK.format(step="gpt_step"))
_LLAVA = Host(MEGATRON, "-m regate_megatron pretrain_vlm.py …; weights by tools/import_student.py")
_MIMO = Host("MIMO of Megatron-LM", "attach and wrap_forward_backward in its loop; pictures, all modules on every rank")

SUPPORTED = {
    "qwen2_5_vl": (Host(BRIDGE, _CALLBACK.format(step="vlm_step") + _PACKED), Host(SWIFT, _PLUGIN)),
    "qwen3_vl": (Host(BRIDGE, _CALLBACK.format(step="qwen3_vl_step") + _PACKED), Host(SWIFT, _PLUGIN)),
    "qwen2_vl": (Host(SWIFT, _PLUGIN),),
    "internvl": (Host(SWIFT, _PLUGIN),),
    "internvl_chat": (Host(SWIFT, _PLUGIN),),
    "llavaonevision1_5": (Host(SWIFT, _PLUGIN),),
    "glm4v": (Host(SWIFT, _PLUGIN),),
    "kimi_vl": (Host(SWIFT, _PLUGIN),),
    "kimi_k25": (Host(SWIFT, _PLUGIN),),
    "qwen3_vl_moe": (Host(BRIDGE, _CALLBACK.format(step="qwen3_vl_step") + _PACKED), Host(SWIFT, _PLUGIN)),
    "glm4v_moe": (Host(BRIDGE, _CALLBACK.format(step="vlm_step") + _PACKED), Host(SWIFT, _PLUGIN)),
    "mistral3": (Host(BRIDGE, _CALLBACK.format(step="vlm_step") + _PACKED),),
    "llava": (_LLAVA, _MIMO),
    "llama": (_GPT, _BRIDGE_GPT),
    "mistral": (_GPT, _BRIDGE_GPT),
    "qwen2": (_GPT, _BRIDGE_GPT),
    "qwen3": (_GPT, _BRIDGE_GPT),
}
# The language models that were run inside of those that come with several; the first where the configuration says none.
_OVER = {
    "internvl": ("qwen2", "qwen3"),
    "internvl_chat": ("qwen2", "qwen3"),
    "mistral3": ("ministral3",),
    "llava": ("llama", "mistral", "qwen2", "qwen3"),
}
_UNTRIED = "nobody has run it with ReGATE"
_BIASES = (
    "its order of reading (pictures in both directions, windows that slide) is a table of attention biases for the "
    "full row, which only a GPU kernel of Transformer Engine reads: nobody could run it shortened and compare. Train "
    "it without ReGATE, or take qwen3_vl, qwen2_5_vl or mistral3"
)
REFUSED = {
    "ernie4_5_moe_vl": "a mask of token kinds, global to its module, keeps the dense length",
    "gemma3": _BIASES,
    "gemma4": _BIASES,
    "ovis2_5": f"{_UNTRIED}: its placeholders are negative ids",
    "qwen3_5": "three of four layers are gated delta nets: their state would skip what is left out",
    "qwen3_5_moe": "three of four layers are gated delta nets: their state would skip what is left out",
    "qwen3_next": "three of four layers are gated delta nets: their state would skip what is left out",
    "qwen2_5_omni": f"{_UNTRIED}: its language model lies in a thinker, and audio has ids of its own",
    "qwen3_omni_moe": f"{_UNTRIED}: its language model lies in a thinker, and audio has ids of its own",
    "nemotron_h": "Mamba layers: their state would skip what is left out",
}


@dataclass(frozen=True)
class Verdict:
    """What is known of a model.

    Attributes:
        kind: its model type.
        hosts: where it trains; none where it does not.
        reasons: why not.
        notes: what else to know.
    """

    kind: str
    hosts: tuple[Host, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The answer, in lines for a person."""
        if self.hosts and not self.reasons:
            yield f"{self.kind}: supported"
            yield from (f"in {host.name}: {host.how}" for host in self.hosts)
            yield from self.notes
        else:
            yield f"{self.kind}: not supported: {'; '.join(self.reasons)}"
            yield f"supported are {', '.join(SUPPORTED)}"


def judge(config: dict[str, Any]) -> Verdict:
    """Judge a Hugging Face configuration, as its ``config.json`` has it.

    Raises:
        ReGateError: what it says has another form than Hugging Face's.
    """
    try:
        return _judge(config)
    except (AttributeError, TypeError) as fault:
        raise refuse(
            "--model",
            given=f"a configuration of {config['model_type']} in another form ({fault})",
            allowed="a config.json as transformers writes it",
            change="the file",
        ) from None


def _judge(config: dict[str, Any]) -> Verdict:
    kind = str(config["model_type"])
    inner = config.get("text_config") or config.get("llm_config") or {}
    reasons = [*_inexact(inner or config)]
    if (over := _OVER.get(kind)) and inner.get("model_type", over[0]) not in over:
        reasons.append(f"over {inner['model_type']} {_UNTRIED}, over {', '.join(over)} alone")
    if kind not in SUPPORTED:
        reasons.insert(0, REFUSED.get(kind, _UNTRIED))
    notes = []
    if deep := (config.get("vision_config") or {}).get("deepstack_visual_indexes"):
        notes.append(f"its first {len(deep)} layers take visual features in: any --regate-dense-layers is exact")
    if config.get("vision_config"):
        notes.append("--regate-recipe pictures leaves visual positions out, where rows are mostly these")
    return Verdict(kind, SUPPORTED.get(kind, ()), tuple(reasons), tuple(notes))


def _inexact(text: dict[str, Any]) -> Iterator[str]:
    """What of a language model's configuration cannot be exact."""
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    layers = set(text.get("layer_types") or ())
    if window and (not layers or "sliding_attention" in layers):
        yield f"sliding_window {window}: distances would count kept tokens only"
    if other := sorted(layers - {"full_attention", "sliding_attention"}):
        yield f"layers of {', '.join(other)}: state would skip what is left out"


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a folder, of a ``config.json``, or of a name on the Hugging Face hub (or in its cache).

    Of a model type that is known, one that states nothing else.

    Raises:
        ReGateError: there is none, or it states no model type.
    """
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists() and path.suffix != ".json" and "/" not in name:  # no name of the hub: these have an owner
        known = {**SUPPORTED, **REFUSED}
        if name in known:
            return {"model_type": name}
        allowed = "a folder, its config.json, OWNER/NAME of the Hugging Face hub, or a model type: " + ", ".join(known)
        raise refuse("--model", given=name, allowed=allowed, change=nearest(name, known, "it to one of these"))
    try:
        if not path.is_file() and (path.is_absolute() or name.startswith(".") or path.name == "config.json"):
            raise FileNotFoundError  # no name of the hub
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, "config.json"))
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        given, allowed = f"{path}, which is no JSON ({fault})", "a config.json as transformers writes it"
        raise refuse("--model", given=given, allowed=allowed, change="the file") from None
    except Exception as fault:  # the hub and its library raise whatever they like
        raise refuse(
            "--model",
            given=f"{name}, of which there is no config.json ({type(fault).__name__})",
            allowed="a folder with one, that file, or a name on the Hugging Face hub",
            change="the name, or download the file",
        ) from None
    if not isinstance(config, dict) or not config.get("model_type"):
        allowed = "a configuration of Hugging Face's, with the model_type that it states"
        raise refuse("--model", given=f"{path} without model_type", allowed=allowed, change="the name")
    return config
