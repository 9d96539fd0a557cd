"""Provokes the program's errors, and prints each with the command that does: `python tests/errors.py > errors.md`."""

import os
import pickle
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from command import Command
from PIL import Image

TRAIN = "train --model cnn --data good --val-size 100 --epochs 1 --workers 0 --no-report"
CASES = f"""\
train
train --model vgg17
train --model timm:nothing
train --model cnn --epochs -3
train --model cnn --lr nan
train --model cnn --batch-size 1
train --model cnn --seed -1
train --model cnn --optimizer lion
train --model cnn --name ../up
train --model cnn --name ''
train --model cnn --workers 4:2
train --model cnn --workers 1000
train --model cnn --device gpu
train --model cnn --device cpu --accelerator H100
train --model cnn --gpus-per-worker 2
train --model cnn --cpus-per-worker 999 --workers 0
train --model cnn --track comet
train --model cnn --recipe nothing
train --model cnn --recipe bad.toml
train --model cnn --recipe text.txt
train --model vgg16 --recipe speedrun
train --model cnn --depth 50
train --model cnn --val-size 250
train --model cnn --data good --val-size 100 --limit 50
train --model cnn --storage http://127.0.0.1:9/x
train --model cnn --storage text.txt
train --model cnn --storage memory://x
recipes vgg17
compare
compare --models cnn,cnn
compare --models cnn --workers 1000
compare --models cnn --search 3 --val-size 0
compare --models cnn --space bad.toml
data describe --data nowhere
data describe --data empty
data describe --data text.txt
data describe --data cut.tar.gz
data describe --data forged
data describe --data two
data describe --data synthetic:abc
data describe --data s3::http://a/b
data describe --data ftp://a/b
data describe --data http://127.0.0.1:9/a.tar.gz
data describe --data http://nowhere.invalid/a.tar.gz
data describe --data fifo
data prepare text.txt --data good
data describe --data ''
train --model resnet50 --data good --val-size 100 --pretrained nowhere.pth
train --model resnet50 --data good --val-size 100 --pretrained text.txt
train --model resnet50 --data good --val-size 100 --pretrained whole.pth
train --model resnet50 --data good --val-size 100 --pretrained other.pth
train --model cnn --data good --val-size 100 --pretrained imagenet
predict nowhere picture.png
predict run text.txt
predict run empty
predict run cut.png
export run --to pdf
export nowhere --to onnx
evaluate nowhere
evaluate run --data nowhere
report nowhere
report empty
report text.txt
report damaged
report run --out text.txt
compare run
compare run nowhere
{TRAIN} --name run --storage . --epochs 2
{TRAIN} --name damaged --storage .
bench --model cnn --plan 0
bench --model cnn --against nothing
""".splitlines()


class Raycifar(Command):
    command = "raycifar"


def make_files(folder: Path) -> None:
    """Make the files that the cases name."""
    os.chdir(folder)
    for name in ("empty", "two/a", "two/b", "forged"):
        Path(name).mkdir(parents=True)
    Path("text.txt").write_text("no data\n")
    Path("bad.toml").write_text("learning_rate = 1\n")
    images = {b"data": np.zeros((2000, 3072), np.uint8), b"fine_labels": [k % 100 for k in range(2000)]}
    images[b"data"][:, 0] = np.arange(2000) % 256
    for place in ("good", "two/a", "two/b"):
        Path(place).mkdir(exist_ok=True)
        for split in ("train", "test"):
            Path(place, split).write_bytes(pickle.dumps(images))
    for split in ("train", "test"):
        Path("forged", split).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    shutil.make_archive("whole", "gztar", ".", "good")
    Path("cut.tar.gz").write_bytes(Path("whole.tar.gz").read_bytes()[:2000])
    os.mkfifo("fifo")
    Image.new("RGB", (40, 40)).save("picture.png")
    Path("cut.png").write_bytes(Path("picture.png").read_bytes()[:60])
    torch.save(torch.nn.Linear(2, 2), "whole.pth")
    torch.save({"a": torch.zeros(3)}, "other.pth")
    say(f"{TRAIN} --name run --storage .")
    shutil.copytree("run", "damaged")
    Path("damaged/run.json").write_text("{")


def say(case: str) -> tuple[int, str]:
    """Return the exit code of a command, and the last line that it writes to its errors."""
    environment = {"RAYCIFAR_DATA": "good", "RAYCIFAR_CACHE": "cache"}
    done = Raycifar(*shlex.split(case), storage=None, env=environment, cwd=Path.cwd()).finish()
    return done.returncode, (done.stderr.strip().splitlines() or ["nothing"])[-1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        print("| command | exit code | message |\n| --- | --- | --- |")
        for case in CASES:
            code, sentence = say(case)
            shown = sentence.replace(folder, "…").replace("|", "\\|")
            print(f"| `{case}` | {code} | {shown} |")
            sys.stdout.flush()
