"""Signals at a moment that the run itself reaches: called in a case before `main`.

The moment is said by the environment: `STOP_AT_STEP=3`, or `STOP_AT_STAGE=writing` for the first
part of a job whose name begins so; the signals by `STOP_SIGNALS=SIGTERM,SIGINT`.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from hamcli import console, training

HOOK = f"{__name__}:install"


def at_step(step: int, *signals: str) -> dict[str, Any]:
    """Options of `server.run` that send signals when a step is done."""
    return {"before": HOOK, "env": {"STOP_AT_STEP": str(step), "STOP_SIGNALS": _joined(signals)}}


def at_stage(text: str, *signals: str) -> dict[str, Any]:
    """The same when a part of the job begins."""
    return {"before": HOOK, "env": {"STOP_AT_STAGE": text, "STOP_SIGNALS": _joined(signals)}}


def in_micro_step(number: int, *signals: str) -> dict[str, Any]:
    """The same in the forward pass of a micro-step, counted from 1."""
    return {"before": HOOK, "env": {"STOP_AT_MICRO": str(number), "STOP_SIGNALS": _joined(signals)}}


def _joined(signals: tuple[str, ...]) -> str:
    return ",".join(signals or ("SIGTERM",))


def install() -> None:
    """Send what the environment says when the moment comes."""
    stages = os.environ.get("STOP_AT_STAGE")
    steps = int(os.environ.get("STOP_AT_STEP", "0"))
    micro = int(os.environ.get("STOP_AT_MICRO", "0"))
    watcher: Any = console.PlainWatcher
    if stages is not None:
        watcher.stage = _wrapped(watcher.stage, lambda text: text.startswith(stages))
    if steps:
        watcher.step = _wrapped(watcher.step, lambda record: record.step == steps)
    if micro:
        count = iter(range(1, 10**6))
        module: Any = training
        # asked for once in each micro-step, before its forward pass, and nowhere else
        module.step_seed = _wrapped(
            module.step_seed, lambda *_: next(count) == micro, is_method=False
        )


def _wrapped(
    original: Callable[..., Any], is_moment: Callable[..., bool], *, is_method: bool = True
) -> Callable[..., Any]:
    sent = []

    def wrapper(*given: Any, **named: Any) -> Any:
        if not sent and is_moment(*(given[1:] if is_method else given)):
            sent.append(True)
            for name in os.environ["STOP_SIGNALS"].split(","):
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(0.001)
        return original(*given, **named)

    return wrapper
