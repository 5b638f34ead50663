"""Figures and numbers of docs/bestrq.md: masks, codes and targets of a prepared dataset, without any training.

    python -m experiments.bestrq_figures --dataset datasets/voices --out docs/figures

Writes bestrq-*.svg and bestrq.json into --out, and prints the tables of the page. Masks and code books are drawn from
fixed seeds, and the recordings are the first of the training split in index order, so a second run gives the same
files. The page's own figures are those of this corpus (real Czech and Dutch speech, 20 MB to download):

    python -m data.prepare debian_voices --held_out_languages '[cs,nl]' --out datasets/voices
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from bestrq.pretraining.mask_shares import masked_share, mean_run, target_share
from bestrq.pretraining.masking import num_runs
from bestrq.pretraining.objective import target_frame_mask
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from bestrq.pretraining.reporting import unigram_entropy
from bestrq.report.chart_style import svg_text
from common.config import run_main
from common.errors import UserError
from common.files import write_file
from data.format.dataset import Dataset, Normalisation, open_dataset
from experiments.bestrq_charts import (
    CODEBOOK_DIMS,
    CODEBOOK_SIZES,
    SPAN,
    SPANS,
    START,
    STARTS,
    STRIDE,
    STRIDES,
    code_counts,
    draw_entropy,
    draw_example,
    draw_mask_shares,
    draw_runs,
    draw_targets,
    draw_usage,
    measured_mask,
    one_segment,
)

TABLE_START, TABLE_END = "<!-- table: {} -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Speech:
    """Recordings of a dataset, cut to whole stacks."""

    dataset: Dataset
    recordings: list[int]

    def log_mel(self, normalisation: Normalisation | None) -> list[Tensor]:
        """Log-mel of every recording, float32 `[frames, M]`, normalised; None gives the stored values."""
        return [self._read(recording, normalisation) for recording in self.recordings]

    def _read(self, recording: int, normalisation: Normalisation | None) -> Tensor:
        frames = int(self.dataset.frames[recording]) // STRIDE * STRIDE
        if normalisation is None:
            return torch.from_numpy(self.dataset.read(recording, 0, frames).astype(np.float32))
        return torch.from_numpy(self.dataset.read_normalised(recording, 0, frames, normalisation=normalisation))


def choose_speech(dataset: Dataset, hours: float) -> Speech:
    """The first recordings of the training split that last two seconds or more, up to `hours`.

    Raises UserError if there is none.
    """
    rate = dataset.features.frames_per_second
    chosen, total = [], 0
    for recording in map(int, dataset.select(split="train")):
        frames = int(dataset.frames[recording])
        if frames >= 2 * rate:
            chosen.append(recording)
            total += frames
        if total >= hours * 3600 * rate:
            break
    if not chosen:
        raise UserError(f"--dataset {dataset.location}: no recording of the train split lasts two seconds or more")
    return Speech(dataset, chosen)


# ---- Codes ----


def stacks_of(features: Sequence[Tensor], stride: int = STRIDE) -> Tensor:
    """Stacks of all recordings, one after the other, `[N, stride * M]`."""
    return torch.cat([stack_frames(f[None, : len(f) // stride * stride], stride)[0] for f in features])


def usage_figures(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Entropy in nats, perplexity, share of codes used at least once, and share of the most frequent code."""
    counts = code_counts(codes, codebook_size)
    entropy = float(unigram_entropy(counts))
    used, most = float((counts > 0).double().mean()), float(counts.max() / counts.sum())
    return {"entropy": entropy, "perplexity": math.exp(entropy), "used": used, "most_frequent": most}


def codes_normalised_over_time(quantizer: RandomProjectionQuantizer, features: Sequence[Tensor]) -> Tensor:
    """Codes with the projection normalised along time instead of along the code dimension, a published mistake."""
    parts = []
    for recording in features:
        projected = stack_frames(recording[None], STRIDE)[0] @ quantizer.projection[0]
        parts.append((F.normalize(projected, dim=0) @ quantizer.codebook[0].T).argmax(dim=-1))
    return torch.cat(parts)


