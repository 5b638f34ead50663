#!/usr/bin/env bash
# Correlation of the target laboratory's figures with error rates: encoders are pretrained on twelve targets with equal
# steps, fine-tuned with equal settings, and evaluated; tools/gauge.py judges the same targets without training.
#
#   bash experiments/gauge_correlation.sh                   synthetic speech with exact phones; about 25 minutes on 2 cores
#   bash experiments/gauge_correlation.sh --seeds "0 1 2"   seeds of the fine-tuning (default: 0 1)
#   bash experiments/gauge_correlation.sh --folder DIR      keep everything in DIR (default: runs/gauge-correlation)
#   further options: --pretraining-steps N (1200), --fine-tuning-steps N (400), --label-minutes N (15)
#
# Prints Spearman's rank correlation of every figure with the mean CER, and writes DIR/correlation.json. Makes .venv and
# installs requirements.txt first. Finished steps are skipped and interrupted ones continue: after Ctrl-C, run the same
# command again. Measured results: docs/targets.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=runs/gauge-correlation again="${*:+ $*}"
seeds="0 1" pretraining_steps=1200 fine_tuning_steps=400 label_minutes=15
speech=(--test_utterances 120) tiny=() gauge=() resamples=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --folder | --seeds | --pretraining-steps | --fine-tuning-steps | --label-minutes)
            [ $# -ge 2 ] || { printf 'error: %s needs a value; see --help\n' "$1" >&2; exit 2; }
            name=${1#--}
            printf -v "${name//-/_}" '%s' "$2"
            shift 2
            ;;
        --tiny) # for the tests: a few steps of a small model on a few minutes of speech
            speech=(--train_hours 0.1 --dev_utterances 6 --test_utterances 4 --test_long_recordings 1 --long_minutes 0.2)
            tiny=(--run.log_every 1 --encoder.num_layers 1 --encoder.dim 16 --encoder.feedforward_dim 16)
            gauge=(--data.minutes 0.3 --data.fit_minutes 2)
            resamples=(--resamples 100)
            seeds=0 pretraining_steps=8 fine_tuning_steps=2 label_minutes=0.5
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; see --help\n" "$1" >&2
            exit 2
            ;;
    esac
done
[[ "$pretraining_steps" =~ ^[1-9][0-9]*$ ]] && [ "$pretraining_steps" -ge 8 ] ||
    { printf "error: pretraining steps '%s': give a whole number of at least 8\n" "$pretraining_steps" >&2; exit 2; }

bash launch/setup.sh
python=${PYTHON:-.venv/bin/python}
dataset=$folder/dataset
start=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }
train() {
    local status=0
    bash launch/torchrun.sh -n 1 "$@" --data.dataset "$dataset" "${tiny[@]}" || status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/gauge_correlation.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}
fine_tune() { # NAME SEED more arguments
    train finetune_ctc.py --config configs/quickstart-ctc.yaml --run.folder "$folder/$1" --run.steps "$fine_tuning_steps" \
        --finetune.language es --finetune.label_minutes "$label_minutes" --run.seed "$2" --data.seed "$2" "${@:3}"
}

headline "Speech with exact phones"
$python -m data.prepare synthetic "${speech[@]}" --out "$dataset"

targets=() results=()
eighth=$((pretraining_steps / 8))
add() { # NAME, specification for the gauge, and settings of pretrain.py
    headline "Target $1: pretraining"
    train pretrain.py --config configs/quickstart-pretrain.yaml --run.folder "$folder/$1/pretrain" \
        --run.steps "$pretraining_steps" "${@:3}"
    local seed evaluations=""
    for seed in $seeds; do
        headline "Target $1: fine-tuning with seed $seed, and evaluation"
        fine_tune "$1/seed-$seed" "$seed" --finetune.init "$folder/$1/pretrain/export" --finetune.reinitialise_top_blocks 1
        [ -f "$folder/$1/results-$seed/results.json" ] ||
            $python evaluate.py --export "$folder/$1/seed-$seed/export" --data.dataset "$dataset" --data.split test \
                --data.language es --inference.context_seconds 10 --name "$1" --out "$folder/$1/results-$seed" "${resamples[@]}"
        evaluations+=${evaluations:+,}$folder/$1/results-$seed
    done
    targets+=("$2,name=$1")
    results+=("$1=$evaluations")
}
refine=("[$((2 * eighth)), $((3 * eighth)), $((4 * eighth))]" --quantizer.refine_window "$eighth")
pca=(--quantizer.pca_steps "$eighth")
refined=("${pca[@]}" --quantizer.refine_steps "${refine[@]}")
add random-16 random,codebook_size=16 --quantizer.codebook_size 16
add random-256 random,codebook_size=256 --quantizer.codebook_size 256
add random-1024 random,codebook_size=1024
add random-8192 random,codebook_size=8192 --quantizer.codebook_size 8192
add four-random random,codebook_size=1024,num_codebooks=4 --quantizer.num_codebooks 4
add pca pca,codebook_size=1024 "${pca[@]}"
add pca-whitened pca,codebook_size=1024,whitening=0.5 "${pca[@]}" --quantizer.whitening 0.5
add refined-64 refined,codebook_size=64,refinements=3 --quantizer.codebook_size 64 "${refined[@]}"
add refined-256 refined,codebook_size=256,whitening=0.5,refinements=3 --quantizer.codebook_size 256 --quantizer.whitening 0.5 "${refined[@]}"

headline "Teacher from the labels"
fine_tune teacher 0
teacher() { printf '%s\n' --targets.source teacher --targets.export "$1" "${@:2}"; }
mapfile -t settings < <(teacher "$folder/random-1024/pretrain/export" --targets.clusters 100)
add clusters-pretrained "clusters,export=$folder/random-1024/pretrain/export,clusters=100" "${settings[@]}"
mapfile -t settings < <(teacher "$folder/teacher/export" --targets.clusters 100)
add clusters-supervised "clusters,export=$folder/teacher/export,clusters=100" "${settings[@]}"
mapfile -t settings < <(teacher "$folder/teacher/export" --targets.kind ctc_labels)
add ctc-labels "ctc_labels,export=$folder/teacher/export" "${settings[@]}"

headline "Target laboratory"
[ -f "$folder/gauge/gauge.json" ] ||
    $python -m tools.gauge "$dataset" --out "$folder/gauge" "${gauge[@]}" --targets "${targets[@]}"
headline "Rank correlation with the CER"
$python -m tools.gauge_correlation --gauge "$folder/gauge/gauge.json" --results "${results[@]}" \
    --out "$folder/correlation.json" "${resamples[@]}"
