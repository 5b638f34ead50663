"""Named encoder architectures; tests/model/test_presets.py lists their parameter counts."""

from bestrq.model.settings import EncoderSettings, StageSettings

PRESETS: dict[str, EncoderSettings] = {
    "quickstart": EncoderSettings(
        dim=128, num_layers=4, num_heads=4, feedforward_dim=384, kernel_size=15, subsampling_channels=16
    ),
    # Conformer S, M and L: Gulati et al., arXiv 2005.08100, table 1. The paper's kernels are even (32), these are odd;
    # its 10.3, 30.7 and 118.8 M parameters include a recurrent decoder and the weights of relative positions.
    "conformer-s": EncoderSettings(
        dim=144, num_layers=16, num_heads=4, feedforward_dim=576, kernel_size=31, subsampling_channels=144
    ),
    "conformer-m": EncoderSettings(
        dim=256, num_layers=16, num_heads=4, feedforward_dim=1024, kernel_size=31, subsampling_channels=256
    ),
    "conformer-l": EncoderSettings(
        dim=512, num_layers=17, num_heads=8, feedforward_dim=2048, kernel_size=31, subsampling_channels=512
    ),
    "base-120m": EncoderSettings(
        dim=768, num_layers=12, num_heads=12, feedforward_dim=1792, kernel_size=31, subsampling_channels=128
    ),
    # Dimensions of SpeechBrain's published BEST-RQ recipe.
    "bestrq-94m": EncoderSettings(
        dim=576, num_layers=12, num_heads=8, feedforward_dim=2048, kernel_size=31, subsampling_channels=64
    ),
    # Slim and deep, with the parameters of the 55 M Zipformer of STREAM-ASR v1.5: see configs/slim-55m.yaml.
    "slim-55m": EncoderSettings(
        dim=384, num_layers=16, num_heads=6, feedforward_dim=1536, kernel_size=9, subsampling="striding",
        subsampling_factor=8, subsampling_channels=256,
    ),
    # FastConformer Large, XLarge and XXLarge: Rekesh et al., arXiv 2305.05084.
    "fast-115m": EncoderSettings(
        dim=512, num_layers=17, num_heads=8, feedforward_dim=2048, kernel_size=9, subsampling="striding",
        subsampling_factor=8, subsampling_channels=256,
    ),
    "large-600m": EncoderSettings(
        dim=1024, num_layers=24, num_heads=8, feedforward_dim=4096, kernel_size=9, subsampling="striding",
        subsampling_factor=8, subsampling_channels=256,
    ),
    "xl-1.1b": EncoderSettings(
        dim=1024, num_layers=42, num_heads=8, feedforward_dim=4096, kernel_size=9, subsampling="striding",
        subsampling_factor=8, subsampling_channels=256,
    ),
    # Efficient Conformer, CTC: Burchi and Vielzeuf, arXiv 2109.01163, table 2.
    "efficient-13m": EncoderSettings(
        dim=240, num_layers=5, num_heads=4, feedforward_dim=960, kernel_size=15, subsampling="striding",
        position="relative", subsampling_factor=2, subsampling_channels=120,
        earlier_stages=[StageSettings(5, 120, 4, 480, group_size=3), StageSettings(5, 168, 4, 672)],
    ),
    "efficient-31m": EncoderSettings(
        dim=360, num_layers=5, num_heads=4, feedforward_dim=1440, kernel_size=15, subsampling="striding",
        position="relative", subsampling_factor=2, subsampling_channels=180,
        earlier_stages=[StageSettings(5, 180, 4, 720, group_size=3), StageSettings(5, 256, 4, 1024)],
    ),
    "efficient-126m": EncoderSettings(
        dim=720, num_layers=5, num_heads=8, feedforward_dim=2880, kernel_size=15, subsampling="striding",
        position="relative", subsampling_factor=2, subsampling_channels=360,
        earlier_stages=[StageSettings(5, 360, 8, 1440, group_size=3), StageSettings(5, 512, 8, 2048)],
    ),
}  # fmt: skip
