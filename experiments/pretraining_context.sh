#!/usr/bin/env bash
# Effect of context in pretraining: encoders are pretrained on segments of 4, 16 and 64 s (the last one with a
# curriculum from 4 over 16 to 64 s), with equal steps and frames per step. All are fine-tuned with the same settings,
# as is an encoder from scratch, and evaluated on whole recordings with contexts of 4, 16 and 64 s.
#
#   bash experiments/pretraining_context.sh                     synthetic homophones; about 30 minutes on one core
#   bash experiments/pretraining_context.sh --dataset DIR       any prepared dataset with recordings of a minute or more,
#                                                               with train, dev and test splits, transcripts, word times
#   bash experiments/pretraining_context.sh --seeds "0 1 2"     several seeds; the table pools them
#   bash experiments/pretraining_context.sh --folder DIR        keep everything in DIR (default: runs/pretraining-context)
#   further options: --pretraining-steps N (600), --fine-tuning-steps N (300), --label-minutes N (60)
#
# Prints a table with paired differences to the encoder pretrained on 4 s, and writes DIR/pretraining_context.json and
# .svg. Makes .venv and installs requirements.txt first. Finished steps are skipped and interrupted ones continue: after
# Ctrl-C, run the same command again. Measured results: docs/pretraining_context.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=runs/pretraining-context again="${*:+ $*}"
dataset="" seeds=0 pretraining_steps=600 fine_tuning_steps=300 label_minutes=60
speech=() tiny=() resamples=() homophones=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --folder | --dataset | --seeds | --pretraining-steps | --fine-tuning-steps | --label-minutes)
            [ $# -ge 2 ] || { printf 'error: %s needs a value; see --help\n' "$1" >&2; exit 2; }
            name=${1#--}
            printf -v "${name//-/_}" '%s' "$2"
            shift 2
            ;;
        --tiny) # for the tests: a few steps of a small model on a few minutes of speech
            speech=(--train_hours 0.05 --dev_recordings 2 --test_recordings 4)
            tiny=(--run.log_every 1 --checkpoint.every_steps 1 --encoder.num_layers 1 --encoder.dim 16 --encoder.feedforward_dim 16)
            resamples=(--resamples 200)
            pretraining_steps=3 fine_tuning_steps=2
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; see --help\n" "$1" >&2
            exit 2
            ;;
    esac
done
for steps in "$pretraining_steps" "$fine_tuning_steps"; do
    [[ "$steps" =~ ^[1-9][0-9]*$ ]] || { printf "error: steps '%s': give a whole number above 0\n" "$steps" >&2; exit 2; }
done
[ "$pretraining_steps" -ge 3 ] && [ "$fine_tuning_steps" -ge 2 ] ||
    { printf 'error: give at least 3 pretraining steps and 2 fine-tuning steps, one per stage\n' >&2; exit 2; }

bash launch/setup.sh
python=.venv/bin/python
start=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

if [ -z "$dataset" ]; then
    dataset=$folder/dataset homophones=(--homophones)
    headline "Speech with homophones, in recordings of a minute"
    $python -m data.prepare homophones --recording_seconds 60 "${speech[@]}" --out "$dataset"
fi

train() { # HEADLINE SCRIPT arguments
    local status=0
    headline "$1"
    bash launch/torchrun.sh -n 1 "${@:2}" --data.dataset "$dataset" --run.seed "$seed" --data.seed "$seed" "${tiny[@]}" ||
        status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/pretraining_context.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}

# The pretraining runs differ only in the length of the segments. 3.9 and 15.9 s, so that 16 and 4 of them fit into a row
# of 6,400 frames with the gaps between them.
pretrain() { # CONTEXT more arguments
    train "Seed $seed: pretraining on segments of $1 s" pretrain.py --config configs/pretraining-context.yaml \
        --run.folder "$runs/pretrained-$1" --run.steps "$pretraining_steps" "${@:2}"
}
# Short segments first: CTC learns to align them sooner.
finetune() { # NAME more arguments
    train "Seed $seed: fine-tuning, $1" finetune_ctc.py --config configs/pretraining-context-ctc.yaml \
        --run.folder "$runs/$1" --run.steps "$fine_tuning_steps" --finetune.label_minutes "$label_minutes" \
        --curriculum "[{after_step: $((fine_tuning_steps / 2)), row_frames: 6400, max_seconds: 15.9}]" "${@:2}"
}
results=()
for seed in $seeds; do
    runs=$folder/seed-$seed
    third=$((pretraining_steps / 3))
    pretrain 4 --data.max_seconds 3.9
    pretrain 16 --data.max_seconds 15.9
    pretrain 64 --data.max_seconds 3.9 --curriculum \
        "[{after_step: $third, row_frames: 6400, max_seconds: 15.9}, {after_step: $((2 * third)), row_frames: 6400, max_seconds: 64}]"
    finetune scratch
    for context in 4 16 64; do
        finetune "context-$context" --finetune.init "$runs/pretrained-$context/export"
    done
    headline "Seed $seed: evaluation of all encoders with all contexts"
    $python -m tools.sweep --export "$runs/context-4/export" \
        --grid.exports "[$runs/context-16/export, $runs/context-64/export, $runs/scratch/export]" \
        --grid.contexts '[4, 16, 64]' --data.dataset "$dataset" --data.split test --out "$runs/results/contexts" "${resamples[@]}"
    results+=("$runs/results/contexts")
done

headline "Table"
$python -m experiments.pretraining_context_table --results "${results[@]}" --baseline context-4 "${homophones[@]}" \
    --out "$folder/pretraining_context.json" --figure "$folder/pretraining_context.svg" "${resamples[@]}"
