"""CTC fine-tuning of a Conformer encoder, pretrained or from scratch: the whole loop.

    python finetune_ctc.py --config configs/quickstart-ctc.yaml --finetune.init runs/quickstart/pretrain/export
    torchrun --nproc-per-node 8 finetune_ctc.py --config configs/base-120m-ctc.yaml --run.folder runs/base-120m-ctc
    sbatch -N 2 launch/finetune.sbatch --config configs/base-120m-ctc.yaml --run.folder runs/base-120m-ctc

The same command continues an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C makes it save and leave at the next step. RUN_FOLDER/export holds the model that was best on the dev split.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from bestrq.config import ConfigError, parse, run_main, to_dict
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel, pad_labels, read_pretrained_encoder, reinitialise_top_blocks
from bestrq.recognition.inference import InferenceSettings, Source
from bestrq.recognition.spec_augment import SpecAugmentSettings, spec_augment
from bestrq.recognition.validation import Heldout, ValidationSettings, validate
from bestrq.training.checkpoint import (
    CheckpointSettings,
    gather_model,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from bestrq.training.export import Export, write_export
from bestrq.training.meters import MetricsLog, Throughput, console_line
from bestrq.training.optimizer import OptimizerSettings, build_optimizer, set_learning_rates
from bestrq.training.process import (
    DistributedSettings,
    World,
    autocast,
    gradient_sync,
    parallelise,
    start_world,
    unwrap,
)
from bestrq.training.run_folder import RunFolder, RunSettings
from bestrq.training.stop import StopRequest
from bestrq.training.update import GuardSettings, UpdateGuard, report_skipped_update, seed_step
from data.cutting import CuttingSettings
from data.errors import DataError
from data.features import FeatureSettings, difference
from data.loader import FREE_LOADER_FIELDS, DataState, LoaderSettings, RowLoader
from data.order import CropTable
from data.shards import Dataset, Normalisation
from data.supervised import supervised_crops
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer


@dataclass
class FinetuneSettings:
    """What is trained, and from where."""

    init: str = ""
    """export of a pretrained encoder; empty trains from scratch"""
    reinitialise_top_blocks: int = 0
    """top blocks of the pretrained encoder that get fresh weights: they have specialised on predicting codes"""
    freeze_encoder_steps: int = 0
    """first updates that train the head alone"""
    encoder_learning_rate: float = 0.0
    """learning rate of the encoder; 0 takes optimizer.learning_rate, which is the head's"""
    tokenizer: Literal["char", "bpe"] = "char"
    """characters, or SentencePiece byte pairs"""
    vocab_size: int = 512
    """ids of the bpe tokenizer, the blank included"""
    language: str = ""
    """train and validate on this language only; empty takes all"""
    label_minutes: float = 0.0
    """train on this much audio only, chosen at random by data.seed; 0 takes all"""

    def __post_init__(self) -> None:
        for name in ("reinitialise_top_blocks", "freeze_encoder_steps", "encoder_learning_rate", "label_minutes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}: give 0 or more")
        if self.reinitialise_top_blocks and not self.init:
            raise ConfigError(
                f"finetune.reinitialise_top_blocks is {self.reinitialise_top_blocks}, but finetune.init is empty: "
                "all blocks are fresh already, give 0"
            )


@dataclass
class Config:
    """CTC fine-tuning."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """start, tokenizer and labels"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    cutting: CuttingSettings = field(default_factory=CuttingSettings)
    """words at the cuts of long recordings"""
    accumulation: int = 1
    """micro-batches an update: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer; with finetune.init its shape must be the export's, its dropout may differ"""
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    """masks on the training features"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule"""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """held-out error rates"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """how held-out recordings are cut and batched"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """what to do about bad numbers"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """when to save, and what to keep"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""


# What may change between two starts of one run: nothing here alters which updates are made.
FREE_FIELDS = (
    "accumulation",
    "checkpoint",
    "distributed",
    "encoder.activation_checkpointing",
    "encoder.backend",
    "guard.max_bad_updates",
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "inference.batch_seconds",
    "run.folder",
    "run.log_every",
)


