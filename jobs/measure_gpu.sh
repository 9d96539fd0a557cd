#!/usr/bin/env bash
# Measures what only a GPU can show: the tests that need one, the speedrun, full recipes, long runs with Muon (untried so
# far), step times, predicted speed for 1 to 8 workers, and the same training with PIL and a DataLoader. Each result is
# appended to a JSON Lines file as soon as it is there. Run again, it does only what is missing; an interrupted run
# resumes.
#
#   jobs/measure_gpu.sh 60                 stop within 60 minutes
#   jobs/measure_gpu.sh 60 gpu.jsonl       write results to gpu.jsonl, and keep runs beside it, in gpu-runs/
#
# RAYCIFAR_DATA  where the images are
# SMALL=1        measures very little, on any machine, to check that the script works
set -uo pipefail
minutes=${1:?give the minutes that it may take} file=${2:-gpu.jsonl}
file=$(realpath -m "$file") runs=$(dirname "$(realpath -m "$file")")/gpu-runs
cd "$(dirname "$0")/.."
mkdir -p "$runs"
deadline=$((SECONDS + minutes * 60))
python=${PYTHON:-python3}
few=() times=20 size=(--limit 5000 --rounds 3) tests=(tests/test_{cuda,train_step,checkpoint,torch_internals}.py)
if [ -n "${SMALL:-}" ]; then
    few=(--limit 100 --val-size 100 --epochs 1 --batch-size 20) times=1
    size=(--limit 100 --val-size 100 --rounds 1 --batch-size 20) tests=(tests/test_cuda.py)
fi

# measure NAME SECONDS RESULT COMMAND...: run a command, unless it was run or would take too long, and keep its result.
measure() {
    local name=$1 seconds=$2 result=$3 left=$((deadline - SECONDS)) began=$SECONDS code=0
    shift 3
    grep -q "\"name\": \"$name\", \"code\": 0" "$file" 2> /dev/null && return
    if [ "$left" -lt "$seconds" ]; then
        echo "$name takes about $seconds s, and $left s are left: skipped"
        return
    fi
    echo "== $name: $*"
    timeout --signal=INT --kill-after=30 "$left" "$@" > >(tee "$runs/$name.log") 2>&1 || code=$?
    "$python" - "$name" "$code" "$((SECONDS - began))" "$runs/$name.log" "$result" "$*" >> "$file" << 'PYTHON'
import json, pathlib, platform, sys
from datetime import datetime, timezone

import torch

name, code, seconds, log, result, command = sys.argv[1:]
card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
record = {"name": name, "code": int(code), "seconds": int(seconds), "command": command, "card": card}
record |= {"torch": torch.__version__, "cuda": torch.version.cuda, "time": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
place = pathlib.Path(result)
record["result"] = json.loads(place.read_text()) if result and place.is_file() else pathlib.Path(log).read_text()[-2000:]
print(json.dumps(record))
PYTHON
    echo "== $name: exit code $code after $((SECONDS - began)) s"
}

train() { # train NAME SECONDS OPTION...
    local name=$1 seconds=$2
    shift 2
    measure "$name" "$seconds" "$runs/$name/result.json" "$python" -m raycifar.train --name "$name" --storage "$runs" \
        --workers 0 "$@" "${few[@]}"
}

bench() { # bench NAME SECONDS OPTION...
    local name=bench-$1 seconds=$2
    shift 2
    measure "$name" "$seconds" "$runs/$name/bench.json" "$python" -m raycifar.bench --workers 0 --pretrained none \
        --out "$runs/$name" "$@" "${size[@]}"
}

speedrun() { # speedrun NAME RUNS SECONDS OPTION...
    local name=$1 times=$2 seconds=$3
    shift 3
    measure "$name" "$seconds" "$runs/$name/speedrun.json" "$python" -m raycifar.speedrun --out "$runs/$name" \
        --runs "$times" "$@" "${few[@]}"
}

measure tests 100 "" "$python" -m pytest -q -rs -p no:cacheprovider -o addopts= -m "not slow" "${tests[@]}"
speedrun speedrun-compiled "$times" 120 --compile
muon=(--optimizer muon --lr 0.05 --warmup 0.05 --batch-size 500 --augment trivial --cutmix 0.5)
train vgg16-muon 150 --model vgg16 "${muon[@]}" --epochs 200
train cnn-muon 90 --model cnn "${muon[@]}" --epochs 200
train cnn 110 --model cnn
train vgg16 190 --model vgg16
if [ -z "${SMALL:-}" ]; then # on a CPU it takes ten minutes, however few its images
    train resnet50-muon 400 --model resnet50 --pretrained none "${muon[@]}" --epochs 100 --compile
fi
train speedrun-profile 60 --recipe speedrun --val-size 0 --no-record --profile # where the milliseconds go
train speedrun-train 60 --recipe speedrun --val-size 0 --no-record # by raycifar train, in one process
speedrun speedrun "$times" 100
plan=(--against dataloader --plan 1,2,4,8 --interconnect nvlink)
bench vgg16 90 --model vgg16 "${plan[@]}"
bench cnn 90 --model cnn "${plan[@]}"
if [ -z "${SMALL:-}" ]; then # on a CPU it takes ten minutes, however few its images
    bench resnet50 120 --model resnet50 "${plan[@]}"
    train resnet50-profile 60 --model resnet50 --pretrained none --recipe scratch --limit 10000 --epochs 1 --profile
    bench resnet50-compiled 120 --model resnet50 --compile
    for images in 256 512 1024; do bench resnet50-$images 60 --model resnet50 --batch-size $images; done
fi
train resnet50 1000 --model resnet50 --pretrained none
[ -n "${SMALL:-}" ] && exit
# Variations, scored on validation images; the first is the baseline.
speedrun speedrun-base 5 60 --val-size 5000
for epochs in 12 13 15; do speedrun "speedrun-epochs-$epochs" 5 60 --val-size 5000 --epochs $epochs; done
for smoothing in 0.2 0.35; do speedrun "speedrun-smoothing-$smoothing" 5 60 --val-size 5000 --label-smoothing $smoothing; done
for lr in 0.15 0.21; do speedrun "speedrun-lr-$lr" 5 60 --val-size 5000 --lr $lr; done
for norm_lr in 4 16; do speedrun "speedrun-norm-$norm_lr" 5 60 --val-size 5000 --norm-lr $norm_lr; done
for sizes in 20:0.3,24:0.6 24:0.5 20:0.2,24:0.4,28:0.7; do
    speedrun "speedrun-sizes-$sizes" 5 60 --val-size 5000 --progressive $sizes
done
