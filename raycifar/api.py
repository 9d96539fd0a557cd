"""The Python API, for notebooks, scripts, and programs that have already started Ray.

    from raycifar.api import train, compare, open_run

    run = train("cnn", epochs=5, data="synthetic", limit=5000)
    run.history                                # a DataFrame, a row for each epoch
    run.load().predict(["cat.jpg"]).classes

Options have the commands' names and defaults (`raycifar train --help`), with underscores. Ray is started if needed and
stopped afterwards; a Ray that the caller has started is joined and left running. A process runs one training at a time.
"""

import html
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from raycifar.errors import RequestError, ResumableError, WorkError
from raycifar.models.recipe import field_types
from raycifar.models.recipes import recipe_fields
from raycifar.redaction import redact
from raycifar.storage.locations import check_location
from raycifar.storage.run_folder import COMPARISON, RESULT, RUN, RunFolder
from raycifar.storage.schemas import EpochRecord
from raycifar.terminal import Screen
from raycifar.workflows import comparing, reporting, study, training
from raycifar.workflows.prediction import Model, Predictions
from raycifar.workflows.requests import ComparisonRequest, Settings, TrainingRequest, settings_of
from raycifar.workflows.training_run import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Comparison",
    "Model",
    "Predictions",
    "RequestError",
    "Run",
    "WorkError",
    "compare",
    "open_comparison",
    "open_run",
    "train",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def with_options(kind: type[Settings]) -> Callable[[Function], Function]:
    """Add the commands' options to a function's signature and docstring."""

    def add(function: Function) -> Function:
        options = {f.name: (f.metadata["default"], f.type, f.metadata["help"]) for f in settings_of(kind)}
        recipe = {
            name: (None, field_types(recipe_type)[name], recipe_type.__dataclass_fields__[name].metadata["help"])
            for name, recipe_type in recipe_fields().items()
        }
        base = "The base recipe: a name, a TOML file or a run's folder; the options below change it."
        options |= {"recipe": (None, str, base), **recipe}
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (default, kind, _) in options.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        lines = [f"    {name}: {text}" for name, (_, _, text) in options.items()]
        function.__doc__ = f"{function.__doc__}\nOptions:\n" + "\n".join(lines)
        return function

    return add


class _InFolder:
    def __init__(self, folder: RunFolder) -> None:
        self._files = folder

    @property
    def name(self) -> str:
        return self._files.name

    @property
    def folder(self) -> str:
        return self._files.location


# A run ----------------------------------------------------------------------------------------------


class Run(_InFolder):
    """A run, finished or not, read from its folder; `folder` is a path or URI."""

    @property
    def about(self) -> dict[str, Any]:
        """The content of `run.json`: model, recipe, data, seed, hardware and versions."""
        return read_run(self._files)  # type: ignore[return-value]  # `open_run` has found it

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of `result.json`, or None until the run ends."""
        return self._files.read_json(RESULT)

    @property
    def test(self) -> dict[str, float] | None:
        """The scores on the test set, as `result.json` holds them: images, loss, top1, …; None if it isn't scored."""
        return (self.result or {}).get("test")

    @property
    def history(self) -> pd.DataFrame:
        """A row for each finished epoch, indexed by epoch, with the columns of `EpochRecord`."""
        rows = [record.to_json() for record in self._files.history()]
        columns = None if rows else [f.name for f in fields(EpochRecord)]
        return pd.DataFrame(rows, columns=columns).set_index("epoch")

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The findings from the curves, most important first: kind, confidence, evidence and advice of each."""
        return self._report["findings"]

    @property
    def state(self) -> str:
        """The run's progress, in a sentence."""
        return self._report["state"]

    @property
    def _report(self) -> dict[str, Any]:
        from raycifar.analysis.reports import report_run

        return report_run(reporting.read_files(self._files, reporting.training_host(self._files)))

    def plot(self) -> "Figure":
        """Return a figure of accuracy, loss, generalization gap and learning rate by epoch."""
        from raycifar.analysis.charts import plot_history

        return plot_history(reporting.read_files(self._files).history, self.name)

    def load(self, device: str = "auto") -> Model:
        """Return the trained model.

        Args:
            device: auto, gpu or cpu.

        Raises:
            RequestError: the run isn't finished, or the device doesn't exist.
        """
        return Model(self.folder, device)

    def __repr__(self) -> str:
        return f"Run({redact(self.folder)!r}): {self.state}"

    def _repr_html_(self) -> str:
        report, about, test = self._report, self.about, self.test or {}
        facts = {
            "model": f"{about['model']}, seed {about['seed']}",
            "data": about["data"]["source"],
            "state": report["state"],
            "curves": report["headline"],
            **{name: f"{test[name]:.4f}" for name in ("top1", "top5", "loss") if test.get(name) is not None},
            "folder": redact(self.folder),
        }
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
        return f"<b>{html.escape(self.name)}</b><table>{rows}</table>"


