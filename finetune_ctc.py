"""CTC fine-tuning of a Conformer encoder, pretrained or from scratch: the whole loop.

    python finetune_ctc.py --config configs/quickstart-ctc.yaml --finetune.init runs/quickstart/pretrain/export
    torchrun --nproc-per-node 8 finetune_ctc.py --config configs/base-120m-ctc.yaml --run.folder runs/base-120m-ctc
    sbatch -N 2 launch/finetune.sbatch finetune_ctc.py --config configs/base-120m-ctc.yaml --run.folder runs/base

The same command continues an interrupted run, bit for bit on a CPU. A file named STOP in the run folder, SIGTERM or
Ctrl-C makes it save and leave at the next step. RUN_FOLDER/export holds the model that was best on the dev split.
"""

from dataclasses import dataclass, replace

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from bestrq.long_form.decoders import GreedyCTC
from bestrq.recognition.ctc import CTCModel, pad_labels, reinitialise_top_blocks
from bestrq.recognition.spec_augment import spec_augment
from bestrq.training.checkpoint import latest_checkpoint, load_checkpoint
from bestrq.training.meters import MetricsLog, Throughput, console_line
from bestrq.training.optimizer import build_optimizer, set_learning_rates
from bestrq.training.precision import resolve_precision, with_precision
from bestrq.training.process import autocast, gradient_sync, parallelise, start_world
from bestrq.training.run_folder import RunFolder
from bestrq.training.stop import StopRequest
from bestrq.training.update import UpdateGuard, report_skipped_update, seed_step
from common.config import parse, run_main
from data.loading.loader import DataState
from pipelines.finetuning import (
    Best,
    FinetuneConfig,
    Updates,
    describe,
    export,
    heldout_inference,
    heldout_recordings,
    labelled_crops,
    read_init,
    run_tokenizer,
    save,
    stages_of,
    start_run,
)
from pipelines.validation import validate


@dataclass
class Config(FinetuneConfig):
    """CTC fine-tuning."""


def train(config: Config) -> None:
    world = start_world(config.distributed)
    dataset = config.data.open()
    frames_per_second = dataset.features.frames_per_second
    run = RunFolder(config.run.folder)
    precision = resolve_precision(config.distributed, run, world)
    config = with_precision(config, precision)
    latest = latest_checkpoint(run.checkpoints, world)
    init = read_init(config, dataset) if config.finetune.init and latest is None else None
    crops = [labelled_crops(dataset, config, rows) for _, rows in stages_of(config)]
    texts = [text for stage in crops for text in stage.texts]
    heldout, inference = heldout_recordings(dataset, config), heldout_inference(config, world)
    start_run(run, config, dataset, world, precision)
    tokenizer = run_tokenizer(run, texts, config.finetune, world)
    labels_of = {text: tokenizer.encode(text) for text in texts}  # all of them now: an error costs no training
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
    if latest is not None:
        checkpoint = load_checkpoint(latest, parallel_model, optimizer, world)
        step, data_state = checkpoint.step, DataState.from_dict(checkpoint.state["data"])
        best = Best(**checkpoint.state["best"])

    loader = Updates(dataset, crops, config, world, step, data_state)
    guard = UpdateGuard(config.guard)
    metrics = MetricsLog(run, step, world)
    throughput = Throughput(world, config.run.steps)
    stop = StopRequest(run.path)
    if world.is_main:
        print(describe(config, precision, model, crops[0], dataset, world, step), flush=True)

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
            log_mel = batch.log_mel.to(world.device, non_blocking=True)
            log_mel = spec_augment(log_mel, batch.segments, config.spec_augment)
            with gradient_sync(parallel_model, i == len(micro_batches) - 1):
                with autocast(world, config.distributed):
                    output = parallel_model(
                        log_mel, batch.segments, labels, label_lengths, train_encoder=step > frozen_steps
                    )
                (output.loss_sum / global_labels).backward()
            loss_sum += output.loss_sum.detach()
            frames = [float(batch.segments.length.sum()), float(batch.log_mel.shape[0] * batch.log_mel.shape[1])]
            counts = [float(output.loss_sum.detach()), float(label_lengths.sum()), float(output.num_impossible)]
            sums += torch.tensor([*counts, *frames], dtype=torch.float64, device=world.device)
        update = guard.apply_update(parallel_model, optimizer, loss_sum, config.optimizer.clip_norm, world)
        if not update.applied:
            samples = [sample for batch in micro_batches for ids in batch.ids for sample in ids]
            report_skipped_update(step, loss_sum, samples, world)
        audio_frames = sum(int(batch.segments.length.sum()) for batch in micro_batches)
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
            decoder = GreedyCTC(model.log_probs)
            found = validate(model, decoder, heldout, tokenizer.decode, inference, frames_per_second, world)
            rates = {"dev_wer": found.wer, "dev_cer": found.cer}
            metrics.write(step, rates, kind="dev")
            if rates[f"dev_{config.validation.best_by}"] < best.rate:
                best = Best(rates[f"dev_{config.validation.best_by}"], step)
                export(run, step, parallel_model, tokenizer, rates, dataset, config, world, kind="ctc")
        if is_validation or step % config.checkpoint.every_steps == 0:
            save(run, step, parallel_model, optimizer, loader.state, best, dataset, config, world)
        if is_validation and world.is_main:  # after export and checkpoint are on disk
            print(f"step {step}/{config.run.steps}  dev WER {found.wer:.2%}  CER {found.cer:.2%}")
            print(f"    said:  {found.reference}\n    heard: {found.hypothesis[:200]}", flush=True)

    if step < config.run.steps:
        save(run, step, parallel_model, optimizer, loader.state, best, dataset, config, world)
        stop.leave_requeue_marker(world)
        if world.is_main:
            print(f"stopped after step {step} ({stop.reason}); the same command continues", flush=True)
    elif world.is_main:
        print(
            f"done: best dev {config.validation.best_by} {best.rate:.2%} at step {best.step}: {run.export}", flush=True
        )
    metrics.close()
    world.close()


SUMS = ("loss", "labels", "impossible", "frames", "row_frames")


def summarise(sums: list[float]) -> dict[str, float]:
    """Means over an interval and all ranks: the loss is in nats a label."""
    total = dict(zip(SUMS, sums, strict=True))
    return {
        "loss": total["loss"] / max(total["labels"], 1),
        "impossible_segments": total["impossible"],
        "row_fill": total["frames"] / max(total["row_frames"], 1),
    }


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
