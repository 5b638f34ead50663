"""Judge pretraining targets without training: codes, phones, speakers, silence, predicted trouble.

    python -m tools.gauge --data.dataset datasets/speech --out results/targets
    python -m tools.gauge datasets/speech --targets random pca refined,codebook_size=2048 mfcc \\
        clusters,export=runs/pretrain/export,layer=4 ctc_labels,export=runs/ctc/export

A target is written KIND or KIND,field=value,...; the kinds and fields are those of `TargetSettings`
(docs/targets.md). Clusters and projections are fitted on the train split and judged on the dev split. Phones are exact
for synthetic corpora; for other datasets they come from a CTC export (--phones.aligner), the dataset's word times, or
espeak's speech for the transcripts.

Prints a table and writes gauge.html, gauge.json and pictures to --out. `python -m tools.gauge_correlation` compares
figures with final error rates.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from torch import Tensor

from bestrq.pretraining.gauge import FrameLabels, Ints, judge
from bestrq.pretraining.gauge_targets import TargetSettings, cepstra, fit
from bestrq.report.gauge_charts import Example
from bestrq.report.gauge_page import JudgedCodes, gauge_table, write_gauge
from common.config import from_dict, parse, run_main, to_dict
from common.errors import UserError
from data.corpora.espeak import Phone
from data.format.dataset import Dataset, open_dataset
from pipelines.gauge_exports import TeacherCodes
from pipelines.gauge_phones import PhoneSettings, find_phones
from pipelines.gauge_sample import (
    Piece,
    SampleSettings,
    draw_samples,
    frame_labels,
    mel_stacks,
    read_log_mel,
)
from tools.compare import join_lists

# Seconds of the recording in the picture.
_EXAMPLE_SECONDS = 8.0


@dataclass
class Config:
    """Gauge of pretraining targets."""

    data: SampleSettings = field(default_factory=SampleSettings)
    """recordings"""
    targets: list[str] = field(default_factory=lambda: ["random", "pca", "refined", "mfcc"])
    """targets: KIND or KIND,field=value,..."""
    phones: PhoneSettings = field(default_factory=PhoneSettings)
    """phones"""
    out: str = "results/targets"
    """folder for gauge.html, gauge.json and pictures"""
    title: str = "Pretraining targets"
    """heading of the page"""
    seed: int = 0
    """seed of the choice of recordings"""
    threads: NonNegativeInt = 0
    """CPU threads; 0 uses all cores"""

    def __post_init__(self) -> None:
        if not self.data.dataset:
            raise UserError("data.dataset is missing: give it as --data.dataset FOLDER, or as the first word")
        if not self.targets:
            raise UserError("targets is empty: give at least one, such as --targets random")


def read_targets(texts: Sequence[str]) -> dict[str, TargetSettings]:
    """Targets by name, from KIND or KIND,field=value,... Raises UserError that quotes the target."""
    targets: dict[str, TargetSettings] = {}
    for text in texts:
        kind, *fields = text.split(",")
        values: dict[str, Any] = {"kind": kind}
        for item in fields:
            name, equals, value = item.partition("=")
            if not equals or name in values:
                raise UserError(f"targets: {text!r}: write KIND,field=value,... with each field once, not {item!r}")
            values[name] = value if name in ("name", "export") else yaml.safe_load(value)
        try:
            target = from_dict(TargetSettings, values)
        except UserError as error:
            raise UserError(f"targets: {text!r}: {error}") from error
        name = target.name or text
        if name in targets:
            raise UserError(f"targets: {name!r} is given twice; tell them apart by name=...")
        targets[name] = target
    return targets


def check_sizes(targets: Mapping[str, TargetSettings], fitting: Sequence[Piece], stride: int) -> None:
    """Raise UserError if a target has more codes than frames to fit them; `Teacher` checks its own frames."""
    frames = sum((piece.stop - piece.start) // stride for piece in fitting)
    for name, settings in targets.items():
        if settings.num_fitted > frames and not settings.export:
            raise UserError(
                f"targets: {name!r} has {settings.num_fitted} codes, but is fitted on {frames} frames: give fewer "
                "codes or more data.fit_minutes"
            )


@dataclass(frozen=True)
class Codes:
    """Codes of a target on the sample."""

    values: Ints
    """int64 [N, C], pieces one after the other"""
    num_codes: int
    stride: int
    """mel frames per code"""


def mel_rows(dataset: Dataset, pieces: Sequence[Piece], settings: TargetSettings, data: SampleSettings) -> Tensor:
    """Inputs of a target that needs no export, float32 `[N, K]`: mel stacks, or cepstra averaged over the stack."""
    rows = []
    for piece in pieces:
        log_mel = read_log_mel(dataset, piece, data.normalisation)
        if settings.kind == "mfcc":
            stacks = mel_stacks(cepstra(log_mel), data.stride)
            rows.append(stacks.unflatten(1, (data.stride, -1)).mean(dim=1))
        else:
            rows.append(mel_stacks(log_mel, data.stride))
    return torch.cat(rows)


def compute_codes(
    settings: TargetSettings, teacher: TeacherCodes | None, dataset: Dataset, data: SampleSettings,
    fitting: Sequence[Piece], sample: Sequence[Piece],
) -> Codes:  # fmt: skip
    """Fit a target on some pieces and return its codes on others. teacher: that of a target with an export."""
    if teacher:
        teacher.estimate(fitting)
        codes, stride = teacher(sample)
        return Codes(torch.cat(codes)[:, None].numpy(), teacher.teacher.classes, stride)
    function = fit(settings, mel_rows(dataset, fitting, settings, data))
    full = settings.with_defaults()
    values = function(mel_rows(dataset, sample, settings, data)).numpy()
    return Codes(values, full.clusters or full.codebook_size, data.stride)


def make_example(
    dataset: Dataset, data: SampleSettings, sample: Sequence[Piece], phones: Sequence[list[Phone] | None] | None,
    codes: dict[str, Codes],
) -> Example:  # fmt: skip
    """Piece for the picture: the first of at least three seconds, with phones if there are any; cut at 8 s."""
    hop = dataset.features.hop_ms / 1000
    known = [phones is None or phones[k] is not None for k in range(len(sample))]
    place = max(range(len(sample)), key=lambda k: (known[k], min(sample[k].stop - sample[k].start, 3 / hop), -k))
    piece = sample[place]
    frames = min(piece.stop - piece.start, round(_EXAMPLE_SECONDS / hop))
    strips = {}
    for name, target in codes.items():
        first = sum((before.stop - before.start) // target.stride for before in sample[:place])
        strips[name] = target.values[first : first + frames // target.stride, 0]
    start = piece.start * hop
    spoken = [
        (symbol, begin - start, end - start)
        for symbol, begin, end in (phones[place] or [] if phones else [])
        if start <= begin and end <= start + frames * hop
    ]
    log_mel = read_log_mel(dataset, piece, data.normalisation)[:frames].numpy()
    seconds = {name: target.stride * hop for name, target in codes.items()}
    return Example(dataset.id(piece.recording), log_mel, hop, spoken, strips, seconds)


def gauge(config: Config) -> dict[str, Any]:
    """Judge the targets, print the table, write the report; return the content of gauge.json."""
    started = time.perf_counter()
    targets = read_targets(config.targets)
    dataset = open_dataset(config.data.dataset)
    sample, fitting = draw_samples(dataset, config.data, config.seed)
    # Errors in targets are raised here, before any work.
    teachers = {name: TeacherCodes(settings, dataset) for name, settings in targets.items() if settings.export}
    check_sizes(targets, fitting, config.data.stride)
    phones, origin = find_phones(dataset, sample, config.phones)
    print(f"phones: {origin}; {time.perf_counter() - started:.0f} s", flush=True)
    labels: dict[int, tuple[FrameLabels, list[str]]] = {}
    figures: dict[str, Any] = {}
    codes: dict[str, Codes] = {}
    for name, settings in targets.items():
        begun = time.perf_counter()
        found = codes[name] = compute_codes(settings, teachers.get(name), dataset, config.data, fitting, sample)
        if found.stride not in labels:
            labels[found.stride] = frame_labels(dataset, sample, phones, found.stride)
        row = judge(found.values, found.num_codes, labels[found.stride][0])
        seconds = time.perf_counter() - begun
        figures[name] = {
            "settings": to_dict(settings.with_defaults()),
            "stride": found.stride,
            "seconds": seconds,
            **row,
        }
        print(f"{name}: {seconds:.0f} s", flush=True)
    results = {
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "minutes": sum(piece.stop - piece.start for piece in sample) / dataset.features.frames_per_second / 60,
            "fit_minutes": sum(piece.stop - piece.start for piece in fitting) / dataset.features.frames_per_second / 60,
        },
        "phones": {"origin": origin, "symbols": next(iter(labels.values()))[1]},
        "settings": to_dict(config),
        "targets": figures,
        "seconds": time.perf_counter() - started,
    }
    judged = {
        name: JudgedCodes(target.values[:, 0], target.num_codes, labels[target.stride][0].phone,
                          labels[target.stride][1])
        for name, target in codes.items()
    }  # fmt: skip
    example = make_example(dataset, config.data, sample, phones, codes)
    written = write_gauge(config.out, results, judged, example, config.title)
    print(gauge_table(figures))
    print(f"wrote {config.out}/{written[0]} and {len(written) - 1} files; {time.perf_counter() - started:.0f} s")
    return results


def arguments(argv: Sequence[str]) -> list[str]:
    """Arguments in the form of the parser: a first word without dashes is the dataset; `--targets a b` is a list."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = ["--data.dataset", *words]
    return join_lists(words, ("--targets",))


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, arguments(sys.argv[1:] if argv is None else argv), description=__doc__)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    gauge(config)


if __name__ == "__main__":
    run_main(main)
