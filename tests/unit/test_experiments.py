"""examples/experiments: weights rewritten from llama2.c's file, kinds of words, arms, and how results are compared."""

from __future__ import annotations

import struct
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "experiments"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Its programs import each other by name, and the demo's."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(ROOT / "examples") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _llama2c_logits(part: dict, tokens: list[int], heads: int) -> np.ndarray:
    """The last position's logits, after llama2.c: neighbours are rotated, the embedding is the LM head."""
    head = part["emb"].shape[1] // heads

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x_SND):
        out = x_SND.copy()
        for place in range(len(x_SND)):
            for i in range(0, head, 2):
                angle = place / 10000 ** (i / head)
                a, b = x_SND[place, :, i], x_SND[place, :, i + 1]
                out[place, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[place, :, i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return out

    x = part["emb"][tokens]
    for w in part["layers"]:
        h = norm(x, w["att"])
        q, k, v = (h @ w[name].T for name in ("q", "k", "v"))
        q, k, v = (y.reshape(len(tokens), heads, head) for y in (q, k, v))
        scores = np.einsum("inh,jnh->nij", rotate(q), rotate(k)) / np.sqrt(head)
        scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum("nij,jnh->inh", scores / scores.sum(-1, keepdims=True), v).reshape(len(tokens), -1) @ w["o"].T
        h = norm(x, w["ffn"])
        gate = h @ w["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"].T)) @ w["w2"].T
    return norm(x, part["final"])[-1] @ part["emb"].T


def test_rewritten_weights_give_the_logits_of_llama2c(tmp_path):
    import weights
    from transformers import AutoModelForCausalLM

    hidden, ffn, layers, heads, vocab, window = 16, 24, 2, 2, 32, 8
    rng = np.random.default_rng(0)
    shapes = {
        "att": (hidden,), "q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden),
        "ffn": (hidden,), "w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden),
    }  # fmt: skip
    made = [
        {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(layers)
    ]
    part = {"emb": rng.normal(0, 1, (vocab, hidden)).astype(np.float32), "layers": made}
    part["final"] = rng.normal(1, 0.1, hidden).astype(np.float32)
    arrays = [part["emb"], *(layer[name] for name in shapes for layer in made), part["final"]]
    arrays.append(np.zeros((2, window, hidden // heads // 2), np.float32))
    data = struct.pack("7i", hidden, ffn, layers, heads, heads, vocab, window) + b"".join(a.tobytes() for a in arrays)
    assert weights.read_model(data, tmp_path) == (len(data), vocab)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = [3, 1, 4, 1, 5]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, _llama2c_logits(part, tokens, heads), atol=1e-4)


@pytest.mark.parametrize("adds_space", [True, False])
def test_the_first_piece_of_a_word_that_needs_the_picture_has_its_kind(adds_space):
    import captions
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = ["two", "red", "app", "les", "at", "the", "top", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(["?", *words, "##les"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if adds_space:
        tokenizer.normalizer = normalizers.Prepend(" ")
    answer = "two red apples at the top."
    spans = [(0, 3), (4, 7), (8, 14), (15, 17), (22, 25)]
    tokens, target, kinds = captions.encode(tokenizer, ("the.", answer, spans), bos=100, eos=101)
    assert tokens == [100, 6, 8, 1, 2, 3, 9, 5, 6, 7, 8, 101]
    assert target == [0] * 3 + [1] * 9
    names = {0: "", **dict(enumerate(captions.KINDS, 1))}
    assert [names[kind] for kind in kinds[3:]] == ["count", "colour", "object", "", "place", "", "place", "", ""]


def test_every_arm_is_a_command_line_that_regate_takes(tmp_path):
    import run

    from regate_megatron.flags import parse_command_line

    arms = tomllib.loads((FOLDER / "arms.toml").read_text())
    for file in sorted((FOLDER / "configs").glob("*.toml")):
        experiment = run.Experiment(tomllib.loads(file.read_text()), tmp_path)
        for one in experiment.runs(list(arms), 1):
            config = parse_command_line(one.flags.split())
            assert (config is None) == bool(arms[one.arm].get("plain")), one.arm
            if config:
                assert config.needs_teacher == ("{teacher}" in one.flags), one.arm


def test_an_arm_is_compared_with_dense_seed_by_seed():
    import results

    def curve(*points):
        names = ("targets_processed", "compute", "image_word_accuracy")
        rest = {"all_word_accuracy": 0.5, "eval_loss": 1.0, "accuracy_by_kind": [0.5]}
        return [dict(zip(names, point, strict=True)) | rest | {"cpu_seconds": 3 + point[1]} for point in points]

    dense = [
        {"seed": 1, "iterations": 2, "curve": curve((100, 10, 0.6), (200, 20, 0.5))},
        {"seed": 2, "iterations": 2, "curve": curve((100, 10, 0.3), (200, 20, 0.7))},
    ]
    ours = [
        {"seed": 1, "iterations": 2, "curve": curve((50, 6, 0.6), (100, 12, 0.8))},
        {"seed": 2, "iterations": 2, "curve": curve((60, 6, 0.6), (120, 12, 0.6))},
    ]
    found = results.summarise("regate", "ReGATE", ours, dense)
    assert found["targets"] == pytest.approx(0.55) and found["compute"] == pytest.approx(0.6)
    assert found["time"] == pytest.approx(15 / 23)
    assert found["gain"] == pytest.approx((0.3 - 0.1) / 2)
    assert found["targets_at_dense_peak"] == [0.25, None]
