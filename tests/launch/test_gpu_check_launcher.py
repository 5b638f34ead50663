"""launch/gpu_check.sh: the interpreter of the machine, missing packages from a folder of wheels, clear errors."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.paths import REPOSITORY
from tests.patience import PATIENCE


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/gpu_check.sh", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def write_wheel(folder: Path) -> None:
    """Wheel of a package `absent` with one module."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "absent-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent.py", "")
        wheel.writestr("absent-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: absent\nVersion: 1.0\n")
        wheel.writestr("absent-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("absent-1.0.dist-info/RECORD", "")


def test_missing_packages_come_from_the_wheels(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    wrapper = tmp_path / "python"  # imports the package in the command of the check
    wrapper.write_text(
        f'#!/bin/bash\nif [ "$2" = benchmarks.gpu_check ]; then {sys.executable} -c "import absent" || exit 9; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    out = tmp_path / "gpu.json"
    options = ["--tiny", "--parts", "environment", "--out", str(out)]
    done = launch(*options, PYTHON=str(wrapper), GPU_WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parts"] == {"environment": "ok"} and out.exists()
    assert launch(*options, PYTHON=str(wrapper), GPU_WHEELS=str(tmp_path / "none")).returncode == 9


def test_wheels_for_another_python_are_an_error(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    wheel = tmp_path / "wheels/absent-1.0-py3-none-any.whl"
    wheel.rename(wheel.with_name("absent-1.0-cp27-cp27m-manylinux1_x86_64.whl"))
    done = launch("--tiny", GPU_WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 1 and "make them for this Python (PYTHON_VERSION=" in done.stderr


def test_a_python_without_torch_is_an_error(tmp_path: Path) -> None:
    done = launch("--tiny", PYTHON="/usr/bin/false")
    assert done.returncode == 1 and "/usr/bin/false has no torch" in done.stderr
