"""Machine of a process: a GPU that torch cannot use, the C compiler of Triton, memory of the CPU, threads, cores.

Checks run before any work, so that a missing part is an error that names it, not a slow or late failure.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bestrq.training.launch import Launch
from common.cores import available_cores
from common.errors import UserError

ROOT = Path("/")
MINIMUM_DRIVERS = {13: 580, 12: 525, 11: 450}
"""first driver of each major version of CUDA, newest first. Source: CUDA Compatibility, table 1,
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
HIDDEN = ("", "-1", "NoDevFiles")
"""values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last one is SLURM's, for a job without a GPU"""


def select_device(device_setting: str, field: str, bind: bool, threads: int, launch: Launch) -> torch.device:
    """Device of this process, with its cores, its threads and torch's settings for the device.

    Args:
        device_setting: 'auto', 'cpu' or 'cuda', value of the setting `field`.
        bind: bind the process to its cores.
        threads: 0 for a choice by the machine.

    Raises UserError as `process.start_world` does.
    """
    cuda = device_setting != "cpu" and torch.cuda.is_available()
    if device_setting != "cpu" and not cuda:
        check_absent_gpu(device_setting, field)
    sharers = launch.local_size
    if bind:
        if launch.size > 1 and "RANK" not in os.environ:
            raise UserError("distributed.bind_cpus is true, but srun binds its tasks: give false, and srun --cpu-bind")
        sharers = bind_cpus(launch.local_rank, launch.local_size, torch.cuda.device_count() if cuda else 0)
    if number := choose_threads(threads, launch.size, sharers):
        torch.set_num_threads(number)
    device = torch.device("cpu")
    if not cuda:
        keep_freed_memory()
    else:
        count = torch.cuda.device_count()  # 1 if the scheduler restricts every task to one GPU
        if count > 1 and launch.local_rank >= count:
            raise UserError(f"{launch.local_size} processes on a machine with {count} GPUs: start {count} processes")
        device = torch.device("cuda", launch.local_rank % count)
        torch.cuda.set_device(device)
        # cuDNN's attention returns NaN gradients with a mask if the number of keys is 64 modulo 128 (pytorch issue
        # 196678), and builds a plan for every new shape. Flash and memory-efficient attention remain.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


# ---- GPU ----


def check_absent_gpu(device: str, field: str) -> None:
    """Check that a process whose torch finds no GPU may run on the CPU.

    Args:
        device: 'auto' or 'cuda', value of the setting `field`.

    Raises:
        UserError: 'cuda' is requested, or the machine has a GPU that torch cannot use.
    """
    problem = unusable_gpu()
    if device == "cuda":
        fix = problem or "use 'auto' or 'cpu'"
        raise UserError(f"{field} is 'cuda', but torch finds no CUDA GPU: {fix}")
    if problem:
        raise UserError(
            f"{field} is {device!r}, and this machine has an NVIDIA GPU that torch cannot use: {problem}. "
            f"To run on the CPU: --{field} cpu"
        )


