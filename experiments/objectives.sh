#!/usr/bin/env bash
# Ablation of pretraining objectives (docs/objectives.md): encoders are pretrained on twelve targets and with other
# changes of the objective, with equal steps, fine-tuned with equal settings, and evaluated. tools/gauge.py judges the
# twelve targets without training, and its figures are correlated with the error rates.
#
#   bash experiments/objectives.sh                   synthetic speech with exact phones; 20 pretraining runs
#   bash experiments/objectives.sh --seeds "0 1 2"   seeds of the fine-tuning, all with the same labels (default: 0 1)
#   bash experiments/objectives.sh --folder DIR      keep everything in DIR (default: runs/objectives)
#   further options: --pretraining-steps N (1200), --fine-tuning-steps N (400), --label-minutes N (15)
#
# Prints a table of CERs against one random codebook of 1,024 codes, and Spearman's rank correlation of every figure of
# the gauge with the CER; writes DIR/objectives.json and DIR/correlation.json. Makes .venv and installs requirements.txt
# first. Finished steps are skipped and interrupted ones continue: after Ctrl-C, run the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=runs/objectives again="${*:+ $*}"
seeds="0 1" pretraining_steps=1200 fine_tuning_steps=400 label_minutes=15
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
    bash launch/torchrun.sh -n 1 "$@" --data.dataset "$dataset" || status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/objectives.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}
fine_tune() { # NAME SEED more arguments
    train finetune_ctc.py --config configs/quickstart-ctc.yaml --run.folder "$folder/$1" --run.steps "$fine_tuning_steps" \
        --finetune.language es --finetune.label_minutes "$label_minutes" --run.seed "$2" "${@:3}"
}

headline "Speech with exact phones"
$python -m data.prepare synthetic --test_utterances 120 --out "$dataset"

targets=() results=() correlated=()
eighth=$((pretraining_steps / 8))
evaluate() { # NAME [more arguments of the fine-tunings]
    local seed evaluations=""
    for seed in $seeds; do
        headline "$1: fine-tuning with seed $seed, and evaluation"
        fine_tune "$1/seed-$seed" "$seed" "${@:2}"
        [ -f "$folder/$1/results-$seed/results.json" ] ||
            $python evaluate.py --export "$folder/$1/seed-$seed/export" --data.dataset "$dataset" --data.split test \
                --data.language es --inference.context_seconds 10 --name "$1" --out "$folder/$1/results-$seed"
        evaluations+=${evaluations:+,}$folder/$1/results-$seed
    done
    results+=("$1=$evaluations")
}
variant() { # NAME settings of pretrain.py
    headline "$1: pretraining"
    train pretrain.py --config configs/quickstart-pretrain.yaml --run.folder "$folder/$1/pretrain" \
        --run.steps "$pretraining_steps" "${@:2}"
    evaluate "$1" --finetune.init "$folder/$1/pretrain/export" --finetune.reinitialise_top_blocks 1
}
target() { # NAME, specification for the gauge, and settings of pretrain.py
    variant "$1" "${@:3}"
    targets+=("$2,name=$1")
    correlated+=("${results[-1]}")
}
pca=(--quantizer.pca_steps "$eighth")
refined=("${pca[@]}" --quantizer.refine_window "$eighth"
    --quantizer.refine_steps "[$((2 * eighth)), $((3 * eighth)), $((4 * eighth))]")
target random-16 random,codebook_size=16 --quantizer.codebook_size 16
target random-256 random,codebook_size=256 --quantizer.codebook_size 256
target random-1024 random,codebook_size=1024
target random-8192 random,codebook_size=8192 --quantizer.codebook_size 8192
target four-random random,codebook_size=1024,num_codebooks=4 --quantizer.num_codebooks 4
target pca pca,codebook_size=1024 "${pca[@]}"
target pca-whitened pca,codebook_size=1024,whitening=0.5 "${pca[@]}" --quantizer.whitening 0.5
target refined-64 refined,codebook_size=64,refinements=3 --quantizer.codebook_size 64 "${refined[@]}"
target refined-256 refined,codebook_size=256,whitening=0.5,refinements=3 \
    --quantizer.codebook_size 256 --quantizer.whitening 0.5 "${refined[@]}"

headline "Teacher from the labels"
fine_tune teacher 0
first=$folder/random-1024/pretrain/export labels=$folder/teacher/export
target clusters-pretrained "clusters,export=$first,clusters=100" \
    --targets.source teacher --targets.export "$first" --targets.clusters 100
target clusters-supervised "clusters,export=$labels,clusters=100" \
    --targets.source teacher --targets.export "$labels" --targets.clusters 100
target ctc-labels "ctc_labels,export=$labels" \
    --targets.source teacher --targets.export "$labels" --targets.kind ctc_labels

variant ctc-posteriors --targets.source teacher --targets.export "$labels" --targets.kind ctc_posteriors
variant labels-and-codes --targets.source both --targets.export "$labels" --targets.kind ctc_labels
variant distilled --quantizer.num_codebooks 2 --targets.distill_layers "[2, 3]" \
    --targets.distill_steps "[$((2 * eighth)), $((4 * eighth))]"
variant inner-layers --targets.inner_layers "[2]"
variant unmasked-frames --targets.unmasked_weight 0.5
variant mel-masks --masking.bands 2
variant other-sounds --masking.mix_probability 0.2
variant dynamic-chunks --encoder.mask chunk --encoder.dynamic_chunks true
headline "From scratch"
evaluate scratch

headline "Table"
$python -m experiments.objectives_table --results "${results[@]}" --baseline random-1024 --out "$folder/objectives.json"
headline "Target laboratory"
[ -f "$folder/gauge/gauge.json" ] || $python -m tools.gauge "$dataset" --out "$folder/gauge" --targets "${targets[@]}"
headline "Rank correlation with the CER"
$python -m tools.gauge_correlation --gauge "$folder/gauge/gauge.json" --results "${correlated[@]}" \
    --out "$folder/correlation.json"
