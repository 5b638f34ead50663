"""Several processes: the gradients of a single process, joint decisions, and the rendezvous."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bestrq.training.launch import Launch, read_launch
from bestrq.training.optimizer import (
    GuardSettings,
    OptimizerSettings,
    StepGuard,
    build_optimizer,
    set_learning_rates,
)
from bestrq.training.process import (
    DistributedSettings,
    World,
    autocast,
    gradient_sync,
    parallelise,
    start_world,
)
from bestrq.training.slurm import first_host
from bestrq.training.stop import STOP, StopRequest
from common.errors import UserError
from tests.gloo import run_distributed
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

ROWS, STEPS = 8, 10


class Blocks(nn.Module):
    """A small network with the encoder's outline, of sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.LayerNorm(7)) for _ in range(2))
        self.head = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.scale


def chosen(strategy: str, precision: str = "float32") -> DistributedSettings:
    return DistributedSettings(strategy=strategy, device="cpu", precision=precision)


def make(world: World, settings: DistributedSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(world.rank)  # rank 0's initial weights must be used
    model = Blocks()
    model = parallelise(model, model.blocks, world, settings)
    options = OptimizerSettings(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    return model, build_optimizer([(model.named_parameters(), options)])


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and the frames that count: from none to all, so that ranks differ strongly."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, 5, generator=generator)
    targets = torch.randint(0, 3, (ROWS, 6), generator=generator)
    counted = torch.arange(6).expand(ROWS, 6) < (torch.arange(ROWS)[:, None] * 6 // (ROWS - 1))
    return x, targets, counted


Curves = tuple[list[float], list[float], dict[str, Tensor]]


def train(world: World, settings: DistributedSettings, accumulation: int) -> Curves:
    """Losses and gradient norms of some steps, and the whole gradients of the first."""
    model, optimizer = make(world, settings)
    guard = StepGuard(GuardSettings())
    losses, norms, first = [], [], {}
    for step in range(1, STEPS + 1):
        x, targets, counted = (part.chunk(world.size)[world.rank] for part in global_batch(step))
        total = world.sum(counted.sum())
        loss = torch.zeros(())
        parts = list(zip(*(part.chunk(accumulation) for part in (x, targets, counted)), strict=True))
        for i, (inputs, labels, counts) in enumerate(parts):
            with gradient_sync(model, i == accumulation - 1):
                with autocast(world, settings):
                    logits = model(inputs).float()
                frames = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                part_loss = (frames * counts).sum() / total
                part_loss.backward()
            loss += part_loss.detach()
        if step == 1:
            first = {name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()}
        set_learning_rates(optimizer, step, STEPS)
        norms.append(guard.apply(step, model, optimizer, loss, 0.1, world).grad_norm)
        losses.append(float(world.sum(loss)))
    return losses, norms, first


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_all(world: World, precision: str) -> dict[str, Curves]:
    return {f"{strategy}/{accumulation}": train(world, chosen(strategy, precision), accumulation)
            for strategy in ("ddp", "fsdp") for accumulation in (1, 2)}  # fmt: skip


def test_one_process_ddp_fsdp_and_accumulation_give_equal_gradients_and_loss_curves() -> None:
    """Float32 tolerance: 1e-5 relative, for a different summation order of a few dozen terms."""
    losses, norms, gradients = train(World(), chosen("ddp"), 1)
    assert losses[-1] < losses[0] and all(norm > 0.1 for norm in norms)  # it learns, and clipping is at work
    others = {"one process, 4 micro-batches": train(World(), chosen("ddp"), 4)}
    for rank, results in enumerate(run_distributed(train_all, 2, "float32")):
        others |= {f"{name} on rank {rank}": result for name, result in results.items()}
    for name, (other_losses, other_norms, other_gradients) in others.items():
        assert other_losses == pytest.approx(losses, rel=1e-5), name
        assert other_norms == pytest.approx(norms, rel=1e-5), name
        assert other_gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[parameter], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_bfloat16_under_ddp_and_fsdp_follows_float32_and_leaves_float32_gradients() -> None:
    """Tolerance 3e-2 relative: bfloat16 has 8 bits, and errors of a few layers and ten steps add up."""
    losses, norms, gradients = train(World(), chosen("ddp"), 1)
    results = run_distributed(train_all, 2, "bfloat16")[0]
    for name, (other_losses, other_norms, other_gradients) in results.items():
        assert other_losses == pytest.approx(losses, rel=3e-2) and other_losses != losses, name
        assert other_norms == pytest.approx(norms, rel=3e-2), name
        assert all(gradient.dtype == torch.float32 for gradient in other_gradients.values())
        for parameter, gradient in gradients.items():
            error = (other_gradients[parameter] - gradient).norm() / gradient.norm()
            assert error < 3e-2, (name, parameter)


def bad_number_on_rank_1(world: World, strategy: str, where: str) -> tuple[list[bool], bool, bool]:
    model, optimizer = make(world, chosen(strategy))
    set_learning_rates(optimizer, 5, 10)
    guard = StepGuard(GuardSettings())
    applied, changed = [], []
    for step in range(3):
        before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
        loss = model(torch.ones(2, 5)).square().sum()
        bad_here = step == 1 and world.rank == 1
        (loss * math.nan if bad_here and where == "gradient" else loss).backward()
        reported = loss.detach() * math.nan if bad_here else loss.detach()
        applied.append(guard.apply(step, model, optimizer, reported, 1.0, world).applied)
        now = [whole(parameter.detach()) for parameter in model.parameters()]
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, now, strict=True)))
    return applied, changed == applied, all(bool(p.detach().isfinite().all()) for p in now)


