"""Time that a checkpoint takes from training, and time to save one, beside torch.save and DCP, and to load one.

    python -m benchmarks.checkpoint_stall
    python -m benchmarks.checkpoint_stall --config configs/large-600m.yaml
    python -m benchmarks.checkpoint_stall --processes 2

The model and its optimizer are those of a pretraining configuration, by default base-120m, and a step is as large as on
one of 8 GPUs: 4 rows of a minute. Steps run on this device: without a save, and with one at the beginning, by us in the
background and by `async_save` of torch.distributed.checkpoint (DCP). The stall is the difference in time, in steps. On
a CPU, the writing thread takes its time from the steps, whose computation needs all cores; `stall_seconds` is that
time, and `--rows 1 --seconds 4 --steps 24` compares with steps of half a second. --folder should be on the disk of real
runs. The last line is JSON: `stall_steps`, `gigabytes` (size of a checkpoint) and, in seconds, `step_seconds`,
`ours_copy_seconds` (until training goes on), `ours_write_seconds`, `torch_save_seconds`, `dcp_save_seconds`,
`dcp_async_copy_seconds`, and the loads.

--processes measures instead the save, the verification and the load of a model that so many processes of this machine
share (FSDP2 on CPUs, gloo): rank 0 alone writes one file per group, or all ranks write files of --file-gigabytes.
"""

from __future__ import annotations

import argparse
import os
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
from bestrq.training.checkpoint import latest_checkpoint, load_checkpoint
from bestrq.training.checkpoint_saving import submit_checkpoint, take_snapshot, write_checkpoint
from bestrq.training.optimizer import build_optimizer, set_learning_rates, update_weights
from bestrq.training.process import DistributedSettings, World, parallelise, start_world
from common.config import parse
from common.segments import Segments
from pipelines.pretraining import Config
from tests.ports import free_port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/base-120m.yaml", help="settings of a pretraining")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--seconds", type=int, default=60, help="length of a row")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps after each save; the writing has to end within them"
    )
    parser.add_argument("--folder", help="folder of the checkpoints (default: a temporary one)")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that share a checkpoint")
    parser.add_argument("--file-gigabytes", type=float, default=0.2, help="size of their files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = parse(Config, [f"--config={options.config}"])
        if options.processes > 1:
            figures = measure_ranks(config, options.processes, options.file_gigabytes, Path(folder))
        else:
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


def measure_ranks(config: Config, processes: int, gigabytes: float, folder: Path) -> dict[str, Any]:
    """Seconds of a save, a verification and a load: `alone_...` of files of rank 0, `ranks_...` of those of all."""
    context = torch.multiprocessing.get_context("spawn")
    figures, port = context.SimpleQueue(), free_port()
    arguments = (processes, port, config, gigabytes, folder, figures)
    torch.multiprocessing.spawn(_measure_rank, arguments, processes)
    return {name: round(value, 3) for name, value in figures.get().items()}


def _measure_rank(
    rank: int, processes: int, port: int, config: Config, gigabytes: float, folder: Path, figures: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    distributed = DistributedSettings(strategy="fsdp", device="cpu", precision="float32")
    world = start_world(distributed)
    model = BestRQ(config.encoder, config.quantizer)
    parallel = parallelise(model, model.encoder.blocks, world, distributed)
    optimizer = build_optimizer([(parallel.named_parameters(), config.optimizer)])
    for parameter in parallel.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the optimizer's state
    writer, times = BackgroundWriter(world), {}

    def together(action: Callable[..., object], *arguments: Any) -> float:
        def and_wait() -> None:
            action(*arguments)
            world.barrier()

        world.barrier()
        return timed(and_wait)

    def save(place: Path, limit: float) -> None:
        writer.begin(1)
        submit_checkpoint(writer, place, take_snapshot(1, parallel, optimizer, {}, world, None, limit))
        writer.wait()

    for name, limit in (("alone", 1e6), ("ranks", gigabytes)):
        path = folder / name / "step-00000001"
        times[f"{name}_save_seconds"] = together(save, path.parent, limit)
        times[f"{name}_verify_seconds"] = together(latest_checkpoint, path.parent, world)
        times[f"{name}_load_seconds"] = together(load_checkpoint, path, parallel, optimizer, world)
        times["gigabytes"] = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    if world.is_main:
        figures.put(times)
    writer.close()
    world.close()


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
