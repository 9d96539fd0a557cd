#!/usr/bin/env bash
# Submits the study, a comparison of all three models with three seeds each, and follows it.
#
#   jobs/compare.sh                        each model with its default recipe
#   jobs/compare.sh --search 20            first search for each model's best recipe
#
# NAME               name of the comparison; the same name continues it
# RAYCIFAR_STORAGE   where it is kept: s3://bucket/runs, or a folder that all nodes share
# RAY_ADDRESS        the cluster's dashboard; by default http://127.0.0.1:8265
set -euo pipefail
cd "$(dirname "$0")/.."

name=${NAME:-study}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
exec ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml --submission-id "$name-$(date +%s)" \
    --metadata-json "{\"job_name\": \"$name\"}" -- \
    python -m raycifar.compare --models "${MODELS:-cnn,resnet50,vgg16}" --seeds 3 --name "$name" \
    --storage "${RAYCIFAR_STORAGE:-~/raycifar-runs}" "$@"
