# shellcheck shell=bash
# Functions of torchrun.sh and slurm_job.sh: start a training script so that a signal ends it with a checkpoint.
#
# A signal to this shell creates a STOP file in the run folder. The processes of the training script check for the file,
# agree to stop, save a checkpoint, write REQUEUE, and exit with 0; the same command then continues the run. This is
# necessary because srun and torchrun do not guarantee that a signal reaches all processes.

PYTHON=${PYTHON:-.venv/bin/python}
# By default, torchrun kills its processes 30 s after it forwards SIGTERM. The checkpoint of a large model takes longer,
# and the sender of the signal has its own deadline.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# run_folder SCRIPT ARGUMENTS...: print the run folder of the script, the last --run.folder among the arguments. Without
# one, the folder may be set in a --config file, so the script prints its settings, which takes seconds.
run_folder() {
    local folder="" previous="" argument settings
    for argument in "$@"; do
        case "$argument" in --run.folder=*) folder=${argument#*=} ;; esac
        [ "$previous" != --run.folder ] || folder=$argument
        previous=$argument
    done
    if [ -z "$folder" ]; then
        settings=$("$PYTHON" "$@" --print_config) || return
        folder=$(sed -n '/^run:/,/^[^ ]/s/^  folder: *//p' <<<"$settings")
        if [ -z "$folder" ]; then
            say "error: $1 has no setting run.folder"
            return 2
        fi
    fi
    printf '%s\n' "$folder"
}

# stoppable FOLDER COMMAND...: run the command, turning signals into a STOP file; return its exit status.
stoppable() {
    local status name
    stop_folder=$1
    shift
    mkdir -p "$stop_folder"
    rm -f "$stop_folder/STOP" "$stop_folder/REQUEUE" # left by a killed run
    # Traps before the command: an untrapped signal would end this shell and leave the command running.
    # shellcheck disable=SC2064  # $name must be expanded now
    for name in HUP INT TERM USR1 USR2; do trap "request_stop $name" "$name"; done
    "$@" &
    child=$!
    # A trapped signal ends wait early. Only an uninterrupted wait returns the status of the command.
    while :; do
        signalled=""
        status=0
        wait "$child" || status=$?
        [ -n "$signalled" ] || break
    done
    trap '' HUP INT TERM USR1 USR2 # a repeated signal must not interrupt the rest of the caller
    return "$status"
}

request_stop() {
    signalled=$1
    if [ "$1" = INT ] && [ -e "$stop_folder/STOP" ]; then
        say "interrupted again: ending without a checkpoint"
        pkill -KILL -P "$child" || kill -KILL "$child" # the processes of torchrun, which then exits
    else
        say "got SIG$1: the run will save a checkpoint and stop"
        touch "$stop_folder/STOP"
    fi
}
