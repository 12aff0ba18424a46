"""`ham`: make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good.

Importing this package imports no torch; each public name does so when it is first used. After it,
`from_pretrained` of transformers loads packed folders too.
"""

import importlib
from typing import Any

from hamcli.registering import register_lazily

__version__ = "0.1.0"

_HOMES = {
    "HAM": "hamcli.optim",
    "ham_step_": "hamcli.optim",
    "HAMFactory": "hamcli.integration.trainer",
    "SparsityCallback": "hamcli.integration.trainer",
    "load": "hamcli.runtime",
    "sparsify": "hamcli.pipeline",
}

__all__ = ["HAM", "HAMFactory", "SparsityCallback", "__version__", "ham_step_", "load", "sparsify"]

register_lazily()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
