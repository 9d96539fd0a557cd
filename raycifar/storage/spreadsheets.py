"""CSV files, whose cells no spreadsheet takes for formulas."""

import csv
import io
from collections.abc import Iterable
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a formula begins with


def to_csv(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a CSV file. Text that begins like a formula is preceded by an apostrophe, as in a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(defused, headings))
    writer.writerows(map(defused, row) for row in rows)
    return text.getvalue()


def defused(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
