"""`ham`: make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good.

Importing this package imports no torch; each public name does so when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "HAM": "hamcli.optim",
    "ham_step_": "hamcli.optim",
    "load": "hamcli.runtime",
    "sparsify": "hamcli.pipeline",
}

__all__ = ["HAM", "__version__", "ham_step_", "load", "sparsify"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
