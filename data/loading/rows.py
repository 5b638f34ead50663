"""Packing of crops into rows, and the infinite stream of rows, from lengths alone.

The crops of an epoch are taken in blocks; every block is packed separately and its rows are shuffled. A position in the
stream is therefore three integers, and resuming there costs the packing of one block.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UserError
from common.hashing import mix
from data.loading.order import Crops, CropTable

_ROWS, _PLACES = 4, 7  # domains of the hash: order of rows and of placement; data/loading/order.py has the others
FEW_BLOCKS = 8
"""below this number of blocks, later epochs place crops in a random order: blocks alone do not vary their neighbours"""


@dataclass(frozen=True)
class DataState:
    """Position of the next optimizer step in the stream of rows; the same on all ranks, for any number of ranks."""

    epoch: int = 0
    """Completed passes over the data."""
    block: int = 0
    """Block within the epoch."""
    row: int = 0
    """Row within the block."""
    dataset: str = ""
    """Fingerprint of the dataset; "" before the first batch."""
    order: dict[str, int] = field(default_factory=dict)
    """Values that determine the stream (seed, lengths, packing); the position is valid only with these."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DataState:
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            raise UserError(f"the state of the data is {fields!r}, but must have the fields {sorted(known)}")
        for name in ("epoch", "block", "row"):
            if type(fields[name]) is not int or fields[name] < 0:
                raise UserError(f"the state of the data has {name} {fields[name]!r}: it must be an integer, 0 or more")
        return cls(**fields)


@dataclass(frozen=True)
class Row:
    """Crops of one row, by first frame."""

    crops: Crops
    first_frame: np.ndarray
    """int64 [n], first frame of every crop within the row"""


Placement = tuple[int, int]
"""(index into the lengths, first frame within the row) of a segment"""


