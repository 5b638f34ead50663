"""Probes of frozen encoders, layer by layer: text, phones, speaker, language, ABX, rank and slowness of the features.

    python -m tools.probe --export runs/pretrain/export --data.dataset datasets/speech --out results/probe
    python -m tools.probe --export runs/a/export --exports '[runs/b/export]' --data.dataset datasets/speech \\
        --data.language cs --out results/probe

Log-mel and a randomly initialised encoder of the same settings are always probed too. An export of pretraining or
fine-tuning, or a checkpoint, can be given. The same command continues an interrupted ladder with the next layer.

Prints a table and writes into --out: probes.json, every rate with its interval and the comparison of the best layers
with log-mel and the random encoder; probes.svg, the same by layer; layers/, the results of every recording. Lower is
better in every probe. docs/probing.md describes the probes.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

from bestrq.pretraining.probing import CTCProbeSettings
from bestrq.report.chart_style import svg_text
from bestrq.report.probe_chart import draw_probes
from common.config import parse, run_main, to_dict
from common.errors import UserError
from common.files import write_file, write_json
from data.format.dataset import Normalisation, open_dataset
from pipelines.probe_data import ProbeDataSettings
from pipelines.probe_layers import LogMel, read_features, read_material
from pipelines.probe_summary import PROBES, Ladder, summarise, table
from pipelines.probing import climb, largest_stride, read_sources


@dataclass
class Config:
    """Probes of frozen encoders."""

    export: str = ""
    """export (or checkpoint) of a pretrained or fine-tuned encoder"""
    exports: list[str] = field(default_factory=list)
    """further exports"""
    out: str = "results/probe"
    """folder for results; an interrupted ladder in it is continued"""
    data: ProbeDataSettings = field(default_factory=ProbeDataSettings)
    """labelled recordings"""
    ctc: CTCProbeSettings = field(default_factory=CTCProbeSettings)
    """CTC probe"""
    random_seed: int = 0
    """seed of the random encoder"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of encoders and CTC probes; auto is CUDA if there is a GPU"""

    def __post_init__(self) -> None:
        if not self.export:
            raise UserError("export is missing: give it as --export FOLDER")
        if not self.data.dataset:
            raise UserError("data.dataset is missing: give it as --data.dataset FOLDER")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is 'cuda', but torch finds no CUDA GPU: use 'auto' or 'cpu'")


def probe(config: Config) -> None:
    """Probe all sources, print the table and write the results."""
    # Errors in the settings and files are raised here, before any work.
    dataset = open_dataset(config.data.dataset)
    folders = list({Path(folder).resolve(): folder for folder in [config.export, *config.exports]}.values())
    sources = read_sources(folders, dataset, config.random_seed)
    material = read_material(dataset, config.data, largest_stride(sources))
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out = {out}: cannot write this folder ({error}); choose another one") from error
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(
        f"{len(material.ctc.train.recordings)} recordings to train CTC probes on and "
        f"{len(material.ctc.evaluation.recordings)} with other texts to evaluate them on, in {dataset.location}",
        flush=True,
    )

    @cache
    def read(normalisation: Normalisation) -> LogMel:
        return read_features(dataset, material, normalisation)

    ladders = []
    for source in sources:
        read_log_mel = partial(read, source.normalisation)
        layers = climb(source, dataset, material, config.data, config.ctc, out / "layers", device, read_log_mel)
        ladders.append(Ladder(source, layers))

    summary = {"format": 1, "settings": to_dict(config), "dataset": dataset.fingerprint, **summarise(ladders, material)}
    write_json(out / "probes.json", summary)
    write_file(out / "probes.svg", svg_text(draw_probes(summary, PROBES)))
    print(f"\n{table(summary)}\n\nresults: {out / 'probes.json'}, {out / 'probes.svg'}")


if __name__ == "__main__":
    run_main(lambda: probe(parse(Config, description=__doc__)))
