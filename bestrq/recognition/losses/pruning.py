"""Pruned transducer training: which states of the lattice are worth the joint network, told by a small one.

A joint network without a hidden layer (outputs of frame and state simply added) has a normaliser that is a matrix
product, so its loss over the whole lattice is cheap. From it comes the probability that an alignment passes through a
cell, and from that, for every frame, the `band` consecutive states that hold most of it. The real joint network then
sees only those.

Source: Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", arXiv 2206.13236.

T frames, U labels, V vocabulary, W states of a band.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.transducer import sum_over_alignments


class SimpleJoint(nn.Module):
    """The small joint network: linear outputs of both sides, added."""

    def __init__(self, encoder_dim: int, prediction_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_output = nn.Linear(encoder_dim, vocab_size)
        self.prediction_output = nn.Linear(prediction_dim, vocab_size)

    def forward(self, frames: Tensor, predicted: Tensor, lattices: Lattices, band: int) -> tuple[Tensor, Lattices]:
        """The small network's loss of every segment, `[N]`, and the lattices with bands for the real one.

        Args:
            frames: `[sum T_s, D]`.
            predicted: `[sum (U_s + 1), P]`.
            band: states W of a frame, 2 or more; a segment with fewer keeps all of its own, one with more labels than
                W - 1 a frame gets a wider band.
        """
        wide = torch.promote_types(frames.dtype, torch.float32)
        acoustic, language = self.encoder_output(frames).to(wide), self.prediction_output(predicted).to(wide)
        states = [len(labels) + 1 for labels in lattices.labels]
        parts = zip(acoustic.split(list(lattices.num_frames)), language.split(states), lattices.labels, strict=True)
        nothing = acoustic[:0, :2] + language[:0, :2]  # of no segments: what keeps the graph, which DDP needs
        arcs = torch.cat([nothing, *(simple_arcs(*part).flatten(0, 1) for part in parts)])
        losses = sum_over_alignments(arcs, lattices)
        # The gradient of the loss by an arc's log-probability is minus the probability that an alignment takes it.
        with torch.enable_grad():
            leaf = arcs.detach().requires_grad_()
            [taken] = torch.autograd.grad(sum_over_alignments(leaf, lattices).sum(), leaf)
        cells = (-taken).sum(dim=1).split(lattices.cells)
        widths = [band_width(*size, band) for size in zip(lattices.num_frames, states, strict=True)]
        first = [choose_band(part.view(-1, n), w) for part, n, w in zip(cells, states, widths, strict=True)]
        return losses, replace(lattices, first_state=first, widths=widths)


def simple_arcs(acoustic: Tensor, language: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities `[T, U + 1, 2]` of blank and next label for outputs `[T, V]` plus `[U + 1, V]`.

    The sum over the vocabulary of exp(a + l) is a matrix product of exponentials: no `[T, U, V]` tensor.
    """
    highest = acoustic.amax(dim=1, keepdim=True), language.amax(dim=1, keepdim=True)
    with torch.autocast(acoustic.device.type, enabled=False):  # a bfloat16 normaliser is off by 0.01 nats at every arc
        product = (acoustic - highest[0]).exp() @ (language - highest[1]).exp().mT
    tiny = torch.finfo(product.dtype).tiny
    normaliser = product.clamp(min=tiny).log() + highest[0] + highest[1].mT
    blank = acoustic[:, BLANK, None] + language[:, BLANK] - normaliser
    # Behind the last label there is none: its arc is never used, but must be finite.
    after = F.pad(labels, (0, 1), value=BLANK)
    label = acoustic[:, after] + language.gather(1, after[:, None]).mT - normaliser
    return torch.stack((blank, label), dim=-1)


def band_width(num_frames: int, states: int, band: int) -> int:
    """States of a band: `band`, or as many as few frames need to climb through all states."""
    return min(states, max(band, -(-(states - 1) // num_frames) + 1))


def choose_band(passed: Tensor, width: int) -> Tensor:
    """First state of every frame's band, int64 `[T]`, from the probability of passing each cell, `[T, U + 1]`.

    Bands begin at state 0 and end with state U; from one frame to the next they never go back, and share a state, so
    that alignments exist. Under these conditions each holds as much probability as it can by itself.
    """
    num_frames, states = passed.shape
    highest, step = states - width, width - 1
    covered = F.pad(passed.cumsum(dim=1), (1, 0))
    best = (covered[:, width:] - covered[:, :-width]).argmax(dim=1)
    climb = step * torch.arange(num_frames, device=passed.device)
    # Late frames as high as it takes to reach the end; then none further above an earlier one than steps allow.
    first = torch.maximum(best, highest - (climb[-1] - climb)).clamp(min=0, max=highest).cummax(dim=0).values
    first[0] = 0
    return climb + (first - climb).cummin(dim=0).values
