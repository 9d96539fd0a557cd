"""Every option of every command, with values that make no sense: refused in a sentence, before anything starts."""

import importlib
import re
import time

import click
import pytest
from click.testing import CliRunner

from raycifar import cli
from raycifar.data.sources import load
from raycifar.errors import RequestError
from raycifar.models.recipe import Recipe, field_types
from raycifar.models.recipes import choose_recipe
from raycifar.workflows import benchmark

VALUES = ("-1", "0", str(10**30), "nan", "inf", "-inf", "")
WORKERS = {"workers", "count"}
PARSED = {*WORKERS, "plan", "against"}  # texts that are more than a text
ZERO = {
    "seed", "val_size", "max_failures", "wait", "checkpoint_steps", "search", "price_per_hour", "lr", "norm_lr",
    "momentum",
    "warmup", "weight_decay", "label_smoothing", "erasing", "mixup", "cutmix", "dropout", "ema", "clip_norm",
    "head_epochs", "image_size",
}  # fmt: skip
REQUIRED = {
    "train": ("--model", "cnn"), "bench": ("--model", "cnn"), "compare": ("--models", "cnn"), "evaluate": ("a",),
    "report": ("a",), "predict": ("a", "b"), "export": ("a", "--to", "onnx"), "recipes": ("cnn",), "prepare": ("a",),
    "speedrun": ("--model", "cnn"),
}  # fmt: skip


class AcceptedError(Exception):
    """The work would begin."""


def commands(group: click.Group, context: click.Context):
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        yield from commands(found, context) if isinstance(found, click.Group) else [(name, found)]


COMMANDS = dict(commands(cli.main, click.Context(cli.main)))


@pytest.fixture
def run(in_process, monkeypatch):
    """Run a command in this process up to where its work begins, and return its exit code and what it said."""

    def begin(*args, **options):
        raise AcceptedError

    monkeypatch.setattr(benchmark, "read_inputs", begin)
    for module, work in (
        ("train", "training.train"), ("compare", "study.train_and_compare"), ("evaluate", "evaluate"),
        ("report", "reporting.report"), ("predict", "predict_files"), ("export", "export"), ("data.__main__", "load"),
        ("speedrun", "speedrun"),
    ):  # fmt: skip
        importlib.import_module(f"raycifar.{module}")
        monkeypatch.setattr(f"raycifar.{module}.{work}", begin)

    def invoke(name, *args):
        began = time.monotonic()
        done = in_process(COMMANDS[name], *REQUIRED.get(name, ()), *args)
        assert time.monotonic() - began < 2
        return done

    return invoke


def takes(option: click.Parameter, value: str) -> bool:
    """Whether a value is one that an option must take."""
    if value == "0":
        return option.name in ZERO | WORKERS
    return value == "" and option.name == "progressive"  # as in a recipe's file: no smaller images


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_that_makes_no_sense_is_refused_in_a_sentence(run, name):
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option) and not p.is_flag]
    for option in options:
        text = option.type is click.STRING and option.name not in PARSED
        for value in VALUES if not text else [""]:
            more = ("--plan", "1,2") if option.name == "price_per_hour" and name == "bench" else ()
            code, said = run(name, *more, option.opts[0], value)
            asked = f"{name} {option.opts[0]} {value!r}: {code}, {said}"
            if takes(option, value) and not (name == "compare" and option.name == "workers"):
                assert "AcceptedError" in said, asked
            else:
                assert code == 2, asked
                sentence = said.splitlines()[-1]
                assert re.fullmatch(r"Error: .+\.", sentence), asked
                assert value in sentence or "e+30" in sentence or "batch-size" in sentence, asked


FIELDS = [(name, kind) for name, kind in field_types(Recipe).items() if kind in (int, float)]


@pytest.mark.parametrize(("field", "kind"), FIELDS)
def test_a_recipe_s_file_is_checked_as_its_options_are(field, kind, tmp_path):
    for value in ("-1", str(10**30), str(10**400), "nan", "inf", '""', "true", "[]"):
        (tmp_path / "a.toml").write_text(f"{field} = {value}")
        with pytest.raises(RequestError, match=rf"^--recipe .*a.toml: {field} is [^\n]+\.$"):
            choose_recipe("cnn", str(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("speedrun", ("--pretrained", "a.pth", "--val-size", -5), "val_size is -5: it must be at least 0"),
        ("train", ("--epochs", "-3"), "epochs is -3: it must be at least 1"),
        ("train", ("--seed", 2**63), "seed is 9223372036854775808: it must be at most"),
        ("train", ("--workers", 0, "--cpus-per-worker", 999), "--cpus-per-worker 999: this machine has"),
        ("train", ("--workers", 0, "--cpus-per-worker", "inf"), "cpus_per_worker is inf: a finite number is needed"),
        ("train", ("--workers", 1000), "--batch-size 128 leaves fewer than 2 images for each of 1000 workers"),
        ("compare", ("--workers", 1000), "--batch-size 128 leaves fewer than 2 images for each of 1000 workers"),
        ("train", ("--name", "a" * 300), "takes 300 bytes: a folder's name may have at most 200"),
        ("train", ("--name", "../up"), "'../up' is not a folder name"),
        ("train", ("--name", "a\x1b[2J"), r"'a\x1b[2J' is not a folder name"),
        ("train", ("--name", ""), "--name is empty"),
        ("compare", ("--name", ".."), "'..' is not a folder name"),
        ("predict", ("",), "IMAGES is empty"),
    ],
)
def test_what_can_t_be_is_refused_before_anything_starts(run, name, args, says):
    code, said = run(name, *map(str, args))
    assert code == 2
    assert says in said


def test_a_name_in_any_language_is_one(run):
    assert "AcceptedError" in run("train", "--name", "ünï-日本")[1]


@pytest.mark.parametrize("name", ["synthetic:abc", "synthetic:-1", "synthetic:0", f"synthetic:{10**12}", "synthetic:"])
def test_a_number_of_synthetic_images_that_can_t_be_is_refused(name):
    with pytest.raises(RequestError, match=f"^{name}: write synthetic:N, where N is a multiple of 100"):
        load(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_is_short_has_an_example_and_is_grouped(name):
    done = CliRunner().invoke(COMMANDS[name], ["--help"], env={"COLUMNS": "100"}, terminal_width=100)
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  Example: raycifar ") for line in lines)
    own = {flag for option in COMMANDS[name].params for flag in (*option.opts, *option.secondary_opts, "--help")}
    named = {option.replace("[no-]", "") for option in re.findall(r"--(?:\[no-\])?[a-z][a-z-]+", done.stdout)}
    assert named <= own
    if name in ("train", "compare", "bench"):
        assert [line for line in lines if line in ("Model and data:", "Workers:", "Run and storage:", "Other:")]
        assert any(line.startswith("Recipe (") for line in lines)
        assert all(
            option.opts[0] in done.stdout or f"--[no-]{option.opts[0][2:]}" in done.stdout
            for option in COMMANDS[name].params
            if isinstance(option, click.Option)
        )


def test_bench_has_only_options_that_change_what_it_times():
    given = {option.name for option in COMMANDS["bench"].params}
    assert not given & {"name", "track", "report", "max_failures", "lr", "schedule", "warmup", "head_epochs"}
    assert given >= {"batch_size", "augment", "precision", "epochs", "workers", "storage"}
