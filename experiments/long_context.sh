#!/usr/bin/env bash
# Word error rate against context length on TED-LIUM and Earnings-22, from the downloaded corpora to the table: one
# model per context, evaluated on whole recordings with its training context (docs/long_context.md).
#
#   bash experiments/long_context.sh prepare --tedlium DIR --earnings22 DIR   datasets; either corpus may be omitted
#   bash experiments/long_context.sh train                                    seed model, word times, a model per context
#   bash experiments/long_context.sh evaluate                                 all models on all test sets; table, curves
#
# Two parts of these are commands too: `seed` trains only the seed model and makes the word times; `table` writes the
# tables of the results so far.
#
#   --folder DIR           keep everything in DIR (default: runs/long-context)
#   --contexts "512 2048"  frames of context, 100 per second (default: 512 to 360000; evaluate: all trained models)
#   --cross                evaluate each model at each context
#   --frames N             frames per optimizer step, for all contexts (default: 393216)
#   --pretrained EXPORT    encoder to initialise the seed model, such as an export of pretrain.py (default: none)
#   --seed EXPORT          recogniser to use instead of a seed model, for the word times and to initialise all models
#   --data DATASET         dataset with word times to train on instead of the talks of TED-LIUM
#   --config FILE          recipe of the models (default: configs/fast-115m-long-context-ctc.yaml)
#   --nproc-per-node N     processes per node (default: one per GPU; fewer if they do not divide the rows of a step)
#   -- ARGUMENTS           further settings of data.prepare, finetune_ctc.py, or evaluate.py and tools/sweep.py
#
# Finished steps are skipped and interrupted ones continue when the same command is run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${LONG_CONTEXT_JOB:-}" ]; then # in a job of experiments/long_context.sbatch
    source launch/slurm_job.sh
else
    # shellcheck source=launch/stoppable.sh
    source launch/stoppable.sh
fi

fail() {
    say "error: $1"
    exit 2
}

again=$*
command=${1:-}
case "$command" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    prepare | seed | train | evaluate | table) shift ;;
    *) fail "unknown command '$command': choose prepare, train, evaluate, seed or table (see --help)" ;;
esac
folder=runs/long-context contexts="" cross="" frames=393216 pretrained="" seed="" data="" tedlium="" earnings22=""
config=configs/fast-115m-long-context-ctc.yaml processes="" tiny=() more=()
while [ $# -gt 0 ]; do
    case "$1" in
        --folder | --contexts | --frames | --pretrained | --seed | --data | --config | --tedlium | --earnings22 | --nproc-per-node)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            name=${1#--}
            [ "$name" != nproc-per-node ] || name=processes
            printf -v "$name" %s "$2"
            shift 2
            ;;
        --cross)
            cross=yes
            shift
            ;;
        --tiny) # for the tests: two steps of a tiny model
            tiny=(--run.steps 2 --run.log_every 1 --finetune.tokenizer char --finetune.freeze_encoder_steps 0
                --encoder.dim 16 --encoder.num_layers 1 --encoder.num_heads 2 --encoder.feedforward_dim 16
                --encoder.subsampling_factor 4 --encoder.subsampling_channels 4 --data.num_workers 0
                --data.min_seconds 0.1 --distributed.device cpu --distributed.precision float32)
            shift
            ;;
        --)
            shift
            more=("$@")
            break
            ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done
for number in $contexts $frames $processes; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "'$number' is not a number of frames or processes: give positive integers"
done

datasets=$folder/datasets models=$folder/models part=""
task="" # number of this task in a job array
[ -z "${LONG_CONTEXT_JOB:-}" ] || task=${SLURM_ARRAY_TASK_ID:-}
all_contexts="512 1024 2048 4096 8192 16384 32768 65536 131072 262144 360000"
test_sets=(tedlium earnings22 earnings22-full)

headline() { printf '\n== %s\n' "$1"; }
is_prepared() { [ -f "$datasets/$1/dataset.json" ]; }
seconds() { printf '%d.%02d' $(($1 / 100)) $(($1 % 100)); }

