"""tools/reference_cache.py: what it counts, what it finds damaged, what it merges."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
import torch

from regate_megatron.memory.references import ReferenceCache, rounded
from regate_megatron.teacher.cache_survey import survey
from regate_megatron.teacher.manifest import claim
from tests.launch import ROOT

TEACHER = {"weights": "00aa", "architecture": {"num_layers": 4}, "vocab_size": 64, "tokenizer": None}


TOOL = runpy.run_path(str(ROOT / "tools/reference_cache.py"))


@pytest.fixture
def tool(capsys):
    """Run a command in this process; returns its standard output and error."""

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        assert TOOL["main"](list(map(str, words))) == code
        return capsys.readouterr()

    return run


def _fill(directory, numbers, teacher=TEACHER) -> dict[bytes, torch.Tensor]:
    claim(directory, teacher)
    cache, records = ReferenceCache(directory, "w"), {}
    for n in numbers:
        records[np.array([n, n], np.int64).tobytes()] = rounded(torch.full((10,), n / 8))
    labels = [torch.tensor([n] * 10) for n in numbers]
    cache.add(list(records), list(records.values()), labels)
    cache.close()
    return records


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return folder, _fill(folder / "one", range(20)) | _fill(folder / "two", range(10, 30))


def test_survey_is_numpy_on_all_losses(caches):
    folder, _ = caches
    found = survey(folder / "one")
    everything = np.repeat(np.arange(20) / 8, 10)
    assert (found.num_files, found.num_records, found.num_losses) == (1, 20, 200)
    assert found.mean == pytest.approx(everything.mean())
    shares = [0.01, 0.1, 0.5, 0.75, 0.99]
    assert found.quantiles(shares) == np.quantile(everything, shares, method="inverted_cdf").tolist()
    edges = np.linspace(0, 3, 7)
    assert found.histogram(edges).tolist() == np.histogram(everything, edges)[0].tolist()


def test_commands_print_what_is_there(caches, tmp_path, tool):
    folder, _ = caches
    text = tool("summary", folder / "one").out
    assert "records      20" in text and "losses       200" in text and '"00aa"' in text and "50% 1.125" in text
    assert "no file is damaged" in tool("verify", folder / "one").out
    tool("plot", folder / "one", "--output", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
    lines = tool("tokens", folder / "one", "--number", "2").out.splitlines()
    assert lines[0] == "hardest of 20 tokens seen 10 times or more"
    assert [line.split() for line in lines[1:3]] == [
        ["2.375", "10", "times", "id", "19"],
        ["2.250", "10", "times", "id", "18"],
    ]
    assert lines[4].split()[-1] == "0"


def test_merged_cache_has_every_record_once(caches, tmp_path, tool):
    folder, records = caches
    for _ in range(2):  # the second time there is nothing to add
        last = tool("merge", folder / "one", folder / "two", "--target", tmp_path / "merged").out
    assert "added 0 records" in last
    cache = ReferenceCache(tmp_path / "merged", "r")
    assert len(cache) == len(records) == 30
    found = cache.look_up(list(records), [10] * len(records))
    assert all(torch.equal(loss, known) for loss, known in zip(found, records.values(), strict=True))
    lines = tool("tokens", tmp_path / "merged", "--number", "40").out.splitlines()
    counts = {line.split()[-1]: line.split()[1] for line in lines if " times  id" in line}
    assert counts["0"] == "10" and counts["15"] == "20" and counts["29"] == "10"


def test_verify_names_the_damaged_file(tmp_path, tool):
    _fill(tmp_path / "cache", range(5))
    path = next((tmp_path / "cache" / "losses").iterdir())
    path.write_bytes(path.read_bytes()[:-3])
    run = tool("verify", tmp_path / "cache", code=1)
    assert f"{path}: " in run.out and "0 sound files" in run.out


def test_caches_of_different_teachers_are_not_merged(caches, tmp_path, tool):
    _fill(tmp_path / "other", range(3), {**TEACHER, "weights": "00bb"})
    run = tool("merge", caches[0] / "one", tmp_path / "other", "--target", tmp_path / "merged", code=1)
    assert run.err.splitlines()[-1].startswith("regate: --regate-reference-cache: given") and "00bb" in run.err
    assert "which has no manifest" in tool("summary", tmp_path, code=1).err
