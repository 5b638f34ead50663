#!/usr/bin/env bash
# Full pipeline on a laptop: speech -> shards -> BEST-RQ pretraining -> fine-tuning -> word error rate -> report.
#
#   bash launch/quickstart.sh                    synthetic speech (2 to 3 minutes on 2 cores; prints an estimate first)
#   bash launch/quickstart.sh --corpus fillets   real speech: the Fish Fillets voices of Debian, Czech and Dutch
#   bash launch/quickstart.sh --head rnnt        RNN-T against CTC, both from the pretrained encoder, several decoders
#   bash launch/quickstart.sh --folder DIR       keep all files in DIR (default: runs/quickstart-CORPUS)
#
# Corpora: synthetic (default), fillets. Heads: ctc (default: pretrained encoder against training from scratch), rnnt.
# Makes .venv and installs requirements.txt first. Finished steps are skipped and interrupted ones continue: after
# Ctrl-C, run the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

corpus=synthetic head=ctc folder="" tiny=() again="${*:+ $*}"
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        --corpus | --head | --folder)
            [ $# -ge 2 ] || { printf 'error: %s needs a value; see --help\n' "$1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --tiny) # for tests: a few steps on a few minutes of speech
            tiny=(--run.steps 2 --run.log_every 1)
            shift
            ;;
        *)
            printf "error: unknown argument '%s'; see --help\n" "$1" >&2
            exit 2
            ;;
    esac
done
folder=${folder:-runs/quickstart-$corpus}
case "$corpus" in
    synthetic)
        prepare=(synthetic --test_utterances 120) language=es minutes=15
        [ ${#tiny[@]} -eq 0 ] || prepare+=(--train_hours 0.1 --dev_utterances 4 --test_utterances 4 --test_long_recordings 1 --long_minutes 0.5)
        ;;
    fillets) prepare=(fillets) language=cs minutes=30 ;;
    *)
        printf "error: unknown corpus '%s'; choose synthetic or fillets\n" "$corpus" >&2
        exit 2
        ;;
esac
[[ "$head" = ctc || "$head" = rnnt ]] || {
    printf "error: unknown head '%s'; choose ctc or rnnt\n" "$head" >&2
    exit 2
}

bash launch/setup.sh
python=.venv/bin/python
dataset=$folder/dataset
processes=$(($(nproc) > 1 ? 2 : 1))
start=$SECONDS
headline() { printf '\n== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

# On a CPU, two processes with one thread are faster than one process with two.
train() {
    local status=0
    bash launch/torchrun.sh -n "$processes" "$@" || status=$?
    [ "$status" != 75 ] || printf '\nStopped. The same command continues: bash launch/quickstart.sh%s\n' "$again"
    [ "$status" = 0 ] || exit "$status"
}

if [ ! -d "$folder/pretrain/checkpoints" ]; then # the estimate is for a complete run, not for a resumed one
    printf 'The quickstart will take '
    OMP_NUM_THREADS=$(($(nproc) / processes)) $python -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        launch/quickstart_estimate.py --head "$head" "${tiny[@]+--steps=2}"
fi

headline "Speech and shards: $corpus"
$python -m data.prepare "${prepare[@]}" --out "$dataset"

headline "Pretraining with BEST-RQ"
train pretrain.py --config configs/quickstart-pretrain.yaml --data.dataset "$dataset" \
    --run.folder "$folder/pretrain" "${tiny[@]}"

fine_tune() { # NAME HEAD more arguments
    headline "Fine-tuning with ${2^^}: $1"
    train "finetune_$2.py" --config "configs/quickstart-$2.yaml" --data.dataset "$dataset" --run.folder "$folder/$1" \
        --finetune.language "$language" --finetune.label_minutes "$minutes" "${@:3}" "${tiny[@]}"
}

evaluated=()
evaluate() { # NAME EXPORT more arguments
    headline "Evaluation on whole recordings: $1"
    $python evaluate.py --export "$folder/$2/export" --data.dataset "$dataset" --data.split test \
        --data.language "$language" --inference.context_seconds 10 --name "$1" --out "$folder/results/$1" "${@:3}"
    evaluated+=("$1=$folder/results/$1")
}

from_pretrained=(--finetune.init "$folder/pretrain/export" --finetune.reinitialise_top_blocks 2)
fine_tune pretrained ctc "${from_pretrained[@]}"
if [ "$head" = ctc ]; then
    fine_tune scratch ctc
    evaluate pretrained pretrained
    evaluate scratch scratch
else
    fine_tune rnnt rnnt "${from_pretrained[@]}"
    headline "N-gram language model of the transcripts"
    $python -m tools.train_ngram --export "$folder/rnnt/export" --data.dataset "$dataset" --data.language "$language" \
        --out "$folder/lm.arpa"
    evaluate pretrained pretrained
    evaluate rnnt rnnt
    evaluate rnnt-beam rnnt --decoder.beam 4
    evaluate rnnt-beam-lm rnnt --decoder.beam 4 \
        --decoder.language_model "$folder/lm.arpa" --decoder.label_bonus 0.5
    evaluate rnnt-ctc-head rnnt --decoder.head ctc
fi

headline "Report"
$python launch/quickstart_report.py --pretrain "$folder/pretrain" --systems "${evaluated[@]}" --out "$folder/report.html"
