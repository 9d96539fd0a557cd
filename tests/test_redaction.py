"""Passwords and signatures are used, and never written or printed."""

import json
import re
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest
from command import Command, Evaluate, Report, finish
from conftest import RUN
from histories import made_up
from markupsafe import Markup
from test_sources import Quiet, serving

from raycifar.analysis.reports import report_run, run_page
from raycifar.analysis.run_files import RunFiles
from raycifar.command import ending
from raycifar.data.sources import load
from raycifar.errors import RequestError, StorageError, WorkError
from raycifar.models.recipes import recipe_for
from raycifar.redaction import redact, redact_html
from raycifar.storage.run_folder import RunFolder
from raycifar.workflows.reporting import write_report
from raycifar.workflows.trial import Trial


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("https://user:word@host/a.tar.gz", "https://***@host/a.tar.gz"),
        ("https://token@host:8080/a", "https://***@host:8080/a"),
        ("https://host/a?X-Amz-Signature=ab/c+d==&X-Amz-Date=1", "https://host/a?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://host/a?token", "https://host/a?***"),
        ("https://host/a#access_token=b", "https://host/a#access_token=***"),
        ("s3://KEY:SE/CR@ET@bucket/x?region=eu", "s3://***@bucket/x?region=eu"),
        ("s3://b?access_key=KEY&secret_key=SECRET", "s3://b?access_key=***&secret_key=***"),
        ("s3://b?endpoint_override=u:p@host", "s3://b?endpoint_override=***"),
        ("abfs://box:KEY@account.dfs.core.windows.net/x", "abfs://***@account.dfs.core.windows.net/x"),
        (
            "max retries exceeded with url: /a?sig=abc (Caused by x)",
            "max retries exceeded with url: /a?sig=*** (Caused by x)",
        ),
        ("it is at https://host/a?sig=abc.", "it is at https://host/a?sig=***."),
    ],
)
def test_what_may_be_secret_is_hidden(uri, says):
    assert redact(uri) == says
    assert redact(says) == says
    quoted = escape(f"'{uri}' <\"{uri}\">")
    assert unescape(redact_html(quoted)) == f"'{says}' <\"{says}\">"


@pytest.mark.parametrize(
    "text",
    [
        "/data/a?b=c d@e",
        "file:///data/a?b=c@d",
        "gs://anonymous@bucket/x",
        "abfs://box@account.dfs.core.windows.net/x",
        "hf://datasets/me/cifar@main/data",
        "http://host:8000/a@b.tar.gz",
        "s3://runs?endpoint_override=127.0.0.1:5544&scheme=http&region=us-east-1&allow_bucket_creation=true",
        "top-1=0.5, x://y",
    ],
)
def test_what_is_harmless_stays(text):
    assert redact(text) == text
    for quoted in (f"<code>{escape(repr(text))}</code>", f"{Markup.escape(repr(text))} &c.", f"<{text}&quot;>"):
        assert redact_html(quoted) == quoted


def test_what_an_entity_stands_for_hides_no_secret():
    for secret in ("a&lt;HIDDEN", "a&#39;HIDDEN", "a&amp;HIDDEN", "a;HIDDEN"):
        assert "HIDDEN" not in redact_html(escape(f"https://host/a?x={secret}&y=HIDDEN#HIDDEN"))


def test_a_page_and_its_markdown_keep_the_commands_that_they_suggest(tmp_path):
    uri = "s3://bucket/cifar?endpoint_override=localhost:9000&scheme=http"
    history = made_up(epochs=2, run={"data": {"source": uri, "train": 45000, "val": 5000, "test": 10000}})
    files, folder = RunFiles("a", history, notes=[f"{uri} is missing."]), RunFolder(str(tmp_path), "a")
    write_report(report_run(files), lambda: run_page(files, report_run(files)), folder, "html")
    write_report(report_run(files), str, folder, "md")
    page = unescape(re.sub("<.*?>", "", folder.read("report.html").decode()))
    for text in (page, unescape(folder.read("report.md").decode())):
        assert f"--data '{uri}'" in text
        assert f"{uri} is missing." in text
        assert "***" not in text


URI = "https://user:HIDDEN@host/a?sig=HIDDEN"


@pytest.mark.parametrize(
    "error",
    [RequestError(URI), WorkError(f"in {URI}: x"), StorageError.of(URI, OSError(URI)), OSError(URI), ValueError(URI)],
    ids=lambda error: type(error).__name__,
)
def test_no_error_says_it(error):
    assert "HIDDEN" not in ending(error)[1] + str(error) * isinstance(error, RequestError | WorkError | StorageError)
    assert "://***@host/a?sig=***" in ending(error)[1]


def test_no_file_of_a_run_holds_it(tmp_path):
    run = RunFolder(str(tmp_path), "a")
    for name in ("run.json", "evaluation.json", "report.html", "report.md", "comparison.csv"):
        run.write_json(name, {"data": {"source": URI}, "recipe": {"pretrained": URI}})
    assert all(b"HIDDEN" not in file.read_bytes() for file in (tmp_path / "a").iterdir())
    assert json.loads(run.read("run.json"))["data"]["source"] == "https://***@host/a?sig=***"
    assert "HIDDEN" not in repr(RunFolder(URI, "a"))


def test_ray_tune_is_not_told():
    trial = Trial("a", "vgg16", 0, replace(recipe_for("vgg16"), pretrained=URI), search=False)
    assert "HIDDEN" not in str(trial.to_config())
    assert trial.to_config()["trial"].recipe.pretrained == "https://***@host/a?sig=***"


class Guarded(Quiet):
    """Wants a password and a signature."""

    def do_GET(self):  # noqa: N802
        if "sig=HIDDEN" in self.path and self.headers["Authorization"] == "Basic bWU6SElEREVO":
            super().do_GET()
        else:
            self.send_error(403)


@pytest.mark.slow
def test_a_run_on_signed_data_says_it_nowhere_and_goes_on_with_another_signature(small, tmp_path):
    with serving(Path(small).parent, Guarded) as url:
        address = f"{url.replace('//', '//me:HIDDEN@')}/{Path(small).name}?sig=HIDDEN"
        train = (*RUN, "--workers", 0, "--name", "a", "--epochs", 1, "--data")
        said = [
            finish(Command(*train, address, storage=tmp_path)),
            finish(Command(*train, f"{address}2", storage=tmp_path)),
            finish(Evaluate(tmp_path / "a", "--workers", 0, "--data", address, storage=None)),
            finish(Report(tmp_path / "a", "--data", address, storage=None)),
        ]
        for wrong, says in {"WRONG": r"refuses to give it \(403\)", "***": r"put it in the place of \*\*\*"}.items():
            with pytest.raises(RequestError, match=says):
                load(address.replace("HIDDEN", wrong))
    assert "is finished; nothing is trained again" in said[1].stdout
    told = "".join(done.stdout + done.stderr for done in said)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert "HIDDEN" not in told
    assert not [file for file in files if b"HIDDEN" in file.read_bytes()]
    assert json.loads((tmp_path / "a/run.json").read_text())["data"]["source"].endswith(f"/{Path(small).name}?sig=***")