def train(config: Config) -> None:
    world = start_world(config.distributed)
    dataset = config.data.open()
    frames_per_second = dataset.features.frames_per_second
    init = read_init(config, dataset) if config.finetune.init else None
    crops = labelled_crops(dataset, config)
    heldout = heldout_recordings(dataset, config)
    run = RunFolder(config.run.folder)
    run.start(config, world, free=FREE_FIELDS, fingerprints=dataset.identity())
    tokenizer = run_tokenizer(run, crops, config.finetune, world)
    labels_of = {text: tokenizer.encode(text) for text in crops.texts}  # all of them now: an error costs no training
    torch.manual_seed(config.run.seed)  # the same initial weights whatever the world size
    model = CTCModel(config.encoder, tokenizer.vocab_size).to(world.device)
    if init is not None:
        model.load_state_dict(init.tensors, strict=False)  # checked: only the head is missing
        reinitialise_top_blocks(model.encoder, config.finetune.reinitialise_top_blocks, config.run.seed)
    frozen_steps = config.finetune.freeze_encoder_steps
    parallel_model = parallelise(
        model, model.encoder.blocks, world, config.distributed, find_unused_parameters=frozen_steps > 0
    )
    register_fsdp_forward_method(model, "log_probs")  # validation calls it; does nothing but under FSDP2
    learning_rate = config.finetune.encoder_learning_rate or config.optimizer.learning_rate
    encoder_settings = replace(config.optimizer, learning_rate=learning_rate, frozen_steps=frozen_steps)
    optimizer = build_optimizer(
        [(model.encoder.named_parameters(), encoder_settings), (model.head.named_parameters(), config.optimizer)]
    )

    # The state of a run: a step, the data's three integers, the best validation so far, tensors.
    step, data_state, best = 0, None, Best()
    latest = latest_checkpoint(run.checkpoints, world)
    if latest is not None:
        checkpoint = load_checkpoint(latest, parallel_model, optimizer, world)
        step, data_state = checkpoint.step, DataState.from_dict(checkpoint.state["data"])
        best = Best(**checkpoint.state["best"])

    loader = RowLoader(
        dataset,
        crops,
        config.data,
        multiple=config.encoder.row_multiple,
        row_gap=config.encoder.row_gap,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.accumulation,
        state=data_state,
    )
    guard = UpdateGuard(config.guard)
    metrics = MetricsLog(run, step, world)
    throughput = Throughput(world, config.run.steps)
    stop = StopRequest(run.path)
    if world.is_main:
        print(describe(config, model, crops, dataset, world, step), flush=True)

    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)  # over the log interval, this rank's
    batches = iter(loader)
    while step < config.run.steps and not stop.agreed(world):
        with throughput.waiting():
            micro_batches = next(batches)
        step += 1
        seed_step(config.run.seed, step, world.rank)
        micro_labels = [pad_labels([labels_of[t] for texts in batch.text for t in texts]) for batch in micro_batches]
        num_labels = sum(int(lengths.sum()) for _, lengths in micro_labels)
        global_labels = world.sum(torch.tensor(num_labels, device=world.device)).clamp(min=1)

        encoder_rate, head_rate = set_learning_rates(optimizer, step, config.run.steps)
        loss_sum = torch.zeros((), device=world.device)
        for i, (batch, (labels, label_lengths)) in enumerate(zip(micro_batches, micro_labels, strict=True)):
            segments = batch.segment_start, batch.segment_length
            log_mel = batch.log_mel.to(world.device, non_blocking=True)
            log_mel = spec_augment(log_mel, *segments, batch.segment_seed, config.spec_augment)
            with gradient_sync(parallel_model, i == len(micro_batches) - 1):
                with autocast(world, config.distributed):
                    output = parallel_model(
                        log_mel, *segments, labels, label_lengths, train_encoder=step > frozen_steps
                    )
                (output.loss_sum / global_labels).backward()
            loss_sum += output.loss_sum.detach()
            frames = [float(batch.segment_length.sum()), float(batch.log_mel.shape[0] * batch.log_mel.shape[1])]
            counts = [float(output.loss_sum.detach()), float(label_lengths.sum()), float(output.num_impossible)]
            sums += torch.tensor([*counts, *frames], dtype=torch.float64, device=world.device)
        update = guard.apply_update(parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world)
        if not update.applied:
            samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
            report_skipped_update(step, loss_sum, samples, world)
        audio_frames = sum(int(batch.segment_length.sum()) for batch in micro_batches)
        throughput.count(audio_frames / frames_per_second)

        is_last = step == config.run.steps
        if step % config.run.log_every == 0 or is_last or update.spike:
            quarantined = int(world.sum(torch.tensor(len(loader.quarantined), device=world.device)))
            values = {"learning_rate": head_rate, "encoder_learning_rate": encoder_rate, "quarantined": quarantined}
            values |= {"grad_norm": update.grad_norm, "spike": update.spike}
            values |= summarise(world.sum(sums).tolist()) | throughput.interval(step)
            metrics.write(step, values)
            sums.zero_()
            if world.is_main:
                print(console_line(step, config.run.steps, values), flush=True)
        is_validation = step % config.validation.every_steps == 0 or is_last
        if is_validation:
            found = validate(model, heldout, tokenizer.decode, config.inference, frames_per_second, world)
            rates = {"dev_wer": found.wer, "dev_cer": found.cer}
            metrics.write(step, rates, kind="dev")
            if world.is_main:
                print(f"step {step}/{config.run.steps}  dev WER {found.wer:.2%}  CER {found.cer:.2%}")
                print(f"    said:  {found.reference}\n    heard: {found.hypothesis}", flush=True)
            if rates[f"dev_{config.validation.best_by}"] < best.rate:
                best = Best(rates[f"dev_{config.validation.best_by}"], step)
                export(run, step, parallel_model, tokenizer, rates, dataset, config, world)
        if is_validation or step % config.checkpoint.every_steps == 0:
            save(run, step, parallel_model, optimizer, loader.state, best, config, world)

    if step < config.run.steps:
        save(run, step, parallel_model, optimizer, loader.state, best, config, world)
        stop.leave_requeue_marker(world)
        if world.is_main:
            print(f"stopped after step {step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        print(
            f"done: best dev {config.validation.best_by} {best.rate:.2%} at step {best.step}: {run.export}", flush=True
        )
    metrics.close()
    world.close()