@with_options(TrainingRequest)
def train(model: str | None = None, *, progress: bool = True, **options: Any) -> Run:
    """Train a model, data-parallel, on Ray Train, and return the run; a finished run of that name is returned as it is.

    An interrupted training (KeyboardInterrupt, as by a notebook's stop button) leaves a checkpoint, and the same call
    with the same `name` continues it.

    Args:
        model: cnn, vgg16, resnet50, speedrun, or timm:NAME; by default the model of `recipe`.
        progress: print progress.
        options: those of `raycifar train`, such as `epochs=5`; `help(train)` lists them.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: training failed; the run folder keeps what was reached.
    """
    request, screen = TrainingRequest.of(model, **options), Screen(quiet=not progress)
    with ExitStack() as connection, telling_how_to_continue(screen, request.name):
        training.train(request, screen, connection)
    return Run(RunFolder(request.storage, request.name))


def open_run(location: str | Path) -> Run:
    """Return the run at a path or URI.

    Raises:
        RequestError: the folder holds no run.
    """
    folder = RunFolder.at(location)
    if read_run(folder) is None:
        raise RequestError(f"{location} is not a run's folder: it holds no {RUN}.")
    return Run(folder)


# A comparison ---------------------------------------------------------------------------------------


class Comparison(_InFolder):
    """A comparison of models over several seeds, read from its folder; `folder` is a path or URI."""

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        return self._files.read_json(COMPARISON)

    @property
    def models(self) -> pd.DataFrame:
        """A row for each model: mean scores with 95% intervals over the seeds, and costs."""
        return pd.DataFrame(comparing.to_rows(self.result)).set_index("model")

    @property
    def pairs(self) -> pd.DataFrame:
        """A row for each pair of models: the difference in test top-1 between `a` and `b`, and the verdict on `a`."""
        columns = ["a", "b", "difference", "low", "high", "p_value", "p_adjusted", "verdict", "sentence"]
        return pd.DataFrame(self.result["pairs"], columns=columns)

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared."""
        return [Run(folder) for folder in reporting.find_runs(self._files, self.result)]

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The findings about each model's runs together; those about a single run are the run's."""
        return reporting.read_comparison(self._files)[0]["findings"]

    @property
    def sentences(self) -> list[str]:
        """The comparison's conclusions."""
        return comparing.sentences(self.result)

    def plot(self) -> "Figure":
        """Return a figure of validation top-1 and training loss by epoch: mean and range of each model's runs."""
        from raycifar.analysis.charts import plot_comparison

        histories = {run.name: reporting.read_files(run._files).history for run in self.runs}
        models = self.result["models"].items()
        groups = {name: [histories[run] for run in model["runs"] if run in histories] for name, model in models}
        return plot_comparison(groups, self.name)

    def __repr__(self) -> str:
        return f"Comparison({redact(self.folder)!r}): {' '.join(self.sentences)}"

    def _repr_html_(self) -> str:
        scores = self.models[["runs", "top1", "top1_low", "top1_high", "top5", "loss", "device_seconds"]]
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        return f"<b>{html.escape(self.name)}</b>{scores.to_html(float_format='%.4f', na_rep='')}{sentences}"


@with_options(ComparisonRequest)
def compare(
    models: str | Iterable[str] = (),
    *,
    runs: "str | Path | Run | Iterable[str | Path | Run]" = (),
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Train several models with several seeds, orchestrated by Ray Tune, and compare them.

    The same call with the same `name` continues an interrupted comparison.

    Args:
        models: any of cnn, vgg16, resnet50, speedrun and timm:NAME.
        runs: finished runs to compare instead, or their folders; nothing is trained.
        progress: print progress.
        options: those of `raycifar compare`, such as `seeds=2`; `help(compare)` lists them.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: trials failed; the others are compared, and `open_comparison` opens the result.
    """
    names = models.split(",") if isinstance(models, str) else list(models)
    each = [runs] if isinstance(runs, str | Path | Run) else runs
    folders = [run.folder if isinstance(run, Run) else check_location(run) for run in each]
    if bool(names) == bool(folders):
        raise RequestError("give either models to train, or finished runs.")
    request, screen = ComparisonRequest.of(names, **options), Screen(quiet=not progress)
    with ExitStack() as connection, telling_how_to_continue(screen, request.name):
        if folders:
            comparing.compare_runs(folders, request, screen, show=lambda comparison: None)
        else:
            study.train_and_compare(request, screen, connection, show=lambda comparison: None)
    return Comparison(RunFolder(request.storage, request.name))


def open_comparison(location: str | Path) -> Comparison:
    """Return the finished comparison at a path or URI.

    Raises:
        RequestError: the folder holds no finished comparison.
    """
    folder = RunFolder.at(location)
    if folder.read_json(COMPARISON) is None:
        raise RequestError(f"{location} is not a finished comparison's folder: it holds no {COMPARISON}.")
    return Comparison(folder)


# Around the work ------------------------------------------------------------------------------------


@contextmanager
def telling_how_to_continue(screen: Screen, name: str) -> Iterator[None]:
    how = f"The same call with name={name!r} continues it."
    try:
        yield
    except KeyboardInterrupt:
        screen.say(f"Interrupted. {how}")
        raise
    except ResumableError as error:
        error.args = (f"{error} {how}",)
        raise