def codes_without_unit_norm(stacks: Tensor, settings: QuantizerSettings) -> Tensor:
    """Codes by the largest inner product with codes of unequal norm: the longest codes win."""
    quantizer = RandomProjectionQuantizer(settings, stacks.shape[1])
    codes = torch.randn(settings.codebook_size, settings.codebook_dim, generator=torch.Generator().manual_seed(1))
    return (F.normalize(stacks @ quantizer.projection[0], dim=-1) @ codes.T).argmax(dim=-1)


def usage_of_variants(speech: Speech, settings: QuantizerSettings) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Codes `[N]` of every variant of normalisation, and their figures."""
    recording = speech.log_mel("recording")
    stacks = stacks_of(recording)
    quantizer = RandomProjectionQuantizer(settings, stacks.shape[1])
    raw = stacks_of(speech.log_mel(None))
    power = raw.exp()
    codes = {
        "normalised per recording": quantizer(stacks)[:, 0],
        "normalised per dataset": quantizer(stacks_of(speech.log_mel("dataset")))[:, 0],
        "not normalised": quantizer(raw)[:, 0],
        "power instead of log, not normalised": quantizer(power)[:, 0],
        "projection normalised over time": codes_normalised_over_time(quantizer, recording),
        "codes of unequal norm, inner product": codes_without_unit_norm(stacks, settings),
    }
    return codes, {name: usage_figures(value, settings.codebook_size) for name, value in codes.items()}


def code_runs(codes: Tensor, lengths: Sequence[int]) -> np.ndarray:
    """Lengths of runs of equal codes, in stacks; runs end with their recording."""
    runs = []
    for part in codes.split(list(lengths)):
        edges = (part[1:] != part[:-1]).nonzero().flatten().numpy() + 1
        runs.append(np.diff(np.concatenate([[0], edges, [len(part)]])))
    return np.concatenate(runs)


# ---- Masks ----


def mask_figures(frames: int) -> list[dict[str, float]]:
    """Share of masked frames and mean run by span and start probability, measured on `frames` frames and by formula."""
    rows = []
    for span in SPANS:
        for start in STARTS:
            mask = measured_mask(frames, span, start, seed=span)
            measured = {"share": float(mask.double().mean()), "run": int(mask.sum()) / max(1, num_runs(mask))}
            formulas = {"share_formula": masked_share(start, span), "run_formula": mean_run(start, span)}
            rows.append({"span": span, "start": start, **measured, **formulas})
    return rows


def target_figures(frames: int) -> list[dict[str, float]]:
    """Share of encoder frames with a target by span and stride, measured and by formula, at the paper's share."""
    rows = []
    for span in SPANS:
        start = 1 - (1 - masked_share(START, SPAN)) ** (1 / span)  # the same masked share with other spans
        mask = measured_mask(frames, span, start, seed=span)
        for stride in STRIDES:
            usable = target_frame_mask(mask, one_segment(frames), stride)
            share, formula = float(usable.double().mean()), target_share(start, span, stride)
            rows.append({"span": span, "stride": stride, "share": share, "share_formula": formula})
    return rows


# ---- Tables of the page ----


def usage_table(numbers: dict[str, Any]) -> str:
    """Markdown table of the variants of the quantizer."""
    lines = [
        "| Features and quantizer | entropy, nats | perplexity | codes used | most frequent code |",
        "|---" * 5 + "|",
    ]
    for name, row in numbers["usage"].items():
        shares = f"{100 * row['used']:.1f} % | {100 * row['most_frequent']:.1f} %"
        lines.append(f"| {name} | {row['entropy']:.2f} | {row['perplexity']:,.0f} | {shares} |")
    return "\n".join(lines)


