"""Alarms of pretraining: planted and real failures that the loss does not show, each with what to try.

A loss below the unigram entropy of the targets only shows that the model uses the context. It does not show that the
features hold text: in a trial, the loss was 1.6 nats below the unigram entropy and the frozen features were no better
than those of a random encoder (docs/probing.md). Only a probe shows that (`probe.every_steps`).

R rows, F mel frames per row, M mel bins.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bestrq.training.process import local
from common.segments import Segments

MAX_ROWS = 4
"""rows of a batch whose features are checked"""
MIN_FEATURE_STD = 0.05
"""features are normalised to 1; below this, they are constant"""
MIN_ADJACENT_CORRELATION = 0.5
"""of frames 10 ms apart, whose windows overlap: 0.92 on speech (99 % of recordings above 0.83), 0.30 with mel and time
exchanged (99 % below 0.61), measured on up to 300 recordings of Debian's voices; a row has several recordings"""
MAX_MASK_SHARE = 0.9
MAX_LINES_WITHOUT_TARGETS = 3
"""log lines; a single small step may have no masked frame by chance"""
MIN_PERPLEXITY, MIN_PERPLEXITY_SHARE = 2.0, 0.01
"""of the targets, absolute and relative to the number of codes. A constant target has 1, which is not below 1 % of 100
codes or fewer, such as the labels of a CTC model"""
MAX_ABOVE_UNIFORM = 1.0
"""nats per target above the loss of guessing, ln V; freshly initialised heads are about 0.2 above it"""
RELEARNING_STEPS = 100
"""steps after new targets in which the loss may be above that of guessing: the head still predicts the earlier ones"""
LEARNING_STEPS = 1000
"""steps after the warm-up until which a loss below the unigram entropy is not expected"""
MAX_RELATIVE_STEP = 0.2
"""learning rate over the size of the weights: AdamW moves a weight by about the rate. 0.04 in the recipes"""
MIN_RANK, MIN_RANK_SHARE = 2.0, 0.25
"""effective rank of the probed features, absolute and relative to the random encoder's"""
MAX_FRAME_CORRELATION = 0.95
REPEAT = 100
"""an alarm that goes on is printed at every hundredth check"""


@dataclass(frozen=True)
class Alarm:
    """Failure, with what to try."""

    name: str
    message: str


