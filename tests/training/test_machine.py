"""Checks of the machine before any work, on imagined machines: /dev, /proc and /sys are folders of the test."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pretrain
from bestrq.model.settings import EncoderSettings
from bestrq.training import launch, machine
from bestrq.training.machine import bind_cpus, choose_threads, cpus_of_rank, missing_compiler, unusable_gpu
from bestrq.training.process import DistributedSettings, World, start_world
from common.config import parse
from common.errors import UserError
from pipelines import finetuning, kernels, recogniser
from pipelines.kernels import check_kernels
from pipelines.recogniser import start_inference
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs)  Tue Oct 1\nGCC 12.2.0\n"
OLD = {"proc/driver/nvidia/version": DRIVER.format("535.183.01")}
NEW = {"proc/driver/nvidia/version": DRIVER.format("580.65.06")}
LOADED, DEVICE = {"proc/driver/nvidia/gpus/0000:01:00.0/information": ""}, {"dev/nvidia0": "", "dev/nvidiactl": ""}
CUDA = torch.device("cuda")

Machine = Callable[[Mapping[str, str]], None]


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Function that makes a machine of the given files, where torch for CUDA 13.0 finds no GPU."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)

    def make(files: Mapping[str, str]) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")

    return make


# ---- GPU ----


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (OLD | LOADED | DEVICE, r"driver is 535\.183\.01, but .* CUDA 13\.0, .* 580 or later: .* a torch for CUDA 12"),
        (OLD | DEVICE, r"driver is 535\.183\.01"),
        (NEW | LOADED, r"no /dev/nvidia0: .*--gpus all"),
        (NEW | LOADED | DEVICE, r"torch reports: something about cuInit"),
        (DEVICE, r"torch reports: something about cuInit"),
    ],
    ids=["old driver", "old driver in a container", "container without GPUs", "unknown", "no version"],
)
def test_a_gpu_that_torch_cannot_use_ends_the_start_with_the_fix(
    files: Mapping[str, str], reason: str, on_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("something about cuInit\nmore")

    monkeypatch.setattr(torch.cuda, "init", init)
    on_machine(files)
    with pytest.raises(UserError, match=rf"distributed\.device is 'auto', .*{reason}.*--distributed\.device cpu"):
        start_world(DistributedSettings())
    with pytest.raises(UserError, match=rf"distributed\.device is 'cuda', .*{reason}"):
        start_world(DistributedSettings(device="cuda"))
    with pytest.raises(UserError, match=r"^device is 'auto', .*--device cpu"):
        start_inference("auto", 0, finetuning.FinetuneConfig().inference)
    assert start_world(DistributedSettings(device="cpu")).device.type == "cpu"


def test_torch_without_cuda_beside_a_gpu_is_named(on_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    on_machine(NEW | LOADED | DEVICE)
    assert "built without CUDA" in unusable_gpu()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_hidden_gpu_is_no_error(hidden: str, on_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(OLD | LOADED | DEVICE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert start_world(DistributedSettings()).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError):
        start_world(DistributedSettings())


def test_a_machine_without_a_gpu_uses_the_cpu(on_machine: Machine) -> None:
    on_machine({"proc/driver/other": "", "dev/null": ""})
    assert start_world(DistributedSettings()).device.type == "cpu"
    with pytest.raises(UserError, match="distributed.device is 'cuda', but torch finds no CUDA GPU: use 'auto'"):
        start_world(DistributedSettings(device="cuda"))


@pytest.mark.parametrize(("lists", "found"), [("GPU 0: NVIDIA L4 (UUID: x)", True), ("No devices were found", False)])
def test_a_gpu_that_only_nvidia_smi_lists_counts(
    lists: str, found: bool, on_machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine({"nvidia-smi": f"#!/bin/sh\necho '{lists}'\n"})
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tmp_path / name))
    assert bool(unusable_gpu()) == found


# ---- Compiler ----


def test_flex_on_a_gpu_needs_a_compiler_and_the_headers_of_python(
    on_machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex, plain = EncoderSettings(backend="flex", attention_dropout=0.0), EncoderSettings()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    for settings, device in ((plain, "cuda"), (flex, "cpu")):
        check_kernels(settings, device)
    with pytest.raises(UserError, match=r"encoder\.backend is 'flex', .*no C compiler: .*apt install gcc"):
        check_kernels(flex, CUDA)
    monkeypatch.setenv("CC", "nocc -O2")
    with pytest.raises(UserError, match="CC names 'nocc -O2', which is not a program"):
        check_kernels(flex, CUDA)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/gcc" if "gcc" in name else None)
    with pytest.raises(UserError, match=r"Python\.h is missing: .*apt install python3\.\d+-dev"):
        check_kernels(flex, CUDA)
    on_machine({"include/Python.h": ""})
    check_kernels(flex, CUDA)


def test_the_compiler_of_this_machine_is_the_one_that_triton_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.delenv("CC", raising=False)
    try:
        build._find_compiler.__wrapped__("c")
    except RuntimeError:
        assert "no C compiler" in missing_compiler()
    else:
        assert "no C compiler" not in missing_compiler()


def test_every_script_checks_the_compiler_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: EncoderSettings, device: object, training: bool = True) -> None:
        raise UserError(f"checked on {device}")

    run = SimpleNamespace(config=SimpleNamespace(encoder=EncoderSettings()), world=World())
    model = SimpleNamespace(encoder=SimpleNamespace(settings=EncoderSettings()))
    for module in (kernels, finetuning, recogniser):
        monkeypatch.setattr(module, "check_kernels", refuse)
    with pytest.raises(UserError, match="checked on cpu"):
        pretrain.train(parse(pretrain.Config, ["--distributed.device=cpu", "--data.dataset=nowhere"]))
    with pytest.raises(UserError, match="checked on cpu"):
        finetuning.start_run(run, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="checked on cpu"):
        recogniser.try_decoding(SimpleNamespace(model=model), None, None)  # type: ignore[arg-type]


# ---- Threads ----


@pytest.mark.parametrize(
    ("variables", "parent", "expected"),
    [
        ({}, b"", 4),
        ({"OMP_NUM_THREADS": "1"}, b"OMP_NUM_THREADS=1\0A=b\0", 0),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"A=b\0OMP_NUM_THREADS=1\0", 0),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"A=OMP_NUM_THREADS=1\0B=c\0", 4),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, b"A=b\0", 0),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None, 0),
    ],
    ids=["unset", "set", "set before torchrun", "set by torchrun", "another number", "unknown"],
)
def test_torchruns_default_of_one_thread_is_not_a_choice_of_the_user(
    variables: Mapping[str, str], parent: bytes | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    if parent is not None:
        (tmp_path / f"proc/{os.getppid()}").mkdir(parents=True)
        (tmp_path / f"proc/{os.getppid()}/environ").write_bytes(parent)
    assert choose_threads(0, size=2, sharers=2) == expected
    assert choose_threads(3, size=2, sharers=2) == 3 and choose_threads(0, size=1, sharers=1) == 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc on this system")
def test_torchrun_sets_the_variable_for_its_children_only(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os\nfrom bestrq.training.machine import torchrun_set_threads\n"
        "print(os.environ['OMP_NUM_THREADS'], torchrun_set_threads(), flush=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=True
    )
    assert result.stdout.splitlines() == ["1 True"] * 2


# ---- Cores ----


def topology(nodes: list[str], siblings: Callable[[int], str], cpus: int) -> dict[str, str]:
    """Files of /sys for NUMA nodes and hyperthreads."""
    files = {f"sys/devices/system/node/node{node}/cpulist": f"{text}\n" for node, text in enumerate(nodes)}
    path = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return files | {path.format(cpu): f"{siblings(cpu)}\n" for cpu in range(cpus)}


@pytest.mark.parametrize(
    ("siblings", "first_rank"),
    [
        (lambda cpu: f"{cpu % 8},{cpu % 8 + 8}", [0, 1, 8, 9]),
        (lambda cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}", [0, 1, 2, 3]),
    ],
    ids=["far", "near"],
)  # fmt: skip
def test_ranks_divide_the_cores_of_the_nodes_of_their_gpus(
    siblings: Callable[[int], str], first_rank: list[int], on_machine: Machine
) -> None:
    """Two nodes of 4 cores and 8 hyperthreads, and two GPUs on each."""
    near = siblings(0) == "0-1"
    on_machine(topology(["0-7", "8-15"] if near else ["0-3,8-11", "4-7,12-15"], siblings, 16))
    shares = [cpus_of_rank(rank, [0, 0, 1, 1], range(16), False) for rank in range(4)]
    assert shares[0] == (first_rank, 1)
    assert sorted(cpu for cpus, _ in shares for cpu in cpus) == list(range(16)), "each CPU belongs to one rank"
    for cpus, _ in shares:
        assert {siblings(cpu) for cpu in range(16) if cpu not in cpus}.isdisjoint(siblings(cpu) for cpu in cpus)


def test_cores_are_divided_without_numa_and_only_those_of_the_process(on_machine: Machine) -> None:
    on_machine({})
    assert [cpus_of_rank(rank, [None] * 3, range(8), False)[0] for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert cpus_of_rank(2, [None] * 3, [4, 5], False) == ([4, 5], 3), "fewer cores than processes"
    on_machine(topology(["0-3", "4-7"], str, 8))
    assert cpus_of_rank(1, [1, 1], [3, 4, 5], False) == ([5], 1)
    assert cpus_of_rank(0, [1], [2, 3], False) == ([2, 3], 1), "a node of which the process may use no core"
    assert cpus_of_rank(1, [0, 0, 0], range(8), True) == ([0, 1, 2, 3], 3), "GPUs of the other ranks are hidden"


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_node_of_a_gpu_is_read_from_sys(
    text: str | None, node: int | None, on_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    on_machine({} if text is None else {"sys/bus/pci/devices/0000:3b:00.0/numa_node": text})
    assert machine.gpu_node(0) == node


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_binding_limits_all_threads_and_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    cpu = max(before)
    monkeypatch.setattr(machine, "cpus_of_rank", lambda *arguments: ([cpu], 1))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        assert bind_cpus(0, 2, 0) == 1
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert {tuple(os.sched_getaffinity(task)) for task in tasks} == {(cpu,)}
        assert choose_threads(0, size=2, sharers=1) == 1
        start_world(DistributedSettings(device="cpu", bind_cpus=True))
    finally:
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), before)
        torch.set_num_threads(threads)


def test_tasks_of_srun_are_not_bound_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "read_launch", lambda environment: launch.Launch(size=2, local_size=2))
    monkeypatch.setattr(machine, "bind_cpus", lambda *arguments: pytest.fail("bound"))
    with pytest.raises(UserError, match=r"distributed\.bind_cpus is true, but srun binds its tasks"):
        start_world(DistributedSettings(device="cpu", bind_cpus=True))


def test_the_console_states_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    from bestrq.training.meters import start_line
    from bestrq.training.precision import Precision

    line = start_line(torch.nn.Linear(1, 1), "", Precision("float32", "why"), World(), 0)
    assert f"1 process(es) of {torch.get_num_threads()} thread(s) on cpu in float32" in line
