"""What of benchmarks/gpu can be checked without a GPU: loads that are carried, counts, and the code of every part."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.gpu import installing, machine, parcel, report
from benchmarks.gpu.work import Work, conv
from regate_megatron.errors import ReGateError
from tests.launch import ROOT

LIMIT = 1000


@pytest.fixture
def sent(tmp_path):
    """Files of several sizes, packed."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = []
    for size in (0, 1, LIMIT, LIMIT + 1, 3 * LIMIT + 7, 400, 500):
        files.append(folder / f"package{size}.whl")
        files[-1].write_bytes(random.Random(size).randbytes(size))
    return files, tmp_path / "parcel", parcel.pack(files, tmp_path / "parcel", LIMIT, {"commit": "abc"})


def test_files_come_out_of_small_loads_as_they_went_in(sent, tmp_path):
    files, folder, manifest = sent
    for load in folder.iterdir():
        assert sum(path.stat().st_size for path in load.iterdir() if path.name != parcel.MANIFEST) <= LIMIT
    assert parcel.read_manifest(folder) == manifest
    joined = parcel.unpack(manifest, folder, tmp_path / "joined")
    assert {path.name: path.read_bytes() for path in joined} == {path.name: path.read_bytes() for path in files}


def test_nobody_elses_folder_is_emptied(sent, tmp_path):
    files, folder, manifest = sent
    assert parcel.pack(files, folder, LIMIT, {"commit": "abc"}) == manifest  # in the place of the one before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ReGateError, match="--parcel: given .*mine, which is no parcel"):
        parcel.pack(files, tmp_path / "mine", LIMIT, {})
    with pytest.raises(ReGateError, match="--site: given .*mine, which was not made here"):
        installing.install(manifest, SimpleNamespace(site=tmp_path / "mine"))
    assert (tmp_path / "mine" / "file").exists()


def test_a_load_that_has_not_arrived_is_named(sent):
    _, folder, manifest = sent
    assert parcel.missing_loads(manifest, folder) == []
    for path in (folder / "02").iterdir():
        path.unlink()
    assert parcel.missing_loads(manifest, folder) == [2]


def test_a_damaged_piece_is_refused(sent, tmp_path):
    _, folder, manifest = sent
    piece = next(folder.glob("*/*.part01"))
    piece.write_bytes(bytes(len(piece.read_bytes())))
    with pytest.raises(ReGateError, match=f"{piece.name} with another SHA-256"):
        parcel.unpack(manifest, folder, tmp_path / "joined")


def test_loads_of_two_parcels_are_refused(sent, tmp_path):
    _, folder, _ = sent
    manifest = next(folder.glob(f"*/{parcel.MANIFEST}"))
    manifest.write_text(json.dumps({"loads": 1, "files": []}))
    with pytest.raises(ReGateError, match="loads of 2 parcels"):
        parcel.read_manifest(folder)


def test_work_counts_each_matrix_and_each_key_a_query_reads():
    work = Work(rows=3, num_layers=4, weights_per_layer=1000, attention_width=16, head_weights=500)
    length, short = 256, 128
    read = [position + 1 for position in range(length)]  # two products, two operations each, three passes
    exact = 3 * 3 * sum(2 * 1000 + 4 * 16 * keys for keys in read)
    assert work.layer(length) == pytest.approx(exact, rel=2 / length)
    assert work.decoder(length, short, 1) == work.layer(length) + 3 * work.layer(short)
    assert work.step(length, short, 0) - work.decoder(length, short, 0) == 3 * 3 * 2 * short * 500


def test_conv_is_one_where_time_follows_work():
    assert conv(0.6, 1.0, 60.0, 100.0) == pytest.approx(1)
    assert conv(0.8, 1.0, 60.0, 100.0) == pytest.approx(0.5)


def _rehearsed(folder, part="parity"):
    about = {"rehearsal": True, "torch": "2.11"}
    results = {"part": part, "machine": about, "measurements": [], "skipped": [{"name": "a", "reason": "no GPU"}]}
    (folder / f"{part}.json").write_text(json.dumps(results))


def test_results_of_a_rehearsal_stay_out_of_the_documentation(tmp_path, capsys):
    _rehearsed(tmp_path)
    page = report.PAGE.read_text()
    with pytest.raises(ReGateError, match="results of a rehearsal: parity"):
        report.run(SimpleNamespace(out=tmp_path, cpu_rehearsal=False))
    assert report.run(SimpleNamespace(out=tmp_path, cpu_rehearsal=True)) == 0
    assert "skipped: a (no GPU)" in capsys.readouterr().out
    assert report.PAGE.read_text() == page
    assert "new figures" in report.with_results(page, "new figures")


def test_without_a_gpu_a_part_stops_in_one_line(tmp_path):
    run = _part("parity", "--out", str(tmp_path))
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 1 and lines[-1].startswith("regate: benchmarks/gpu/run.py parity: given torch sees no GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize(
    "part, only", [("parity", "n1"), ("parity", "keep1-gpt-fp32"), ("step_time", ""), ("fp8", "e"), ("learning", "")]
)
def test_every_part_runs_in_small_on_a_cpu(tmp_path, part, only):
    """What holds there holds exactly; figures of time mean nothing and are judged nowhere."""
    seconds = "20" if part == "learning" else "300"  # the experiment takes an hour and is ended
    run = _part(part, "--cpu-rehearsal", "--only", only, "--out", str(tmp_path), "--budget-seconds", seconds)
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert [one["name"] for one in results["measurements"] if one["holds"] is False] == [], run.stderr[-3000:]
    assert results["machine"]["rehearsal"] and results["machine"]["source_sha256"] == machine.source_digest()
    assert results["measurements"] or part == "learning"


def _part(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
