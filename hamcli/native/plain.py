"""A C++ library without torch, called through ctypes: built once on a machine, in seconds.

It lies beside the extension in the user's cache and is made as that is: by one process while others
wait, in one rename, or not at all. `HAM_NATIVE=0` in the environment turns it off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

from hamcli.native.building import (
    CannotBuild,
    built_once,
    cache_folder,
    find_compiler,
    run_compilers,
)

SOURCE = Path(__file__).parent / "bits.cpp"
LIBRARY = "ham_bits.so"


@functools.cache
def load_bits() -> ctypes.CDLL | None:
    """The functions of `bits.cpp`, built if need be; None where they cannot be had."""
    if os.environ.get("HAM_NATIVE", "1") == "0" or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(_build()))
    except (CannotBuild, OSError):
        return None
    for width in (16, 32):
        for name in ("count_top", "cut", "zeros"):
            getattr(library, f"ham_{name}_{width}").restype = ctypes.c_int64
    return library


def _build() -> Path:
    """The path of the library.

    Raises:
        CannotBuild: There is no compiler, it failed, or nothing can be written.
    """
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuild(f"it is not built on {sys.platform}")
    compiler, flags = find_compiler(), _flags()
    library = cache_folder() / f"bits-{_key(compiler, flags)}" / LIBRARY
    return built_once(library, lambda: _compile(compiler, flags, library))


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / LIBRARY
        run_compilers([compiler, *flags, "-shared", str(SOURCE), "-o", str(made)])
        made.replace(library)


def _flags() -> tuple[str, ...]:
    vectors = ("-mavx2",) if _has_avx2() else ()
    return ("-std=c++20", "-O3", "-fPIC", "-w", *vectors)


def _has_avx2() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    program = Path(compiler).resolve()
    status = program.stat()
    seen = (program, status.st_size, status.st_mtime_ns, *flags)
    return hashlib.sha256(SOURCE.read_bytes() + repr(seen).encode()).hexdigest()[:16]
