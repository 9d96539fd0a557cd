"""Pages: one HTML file each, with all it needs inside, light and dark."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, charts: dict[str, str], **values: Any) -> str:
    """Return a page; `charts` are SVG elements by name."""
    drawn = {name: Markup(svg) for name, svg in charts.items()}
    return TEMPLATES.get_template(template).render(charts=drawn, **values)
