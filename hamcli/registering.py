"""The loader of packed folders, registered with transformers when transformers is imported.

`import hamcli` must cost nothing, so nothing is imported here: a finder waits for the module of
transformers that keeps the loaders, lets it be imported as ever, and adds ours.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def register_lazily() -> None:
    """Register now if transformers is there already, else as soon as it is."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from hamcli.checkpoint.packed.quantizer import register

    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited module where everybody else does, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec, with a loader that registers afterwards; None for all other modules."""
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The usual loader, and then our registration."""

    def __init__(self, usual: importlib.abc.Loader) -> None:
        self._usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As usual."""
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As usual, then register."""
        self._usual.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._usual
        _register()
