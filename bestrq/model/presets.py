"""Named encoders. Their parameter counts stand in tests/test_presets.py."""

from bestrq.model.settings import EncoderSettings

PRESETS: dict[str, EncoderSettings] = {
    "quickstart": EncoderSettings(
        dim=144, num_layers=6, num_heads=4, feedforward_dim=576, kernel_size=15, subsampling_channels=32
    ),
    "base-120m": EncoderSettings(
        dim=768, num_layers=12, num_heads=12, feedforward_dim=1792, kernel_size=31, subsampling_channels=128
    ),
    # The shape of SpeechBrain's published BEST-RQ recipe.
    "bestrq-94m": EncoderSettings(
        dim=576, num_layers=12, num_heads=8, feedforward_dim=2048, kernel_size=31, subsampling_channels=64
    ),
}
