"""Estimate of the run time of the quickstart on this machine, from a few measured optimizer steps.

    torchrun --nproc-per-node 2 launch/quickstart_estimate.py --head rnnt

Steps of pretraining and of each fine-tuning are measured on rows of noise, which take the same time as speech, with
the number of processes and the precision of the quickstart. All other work (corpus, program starts, validation,
evaluation, report) is assumed to take the time of a fixed number of pretraining steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.pretraining.objective import BestRQ
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.transducer import TransducerModel
from bestrq.training.optimizer import build_optimizer
from bestrq.training.precision import Precision, resolve_precision, with_precision
from bestrq.training.process import DistributedSettings, World, autocast, parallelise, start_world
from bestrq.training.run_folder import RunFolder
from common.config import from_dict, load_yaml, run_main
from common.segments import Segments
from pipelines.finetuning import FinetuneConfig

VOCAB_SIZE = 40
"""approximate number of characters in the quickstart"""
SEGMENT_SECONDS = 5
SEGMENT_LABELS = 60
WARM_UP = 2
LOOP_FACTOR = 1.4
"""measured time of a step of a training script, relative to a step here without loader, targets, clipping and
logging"""
REST = {"ctc": 1100, "rnnt": 2300}
"""measured time of all work except steps, in pretraining steps as timed here, by head"""
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SETTINGS: dict[str, type[FinetuneConfig]] = {"ctc": finetune_ctc.Config, "rnnt": finetune_rnnt.Config}
"""settings of fine-tuning, by head"""

Loss = Callable[[], Tensor]


def noise_rows(rows: int, row_frames: int) -> tuple[Tensor, Segments]:
    """Noise as log-mel float32 `[R, F, M]`, and adjacent segments that fill the rows."""
    frames = 100 * SEGMENT_SECONDS
    start = torch.arange(0, row_frames - frames + 1, frames).repeat(rows, 1)
    return torch.randn(rows, row_frames, 80), Segments(start, torch.full_like(start, frames - 4), row_frames)


def pretraining_loss(config: pretrain.Config, world: World) -> tuple[torch.nn.Module, Loss]:
    """BEST-RQ model, and a function that computes its loss on the rows of one process in a step."""
    model = BestRQ(config.encoder, config.quantizer)
    parallel = parallelise(model, model.encoder.blocks, world, config.distributed)
    rows = max(1, config.data.rows // world.size)
    log_mel, segments = noise_rows(rows, config.data.row_frames)
    frames = torch.arange(rows * config.data.row_frames // config.encoder.stride // 3)
    targets = torch.randint(config.quantizer.codebook_size, (len(frames), config.quantizer.num_codebooks))
    return parallel, lambda: parallel(log_mel, segments, frames, targets)[0] / len(frames)


def fine_tuning_loss(config: FinetuneConfig, world: World) -> tuple[torch.nn.Module, Loss]:
    """CTC or RNN-T model, by the type of the settings, and a function that computes its loss as above."""
    model: CTCModel | TransducerModel
    if isinstance(config, finetune_rnnt.Config):
        model = TransducerModel(config.encoder, config.transducer, VOCAB_SIZE)
    else:
        model = CTCModel(config.encoder, VOCAB_SIZE)
    parallel = parallelise(model, model.encoder.blocks, world, config.distributed)
    log_mel, segments = noise_rows(max(1, config.data.rows // world.size), config.data.row_frames)
    num_segments = segments.start.numel()
    labels = torch.randint(1, VOCAB_SIZE, (num_segments, SEGMENT_LABELS))
    lengths = torch.full((num_segments,), SEGMENT_LABELS)
    return parallel, lambda: parallel(log_mel, segments, labels, lengths).loss_sum / labels.numel()


def step_seconds(model: torch.nn.Module, loss: Loss, config: pretrain.Config | FinetuneConfig, world: World,
                 measured: int) -> float:  # fmt: skip
    """Median time of a step (forward, backward, optimizer) over `measured` steps."""
    optimizer = build_optimizer([(model.named_parameters(), config.optimizer)])
    times = []
    for number in range(WARM_UP + measured):
        start = time.perf_counter()
        with autocast(world, config.distributed):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def estimate(head: str, steps: int, measured: int, world: World) -> tuple[float, Precision]:
    """Seconds of the quickstart, and the precision of its steps. A positive `steps` replaces those of the configs."""
    config = from_dict(pretrain.Config, load_yaml(CONFIGS / "quickstart-pretrain.yaml"))
    precision = resolve_precision(config.distributed, RunFolder(CONFIGS / "no-run"), world)
    config = with_precision(config, precision)
    seconds = step_seconds(*pretraining_loss(config, world), config, world, measured)
    total = seconds * (LOOP_FACTOR * (steps or config.run.steps) + REST[head])
    for name in ("ctc", head):  # the first fine-tuning is always CTC
        tuning = from_dict(SETTINGS[name], load_yaml(CONFIGS / f"quickstart-{name}.yaml"))
        tuning = with_precision(tuning, precision)
        seconds = step_seconds(*fine_tuning_loss(tuning, world), tuning, world, measured)
        total += LOOP_FACTOR * seconds * (steps or tuning.run.steps)
    return world.max(total), precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=sorted(REST), default="ctc", help="head of the second fine-tuning")
    parser.add_argument("--updates", type=int, default=5, help="measured steps per kind of training")
    parser.add_argument("--steps", type=int, default=0, help="steps of every run; 0 uses those of the configs")
    options = parser.parse_args()
    world = start_world(DistributedSettings())
    seconds, precision = estimate(options.head, options.steps, options.updates, world)
    if world.is_main:
        print(f"about {round(seconds / 60, 1):g} minutes on this machine, estimated from a few steps in {precision}")
    world.close()


if __name__ == "__main__":
    run_main(main)
