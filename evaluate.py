"""Word and character error rates of an exported recogniser on whole recordings.

    python evaluate.py --export runs/ctc/export --data.dataset datasets/synthetic --out results/ctc
    torchrun --nproc-per-node 8 evaluate.py --export runs/ctc/export --data.dataset datasets/calls --out results/ctc

Recordings longer than the context are decoded in overlapping windows (`--inference.context_seconds 0`: in one pass).
The recordings are distributed over the processes. After Ctrl-C the same command continues with the remaining
recordings; for a finished evaluation it only writes the report again. Error rates are over the corpus, with 95 %
intervals from a bootstrap over recordings. English is normalised with Whisper's rules, other languages with general
Unicode rules and rules of the language.

Writes into --out: results.json (all numbers), results.csv (one row per recording), transcripts.jsonl (each word with
its time, and the alignment with the reference), report.html. Appends a row to rows.jsonl in the parent folder of --out.

`python -m tools.sweep` evaluates several contexts, overlaps, modes, decoders or exports.
"""

import re
from collections.abc import Sequence

from bestrq.training.process import World
from common.config import parse, run_main
from common.errors import UserError
from data.format.dataset import Dataset
from pipelines.evaluation import check_evaluations, open_export, read_references, run_evaluation
from pipelines.evaluation_settings import Config, Evaluation, evaluation_of
from pipelines.recogniser import start_inference


def evaluate(config: Config, world: World) -> None:
    """Run the evaluation. All processes call it."""
    # Errors in the settings and files are raised here, before any work.
    references = read_references(config)
    evaluation = prepare_evaluation(config, references.dataset, world)

    run_evaluation(evaluation, references, config, world)


def prepare_evaluation(config: Config, dataset: Dataset, world: World) -> Evaluation:
    """Evaluation with its keys. Raises UserError for settings that do not fit the export."""
    export, recogniser = open_export(config.export, dataset)
    evaluation = evaluation_of(config, export, dataset.features.frames_per_second)
    [evaluation] = check_evaluations([evaluation], export, recogniser, config, dataset, world)
    return evaluation


def parse_command(argv: Sequence[str] | None = None) -> Config:
    """Settings from the command line. Raises UserError, which names tools/sweep.py if a field has a list of values."""
    try:
        return parse(Config, argv, description=__doc__)
    except UserError as error:
        if lists := re.findall(r"unknown field '(grid[\w.]*)'", str(error)):
            raise UserError(
                f"{', '.join(lists)}: evaluate.py evaluates one configuration; give the same arguments to "
                "`python -m tools.sweep`, which evaluates all configurations of the lists; remove an empty section"
            ) from None
        # Such as --inference.context_seconds '[5, 20]'.
        if re.search(r"Got value: \[|is a list: |load config .\[", str(error)):
            raise UserError(
                f"{error}. evaluate.py takes one value per field; `python -m tools.sweep` takes lists, as "
                "--grid.contexts, --grid.overlaps, --grid.modes, --grid.decoders and --grid.exports"
            ) from None
        raise


def main() -> None:
    config = parse_command()
    world = start_inference(config.device, config.threads, config.inference)
    evaluate(config, world)
    world.close()


if __name__ == "__main__":
    run_main(main, console_may_vanish=True)
