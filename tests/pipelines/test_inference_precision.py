"""Precision of validation and evaluation: bfloat16 on GPUs with hardware for it, float32 on every CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import transcribe
from bestrq.long_form.inference import InferenceSettings
from bestrq.training import inference_precision as module
from bestrq.training import precision
from bestrq.training.inference_precision import inference_precision
from bestrq.training.process import DistributedSettings, World
from bestrq.training.run_folder import RunFolder, RunSettings
from common.errors import UserError
from pipelines import evaluation
from pipelines.finetuning import FREE_FIELDS, FinetuneConfig, heldout_inference
from pipelines.recogniser import resolve_inference
from tools import align, pseudo_label

GPU = World(device=torch.device("cuda", 0))


@pytest.fixture(params=[False, True], ids=["emulated", "hardware"])
def hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for place in (module, precision):
        monkeypatch.setattr(place, "has_bfloat16", lambda device: request.param)
    return request.param


def test_auto_is_bfloat16_on_a_gpu_with_hardware_and_float32_on_any_cpu(hardware: bool) -> None:
    assert inference_precision("auto", GPU) == ("bfloat16" if hardware else "float32")
    assert inference_precision("auto", World()) == "float32"
    for given in ("float32", "bfloat16"):
        assert inference_precision(given, GPU) == inference_precision(given, World()) == given


@pytest.mark.parametrize("hardware", [True], indirect=True)
def test_all_ranks_use_float32_if_one_has_no_hardware(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "any", lambda self, flag: True)
    assert inference_precision("auto", GPU) == "float32"


@pytest.mark.parametrize("hardware", [True], indirect=True)
def test_validation_is_in_bfloat16_only_if_training_is(hardware: bool) -> None:
    def validated(training: Any, world: World = GPU, **inference: Any) -> str:
        distributed = DistributedSettings(precision=training)
        config = FinetuneConfig(distributed=distributed, inference=InferenceSettings(**inference))
        return heldout_inference(config, world).precision

    assert (validated("bfloat16"), validated("float32"), validated("bfloat16", World())) == (
        "bfloat16", "float32", "float32",
    )  # fmt: skip
    assert (validated("float32", precision="bfloat16"), validated("bfloat16", precision="float32")) == (
        "bfloat16", "float32",
    )  # fmt: skip


def test_sharded_weights_in_bfloat16_need_validation_in_bfloat16() -> None:
    sharded = DistributedSettings(strategy="fsdp", precision="bfloat16")
    for given in ("auto", "float32"):
        config = FinetuneConfig(distributed=sharded, inference=InferenceSettings(precision=given))  # type: ignore[arg-type]
        assert heldout_inference(config, World(size=2)).precision == "bfloat16"


def test_keys_on_a_cpu_are_those_of_float32() -> None:
    """So that recordings decoded by earlier versions, whose default was float32, are reused."""
    config = transcribe.Config(export="export", audio="a.wav", out="out")
    resolved = replace(config, inference=resolve_inference(config.inference, World()))
    explicit = replace(config, inference=InferenceSettings(precision="float32"))
    assert transcribe.key_of(resolved, "hash") == transcribe.key_of(explicit, "hash")
    assert json.loads(transcribe.key_of(resolved, "hash"))[2]["inference"]["precision"] == "float32"


@pytest.mark.parametrize(
    ("script", "function"),
    [(transcribe, "transcribe"), (align, "align"), (pseudo_label, "pseudo_label"), (evaluation, "check_evaluations")],
)
def test_every_script_that_decodes_resolves_the_precision_first(
    script: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Given:
        inference = InferenceSettings()

    def resolve(inference: InferenceSettings, world: World) -> InferenceSettings:
        assert (inference.precision, world) == ("auto", GPU)
        raise UserError("resolved")

    monkeypatch.setattr(script, "resolve_inference", resolve)
    arguments = [[Given()], None, None, None, None, GPU] if script is evaluation else [Given(), GPU]
    with pytest.raises(UserError, match="resolved"):
        getattr(script, function)(*arguments)


def test_a_run_that_recorded_float32_continues_with_auto(tmp_path: Path) -> None:
    """float32 was the default of earlier versions; no weight depends on it."""
    run = RunFolder(tmp_path)
    first = FinetuneConfig(run=RunSettings(str(tmp_path)), inference=InferenceSettings(precision="float32"))
    run.start(first, World(), FREE_FIELDS)
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    run.start(replace(first, inference=InferenceSettings()), World(), FREE_FIELDS)
    with pytest.raises(UserError, match="inference.overlap"):
        run.start(replace(first, inference=InferenceSettings(overlap=0.5)), World(), FREE_FIELDS)
