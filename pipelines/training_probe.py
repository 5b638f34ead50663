"""Light probe of the encoder during pretraining: CTC probes of the middle and the last layer and of a weighted sum.

Rank 0 probes a copy of the encoder while the others wait. Training is the same bit for bit with and without it: the
copy has its own batch norm statistics, and the probes leave the random state unchanged.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.alarms import Alarms
from bestrq.pretraining.layer_features import Frames, encode_layers, stack_log_mel
from bestrq.pretraining.probing import CTCProbeSettings
from bestrq.pretraining.reporting import ProbeSettings
from bestrq.training.checkpoint_saving import gather_model
from bestrq.training.meters import MetricsLog
from bestrq.training.process import World, unwrap
from common.errors import UserError
from data.format.dataset import Dataset
from data.loading.loader import LoaderSettings
from pipelines.probe_data import ProbeDataSettings, read_log_mel, select_labelled
from pipelines.probe_layers import describe_frames, probe_ctc
from pipelines.probing import random_encoder, rate, same_as_last


class TrainingProbe:
    """Probe with its recordings and, from the first call on, the results of log-mel and of the initial encoder.

    Args:
        seed: of the initial weights of the run, which are those of the random encoder.

    Raises:
        UserError: too few recordings have a transcript.
    """

    def __init__(
        self, settings: ProbeSettings, dataset: Dataset, data: LoaderSettings, encoder: EncoderSettings, seed: int,
        world: World,
    ) -> None:  # fmt: skip
        self.settings, self.dataset, self.encoder, self.seed, self.world = settings, dataset, encoder, seed, world
        self.normalisation = data.normalisation
        chosen = ProbeDataSettings(
            split=data.split, language=settings.language, minutes=settings.minutes,
            evaluation_minutes=settings.evaluation_minutes,
        )  # fmt: skip
        try:
            self.recordings = select_labelled(dataset, chosen, encoder.stride)
        except UserError as error:
            raise UserError(f"probe.every_steps is {settings.every_steps}: {error}; 0 disables the probe") from error
        self._log_mel: list[Tensor] = []
        self._baselines: dict[str, float] = {}

    def run(self, step: int, total_steps: int, model: nn.Module, metrics: MetricsLog, alarms: Alarms) -> None:
        """Probe the encoder of a `BestRQ` model after `step`, and log the figures; all ranks must call it."""
        weights = gather_model(model, self.world)
        if self.world.is_main:
            encoder = cast(ConformerEncoder, unwrap(model).get_submodule("encoder"))
            figures = self.measure(weights, encoder.settings)
            metrics.write(step, figures, kind="probe")
            print(console_line(step, total_steps, figures), flush=True)
            alarms.report_probe(step, figures, judge=step >= self.settings.alarm_after)
        self.world.barrier()

    def measure(self, weights: Mapping[str, Tensor], settings: EncoderSettings) -> dict[str, float]:
        """Figures of an encoder with these weights, named `encoder.*`, and of the baselines.

        settings: of the encoder in the current stage of training, which may interpolate its positions.
        """
        if not self._baselines:
            numbers = [*self.recordings.train.recordings, *self.recordings.evaluation.recordings]
            self._log_mel = read_log_mel(self.dataset, numbers, self.normalisation)
            mel = self._probe([stack_log_mel(self._log_mel, self.encoder.stride)])
            random = self._measure_encoder(random_encoder(self.encoder, self.seed))
            self._baselines = {
                "probe_nats_log_mel": rate(mel["nats"]),
                "probe_nats_random": random["probe_nats_per_character"],
                "effective_rank_random": random["effective_rank"],
                "frame_correlation_random": random["frame_correlation"],
            }
        with torch.random.fork_rng(devices=[]):  # the initialisation draws random numbers
            encoder = ConformerEncoder(settings)
        prefix = "encoder."
        encoder.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
        return {**self._measure_encoder(encoder.eval()), **self._baselines}

    def _measure_encoder(self, encoder: ConformerEncoder) -> dict[str, float]:
        layers = encode_layers(encoder.to(self.world.device), self._log_mel)
        last = len(layers) - 1
        figures: dict[str, float] = {}
        results = {"weighted": self._probe(same_as_last(layers))}
        for number in sorted({(last + 1) // 2, last}):
            results[f"layer_{number}"] = self._probe([layers[number]])
            described = describe_frames(layers[number], self.dataset.features.hop_ms)
            figures |= {f"{name}_layer_{number}": value for name, value in described.items()}
        figures |= {f"probe_nats_{name}": rate(result["nats"]) for name, result in results.items()}
        best = min(results.values(), key=lambda result: (math.isnan(rate(result["nats"])), rate(result["nats"])))
        figures |= {"probe_nats_per_character": rate(best["nats"]), "probe_cer": rate(best["cer"])}
        return figures | {name: figures[f"{name}_layer_{last}"] for name in ("effective_rank", "frame_correlation")}

    def _probe(self, layers: list[Frames]) -> dict[str, Any]:
        settings = CTCProbeSettings(steps=self.settings.steps)
        return probe_ctc(layers, self.dataset, self.recordings, settings, self.world.device)


def console_line(step: int, total_steps: int, figures: Mapping[str, float]) -> str:
    """Console line of a probe."""
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}  probe {figures['probe_nats_per_character']:.3f} nats per "
        f"character (log-mel {figures['probe_nats_log_mel']:.3f}, random {figures['probe_nats_random']:.3f})  "
        f"CER {figures['probe_cer']:.1%}  rank {figures['effective_rank']:.1f}  "
        f"correlation {figures['frame_correlation']:.2f}"
    )
