"""Labels that a fine-tuning run trained on, one per line, for a language model of nothing but these labels.

python -m experiments.learning.label_texts --run runs/ctc --out labels.txt
"""

import argparse
from pathlib import Path

from common.config import from_dict, load_yaml, run_main
from common.files import write_file
from pipelines.curriculum import labelled_crops
from pipelines.finetuning import FinetuneConfig


def label_texts(run: Path) -> list[str]:
    """Label texts of the training crops, in the order of the dataset. Raises UserError if the run cannot be read."""
    fields = FinetuneConfig.__dataclass_fields__
    config = from_dict(FinetuneConfig, {k: v for k, v in load_yaml(run / "config.yaml").items() if k in fields})
    return list(labelled_crops(config.data.open(), config, config.data).texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of finetune_ctc.py")
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    options = parser.parse_args()
    texts = label_texts(options.run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(options.out, "".join(f"{text}\n" for text in texts))
    print(f"{len(texts)} labels: {options.out}")


if __name__ == "__main__":
    run_main(main)
