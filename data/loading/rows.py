"""The infinite stream of rows: which crops make up which row, from the order and lengths alone, without any audio.

An epoch's crops are taken in blocks; every block is packed by itself and its rows are shuffled. So a place in the
stream is three integers, and coming back to it costs the packing of one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UserError
from common.hashing import mix
from data.loading.order import Crops, CropTable
from data.loading.packing import pack_rows

_ROWS = 4  # domain of the hash that shuffles rows; data.order has the others


@dataclass(frozen=True)
class DataState:
    """Where in the stream of rows the next update begins; the same on all ranks, for any world size and workers."""

    epoch: int = 0
    """Passes over the data that are complete."""
    block: int = 0
    """Block of the epoch."""
    row: int = 0
    """Row of the block."""
    dataset: str = ""
    """Fingerprint of the dataset that the numbers belong to; "" before the first batch."""
    order: dict[str, int] = field(default_factory=dict)
    """The settings that the numbers mean something under: seed, lengths, packing."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DataState:
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            raise UserError(f"the state of the data is {fields!r}: expected the fields {sorted(known)}")
        return cls(**fields)


@dataclass(frozen=True)
class Row:
    """One row: its crops, and the frame of the row where each begins (int64 arrays, by first frame)."""

    crops: Crops
    begin: np.ndarray


class RowStream:
    """Rows of the stream, from any state on.

    Args:
        crops: the order.
        row_frames, row_gap, multiple, max_segments: see `data.packing.pack_rows`.
        block_crops: crops that are packed together (the blocks of an epoch differ by at most one crop).
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
                f"row_frames is {row_frames} but crops have up to {crops.max_frames} frames: raise row_frames or lower "
                "max_seconds"
            )
        if block_crops < 1:
            raise UserError(f"block_crops is {block_crops}: must be at least 1")
        self.source = crops
        self.packing = {
            "row_frames": row_frames,
            "row_gap": row_gap,
            "multiple": multiple,
            "max_segments": max_segments,
        }
        pack_rows([], **self.packing)  # complain now, not in the middle of an epoch
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
        }

    def start(self, state: DataState | None = None) -> DataState:
        """The state to begin with; UserError where `state` belongs to other data or another order."""
        if state is None or not state.dataset:
            return DataState(dataset=self.fingerprint, order=self.order)
        if state.dataset != self.fingerprint:
            raise UserError(
                f"the checkpoint's data has the fingerprint {state.dataset[:12]}, this dataset "
                f"{self.fingerprint[:12]}: it cannot be continued on other recordings; begin a new run"
            )
        if state.order != self.order:
            names = sorted(set(state.order) | set(self.order))
            pairs = [(name, state.order.get(name), self.order.get(name)) for name in names]
            changed = "; ".join(f"{name}: {a} != {b}" for name, a, b in pairs if a != b)
            raise UserError(f"the checkpoint's order of the data differs ({changed}): restore these settings")
        return state

    def block(self, epoch: int, block: int) -> list[Row]:
        """The rows of a block, in the order of the stream."""
        first, last = (len(self.source) * b // self.blocks for b in (block, block + 1))
        crops = self.source.crops(epoch, np.arange(first, last))
        lengths = crops.stop - crops.start
        kept = np.flatnonzero(lengths >= self.source.min_frames)
        rows = pack_rows(lengths[kept], **self.packing)
        shuffled = np.argsort(mix(_ROWS, self.source.seed, epoch, block, np.arange(len(rows))), kind="stable")
        columns = [getattr(crops, f.name) for f in dataclasses.fields(Crops)]
        stream = []
        for row in shuffled.tolist():
            index, begin = np.array(rows[row], np.int64).T
            stream.append(Row(Crops(*(column[kept[index]] for column in columns)), begin))
        return stream

    def updates(self, state: DataState, rows: int) -> Iterator[tuple[list[Row], DataState]]:
        """The next `rows` rows from `state` on and the state after them, for ever."""
        current, empty = self.block(state.epoch, state.block), 0
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
                    if empty > 2 * self.blocks:  # two whole epochs, as long recordings are cut anew in each
                        raise UserError("no crop has the min_seconds of data: lower it, or raise max_seconds")
            yield taken, state
