"""examples/experiments: weights rewritten from llama2.c's file, words, arms, starts, and how results are compared."""

from __future__ import annotations

import json
import random
import re
import struct
import sys
import threading
import time
import tomllib
import types
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
        for arm in arms.values():
            assert {arm.get("dense", "dense"), arm.get("random", "random")} <= arms.keys()


def test_an_arm_sets_any_field_of_the_config():
    import run

    from regate_megatron.config import ReGateConfig
    from regate_megatron.flags import parse_command_line

    values = {"iterations": 180, "nine_tenths": 162}
    other = {
        "keep_ratio": 0.3, "keep_ratio_end": 0.7, "keep_ratio_steps": "{iterations}", "dense_layers": 2,
        "dense_last_layers": 1, "warmup_steps": 7, "cycle_steps": 9, "dense_steps": 3, "dense_from": "{nine_tenths}",
        "ema_decay": 0.5, "reference_weight": 0.25, "fusion": "convex", "score": "reference", "budget": "balanced",
        "length_multiple": 8, "packed_ratio": "row", "context": "read", "teacher_load": "student",
        "teacher_visual": "pad", "reference_cache": "cache", "teacher_offload": True, "difficulty_memory": 1.0,
        "reset_difficulty": True, "trace": "trace", "seed": 5,
    }  # fmt: skip
    found = parse_command_line(run.regate_flags("one", other, values))
    assert found == ReGateConfig(**(other | {"keep_ratio_steps": 180, "dense_from": 162}))
    assert parse_command_line(run.regate_flags("one", {"teacher_offload": False, "score": "random"}, values)) == (
        ReGateConfig(score="random")
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"keep_ration": 0.3}, "keep_ration"), ({"keep_ratio": 1.5}, "--regate-keep-ratio"), ({"score": "luck"}, "luck")],
)
def test_an_arm_with_a_wrong_field_is_refused_by_name(settings, said):
    import run
    from launch import CommandError

    with pytest.raises(CommandError) as refused:
        run.regate_flags("mine", settings, {"iterations": 1, "nine_tenths": 1})
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in ("mine", said, "given", "allowed", "change"))


def _curve(*points):
    names = ("targets_processed", "compute", "image_word_accuracy")
    rest = {"all_word_accuracy": 0.5, "eval_loss": 1.0, "accuracy_by_kind": [0.5]}
    return [dict(zip(names, point, strict=True)) | rest | {"cpu_seconds": 3 + point[1]} for point in points]


def _run(seed, *points, start="one"):
    return {"seed": seed, "start": f"{start} {seed}", "iterations": 2, "curve": _curve(*points)}


def test_an_arm_is_compared_with_dense_and_random_seed_by_seed():
    import results

    dense = [_run(1, (100, 10, 0.6), (200, 20, 0.5)), _run(2, (100, 10, 0.3), (200, 20, 0.7))]
    ours = [_run(1, (50, 6, 0.6), (100, 12, 0.8)), _run(2, (60, 6, 0.6), (120, 12, 0.6))]
    random = [_run(2, (60, 6, 0.1), (120, 12, 0.25))]
    found = results.summarise("regate", "ReGATE", ours, dense, random)
    assert found["targets"] == pytest.approx(0.55) and found["compute"] == pytest.approx(0.6)
    assert found["time"] == pytest.approx(15 / 23)
    assert found["against_dense"] == {1: pytest.approx(0.3), 2: pytest.approx(-0.1)}
    assert found["against_random"] == {2: pytest.approx(0.35)}
    assert found["targets_at_dense_peak"] == [0.25, None]
    (_, _, row) = results.table([found], ["a", "b"])
    assert "| +10.0 ± 28.3 (1 of 2) | – | +35.0 |" in row
    assert results.summarise("dense", "dense", dense, dense, random)["against_dense"] == {}


def test_runs_of_other_starts_are_no_pair():
    import results

    dense = [_run(1, (200, 20, 0.5), start="another"), _run(2, (200, 20, 0.5))]
    ours = [_run(1, (100, 12, 0.8)), _run(2, (100, 12, 0.8))]
    assert results.summarise("regate", "ReGATE", ours, dense, [])["against_dense"] == {2: pytest.approx(0.3)}


