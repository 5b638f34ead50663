"""Sources that are made when they are asked for, from a table of columns: for corpora of ten million recordings.

Ten million source objects take 15 GB, the columns they are made from a tenth of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import pyarrow as pa

from data.corpora.base import Source

_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class LazySources(Sequence[Source]):
    """A sequence of sources over a table: `make` turns a row, as a dict of its columns, into its source.

    A slice is a LazySources over the same memory.
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
        row = range(len(self))[index]  # IndexError, and negative ones
        return self.make(self.table.slice(row, 1).to_pylist()[0])
