"""Stages of the experiment on pretraining, as a table: each has a name, and the stages that it builds on.

A system is a fine-tuning with a role. To add one, add its stages to `STAGES`, after those that they need. Settings are
those of the scripts, by their dotted names; a fine-tuning with a `grid` takes the candidate with the lowest dev CER.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Any]
"""values by dotted name, such as {"optimizer.learning_rate": 1e-3}"""

Role = Literal["scratch", "unlabelled", "rival", ""]
"""scratch: labels only; unlabelled: also the unlabelled speech; rival: also other speech; "": no system by itself"""


@dataclass(frozen=True)
class Speech:
    """Synthetic speech of espeak-ng, in the languages of the experiment."""

    name: str


@dataclass(frozen=True)
class Pretraining:
    """Pretraining on all speech of the train split. Without a teacher, one run serves all cells."""

    name: str
    teacher: str = ""
    """fine-tuning stage whose model gives the targets (`targets.export`); the run then belongs to one cell"""
    settings: Settings = field(default_factory=dict)
    steps: float = 1.0
    """optimizer steps, as a multiple of those of the size"""


@dataclass(frozen=True)
class PseudoLabels:
    """Hypotheses of a teacher for the speech of the train split without its labelled recordings."""

    name: str
    teacher: str
    """fine-tuning stage"""
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class FineTuning:
    """CTC model from the labels of a cell; with `speech`, from all of that speech."""

    name: str
    summary: str = ""
    role: Role = ""
    init: str = ""
    """stage of the initial encoder"""
    pseudo: str = ""
    """stage of pseudo-labels, added to the labels"""
    label_share: float = 0.5
    """with pseudo-labels: share of the training audio with true labels"""
    speech: str = ""
    """stage of speech to train on in place of the corpus; one run serves all cells"""
    settings: Settings = field(default_factory=dict)
    grid: tuple[Settings, ...] = ()
    """candidates, the most plausible first: a small size tries fewer of them"""
    tuned_as: str = ""
    """stage whose chosen candidate applies; empty: its own"""
    steps: float = 1.0
    """optimizer steps, as a multiple of those of the size"""
    equal_cost: bool = False
    """as many steps as the processor time of the best unlabelled system allows"""


Stage = Speech | Pretraining | PseudoLabels | FineTuning

# The grids have the same number of candidates, over learning rates, dropout, frequency warp and kept blocks.
SCRATCH_GRID: tuple[Settings, ...] = (
    {"optimizer.learning_rate": 2e-3, "encoder.dropout": 0.0},
    {"optimizer.learning_rate": 2e-3, "encoder.dropout": 0.1, "data.augment.frequency_warp": 0.1},
    {"optimizer.learning_rate": 1e-3, "encoder.dropout": 0.0},
)
PRETRAINED_GRID: tuple[Settings, ...] = (
    {"optimizer.learning_rate": 2e-3, "encoder.dropout": 0.0, "finetune.reinitialise_top_blocks": 4},
    {"optimizer.learning_rate": 2e-3, "encoder.dropout": 0.1, "finetune.reinitialise_top_blocks": 2},
    {"optimizer.learning_rate": 1e-3, "encoder.dropout": 0.0, "finetune.reinitialise_top_blocks": 2},
)

STUDENT_STEPS = 2.0
"""of self-training: pseudo-labels add audio, so that overfitting starts later"""
PRETRAINING = "bestrq"
"""stage of the shared self-supervised pretraining; --pretrained replaces it"""
SCRATCH, SCRATCH_LONG, PRETRAINED, SYNTHETIC = "scratch", "scratch-long", "pretrained", "synthetic"

STAGES: tuple[Stage, ...] = (
    Pretraining(PRETRAINING),
    FineTuning(SCRATCH, "labels only", "scratch", grid=SCRATCH_GRID),
    FineTuning(PRETRAINED, "BEST-RQ, then labels", "unlabelled", init=PRETRAINING, grid=PRETRAINED_GRID),
    PseudoLabels("scratch-labels", teacher=SCRATCH),
    FineTuning(
        "self-training",
        "labels and pseudo-labels of scratch",
        "unlabelled",
        pseudo="scratch-labels",
        steps=STUDENT_STEPS,
        tuned_as=SCRATCH,
    ),
    PseudoLabels("pretrained-labels", teacher=PRETRAINED),
    FineTuning(
        "pretrained+self-training",
        "BEST-RQ, then labels and pseudo-labels of pretrained",
        "unlabelled",
        init=PRETRAINING,
        pseudo="pretrained-labels",
        steps=STUDENT_STEPS,
        tuned_as=PRETRAINED,
    ),
    Pretraining(
        "guided-encoder",
        teacher=SCRATCH,
        steps=0.25,  # a run per cell: the labels of a cell are its own
        settings={"quantizer.pca_steps": 0, "quantizer.whitening": 0.0, "quantizer.refine_steps": []},  # not used
    ),
    FineTuning(
        "guided",
        "masked prediction of clusters of scratch's hidden layer, then labels",
        "unlabelled",
        init="guided-encoder",
        tuned_as=PRETRAINED,
    ),
    Speech("synthetic-speech"),
    FineTuning("synthetic-model", speech="synthetic-speech", tuned_as=SCRATCH),
    FineTuning(
        SYNTHETIC, "labelled synthetic speech, then labels", "rival", init="synthetic-model", tuned_as=PRETRAINED
    ),
    FineTuning(
        SCRATCH_LONG,
        "labels only, as much processor time as the best unlabelled system",
        "scratch",
        tuned_as=SCRATCH,
        equal_cost=True,
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
SYSTEMS = tuple(stage.name for stage in STAGES if isinstance(stage, FineTuning) and stage.role)


def fine_tuning(name: str) -> FineTuning:
    """Fine-tuning stage by name."""
    stage = BY_NAME[name]
    assert isinstance(stage, FineTuning), name
    return stage


@dataclass(frozen=True)
class Size:
    """Extent of the experiment."""

    pretraining_steps: int
    finetuning_steps: int
    minutes: tuple[float, ...]
    """minutes of labels"""
    seeds: tuple[int, ...]
    """a seed selects the labelled recordings, the initial weights and the order"""
    systems: tuple[str, ...]
    candidates: int
    """tried per grid; with 1, the first candidate is taken without a trial"""
    language_models: tuple[Settings, ...] = ()
    """settings of the beam search with a character n-gram, of which dev chooses; none: greedy only"""
    curve: tuple[float, ...] = ()
    """shares of the pretraining steps after which checkpoints are fine-tuned as well, multiples of 1/8"""
    synthetic_hours: float = 2.0
    longest: float = 16.0
    """largest multiple of the fine-tuning steps for equal processor time"""
    settings: Settings = field(default_factory=dict)
    """further settings of pretraining and fine-tuning"""


def _beam(weight: float) -> Settings:
    return {"decoder.beam": 8, "decoder.language_model_weight": weight, "decoder.label_bonus": 0.5}


SIZES = {
    "hour": Size(3000, 1000, (30.0,), (0, 1, 2), (SCRATCH, PRETRAINED, "pretrained+self-training"), 1),
    "night": Size(
        6000,
        2000,
        (10.0, 30.0, 60.0),
        (0, 1, 2),
        SYSTEMS,
        3,
        language_models=(_beam(0.3), _beam(0.6)),
        curve=(0.125, 0.25, 0.5),
    ),
    "tiny": Size(
        8,
        2,
        (0.5,),
        (0, 1),
        (SCRATCH, PRETRAINED, SCRATCH_LONG),
        2,
        language_models=(_beam(0.3),),
        curve=(0.5,),
        synthetic_hours=0.02,
        longest=2.0,
        settings={
            "encoder.dim": 16,
            "encoder.num_layers": 4,
            "encoder.num_heads": 2,
            "encoder.feedforward_dim": 24,
            "encoder.kernel_size": 5,
            "encoder.subsampling_channels": 4,
            "data.row_frames": 800,
            "data.max_seconds": 8,
            "run.log_every": 1,
        },
    ),
}
