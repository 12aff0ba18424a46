"""Building the C++ extension: once for each machine, on first use, and never a crash.

The library lies in the user's cache under a name made of everything that it depends on: sources,
flags, compiler, torch. One process builds while others wait; a finished library appears in one
rename, and one that is no longer whole is built anew. Whatever stands in the way becomes
`CannotBuild` with one line that says it. torch is imported only where the extension needs it;
`plain` builds a library without.
"""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

SOURCES = tuple(
    Path(__file__).parent / name for name in ("step.cpp", "select.cpp", "planes.cpp", "sparse.cpp")
)
LIBRARY = "ham_native.so"
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 600
WAIT_SECONDS = 300

# What torch itself compiles its kernels with, by what it calls the capability of the CPU.
X86_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}


class CannotBuild(Exception):
    """The extension cannot be had here; the text says why, in one line."""


def find_built() -> Path | None:
    """The path of the library if it is there already; nothing is built."""
    try:
        library = cache_folder() / _key(find_compiler(), compile_flags()) / LIBRARY
    except (CannotBuild, OSError):
        return None
    return library if _is_whole(library) else None


def build(note: Callable[[str], None] | None = None) -> Path:
    """The path of the library, built if it is not there yet.

    Args:
        note: Told in one line when a build begins: it takes about a minute.

    Raises:
        CannotBuild: There is no compiler, it failed, or nothing can be written.
    """
    compiler = find_compiler()
    flags = compile_flags()
    library = cache_folder() / _key(compiler, flags) / LIBRARY

    def make() -> None:
        if note is not None:
            note("building the fused step for this machine, once; about a minute")
        _compile(compiler, flags, library)

    return built_once(library, make)


def built_once(library: Path, make: Callable[[], None]) -> Path:
    """The library, made if it is not there yet, by one process while others wait.

    Args:
        library: Its path; only what belongs to it lies in its folder, which is made.
        make: Puts it there, in one rename.

    Raises:
        CannotBuild: It failed, took too long, or the folder cannot be written.
    """
    if _is_whole(library):
        return library
    folder = library.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=WAIT_SECONDS):
            if not _is_whole(library):
                make()
                _sum_file(library).write_text(_sum(library), encoding="ascii")
    except Timeout:
        raise CannotBuild(f"another process has been building it for {WAIT_SECONDS} s") from None
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written: {error.strerror or error}") from error
    return library


def _is_whole(library: Path) -> bool:
    """Whether the library is as it was built: to load a part of one ends the process by SIGBUS.

    A machine that loses its power soon after the rename may keep the name and lose the bytes.
    """
    try:
        return _sum_file(library).read_text(encoding="ascii") == _sum(library)
    except (OSError, ValueError):
        return False


def _sum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def find_compiler() -> str:
    """The C++ compiler: CXX, or the first of the usual names.

    Raises:
        CannotBuild: None is installed.
    """
    wished = os.environ.get("CXX")
    for name in (wished,) if wished else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise CannotBuild(f"no C++ compiler was found (looked for {wished or ', '.join(COMPILERS)})")


def compile_flags() -> tuple[str, ...]:
    """Flags for this CPU and this torch.

    Raises:
        CannotBuild: The CPU has no vector unit that torch names, or the system is not known.
    """
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuild(f"it is not built on {sys.platform}")
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    vector_flags: tuple[str, ...] = ()
    if platform.machine() in ("arm64", "aarch64"):
        capability = "DEFAULT"  # of NEON
    elif capability in X86_FLAGS:
        vector_flags = X86_FLAGS[capability]
    else:
        raise CannotBuild(f"it needs AVX2; torch says this CPU has {capability}")
    include = Path(torch.__file__).parent / "include"
    return (
        "-std=c++20",
        "-O3",
        # the base steps must round as torch's do
        "-ffp-contract=off",
        "-fPIC",
        "-w",
        *vector_flags,
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(("-fopenmp",) if sys.platform == "linux" else ()),
        f"-I{include}",
        f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
    )


def cache_folder() -> Path:
    """Where libraries are kept: the user's cache, or a private folder among temporary files.

    Raises:
        CannotBuild: Neither can be written.
    """
    found = user_cache()
    candidates = [found / "ham" / "native"] if found is not None else []
    candidates.append(Path(tempfile.gettempdir()) / f"ham-native-{os.getuid()}")
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK) and _is_private(folder):
            return folder
    raise CannotBuild(f"no folder for it can be written ({', '.join(map(str, candidates))})")


def user_cache() -> Path | None:
    """The user's folder of caches, XDG_CACHE_HOME or ~/.cache; None where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and Path(cache).is_absolute():
        return Path(cache)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def _is_private(folder: Path) -> bool:
    """Whether nobody else could have put a library there."""
    status = folder.lstat()
    is_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not is_others


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """A name for what these sources, flags, this compiler and this torch make."""
    import torch

    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.read_bytes())
    program = Path(compiler).resolve()
    status = program.stat()
    seen = (program, status.st_size, status.st_mtime_ns, torch.__version__, *flags)
    digest.update(repr(seen).encode())
    return f"torch-{torch.__version__.partition('+')[0]}-{digest.hexdigest()[:16]}"


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile each source by itself, side by side, link, and rename into place."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        compiling = [
            [compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        run_compilers(*compiling)
        made = Path(folder) / LIBRARY
        # OpenMP is not linked: its functions are found in the runtime that torch has loaded, since
        # a second one would keep threads of its own
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        linked = [*map(str, objects), *undefined, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        run_compilers([compiler, "-shared", "-o", str(made), *linked])
        made.replace(library)


def run_compilers(*commands: list[str]) -> None:
    """Run the compiler several times at once, and wait for all.

    Raises:
        CannotBuild: One of them failed.
    """
    with ThreadPoolExecutor(len(commands)) as pool:
        for failure in pool.map(_failure, commands):
            if failure is not None:
                raise CannotBuild(failure)


def _failure(command: list[str]) -> str | None:
    """Run the compiler; None, or what was wrong."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"the compiler took more than {BUILD_SECONDS} s"
    except OSError as error:
        return f"the compiler cannot be run: {error.strerror or error}"
    if done.returncode == 0:
        return None
    said = done.stderr.splitlines()
    errors = [line for line in said if "error" in line] or said
    detail = errors[0].strip()[:200] if errors else f"exit code {done.returncode}"
    return f"the compiler failed: {detail}"
