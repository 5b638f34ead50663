"""Initialisation from a pretrained encoder: re-initialised top blocks."""

import pytest
import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from common.errors import UserError
from pipelines.pretrained import reinitialise_top_blocks


def make_encoder() -> ConformerEncoder:
    torch.manual_seed(0)
    settings = EncoderSettings(
        num_mels=8, dim=16, num_layers=3, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4
    )
    return ConformerEncoder(settings)


def test_top_blocks_are_reinitialised_and_the_others_and_the_random_state_are_kept() -> None:
    encoder, again = make_encoder(), make_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    reinitialise_top_blocks(encoder, 2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    reinitialise_top_blocks(again, 2, seed=5)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if not name.startswith(("blocks.1.", "blocks.2.")):
            assert torch.equal(value, before[name])
    for name in ("blocks.1.feedforward_in.hidden.weight", "blocks.2.feedforward_out.out.weight"):
        fresh = encoder.state_dict()[name]
        assert not torch.equal(fresh, before[name])
        assert 0.8 < fresh.std() / before[name].std() < 1.25  # of the same initialisation
    with pytest.raises(UserError, match="reinitialise_top_blocks is 4, but the encoder has 3 blocks: give 0 to 3"):
        reinitialise_top_blocks(encoder, 4, seed=0)
