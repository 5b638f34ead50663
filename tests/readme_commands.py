"""Small forms of the commands in README.md, docs/usage.md and docs/benchmarks.md, for tests/test_readme.py.

A command without an entry fails the test, and so does an entry whose command is on no page. Commands run in the order
of the pages in one folder, so that a command can use the output of an earlier one.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tiny import DATA, ENCODER, RUN


@dataclass(frozen=True)
class Run:
    """Run the command with words replaced and arguments appended; a repeated setting overrides the earlier one."""

    more: str = ""
    replacements: dict[str, str] = field(default_factory=dict)

    def small_form(self, command: str) -> str:
        for old, new in self.replacements.items():
            assert old in command, f"{old!r} is not in {command!r}"
            command = command.replace(old, new)
        return f"{command} {self.more}".strip()


@dataclass(frozen=True)
class Elsewhere:
    """Do not run the command, for a reason: it is too large, or another test covers it."""

    reason: str


# Folder made before the first command, instead of the data of a user.
SPEECH_FOLDER = "speech"

TINY_RUN = " ".join([*ENCODER, *DATA, *RUN, "--run.steps=2", "--data.num_workers=0"])
TINY_CORPUS = "--languages en --train_hours 0.02 --dev_utterances 2 --test_utterances 2 --test_long_recordings 0"
TWO_PROCESSES = {"--nproc-per-node 8": "--nproc-per-node 2"}

LONG_CONTEXT = "tests/experiments/test_long_context.py runs it, on corpora of a few seconds"

PAGES = ("README.md", "docs/usage.md", "docs/benchmarks.md")

COMMANDS: dict[str, Run | Elsewhere] = {
    "bash launch/quickstart.sh": Run("--tiny"),
    "bash launch/quickstart.sh --corpus fillets": Elsewhere(
        "downloads 100 MB; tests/data/corpora/test_corpora.py reads a small copy"
    ),
    "bash launch/quickstart.sh --head rnnt": Run("--tiny"),
    "bash experiments/context_effect.sh": Run("--tiny"),
    "python pretrain.py --config configs/quickstart-pretrain.yaml --data.dataset datasets/train": Run(TINY_RUN),
    "python finetune_ctc.py --config configs/quickstart-ctc.yaml --data.dataset datasets/train "
    "--finetune.init runs/quickstart/pretrain/export --finetune.reinitialise_top_blocks 2": Run(TINY_RUN),
    "python pretrain.py --config configs/base-120m.yaml --data.rows 256 --dry_run.world_size 256": Elsewhere(
        "tests/pipelines/test_dry_run.py runs it with a small encoder"
    ),
    "python pretrain.py --config configs/base-120m.yaml --fit.memory_gib 24 --dry_run.world_size 8": Elsewhere(
        "tests/pipelines/test_fit.py searches with a small encoder"
    ),
    "bash experiments/pretraining_context.sh": Elsewhere(
        "tests/experiments/test_pretraining_context.py runs it in its tiny form"
    ),
    "bash launch/test.sh": Elsewhere("runs this test"),
    "python -m data.prepare folder --folder /data/speech --out datasets/train": Run(
        replacements={"/data/speech": SPEECH_FOLDER}
    ),
    "torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m": Run(
        TINY_RUN, TWO_PROCESSES
    ),
    "torchrun --nproc-per-node 8 finetune_ctc.py --config configs/base-120m-ctc.yaml "
    "--finetune.init runs/base-120m/export": Run(f"{TINY_RUN} --finetune.vocab_size=20", TWO_PROCESSES),
    "python evaluate.py --export runs/base-120m-ctc/export --data.dataset datasets/train --data.split test "
    "--out results/base": Run("--device cpu"),
    "torchrun --nproc-per-node 8 finetune_rnnt.py --config configs/base-120m-rnnt.yaml "
    "--finetune.init runs/base-120m/export": Run(f"{TINY_RUN} --finetune.vocab_size=20", TWO_PROCESSES),
    "python -m tools.train_ngram --export runs/base-120m-rnnt/export "
    "--data.dataset datasets/train --out lm.arpa": Run(),
    "python evaluate.py --export runs/base-120m-rnnt/export --data.dataset datasets/train --out results/rnnt "
    "--decoder.beam 4 --decoder.language_model lm.arpa": Run("--device cpu"),
    "python -m tools.compare --results results/base results/rnnt --out results/compare": Run("--resamples 100"),
    "python -m tools.sweep --export runs/base-120m-ctc/export --data.dataset datasets/train --out results/sweep "
    "--grid.contexts '[5, 20, 80, 0]'": Run("--device cpu", {"[5, 20, 80, 0]": "[5, 0]"}),
    "bash experiments/long_context.sh prepare --tedlium DIR --earnings22 DIR": Elsewhere(LONG_CONTEXT),
    "bash experiments/long_context.sh train": Elsewhere(LONG_CONTEXT),
    "bash experiments/long_context.sh evaluate": Elsewhere(LONG_CONTEXT),
    "python -m data.prepare folder --folder /data/unlabelled --text none --dev_share 0 --test_share 0 "
    "--out datasets/unlabelled": Run(replacements={"/data/unlabelled": SPEECH_FOLDER}),
    "python -m tools.pseudo_label --export runs/base-120m-ctc/export --data.dataset datasets/unlabelled "
    "--filter.keep 0.7 --out datasets/pseudo": Elsewhere(
        "tests/scripts/test_pseudo_label.py runs it: a model of two steps may have no hypotheses to keep"
    ),
    "bash experiments/self_training.sh --dataset datasets/train --minutes 0 --unlabelled datasets/unlabelled "
    "--rounds 2": Elsewhere("tests/experiments/test_self_training.py runs it, with the rest of one dataset"),
    "python transcribe.py --export runs/base-120m-rnnt/export --audio talks --out transcripts "
    "--formats txt,json,srt": Run("--device cpu", {"talks": SPEECH_FOLDER}),
    "python -m tools.plot runs/*": Run(),
    "sbatch -N 2 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m": Elsewhere(
        "tests/launch/test_slurm.py runs it, on two nodes"
    ),
    "python -m data.prepare synthetic --out datasets/synthetic": Run(TINY_CORPUS),
    "python -m data.shards inspect datasets/synthetic": Run(),
    "python -m data.shards verify datasets/synthetic": Run(),
    "sbatch --array=0-15 launch/prepare.sbatch mls --languages de,fr --out datasets/mls": Elsewhere(
        "tests/launch/test_slurm.py runs it with another corpus, tests/data/corpora/test_corpora_mls.py reads this one"
    ),
    "python -m tools.average runs/base-120m-ctc --best 1 --out exports/base-120m-ctc": Run(),
    "python -m tools.align --data.dataset datasets/train --model runs/base-120m-ctc/export "
    "--out datasets/train-timed": Run("--device cpu"),
    "python -m benchmarks.pretraining_speed": Run("--only-ours --utterances 2 --row-seconds 20 --rows 1 --repeats 1"),
    "python -m benchmarks.encoder_speed": Run(
        "--systems --preset base-120m --workload equal --layers 1 --seconds-of-audio 10 --batch-seconds 10 --repeats 1"
    ),
    "python -m benchmarks.context_cost": Run(
        "--preset quickstart --layers 1 --systems window full --durations 2 --batch-seconds 4 --repeats 1"
    ),
    "python -m benchmarks.activation_memory": Run("--preset quickstart --layers 1 --shapes 1x2 --repeats 1"),
    "python -m benchmarks.rnnt_loss": Run(
        "--systems ours torchaudio --segments 2 --frames 20 --labels 5 --vocab-sizes 16 --joint-dim 8 "
        "--repeats 1 --rounds 1"
    ),
    "python -m benchmarks.checkpoint_stall": Elsewhere(
        "tests/benchmarks/test_training_benchmarks.py measures a small model"
    ),
    "python -m benchmarks.random_kills": Run("--kills 1 --processes 1 --steps 20"),
    "python -m benchmarks.loop_overhead": Run("--steps 3 --hours 0.05"),
    "python -m benchmarks.scaling": Elsewhere(
        "tests/benchmarks/test_training_benchmarks.py has the projection, and worlds of two take half a minute"
    ),
    "python -m benchmarks.gpu_readiness": Run("--parts waits combinations --only pretrain ctc"),
    "python -m benchmarks.long_form": Run("--preset quickstart --layers 1 --systems buffered --minutes 0.2 0.4"),
    "python -m benchmarks.transcription_speed": Elsewhere("needs transformers of requirements-benchmarks.txt"),
    "python -m benchmarks.loader_speed": Run(
        "--hours 0.05 --row-frames 2000 --updates 2 --warm-up 1 --repeats 1 --growth-batches 20"
    ),
    "python -m benchmarks.index_scale": Run("--recordings 20000 --batches 2 --repeats 1"),
    "python -m benchmarks.range_read": Run("--only-ours --recordings 1 --rounds 2"),
    "python -m benchmarks.compression --dataset datasets/synthetic": Run("--minutes 0.5 --crops 2"),
    "python -m benchmarks.alignment --model runs/base-120m-ctc/export": Elsewhere(
        "the model of two steps cannot align; tests/scripts/test_align_script.py runs the script"
    ),
    "python -m benchmarks.prepare_speed": Elsewhere("needs lhotse of requirements-benchmarks.txt"),
}


def commands_in(markdown: str) -> list[str]:
    """Commands of the bash blocks in order; continued lines are joined, comments and repetitions dropped."""
    commands: list[str] = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip()
            if command and command not in commands:
                commands.append(command)
    return commands


def readme_commands(repository: Path) -> list[str]:
    """Commands of all pages in order, without repetitions."""
    pages = [repository / page for page in PAGES]
    return list(dict.fromkeys(command for page in pages if page.exists() for command in commands_in(page.read_text())))
