"""Transducer lattices that are small enough to enumerate every alignment."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bestrq.recognition.losses.lattices import Lattices

JOINT, VOCAB = 6, 5


def made_lattices(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float64, joint: int = JOINT, vocab: int = VOCAB
) -> tuple[list[Tensor], Lattices]:
    """Random tensors with gradients (encoded frames, predicted states, weight, bias), and lattices of sizes (T, U)."""
    generator = torch.Generator().manual_seed(0)
    frames, states = sum(size[0] for size in sizes), sum(size[1] + 1 for size in sizes)
    shapes = [(frames, joint), (states, joint), (vocab, joint), (vocab,)]
    tensors = [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]
    labels = [torch.randint(1, vocab, (size[1],), generator=generator) for size in sizes]
    return tensors, Lattices([size[0] for size in sizes], labels)


def joint_arcs(tensors: Sequence[Tensor], lattices: Lattices) -> list[Tensor]:
    """Log-probabilities (blank, next label) `[T, U + 1, 2]` of every segment by definition, 0 after the last label."""
    encoded, predicted, weight, bias = tensors
    states = [len(labels) + 1 for labels in lattices.labels]
    parts = zip(encoded.split(list(lattices.num_frames)), predicted.split(states), lattices.labels, strict=True)
    return [
        select_arcs((torch.tanh(e[:, None] + p) @ weight.T + bias).log_softmax(-1), labels) for e, p, labels in parts
    ]


def select_arcs(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Arcs (blank, next label) `[T, U + 1, 2]`, from log-probabilities `[T, U + 1, V]`."""
    next_label = [log_probs[:, u, label] for u, label in enumerate(labels.tolist())]
    padded = torch.stack([*next_label, torch.zeros_like(log_probs[:, 0, 0])], dim=1)
    return torch.stack((log_probs[..., 0], padded), dim=-1)


def alignments(num_frames: int, num_labels: int) -> list[list[tuple[int, int, int]]]:
    """All paths through a lattice, each a list of arcs: frame, state, and 0 for a blank or 1 for a label."""
    paths = []
    for emitting in itertools.combinations(range(num_frames + num_labels - 1), num_labels):
        frame = state = 0
        path = []
        for position in range(num_frames + num_labels):  # the last arc is always a blank
            label = int(position in emitting)
            path.append((frame, state, label))
            frame, state = frame + 1 - label, state + label
        paths.append(path)
    return paths


def brute_force_loss(arcs: Tensor, first_state: Sequence[int] | None = None, width: int = 0) -> Tensor:
    """Negative log of the total probability of all alignments through arcs `[T, U + 1, 2]`; with `first_state`, only
    of those within the bands."""
    num_frames, states, _ = arcs.shape
    scores = []
    for path in alignments(num_frames, states - 1):
        if first_state is None or all(first_state[t] <= u < first_state[t] + width for t, u, _ in path):
            scores.append(arcs[tuple(torch.tensor(path).T)].sum())
    return -torch.stack(scores).logsumexp(dim=0)


def assert_same(results: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 1e-10) -> None:
    """Compare tensors pairwise, with an absolute tolerance."""
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=atol)
