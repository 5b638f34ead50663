"""Probe ladder: every layer of frozen encoders, beside log-mel and a random encoder of the same settings.

Every layer is a JSON file, written when its probes are done, so an interrupted ladder continues with the next layer.
Everything else is computed from these files (`pipelines.probe_summary`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.layer_features import Frames, encode_layers, layer_strides, pooled, stack_log_mel
from bestrq.pretraining.probing import CTCProbeSettings
from bestrq.training.export_reading import Export
from common.config import from_dict, to_dict
from common.errors import UserError
from common.files import hash_of_file, read_json_object, write_json
from common.json_checks import fields, list_of, positive_or_zero, real
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset, Normalisation
from pipelines.pretrained import read_pretrained_encoder
from pipelines.probe_data import PHONE_SOURCES, ProbeDataSettings
from pipelines.probe_layers import (
    LogMel,
    Material,
    describe_frames,
    probe_abx,
    probe_classes,
    probe_ctc,
    probe_phones,
)
from pipelines.run_weights import hash_of_weights, read_trained

FORMAT = 1
WEIGHTED = "weighted"
"""name of the weighted sum in place of a layer number"""


@dataclass(frozen=True)
class Source:
    """Features to probe: log-mel, a random encoder, or the encoder of an export."""

    name: str
    kind: str
    """'log-mel', 'random' or 'export'"""
    settings: EncoderSettings
    normalisation: Normalisation
    fingerprint: str
    """of the weights; part of the key of the results"""
    build: Callable[[], ConformerEncoder] | None
    """encoder in eval mode; None for log-mel"""

    @property
    def layers(self) -> list[str]:
        """Names of the layers, and the weighted sum of an encoder's."""
        if self.kind == "log-mel":
            return ["0"]
        return [*map(str, range(1 + sum(stage.num_layers for stage in self.settings.stages))), WEIGHTED]


