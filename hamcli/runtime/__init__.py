"""Running a sparse model faster than the dense one where that is possible on this CPU."""

from hamcli.runtime.loading import RUNTIMES, dense_inside, load, use_runtime_
from hamcli.runtime.modules import is_linear

__all__ = ["RUNTIMES", "dense_inside", "is_linear", "load", "use_runtime_"]
