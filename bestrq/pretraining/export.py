"""Export of a pretrained encoder: weights, settings, state of the targets, model card. Written on rank 0 only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from bestrq.training.export import write_export

TARGETS_FILE = "targets.safetensors"


def export_encoder(
    folder: Path,
    weights: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    description: dict[str, Any],
    card: str,
) -> None:
    """Write the export of a run.

    Args:
        weights: of the whole model; only those of the encoder are exported.
        targets: projection and codes of the quantizer (`quantizer.*`) and clusters of a teacher (`teacher.*`), as they
            are at this step, for the file targets.safetensors.
        description: config.json.
        card: model card.
    """
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in targets.items()}
    write_export(folder, encoder, description, card, {TARGETS_FILE: save(whole)})


def model_card(config: Mapping[str, Any], training: str) -> str:
    """README.md of an export with this config.json; `training` describes the rows of a step and the dataset."""
    encoder, features = config["encoder"], config["features"]
    return f"""# Conformer encoder, pretrained with BEST-RQ

{encoder["num_layers"]} layers of width {encoder["dim"]}; {config["step"]} optimizer steps of {training}.

`config.json` holds the settings of the encoder and of the features (16 kHz, {features["num_mels"]} log-mel bins,
normalised per {config["normalisation"]}). To fine-tune it: `python finetune_ctc.py --finetune.init THIS_FOLDER`.
"""