def bad_numbers(world: World) -> list[tuple[list[bool], bool, bool]]:
    return [bad_number_on_rank_1(world, *case) for case in BAD_CASES]


BAD_CASES = [("ddp", "gradient"), ("fsdp", "gradient"), ("ddp", "loss"), ("fsdp", "loss")]


def test_a_bad_number_on_rank_1_stops_the_update_of_every_rank_and_the_next_one_goes_on() -> None:
    for results in run_distributed(bad_numbers, 2):
        assert results == [([True, False, True], True, True)] * len(BAD_CASES)


def agreements(world: World, folder: str) -> dict[str, object]:
    tensor = torch.tensor([world.rank + 1.0])
    answers: dict[str, object] = {
        "sum": (float(world.sum(tensor)), float(tensor) == world.rank + 1.0),  # the argument is unchanged
        "max": world.max(-3.0 + world.rank),
        "any": (world.any(world.rank == 1), world.any(False)),
        "broadcast": world.broadcast({"n\u00e4me": [1, 2.5, None], "rank": world.rank}),
        "nothing": world.broadcast(None),
    }
    stop = StopRequest(Path(folder), world)
    answers["before"] = world.sum_on_host(world.rank + 0.5, stop.noticed())
    if world.rank == 1:
        stop.requested = True  # what the signal handler does
    answers["after"] = world.sum_on_host(2**40 + 1, stop.noticed())
    fresh = StopRequest(Path(folder), world)
    if world.is_main:
        (Path(folder) / STOP).touch()
    world.barrier()
    answers["file"] = world.sum_on_host(fresh.noticed())
    fresh.leave_requeue_marker()
    answers["left"] = sorted(os.listdir(folder))
    return answers


def test_all_ranks_agree_on_sums_flags_json_and_on_a_stop_that_one_rank_saw(tmp_path: Path) -> None:
    for answers in run_distributed(agreements, 2, str(tmp_path)):
        assert answers == {
            "sum": (3.0, True), "max": -2.0, "any": (True, False),
            "broadcast": {"n\u00e4me": [1, 2.5, None], "rank": 0}, "nothing": None,
            "before": [2.0, 0.0], "after": [2.0**41 + 2, 1.0], "file": [1.0], "left": ["REQUEUE"]}  # fmt: skip


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise UserError("this rank only")
    world.barrier()


