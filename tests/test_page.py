"""Pages: what a name or a path says never becomes a part of the page."""

import re

import pytest
from histories import made_up

from raycifar.analysis.reports import (
    ROWS,
    RunFiles,
    comparison_page,
    report_comparison,
    report_run,
    run_page,
    to_markdown,
)

HOSTILE = "javascript:alert(1)"
TAGS = '"><script>alert(1)</script>'


def page_of(history, name="a"):
    files = RunFiles(name, history, None, None)
    return run_page(files, report_run(files), None)


def test_names_are_escaped():
    page = page_of(made_up(epochs=2), TAGS)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("name", [HOSTILE, "data:text/html,x", 'a" onclick="alert(1)'])
def test_a_folder_s_name_never_becomes_a_scheme_or_an_attribute(name):
    runs = [RunFiles(name, made_up(epochs=2), None, None)]
    links = {name: f"{name}/report.html"}
    page = comparison_page(report_comparison("c", runs, None), runs, None, links)
    (href,) = re.findall(r'<a href="([^"]*)"', page)
    assert ":" not in href
    assert href.endswith("/report.html")
    assert "onclick=" not in re.sub(r">[^<]*<", "><", page)


def test_an_ordinary_link_stays_as_it_is():
    runs = [RunFiles("cnn-s0.1", made_up(epochs=2), None, None)]
    page = comparison_page(report_comparison("c", runs, None), runs, None, {"cnn-s0.1": "cnn-s0.1/report.html"})
    assert '<a href="cnn-s0.1/report.html">' in page


def test_the_table_of_epochs_is_bounded():
    page = page_of(made_up(epochs=1000))
    table = page[page.index("<h2>Epochs</h2>") :]
    assert table.count("<tr>") == ROWS + 1
    assert "<td>1000</td>" in table
    assert f"The last {ROWS} epochs" in table
    assert "The last" not in page_of(made_up(epochs=2))


def test_what_is_not_known_is_a_dash():
    page = page_of(made_up(epochs=2, val=0, train_loss=lambda e: None if e == 1 else 4.0))
    assert "<td>–</td>" in page


def test_a_run_without_an_epoch_has_a_page():
    assert "No epoch is finished yet" in page_of(made_up(epochs=0, recipe={"epochs": 3}))


def test_the_markdown_has_findings_and_commands():
    text = to_markdown(report_run(RunFiles("a", made_up(), None, None)))
    assert text.startswith("# a\n\nThis run is under way or was interrupted: 20 of 20 epochs are recorded.")
    assert "\n## Findings\n" in text
    assert "      raycifar compare --models cnn" in text
