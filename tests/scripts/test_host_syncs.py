"""A training step reads tensors of the device on the host once, in the guard: everything else would stall a GPU.

The device is simulated on the CPU: features and weights count as device tensors, and so does everything computed from
them. Reads on the host are recorded.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.pretraining import multi_target
from common.config import parse
from pipelines import pretraining
from tests.tiny import DATA, ENCODER, RUN, make_dataset

SYNCS = {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "_unique2", "unique_dim"}
"""operators that wait for a GPU; indexing with a bool mask does too"""
STEPS = 3


class DeviceTensors(TorchDispatchMode):
    """Records the reads of device tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # by storage; kept alive, so that no storage is reused
        self.reads: list[str] = []

    def mark(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.kept[tensor.untyped_storage()._cdata] = tensor

    def holds(self, values: Any) -> bool:
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return any(leaf.untyped_storage()._cdata in self.kept for leaf in leaves)

    def record(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        own = [frame for frame in frames if "tests" not in Path(frame.filename).parts]
        self.reads.append(f"{name} in {Path(own[-1].filename).name}:{own[-1].lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = self.holds((args, kwargs))
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool and self.holds(index) for index in args[1]
        )
        if on_device and (name in SYNCS or masks):
            self.record(name)
        result = func(*args, **(kwargs or {}))
        if on_device:
            self.mark(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result


class HostReads(TorchFunctionMode):
    """Records methods that read a whole tensor, which do not reach the dispatcher on a CPU."""

    def __init__(self, device: DeviceTensors) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu) and self.device.holds(args[0]):
            self.device.record(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


@pytest.fixture
def device() -> Iterator[DeviceTensors]:
    yield DeviceTensors()


def marked(function: Callable[..., Any], device: DeviceTensors) -> Callable[..., Any]:
    """The function that puts a batch on the device: its first argument, the features, counts as being there."""

    def wrapped(log_mel: Tensor, *more: Any) -> Any:
        device.mark(log_mel)
        return function(log_mel, *more)

    return wrapped


def watch_steps(script: Any, device: DeviceTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch from the seed of a step to the end of its guard."""
    active: list[ExitStack] = []
    seed_step, apply = script.seed_step, script.StepGuard.apply

    def start(*arguments: Any) -> None:
        stack = ExitStack()
        stack.enter_context(HostReads(device))
        stack.enter_context(device)
        active.append(stack)
        seed_step(*arguments)

    def end(*arguments: Any) -> Any:
        try:
            return apply(*arguments)
        finally:
            active.pop().close()

    monkeypatch.setattr(script, "seed_step", start)
    monkeypatch.setattr(script.StepGuard, "apply", end)


@pytest.mark.parametrize(
    ("script", "entry", "more"),
    [
        (pretrain, "mask_rows", ["--quantizer.num_codebooks=2", "--quantizer.codebook_size=64", "--accumulation=2"]),
        (pretrain, "mask_rows", ["--optimizer.name=muon"]),
        (pretrain, "mask_rows", ["--optimizer.name=madgrad"]),
        (finetune_ctc, "spec_augment", []),
        (finetune_rnnt, "spec_augment", ["--transducer.prediction_dim=8", "--transducer.joint_dim=8"]),
    ],
    ids=["pretrain", "muon", "madgrad", "ctc", "rnnt"],
)
def test_a_step_reads_the_device_once_in_the_guard(
    script: Any, entry: str, more: list[str], dataset: Path, tmp_path: Path, device: DeviceTensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    watch_steps(script, device, monkeypatch)
    owner = pretraining if script is pretrain else script
    monkeypatch.setattr(owner, entry, marked(getattr(owner, entry), device))
    places = [f"--data.dataset={dataset}", f"--run.folder={tmp_path / 'run'}", "--data.num_workers=0"]
    options = [*ENCODER, *DATA, *RUN, f"--run.steps={STEPS}", *places, *more]
    script.train(parse(script.Config, options))
    assert len(device.kept) > 100 * STEPS, "the tensors of a step are followed"
    assert [read.split(":")[0] for read in device.reads] == ["tolist in process.py"] * STEPS, device.reads


def test_a_step_with_all_objectives_reads_the_device_once(
    dataset: Path, tmp_path: Path, device: DeviceTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, inner layers, distillation, and statistics for projection and codes, between two changes of these."""
    places = [f"--data.dataset={dataset}", "--data.num_workers=0"]
    options = [*ENCODER, *DATA, *RUN, *places, "--quantizer.num_codebooks=2", "--quantizer.codebook_size=64"]
    pretrain.train(parse(pretrain.Config, [*options, f"--run.folder={tmp_path / 'first'}", "--run.steps=1"]))
    more = ["--targets.source=both", "--targets.clusters=8", "--targets.cluster_seconds=10",
            "--targets.inner_layers=[1]", "--targets.unmasked_weight=0.1", "--targets.distill_layers=[1]",
            "--targets.distill_steps=[9]", "--quantizer.pca_steps=5", "--quantizer.refine_steps=[9]",
            "--quantizer.refine_window=4", "--masking.bands=1"]  # fmt: skip
    watch_steps(pretrain, device, monkeypatch)
    monkeypatch.setattr(multi_target, "multi_target_rows", marked(multi_target.multi_target_rows, device))
    options += [f"--targets.export={tmp_path / 'first/export'}", *more]
    options += [f"--run.folder={tmp_path / 'run'}", f"--run.steps={STEPS}"]
    pretrain.train(parse(pretrain.Config, options))
    assert len(device.kept) > 100 * STEPS, "the tensors of a step are followed"
    assert [read.split(":")[0] for read in device.reads] == ["tolist in process.py"] * STEPS, device.reads


def test_reads_are_noticed(device: DeviceTensors) -> None:
    tensor = torch.arange(4.0)
    device.mark(tensor)
    reads: list[Callable[[Tensor], Any]] = [
        lambda x: float(x.sum()), lambda x: x.nonzero(), lambda x: x[x > 1], lambda x: (x * 2).tolist(),
        lambda x: bool((x > 1).any()), lambda x: x.long().bincount(minlength=9), lambda x: torch.equal(x, x),
    ]  # fmt: skip
    for read in reads:
        before = len(device.reads)
        with HostReads(device), device:
            read(tensor)
            read(torch.ones(3))  # on the CPU
        assert len(device.reads) == before + 1