def test_the_helper_reports_a_failing_rank_with_its_number() -> None:
    with pytest.raises(AssertionError, match=r"\[rank 1\][\s\S]*this rank only"):
        run_distributed(fail_on_rank_1, 2)


SCRIPT = """
import atexit
import os
import sys
import threading
import torch
from common.errors import UserError
from common.config import run_main
from bestrq.training.process import DistributedSettings, parallelise, start_world

def delay_other_threads():
    me = threading.get_native_id()
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {sorted(os.sched_getaffinity(0))[0]})
        if thread != me:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

def main():
    world = start_world(DistributedSettings(device="cpu", timeout_minutes=5))
    sys.stdout.write(f"world {world.rank} {world.size} {int(world.max(world.rank))}\\n")  # one write: lines stay whole
    sys.stdout.flush()
    if world.size > 1 and sys.argv[1] == "fail":
        if world.rank == 1:
            raise UserError("field x is 3 on this rank")
        world.barrier()
    if sys.argv[1] == "idle threads":
        atexit.register(print, "end", flush=True)
        model = torch.nn.Linear(2, 2)
        model = parallelise(model, [], world, DistributedSettings(device="cpu", precision="float32"))
        delay_other_threads()
        world.sum(torch.ones(10))
    world.close()

if __name__ == "__main__":
    run_main(main)
"""


def start(tmp_path: Path, launcher: list[str], argument: str, **variables: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(REPOSITORY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    environment |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), argument]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, env=environment, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Output and errors; a process that hangs is killed with its children."""
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        raise


def test_a_script_that_fails_on_one_rank_under_torchrun_ends_on_all_with_the_message(tmp_path: Path) -> None:
    process = start(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "fail")
    output, errors = finish(process)  # without waiting for the collective's 5 minutes
    assert sorted(line for line in output.splitlines() if line.startswith("world")) == ["world 0 2 1", "world 1 2 1"]
    assert process.returncode != 0 and "[rank 1] error: field x is 3 on this rank" in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="classes of scheduling are Linux's")
def test_a_thread_of_gloo_that_is_late_does_not_abort_a_script_that_has_ended(tmp_path: Path) -> None:
    process = start(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "idle threads")
    output, errors = finish(process)
    assert process.returncode == 0, errors
    assert output.count("end") == 2  # functions of atexit ran


def test_the_same_script_runs_from_slurms_variables_without_torchrun(tmp_path: Path) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}  # fmt: skip
    processes = [start(tmp_path, [], "run", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step)
                 for rank in range(2)]  # fmt: skip
    outputs = [finish(process) for process in processes]
    assert [output for output, _ in outputs] == ["world 0 2 1\n", "world 1 2 1\n"], outputs


def test_torchruns_variables_win_over_slurms_and_slurms_over_nothing() -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
             "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,1", "SLURM_STEP_NODELIST": "gpu-[03-05,9],x1", "SLURM_JOB_ID": "7",
             "SLURM_STEP_ID": "1"}  # fmt: skip
    assert read_launch(slurm) == Launch(5, 0, 6, 1, "gpu-03", 20680)
    assert read_launch(slurm | {"MASTER_ADDR": "head", "MASTER_PORT": "99"}) == Launch(5, 0, 6, 1, "head", 99)
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
                "MASTER_PORT": "1"}  # fmt: skip
    assert read_launch(slurm | torchrun) == Launch(1, 1, 2, 2, "a", 1)
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == Launch()  # a batch script outside srun
    assert read_launch({}) == Launch() and Launch().size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("gpu-[007-009,12],other", "gpu-007"), ("a[2].site", "a2.site")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_step_without_its_variables_and_a_missing_gpu_are_errors_that_name_them() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID"):
        read_launch({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="distributed.device is 'cuda'"):
            start_world(DistributedSettings(device="cuda"))
