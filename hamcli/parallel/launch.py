"""What a launcher (torchrun, accelerate launch) has said to this process; imports no torch.

A launcher starts the same command several times and tells each process who it is through the
environment. Process 0 speaks and writes; the others are silent, unless it is gone.
"""

import atexit
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from hamcli.errors import RecipeError, UsageError, printable, shorten

TORCHRUN = "torchrun --nproc-per-node N -m hamcli sparsify ..."


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that a launcher started.

    Attributes:
        rank: Its number, from 0.
        size: How many there are, on all machines.
        local_rank: Its number on its machine.
        local_size: How many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """What the launcher said; one process where there was none, or what it said is no number."""
    found = os.environ if environment is None else environment

    def number(key: str, default: int) -> int:
        text = found.get(key, "")
        return int(text) if text.isdecimal() else default

    size = number("WORLD_SIZE", 1)
    rank = number("RANK", 0)
    if rank >= size:  # left over from elsewhere: who is none of several is not one of the silent
        return Launch(size=max(size, 1))
    return Launch(rank, size, number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", size))


def settled_parallel(word: str, environment: Mapping[str, str] | None = None) -> str:
    """What `training.parallel` means under this launcher: none, ddp or fsdp.

    auto is none in one process, else ddp, or fsdp where an accelerate config asks for it.

    Raises:
        RecipeError: E241, several processes are wanted and there is one; E242, the other way round;
            E248, the launcher asks for an engine that is not supported.
        UsageError: E240, the launcher's numbers are none.
    """
    found = os.environ if environment is None else environment
    _refuse_nonsense(found)
    size = launched(found).size
    if size == 1:
        _refuse_lonely(word, found)
        return "none"
    if found.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RecipeError(
            "E248",
            "the engine is not supported",
            "training.parallel",
            "the accelerate config asks for DeepSpeed",
            "ddp or fsdp",
        )
    if word == "none":
        raise RecipeError(
            "E242",
            "a launcher started several processes for a run of one",
            "training.parallel",
            f"none, and WORLD_SIZE is {size}",
            "ddp or fsdp, or no launcher",
        )
    if word == "auto":
        return "fsdp" if found.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"
    return word


def planned_parallel(word: str, world: int) -> str:
    """What `training.parallel` would mean for `world` processes: none, ddp or fsdp.

    Raises:
        RecipeError: E241, several processes are wanted and there is one; E242, the other way round.
    """
    if word == "auto":
        return "ddp" if world > 1 else "none"
    if word == "none" and world > 1:
        raise RecipeError(
            "E242",
            "several processes are planned for a run of one",
            "training.parallel",
            f"none, and --world is {world}",
            "ddp or fsdp, or no --world",
        )
    if word != "none" and world == 1:
        raise RecipeError(
            "E241",
            "there is one process only",
            "training.parallel",
            f"{word}, and --world is 1",
            "--world N, how many would train together",
        )
    return word


def _refuse_nonsense(found: Mapping[str, str]) -> None:
    size, rank = found.get("WORLD_SIZE", ""), found.get("RANK", "")
    if not size:
        return  # RANK alone is nobody's word
    is_number = size.isdecimal() and int(size) > 0
    if is_number and (not rank or (rank.isdecimal() and int(rank) < int(size))):
        return
    raise UsageError(
        "E240",
        "the environment does not say which of how many processes this is",
        "",
        f"WORLD_SIZE={shorten(printable(size), 20)} RANK={shorten(printable(rank), 20)}",
        "a launcher such as torchrun sets both; without one, neither",
    )


def _refuse_lonely(word: str, found: Mapping[str, str]) -> None:
    # `accelerate launch --cpu --num_processes 2` says where to meet, and starts one process
    alone = "ACCELERATE_MIXED_PRECISION" in found and "MASTER_PORT" in found
    if alone and "WORLD_SIZE" not in found:
        raise RecipeError(
            "E241",
            "the launcher started one process only",
            "training.parallel",
            "accelerate launch was asked for several and set no WORLD_SIZE",
            TORCHRUN,
        )
    if word in ("ddp", "fsdp"):
        raise RecipeError(
            "E241",
            "there is one process only",
            "training.parallel",
            f"{word} needs a launcher that starts several, and WORLD_SIZE is "
            f"{found.get('WORLD_SIZE', 'not set')}",
            TORCHRUN,
        )


def refuse_several(command: str) -> None:
    """Stop a command that one process does, but a launcher started several times.

    Raises:
        UsageError: E249.
    """
    size = launched().size
    if size > 1:
        raise UsageError(
            "E249",
            "a launcher started several processes for a command of one",
            f"ham {command}",
            f"WORLD_SIZE is {size}",
            "no launcher; only ham sparsify runs in several processes",
        )


class _Voice:
    """Whether this process is the one that speaks."""

    def __init__(self) -> None:
        self.speaks = launched().rank == 0


_VOICE = _Voice()


def speaks() -> bool:
    """Whether this process tells people what happens: process 0, or who took over from it."""
    return _VOICE.speaks


def take_over() -> None:
    """Speak from now on: those before are gone."""
    _VOICE.speaks = True
    if sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__


def fall_silent() -> None:
    """Write nowhere: another process speaks for this one."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - closed by the process's end


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, its streams flushed by the caller.

    One of several ends without the interpreter's own end: DDP keeps the process group, and gloo's
    threads, beyond `destroy_process_group` (torch 2.13), and one that lets go of its last tensor
    while the interpreter is torn down aborts the process. A complete run ended with -6.
    """
    if launched().size > 1:
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)
