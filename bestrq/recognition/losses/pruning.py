"""Pruned transducer training: a cheap joint network selects the states for which the full one is computed.

The outputs of a joint network without a hidden layer are sums of a frame's and a state's outputs. Their normaliser is a
matrix product, so the loss over the full lattice is cheap. Its gradient gives the probability that an alignment passes
through a cell, and thus, for every frame, the most probable band of consecutive states. The full joint network is
computed for these states only.

Source: Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", arXiv 2206.13236.

Shapes: N segments, T_s frames and U_s labels of segment s (T and U of a single one), V vocabulary, W states of a band.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.transducer import sum_over_alignments


class SimpleJoint(nn.Module):
    """Joint network without a hidden layer: linear outputs of frames and states, added."""

    def __init__(self, encoder_dim: int, prediction_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_output = nn.Linear(encoder_dim, vocab_size)
        self.prediction_output = nn.Linear(prediction_dim, vocab_size)

    def forward(self, frames: Tensor, predicted: Tensor, lattices: Lattices, band: int) -> tuple[Tensor, Lattices]:
        """Loss of this network for every segment, `[N]`, and the lattices with bands for the full joint network.

        Args:
            frames: encoder outputs `[sum T_s, encoder_dim]`.
            predicted: outputs of the prediction network `[sum (U_s + 1), prediction_dim]`.
            band: states W per frame, 2 or more. A segment with fewer states keeps all of them; a segment with more than
                W - 1 labels per frame gets a wider band.
        """
        wide = torch.promote_types(frames.dtype, torch.float32)
        acoustic, language = self.encoder_output(frames).to(wide), self.prediction_output(predicted).to(wide)
        states = [len(labels) + 1 for labels in lattices.labels]
        parts = zip(acoustic.split(list(lattices.num_frames)), language.split(states), lattices.labels, strict=True)
        empty = acoustic[:0, :2] + language[:0, :2]  # keeps the graph of a batch without segments, which DDP needs
        arcs = torch.cat([empty, *(simple_arcs(*part).flatten(0, 1) for part in parts)])
        losses = sum_over_alignments(arcs, lattices)
        # The gradient with respect to an arc's log-probability is minus the probability that an alignment takes it.
        with torch.enable_grad():
            leaf = arcs.detach().requires_grad_()
            [taken] = torch.autograd.grad(sum_over_alignments(leaf, lattices).sum(), leaf)
        cells = (-taken).sum(dim=1).split(lattices.cells)
        widths = [band_width(*size, band) for size in zip(lattices.num_frames, states, strict=True)]
        first = [choose_band(part.view(-1, n), w) for part, n, w in zip(cells, states, widths, strict=True)]
        return losses, replace(lattices, first_state=first, widths=widths)


def simple_arcs(acoustic: Tensor, language: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities `[T, U + 1, 2]` of blank and next label, from outputs `[T, V]` plus `[U + 1, V]`.

    The sum over the vocabulary of exp(acoustic + language) is a matrix product of exponentials, without any
    `[T, U, V]` tensor.
    """
    highest = acoustic.amax(dim=1, keepdim=True), language.amax(dim=1, keepdim=True)
    with torch.autocast(acoustic.device.type, enabled=False):  # bfloat16: an error of 0.01 nats at every arc
        product = (acoustic - highest[0]).exp() @ (language - highest[1]).exp().mT
    tiny = torch.finfo(product.dtype).tiny
    normaliser = product.clamp(min=tiny).log() + highest[0] + highest[1].mT
    blank = acoustic[:, BLANK, None] + language[:, BLANK] - normaliser
    # The last state has no next label: its arc is never used, but must be finite.
    next_label = F.pad(labels, (0, 1), value=BLANK)
    label = acoustic[:, next_label] + language.gather(1, next_label[:, None]).mT - normaliser
    return torch.stack((blank, label), dim=-1)


def band_width(num_frames: int, states: int, band: int) -> int:
    """States per band: `band`, or more if the frames are too few for such bands to reach the last state."""
    return min(states, max(band, -(-(states - 1) // num_frames) + 1))


def choose_band(passed: Tensor, width: int) -> Tensor:
    """First state of every frame's band, int64 `[T]`, from the probability of passing each cell, `[T, U + 1]`.

    The first band starts at state 0 and the last one ends with state U. Bands never move back, and consecutive bands
    share a state, so that alignments exist. Otherwise, every frame keeps its most probable band.
    """
    num_frames, states = passed.shape
    highest, step = states - width, width - 1
    covered = F.pad(passed.cumsum(dim=1), (1, 0))
    best = (covered[:, width:] - covered[:, :-width]).argmax(dim=1)
    climb = step * torch.arange(num_frames, device=passed.device)
    # Raise late frames until the last state can be reached, then lower those further ahead than the steps allow.
    first = torch.maximum(best, highest - (climb[-1] - climb)).clamp(min=0, max=highest).cummax(dim=0).values
    first[:1].zero_()  # an assigned number would be copied from the host
    return climb + (first - climb).cummin(dim=0).values