def test_the_report_says_which_start_and_weights_every_figure_is_of(tmp_path):
    import results

    out, docs = tmp_path / "out", tmp_path / "docs"
    (out / "data").mkdir(parents=True)
    docs.mkdir()
    (out / "data" / "about.json").write_text(json.dumps({"kinds": ["order", "colour", "object", "place"]}))
    arrays = {"tokens": np.ones((4, 3), np.int32), "loss_mask": np.ones((4, 2), np.uint8)}
    np.savez(out / "data" / "train.npz", **arrays, needs_image=np.ones((4, 2), np.uint8))
    for arm, seed, accuracy in (("dense", 1, 0.5), ("random", 1, 0.25), ("dense", 2, 0.75)):
        folder = out / "runs" / f"{arm}-{seed}"
        folder.mkdir(parents=True)
        (folder / "settings").write_text("")
        (folder / "log.txt").write_text("$ train.py --global-batch-size 2\n")
        about = {"arm": arm, "seed": seed, "iterations": 2, "fresh": False, "start": f"start{seed}"}
        (folder / "about.json").write_text(json.dumps(about))
        point = {"iteration": 2, "eval_loss": 1.0, "image_word_accuracy": accuracy, "all_word_accuracy": 0.5}
        point |= {"cpu_seconds": 3.0, "weights": f"end-{arm}-{seed}", "accuracy_by_kind": [0.1, 0.2, 0.3, 0.4]}
        (folder / "heldout.jsonl").write_text(json.dumps(point) + "\n")
    start = {"vision_steps": 225, "vision_recall": 0.81, "align_iterations": 140, "align_object": 0.62}
    for seed in (1, 2):
        (out / "starts" / str(seed)).mkdir(parents=True)
        (out / "starts" / str(seed) / "about.json").write_text(json.dumps(start | {"weights": f"start{seed}"}))
    page = "before\n<!-- starts -->\nold\n<!-- /starts -->\nbetween\n<!-- results -->\n<!-- /results -->\nafter\n"
    (docs / "learning.md").write_text(page)
    results.write(out, docs)
    found = (docs / "learning.md").read_text()
    assert "old" not in found and [word in found for word in ("before\n", "\nbetween\n", "\nafter\n")] == [True] * 3
    assert "| 2 | 225 | 81.0 | 140 | 62.0 | `start2` |" in found
    (random,) = (line for line in found.splitlines() if line.startswith("| random elision"))
    assert "| 1 | 100% | 100% | 100% | 25.0 | -25.0 | – | – |" in random
    assert "| order / colour / object / place |" in found
    head, *lines = (docs / "learning_results.csv").read_text().splitlines()
    assert head.endswith("start,weights") and len(lines) == 3
    assert {tuple(line.split(",")[-2:]) for line in lines} == {
        (f"start{seed}", f"end-{arm}-{seed}") for arm, seed in (("dense", 1), ("random", 1), ("dense", 2))
    }
    assert all((docs / f"learning_{name}").stat().st_size > 5000 for name in results.PICTURES)
    (docs / "learning.md").write_text(
        "<!-- starts-144 --><!-- /starts-144 --><!-- results-144 --><!-- /results-144 -->"
    )
    results.write(out, docs, "-144")
    assert "| random elision" in (docs / "learning.md").read_text()
    assert all((docs / f"learning-144_{name}").stat().st_size > 5000 for name in results.PICTURES)


def _ended(arm: str, seconds: float, accuracy: float, seed: int = 1) -> dict:
    curve = [{"cpu_seconds": seconds, "image_word_accuracy": accuracy}]
    return {"arm": arm, "seed": seed, "start": f"start{seed}", "curve": curve}


