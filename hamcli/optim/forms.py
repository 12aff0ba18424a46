"""Which form steps the weights on a CPU: the extension, else numba, else plain torch in blocks."""

from collections.abc import Callable
from types import ModuleType

from hamcli.native import prepare as prepare_extension
from hamcli.optim import cpu, fused, jit


def on_cpu() -> ModuleType:
    """The fastest form that this machine has; the first call in a process may build or compile."""
    return fused if fused.is_usable() else jit if jit.is_usable() else cpu


def prepare(note: Callable[[str], None]) -> str | None:
    """Build or compile the form, before a clock runs.

    Args:
        note: Told in one line when that takes a while.

    Returns:
        One line that says what steps instead of the extension, and why; None if it is there.
    """
    extension = prepare_extension(note)
    if extension.is_available:
        return None
    other = jit.prepare(note)
    if other.is_available:
        return f"{extension.reason}; {other.reason}"
    return f"{extension.reason}; {other.reason}; the slower step in plain torch is used"
