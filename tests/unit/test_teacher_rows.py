"""What the teacher reads: the text up to the last target at its original positions, or placeholders for the visuals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.teacher.rows import TeacherRows, grown, pack_positions, rows_for_teacher
from regate_megatron.teacher.run import targets_of

PAD = 99
TENSORS = ("token_NK", "position_NK", "num_read_N", "target_slot_NT", "label_NT", "num_target_N")

# One letter per merged position: v visual, c context text, t target, . padding.
KINDS = "vct."


def _rows(*kinds: str, visual: str) -> TeacherRows:
    """Rows with token 10 + position (7 at visual positions) and label 50 + position."""
    places = torch.arange(len(kinds[0]))
    table = [[KINDS.index(letter) for letter in row] for row in kinds]
    kind_NS = torch.tensor(table)
    is_visual_NS, is_target_NS = kind_NS == 0, kind_NS == 2
    token_NS = torch.where(is_visual_NS, 7, 10 + places)
    return rows_for_teacher(
        token_NS,
        places.expand_as(token_NS),
        (50 + places).expand_as(token_NS).contiguous(),
        is_target_NS,
        (kind_NS == 0) | (kind_NS == 1),
        is_visual_NS,
        visual=visual,
        pad_token=PAD if visual == "pad" else None,
    )


def test_drop_leaves_visuals_out_and_keeps_the_original_positions():
    rows = _rows("cvvctcttc.", visual="drop")
    assert rows.position_NK.tolist() == [[0, 3, 4, 5, 6, 7]]  # nothing after the last target
    assert rows.token_NK.tolist() == [[10, 13, 14, 15, 16, 17]]
    assert rows.target_slot_NT.tolist() == [[2, 4, 5]]
    assert rows.label_NT.tolist() == [[54, 56, 57]]
    assert rows.num_read_N.tolist() == [6] and rows.num_target_N.tolist() == [3]
    assert rows.dense_length == 10


def test_pad_puts_a_placeholder_at_every_visual_position():
    rows = _rows("cvvctcttc.", visual="pad")
    assert rows.position_NK.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert rows.token_NK.tolist() == [[10, PAD, PAD, 13, 14, 15, 16, 17]]
    assert rows.target_slot_NT.tolist() == [[4, 6, 7]]
    assert rows.label_NT.tolist() == [[54, 56, 57]]


def test_shorter_rows_are_filled_at_the_end():
    rows = _rows("vvvcct", "cctccc", visual="drop")
    assert rows.num_read_N.tolist() == [3, 3] and rows.token_NK.shape == (2, 3)
    rows = _rows("vvvcct", "ctcctt", visual="drop")
    assert rows.num_read_N.tolist() == [3, 6] and rows.num_target_N.tolist() == [1, 3]
    assert rows.position_NK.tolist() == [[3, 4, 5, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert rows.target_slot_NT[0, 0] == 2 and rows.label_NT[0, 0] == 55


def test_rows_without_targets_are_read_as_nothing_and_keep_the_shapes_legal():
    rows = _rows("ccvc", "vvvv", visual="drop")
    assert rows.num_read_N.tolist() == rows.num_target_N.tolist() == [0, 0]
    assert rows.token_NK.shape == (2, 1) and rows.target_slot_NT.shape == (2, 1)
    assert rows.target_slot_NT.tolist() == [[0], [0]]


KIND_ROWS = st.integers(1, 8).flatmap(
    lambda width: st.lists(st.text(alphabet=KINDS, min_size=width, max_size=width), min_size=1, max_size=3)
)


@pytest.mark.parametrize("visual", ["drop", "pad"])
@given(kinds=KIND_ROWS)
def test_every_row_is_what_a_walk_over_its_positions_gives(visual, kinds):
    rows = _rows(*kinds, visual=visual)
    assert len(rows) == len(kinds)
    for index, row in enumerate(kinds):
        read = [place for place in range(row.rfind("t") + 1) if row[place] in ("ct" if visual == "drop" else "vct")]
        targets = [place for place in range(len(row)) if row[place] == "t"]
        count, goals = int(rows.num_read_N[index]), int(rows.num_target_N[index])
        assert rows.position_NK[index, :count].tolist() == read
        assert rows.token_NK[index, :count].tolist() == [PAD if row[place] == "v" else 10 + place for place in read]
        slots = rows.target_slot_NT[index, :goals]
        assert rows.position_NK[index, slots].tolist() == targets
        assert rows.label_NT[index, :goals].tolist() == [50 + place for place in targets]
    assert int(rows.target_slot_NT.min()) >= 0 and int(rows.target_slot_NT.max()) < rows.token_NK.shape[1]
    assert rows.token_NK.shape[1] == max(1, int(rows.num_read_N.max()))


@pytest.mark.parametrize("visual", ["drop", "pad"])
@given(kinds=KIND_ROWS)
def test_a_packed_request_comes_back_whole(visual, kinds):
    rows = _rows(*kinds, visual=visual)
    flat = rows.pack()
    assert flat.dtype == torch.int64 and flat.dim() == 1
    again = TeacherRows.unpack(flat)
    assert again.dense_length == rows.dense_length and len(again) == len(rows)
    for name in TENSORS:
        assert torch.equal(getattr(again, name), getattr(rows, name)), name


def test_cutting_rows_changes_no_input():
    token = torch.tensor([[1, 2, 3]])
    label = torch.tensor([[2, 3, 4]])
    target, context = torch.tensor([[False, False, True]]), torch.tensor([[True, True, False]])
    visual = torch.tensor([[True, False, False]])
    before = [part.clone() for part in (token, label, target, context, visual)]
    for kind in ("drop", "pad"):
        rows_for_teacher(
            token,
            torch.arange(token.shape[1]).expand_as(token),
            label,
            target,
            context,
            visual,
            visual=kind,
            pad_token=PAD,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, (token, label, target, context, visual), strict=True))


def test_a_grown_request_has_empty_rows_and_fill_at_the_end():
    rows = _rows("vvvcct", "ctcctt", visual="drop")
    sizes = rows.sizes + torch.tensor([1, 4, 0, 2, 3])
    more = grown(rows, sizes)
    assert more.sizes.tolist() == sizes.tolist()
    assert more.num_read_N.tolist() == [3, 6, 0] and more.num_target_N.tolist() == [1, 3, 0]
    for name in TENSORS:
        own, large = getattr(rows, name), getattr(more, name)
        assert torch.equal(large[tuple(slice(size) for size in own.shape)], own)
        assert int(large.sum()) == int(own.sum())
    assert grown(None, sizes).num_read_N.tolist() == [0, 0, 0]


def test_position_ids_of_three_axes_follow_their_tokens_and_travel():
    places = torch.arange(4)
    axes_NS3 = torch.stack([places, places * 10, places * 100], dim=-1)[None]
    is_target_NS = torch.tensor([[False, False, True, False]])
    is_visual_NS = torch.tensor([[False, True, False, False]])
    rows = rows_for_teacher(
        places[None], axes_NS3, places[None], is_target_NS, ~is_target_NS, is_visual_NS, visual="drop", pad_token=None
    )
    assert rows.position_id_NK.tolist() == [[[0, 0, 0], [2, 20, 200]]]
    assert torch.equal(TeacherRows.unpack(rows.pack()).position_id_NK, rows.position_id_NK)


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (4, 4)])
def test_targets_are_filled_up_to_what_tensor_ranks_share(multiple, length):
    rows = _rows("ctcttc", "cctccc", visual="drop")
    targets = targets_of(rows, 1, 0, multiple=multiple)
    assert targets.is_real_bt.tolist() == [[place < count for place in range(length)] for count in (3, 1)]
    assert targets.slot_bt.shape == targets.label_bt.shape == targets.index_bt.shape == (2, length)
    assert targets.slot_bt[0, :3].tolist() == [1, 3, 4] and targets.label_bt[0, :3].tolist() == [51, 53, 54]


@st.composite
def masks_and_length(draw):
    width = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))
    return mask, draw(st.integers(max(1, int(mask.sum(dim=1).max())), width + 3))


@given(masks_and_length())
def test_packed_positions_are_the_kept_ones_ascending_then_fill_at_position_0(case):
    kept_NS, length = case
    keep_idx_NK, num_kept_N = pack_positions(kept_NS, length)
    expected = [[place for place, kept in enumerate(row) if kept] for row in kept_NS.tolist()]
    assert num_kept_N.tolist() == [len(row) for row in expected]
    assert keep_idx_NK.tolist() == [row + [0] * (length - len(row)) for row in expected]
    assert keep_idx_NK.dtype == torch.int64 and keep_idx_NK.is_contiguous()


def test_a_row_that_keeps_more_than_the_length_is_refused():
    kept = torch.tensor([[True, False, False], [True, True, True]])
    assert pack_positions(kept, 3)[1].tolist() == [1, 3]
    with pytest.raises(ValueError, match="keeps 3 positions, more than the length 2"):
        pack_positions(kept, 2)


def test_packing_changes_no_input():
    kept = torch.tensor([[True, False, True]])
    pack_positions(kept, 2)
    assert kept.tolist() == [[True, False, True]]
