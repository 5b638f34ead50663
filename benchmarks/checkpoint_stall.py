"""Time that a checkpoint takes from training, and time to save one, beside torch.save and DCP, and to load one.

    python -m benchmarks.checkpoint_stall
    python -m benchmarks.checkpoint_stall --config configs/large-600m.yaml

The model and its optimizer are those of a pretraining configuration, by default base-120m, and a step is as large as on
one of 8 GPUs: 4 rows of a minute. Steps run on this device: without a save, and with one at the beginning, by us in the
background and by `async_save` of torch.distributed.checkpoint (DCP). The stall is the difference in time, in steps. On
a CPU, the writing thread takes its time from the steps, whose computation needs all cores; `stall_seconds` is that
time, and `--rows 1 --seconds 4 --steps 24` compares with steps of half a second. --folder should be on the disk of real
runs. The last line is JSON: `stall_steps`, `gigabytes` (size of a checkpoint) and, in seconds, `step_seconds`,
`ours_copy_seconds` (until training goes on), `ours_write_seconds`, `torch_save_seconds`, `dcp_save_seconds`,
`dcp_async_copy_seconds`, and the loads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.machine import hardware_precision, print_figures
from bestrq.pretraining.objective import BestRQ, mask_rows
from bestrq.pretraining.quantizer import RandomProjectionQuantizer
from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import load_checkpoint
from bestrq.training.checkpoint_saving import take_snapshot, write_checkpoint
from bestrq.training.optimizer import build_optimizer, set_learning_rates, update_weights
from bestrq.training.process import World
from common.config import parse
from common.segments import Segments
from pipelines.pretraining import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/base-120m.yaml", help="settings of a pretraining")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--seconds", type=int, default=60, help="length of a row")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps after each save; the writing has to end within them"
    )
    parser.add_argument("--folder", help="folder of the checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = parse(Config, [f"--config={options.config}"])
        figures = measure(config, options.rows, 100 * options.seconds, options.steps, Path(folder))
    print_figures({"benchmark": "checkpoint_stall", "config": options.config, **figures}, hardware_precision())


def measure(config: Config, rows: int, frames: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """Figures of the configuration with steps of so many rows of `frames` mel frames."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(device=device)
    torch.manual_seed(0)
    model = BestRQ(config.encoder, config.quantizer).to(device)
    optimizer = build_optimizer([(model.named_parameters(), config.optimizer)])
    step = make_step(model, optimizer, config, rows, frames, device)
    step()  # creates the optimizer's state

    def steps() -> None:
        for _ in range(num_steps):
            step()

    undisturbed = timed(steps)

    writer = BackgroundWriter(world)
    times: dict[str, float] = {"step_seconds": undisturbed / num_steps}

    def save_ours(number: int) -> None:
        writer.begin(number)
        snapshot = take_snapshot(number, model, optimizer, {}, world)
        writer.submit(write_checkpoint, folder, snapshot)

    def steps_with_ours() -> None:
        save_ours(2)
        steps()
        writer.wait()

    times["ours_copy_seconds"] = timed(lambda: save_ours(1))
    times["ours_write_seconds"] = timed(writer.wait)
    times["stall_seconds"] = timed(steps_with_ours) - undisturbed
    times["stall_steps"] = times["stall_seconds"] / times["step_seconds"]
    times["gigabytes"] = sum(file.stat().st_size for file in folder.glob("step-00000002/*")) / 1e9
    path = folder / "step-00000002"
    times["ours_load_seconds"] = timed(lambda: load_checkpoint(path, model, optimizer, world))

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}

    file = folder / "torch.pt"
    times["torch_save_seconds"] = timed(lambda: torch.save(state(), file))  # noqa: TID251 - compared with
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    times["dcp_save_seconds"] = timed(lambda: dcp.save(state(), checkpoint_id=str(folder / "dcp")))
    times["dcp_load_seconds"] = timed(lambda: dcp.load(state(), checkpoint_id=str(folder / "dcp")))

    def steps_with_dcp() -> None:
        start = time.perf_counter()
        saving: Any = dcp.async_save(state(), checkpoint_id=str(folder / "async"))
        times["dcp_async_copy_seconds"] = time.perf_counter() - start
        steps()
        saving.result()

    times["dcp_async_stall_steps"] = (timed(steps_with_dcp) - undisturbed) / times["step_seconds"]
    dist.destroy_process_group()
    return {name: round(value, 3) for name, value in times.items()}


def make_step(
    model: BestRQ, optimizer: torch.optim.Optimizer, config: Config, rows: int, frames: int, device: torch.device
) -> Callable[[], None]:
    """Optimizer step of rows of noise, one after another."""
    frames -= frames % config.encoder.row_multiple
    segments = Segments(torch.tensor([[0]]), torch.tensor([[frames]]), frames, torch.tensor([[1]]))
    quantizer = RandomProjectionQuantizer(config.quantizer, config.encoder.stride * config.encoder.num_mels).to(device)
    log_mel = torch.randn(1, frames, config.encoder.num_mels, device=device)
    mask = torch.arange(frames)[None] % 80 < 40

    def step() -> None:
        set_learning_rates(optimizer, 1, 10)
        for _ in range(rows):
            masked = mask_rows(log_mel, mask, segments, quantizer, config.encoder.stride, config.masking.noise_std)
            with torch.autocast(device.type, torch.bfloat16, enabled=hardware_precision() == "bfloat16"):
                loss = model(*masked.inputs)[0]
            (loss / masked.num_targets / rows).backward()
        update_weights(model, optimizer, loss.detach(), 1.0, World(device=device))

    return step


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes, with the work of the device."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
