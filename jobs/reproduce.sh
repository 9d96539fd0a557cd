#!/usr/bin/env bash
# Reproduces the results table: trains each model with each seed, on a running Ray cluster or else on this machine.
# Prints the table as Markdown, and writes it to report.md in the comparison's folder. Run again, it resumes.
#
#   jobs/reproduce.sh                          cnn, vgg16 and ResNet-50 from scratch, three seeds each, all epochs
#   MODELS=cnn SEEDS=1 EPOCHS=5 jobs/reproduce.sh --limit 5000
#
# NAME               name of the comparison; the same name continues it
# RAYCIFAR_STORAGE   where it is kept: s3://bucket/runs, or a folder that all nodes share
set -euo pipefail
cd "$(dirname "$0")/.."

name=${NAME:-reproduce} storage=${RAYCIFAR_STORAGE:-results} python=${PYTHON:-python3}
code=0 # 1: a trial failed, and the table shows the others
"$python" -m raycifar.compare --models "${MODELS:-cnn,vgg16,resnet50}" --seeds "${SEEDS:-3}" --pretrained none \
    ${EPOCHS:+--epochs "$EPOCHS"} --name "$name" --storage "$storage" "$@" || code=$?
[ "$code" -le 1 ] || exit "$code"
"$python" -m raycifar.report "$storage/$name" --format md || exit $((code ? code : 1))
"$python" -c 'import sys; from raycifar.storage.run_folder import REPORT_TEXT, RunFolder
print(RunFolder.at(sys.argv[1]).read(REPORT_TEXT).decode())' "$storage/$name"
exit "$code"
