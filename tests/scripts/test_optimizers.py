"""Muon and MADGRAD in the real scripts: resuming bit for bit, frozen steps and layer-wise decay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune_ctc
import pretrain
from bestrq.training.stop import StopRequest
from common.config import parse
from tests.tiny import DATA, ENCODER, RUN, make_dataset

SCRIPTS = {
    "pretrain": (pretrain, ["--quantizer.codebook_size=64"]),
    "finetune_ctc": (finetune_ctc, ["--finetune.freeze_encoder_steps=1", "--finetune.layer_decay=0.5"]),
}
STATE = {"muon": ("momentum_buffer", "exp_avg"), "madgrad": ("gradient_sum", "gradient_sum")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


def run(script: str, dataset: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Run the script and return all tensors of its last checkpoint."""
    module: Any = SCRIPTS[script][0]
    options = [*ENCODER, *DATA, *RUN, *SCRIPTS[script][1], "--data.num_workers=0", "--run.steps=4",
               "--optimizer.warmup_steps=1", f"--data.dataset={dataset}", f"--run.folder={folder}", *more]  # fmt: skip
    module.train(parse(module.Config, options))
    last = max((folder / "checkpoints").glob("step-*"))
    return {f"{part} {name}": tensor for part in ("model", "optimizer")
            for name, tensor in load_file(last / f"{part}.safetensors").items()}  # fmt: skip


@pytest.mark.parametrize("name", ["muon", "madgrad"])
def test_interrupted_runs_continue_bit_for_bit_and_frozen_steps_leave_the_encoder_as_it_is(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretraining, and fine-tuning of its export; each stopped after its first step, then after another two."""
    init: list[str] = []
    for script in SCRIPTS:
        options = [f"--optimizer.name={name}", *init]
        whole = run(script, dataset, tmp_path / script, *options)
        parts = []
        for steps in (1, 2):
            with monkeypatch.context() as patch:
                answers = iter([False] * steps)
                patch.setattr(StopRequest, "noticed", lambda self, answers=answers: next(answers, True))
                parts.append(run(script, dataset, tmp_path / f"{script}-parts", *options))
        parts.append(run(script, dataset, tmp_path / f"{script}-parts", *options))
        assert parts[-1].keys() == whole.keys()
        assert [key for key in whole if not torch.equal(whole[key], parts[-1][key])] == []
        weight = "encoder.blocks.0.attention.qkv.weight"
        for kind, parameter in zip(STATE[name], (weight, "encoder.blocks.0.norm.weight"), strict=True):
            assert whole[f"optimizer {kind}/{parameter}"].any()
            assert (f"optimizer {kind}/{parameter}" in parts[0]) == (script == "pretrain")
        if script == "finetune_ctc":
            export = load_file(tmp_path / "pretrain/export/model.safetensors")
            assert torch.equal(parts[0][f"model {weight}"], export[weight])
            assert not torch.equal(whole[f"model {weight}"], export[weight])
        init = [f"--finetune.init={tmp_path / 'pretrain/export'}"]
