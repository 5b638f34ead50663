"""Assignment of rows to columns with the largest total similarity, by shortest augmenting paths, in numpy.

The Hungarian method in the form of Jonker and Volgenant 1987, "A shortest augmenting path algorithm for dense and
sparse linear assignment problems": row and column reduction, a greedy assignment, and one shortest path per row left.
"""

import numpy as np


def match(similarity: np.ndarray) -> np.ndarray:
    """Columns of the rows, int64 `[n]`, a permutation that maximises the sum of `similarity` `[n, n]`.

    O(n^3) at worst, with n^2 vector operations of length n; close to O(n^2) if most rows differ in their best column.
    Exact in float64.
    """
    cost = -np.asarray(similarity, dtype=np.float64)
    size = len(cost)
    if not size:
        return np.zeros(0, dtype=np.int64)
    # Duals: cost[i, j] >= row_dual[i] + column_dual[j], with equality for assigned pairs.
    row_dual = cost.min(axis=1)
    column_dual = (cost - row_dual[:, None]).min(axis=0)
    column_of = np.full(size, -1, dtype=np.int64)
    row_of = np.full(size, -1, dtype=np.int64)
    for row in range(size):
        free = (cost[row] - row_dual[row] - column_dual <= 0) & (row_of < 0)
        if free.any():
            column_of[row] = column = int(free.argmax())
            row_of[column] = row
    for row in np.flatnonzero(column_of < 0).tolist():
        _augment(row, cost, row_dual, column_dual, column_of, row_of)
    return column_of


def _augment(
    start: int,
    cost: np.ndarray,
    row_dual: np.ndarray,
    column_dual: np.ndarray,
    column_of: np.ndarray,
    row_of: np.ndarray,
) -> None:
    """Assign the row `start`: Dijkstra's search over reduced costs for a free column, then a swap along the path."""
    distance = cost[start] - row_dual[start] - column_dual
    previous = np.full(len(cost), start)
    open_columns = np.ones(len(cost), dtype=bool)
    while True:
        column = int(np.where(open_columns, distance, np.inf).argmin())
        shortest = distance[column]
        open_columns[column] = False
        row = row_of[column]
        if row < 0:
            break
        through = shortest + cost[row] - row_dual[row] - column_dual
        nearer = open_columns & (through < distance)
        distance[nearer] = through[nearer]
        previous[nearer] = row
    closed = np.flatnonzero(~open_columns)
    inner = closed[closed != column]  # the last column is free and at distance `shortest`
    row_dual[row_of[inner]] += shortest - distance[inner]
    row_dual[start] += shortest
    column_dual[inner] -= shortest - distance[inner]
    while True:
        row = int(previous[column])
        row_of[column] = row
        column_of[row], column = column, int(column_of[row])
        if row == start:
            return
