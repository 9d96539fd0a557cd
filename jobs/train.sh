#!/usr/bin/env bash
# Submits the training of one model to a Ray cluster, and follows it.
#
#   jobs/train.sh                          VGG-16, on as many GPUs as there are
#   MODEL=resnet50 jobs/train.sh --workers 1:8 --epochs 20
#
# MODEL              cnn, vgg16, resnet50 or timm:NAME
# NAME               name of the run; the same name continues it
# RAYCIFAR_STORAGE   where it is kept: s3://bucket/runs, or a folder that all nodes share
# RAY_ADDRESS        the cluster's dashboard; by default http://127.0.0.1:8265
set -euo pipefail
cd "$(dirname "$0")/.."

model=${MODEL:-vgg16}
name=${NAME:-${model//:/-}}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
exec ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml --submission-id "$name-$(date +%s)" \
    --metadata-json "{\"job_name\": \"$name\"}" -- \
    python -m raycifar.train --model "$model" --name "$name" \
    --storage "${RAYCIFAR_STORAGE:-~/raycifar-runs}" "$@"
