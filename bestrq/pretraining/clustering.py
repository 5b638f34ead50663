"""k-means clustering of frames: k-means++ seeds (Arthur and Vassilvitskii 2007), then Lloyd's iterations."""

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
        counts = torch.bincount(labels, minlength=num_clusters)
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=points.device)
        sums.index_add_(0, labels, points.double())
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], 0).float()
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            centroids[empty] = points[distances.topk(len(empty)).indices]
    return centroids


def seed_centroids(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Initial centroids `[V, D]`: points, each drawn with a probability proportional to its squared distance from the
    nearest one drawn before (k-means++)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distances = torch.full((len(points),), float("inf"), dtype=torch.float64)
    for _ in range(num_clusters - 1):
        new = (points - points[chosen[-1]]).square().sum(dim=1).double().cpu()
        distances = torch.minimum(distances, new)
        total = distances.cumsum(dim=0)
        threshold = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, threshold, right=True)), len(points) - 1))
    return points[torch.tensor(chosen, device=points.device)].clone()
