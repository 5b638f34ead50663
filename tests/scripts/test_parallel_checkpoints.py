"""Training scripts with checkpoints of several files, stopped on two processes with FSDP2 and continued on others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestrq.training.checkpoint import COMPLETE, list_checkpoints, verify_checkpoint
from bestrq.training.stop import StopRequest
from bestrq.training.tensor_reading import read_group
from common.files import crc32_of
from tests.gloo import run_distributed
from tests.scripts.test_runs import NO_DROPOUT, STEPS, arguments, assert_identical, losses, run, run_in_world
from tests.tiny import make_dataset

SEVERAL = ["--checkpoint.file_gigabytes=1e-5", "--distributed.strategy=fsdp", "--data.rows=6", *NO_DROPOUT]
OPTIONS = {
    "pretrain": SEVERAL,
    "finetune_ctc": [*SEVERAL, "--averaging.ema_decay=0.5", "--finetune.freeze_encoder_steps=0"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


def run_two_steps(world, script: str, options: list[str]) -> None:
    answers = iter([False] * 2)
    StopRequest.noticed = lambda self: next(answers, True)  # type: ignore[method-assign] # a process of its own
    run_in_world(world, script, options)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    step, path = list_checkpoints(folder / "checkpoints")[-1]
    assert step == STEPS and verify_checkpoint(path) is None
    return {f"{group}/{name}": tensor for group in ("model", "optimizer", "extra")
            for name, tensor in read_group(path, group).items()}  # fmt: skip


def in_one_file_per_group(source: Path, target: Path) -> Path:
    """Copy of a run folder in which the last checkpoint is as earlier versions wrote it."""
    shutil.copytree(source, target)
    _, path = list_checkpoints(target / "checkpoints")[-1]
    marker = json.loads((path / COMPLETE).read_text())
    files = {"state.json": marker["files"]["state.json"]}
    for group in ("model", "optimizer", "extra"):
        tensors = dict(read_group(path, group))
        file = path / f"{group}.safetensors"
        save_file(tensors, target / "merged")
        for part in path.glob(f"{group}-*"):
            part.unlink()
        (target / "merged").rename(file)
        files[file.name] = {"bytes": file.stat().st_size, "crc32": crc32_of(file)}
    (path / COMPLETE).write_text(json.dumps(marker | {"files": files}))
    return target


@pytest.mark.parametrize(("script", "sizes"), [("pretrain", (1, 3)), ("finetune_ctc", (1,))])
def test_a_run_continues_from_several_files_as_from_one_on_any_number_of_processes_bit_for_bit(
    script, sizes, dataset, tmp_path
):
    stopped = tmp_path / "stopped"
    run_distributed(run_two_steps, 2, script, arguments(script, dataset, stopped, *OPTIONS[script]))
    step, path = list_checkpoints(stopped / "checkpoints")[-1]
    assert step == 2 and len(list(path.glob("model-*"))) > 2 and len(list(path.glob("optimizer-*"))) > 4
    assert not list(stopped.rglob(".tmp-*")) and not list(path.glob("rank-*"))
    one_file = in_one_file_per_group(stopped, tmp_path / "one-file")
    for size in sizes:
        several, merged = (shutil.copytree(f, tmp_path / f"{f.name}-{size}") for f in (stopped, one_file))
        for folder, more in ((several, []), (merged, ["--checkpoint.file_gigabytes=2"])):
            options = (script, dataset, folder, *OPTIONS[script], *more)
            if size == 1:
                run(*options)
            else:
                run_distributed(run_in_world, size, script, arguments(*options))
        assert_identical(last_weights(several), last_weights(merged))
        assert losses(several) == losses(merged) and len(losses(several)) == STEPS
        export = load_file(several / "export/model.safetensors")
        assert_identical(export, load_file(merged / "export/model.safetensors"))
        if script == "pretrain":
            assert_identical(export, {name: last_weights(several)[f"model/{name}"] for name in export})