@dataclass
class Best:
    """The best validation so far; its step is 0 before the first."""

    rate: float = math.inf
    step: int = 0


SUMS = ("loss", "labels", "impossible", "frames", "row_frames")


def summarise(sums: list[float]) -> dict[str, float]:
    """Means over an interval and all ranks: the loss is in nats a label."""
    total = dict(zip(SUMS, sums, strict=True))
    return {
        "loss": total["loss"] / max(total["labels"], 1),
        "impossible_segments": total["impossible"],
        "row_fill": total["frames"] / max(total["row_frames"], 1),
    }


def read_init(config: Config, dataset: Dataset) -> Export:
    """The pretrained encoder, checked against the settings and the dataset. Raises ConfigError naming what differs."""
    pretrained = read_pretrained_encoder(config.finetune.init, config.encoder)
    theirs, ours = pretrained.config.get("normalisation"), config.data.normalisation
    differing = difference(dataset.features, FeatureSettings.from_dict(pretrained.config.get("features", {})))
    if theirs != ours:
        differing.append(f"data.normalisation: {ours!r} != {theirs!r}")
    if differing:
        raise ConfigError(f"finetune.init {config.finetune.init} does not fit (ours != the export's): {differing}")
    return pretrained


def labelled_crops(dataset: Dataset, config: Config) -> CropTable:
    """Training crops with their label texts; of `label_minutes`, whole recordings chosen by the seed."""
    recordings = dataset.select(split=config.data.split, language=config.finetune.language or None)
    told = np.array([dataset.text(int(i)) is not None for i in recordings])
    if 0 < told.sum() < len(told):
        print(f"left out: {len(told) - told.sum()} of {len(told)} recordings, which have no transcript")
        recordings = recordings[told]
    if config.finetune.label_minutes:
        shuffled = np.random.default_rng(config.data.seed).permutation(recordings)
        minutes = np.cumsum(dataset.frames[shuffled]) / dataset.features.frames_per_second / 60
        recordings = np.sort(shuffled[: max(1, int((minutes <= config.finetune.label_minutes).sum()))])
    cut = partial(supervised_crops, dataset, cutting=config.cutting)
    lengths = config.data.crop_frames(dataset)
    return config.data.mixed_order(dataset, recordings, lambda group, seed: cut(group, *lengths, seed))


