# shellcheck shell=bash
# Sourced by torchrun.sh and slurm_job.sh: start a training script so that a signal ends it with a checkpoint.
#
# A signal to this shell becomes a STOP file in the run folder. The training script looks for that file, agrees on it
# among its processes, saves, leaves REQUEUE beside it, and exits with 0; the same command then continues the run. So
# no signal has to find its way through srun and torchrun to every process, which they do not promise.

PYTHON=${PYTHON:-.venv/bin/python}
# A SIGTERM that torchrun does get, it passes on, and kills what still lives 30 s later. A checkpoint of a large model
# takes longer; whoever sent the signal has a deadline of its own anyway.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The value of --run.folder among a script's arguments; the last one counts, as it does for the script.
run_folder() {
    local folder="" previous="" argument
    for argument in "$@"; do
        case "$argument" in --run.folder=*) folder=${argument#*=} ;; esac
        [ "$previous" = --run.folder ] && folder=$argument
        previous=$argument
    done
    if [ -z "$folder" ]; then
        say "error: --run.folder is missing: name the run folder, for example --run.folder runs/first"
        return 2
    fi
    printf '%s\n' "$folder"
}

# stoppable FOLDER COMMAND...: run the command to its end; a signal meanwhile asks it to stop. Its exit status.
stoppable() {
    local folder=$1 child status name
    shift
    mkdir -p "$folder"
    rm -f "$folder/STOP" "$folder/REQUEUE" # left by a run that was killed before it could answer
    "$@" &
    child=$!
    for name in HUP INT TERM USR1 USR2; do
        # shellcheck disable=SC2064  # expanded now: the folder, the process and the name are those of this call
        trap "signalled=$name; ask_to_stop $name '$folder' $child" "$name"
    done
    # A trapped signal ends wait early. Then wait again: only a wait that none interrupted gives the command's status.
    while :; do
        signalled=""
        status=0
        wait "$child" || status=$?
        [ -n "$signalled" ] || break
    done
    trap '' HUP INT TERM USR1 USR2 # a repeated signal must not cut off what the caller does about the end
    return "$status"
}

ask_to_stop() {
    if [ "$1" = INT ] && [ -e "$2/STOP" ]; then
        say "interrupted again: ending without a checkpoint"
        kill -INT "$3" 2>/dev/null || true
    else
        say "got SIG$1: asking the run to save a checkpoint and end"
        touch "$2/STOP"
    fi
}