@dataclass
class Alarms:
    """Alarms of a run. The state, what has been printed, is not checkpointed: it affects the console only."""

    codebook_size: int
    warmup_steps: int
    """of the learning rate"""
    new_targets_at: Sequence[int] = ()
    """steps at which the targets change (`quantizer.pca_steps`, `quantizer.refine_steps`); 0 for no change"""
    targets_seen: int = -1
    """at the previous check; -1 before the first"""
    lines_without_targets: int = 0
    """successive checks without a new target"""
    checks: dict[str, int] = field(default_factory=dict)
    """checks in a row that each alarm has fired, by name"""

    def report(
        self, step: int, values: Mapping[str, Any], log_mel: Tensor, segments: Segments, model: nn.Module
    ) -> list[Alarm]:
        """Print the alarms of a log interval to stderr, and return them.

        Args:
            values: figures of the interval (`interval_means`, `codebook_figures`), and `learning_rate`.
            log_mel: clean features of a batch, float32 `[R, F, M]`, on the CPU; only the first rows are used.
            segments: of these rows, in mel frames.
            model: its weights, or this rank's shard of them.
        """
        step_size = relative_step(model, values["learning_rate"])
        alarms = [*feature_alarms(log_mel, segments), *self.loss_alarms(step, values), *_rate_alarm(step_size, values)]
        self.targets_seen = values["targets_seen"]
        return self.print_alarms(step, alarms, ("features", "masks", "targets", "loss"))

    def report_probe(self, step: int, figures: Mapping[str, float], judge: bool) -> list[Alarm]:
        """Print the alarms of a probe's figures (`probe_alarms`) to stderr, and return them."""
        return self.print_alarms(step, list(probe_alarms(figures, judge)), ("probe",))

    def print_alarms(self, step: int, alarms: list[Alarm], groups: tuple[str, ...]) -> list[Alarm]:
        """Print alarms that are new or have lasted for `REPEAT` checks; others of the same groups have ended."""
        names = {alarm.name for alarm in alarms}
        ended = [name for name in self.checks if name.split(":")[0] in groups and name not in names]
        for name in ended:
            del self.checks[name]
        for alarm in alarms:
            count = self.checks.get(alarm.name, 0)
            self.checks[alarm.name] = count + 1
            if count % REPEAT == 0:
                print(f"ALARM at step {step}: {alarm.message}", file=sys.stderr, flush=True)
        return alarms

    def loss_alarms(self, step: int, values: Mapping[str, Any]) -> Iterator[Alarm]:
        """Alarms of masks, targets and loss in a log interval; see `report`."""
        if values["mask_share"] > MAX_MASK_SHARE:
            yield Alarm(
                "masks: all",
                f"{values['mask_share']:.0%} of the frames are masked: nothing is left to predict them from. Lower "
                "masking.start_probability or masking.span_ms; a third to two thirds is usual",
            )
        without = values["targets_seen"] == max(self.targets_seen, 0)
        self.lines_without_targets = self.lines_without_targets + 1 if without else 0
        if self.lines_without_targets >= MAX_LINES_WITHOUT_TARGETS:
            yield Alarm(
                "masks: none",
                f"no frame had a target in the last {MAX_LINES_WITHOUT_TARGETS} lines: all segments are shorter than "
                "masking.span_ms, or spans are shorter than the stride of the encoder. Raise data.min_seconds, or "
                "change masking.span_ms",
            )
        if without:
            return
        size = self.codebook_size
        lowest = max(MIN_PERPLEXITY, size * MIN_PERPLEXITY_SHARE)
        if values["targets_seen"] >= size and values["perplexity"] < lowest:
            yield Alarm(
                "targets: collapse",
                f"a codebook has collapsed: perplexity {values['perplexity']:.1f} of {size} codes. Its targets "
                "carry no information. Check that the features are normalised (data.normalisation) and the audio is "
                "not silent, and try another quantizer.seed or a larger quantizer.codebook_dim",
            )
        uniform = math.log(size)
        relearning = any(0 < change < step <= change + RELEARNING_STEPS for change in self.new_targets_at)
        if values["loss"] > uniform + MAX_ABOVE_UNIFORM and not relearning:
            yield Alarm(
                "loss: divergence",
                f"the loss is {values['loss']:.2f} nats, but guessing gives {uniform:.2f}: training diverges. Lower "
                "optimizer.learning_rate (by 3 to 10), lengthen optimizer.warmup_steps or lower optimizer.clip_norm, "
                "and start again from an earlier checkpoint",
            )
        late = step > self.warmup_steps + LEARNING_STEPS
        if late and values["loss"] >= values["unigram_entropy"] and values["accuracy"] <= values["unigram_accuracy"]:
            yield Alarm(
                "loss: unigram",
                f"after {step} steps the loss ({values['loss']:.2f} nats, accuracy {values['accuracy']:.2%}) is not "
                f"below that of the frequencies of the codes alone ({values['unigram_entropy']:.2f}, "
                f"{values['unigram_accuracy']:.2%}): the model does not use the context. Try a lower or higher "
                "optimizer.learning_rate, shorter masking.span_ms, and check the picture 'mask' in TensorBoard",
            )


@torch.no_grad()
def relative_step(model: nn.Module, learning_rate: float) -> float:
    """Learning rate over the root mean square of a weight matrix, median over the matrices."""
    weights = [local(parameter) for parameter in model.parameters() if parameter.ndim > 1]
    sizes = [weight.float().square().mean().sqrt() for weight in weights if weight.numel()]
    return learning_rate / max(float(torch.stack(sizes).median()), 1e-30)


