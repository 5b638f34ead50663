#!/usr/bin/env bash
# The effect of long context on a small scale: two models are trained on speech with homophones whose spelling depends
# on the topic of the recording, one on segments of 4 s and one on segments of up to 32 s. Both are evaluated on whole
# recordings with contexts from 2 s to the whole recording.
#
#   bash experiments/context_effect.sh                 about 7 minutes on 2 cores
#   bash experiments/context_effect.sh --folder DIR    keep everything in DIR (default: runs/context-effect)
#
# Prints a table, and writes a report with all transcripts and the curve into DIR/results/contexts. Makes .venv and
# installs requirements.txt first. Finished steps are skipped and interrupted ones continue: after Ctrl-C, run the same
# command again. Measured results: docs/context_effect.md.
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
            [ $# -ge 2 ] || { printf 'error: %s needs a value; see --help\n' "$1" >&2; exit 2; }
            folder=$2
            shift 2
            ;;
        --tiny) # for the tests: two steps of a small model on a few minutes of speech
            speech=(--train_hours 0.05 --dev_recordings 2 --test_recordings 4 --recording_seconds 20)
            tiny=(--run.steps 2 --run.log_every 1 --encoder.num_layers 1)
            resamples=(--resamples 200)
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; see --help\n" "$1" >&2
            exit 2
            ;;
    esac
done

bash launch/setup.sh
python=.venv/bin/python
dataset=$folder/dataset
processes=$(($(nproc) > 1 ? 2 : 1))
start=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

headline "Speech with homophones"
$python -m data.prepare homophones "${speech[@]}" --out "$dataset"

# The two runs differ only in the length of the segments: model, seed, steps and frames per step are equal. Segments are
# slightly shorter than 4 and 32 s, so that they fit into a row of 3,200 frames with the gaps between them.
train() { # NAME CONTEXT more arguments
    local status=0
    headline "Training on $3"
    bash launch/torchrun.sh -n "$processes" finetune_ctc.py --config configs/context-effect-ctc.yaml \
        --data.dataset "$dataset" --run.folder "$folder/$1" --inference.context_seconds "$2" "${@:4}" "${tiny[@]}" ||
        status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/context_effect.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}
train short 4 "segments of 4 s" --data.max_seconds 3.9
train long 32 "segments of 4 s, then of 32 s" --data.max_seconds 3.9 \
    --curriculum '[{after_step: 300, row_frames: 3200, max_seconds: 31.9}]'

headline "Evaluation of both models with all contexts"
$python -m tools.sweep --export "$folder/short/export" --grid.exports "[$folder/long/export]" \
    --grid.contexts '[2, 4, 8, 16, 32, 64, 0]' --data.dataset "$dataset" --data.split test \
    --out "$folder/results/contexts" "${resamples[@]}"

headline "Table"
$python -m experiments.context_effect_table --results "$folder/results/contexts" --own short=4 long=32 \
    --out "$folder/results/context_effect.json" "${resamples[@]}"
printf 'report: %s\ncurve: %s\n' "$folder/results/contexts/report.html" "$folder/results/contexts/curve.svg"
