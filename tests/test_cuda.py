"""What only a GPU can show. `pytest -m cuda` runs these on a machine that has one."""

import json
from pathlib import Path

import pytest
import torch

import finetune_ctc
import pretrain
from bestrq.config import parse
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from tests.tiny import DATA, ENCODER, RUN, make_dataset

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here"),
]


def test_encoder_on_cuda_gives_the_outputs_and_gradients_of_the_cpu():
    settings = EncoderSettings(
        dim=32, num_layers=2, num_heads=2, feedforward_dim=64, dropout=0.0, attention_dropout=0.0
    )
    torch.manual_seed(0)
    encoder = ConformerEncoder(settings).double()
    starts, lengths = torch.tensor([[0, 60], [8, 0]]), torch.tensor([[50, 81], [130, 0]])
    log_mel = torch.randn(2, 160, settings.num_mels, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        encoder.to(device).zero_grad()
        output = encoder(log_mel.to(device), encoder.layout(starts, lengths, 160))
        output.square().sum().backward()
        results.append([output.detach().cpu(), *(p.grad.cpu() for p in encoder.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("script", [pretrain, finetune_ctc], ids=["pretrain", "finetune_ctc"])
def test_scripts_follow_the_cpu_in_float32_and_run_in_bfloat16(script, tmp_path: Path):
    dataset = make_dataset(tmp_path / "data", recordings=30)
    losses = {}
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        folder = tmp_path / f"{device}-{precision}"
        choices = [f"--distributed.device={device}", f"--distributed.precision={precision}", "--masking.noise_std=0"]
        options = [*ENCODER, *DATA, *RUN, "--run.steps=4", f"--data.dataset={dataset}", f"--run.folder={folder}"]
        options += ["--encoder.dropout=0", "--encoder.attention_dropout=0", *choices]
        if script is finetune_ctc:
            options.remove("--masking.noise_std=0")  # noise is drawn on the device: another generator there
        script.train(parse(script.Config, options))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[device, precision] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses["cuda", "float32"] == pytest.approx(losses["cpu", "float32"], rel=1e-3)
    assert losses["cuda", "bfloat16"] == pytest.approx(losses["cpu", "float32"], rel=3e-2)