@pytest.mark.parametrize(
    ("seconds", "gain"), [(70.0, 0.02), (60.0, 0.06), (100.0, -0.1), (130.0, -0.1), (40.0, 0.14), (39.0, None)]
)
def test_an_arm_is_compared_with_what_dense_has_in_the_same_time(seconds, gain):
    import results

    lengths = [_ended("dense", 100, 0.8), _ended("dense-40", 40, 0.56), _ended("dense", 10, 0.9, seed=2)]
    arm = _ended("random", seconds, 0.7)
    found = results.at_equal_time(arm, [one for one in lengths if results.pairs([arm], [one])])
    assert found == (None if gain is None else pytest.approx(gain))
    assert results.at_equal_time(arm, lengths[:1]) is None


@pytest.mark.parametrize(
    ("arm", "dense", "random"),
    [
        ("dense", "dense", "random"),
        ("reference", "dense", "random"),
        ("dense-few", "dense-few", None),
        ("random-few", "dense-few", None),
        ("reference-few", "dense-few", "random-few"),
        ("visual-even-10", "dense", "visual-random-10"),
    ],
)
def test_arms_are_compared_on_the_same_data(arm, dense, random):
    import results

    arms = tomllib.loads((FOLDER / "arms.toml").read_text())
    assert (results.twin_of(arms, arm, "dense"), results.twin_of(arms, arm, "random")) == (dense, random)


def test_lengths_of_dense_are_plain_arms_on_the_same_data():
    import results

    arms = tomllib.loads((FOLDER / "arms.toml").read_text())
    of = {name: {one for one in arms if results.is_a_length_of_dense(arms, one, name)} for name in arms}
    assert of["reference"] == {"dense", "dense-short", "dense-40", "dense-twice"}
    assert of["reference-noisy"] == {"dense-noisy"} and not of["dense-short"]


def test_the_first_word_of_a_clip_s_caption_is_told_by_the_order_of_its_frames_alone():
    import captions
    import clips

    drawings = [clips.scenes.Emoji(name, "", "", "red", None) for name in ("apple", "bell")]
    told = {}
    for moves_at, comes_at in ((2, 5), (5, 2)):
        clip = clips.Clip(0, 1, (0, 1, 2), moves_at, comes_at, "white", 0)
        _, answer, spans = clips.describe(clip, drawings)
        told[moves_at] = answer.split(" ")[1]
        assert [answer[slice(*span)] for span in spans[:2]] == [told[moves_at], "red"]
        assert captions.kind_of(told[moves_at]) == 1 and answer.count("red") == 2
    assert told == {2: "the", 5: "a"}


def test_a_clip_s_drawing_moves_and_another_comes_in_their_frames():
    import clips
    from PIL import Image

    red, blue = (Image.new("RGBA", (24, 24), colour) for colour in ("red", "blue"))
    drawings = [clips.scenes.Emoji("", "", "", "", art) for art in (red, blue)]
    frames = clips.paint(clips.Clip(0, 1, (0, 3, 1), 2, 6, "white", 0), drawings, random.Random(1), 48)
    corners = frames[:, 12::24, 12::24].tolist()
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    assert corners[:2] == [[[red, white], [white, white]]] * 2
    assert corners[2:6] == [[[white, white], [white, red]]] * 4
    assert corners[6:] == [[[white, blue], [white, red]]] * 2


def _stamps(folder: Path) -> Path:
    """A folder as the package's, of one-coloured squares."""
    from PIL import Image

    captions = {
        "animals/birds/lark": "A lark.",
        "animals/fox": "A red fox.",
        "animals/cartoon/fox": "A drawn fox.",
        "food/apple": "An apple.\nde.utf8=Ein Apfel.",
        "food/twin": "An apple.",
        "plants/rose": "Press here! A rose of 3 colours.",
        "symbols/one": "The number one.",
    }
    for colour, (name, caption) in enumerate(captions.items(), 1):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (30, 20), (40 * colour - 20, 0, 0, 255)).save(file)
        file.with_suffix(".txt").write_text(caption)
    Image.new("RGBA", (3, 3)).save(folder / "food" / "untold.png")
    return folder


