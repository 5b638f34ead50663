#!/usr/bin/env bash
# Start a training script on this machine, with one process per GPU, or with N processes (-n N):
#
#   bash launch/torchrun.sh pretrain.py --config configs/base-120m.yaml --run.folder runs/base
#   bash launch/torchrun.sh -n 2 pretrain.py --config configs/quickstart-pretrain.yaml --run.folder runs/two
#
# On Ctrl-C, SIGTERM or a closed terminal, the run saves a checkpoint after the current step and stops; the same command
# continues it. A second Ctrl-C ends it without a checkpoint. The exit status is that of the script, or 75 after a stop.
# PYTHON=/path/to/python selects the interpreter (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/stoppable.sh
source launch/stoppable.sh

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }

processes=""
case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    -n)
        processes=${2:?-n needs a number of processes}
        shift 2
        ;;
esac
if [ $# = 0 ] || [ ! -f "$1" ]; then
    say "error: '${1:-}' is not a script of this repository"
    usage >&2
    exit 2
fi
folder=$(run_folder "$@")
if [ -z "$processes" ]; then
    processes=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
# The processes share the cores; by default torchrun gives each process one thread.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

set -m # separate process groups: Ctrl-C reaches only this shell, which then requests the checkpoint
status=0
stoppable "$folder" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts 0 "$@" ||
    status=$?
if [ -e "$folder/REQUEUE" ]; then
    rm -f "$folder/REQUEUE"
    say "stopped with a checkpoint; the same command continues the run"
    exit 75
fi
exit "$status"
