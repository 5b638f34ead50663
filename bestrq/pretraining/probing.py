"""Probes of frozen features: a small convolutional CTC probe, linear classifiers, and a fair choice of the best layer.

A purely linear CTC probe stays on CTC's plateau of blanks for hundreds of steps and then ranks features by their scale;
one convolution of five frames leaves the plateau. Probes are deterministic on a CPU: weights and batches depend on
`seed` alone, and the global random state is left unchanged.

N recordings, T frames of a recording, D features, V labels (0 is the blank), L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from bestrq.pretraining.layer_features import Frames, mean_and_std, standardise

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class CTCProbeSettings:
    """Small convolutional CTC probe. The defaults are those of the trial in shared/reference/learning.md."""

    steps: PositiveInt = 300
    """optimizer steps: a warm-up over the first tenth, then a linear decay to 0"""
    batch: PositiveInt = 24
    """recordings per step"""
    width: PositiveInt = 96
    """width of the hidden layer"""
    learning_rate: PositiveFloat = 3e-3
    """peak learning rate of AdamW"""
    seed: int = 0
    """seed of initial weights and batches"""


@dataclass(frozen=True)
class CTCProbeResult:
    """Outcome of a CTC probe on the evaluation recordings."""

    nats: list[float]
    """CTC loss of every recording, summed over its labels"""
    hypotheses: list[list[int]]
    """labels of every recording by greedy search"""
    train_nats_per_label: float
    """loss of the last tenth of the training steps: far below that of the evaluation, the probe has memorised"""
    layer_weights: list[float]
    """weight of every layer of a weighted sum; [1] for a single layer"""


class CTCProbe(nn.Module):
    """Weighted sum of L standardised layers, linear layer, convolution of 5 frames with a residual ReLU, linear layer.

    The weighted sum is that of SUPERB (Yang et al. 2021, arXiv 2105.01051, section 3): softmax of L learned numbers.
    """

    def __init__(self, layers: Sequence[Frames], width: int, vocab_size: int) -> None:
        super().__init__()
        statistics = [torch.stack(mean_and_std(layer.values)) for layer in layers]
        self.register_buffer("statistics", torch.stack(statistics))
        self.statistics: Tensor
        self.layer_logits = nn.Parameter(torch.zeros(len(layers)))
        self.input = nn.Linear(layers[0].values.shape[1], width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2)
        self.output = nn.Linear(width, vocab_size)

    def forward(self, recordings: Sequence[Sequence[Tensor]]) -> Tensor:
        """Log-probabilities `[N, T, V]` of padded recordings, given by layer, then recording, `[T, D]` each."""
        weights = self.layer_logits.softmax(dim=0)
        device = weights.device
        mixed = torch.zeros(())
        for weight, (mean, std), parts in zip(weights, self.statistics, recordings, strict=True):
            padded = nn.utils.rnn.pad_sequence([part.to(device) for part in parts], batch_first=True)
            mixed = mixed.to(device) + weight * standardise(padded, mean, std)
        lengths = torch.tensor([len(part) for part in recordings[0]], device=device)
        valid = torch.arange(mixed.shape[1], device=device) < lengths[:, None]
        hidden = self.input(mixed).masked_fill(~valid[..., None], 0.0)  # the convolution pads with zeros
        hidden = hidden + F.relu(self.convolution(hidden.mT).mT)
        return F.log_softmax(self.output(hidden), dim=-1)


def train_ctc_probe(
    layers: Sequence[Frames],
    labels: Sequence[Sequence[int]],
    evaluation_layers: Sequence[Frames],
    evaluation_labels: Sequence[Sequence[int]],
    vocab_size: int,
    settings: CTCProbeSettings,
    device: torch.device | None = None,
) -> CTCProbeResult:
    """Train a probe on features and labels, and evaluate it on other recordings.

    Args:
        layers: one layer, or several of one rate and width for a learned weighted sum.
        labels: of every training recording, 1 .. V - 1.
        evaluation_layers, evaluation_labels: the same for the evaluation. A recording with more labels than fit its
            frames has a loss of 0 and must be left out by the caller.
        vocab_size: V, with the blank.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = CTCProbe(layers, settings.width, vocab_size)
    probe.to(device)
    recordings = [layer.recordings() for layer in layers]
    optimizer = torch.optim.AdamW(probe.parameters(), settings.learning_rate, weight_decay=0.01)
    rng = np.random.default_rng(settings.seed)
    batch = min(settings.batch, len(labels))
    last_losses: list[Tensor] = []
    for step in range(settings.steps):
        warm_up = min(1.0, 10 * (step + 1) / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * warm_up * (1 - step / settings.steps)
        chosen = rng.choice(len(labels), batch, replace=False).tolist()
        log_probs = probe([[parts[number] for number in chosen] for parts in recordings])
        targets = [labels[number] for number in chosen]
        losses = ctc_losses(log_probs, [len(recordings[0][number]) for number in chosen], targets)
        loss = losses.sum() / max(1, sum(map(len, targets)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step >= settings.steps - max(1, settings.steps // 10):
            last_losses.append(loss.detach())
    nats, hypotheses = evaluate_ctc_probe(probe, evaluation_layers, evaluation_labels)
    weights = probe.layer_logits.detach().softmax(dim=0).tolist()
    return CTCProbeResult(nats, hypotheses, float(torch.stack(last_losses).mean()), weights)


@torch.no_grad()
def evaluate_ctc_probe(
    probe: CTCProbe, layers: Sequence[Frames], labels: Sequence[Sequence[int]]
) -> tuple[list[float], list[list[int]]]:
    """Loss in nats and greedy hypothesis of every recording."""
    recordings = [layer.recordings() for layer in layers]
    nats: list[float] = []
    hypotheses: list[list[int]] = []
    for start in range(0, len(labels), EVALUATION_BATCH):
        numbers = range(start, min(start + EVALUATION_BATCH, len(labels)))
        log_probs = probe([[parts[number] for number in numbers] for parts in recordings])
        lengths = [len(recordings[0][number]) for number in numbers]
        nats += ctc_losses(log_probs, lengths, [labels[number] for number in numbers]).tolist()
        best = log_probs.argmax(dim=-1).tolist()
        for path, length in zip(best, lengths, strict=True):
            hypotheses.append([label for label, _ in groupby(path[:length]) if label])
    return nats, hypotheses


def ctc_losses(log_probs: Tensor, lengths: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
    """CTC loss in nats of every recording, `[N, T, V]` -> `[N]`; 0 for one whose labels do not fit its frames."""
    flat = torch.tensor([label for sequence in labels for label in sequence], dtype=torch.int64)
    sizes = torch.tensor([len(sequence) for sequence in labels])
    device = log_probs.device
    arguments = (flat.to(device), torch.tensor(lengths).to(device), sizes.to(device))
    return F.ctc_loss(log_probs.transpose(0, 1), *arguments, reduction="none", zero_infinity=True)


def linear_probe(
    features: Tensor, labels: Tensor, evaluation: Tensor, num_classes: int, weight_decay: float = 1e-2
) -> Tensor:
    """Classes predicted for `evaluation` by multinomial logistic regression on standardised features.

    Convex, minimised by L-BFGS in float64 from zero: the result has no seed.

    Args:
        features: `[N, D]`.
        labels: int64 `[N]`, 0 .. num_classes - 1.
        evaluation: `[K, D]`.
        weight_decay: factor of half the squared norm of the weights, beside the mean cross-entropy.

    Returns:
        int64 `[K]`.
    """
    mean, std = mean_and_std(features)
    x, y = (standardise(part, mean, std).double() for part in (features, evaluation))
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (y @ weight.T + bias).argmax(dim=1)


def majority(labels: Tensor, evaluation: Tensor) -> float:
    """Accuracy on `evaluation` of always predicting the most frequent of the training labels: the chance level."""
    return float((evaluation == labels.mode().values).double().mean())


@dataclass(frozen=True)
class BestLayer:
    """Values of the best layer, chosen on other recordings than those that it is judged on."""

    layer: int
    """layer with the lowest rate over all recordings"""
    values: np.ndarray
    """float64 [N]; of the layer that is best on the other half of the recordings"""


def best_layer(values: np.ndarray) -> BestLayer:
    """Choose the layer with the lowest sum of values, by cross-fitting over two halves of the recordings.

    The lowest of several noisy rates is too low; judged on the half that it was not chosen on, it is not. With a single
    layer the values are unchanged.

    Args:
        values: float64 `[L, N]`, errors or nats of every layer and recording; lower is better, a layer with
            NaN is the worst.
    """
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, np.inf)
    odd = np.arange(values.shape[1]) % 2 == 1
    fitted = np.empty(values.shape[1])
    for half in (odd, ~odd):
        fitted[half] = values[int(values[:, ~half].sum(axis=1).argmin()), half]
    return BestLayer(int(values.sum(axis=1).argmin()), fitted)
