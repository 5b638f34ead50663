"""Attention masks: the properties that all backends rely on, and the drawing of masks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bestrq.model.attention.draw_mask import as_text, dense_mask, draw
from bestrq.model.attention.masks import AttentionMask, CausalMask, ChunkMask, SegmentMask, WindowMask, draw_chunk_size

any_mask = st.one_of(
    st.just(SegmentMask()),
    st.just(CausalMask()),
    st.builds(WindowMask, st.integers(1, 20)),
    st.builds(ChunkMask, st.integers(1, 20), st.integers(-1, 4)),
)


@given(any_mask, st.integers(1, 70))
def test_a_query_attends_to_itself_and_its_interval_never_decreases_or_exceeds_the_reach(
    mask: AttentionMask, length: int
) -> None:
    query = torch.arange(length)
    first, stop = mask(query)
    assert ((first <= query) & (query < stop)).all()
    assert (first.diff() >= 0).all() and (stop.diff() >= 0).all()
    before, after = mask.reach
    assert before is None or int((query - first).max()) <= before
    assert after is None or int((stop - 1 - query).max()) <= after
    assert mask(length) == tuple(int(end) for end in mask(torch.tensor(length)))


@pytest.mark.parametrize(
    "mask, drawing",
    [
        (SegmentMask(), "#####/#####/#####/#####/#####"),
        (CausalMask(), "#..../##.../###../####./#####"),
        (WindowMask(1), "##.../###../.###./..###/...##"),
        (ChunkMask(2, 0), "##.../##.../..##./..##./....#"),
        (ChunkMask(2, 1), "##.../##.../####./####./..###"),
        (ChunkMask(2, -1), "##.../##.../####./####./#####"),
    ],
)
def test_masks_match_their_drawings(mask: AttentionMask, drawing: str) -> None:
    assert as_text(dense_mask(mask, 5)).split() == drawing.split("/")


def test_a_mask_is_drawn_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(["window", "--frames", "1", "--length", "3"])
    assert capsys.readouterr().out.split() == ["##.", "###", ".##"]
    draw(["chunk", "--size", "2", "--out", str(tmp_path / "mask.png")])
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_half_of_the_dynamic_chunks_are_whole_segments_and_the_rest_are_uniform() -> None:
    torch.manual_seed(0)
    drawn = [draw_chunk_size(16, 4) for _ in range(4000)]
    assert drawn.count(None) == pytest.approx(2000, abs=130)
    sizes = [size for size in drawn if size is not None]
    assert {size: pytest.approx(len(sizes) / 4, abs=90) for size in (4, 8, 12, 16)} == {
        size: sizes.count(size) for size in set(sizes)
    }
