"""Changed dataset.json: refused with the file, or a dataset that can be read; never another exception."""

import json
import os
import subprocess
import sys
from pathlib import Path

from data.format.dataset import open_dataset
from tests.made_datasets import make_dataset
from tests.paths import REPOSITORY
from tests.wrong_json import refused, variants


def test_every_wrong_value_is_refused_by_name_or_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", [300, 400, 500])
    path = tmp_path / "d/dataset.json"

    def read() -> None:
        dataset = open_dataset(tmp_path / "d")
        dataset.read_normalised(0, 0, 50, normalisation="dataset")
        dataset.read_normalised(1)
        assert len(dataset) == len(dataset.select()) == 3 and dataset.total_frames == 1200
        dataset.name.encode(), dataset.fingerprint.encode()
        assert dataset.identity()

    count = sum(refused(read, case, str(path.parent)) for case, text in variants(json.loads(path.read_text()), 700)
                if path.write_text(text))  # fmt: skip
    assert 400 < count < 700


def test_a_pipe_in_place_of_a_header_is_refused_without_waiting(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", [300])
    (tmp_path / "d/dataset.json").unlink()
    os.mkfifo(tmp_path / "d/dataset.json")
    code = f"from data.format.dataset import open_dataset\nopen_dataset({str(tmp_path / 'd')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert b"UserError" in done.stderr
