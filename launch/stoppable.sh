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

# run_folder SCRIPT ARGUMENTS...: the run folder that the script will use. --run.folder among the arguments, the last
# one, as for the script; else the script is asked, which takes seconds: the folder may stand in a file of --config.
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

# stoppable FOLDER COMMAND...: run the command to its end; a signal meanwhile asks it to stop. Its exit status.
stoppable() {
    local status name
    stop_folder=$1
    shift
    mkdir -p "$stop_folder"
    rm -f "$stop_folder/STOP" "$stop_folder/REQUEUE" # left by a run that was killed before it could answer
    # Before the command starts: an untrapped signal would end this shell and leave the command running.
    # shellcheck disable=SC2064  # expanded now: the name is that of this round
    for name in HUP INT TERM USR1 USR2; do trap "ask_to_stop $name" "$name"; done
    "$@" &
    child=$!
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
    signalled=$1
    if [ "$1" = INT ] && [ -e "$stop_folder/STOP" ]; then
        say "interrupted again: ending without a checkpoint"
        pkill -KILL -P "$child" || kill -KILL "$child" # the processes that torchrun started; it then ends by itself
    else
        say "got SIG$1: asking the run to save a checkpoint and end"
        touch "$stop_folder/STOP"
    fi
}
