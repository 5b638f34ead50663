"""results.csv: one row per recording, without cells that a spreadsheet would run."""

import csv
from pathlib import Path

from pipelines.evaluation_results import write_results


def test_texts_are_no_formulas(tmp_path: Path) -> None:
    texts = ["=cmd|'/c calc'!A0", "@SUM(1)", "+1", "-2", "\tx", "plain", ""]
    rows = [{"id": f"r{number}", "hypothesis": text, "wer": -1.5} for number, text in enumerate(texts)]
    write_results(tmp_path, {"recordings": rows}, [])
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["hypothesis"] for row in table] == [f"'{text}" for text in texts[:5]] + texts[5:]
    assert {row["wer"] for row in table} == {"-1.5"}
