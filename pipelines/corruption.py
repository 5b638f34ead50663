"""Input of a pretraining model whose targets stay clean: other sounds from the loader, and masks over mel bins."""

from torch import Tensor

from bestrq.pretraining.masking import MaskingSettings
from bestrq.recognition.spec_augment import SpecAugmentSettings, spec_augment
from data.loading.batch import Batch


def corrupted(log_mel: Tensor, batch: Batch, masking: MaskingSettings) -> Tensor:
    """Features `[R, F, M]` that the model receives outside of time masks, in place of the clean `log_mel`.

    The masks over mel bins are a pure function of the seeds of the segments, as the other sounds are.
    """
    received = log_mel
    if batch.received is not None:
        received = batch.received.to(log_mel.device, non_blocking=True)
    if masking.bands:
        bands = SpecAugmentSettings(masking.bands, masking.band_mels, num_time_masks=0)
        received = spec_augment(received, batch.segments, bands)
    return received