# Work that must be done once is not done in the tasks of an array, which would overwrite each other's files.
is_single_job() { [ -z "$task" ]; }

# select_contexts LIST: set `selected` to these contexts, or to one of them in a task of an array.
select_contexts() {
    local list
    read -ra list <<<"$1"
    selected=("${list[@]}")
    is_single_job && return
    [ "$task" -lt ${#list[@]} ] ||
        fail "task $task of the array has no context: with ${#list[@]} contexts ($1) give --array=0-$((${#list[@]} - 1))"
    selected=("${list[task]}")
}

# --- programs are started directly, or in a SLURM job

count_processes() {
    if [ -n "${LONG_CONTEXT_JOB:-}" ]; then
        processes=${processes:-${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
    elif [ -z "$processes" ]; then
        processes=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
}

# run SCRIPT ARGUMENTS...: run a script that can be continued after an interruption, in all processes.
run() {
    if [ -n "${LONG_CONTEXT_JOB:-}" ]; then
        PROCESSES_PER_NODE=$processes requeue_at_limit torchrun_on_every_node "$@"
    elif [ "$processes" = 1 ]; then
        forward_signals "$PYTHON" "$@"
    else
        forward_signals "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts 0 "$@"
    fi
}

# forward_signals COMMAND...: run a command, forward signals to it, and return its exit status. Otherwise the command
# would survive a kill of this script, and the next start of the script would run a second one on the same files.
forward_signals() {
    local status signalled=""
    child=""
    trap 'signalled=yes; [ -z "$child" ] || kill -TERM "$child" || true' HUP INT TERM
    "$@" &
    child=$!
    [ -z "$signalled" ] || kill -TERM "$child" || true # the signal arrived before the assignment
    while :; do # as in stoppable.sh
        signalled=""
        status=0
        wait "$child" || status=$?
        [ -n "$signalled" ] || break
    done
    trap - HUP INT TERM
    return "$status"
}

# requeue_at_limit COMMAND...: run a command; before the time limit of the job, end it and requeue the job.
requeue_at_limit() {
    local status=0
    trap - HUP INT TERM USR1 USR2 # stoppable left them ignored, which the command would inherit
    child=""
    trap '[ -z "$child" ] || { kill "$child"; wait "$child" || true; }; requeue; exit' USR2
    ("$@") &
    child=$!
    wait "$child" || status=$?
    trap - USR2
    return "$status"
}

# train_model NAME ROWS ARGUMENTS...: train a model to the end; exit this script if the training is stopped.
train_model() {
    local run=$models/$1 rows=$2 nodes=1 per_node=$processes status=0
    shift 2
    if [ -e "$run/finished" ]; then
        echo "$run is finished; remove that folder to train it again"
        return
    fi
    [ -z "${LONG_CONTEXT_JOB:-}" ] || nodes=$SLURM_JOB_NUM_NODES
    while ((per_node > 1 && rows % (nodes * per_node))); do per_node=$((per_node - 1)); done
    local arguments=(finetune_ctc.py --config "$config" --run.folder "$run" --data.rows "$rows" "$@"
        "${tiny[@]}" "${more[@]}")
    if [ -n "${LONG_CONTEXT_JOB:-}" ]; then
        PROCESSES_PER_NODE=$per_node stoppable "$run" torchrun_on_every_node "${arguments[@]}" || status=$?
        if [ -e "$run/REQUEUE" ]; then
            rm -f "$run/REQUEUE"
            requeue
            exit
        fi
    else
        forward_signals bash launch/torchrun.sh -n "$per_node" "${arguments[@]}" || status=$?
        [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/long_context.sh %s\n' "$again"
    fi
    [ "$status" = 0 ] || exit "$status"
    touch "$run/finished"
}

# --- the steps

prepare() {
    local release=$tedlium workers=()
    [ -n "$tedlium$earnings22" ] || fail "nothing to prepare: give --tedlium DIR, --earnings22 DIR, or both"
    # Check both corpora before hours of work on the first one.
    if [ -n "$tedlium" ]; then
        [ ! -d "$tedlium/legacy" ] || release=$tedlium/legacy
        [ -d "$release/test/stm" ] || fail "--tedlium $tedlium: no test/stm, which all releases of TED-LIUM have"
    fi
    if [ -n "$earnings22" ] && [ ! -f "$earnings22/metadata.csv" ] && [ ! -f "$earnings22/full_transcripts.json" ]; then
        fail "--earnings22 $earnings22: neither metadata.csv nor full_transcripts.json; give the folder earnings22"
    fi
    [ ${#tiny[@]} = 0 ] || workers=(--workers 1)
    if [ -n "$tedlium" ]; then
        prepare_corpus tedlium-segments tedlium --folder "$tedlium" --unit segments "${workers[@]}"
        prepare_corpus tedlium tedlium --folder "$tedlium" "${workers[@]}"
        mkdir -p "$datasets/tedlium-stm"
        cp "$release"/test/stm/*.stm "$datasets/tedlium-stm/" # for scoring, when TED-LIUM itself may have been deleted
    fi
    if [ -n "$earnings22" ]; then
        prepare_corpus earnings22 earnings22 --folder "$earnings22" "${workers[@]}"
        if [ -f "$earnings22/metadata.csv" ]; then
            prepare_corpus earnings22-full earnings22-full --folder "$earnings22" "${workers[@]}"
        else
            echo "Skipping the full set of Earnings-22: this copy, that of the long-context paper, has only 12 calls."
        fi
    fi
}

prepare_corpus() { # NAME CORPUS ARGUMENTS...
    headline "Preparing $datasets/$1"
    local start=(forward_signals)
    [ -z "${LONG_CONTEXT_JOB:-}" ] || start=(requeue_at_limit on_one_node)
    "${start[@]}" "$PYTHON" -m data.prepare "$2" --out "$datasets/$1" "${@:3}" "${more[@]}"
}

# The seed model is trained on single utterances. It provides the word times, without which talks cannot be cut, and the
# encoder that initialises the models of all contexts, so that they differ only in their context.
train_seed() {
    if [ -z "$seed" ]; then
        is_prepared tedlium-segments || fail "$datasets has no tedlium-segments: run prepare --tedlium DIR, or give --seed"
        headline "Seed model on utterances"
        local start=(--finetune.freeze_encoder_steps 0 --finetune.encoder_learning_rate 0 --optimizer.learning_rate 1e-3)
        [ -z "$pretrained" ] || start=(--finetune.init "$pretrained")
        train_model seed $((frames < 3072 ? 1 : frames / 3072)) --data.dataset "$datasets/tedlium-segments" --data.row_frames 3072 \
            --data.max_segments 16 --data.max_seconds 30 --inference.context_seconds 30 "${start[@]}"
    fi
    if [ -z "$data" ]; then
        is_prepared tedlium || fail "$datasets has no tedlium: run prepare --tedlium DIR, or give --data DATASET"
        headline "Word times of the talks"
        local limits=()
        [ ${#tiny[@]} = 0 ] || limits=(--alignment.max_cost 1000 --device cpu) # accept alignments by an untrained model
        run -m tools.align --data.dataset "$datasets/tedlium" --data.split train --model "$seed_export" \
            --out "$datasets/tedlium-timed" "${limits[@]}"
    fi
}

train_contexts() {
    if is_single_job; then
        train_seed
    elif [ -z "$data" ] && ! is_prepared tedlium-timed; then
        fail "$datasets has no tedlium-timed: run the command seed before the job array"
    fi
    select_contexts "${contexts:-$all_contexts}"
    local context rows
    for context in "${selected[@]}"; do
        [ "$context" -le "$frames" ] || fail "a context of $context frames does not fit into a step of --frames $frames"
        # The most rows that divide the frames of a step exactly and are at least as long as the context.
        rows=$((frames / context))
        while ((frames % rows)); do rows=$((rows - 1)); done
        headline "Context of $context frames: $rows rows of $((frames / rows))"
        train_model "context-$context" "$rows" --data.dataset "${data:-$datasets/tedlium-timed}" \
            --data.row_frames $((frames / rows)) --data.max_seconds "$(seconds "$context")" \
            --inference.context_seconds "$(seconds "$context")" --finetune.init "$seed_export"
    done
}

# has_model CONTEXT: succeed if the model of a context has an export; print a note if its training is not finished.
has_model() {
    [ -e "$models/context-$1/export/config.json" ] || return
    [ -e "$models/context-$1/finished" ] ||
        say "note: the training of the model for context $1 is not finished; its best export so far is evaluated"
}

evaluate() {
    local name context sets=() trained=()
    for name in "${test_sets[@]}"; do ! is_prepared "$name" || sets+=("$name"); done
    [ ${#sets[@]} -gt 0 ] || fail "$datasets has no test set: run prepare first"
    if [ -z "$cross" ]; then
        select_contexts "${contexts:-$all_contexts}"
    else
        read -ra selected <<<"${contexts:-$all_contexts}"
        is_single_job || part=$(array_part)
    fi
    for context in "${selected[@]}"; do
        if has_model "$context"; then
            trained+=("$context")
        elif [ -n "$contexts" ] || ! is_single_job; then
            fail "$models/context-$context has no export: train it first, or omit it from --contexts"
        fi
    done
    [ ${#trained[@]} -gt 0 ] || fail "$models has no models: run train first"
    for name in "${sets[@]}"; do
        if [ -n "$cross" ]; then
            evaluate_cross "$name" "${trained[@]}"
        else
            for context in "${trained[@]}"; do evaluate_own "$name" "$context"; done
        fi
    done
    ! is_single_job || table
}

evaluate_own() { # SET CONTEXT
    headline "Context of $2 frames: $1"
    evaluate_on "$1" --export "$models/context-$2/export" --inference.context_seconds "$(seconds "$2")" \
        --out "$folder/results/$1/context-$2"
}

evaluate_cross() { # SET CONTEXTS...
    headline "All models at all contexts: $1"
    local context exports="" lengths=""
    for context in "${@:2}"; do
        exports+="${exports:+, }$models/context-$context/export"
        lengths+="${lengths:+, }$(seconds "$context")"
    done
    evaluate_on "$1" --export "$models/context-$2/export" --grid.exports "[$exports]" \
        --grid.contexts "[$lengths]" --out "$folder/cross/$1" ${part:+--grid.part "$part"}
}

evaluate_on() { # SET ARGUMENTS...
    local stm=() script=(evaluate.py)
    [ "$1" != tedlium ] || stm=(--stm "$datasets/tedlium-stm")
    [ -z "$cross" ] || script=(-m tools.sweep)
    run "${script[@]}" --data.dataset "$datasets/$1" --data.split test "${stm[@]}" "${@:2}" "${more[@]}"
}

# The tables, and report/SET/report.html, which compares the models of a test set.
table() {
    local name model models_of
    for name in "${test_sets[@]}"; do
        # Finished evaluations. The shortest context comes first, since the others are compared with it.
        mapfile -t models_of < <(
            for model in "$folder/results/$name"/context-*; do
                [ ! -e "$model/results.json" ] || printf '%s\n' "$model"
            done | sort -V
        )
        if [ ${#models_of[@]} -gt 0 ]; then
            headline "Comparison: $name"
            "$PYTHON" -m tools.compare --results "${models_of[@]}" --out "$folder/report/$name"
        fi
    done
    headline "Table"
    "$PYTHON" -m experiments.long_context_table --folder "$folder"
}

seed_export=${seed:-$models/seed/export}
case "$command" in train | seed | evaluate) count_processes ;; esac
case "$command" in
    prepare) prepare ;;
    seed) train_seed ;;
    train) train_contexts ;;
    evaluate) evaluate ;;
    table) table ;;
esac
