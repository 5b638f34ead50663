#!/usr/bin/env bash
# What long context is worth, in small: the same recogniser trained twice on speech whose spelling only the topic of the
# recording tells (the corpus of homophones), on pieces of seconds and of half a minute; both tested on whole recordings
# over contexts from 2 s to all.
#
#   bash experiments/context_effect.sh                 about 7 minutes on 2 cores
#   bash experiments/context_effect.sh --folder DIR    keep everything in DIR (default: runs/context-effect)
#
# Ends with a table, a report with all transcripts and the curve, in DIR/results/contexts. Makes .venv and installs
# requirements.txt first. Finished steps are skipped, interrupted ones continue: after Ctrl-C, or on another day, run
# the same command again. What it measured for us: docs/context_effect.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=runs/context-effect again="${*:+ $*}"
speech=() tiny=() resamples=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --folder)
            [ $# -ge 2 ] || { printf 'error: %s needs a value; --help shows how\n' "$1" >&2; exit 2; }
            folder=$2
            shift 2
            ;;
        --tiny) # for the tests: a few updates of a small model on a minute of speech
            speech=(--train_hours 0.05 --dev_recordings 2 --test_recordings 4 --recording_seconds 20)
            tiny=(--run.steps 2 --run.log_every 1 --encoder.num_layers 1)
            resamples=(--resamples 200)
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; --help lists them\n" "$1" >&2
            exit 2
            ;;
    esac
done

bash launch/setup.sh
python=.venv/bin/python
dataset=$folder/dataset
processes=$(($(nproc) > 1 ? 2 : 1))
began=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

headline "Speech that only context can spell"
$python -m data.prepare homophones "${speech[@]}" --out "$dataset"

# Equal models, updates, seeds, and frames an update; they differ in nothing but the length of the pieces. Pieces are a
# little shorter than 4 and 32 s, so that with the gaps between them whole ones fill a row of 3,200 frames.
train() { # NAME CONTEXT more arguments
    local status=0
    headline "Training on $3"
    bash launch/torchrun.sh -n "$processes" finetune_ctc.py --config configs/context-effect-ctc.yaml \
        --data.dataset "$dataset" --run.folder "$folder/$1" --inference.context_seconds "$2" "${@:4}" "${tiny[@]}" ||
        status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/context_effect.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}
train short 4 "pieces of 4 s" --data.max_seconds 3.9
train long 32 "pieces of 4 s, then of 32 s" --data.max_seconds 3.9 \
    --curriculum '[{after_step: 300, row_frames: 3200, max_seconds: 31.9}]'

headline "Evaluation of both over test contexts"
$python evaluate.py --export "$folder/short/export" --grid.exports "[$folder/long/export]" \
    --grid.contexts '[2, 4, 8, 16, 32, 64, 0]' --data.dataset "$dataset" --data.split test \
    --out "$folder/results/contexts" "${resamples[@]}"

headline "Table"
$python experiments/context_effect_table.py --results "$folder/results/contexts" --own short=4 long=32 \
    --out "$folder/results/context_effect.json" "${resamples[@]}"
printf 'report: %s\ncurve: %s\n' "$folder/results/contexts/report.html" "$folder/results/contexts/curve.svg"