def test_photographs_are_those_with_a_short_caption_of_their_own(tmp_path, monkeypatch):
    import photographs

    monkeypatch.setattr(photographs, "INSTALLED", _stamps(tmp_path))
    monkeypatch.setattr(photographs, "MOST", 3)
    found = photographs.load(24, tmp_path)
    assert [one.caption for one in found] == ["A lark", "A red fox", "An apple"]
    assert all(one.art.size == (24, 24) for one in found)
    monkeypatch.setattr(photographs, "MOST", 2)
    assert photographs.load(24, tmp_path)[1].caption == "A red fox"
    monkeypatch.setattr(photographs, "MOST", 4)
    with pytest.raises(
        photographs.PhotographsError, match="given 3 with short captions in .*, allowed 4 or more; change"
    ):
        photographs.load(24, tmp_path)


def test_every_word_of_a_photograph_s_caption_needs_the_picture(tmp_path, monkeypatch):
    import captions
    import photographs

    monkeypatch.setattr(photographs, "INSTALLED", _stamps(tmp_path))
    monkeypatch.setattr(photographs, "MOST", 3)
    found = photographs.load(24, tmp_path)
    page = photographs.Page((1, 2), (0, 3), "green", 0)
    _, answer, spans = photographs.describe(page, found)
    assert answer == "At the top left: A red fox. At the bottom right: An apple. The background is green."
    words = [answer[slice(*span)] for span in spans]
    assert words == "top left A red fox bottom right An apple green".split()
    kinds = [photographs.KINDS[captions.SORTS["photographs"].kind_of(word) - 1] for word in words]
    place, small, name = "place", "small word", "name"
    assert kinds == [place, place, small, "colour", name, place, place, small, name, "colour"]
    picture = photographs.paint(page, found, random.Random(1), 48)
    red = [found[index].art.getpixel((12, 12))[0] for index in (1, 2)]
    assert [picture[12, 12, 0], picture[36, 36, 0]] == red
    assert picture[12, 36].tolist() == list(captions.scenes.GROUNDS["green"])


