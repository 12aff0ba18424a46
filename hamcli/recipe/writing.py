"""A recipe back to text that reads back to the same recipe."""

from collections.abc import Mapping
from typing import Any

import yaml

from hamcli.recipe.schema import Recipe
from hamcli.recipe.text import SCALARS


def effective_text(recipe: Recipe, versions: Mapping[str, str]) -> str:
    """The whole recipe, defaults filled in, with the versions it ran under as comments.

    Args:
        recipe: What ran.
        versions: Package name to version.
    """
    head = "# Everything this run depends on; `ham sparsify --recipe THIS_FILE` repeats it.\n"
    known = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    body = yaml.dump(
        recipe.as_dict(),
        Dumper=_RecipeDumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
    return f"{head}# Ran with {known}.\n{body}"


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper whose floats and texts read back as what they were under the recipe's scalars."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text.split("e")[0]:
        text = text.replace("e", ".0e")  # 1e-05: plain YAML readers take it for text
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_RecipeDumper.add_representer(float, _float)

# Text that this package's own scalars would read as something else is quoted too.
for _tag, _pattern, _first in SCALARS:
    _RecipeDumper.add_implicit_resolver(_tag, _pattern, _first)
