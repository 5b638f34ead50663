"""k-means clustering of frames: k-means++ seeds (Arthur and Vassilvitskii 2007), then Lloyd's iterations."""

import math

import torch
from torch import Tensor

from common.errors import UserError

MAX_ITERATIONS = 50
TOLERANCE = 1e-4
"""relative decrease of the mean squared distance below which the iterations end"""
MAX_DISTANCES = 1 << 24
"""(frame, cluster) pairs compared at a time: 64 MiB of float32"""


def nearest_cluster(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest of the centroids `[V, D]` of every point `[N, D]`, int64 `[N]`, in float32 under any autocast."""
    with torch.autocast(points.device.type, enabled=False):
        half_squares = (centroids * centroids).sum(dim=1) / 2
        parts = points.split(max(1, MAX_DISTANCES // len(centroids)))
        return torch.cat([(part @ centroids.T - half_squares).argmax(dim=1) for part in parts])


def estimate_clusters(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Centroids float32 `[V, D]` of the points `[N, D]`; prints the mean squared distance of every iteration.

    Deterministic on a CPU. A cluster that loses all points restarts at the point that is farthest from its centroid.
    Raises UserError if there are fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise UserError(
            f"targets.clusters is {num_clusters}, but the sample has {len(points)} frames: raise "
            "targets.cluster_seconds, or lower targets.clusters"
        )
    generator = torch.Generator().manual_seed(seed)
    centroids = seed_centroids(points, num_clusters, generator)
    previous = float("inf")
    for iteration in range(1, MAX_ITERATIONS + 1):
        labels = nearest_cluster(points, centroids)
        distances = (points - centroids[labels]).square().sum(dim=1)
        error = float(distances.double().mean())
        print(f"clusters: iteration {iteration}, mean squared distance {error:.5g}", flush=True)
        if previous - error <= TOLERANCE * error:
            break
        previous = error
        centroids = updated_centroids(points, labels, distances, num_clusters)
    return centroids


def updated_centroids(points: Tensor, labels: Tensor, distances: Tensor, num_clusters: int) -> Tensor:
    """Means of the points `[N, D]` of every cluster, `[V, D]`; for an empty one, a point far from its centroid."""
    counts = torch.bincount(labels, minlength=num_clusters)
    sums = torch.zeros(num_clusters, points.shape[1], dtype=torch.float64, device=points.device)
    sums.index_add_(0, labels, points.double())
    centroids = (sums / counts.clamp(min=1)[:, None]).float()
    empty = (counts == 0).nonzero().squeeze(1)
    centroids[empty] = points[distances.topk(len(empty)).indices]
    return centroids


def seed_centroids(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Initial centroids `[V, D]`, among the points (greedy k-means++).

    Points are drawn with probabilities proportional to the squared distance from the nearest centroid so far. Of
    several draws, the one that reduces the sum of these distances most is kept.
    """
    trials = 2 + int(math.log(num_clusters))
    squares = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = squared_distances(points, squares, chosen)[:, 0]
    for _ in range(num_clusters - 1):
        total = nearest.cumsum(dim=0, dtype=torch.float64)
        thresholds = torch.rand(trials, generator=generator, dtype=torch.float64).to(points.device) * total[-1]
        drawn = torch.searchsorted(total, thresholds, right=True).clamp(max=len(points) - 1).tolist()
        reduced = torch.minimum(squared_distances(points, squares, drawn), nearest[:, None])
        best = int(reduced.sum(dim=0, dtype=torch.float64).argmin())
        chosen.append(drawn[best])
        nearest = reduced[:, best].contiguous()
    return points[torch.tensor(chosen, device=points.device)].clone()


def squared_distances(points: Tensor, squares: Tensor, chosen: list[int]) -> Tensor:
    """Squared distances `[N, L]` of the points `[N, D]`, with squared norms `[N]`, from those of indices `chosen`."""
    with torch.autocast(points.device.type, enabled=False):
        products = points @ points[chosen].T
    return (squares[:, None] - 2 * products + squares[chosen]).clamp(min=0)