def random_encoder(settings: EncoderSettings, seed: int) -> ConformerEncoder:
    """Encoder as initialised with this seed, in eval mode. The global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConformerEncoder(settings).eval()


def read_sources(folders: Sequence[str], dataset: Dataset, seed: int) -> list[Source]:
    """Log-mel, a random encoder for each different architecture, and the exports.

    Raises UserError if an export cannot be read, or does not fit the features of the dataset.
    """
    exports, baselines = [], {}
    for folder in folders:
        config = read_trained(folder).config
        differing = difference(dataset.features, FeatureSettings.from_dict(config.get("features", {})))
        if differing:
            raise UserError(f"export {folder} does not fit the dataset (dataset != export): {differing}")
        settings = from_dict(EncoderSettings, config.get("encoder", {}))
        normalisation: Normalisation = config.get("normalisation", "recording")
        export = read_pretrained_encoder(folder, settings)
        fingerprint = hash_of_weights(folder)
        build = partial(_load, export, settings)
        exports.append(Source(folder, "export", settings, normalisation, fingerprint, build))
        mel = json.dumps(["log-mel", settings.stride, normalisation])
        if mel not in baselines:
            baselines[mel] = Source("log-mel", "log-mel", settings, normalisation, mel, None)
        random = json.dumps(["random", seed, normalisation, to_dict(settings)], sort_keys=True)
        if random not in baselines:
            build = partial(random_encoder, settings, seed)
            baselines[random] = Source("random", "random", settings, normalisation, random, build)
    return [*_distinct(list(baselines.values())), *exports]


def _distinct(sources: list[Source]) -> list[Source]:
    """Number the names that occur more than once: 'random', 'random 2'."""
    counts: dict[str, int] = {}
    named = []
    for source in sources:
        count = counts[source.name] = counts.get(source.name, 0) + 1
        name = source.name if count == 1 else f"{source.name} {count}"
        named.append(Source(name, *(getattr(source, field) for field in list(source.__dataclass_fields__)[1:])))
    return named


def _load(export: Export, settings: EncoderSettings) -> ConformerEncoder:
    encoder = ConformerEncoder(settings)
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in export.tensors.items()})
    return encoder.eval()


def largest_stride(sources: Sequence[Source]) -> int:
    """Mel frames per frame of the slowest source: its CTC probe needs the shortest labels."""
    return max(source.settings.stride for source in sources)


def climb(
    source: Source,
    dataset: Dataset,
    material: Material,
    data: ProbeDataSettings,
    ctc: CTCProbeSettings,
    folder: Path,
    device: torch.device,
    read: Callable[[], LogMel],
) -> dict[str, dict[str, Any]]:
    """Run all probes on every layer of a source that has no results yet, and return the results by layer.

    Args:
        folder: results, one JSON file per layer, in a subfolder named by a key of source, dataset and settings.
        read: reads the features of the recordings; called only if a layer is missing.
    """
    place = folder / _key(source, dataset, material, data, ctc)
    place.mkdir(parents=True, exist_ok=True)
    missing = [layer for layer in source.layers if not (place / f"{layer}.json").exists()]
    if missing:
        log_mel = read()
        start = time.perf_counter()
        labelled, classes = _features(source, log_mel, device)
        print(f"{source.name}: {len(log_mel.labelled) + len(log_mel.classes)} recordings encoded, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        for layer in missing:
            start = time.perf_counter()
            if layer == WEIGHTED:
                result: dict[str, Any] = probe_ctc(same_as_last(labelled), dataset, material.ctc, ctc, device)
            else:
                number = int(layer)
                result = _probe_layer(labelled[number], classes[number], dataset, material, ctc, device)
            write_json(place / f"{layer}.json", {"format": FORMAT, "source": source.name, "layer": layer, **result})
            print(f"  {_progress(layer, result)}, {time.perf_counter() - start:.0f} s", flush=True)
    return {layer: read_layer(place / f"{layer}.json") for layer in source.layers}


def read_layer(path: Path) -> dict[str, Any]:
    """Results of a layer. Raises UserError, which names file and field, if the file was changed."""
    result = read_json_object(path)
    try:
        fields({"train_nats": real, "layer_weights": list_of(real)}, _LAYER)(result, str(path))
        for name in _RATES:
            if name in result and len(result[name]["errors"]) != len(result[name]["sizes"]):
                raise UserError(f"{path}: {name}: errors and sizes differ in length")
    except UserError as error:
        raise UserError(f"{error}. Delete the file to probe the layer again") from error
    return result


_RATES = ("nats", "cer", "phone", "speaker", "language", "abx_within", "abx_across")
_LAYER = {
    **dict.fromkeys(_RATES, fields({"errors": list_of(real), "sizes": list_of(positive_or_zero)})),
    "phone": fields({"errors": list_of(real), "sizes": list_of(positive_or_zero), "chance": real}),
    **dict.fromkeys(("frame_correlation", "effective_rank", "effective_rank_entropy"), real),
}


def _key(source: Source, dataset: Dataset, material: Material, data: ProbeDataSettings, ctc: CTCProbeSettings) -> str:
    """Key of the results of a source: they are reused only for the same weights, recordings and settings."""
    values = to_dict(data) | {"dataset": dataset.fingerprint}
    # The recordings also depend on the largest stride of all sources.
    values["recordings"] = [material.labelled, len(material.ctc.train.recordings)]
    if data.phones and data.phones not in PHONE_SOURCES:
        values["phones"] = hash_of_file(data.phones)
    content = json.dumps([FORMAT, source.fingerprint, values, to_dict(ctc)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _features(source: Source, log_mel: LogMel, device: torch.device) -> tuple[list[Frames], list[Tensor]]:
    """Frames of the labelled recordings and pooled features of the recordings of classes, by layer."""
    if source.build is None:
        stride = source.settings.stride
        labelled = [stack_log_mel(log_mel.labelled, stride)]
        return labelled, [pooled(stack_log_mel(log_mel.classes, stride)) if log_mel.classes else torch.empty(0)]
    encoder = source.build().to(device)
    labelled = encode_layers(encoder, log_mel.labelled)
    if not log_mel.classes:
        return labelled, [torch.empty(0)] * len(labelled)
    parts: list[list[Tensor]] = [[] for _ in layer_strides(encoder)]
    for start in range(0, len(log_mel.classes), 128):  # the frames themselves need not be kept
        for layer, frames in zip(parts, encode_layers(encoder, log_mel.classes[start : start + 128]), strict=True):
            layer.append(pooled(frames))
    return labelled, [torch.cat(layer) for layer in parts]


def _probe_layer(
    frames: Frames, pooled_features: Tensor, dataset: Dataset, material: Material, ctc: CTCProbeSettings,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Results of all probes of a layer."""
    hop_ms = dataset.features.hop_ms
    result: dict[str, Any] = describe_frames(frames, hop_ms)
    if not bool(frames.values.isfinite().all()):
        raise UserError("a layer has NaN features: the weights of the export are damaged or its training diverged")
    result |= probe_ctc([frames], dataset, material.ctc, ctc, device)
    first = 0
    for data in material.classes:
        last = first + len(data.train) + len(data.evaluation)
        result[data.name] = probe_classes(data, pooled_features[first:last])
        first = last
    if material.times:
        result["phone"] = probe_phones(frames, material, hop_ms, ctc.seed)
    return result | probe_abx(frames, material, hop_ms)


def same_as_last(layers: Sequence[Frames]) -> list[Frames]:
    """Layers with the frame rate and the width of the last one: those that a weighted sum can combine."""
    last = layers[-1]
    return [f for f in layers if f.stride == last.stride and f.values.shape[1] == last.values.shape[1]]


def rate(values: Mapping[str, Sequence[float]]) -> float:
    """Sum of errors over sum of sizes; NaN without any."""
    size = sum(values["sizes"])
    return sum(values["errors"]) / size if size else float("nan")


def _progress(layer: str, result: Mapping[str, Any]) -> str:
    probes = [f"{name} {rate(result[name]):.3f}" for name in ("nats", "cer") if name in result]
    return f"layer {layer}: {', '.join(probes)}"
