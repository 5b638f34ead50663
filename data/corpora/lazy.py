"""Sequence of sources that are created on access from a table of columns, for corpora of ten million recordings.

Ten million source objects need 15 GB, their columns a tenth of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from data.corpora.base import Source

_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class LazySources(Sequence[Source]):
    """Sequence of sources over a table: `make` turns a row, as a dict of its columns, into its source.

    A slice shares the memory of the table.
    """

    table: pa.Table
    make: Callable[[Mapping[str, Any]], Source]

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[Source]:
        for batch in self.table.to_batches(max_chunksize=_BATCH):
            yield from map(self.make, batch.to_pylist())

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> LazySources: ...
    def __getitem__(self, index: int | slice) -> Source | LazySources:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                table = self.table.slice(start, max(0, stop - start))
            else:
                table = self.table.take(pa.array(range(start, stop, step), pa.int64()))
            return dataclasses.replace(self, table=table)
        row = range(len(self))[index]  # negative indices, and IndexError
        return self.make(self.table.slice(row, 1).to_pylist()[0])


def check_unique(table: pa.Table, dataset: str) -> None:
    """Raise UserError, with the id and the splits ('part') of its rows, if an id is not unique."""
    if pc.count_distinct(table["id"]).as_py() == len(table):
        return
    counts = pc.value_counts(table["id"].combine_chunks())
    id = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()].as_py()
    parts = sorted(set(table.filter(pc.equal(table["id"], id))["part"].to_pylist()))
    raise UserError(
        f"{dataset}: the id {id!r} is in more than one row (in {', '.join(parts)}). Leave out a split that is "
        "contained in another, with --splits; or the file is damaged"
    )


def repeat(value: str, size: int) -> pa.Array:
    """Column with the same text in every row, stored once."""
    return pa.DictionaryArray.from_arrays(
        pa.repeat(pa.scalar(0, pa.int32()), size), pa.array([value], pa.large_string())
    )


def with_faults(table: pa.Table, ids: Mapping[int, str], faults: Sequence[str]) -> pa.Table:
    """Add a column `fault`, null except in the rows whose numbers are keys of `ids`; these rows also get these ids."""
    if not ids:
        return table.append_column("fault", pa.nulls(len(table), pa.large_string()))
    numbers = np.fromiter(ids, np.int64, len(ids))
    mask = np.zeros(len(table), bool)
    mask[numbers] = True
    named = pc.replace_with_mask(table["id"].combine_chunks(), mask, pa.array(ids.values(), table["id"].type))
    reasons = pc.replace_with_mask(pa.nulls(len(table), pa.large_string()), mask, pa.array(faults, pa.large_string()))
    return table.set_column(table.column_names.index("id"), "id", named).append_column("fault", reasons)