def test_photographs_that_cannot_be_had_are_refused_in_one_line(tmp_path, monkeypatch):
    import photographs

    monkeypatch.setattr(photographs, "INSTALLED", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(photographs.PhotographsError, match="given a machine without apt-get; allowed .*install it"):
        photographs.find(tmp_path / "brought")
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho E: no such package >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(photographs.PhotographsError, match="apt-get download, which failed .E: no such package.;"):
        photographs.find(tmp_path / "brought")
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\necho half > {photographs.PACKAGE}_1_all.deb\nkill -9 $$\n")
    with pytest.raises(photographs.PhotographsError):
        photographs.find(tmp_path / "brought")
    assert not list((tmp_path / "brought").glob("*.deb")) and not (tmp_path / "brought" / photographs.PACKAGE).exists()


@pytest.mark.parametrize(("positions", "patch"), [(16, 12), (144, 4), (36, 8)])
def test_pictures_are_cut_into_the_positions_asked_for(positions, patch):
    import run

    assert run.patch_of(size=48, positions=positions) == patch


@pytest.mark.parametrize(("size", "positions"), [(48, 100), (48, 15), (50, 16), (45, 9), (48, 0)])
def test_pictures_that_cannot_be_cut_so_are_refused(size, positions):
    import run
    from launch import CommandError

    with pytest.raises(CommandError, match=f"given {positions} for pictures of {size} pixels; allowed .*change"):
        run.patch_of(size=size, positions=positions)


def test_pictures_of_any_size_show_the_same_scene():
    import random

    import data

    small, large = (data.load_emoji(cell)[:1] for cell in (24, 48))
    assert large[0].art.size == (48, 48) and large[0].name == small[0].name
    scene = data.Scene(parts=((0, (0, 3)),), ground="blue", template=0)
    picture = data.paint(scene, large, random.Random(1), 96)
    assert picture.shape == (96, 96, 3) and data.paint(scene, small, random.Random(1)).shape == (48, 48, 3)
    ground = np.array(data.GROUNDS["blue"])
    assert (picture[:48, 48:] == ground).all() and (picture[48:, :48] == ground).all()
    assert (picture[:48, :48] != ground).any() and (picture[48:, 48:] != ground).any()


def test_a_second_experiment_in_one_folder_is_refused(tmp_path):
    import run
    from launch import CommandError

    with run.held(tmp_path):
        with pytest.raises(CommandError, match="given .* another experiment is at work.*allowed.*change --out"):
            with run.held(tmp_path):
                pass
    with run.held(tmp_path):
        pass


def test_a_start_is_made_once_and_before_the_arms_of_its_seed():
    import run

    happened = []

    class Recorded:
        def start(self, seed):
            happened.append(("start", seed))

        def run(self, one):
            assert ("start", one.seed) in happened
            happened.append((one.arm, one.seed))

    runs = [run.Run(arm, seed, "", 1, False, {}) for seed in (1, 2, 3) for arm in ("a", "b")]
    run.run_all(Recorded(), runs, 2)
    assert sorted(happened) == sorted(
        [("start", seed) for seed in (1, 2, 3)] + [(arm, seed) for seed in (1, 2, 3) for arm in "ab"]
    )


def test_a_seed_whose_start_fails_runs_no_arm():
    import run
    from launch import CommandError

    happened = []

    class Failing:
        def start(self, seed):
            raise CommandError("vision tower: given 61.0%")

        def run(self, one):
            happened.append(one)

    with pytest.raises(CommandError, match="given 61"):
        run.run_all(Failing(), [run.Run("a", 1, "", 1, False, {}), run.Run("b", 1, "", 1, False, {})], 2)
    assert not happened


def test_an_interrupted_command_ends_with_what_it_started(tmp_path):
    import launch

    ended = []

    def run():
        with pytest.raises(launch.CommandError):
            launch.run_command(
                ["bash", "-c", "sleep 60 & echo child $!; wait; true"], tmp_path / "log", title="wrapped"
            )
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(200):
        if (tmp_path / "log").exists() and (found := re.search(r"^child (\d+)", (tmp_path / "log").read_text(), re.M)):
            break
        time.sleep(0.05)
    launch.stop_all()
    thread.join(timeout=20)
    assert ended
    assert any(_has_ended(found[1]) for _ in range(200))


def _has_ended(process: str) -> bool:
    """Whether a process is gone, or dead and not waited for; looks a moment later where it is not."""
    try:
        if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
            return True
    except OSError:
        return True
    time.sleep(0.05)
    return False


class _Tower(torch.nn.Module):
    """A vision tower of one patch: enough to tell four plain colours."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=8, params_dtype=torch.float32)
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 8)

    def forward(self, pictures):
        return torch.tanh(self.layer(pictures.mean(dim=(2, 3))))[:, None]


@pytest.fixture
def coloured(tmp_path):
    """Pictures of one colour each; its word, 1 to 4, is of kind 3, beside a word of kind 1 that nothing tells."""
    rng = np.random.default_rng(0)
    colours = np.array([(250, 40, 40), (40, 250, 40), (40, 40, 250), (250, 250, 40)])
    for part, count in (("train", 64), ("heldout", 32)):
        words = rng.integers(0, 4, count)
        tokens = np.stack((np.zeros(count), 1 + words, 5 + rng.integers(0, 3, count)), axis=1).astype(np.int32)
        needs = np.tile(np.array([3, 1], np.uint8), (count, 1))
        images = np.broadcast_to(colours[words][:, None, None], (count, 4, 4, 3)).astype(np.uint8)
        np.savez(
            tmp_path / f"{part}.npz", images=images, tokens=tokens, loss_mask=np.ones_like(needs), needs_image=needs
        )
    return tmp_path


def test_a_tower_learns_until_it_names_the_held_out_words_and_repeats(coloured):
    import tower

    first, second = _Tower(), _Tower()
    wanted = {"until": 0.99, "most": 2000, "kind": 3, "seed": 1, "every": 10, "lr": 1e-2}
    steps, recall = tower.teach(first, coloured, **wanted)
    assert recall >= 0.99 and 10 <= steps < 2000
    assert tower.teach(second, coloured, **wanted) == (steps, recall)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in first.parameters())


def test_a_tower_that_does_not_get_there_says_how_far_it_came(coloured):
    import tower

    with pytest.raises(tower.NotLearned) as refused:
        tower.teach(_Tower(), coloured, until=0.99, most=30, kind=1, seed=7, every=10)
    assert all(
        word in str(refused.value) for word in ("given", "after 30 steps with seed 7", "allowed 99.0%", "change")
    )


def test_recall_counts_the_wanted_words_among_the_best():
    import tower

    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    wanted = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert tower.recall_of(logits, wanted) == pytest.approx(2 / 3)


def test_a_veil_lies_over_the_patches_that_did_not_run_and_over_no_other():
    import pictures

    image, has_run = np.full((4, 4, 3), 100, np.uint8), np.array([[True, False], [True, True]])
    seen = pictures.veiled(image, has_run)
    assert seen.shape == (16, 16, 3)
    inside = {(row, column): seen[8 * row + 4, 8 * column + 4].tolist() for row in (0, 1) for column in (0, 1)}
    assert [place for place, pixel in inside.items() if pixel != [100] * 3] == [(0, 1)]
    assert (pictures.veiled(image, np.ones((1, 1), bool)) == 100).all()


def test_the_demos_clip_keeps_its_first_frame_and_then_what_moves():
    import clip

    frames = np.full((8, 48, 48, 3), 200, np.uint8)
    frames[:, 40:, 40:] = 10  # stays
    for number in range(8):
        frames[number, :8, 8 * (number % 6) : 8 * (number % 6) + 8, 0] = 0  # moves along the first row
    has_run = clip.planned(frames)
    assert has_run.shape == (8, 6, 6) and has_run[0].all() and has_run.sum() == 72
    assert all(has_run[number, 0, number % 6] and has_run[number, 0, (number - 1) % 6] for number in range(1, 8))
    others = has_run.sum(axis=(1, 2))[1:] - [2] * 7
    assert others.tolist() == [22, 0, 0, 0, 0, 0, 0], "places that did not change are ties: the earlier ones come first"


@pytest.fixture
def usual(tmp_path):
    """Forty rows: a prompt of two, eight answer pieces of which places 1 and 4 need the picture, <eos>, padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 60, (40, 13)).astype(np.int32)
    tokens[:, 10], tokens[:, 11:] = 2, 0
    mask, needs = np.zeros((2, 40, 12), np.uint8)
    mask[:, 1:10] = 1
    needs[:, 2], needs[:, 5] = 1, 3
    (tmp_path / "data").mkdir()
    images = rng.integers(0, 9, (40, 2, 2, 3)).astype(np.uint8)
    for name in ("train", "heldout"):
        np.savez(tmp_path / "data" / f"{name}.npz", images=images, tokens=tokens, loss_mask=mask, needs_image=needs)
    return tmp_path / "data"


