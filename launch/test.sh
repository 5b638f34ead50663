#!/usr/bin/env bash
# Set up .venv and run all checks: ruff, mypy, pytest. Arguments go to pytest:
#
#   bash launch/test.sh                                     all tests
#   bash launch/test.sh -m "not slurm"                      without the SLURM cluster
#   bash launch/test.sh tests/data/loading/test_order.py    one file
#   bash launch/test.sh -n 0 -s -k stream                   in one process, with the output of the tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
esac

bash launch/setup.sh dev

check() {
    local start=$SECONDS
    printf '== %s\n' "$*"
    .venv/bin/python -m "$@"
    printf '== %s: %d s\n' "$1" $((SECONDS - start))
}

check ruff check .
check ruff format --check .
check mypy
# Test files are distributed over processes, in the order of tests/conftest.py: one per core, and half as many again,
# as many tests wait for processes that they have started.
cores=$(env -u OMP_NUM_THREADS nproc)
processes=(-n $((cores + cores / 2)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
# One thread per process: models are small, many tests start two processes, and a fixed number gives repeatable results.
export OMP_NUM_THREADS=1
printf '== pytest %s\n' "$*"
exec .venv/bin/python -m pytest "${processes[@]}" --durations=15 "$@" # last, so that the output ends with its summary
