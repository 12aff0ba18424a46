"""Pages that stand alone: the shell of the report, which other rooms' templates extend."""

from functools import cache
from typing import Any

import jinja2

from hamcli.report import wording

FILTERS = ("name", "sentence", "percent", "count", "number", "megabytes", "shape")


def render_page(template: str, view: dict[str, Any], *, room: str = "hamcli.report") -> str:
    """A page, as text: self-contained, without a script, for light and dark.

    Args:
        template: Its file.
        view: What the template names; every string in it is escaped.
        room: The package that holds the template, which may extend those of the report.
    """
    return _template(template, room).render(view)


@cache
def _template(name: str, room: str) -> jinja2.Template:
    """Compiled once: that takes longer than to render it, and a comparison writes many pages."""
    packages = dict.fromkeys((room, "hamcli.report"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "") for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {word: getattr(wording, word) for word in FILTERS}
    return environment.get_template(name)