def pack_rows(
    lengths: Sequence[int] | np.ndarray, row_frames: int, row_gap: int, multiple: int, max_segments: int,
    priority: np.ndarray | None = None,
) -> list[list[Placement]]:  # fmt: skip
    """Pack segments into rows by best-fit decreasing: longest first, each into the fullest row with enough space.

    Deterministic, O(n log n).

    Args:
        lengths: frames of every segment.
        row_frames: frames per row.
        row_gap: minimum number of frames between two segments.
        multiple: starts are multiples of it; the encoder's `row_multiple`.
        max_segments: maximum number of segments per row.
        priority: [n]; segments of a greater priority are placed first. By default, longer ones.

    Returns:
        The segments of every row, by first frame.

    Raises:
        UserError: a length above row_frames or below 1, or a row_frames that is not a multiple of `multiple`.
    """
    if row_frames % multiple:
        near = max(1, row_frames // multiple) * multiple
        raise UserError(f"row_frames is {row_frames}: must be a multiple of {multiple} (row_multiple), such as {near}")
    if max_segments < 1 or row_gap < 0:
        raise UserError(f"max_segments is {max_segments} and row_gap {row_gap}: need at least 1 and 0")
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and (sizes.max() > row_frames or sizes.min() < 1):
        worst = int(sizes.max() if sizes.max() > row_frames else sizes.min())
        raise UserError(f"a segment has {worst} frames: must be from 1 to row_frames = {row_frames}")
    rows: list[list[Placement]] = []
    # (first frame of the next segment, row) of the rows with a free slot, fullest last.
    space: list[tuple[int, int]] = []
    order = np.argsort(-(sizes if priority is None else priority), kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fullest = bisect_right(space, (row_frames - size, len(rows))) - 1
        if fullest >= 0:
            start, row = space.pop(fullest)
        else:
            start, row = 0, len(rows)
            rows.append([])
        rows[row].append((index, start))
        next_start = -(-(start + size + row_gap) // multiple) * multiple
        if len(rows[row]) < max_segments and next_start < row_frames:
            insort(space, (next_start, row))
    return rows


class RowStream:
    """Infinite stream of rows from any state.

    Args:
        crops: the order.
        row_frames, row_gap, multiple, max_segments: see `pack_rows`.
        block_crops: crops packed together; the blocks of an epoch differ by at most one crop.
        fingerprint: of the dataset.

    Raises:
        UserError: crops longer than a row.
    """

    def __init__(
        self,
        crops: CropTable,
        *,
        row_frames: int,
        row_gap: int,
        multiple: int,
        max_segments: int,
        block_crops: int,
        fingerprint: str,
    ) -> None:
        if crops.max_frames > row_frames:
            raise UserError(
                f"row_frames is {row_frames}, but crops have up to {crops.max_frames} frames: "
                "raise row_frames or lower max_seconds"
            )
        if block_crops < 1:
            raise UserError(f"block_crops is {block_crops}: must be at least 1")
        self.source = crops
        self.packing: dict[str, Any] = {
            "row_frames": row_frames, "row_gap": row_gap, "multiple": multiple, "max_segments": max_segments
        }  # fmt: skip
        pack_rows([], **self.packing)  # check the settings before training starts
        self.fingerprint = fingerprint
        self.blocks = max(1, round(len(crops) / block_crops))
        self.order = {
            "seed": crops.seed,
            "crops": len(crops),
            "max_frames": crops.max_frames,
            "min_frames": crops.min_frames,
            "blocks": self.blocks,
            **crops.settings(),
            **self.packing,
            **({"shuffled": 1} if self.blocks < FEW_BLOCKS else {}),
        }

    def start(self, state: DataState | None = None) -> DataState:
        """Initial state. Raises UserError if `state` belongs to other data or another order."""
        if state is None or not state.dataset:
            return DataState(dataset=self.fingerprint, order=self.order)
        if state.dataset != self.fingerprint:
            raise UserError(
                f"the checkpoint's data has the fingerprint {state.dataset[:12]}, this dataset "
                f"{self.fingerprint[:12]}: a run cannot continue on other recordings; start a new run"
            )
        if state.order == {name: value for name, value in self.order.items() if name != "shuffled"}:
            self.order = state.order  # of an earlier version: the run keeps its rows
        if state.order != self.order:
            names = sorted(set(state.order) | set(self.order))
            pairs = [(name, state.order.get(name), self.order.get(name)) for name in names]
            changed = "; ".join(f"{name}: {a} != {b}" for name, a, b in pairs if a != b)
            raise UserError(f"the checkpoint's order of the data differs ({changed}): restore these settings")
        return state

    def block(self, epoch: int, block: int) -> list[Row]:
        """Rows of a block, in stream order."""
        first, last = (len(self.source) * b // self.blocks for b in (block, block + 1))
        crops = self.source.crops(epoch, np.arange(first, last))
        kept = np.flatnonzero(crops.stop - crops.start >= self.source.min_frames)
        lengths, priority = self.source.lengths(crops)[kept], None
        if epoch and "shuffled" in self.order:  # by length times 1 to 1.5: rows stay as full, their crops change
            random = mix(_PLACES, self.source.seed, epoch, block, np.arange(len(kept)))
            priority = lengths * (1 + (random >> np.uint64(11)) / 2**54)
        rows = pack_rows(lengths, priority=priority, **self.packing)
        shuffled = np.argsort(mix(_ROWS, self.source.seed, epoch, block, np.arange(len(rows))), kind="stable")
        columns = [getattr(crops, f.name) for f in dataclasses.fields(Crops)]
        stream = []
        for row in shuffled.tolist():
            index, first_frame = np.array(rows[row], np.int64).T
            stream.append(Row(Crops(*(column[kept[index]] for column in columns)), first_frame))
        return stream

    def steps(self, state: DataState, rows: int) -> Iterator[tuple[list[Row], DataState]]:
        """Endlessly yield the next `rows` rows after `state`, and the state after them."""
        current, empty = self.block(state.epoch, state.block % self.blocks), 0
        if state.block >= self.blocks or state.row > len(current):
            raise UserError(f"the state of the data is row {state.row} of block {state.block}, which this data lacks")
        while True:
            taken: list[Row] = []
            while len(taken) < rows:
                part = current[state.row : state.row + rows - len(taken)]
                taken += part
                state = dataclasses.replace(state, row=state.row + len(part))
                if state.row == len(current):
                    epoch, block = divmod(state.epoch * self.blocks + state.block + 1, self.blocks)
                    state = dataclasses.replace(state, epoch=epoch, block=block, row=0)
                    current = self.block(epoch, block)
                    empty = 0 if current else empty + 1
                    if empty > 2 * self.blocks:  # two epochs, since long recordings are cut differently in each
                        raise UserError("all crops are below data.min_seconds: lower it, or raise data.max_seconds")
            yield taken, state
