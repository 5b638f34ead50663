"""What tests/test_readme.py runs for every command of README.md: the same command, made small.

A command of the README that is not here fails the test, and so does an entry whose command has left the README.
Commands run in the README's order in one folder, so a later one finds what an earlier one made.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tiny import DATA, ENCODER, RUN


@dataclass(frozen=True)
class Run:
    """The command itself, with words exchanged and arguments added behind it; the last of two equal settings counts."""

    more: str = ""
    exchange: dict[str, str] = field(default_factory=dict)

    def of(self, command: str) -> str:
        for old, new in self.exchange.items():
            assert old in command, f"{old!r} is not in {command!r}"
            command = command.replace(old, new)
        return f"{command} {self.more}".strip()


@dataclass(frozen=True)
class Elsewhere:
    """Not run here, because of this: too big, or another test does it."""

    reason: str


TINY_RUN = " ".join([*ENCODER, *DATA, *RUN, "--run.steps=2", "--data.num_workers=0"])

FINETUNE_RUN = f"{TINY_RUN} --validation.every_steps=2 --finetune.freeze_encoder_steps=1"
# Made by the fixture `sandbox`: a few spoken seconds with transcripts, in the layout of a user's own folder.
SPEECH = {"/data/speech": "speech"}

COMMANDS: dict[str, Run | Elsewhere] = {
    "bash launch/quickstart.sh": Run("--tiny --folder runs/quickstart"),
    "bash launch/test.sh": Elsewhere("is what runs this"),
    "bash launch/quickstart.sh --corpus fillets": Elsewhere(
        "fetches packages of Debian; test_corpora.py reads a small copy of their layout"
    ),
    "python -m data.prepare folder --folder /data/speech --out datasets/train": Run(exchange=SPEECH),
    "torchrun --nproc-per-node 8 pretrain.py --config configs/base-120m.yaml --run.folder runs/base-120m": Run(
        TINY_RUN, {"--nproc-per-node 8": "--nproc-per-node 2"}
    ),
    "torchrun --nproc-per-node 8 finetune_ctc.py --config configs/base-120m-ctc.yaml "
    "--finetune.init runs/base-120m/export": Run(
        f"{FINETUNE_RUN} --finetune.tokenizer=char", {"--nproc-per-node 8": "--nproc-per-node 2"}
    ),
    "python evaluate.py --export runs/base-120m-ctc/export --data.dataset datasets/train --data.split test "
    "--out results/base": Run(),
    "sbatch -N 2 launch/pretrain.sbatch --config configs/base-120m.yaml --run.folder runs/base-120m": Elsewhere(
        "test_slurm.py, on a cluster of its own"
    ),
    "python -m data.prepare synthetic --out datasets/synthetic": Run(
        "--train_hours 0.02 --dev_utterances 2 --test_utterances 2 --test_long_recordings 0"
    ),
    "python -m data.shards inspect datasets/synthetic": Run(),
    "python -m data.shards verify datasets/synthetic": Run(),
    "python -m benchmarks.pretraining_speed": Elsewhere("takes minutes, and needs requirements-benchmarks.txt"),
    "python -m benchmarks.loader_speed": Run("--hours 0.2 --updates 3 --warm-up 1 --rows 4"),
    "python -m benchmarks.prepare_speed": Elsewhere("takes minutes, and needs requirements-benchmarks.txt"),
}


def commands_in(markdown: str) -> list[str]:
    """Commands of the fenced blocks marked bash, in order: continued lines joined, comments and repetitions dropped."""
    commands: list[str] = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip()
            if command and command not in commands:
                commands.append(command)
    return commands


def readme_commands(repository: Path) -> list[str]:
    readme = repository / "README.md"
    return commands_in(readme.read_text()) if readme.exists() else []
