"""Pages: one HTML file each, with all it needs inside, light and dark."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).with_name("templates")
SCRIPT = FOLDER.joinpath("page.js").read_text(encoding="utf-8")
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
# A page runs this script and no other, whatever a name in it may hold.
TEMPLATES.globals["script"] = Markup(SCRIPT)
TEMPLATES.globals["script_hash"] = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
TEMPLATES.filters["options"] = lambda command: re.split(r" (?=--)", command)


def render(template: str, charts: dict[str, str], **values: Any) -> str:
    """Return a page; `charts` are SVG elements by name."""
    drawn = {name: Markup(svg) for name, svg in charts.items()}
    return TEMPLATES.get_template(template).render(charts=drawn, **values)
