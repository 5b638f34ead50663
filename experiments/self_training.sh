#!/usr/bin/env bash
# Self-training: a seed model is fine-tuned on a few labels; it transcribes the recordings without labels; the most
# confident of its hypotheses are the pseudo-labels of the next model, which is fine-tuned on labels and pseudo-labels.
#
#   bash experiments/self_training.sh --dataset DATASET --language cs --minutes 30 --folder runs/self-training
#
#   --dataset DATASET      labels, development and test set (splits train, dev, test)
#   --language CODE        language of labels, pseudo-labels and evaluation (default: all)
#   --minutes N            minutes of labels, chosen by the seed; the rest of the split is unlabelled (default: 30). With
#                          --unlabelled, 0 takes all labels
#   --unlabelled DATASET   recordings to transcribe instead of the rest; several rounds use the same ones
#   --init EXPORT          pretrained encoder of every model, the export of pretrain.py (default: none)
#   --config FILE          recipe; its name ends in -ctc.yaml or -rnnt.yaml (default: configs/quickstart-ctc.yaml)
#   --rounds N             models after the seed model (default: 1)
#   --keep SHARE           share of the unlabelled audio to keep, the most confident first (default: 0.7)
#   --weight W             share of pseudo-labels in training, relative to 1 for the labels (default: 1)
#   --seed N               seed of labels, order and weights (default: 0)
#   --student "ARGUMENTS"  further settings of the models after the seed model, such as "--run.steps 2000"
#   --decoder "ARGUMENTS"  decoder of the pseudo-labels, such as "--decoder.beam 8 --decoder.language_model lm.arpa"
#   --folder DIR           keep everything in DIR (default: runs/self-training)
#   -- ARGUMENTS           further settings of the fine-tuning of all models
#
# Writes DIR/seed, DIR/round-N (models), DIR/pseudo-N (datasets with precision.svg), DIR/results (error rates on the test
# split, and their paired comparison). Finished steps are skipped and interrupted ones continue when the same command is
# run again. Method and measurements: docs/self_training.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

again="${*:+ $*}"
dataset="" language="" minutes=30 unlabelled="" init="" config=configs/quickstart-ctc.yaml rounds=1 keep=0.7 weight=1
seed=0 student="" decoder="" folder=runs/self-training resamples=() more=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --dataset | --language | --minutes | --unlabelled | --init | --config | --rounds | --keep | --weight | --seed | \
            --student | --decoder | --folder)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --tiny) # for the tests: two steps of a small model
            more=(--run.steps 2 --run.log_every 1 --encoder.num_layers 1 --data.min_seconds 0.1)
            resamples=(--resamples 200)
            shift
            ;;
        --)
            shift
            more+=("$@")
            break
            ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done
[ -n "$dataset" ] || fail "--dataset is missing: give a folder written by data.prepare"
[[ -n "$unlabelled" || ! "$minutes" =~ ^0*\.?0*$ ]] ||
    fail "--minutes is '$minutes', which uses the labels of all recordings: give fewer minutes, or --unlabelled DATASET"
[[ "$rounds" =~ ^[1-9][0-9]*$ ]] || fail "--rounds is '$rounds': give a positive integer"
case "$config" in
    *-ctc.yaml) script=finetune_ctc.py ;;
    *-rnnt.yaml) script=finetune_rnnt.py ;;
    *) fail "--config is '$config': its name must end in -ctc.yaml or -rnnt.yaml, which selects the script" ;;
esac
read -ra student <<<"$student"
read -ra decoder <<<"$decoder"

bash launch/setup.sh
python=.venv/bin/python
processes=$(($(nproc) > 1 ? 2 : 1))
! nvidia-smi >/dev/null 2>&1 || processes=$($python -c 'import torch; print(max(1, torch.cuda.device_count()))')
start=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

fine_tune() { # NAME more arguments
    local status=0
    headline "Fine-tuning: $1"
    bash launch/torchrun.sh -n "$processes" "$script" --config "$config" --run.folder "$folder/$1" \
        --run.seed "$seed" --data.seed "$seed" --finetune.init "$init" --finetune.language "$language" \
        --finetune.label_minutes "$minutes" "${more[@]}" "${@:2}" || status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash experiments/self_training.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}

evaluate() { # NAME
    headline "Evaluation: $1"
    $python evaluate.py --export "$folder/$1/export" --data.dataset "$dataset" --data.split test \
        --data.language "$language" --name "$1" --out "$folder/results/$1" "${resamples[@]}"
}

fine_tune seed --data.dataset "$dataset"
evaluate seed
teacher=seed results=("$folder/results/seed")
for round in $(seq "$rounds"); do
    headline "Pseudo-labels by $teacher"
    pseudo=$folder/pseudo-$round
    # Recordings of another dataset are all unlabelled; those of the same one without the labels of fine_tune.
    left_out=(--labels.minutes "$minutes" --labels.seed "$seed" --labels.language "$language")
    [ -z "$unlabelled" ] || left_out=()
    $python -m tools.pseudo_label --export "$folder/$teacher/export" --data.dataset "${unlabelled:-$dataset}" \
        --data.language "$language" --filter.keep "$keep" "${left_out[@]}" "${decoder[@]}" --out "$pseudo"
    fine_tune "round-$round" --data.dataset "" --data.mixture \
        "[{dataset: $dataset, weight: 1}, {dataset: $pseudo, weight: $weight, pseudo_labels: true}]" "${student[@]}"
    teacher=round-$round
    evaluate "$teacher"
    results+=("$folder/results/$teacher")
done

headline "Comparison with the seed model"
$python -m tools.compare --results "${results[@]}" --title "Self-training" --out "$folder/results/compare" "${resamples[@]}"