def heldout_recordings(dataset: Dataset, config: Config) -> list[Heldout]:
    """The held-out recordings that have a transcript, longest first. Raises DataError if there are none."""
    selected = dataset.select(split=config.validation.split, language=config.finetune.language or None)
    recordings = [int(i) for i in selected if dataset.text(int(i))]
    if not recordings:
        raise DataError(
            f"validation.split {config.validation.split!r} of {dataset.location}: no recording has a transcript"
        )
    recordings = recordings[: config.validation.max_recordings or None]
    read = partial(read_mel, dataset, config.data.normalisation)
    heldout = []
    for i in sorted(recordings, key=lambda i: (-int(dataset.frames[i]), i)):
        source = Source(int(dataset.frames[i]), partial(read, i), dataset.excluded(i) or ())
        heldout.append(Heldout(dataset.id(i), source, dataset.text(i) or "", dataset.language(i)))
    return heldout


def read_mel(dataset: Dataset, normalisation: Normalisation, recording: int, start: int, stop: int) -> torch.Tensor:
    """Normalised frames of a recording, float32 [stop - start, M]."""
    return torch.from_numpy(dataset.read_normalised(recording, start, stop, normalisation=normalisation))


def run_tokenizer(run: RunFolder, crops: CropTable, settings: FinetuneSettings, world: World) -> Tokenizer:
    """The run's tokenizer: trained on the training texts at the first start, read from the run folder after it."""
    folder = run.path / "tokenizer"
    problem = ""
    if world.is_main and not folder.is_dir():
        try:
            if settings.tokenizer == "bpe":
                BPETokenizer.train(crops.texts, settings.vocab_size).save(folder)
            else:
                CharTokenizer.train(crops.texts).save(folder)
        except DataError as error:  # told to all: the others would wait for rank 0 in vain
            problem = str(error)
    if problem := world.broadcast(problem):
        raise DataError(problem)
    return load_tokenizer(folder)


def save(run, step, model, optimizer, data_state, best, config, world) -> None:
    """A checkpoint; all but the last ones and the best are deleted."""
    state = {"data": data_state.to_dict(), "best": {"rate": best.rate, "step": best.step}}
    save_checkpoint(run.checkpoints, step, model, optimizer, state, world)
    prune_checkpoints(run.checkpoints, config.checkpoint.keep_last, best.step, world)


def export(run, step, model, tokenizer, rates, dataset, config, world) -> None:
    """What evaluate.py needs: encoder, head, tokenizer, features."""
    whole = gather_model(model, world)
    if world.is_main:
        description = {
            "kind": "ctc",
            "step": step,
            "encoder": to_dict(config.encoder),
            "vocab_size": tokenizer.vocab_size,
            "features": dataset.features.to_dict(),
            "feature_hash": dataset.features.hash(),
            "normalisation": config.data.normalisation,
            **rates,
        }
        files = {path.name: path.read_bytes() for path in (run.path / "tokenizer").iterdir()}
        card = f"""# CTC recogniser

{config.encoder.num_layers} Conformer layers of width {config.encoder.dim}, {tokenizer.vocab_size} labels, trained on
`{dataset.location}` from {config.finetune.init or "scratch"}. Update {step}: WER {rates["dev_wer"]:.2%},
CER {rates["dev_cer"]:.2%} on the `{config.validation.split}` split. To evaluate it:
`python evaluate.py --export THIS_FOLDER --data.dataset DATASET`.
"""
        write_export(run.export, whole, description, card, files)
    world.barrier()


def describe(config: Config, model: CTCModel, crops: CropTable, dataset: Dataset, world: World, step: int) -> str:
    """The first line of the console."""
    millions = sum(parameter.numel() for parameter in unwrap(model).parameters()) / 1e6
    hours = crops.mean_frames * len(crops) / dataset.features.frames_per_second / 3600
    start = f"continuing after step {step}" if step else "starting"
    return (
        f"{start}: {millions:.1f} M parameters from {config.finetune.init or 'scratch'}, {world.size} process(es) on "
        f"{world.device.type}, {hours:.2f} h of labels in {dataset.location}, run {config.run.folder}"
    )


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    run_main(main, user_errors=(DataError,))
