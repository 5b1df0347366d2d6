"""The reference-loss cache: what is written is read back, and nothing damaged is ever used."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.memory import references
from regate_megatron.memory.files import DamagedFile, RecordFile
from regate_megatron.memory.key_index import KeyIndex
from regate_megatron.memory.references import RecentLosses, ReferenceCache, rounded
from regate_megatron.memory.token_statistics import TokenStatistics


def _key(number: int, first: int | None = None) -> bytes:
    return np.array([number if first is None else first, number], np.int64).tobytes()


def _losses(number: int, count: int) -> torch.Tensor:
    return rounded(torch.rand(count, generator=torch.Generator().manual_seed(number)) * 12)


def _add(cache, numbers, count=None) -> dict[bytes, torch.Tensor]:
    records = {_key(n): _losses(n, n % 7 if count is None else count) for n in numbers}
    cache.add(list(records), list(records.values()), [torch.arange(len(loss)) for loss in records.values()])
    return records


def _found(cache, records: dict[bytes, torch.Tensor]) -> list:
    return cache.look_up(list(records), [len(loss) for loss in records.values()])


def _same(found, records) -> bool:
    return all(
        loss is not None and torch.equal(loss, known) for loss, known in zip(found, records.values(), strict=True)
    )


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.lists(st.integers(0, 40), max_size=8)),
            st.tuples(st.sampled_from(["flush", "reopen", "other writer", "refresh"]), st.just([])),
        ),
        max_size=12,
    )
)
def test_cache_equals_a_dictionary(tmp_path_factory, actions):
    folder, known = tmp_path_factory.mktemp("cache"), {}
    cache = ReferenceCache(folder, "a")
    for action, numbers in actions:
        if action == "add" and numbers:
            known |= _add(cache, set(numbers))
        elif action == "flush":
            cache.flush()
        elif action == "reopen":
            cache.close()
            cache = ReferenceCache(folder, "a")
        elif action == "refresh":
            cache.refresh()
        elif action == "other writer":
            other = ReferenceCache(folder, "b")
            known |= _add(other, range(50, 53))
            other.close()
            cache.refresh()
        assert _same(_found(cache, known), known)
        assert cache.look_up([_key(99)], [3]) == [None]
    cache.close()
    assert not list(folder.rglob("*.incomplete"))


@pytest.fixture
def written(tmp_path):
    """A cache with one file of four records."""
    cache = ReferenceCache(tmp_path, "a")
    records = _add(cache, range(4), count=5)
    cache.close()
    return tmp_path, next((tmp_path / "losses").iterdir()), records


def test_file_cut_anywhere_is_reported_once_and_left_out(written, capsys):
    folder, path, records = written
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        cache = ReferenceCache(folder, "b")
        assert _found(cache, records) == [None] * 4
        cache.refresh()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and path.name in lines[0], (size, lines)
    with pytest.raises(DamagedFile):
        RecordFile.open(path)


def test_no_flipped_bit_changes_a_loss(written, capsys):
    folder, path, records = written
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        cache = ReferenceCache(folder, "b")
        found = _found(cache, records)
        cache.close()
        assert all(
            loss is None or torch.equal(loss, known) for loss, known in zip(found, records.values(), strict=True)
        ), place
        noticed += any(loss is None for loss in found)
        assert bool(capsys.readouterr().out) == any(loss is None for loss in found), place
    assert noticed == len(whole)


def test_file_cut_while_in_use_is_noticed(written):
    folder, path, records = written
    cache = ReferenceCache(folder, "b")
    assert _same(_found(cache, records), records)
    os.truncate(path, 100)
    assert _found(cache, records) == [None] * 4


def test_damaged_record_is_computed_again_and_found(written, capsys):
    folder, path, records = written
    data = bytearray(path.read_bytes())
    data[data.index(records[_key(0)].half().numpy().tobytes())] ^= 1
    path.write_bytes(data)
    cache = ReferenceCache(folder, "b")
    assert [loss is None for loss in _found(cache, records)] == [True, False, False, False]
    _add(cache, range(1), count=5)
    cache.flush()
    assert _same(_found(cache, records), records)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_keys_that_share_their_first_half_are_told_apart(tmp_path):
    cache = ReferenceCache(tmp_path, "a")
    keys = [_key(n, first=7) for n in range(3)]
    for n, key in enumerate(keys):  # two in one file, one in another
        cache.add([key], [_losses(n, 4)], [torch.zeros(4, dtype=torch.int64)])
        if n:
            cache.flush()
    assert all(torch.equal(loss, _losses(n, 4)) for n, loss in enumerate(cache.look_up(keys, [4] * 3)))
    assert cache.look_up([_key(9, first=7)], [4]) == [None]


def test_record_with_another_number_of_targets_is_not_used(written):
    folder, _, records = written
    assert ReferenceCache(folder, "b").look_up(list(records), [4] * 4) == [None] * 4


def test_losses_are_on_disk_within_the_interval(tmp_path):
    cache = ReferenceCache(tmp_path, "a", write_seconds=0.05)
    records = _add(cache, range(3))
    other = ReferenceCache(tmp_path, "b")
    for _ in range(200):
        other.refresh()
        if _same(_found(other, records), records):
            break
        time.sleep(0.05)
    assert _same(_found(other, records), records)
    cache.close()


def test_memory_for_waiting_losses_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MAX_WAITING_BYTES", 2000)
    cache = ReferenceCache(tmp_path, "a")
    known, most = {}, 0
    for start in range(0, 400, 4):
        known |= _add(cache, range(start, start + 4), count=50)
        most = max(most, cache._waiting_bytes)
    assert most <= 2 * 2000 + 4 * (100 + 300)
    assert _same(_found(cache, known), known)
    cache.close()


def test_disk_that_fails_is_reported_and_training_goes_on(tmp_path, capsys):
    cache = ReferenceCache(tmp_path, "a")
    _add(cache, range(3))
    (tmp_path / "losses").rename(tmp_path / "gone")
    cache.flush()
    assert "3 losses not written" in capsys.readouterr().out
    assert cache.look_up([_key(2)], [2]) == [None]
    (tmp_path / "gone").rename(tmp_path / "losses")
    records = _add(cache, range(3))
    cache.close()
    assert _same(_found(ReferenceCache(tmp_path, "b"), records), records)


def test_loss_that_is_not_finite_never_gets_in(tmp_path):
    cache = ReferenceCache(tmp_path, "a")
    with pytest.raises(AssertionError):
        cache.add([_key(1)], [torch.tensor([1.0, torch.nan])], [torch.zeros(2, dtype=torch.int64)])
    cache.close()
    assert len(ReferenceCache(tmp_path, "b")) == 0
    assert rounded(torch.tensor([1e9])).isfinite().all()


def test_fresh_losses_are_used_as_they_will_be_read(tmp_path):
    loss = torch.rand(1000) * 20
    cache = ReferenceCache(tmp_path, "a")
    cache.add([_key(1)], [rounded(loss)], [torch.zeros(1000, dtype=torch.int64)])
    before = cache.look_up([_key(1)], [1000])[0]
    cache.flush()
    assert torch.equal(before, rounded(loss)) and torch.equal(cache.look_up([_key(1)], [1000])[0], before)
    cache.close()


def _write_for_ever(folder: Path, start: int, sends) -> None:
    cache = ReferenceCache(folder, "w", write_seconds=0.001)
    for number in range(start, start + 100_000, 8):
        records = {_key(n): torch.full((2000,), float(n % 500)) for n in range(number, number + 8)}
        cache.add(list(records), list(records.values()), [torch.arange(2000)] * 8)
        cache.flush()
        sends.send(number + 8)  # so many are on disk


def test_writers_killed_at_any_moment_leave_a_readable_cache(tmp_path, capsys):
    """Two at once, killed while they write; what they said is on disk is there, and nothing is damaged."""
    fork, chance = multiprocessing.get_context("fork"), random.Random(5)
    ends = {}
    for attempt in range(6):
        writers = {}
        for start in (2_000_000 * attempt, 2_000_000 * attempt + 1_000_000):
            hears, sends = fork.Pipe(duplex=False)
            writers[start] = fork.Process(target=_write_for_ever, args=(tmp_path, start, sends)), hears
            writers[start][0].start()
            sends.close()
        for start, (_, hears) in writers.items():
            ends[start] = hears.recv()
        time.sleep(chance.random() * 0.2)
        for writer, _ in writers.values():
            os.kill(writer.pid, signal.SIGKILL)
        for start, (writer, hears) in writers.items():
            writer.join()
            try:
                while True:
                    ends[start] = hears.recv()
            except EOFError:
                hears.close()
    cache = ReferenceCache(tmp_path, "reader")
    for start, end in ends.items():
        found = cache.look_up([_key(n) for n in range(start, end)], [2000] * (end - start))
        assert all(bool((loss == n % 500).all()) for n, loss in zip(range(start, end), found, strict=True))
    assert not capsys.readouterr().out


@given(st.lists(st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1), max_size=20), max_size=12))
def test_index_finds_every_place_of_a_key(files):
    index, expected = KeyIndex(), {}
    for number, firsts in enumerate(files):
        index.add(np.array(firsts, np.int64), number)
        for row, first in enumerate(firsts):
            expected.setdefault(first, set()).add((number, row))
    asked = [*expected, 12345]
    found = index.find(np.array(asked, np.int64))
    assert [set(places) for places in found] == [expected.get(first, set()) for first in asked]
    assert len(index) == sum(map(len, files))
    assert len(index._segments) <= 2 + int(np.log2(1 + len(index)))


def test_memory_forgets_the_least_recently_used():
    memory = RecentLosses(max_bytes=3 * (400 + 4 * 10))
    for number in range(3):
        _add(memory, [number], count=10)
    assert memory.look_up([_key(0)], [10]) != [None]  # used again
    _add(memory, [3], count=10)
    assert [loss is None for loss in memory.look_up([_key(n) for n in range(4)], [10] * 4)] == [
        False,
        True,
        False,
        False,
    ]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 8)), max_size=6), min_size=1, max_size=4))
def test_token_statistics_add_up_over_files(tmp_path_factory, parts):
    folder, total = tmp_path_factory.mktemp("tokens"), {}
    for number, part in enumerate(parts):
        statistics = TokenStatistics()
        statistics.add(np.array([i for i, _ in part], np.int64), np.array([v for _, v in part], np.float32))
        statistics.write(folder / f"part-{number}.table")
        for token, value in part:
            count, loss = total.get(token, (0, 0))
            total[token] = (count + 1, loss + value)
    merged = TokenStatistics()
    for path in Path(folder).iterdir():
        merged.read(path)
    ids, counts, sums = merged.seen()
    assert {i: (c, s) for i, c, s in zip(ids.tolist(), counts.tolist(), sums.tolist(), strict=True)} == total