def _arrays(folder: Path, name: str = "train") -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def test_noise_is_in_one_caption_of_ten_and_never_in_what_is_held_out(usual):
    import regimes

    before, folder = _arrays(usual), regimes.prepare(usual, "noisy", 1)
    after = _arrays(folder)
    noisy = np.flatnonzero((before["tokens"] != after["tokens"]).any(axis=1))
    assert len(noisy) == 4 and (before["loss_mask"] == after["loss_mask"]).all()
    changed = before["tokens"][:, 1:] != after["tokens"][:, 1:]
    assert (before["loss_mask"][changed] == 1).all() and (after["needs_image"][changed] == 0).all()
    assert (after["tokens"][:, 10] == 2).all() and (after["images"] == before["images"]).all()
    clean = np.setdiff1d(np.arange(40), noisy)
    assert (before["needs_image"][clean] == after["needs_image"][clean]).all()
    assert all((_arrays(usual, "heldout")[key] == value).all() for key, value in _arrays(folder, "heldout").items())
    again = regimes.prepare(usual, "noisy", 1)
    assert again == folder and (_arrays(again)["tokens"] == after["tokens"]).all()


def test_many_epochs_are_a_quarter_of_the_samples(usual):
    import regimes

    after = _arrays(regimes.prepare(usual, "few", 1))
    assert all((after[key] == rows[:10]).all() for key, rows in _arrays(usual).items())


