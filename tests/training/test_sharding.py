"""Hybrid sharding on 4 ranks as 2 x 2, and weights that stay gathered: the gradients of one process, checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from bestrq.training.process import DistributedSettings, World, gradient_sync
from bestrq.training.sharding import group_size
from common.errors import UserError
from tests.gloo import run_distributed
from tests.training.test_checkpoint import contents, pass_on, save_as
from tests.training.test_distributed import Curves, chosen, make, train

HYBRID = DistributedSettings(strategy="hsdp", shard_size=2, device="cpu", precision="float32")
FULL = replace(HYBRID, strategy="fsdp", shard_size=0)
CASES = {
    "hsdp": (HYBRID, 1),
    "hsdp, 2 micro-batches": (HYBRID, 2),
    "hsdp, gathered once, 2 micro-batches": (replace(HYBRID, reshard=False), 2),
    "hsdp, groups of 1": (replace(HYBRID, shard_size=1), 1),
    "hsdp, one group": (replace(HYBRID, shard_size=4), 1),
    "fsdp": (FULL, 1),
    "fsdp, gathered once": (replace(FULL, reshard=False), 1),
    "fsdp, gathered once, 2 micro-batches": (replace(FULL, reshard=False), 2),
}


def train_cases(world: World) -> dict[str, Curves]:
    return {name: train(world, settings, accumulation) for name, (settings, accumulation) in CASES.items()}


def test_2_by_2_ranks_give_the_gradients_and_losses_of_one_process_and_of_fsdp() -> None:
    """No group size divides the parameters, one of which has a single element. Float32 tolerance: 1e-5 relative."""
    losses, norms, gradients = train(World(), chosen("ddp"), 1)
    for rank, results in enumerate(run_distributed(train_cases, 4)):
        for name, (other_losses, other_norms, other_gradients) in results.items():
            assert other_losses == pytest.approx(losses, rel=1e-5), (name, rank)
            assert other_norms == pytest.approx(norms, rel=1e-5), (name, rank)
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(other_gradients[parameter], gradient, rtol=1e-5, atol=1e-7, msg=name)


def layouts(world: World) -> list[object]:
    """Placements, shape of the mesh, and elements of this rank of a parameter of 7 x 5."""
    model, _ = make(world, HYBRID)
    weight = model.get_parameter("inputs.weight")
    assert isinstance(weight, DTensor)
    return [weight.placements, tuple(weight.device_mesh.shape), weight.to_local().numel()]


def test_hsdp_shards_within_groups_of_consecutive_ranks_and_replicates_across_them() -> None:
    found = run_distributed(layouts, 4)
    assert found == [[(Replicate(), Shard(0)), (2, 2), rows * 5] for rows in (4, 3, 4, 3)]


def gatherings(world: World) -> dict[str, list[int]]:
    """All-gathers, reduce-scatters and all-reduces in a step of two micro-batches, by strategy."""
    counts = {}
    for name, settings in {"fsdp": FULL, "kept": replace(FULL, reshard=False), "hsdp": HYBRID}.items():
        model, _ = make(world, settings)
        with CommDebugMode() as counter:
            for i in range(2):
                with gradient_sync(model, i == 1):
                    model(torch.ones(2, 5)).sum().backward()
        found = counter.get_comm_counts()
        operators = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
        counts[name] = [sum(n for op, n in found.items() if str(op).endswith(operator)) for operator in operators]
    return counts


def test_weights_are_gathered_once_per_step_if_kept_and_gradients_are_reduced_once_per_step() -> None:
    """Three units, the root among them, whose weights are kept from its forward to its backward pass in any case."""
    for found in run_distributed(gatherings, 4):
        assert found == {"fsdp": [10, 3, 0], "kept": [3, 3, 0], "hsdp": [10, 3, 3]}


def in_two_nodes(function_name: str, world: World, *arguments: str) -> object:
    """Call a function of test_checkpoint with two processes per node."""
    function = {"save": save_as, "pass": pass_on}[function_name]
    return function(replace(world, local_size=2), *arguments)  # type: ignore[operator]


def save_in_two_nodes(world: World, folder: str) -> object:
    return in_two_nodes("save", world, "hsdp", folder)


def pass_in_two_nodes(world: World, strategy: str, source: str, target: str) -> object:
    return in_two_nodes("pass", world, strategy, source, target)


def test_every_bit_of_a_checkpoint_survives_the_way_from_hsdp_over_ddp_and_fsdp_back_to_hsdp(tmp_path: Path) -> None:
    run_distributed(save_in_two_nodes, 4, str(tmp_path / "0"))
    first = contents(tmp_path / "0" / "step-00000003")
    continued = []
    for hop, (strategy, size) in enumerate([("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("ddp", 1)], start=1):
        source, target = tmp_path / str(hop - 1), tmp_path / str(hop)
        shutil.rmtree(source / "step-00000005", ignore_errors=True)
        run_distributed(pass_in_two_nodes, size, strategy, str(source), str(target))
        passed = contents(target / "step-00000003")
        assert passed.keys() == first.keys()
        assert [name for name in first if not torch.equal(passed[name], first[name])] == [], (hop, strategy)
        continued.append({k: v for k, v in contents(target / "step-00000005").items() if k.startswith("model")})
    for other in continued[1:]:
        torch.testing.assert_close(other, continued[0], rtol=1e-5, atol=1e-7)


def test_groups_that_do_not_divide_the_processes_and_groups_without_hsdp_are_errors() -> None:
    with pytest.raises(UserError, match="groups of 3 processes .* do not divide the 8 processes"):
        group_size(3, 8)
    with pytest.raises(UserError, match="shard_size is 2 with distributed.strategy 'fsdp'"):
        DistributedSettings(strategy="fsdp", shard_size=2)
