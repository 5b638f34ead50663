#!/usr/bin/env bash
# Effect of pretraining: recognisers from few labels, with and without unlabelled speech, with seeds and intervals:
#
#   bash experiments/does_pretraining_help.sh --size hour      about an hour on 2 cores: 30 minutes of labels, three
#                                                              systems, equal fine-tuning steps
#   bash experiments/does_pretraining_help.sh --size night     10, 30 and 60 minutes of labels, all systems, also at equal
#                                                              processor time
#   bash experiments/does_pretraining_help.sh --help           all options
#
# Makes .venv and installs requirements.txt first. Finished jobs are skipped and interrupted ones continue: after Ctrl-C,
# run the same command again. Method and measured results: docs/learning.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python -m experiments.learning "$@" # exec: signals reach the runner
