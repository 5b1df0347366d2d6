"""The container of difficulty: against a dictionary, its bound, its snapshots, and its files; one rank."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.memory.files import DamagedFile, RecordFile, read_table, write_records, write_table
from regate_megatron.memory.manifests import FORMAT, OtherFormat, read_manifest, write_manifest
from regate_megatron.memory.records import BYTES_PER_SAMPLE, Records
from regate_megatron.memory.state import files_to_read
from regate_megatron.memory.token_statistics import SUMS_BY_TOKEN


def _keys(*numbers: int) -> np.ndarray:
    return np.array([[number, -number] for number in numbers], np.int64).reshape(-1, 2)


def _observe(records: Records, step: int, rows: dict[int, list[float]], decay: float = 0.0) -> None:
    count_N = np.array([len(losses) for losses in rows.values()], np.int64)
    loss_X = np.array([loss for losses in rows.values() for loss in losses], np.float32)
    records.observe(_keys(*rows), count_N, loss_X, decay=decay, step=step)
    records.evict()


def _read(records: Records, number: int, count: int) -> list[float]:
    return records.read(_keys(number), np.array([count])).tolist()


def _content(records: Records) -> dict[tuple[int, int], tuple[int, list[float]]]:
    """Every record, by number and count: last step seen and values, wherever it lies."""
    snapshot = records.snapshot()
    records.release()
    content = {}
    for piece in snapshot.pieces():
        values = np.split(piece.value_X, piece.count_N.cumsum()[:-1])
        columns = zip(piece.key_N2[:, 0].tolist(), piece.count_N.tolist(), piece.seen_N.tolist(), values, strict=True)
        content |= {(number, count): (seen, value_T.tolist()) for number, count, seen, value_T in columns}
    return content


@given(
    block=st.integers(1, 9),
    steps=st.lists(st.dictionaries(st.integers(-(2**62), 2**62), st.integers(0, 7), max_size=5), max_size=30),
)
def test_records_are_those_of_a_dictionary_however_blocks_cut_them(block, steps):
    records, slow = Records(1e9, values_per_block=block), {}
    for step, counts in enumerate(steps):
        rows = {number: [float(step + at) for at in range(count)] for number, count in counts.items()}
        _observe(records, step, rows)
        slow |= {(number, len(values)): values for number, values in rows.items() if values}
    assert len(records) == len(slow)
    for (number, count), values in slow.items():
        assert _read(records, number, count) == values


def test_a_hundred_thousand_records_are_all_found():
    records, number_N = Records(1e9), np.arange(100_000)
    key_N2 = np.stack([number_N * 1024, number_N // 3], axis=1)  # as regular as keys never are
    for part in np.array_split(number_N, 7):
        records.observe(key_N2[part], np.ones(len(part), np.int64), np.float32(part % 1000), decay=0.9, step=0)
    assert np.array_equal(records.read(key_N2, np.ones(100_000, np.int64)), np.float16(number_N % 1000))
    assert np.isnan(records.read(key_N2 + 7, np.ones(100_000, np.int64))).all()


def _sample_bytes(count: int) -> int:
    return BYTES_PER_SAMPLE + 2 * count


def test_the_least_recently_seen_go_whole_steps_at_a_time():
    records = Records(4 * _sample_bytes(10))
    for step in range(4):
        _observe(records, step, {step: [float(step)] * 10})
    assert len(records) == 4 and records.evicted_samples == 0
    _observe(records, 4, {0: [5.0] * 10})  # seen again: no longer the oldest
    _observe(records, 5, {4: [4.0] * 10})  # over the bound: 1 and 2 bring it below 7/8, 1 alone would not
    assert {number for number, _ in _content(records)} == {0, 3, 4}
    assert records.evicted_samples == 2 and records.bytes_used <= records.limit_bytes
    assert _read(records, 0, 10) == [5.0] * 10 and np.isnan(_read(records, 1, 10)).all()
    _observe(records, 6, {1: [1.0] * 10})
    assert _read(records, 1, 10) == [1.0] * 10


@given(st.lists(st.dictionaries(st.integers(0, 40), st.integers(1, 9), min_size=1, max_size=6), max_size=40))
def test_memory_stays_within_its_bound_and_what_is_left_is_right(steps):
    records, slow = Records(12 * _sample_bytes(5), values_per_block=16), {}
    for step, counts in enumerate(steps):
        rows = {number: [float(step)] * count for number, count in counts.items()}
        _observe(records, step, rows)
        slow |= {(number, len(values)): step for number, values in rows.items()}
        assert records.bytes_used <= records.limit_bytes
    left = sorted((step, key) for key, step in slow.items() if _read(records, *key) == [float(step)] * key[1])
    oldest = left[0][0] if left else 0
    assert {key for _, key in left} == {key for key, step in slow.items() if step >= oldest}


def test_a_snapshot_stays_as_it_was_while_training_goes_on():
    records = Records(1e9, values_per_block=4)
    _observe(records, 0, {1: [1.0] * 6, 2: [2.0] * 3})
    first = records.snapshot()
    _observe(records, 1, {1: [9.0] * 6, 3: [3.0] * 9})
    second = records.snapshot()
    records.release()
    _observe(records, 2, {2: [8.0] * 3})
    (before,), (after,) = first.pieces(), second.pieces()
    assert before.value_X.tolist() == [1.0] * 6 + [2.0] * 3 and before.seen_N.tolist() == [0, 0]
    assert after.value_X.tolist() == [9.0] * 6 + [2.0] * 3 + [3.0] * 9
    assert _read(records, 2, 3) == [8.0] * 3


NAME = "difficulty-00000.records"


def _saved(folder, steps: int = 40) -> Records:
    records = Records(1e9, values_per_block=64)
    for step in range(steps):
        _observe(records, step, {7 * step % 31: [step / 8.0] * (step % 5), 1000 + step: [1.0, np.nan, 3.0]}, decay=0.9)
    write_records(folder / NAME, len(records), records.snapshot().pieces)
    records.release()
    return records


def _loaded(folder, *, rank: int = 0, size: int = 1) -> Records:
    records = Records(1e9)
    file, entry_N = RecordFile.open(folder / NAME)
    for piece in file.pieces(entry_N, lambda key_N2: key_N2[:, 0] % size == rank):
        records.append(piece)
    return records


def test_what_is_loaded_is_bit_for_bit_what_was_saved(tmp_path):
    records = _saved(tmp_path)
    again = _loaded(tmp_path)
    assert repr(_content(again)) == repr(_content(records))  # repr: NaN equals NaN
    assert again.bytes_used == records.bytes_used


@pytest.mark.parametrize("size", [1, 2, 3])
def test_readers_of_any_number_share_what_was_saved(tmp_path, size):
    records = _saved(tmp_path)
    parts = [_content(_loaded(tmp_path, rank=rank, size=size)) for rank in range(size)]
    assert sum(map(len, parts)) == len(records)
    assert sorted(repr(item) for part in parts for item in part.items()) == sorted(map(repr, _content(records).items()))


def test_a_planner_reads_every_file_that_can_hold_its_samples():
    for num_files in range(1, 9):
        for size in range(1, 9):
            holds = {(key % size, key % num_files) for key in range(-200, 200)}
            read = {(rank, file) for rank in range(size) for file in files_to_read(rank, size, num_files)}
            assert holds == read  # and none besides


def test_a_reloaded_container_forgets_what_the_other_one_does(tmp_path):
    records = _saved(tmp_path)
    again = _loaded(tmp_path)
    again.limit_bytes = records.limit_bytes = records.bytes_used
    for step in range(40, 80):
        for one in (records, again):
            _observe(one, step, {5 * step % 37: [float(step)] * 4})
    assert records.evicted_samples == again.evicted_samples > 0
    assert repr(sorted(_content(again).items())) == repr(sorted(_content(records).items()))


def test_numpy_reads_a_file_as_its_arrays_and_unpickles_nothing(tmp_path):
    records = _saved(tmp_path)
    with (tmp_path / NAME).open("rb") as file:
        entries, values, seal = (np.load(file, allow_pickle=False) for _ in range(3))
        assert not file.read()
    counts = np.diff(entries["end"], prepend=0)
    found = {(int(key[0]), int(count)) for key, count in zip(entries["key"], counts, strict=True)}
    assert found == set(_content(records)) and len(values) == records.num_targets and len(seal) == 1


def test_files_are_byte_for_byte_what_this_format_always_was(tmp_path):
    """Whoever changes this raises FORMAT, so that files of before are refused by name."""
    _saved(tmp_path, steps=6)
    write_table(tmp_path / "prior.table", np.array([(3, 1, 1.0), (70_000, 2, 3.5)], SUMS_BY_TOKEN))
    found = [xxhash.xxh3_64_hexdigest((tmp_path / name).read_bytes()) for name in (NAME, "prior.table")]
    assert (FORMAT, found) == (3, ["7167db9e96d6cffa", "9540e5227b7dcf1f"])


@pytest.mark.parametrize("missing", [1, 9, 300, None])
def test_a_truncated_or_missing_file_is_not_read(tmp_path, missing):
    _saved(tmp_path)
    path = tmp_path / NAME
    if missing is None:
        path.unlink()
        with pytest.raises(FileNotFoundError):
            _loaded(tmp_path)
    else:
        path.write_bytes(path.read_bytes()[:-missing])
        with pytest.raises(DamagedFile, match=r"bytes of|an early end"):
            _loaded(tmp_path)


def test_no_flipped_bit_of_records_goes_unseen(tmp_path):
    _saved(tmp_path, steps=6)
    path = tmp_path / NAME
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(DamagedFile):
            _loaded(tmp_path)
    path.write_bytes(whole)
    _loaded(tmp_path)


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path):
    def pieces():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_records(tmp_path / NAME, 3, pieces)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_first_writers_one_wins_and_nothing_else_is_left(tmp_path, monkeypatch, links):
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:  # such a file system has no first one: the last one stays, whole
        monkeypatch.setattr("os.link", unsupported)
    for number in (1, 2):
        write_manifest(tmp_path / "manifest.json", {"number": number}, first_wins=True)
    assert read_manifest(tmp_path / "manifest.json") == {"number": 1 if links else 2}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    path = tmp_path / "prior.table"
    np.save(path.open("wb"), np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedFile, match="another array"):
        read_table(path, SUMS_BY_TOKEN)


def test_no_flipped_bit_of_a_table_goes_unseen(tmp_path):
    path, table = tmp_path / "prior.table", np.array([(3, 1, 1.0), (70_000, 2, 3.5)], SUMS_BY_TOKEN)
    facts = write_table(path, table)
    found, again = read_table(path, SUMS_BY_TOKEN)
    assert found.tolist() == table.tolist() and again == facts
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(DamagedFile):
            read_table(path, SUMS_BY_TOKEN)


def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path):
    path, content = tmp_path / "state.json", {"step": 12, "overall": 0.1, "difficulty": [{"seal": -5}]}
    write_manifest(path, content)
    whole = path.read_bytes()
    assert read_manifest(path) == content
    for at in range(len(whole)):
        damaged = whole[:at] + bytes([whole[at] ^ (1 << at % 7)]) + whole[at + 1 :]
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(whole)  # between tokens one white space may become another
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DamagedFile):
                read_manifest(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_manifest(path)


@pytest.mark.parametrize(("text", "number"), [('{"step": 1, "version": 1}', 1), ('{"format": 2, "teacher": {}}', 2)])
def test_a_manifest_of_an_earlier_format_is_told_from_a_damaged_one(tmp_path, text, number):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(OtherFormat, match=f"format {number}"):
        read_manifest(tmp_path / "state.json")