def target_table(numbers: dict[str, Any]) -> str:
    """Markdown table of the share of encoder frames with a target at the paper's masked share: formula and measured."""
    lines = ["| Span | " + " | ".join(f"stride {stride}" for stride in STRIDES) + " |", "|---" * 6 + "|"]
    for span in SPANS:
        rows = [row for row in numbers["targets"] if row["span"] == span]
        cells = [f"{100 * row['share_formula']:.1f} ({100 * row['share']:.1f}) %" for row in rows]
        lines.append(f"| {span * 10} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"usage": usage_table, "targets": target_table}


def marked_tables(numbers: dict[str, Any]) -> dict[str, str]:
    """Tables with their markers, as they are in the page; a test compares both."""
    return {name: f"{TABLE_START.format(name)}\n{make(numbers)}\n{TABLE_END}" for name, make in TABLES.items()}


# ---- Script ----


def make(speech: Speech, mask_frames: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures by name, and the numbers in them."""
    settings = QuantizerSettings()
    hop_ms = speech.dataset.features.hop_ms
    features = speech.log_mel("recording")
    stacks = stacks_of(features)
    quantizer = RandomProjectionQuantizer(settings, stacks.shape[1])
    variants, usage = usage_of_variants(speech, settings)
    variances = torch.linalg.eigvalsh(torch.cov(stacks.T.double())).flip(0)
    entropies = []
    for dim in CODEBOOK_DIMS:
        for size in CODEBOOK_SIZES:
            chosen = QuantizerSettings(codebook_size=size, codebook_dim=dim)
            codes = RandomProjectionQuantizer(chosen, stacks.shape[1])(stacks)[:, 0]
            entropies.append({"dim": dim, "size": size, **usage_figures(codes, size)})
    runs = {}
    for stride, size in ((4, 256), (4, 8192), (8, 8192)):
        stacked = stacks_of(features, stride)
        lengths = [len(f) // stride for f in features]
        chosen = QuantizerSettings(codebook_size=size)
        codes = RandomProjectionQuantizer(chosen, stacked.shape[1])(stacked)[:, 0]
        runs[f"{size:,} codes, stride {stride}"] = code_runs(codes, lengths)
    longest = max(features, key=len)[: 100 * 6]
    masks, targets = mask_figures(mask_frames), target_figures(mask_frames)
    figures = {
        "example": draw_example(longest, quantizer, hop_ms),
        "usage": draw_usage(variants, usage, settings.codebook_size),
        "mask-share": draw_mask_shares(masks),
        "targets": draw_targets(targets),
        "entropy": draw_entropy(entropies),
        "runs": draw_runs(runs, mask_frames, hop_ms),
    }
    numbers = {
        "dataset": speech.dataset.name,
        "fingerprint": speech.dataset.fingerprint,
        "recordings": len(speech.recordings),
        "hours": sum(map(len, features)) * hop_ms / 3.6e6,
        "stacks": len(stacks),
        "variance_of_16_components": float(variances[:16].sum() / variances.sum()),
        "usage": usage,
        "entropy": entropies,
        "mean_code_run": {name: float(lengths.mean()) for name, lengths in runs.items()},
        "masks": masks,
        "targets": targets,
    }
    return figures, numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="dataset written by data.prepare, with a train split")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figures and numbers")
    parser.add_argument("--hours", type=float, default=3.0, help="hours of speech for the codes")
    parser.add_argument("--mask-frames", type=int, default=2_000_000, help="mel frames of masks to draw per setting")
    arguments = parser.parse_args()
    speech = choose_speech(open_dataset(arguments.dataset), arguments.hours)
    figures, numbers = make(speech, arguments.mask_frames // 80 * 80)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_file(arguments.out / f"bestrq-{name}.svg", svg_text(figure) + "\n")
    write_file(arguments.out / "bestrq.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    print("\n\n".join(marked_tables(numbers).values()))


if __name__ == "__main__":
    run_main(main)
