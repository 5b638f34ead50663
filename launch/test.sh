#!/usr/bin/env bash
# Sets up .venv and runs every check: ruff, mypy, pytest. Arguments go to pytest:
#
#   bash launch/test.sh                      everything
#   bash launch/test.sh -m "not slurm"       without the SLURM cluster
#   bash launch/test.sh tests/data/loading/test_order.py  one file
#   bash launch/test.sh -n 0 -s -k stream    in one process, with what the tests print
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
# Files are shared out among as many processes as there are cores, in the order of tests/conftest.py.
processes=(-n "$(env -u OMP_NUM_THREADS nproc)" --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
# One thread a process: the tests run small models, many in two processes, and are repeatable with a fixed number.
export OMP_NUM_THREADS=1
printf '== pytest %s\n' "$*"
exec .venv/bin/python -m pytest "${processes[@]}" --durations=15 "$@" # last, so that its summary closes the output
