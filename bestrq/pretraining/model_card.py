"""Model card of a pretrained encoder."""

from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], training: str) -> str:
    """README.md of an export with this config.json; `training` describes the rows of a step and the dataset."""
    encoder, features = config["encoder"], config["features"]
    return f"""# Conformer encoder, pretrained with BEST-RQ

{encoder["num_layers"]} layers of width {encoder["dim"]}; {config["step"]} optimizer steps of {training}.

`config.json` holds the settings of the encoder and of the features (16 kHz, {features["num_mels"]} log-mel bins,
normalised per {config["normalisation"]}). To fine-tune it: `python finetune_ctc.py --finetune.init THIS_FOLDER`.
"""
