"""Precision of inference: evaluation, transcription, and validation during fine-tuning."""

from typing import Literal

from bestrq.training.precision import has_bfloat16
from bestrq.training.process import World


def inference_precision(
    setting: Literal["auto", "float32", "bfloat16"], world: World
) -> Literal["float32", "bfloat16"]:
    """Resolve `InferenceSettings.precision`. All ranks must call it.

    'auto' is bfloat16 if the GPUs of all ranks multiply it in hardware, else float32. On a CPU it is always float32,
    also with bfloat16 instructions: results of evaluations then do not depend on the processor.
    """
    if setting != "auto":
        return setting
    return "float32" if world.any(world.device.type != "cuda" or not has_bfloat16(world.device)) else "bfloat16"
