#!/usr/bin/env bash
# The whole road on a laptop: speech -> shards -> BEST-RQ pretraining -> CTC fine-tuning -> word error rate -> report.
#
#   bash launch/quickstart.sh                    on synthetic speech, made on the spot (about 8 minutes on 2 cores)
#   bash launch/quickstart.sh --corpus fillets   on real speech: the Fish Fillets voices of Debian, Czech and Dutch
#   bash launch/quickstart.sh --folder DIR       keep everything in DIR (default: runs/quickstart-CORPUS)
#
# Corpora: synthetic (default), fillets. Makes .venv and installs requirements.txt first. Finished steps are skipped,
# interrupted ones continue: after Ctrl-C, or on another day, run the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

corpus=synthetic folder="" tiny=() again="${*:+ $*}"
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --corpus | --folder)
            [ $# -ge 2 ] || { printf 'error: %s needs a value; --help shows how\n' "$1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --tiny) # for the tests: a few steps on a few minutes of speech
            tiny=(--run.steps 2 --run.log_every 1)
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; --help lists them\n" "$1" >&2
            exit 2
            ;;
    esac
done
folder=${folder:-runs/quickstart-$corpus}
case "$corpus" in
    synthetic)
        prepare=(synthetic --test_utterances 120) labels=(--finetune.language es --finetune.label_minutes 15) language=(--data.language es) from_pretrained=(--finetune.reinitialise_top_blocks 4)
        [ ${#tiny[@]} -eq 0 ] || prepare+=(--train_hours 0.1 --dev_utterances 4 --test_utterances 4 --test_long_recordings 1 --long_minutes 0.5)
        ;;
    fillets)
        prepare=(fillets) labels=(--finetune.language cs --finetune.label_minutes 30) language=(--data.language cs)
        from_pretrained=(--finetune.reinitialise_top_blocks 4)
        ;;
    *)
        printf "error: unknown corpus '%s'. The quickstart knows: synthetic, fillets\n" "$corpus" >&2
        exit 2
        ;;
esac

bash launch/setup.sh
python=.venv/bin/python
dataset=$folder/dataset
processes=$(($(nproc) > 1 ? 2 : 1))
began=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

# Two processes, as on a cluster: on a CPU they are faster than one with two threads.
train() {
    local status=0
    bash launch/torchrun.sh -n "$processes" "$@" || status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash launch/quickstart.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}

headline "Speech and shards: $corpus"
$python -m data.prepare "${prepare[@]}" --out "$dataset"

headline "Pretraining with BEST-RQ"
train pretrain.py --config configs/quickstart-pretrain.yaml --data.dataset "$dataset" \
    --run.folder "$folder/pretrain" "${tiny[@]}"

for system in pretrained scratch; do
    headline "CTC fine-tuning: $system"
    init=()
    [ "$system" = scratch ] || init=(--finetune.init "$folder/pretrain/export" "${from_pretrained[@]}")
    train finetune_ctc.py --config configs/quickstart-ctc.yaml --data.dataset "$dataset" \
        --run.folder "$folder/$system" "${labels[@]}" "${init[@]}" "${tiny[@]}"
done

for system in pretrained scratch; do
    headline "Evaluation on whole recordings: $system"
    $python evaluate.py --export "$folder/$system/export" --data.dataset "$dataset" --data.split test "${language[@]}" \
        --inference.context_seconds 10 --name "$system" --out "$folder/results/$system"
done

headline "Report"
$python launch/quickstart_report.py --pretrain "$folder/pretrain" \
    --systems "pretrained=$folder/results/pretrained" "scratch=$folder/results/scratch" --out "$folder/report.html"
