#!/usr/bin/env bash
# Does pretraining help? Recognisers from 10 to 60 minutes of labels, with and without unlabelled speech, at equal
# fine-tuning steps (self-training: twice the steps) and at equal processor time, with seeds and intervals:
#
#   bash experiments/does_pretraining_help.sh --size hour      about an hour on 2 cores
#   bash experiments/does_pretraining_help.sh --size night     all systems, amounts of labels and seeds
#   bash experiments/does_pretraining_help.sh --help           all options
#
# Makes .venv and installs requirements.txt first. Finished jobs are skipped and interrupted ones continue: after Ctrl-C,
# run the same command again. Method and measured results: docs/learning.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python -m experiments.learning "$@" # exec: signals reach the runner