def _rate_alarm(step_size: float, values: Mapping[str, Any]) -> Iterator[Alarm]:
    if step_size > MAX_RELATIVE_STEP:
        yield Alarm(
            "loss: rate",
            f"the learning rate {values['learning_rate']:.2g} is {step_size:.0%} of the size of the weights, which an "
            "optimizer step changes by about as much: features collapse even if the loss stays finite. Divide "
            "optimizer.learning_rate by 10 or more, and start again",
        )


def feature_alarms(log_mel: Tensor, segments: Segments) -> Iterator[Alarm]:
    """Constant features, and features whose neighbouring frames are unrelated, in the first rows of a batch."""
    parts = [log_mel[row, start:stop].double() for row, _, start, stop in segments.used() if row < MAX_ROWS]
    if sum(map(len, parts)) < 100:
        return
    frames = torch.cat(parts)
    mean = frames.mean(dim=0)
    std = float(frames.std(dim=0).median())
    if std < MIN_FEATURE_STD:
        yield Alarm(
            "features: constant",
            f"the features are constant: the standard deviation of a bin is {std:.1e}, not about 1. Check the audio "
            "with `python -m data.shards inspect DATASET`: it is silent, or the corpus was read wrongly",
        )
        return
    products = torch.cat([((part[1:] - mean) * (part[:-1] - mean)).sum(dim=1) for part in parts])
    correlation = float(products.mean() / (frames - mean).square().sum(dim=1).mean())
    if correlation < MIN_ADJACENT_CORRELATION:
        yield Alarm(
            "features: axis",
            f"neighbouring frames have a correlation of {correlation:.2f}, in speech about 0.9: mel bins and time may "
            "be exchanged, or the audio is noise. Draw the features (picture 'mask' in TensorBoard) and check that "
            "they are stored as [frames, bins]",
        )


def probe_alarms(figures: Mapping[str, float], judge: bool) -> Iterator[Alarm]:
    """Alarms of a probe during training.

    Args:
        figures: `probe_nats_per_character`, `probe_nats_log_mel`, `probe_nats_random`, `effective_rank`,
            `effective_rank_random`, `frame_correlation`. NaN counts as a failure.
        judge: whether enough steps are done to expect useful features. Before, there is no alarm: while the loss is
            still on the plateau of the unigram entropy, the rank can be 2 too (one run on real speech).
    """
    if not judge:
        return
    rank, random_rank = figures["effective_rank"], figures["effective_rank_random"]
    if not rank >= max(MIN_RANK, MIN_RANK_SHARE * random_rank):
        yield Alarm(
            "probe: rank",
            f"the features of the probed layer have an effective rank of {rank:.1f} (random encoder "
            f"{random_rank:.1f}): they collapse to a few directions. Lower optimizer.learning_rate, and check the "
            "masks and the perplexity of the targets",
        )
    correlation = figures["frame_correlation"]
    if correlation > MAX_FRAME_CORRELATION:
        yield Alarm(
            "probe: slow",
            f"features {correlation:.2f} correlated over 40 ms hold the speaker and the channel rather than phones. "
            "Try shorter masking.span_ms, more or refined codebooks, or targets of another kind",
        )
    nats = figures["probe_nats_per_character"]
    baseline = min(figures["probe_nats_log_mel"], figures["probe_nats_random"])
    if not nats < baseline:
        yield Alarm(
            "probe: no gain",
            f"the best probed layer gives {nats:.3f} nats per character, log-mel {figures['probe_nats_log_mel']:.3f} "
            f"and the random encoder {figures['probe_nats_random']:.3f}: so far the features hold no more text than "
            "the input, whatever the loss. Train on more audio, or change the targets (docs/probing.md)",
        )