def test_a_third_of_a_mix_is_text_whose_prompt_says_all_that_its_answer_repeats(usual):
    import dataset
    import regimes

    before, rng = _arrays(usual), np.random.default_rng(1)
    told = np.concatenate((before["tokens"][:, :10], rng.integers(10, 60, (40, 60), dtype=np.int32)), axis=1)
    (usual / "long").mkdir()
    np.savez(usual / "long" / "train.npz", tokens=told, loss_mask=np.ones((40, 69), np.uint8))
    folder = regimes.prepare(usual, "mixed", 1)
    after = _arrays(folder)
    text = np.flatnonzero(after["has_image"] == 0)
    assert len(text) == 13 and after["tokens"].shape == (40, 53)
    with_picture = np.flatnonzero(after["has_image"])
    for key in ("tokens", "loss_mask", "needs_image"):
        width = before[key].shape[1]
        assert (after[key][with_picture, :width] == before[key][with_picture]).all()
        assert not after[key][with_picture, width:].any()
    assert (after["tokens"][text, :50] == told[text, :50]).all() and not after["tokens"][text, 50:].any()
    assert (after["loss_mask"][text, 9:49] == 1).all() and after["loss_mask"][text].sum() == 13 * 40
    assert not after["needs_image"][text].any()

    rows = dataset.Captions(folder / "train.npz", 40, with_image=True)
    batch = dataset.collate([rows[i] for i in range(16)])
    assert batch["tokens"].shape == (16, 53) and len(batch["image"]) == int(after["has_image"][:16].sum()) < 16
    has_picture = (batch["tokens"] == dataset.IMAGE_TOKEN).any(dim=1)
    assert has_picture.tolist() == (after["has_image"][:16] == 1).tolist()
    for i in range(16):
        shift = int(has_picture[i])
        assert (batch["tokens"][i, shift : 52 + shift].numpy() == after["tokens"][i, :52]).all()
        assert (batch["labels"][i, shift : 52 + shift].numpy() == after["tokens"][i, 1:]).all()
        assert (batch["loss_mask"][i, shift : 52 + shift].numpy() == after["loss_mask"][i]).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("", ""),
        ("--positions 144", "-144"),
        ("--clips", "-clips"),
        ("--positions 36 --clips", "-36-clips"),
        ("--photographs", "-photographs"),
    ],
)
def test_every_kind_of_picture_has_a_folder_of_its_own(options, name, tmp_path, monkeypatch):
    import run

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run.sys, "argv", ["run.py", "--report-only", *options.split()])
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main() == 0
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == [f"experiments{name}"]


def test_clips_have_no_arms_whose_captions_say_it_all_again(tmp_path):
    import run
    from launch import CommandError

    config = tomllib.loads((FOLDER / "configs" / "cpu.toml").read_text())
    config["pictures"]["sort"] = "clips"
    for data in ("long", "mixed"):
        with pytest.raises(CommandError, match=f"arm mine: data: given {data}; allowed fresh, few, noisy; change it"):
            run.Experiment(config, tmp_path).describe("mine", {"data": data, "plain": True}, 1)


def test_an_arm_with_unknown_data_is_refused(tmp_path):
    import run
    from launch import CommandError

    config = tomllib.loads((FOLDER / "configs" / "cpu.toml").read_text())
    with pytest.raises(
        CommandError, match="arm mine: data: given other; allowed fresh, long, few, noisy, mixed; change it"
    ):
        run.Experiment(config, tmp_path).describe("mine", {"data": "other", "plain": True}, 1)


def test_a_long_answer_says_the_caption_again_and_only_its_first_words_need_the_picture():
    import captions

    drawings = [captions.scenes.Emoji("apple", "food", "fruit", "red", None)]
    scene = captions.scenes.Scene(((0, (0,)),), "white", 1)
    instruction, answer, spans = captions.long_caption(scene, drawings)
    usual = captions.scenes.describe(scene, drawings)
    assert instruction == usual[0] and answer.startswith(usual[1]) and spans == usual[2]
    assert answer.count("red apple") == len(captions.scenes.TEMPLATES)
