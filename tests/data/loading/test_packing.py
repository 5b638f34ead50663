"""Packing of rows: no overlap, no overflow, no lost segments, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.loading.rows import pack_rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=120),
    row_gap=st.integers(0, 9),
    multiple=st.sampled_from([1, 2, 4, 8]),
    max_segments=st.integers(1, 9),
)
def test_segments_respect_row_length_gap_multiple_and_slots(
    lengths: list[int], row_gap: int, multiple: int, max_segments: int
) -> None:
    rows = pack_rows(lengths, 200, row_gap, multiple, max_segments)
    assert sorted(index for row in rows for index, _ in row) == list(range(len(lengths)))
    for row in rows:
        assert 1 <= len(row) <= max_segments
        end = -row_gap
        for index, start in row:
            assert start % multiple == 0 and start >= end + row_gap
            end = start + lengths[index]
        assert end <= 200


def test_packing_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(100, 1700, 500)
    assert pack_rows(lengths, 2000, 4, 4, 16) == pack_rows(lengths.copy(), 2000, 4, 4, 16)


def test_rows_of_30_s_are_98_percent_full_of_utterances_of_2_to_17_s() -> None:
    lengths = np.random.default_rng(0).integers(200, 1700, 1000)
    assert lengths.sum() / (3000 * len(pack_rows(lengths, 3000, 4, 4, 16))) > 0.98


def test_each_segment_is_placed_in_the_fullest_row_with_space() -> None:
    assert pack_rows([60, 50, 30], 100, 1, 1, 8) == [[(0, 0), (2, 61)], [(1, 0)]]
    assert pack_rows([60, 50, 39, 49], 100, 1, 1, 8) == [[(0, 0), (2, 61)], [(1, 0), (3, 51)]]


@pytest.mark.parametrize(("lengths", "worst"), [([10, 101], 101), ([10, 0], 0)])
def test_an_invalid_length_is_named(lengths: list[int], worst: int) -> None:
    with pytest.raises(UserError, match=f"a segment has {worst} frames"):
        pack_rows(lengths, 100, 4, 4, 16)


def test_row_lengths_that_are_no_multiple_are_refused_with_a_valid_one() -> None:
    with pytest.raises(UserError, match="row_frames is 102.*multiple of 4 .*100"):
        pack_rows([10], 102, 4, 4, 16)
