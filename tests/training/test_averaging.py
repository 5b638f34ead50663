"""Averages of the weights: values by definition, exchange with the model, files, checkpoints, FSDP."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bestrq.training.averaging import Averages, AveragingSettings
from bestrq.training.checkpoint import load_checkpoint
from bestrq.training.process import DistributedSettings, World, parallelise
from common.errors import UserError
from tests.gloo import run_distributed
from tests.saved_checkpoints import save_checkpoint


class Net(nn.Module):
    """Parameters, a floating-point buffer and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 5)])
        self.head = nn.Linear(5, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x))


def change(model: nn.Module, step: int) -> None:
    """Stand-in for an optimizer step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def make(tmp_path: Path, validations: list[int], **settings: float) -> tuple[Net, Averages]:
    torch.manual_seed(0)
    model = Net()
    return model, Averages(AveragingSettings(**settings), model, tmp_path / "averaging", validations, World())


def test_the_moving_average_has_the_decay_with_warm_up(tmp_path: Path) -> None:
    """Against the recurrence in float64: decay min(0.6, (1 + n) / (10 + n)), which reaches 0.6 in step 13."""
    model, averages = make(tmp_path, [20], ema_decay=0.6)
    expected = {name: tensor.double() for name, tensor in values(model).items()}
    for step in range(1, 21):
        change(model, step)
        averages.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in values(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in averages.average.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-5) or name == "count"
    assert averages.average["count"] == 20


def test_validation_has_the_average_and_training_its_own_weights(tmp_path: Path) -> None:
    model, averages = make(tmp_path, [2], ema_decay=0.9)
    change(model, 1)
    averages.update(model)
    own, average = values(model), {name: tensor.clone() for name, tensor in averages.average.items()}
    held = [(name, values(model)) for name in averages.validated(model, 1)]
    assert [name for name, _ in held] == ["dev"]
    assert_equal(held[0][1], average)
    assert_equal(values(model), own)
    assert_equal(averages.average, average)


def test_the_weights_come_back_after_an_error_in_validation(tmp_path: Path) -> None:
    model, averages = make(tmp_path, [2], ema_decay=0.9)
    change(model, 1)
    own, validated = values(model), averages.validated(model, 1)
    next(validated)
    validated.close()
    assert_equal(values(model), own)


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_the_last_validation_has_the_mean_of_the_last_validated_weights_too(ema_decay: float, tmp_path: Path) -> None:
    model, averages = make(tmp_path, [1, 2, 3, 5], ema_decay=ema_decay, last=3)
    validated, names = [], []
    for step in (1, 2, 3, 5):
        change(model, step)
        averages.update(model)
        own = values(model)
        for name in averages.validated(model, step):
            names.append((step, name))
            validated.append(values(model))
        assert_equal(values(model), own)
    assert names == [(1, "dev"), (2, "dev"), (3, "dev"), (5, "dev"), (5, "dev_average")]
    for name, mean in validated[4].items():
        parts = torch.stack([weights[name] for weights in validated[1:4]])
        expected = parts.double().mean(dim=0).float() if parts.is_floating_point() else parts[-1]
        assert torch.equal(mean, expected)
    assert sorted(path.name for path in (tmp_path / "averaging").iterdir()) == [
        f"step-{step:08d}.safetensors" for step in (2, 3, 5)
    ]


def test_a_checkpoint_continues_the_moving_average_bit_for_bit(tmp_path: Path) -> None:
    model, averages = make(tmp_path, [9], ema_decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        change(model, step)
        averages.update(model)
    state = {"averaged_updates": averages.updates}
    path = save_checkpoint(tmp_path, 3, model, optimizer, state, World(), averages.tensors())
    resumed_model, resumed = make(tmp_path, [9], ema_decay=0.9)
    change(resumed_model, 99)
    resumed.load(load_checkpoint(path, resumed_model, None, World()))
    for step in range(4, 7):
        for m, a in ((model, averages), (resumed_model, resumed)):
            change(m, step)
            a.update(m)
    assert_equal(resumed.average, averages.average)


def run_averages(world: World, folder: str, strategy: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net()
    settings = DistributedSettings(strategy=strategy, device="cpu", precision="float32")  # type: ignore[arg-type]
    parallel = parallelise(model, model.blocks, world, settings)
    averages = Averages(AveragingSettings(0.5, 2), parallel, Path(folder), [1, 2], world)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
    found = {}
    for step in (1, 2):
        x = torch.arange(6.0).reshape(2, 3) * step
        parallel(x).square().sum().div(100 * world.size).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update(parallel)
        for name in averages.validated(parallel, step):
            with torch.no_grad():
                found[f"{step} {name}"] = parallel(x)
    return found


def test_averages_do_not_depend_on_processes_and_sharding(tmp_path: Path) -> None:
    expected = run_averages(World(), str(tmp_path / "one"), "ddp")
    assert expected.keys() == {"1 dev", "2 dev", "2 dev_average"}
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        for found in run_distributed(run_averages, 2, str(folder), strategy):
            for name, y in expected.items():
                torch.testing.assert_close(found[name], y, rtol=1e-5, atol=1e-6)
        assert load_file(folder / "step-00000002.safetensors").keys() == Net().state_dict().keys()


def test_a_lost_file_and_a_decay_of_1_are_errors_with_a_fix(tmp_path: Path) -> None:
    model, averages = make(tmp_path, [1, 2], last=2)
    list(averages.validated(model, 1))
    (tmp_path / "averaging/step-00000001.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"averaging.last is 2, but the weights .* cannot be read: .*; restore the files"
    ):
        list(averages.validated(model, 2))
    with pytest.raises(UserError, match="averaging.ema_decay is 1, which keeps the initial weights"):
        AveragingSettings(ema_decay=1)