def unusable_gpu() -> str:
    """Reason and fix if torch finds no GPU but the machine has one; empty if it has none, or if
    CUDA_VISIBLE_DEVICES hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in HIDDEN:
        return ""
    devices = any((ROOT / "dev").glob("nvidia[0-9]*"))
    loaded = any((ROOT / "proc/driver/nvidia").glob("gpus/*"))
    if not (devices or loaded or _smi_lists_gpus()):
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build for CUDA (https://pytorch.org)"
    driver, cuda = driver_version(), int(torch.version.cuda.split(".")[0])
    minimum = MINIMUM_DRIVERS.get(cuda, 0)
    if driver and int(driver.split(".")[0]) < minimum:
        older = [version for version, first in MINIMUM_DRIVERS.items() if first <= int(driver.split(".")[0])]
        torch_for = f", or install a torch for CUDA {older[0]}" if older else ""
        return (
            f"its driver is {driver}, but this torch is for CUDA {torch.version.cuda}, which needs driver {minimum} or "
            f"later: update the driver{torch_for}"
        )
    if loaded and not devices:
        return (
            "its driver is loaded, but there is no /dev/nvidia0: start the container with GPUs (docker run --gpus all)"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch reports: {str(error).splitlines()[0]}"
    return "torch gives no reason: compare `nvidia-smi` with `python -m torch.utils.collect_env`"


def driver_version() -> str | None:
    """Version of the loaded NVIDIA driver, such as `580.65.06`; None if unknown."""
    try:
        text = (ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"\s(\d{3,}\.\d+[\d.]*)\s", text)
    return match[1] if match else None


def _smi_lists_gpus() -> bool:
    """Whether nvidia-smi lists a GPU; under WSL there is no other trace of it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        result = subprocess.run([program, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.stdout.startswith(b"GPU ")


# ---- Compiler ----


def check_compiler(device: torch.device, setting: str) -> None:
    """Raise UserError if kernels are to be compiled on a GPU and Triton's launcher cannot be built.

    Args:
        setting: the setting that requests them, such as "encoder.backend is 'flex'".
    """
    if device.type == "cuda" and (problem := missing_compiler()):
        raise UserError(f"{setting}, whose kernels Triton compiles, but {problem}")


def missing_compiler() -> str:
    """Reason and fix if Triton cannot build its launcher, a C extension of Python; empty if it can.

    The search is that of Triton: `triton/runtime/build.py`.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        named = f"CC names {compiler!r}, which is not a program" if compiler else "there is no C compiler"
        return f"{named}: install one (apt install gcc), or let CC name one"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's scheme, as in Triton
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.is_file():
        return (
            f"{header} is missing: install the headers of this Python (apt install "
            f"python{sysconfig.get_python_version()}-dev), or use a Python that includes them (uv, conda)"
        )
    return ""


# ---- Memory ----


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for later tensors; no effect with other C libraries.

    By default glibc maps new pages for every tensor above 32 MB, and the kernel zeroes them: a quarter of the time of
    an encoder on an hour of audio. The price is a higher resident size (`python -m benchmarks.context_cost`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # option numbers of malloc.h
        mallopt(trim_threshold, -1)  # disabled
        mallopt(mmap_max, 0)


# ---- Threads and cores ----


def choose_threads(threads: int, size: int, sharers: int) -> int:
    """Number of threads to set, or 0 for torch's default.

    Args:
        threads: `DistributedSettings.threads`.
        size: number of processes.
        sharers: processes that share the cores of this one.
    """
    if threads or size == 1 or ("OMP_NUM_THREADS" in os.environ and not torchrun_set_threads()):
        return threads
    return max(1, available_cores() // sharers)


def torchrun_set_threads() -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's default for several processes, not a choice of the user.

    torchrun sets the variable for its children only, so its own environment lacks it, as Linux shows.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        parent = (ROOT / f"proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return bool(parent) and not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in parent.split(b"\0"))


def bind_cpus(local_rank: int, local_size: int, num_gpus: int) -> int:
    """Bind all threads of this process, and its later children, to its share of the cores.

    The share is taken from the NUMA node of the GPU that the process uses (local rank modulo `num_gpus`), if /sys shows
    it, else from all cores of the process.

    Returns:
        number of processes that share the cores.

    Raises:
        UserError: the system has no CPU affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("distributed.bind_cpus is true, but this system has no CPU affinity: give false")
    nodes = [gpu_node(rank % num_gpus) if num_gpus else None for rank in range(local_size)]
    cpus, sharers = cpus_of_rank(local_rank, nodes, sorted(os.sched_getaffinity(0)), num_gpus == 1)
    for task in Path("/proc/self/task").iterdir():  # libraries may have started threads
        os.sched_setaffinity(int(task.name), cpus)
    return sharers


def cpus_of_rank(
    local_rank: int, nodes: Sequence[int | None], allowed: Sequence[int], one_gpu: bool
) -> tuple[list[int], int]:
    """Return the CPUs of a process, and the number of processes that share them.

    Args:
        nodes: NUMA node of the GPU of every local rank; None if unknown.
        allowed: CPUs that the process may use.
        one_gpu: a single GPU is visible. With several processes, the scheduler hides the others' GPUs, and with them
            the number of processes on the node, so the node is not divided.
    """
    node = nodes[local_rank]
    if node is not None:
        allowed = [
            cpu for cpu in _read_cpus(f"sys/devices/system/node/node{node}/cpulist") if cpu in allowed
        ] or allowed
        if one_gpu:
            return list(allowed), len(nodes)
    neighbours = [rank for rank, other in enumerate(nodes) if other == node]
    # Whole cores: the hyperthreads of a core are not divided between processes.
    core = {cpu: min(_read_cpus(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), default=cpu)
            for cpu in allowed}  # fmt: skip
    cores, index = sorted(set(core.values())), neighbours.index(local_rank)
    if len(cores) < len(neighbours):
        return list(allowed), len(neighbours)
    first, stop = (len(cores) * number // len(neighbours) for number in (index, index + 1))
    share = set(cores[first:stop])
    return [cpu for cpu in allowed if core[cpu] in share], 1


def gpu_node(index: int) -> int | None:
    """NUMA node of a visible GPU; None if /sys does not show it."""
    gpu: Any = torch.cuda.get_device_properties(index)  # torch's stub lacks the address
    name = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((ROOT / f"sys/bus/pci/devices/{name}/numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _read_cpus(path: str) -> list[int]:
    """CPUs of a list such as `0-3,8` in a file of the system; empty if it cannot be read."""
    try:
        ranges = [part.partition("-") for part in (ROOT / path).read_text(encoding="ascii").strip().split(",") if part]
    except OSError:
        return []
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]
