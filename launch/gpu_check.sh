#!/usr/bin/env bash
# Check this project on a machine with one GPU, in 8 minutes, with the Python and torch that it has, without network.
#
#   bash launch/gpu_check.sh --make-wheels          on a machine with network: download the other packages (15 MB)
#   bash launch/gpu_check.sh [--out gpu.json ...]   on the machine with the GPU: arguments of benchmarks.gpu_check
#
# The packages are wheels in the folder gpu_wheels/ of the repository (GPU_WHEELS names another one), for Linux on x86-64
# and Python 3.12 (PYTHON_VERSION). Packages that the machine lacks are installed from there into a temporary folder;
# those it has are used as they are. PYTHON=/path/to/python selects the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels=${GPU_WHEELS:-gpu_wheels} python=${PYTHON:-python3} version=${PYTHON_VERSION:-3.12}
# Not here, for their size: torch, torchaudio, triton, numpy, pyarrow, matplotlib, tensorboard, pytest's and Jinja's own
# requirements; a machine with torch usually has them. benchmarks.gpu_check names a missing one at its start.
direct='jsonargparse|jiwer|whisper-normalizer|soundfile|sentencepiece|safetensors|jinja2|tqdm|fsspec|pytest|pytest-xdist|hypothesis'
indirect=(docstring-parser==0.18.0 typeshed-client==2.15.0 rapidfuzz==3.14.6 more-itertools==11.2.1 indic-numtowords==1.1.0
    text2num==3.1.0 cffi==2.1.1 pycparser==3.12 markupsafe==3.0.4 execnet==2.1.2 sortedcontainers==2.4.0 pluggy==1.7.0
    iniconfig==2.3.1 pyyaml==6.0.4 regex==2026.11.19 click==8.5.1)
maximum_mb=60

fail() { printf 'gpu_check: error: %s\n' "$*" >&2; exit 1; }

make_wheels() {
    local packages platforms=() platform check
    mapfile -t packages < <(sed -nE "s/^($direct)(\[[a-z]*\])?(==.*)$/\1\3/p" requirements.txt requirements-dev.txt)
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux1; do
        platforms+=(--platform "${platform}_x86_64")
    done
    local target=(--no-deps --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}")
    "$python" -m pip download --disable-pip-version-check -q "${target[@]}" -d "$wheels.new" "${packages[@]}" "${indirect[@]}" ||
        fail "a wheel could not be downloaded; the line above names it"
    local size
    size=$(du -sm "$wheels.new" | cut -f 1)
    [ "$size" -lt "$maximum_mb" ] || fail "the wheels take $size MB, more than $maximum_mb"
    check=$(mktemp -d)
    "$python" -m pip install --disable-pip-version-check -q --no-index "${target[@]}" --target "$check" "$wheels.new"/*.whl ||
        fail "the wheels cannot be installed for Python $version"
    rm -rf "$check" "$wheels"
    mv "$wheels.new" "$wheels"
    printf 'gpu_check: %s wheels for Python %s in %s, %s MB\n' "$(ls "$wheels" | wc -l)" "$version" "$wheels" "$size"
}

# Wheels of packages that the interpreter lacks, one path per line.
missing_wheels() {
    "$python" - "$wheels" <<'PYTHON'
import importlib.metadata, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PYTHON
}

case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    --make-wheels) make_wheels; exit 0 ;;
esac

"$python" -c 'import torch' 2>/dev/null || fail "$(command -v "$python" || echo "$python") has no torch: PYTHON=/path/to/python with torch"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d "$wheels" ]; then
    mapfile -t missing < <(missing_wheels)
    if [ ${#missing[@]} -gt 0 ]; then
        "$python" -m pip install --disable-pip-version-check -q --no-index --no-deps --target "$site" "${missing[@]}" ||
            fail "the wheels of $wheels cannot be installed: make them for this Python (PYTHON_VERSION=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'))"
    fi
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import benchmarks.gpu_check, hypothesis, jiwer, matplotlib, pytest, sentencepiece, tensorboard, whisper_normalizer' ||
    fail "a package is missing (above): bash launch/gpu_check.sh --make-wheels on a machine with network, and copy $wheels here"
"$python" -m benchmarks.gpu_check "$@"
