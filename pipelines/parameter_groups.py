"""Parameters of fine-tuning by origin, each with its own learning rate: kept from `finetune.init`, fresh, and heads.

Kept are the subsampling and all blocks of the encoder except the re-initialised ones. They have
`finetune.encoder_learning_rate`, decayed from block to block by `finetune.layer_decay`, and are frozen in the first
`finetune.freeze_encoder_steps` steps. All other parameters train from the first step at `optimizer.learning_rate`: the
re-initialised blocks, the weights of the weighted sum of layers, and the heads. From scratch, nothing is kept.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from bestrq.training.optimizer import OptimizerSettings
from pipelines.finetuning import FinetuneConfig

NamedParameters = list[tuple[str, nn.Parameter]]


def kept_blocks(config: FinetuneConfig) -> int | None:
    """Number of blocks, from the first, with weights of `finetune.init`; None from scratch."""
    if not config.finetune.init:
        return None
    return sum(stage.num_layers for stage in config.encoder.stages) - config.finetune.reinitialise_top_blocks


def frozen_blocks(config: FinetuneConfig, step: int) -> int | None:
    """Blocks that are frozen, with the subsampling, in optimizer step `step` (from 1); None if nothing is frozen."""
    return kept_blocks(config) if step <= config.finetune.freeze_encoder_steps else None


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: FinetuneConfig
) -> list[tuple[NamedParameters, OptimizerSettings]]:
    """Groups for `build_optimizer`: fresh parameters and heads first, then the kept ones, from the subsampling upwards.

    Of K kept blocks, block k (from 1) has the rate of the encoder times `layer_decay ** (K - k)`, and the subsampling
    times `layer_decay ** K`. Source: ELECTRA (Clark et al., arXiv 2003.10555) and BEiT (Bao et al., arXiv 2106.08254).

    Args:
        named_parameters: of the unwrapped model, whose encoder is `encoder`.
    """
    number, decay = kept_blocks(config), config.finetune.layer_decay
    fresh: NamedParameters = []
    kept: dict[int, NamedParameters] = {}  # by depth: 0 is the subsampling; a single group without decay
    for name, parameter in named_parameters:
        depth = depth_of(name)
        if number is None or depth is None or depth > number:
            fresh.append((name, parameter))
        else:
            kept.setdefault(number if decay == 1 else depth, []).append((name, parameter))
    groups = [(fresh, config.optimizer)]
    rate = config.finetune.encoder_learning_rate or config.optimizer.learning_rate
    for depth in sorted(kept):
        decayed = rate * decay ** ((number or 0) - depth)
        settings = replace(config.optimizer, learning_rate=decayed, frozen_steps=config.finetune.freeze_encoder_steps)
        groups.append((kept[depth], settings))
    return groups


def depth_of(name: str) -> int | None:
    """Depth of a parameter in the encoder: 0 in the subsampling, k in block k (from 1); None outside of both."""
    module, _, rest = name.removeprefix("encoder.").partition(".")
    if not name.startswith("encoder.") or module == "layer_sum":
        return None
    return int(rest.split(".")[0]) + 1 if module == "blocks" else 0
