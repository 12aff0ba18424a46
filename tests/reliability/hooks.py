"""What a case does before `main`, or instead of it, to look at something from within."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

HERE = __name__


def _print_fifty(save: Any) -> None:
    import hamcli.cli

    def main(argv: list[str]) -> None:
        for _ in range(50):
            path = save(Path(argv[0]))
            print(hashlib.sha256(path.read_bytes()).hexdigest())
        sys.exit(0)

    hamcli.cli.main = main  # type: ignore[assignment]


def export_fifty_times() -> None:
    """Export a model with several tensors fifty times; print a hash a line."""
    import torch
    import transformers

    from hamcli.checkpoint.dense import write_model
    from hamcli.checkpoint.source import find_model
    from tests.reliability import tiny

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.CONFIG))

    def save(folder: Path) -> Path:
        if not (folder / "source").exists():
            model.save_pretrained(folder / "source")
        stage = folder / os.urandom(8).hex()
        stage.mkdir()
        write_model(model, find_model(str(folder / "source"), hashed=False), stage)
        return stage / "model.safetensors"

    _print_fifty(save)


def save_fifty_times_with_eight_keys() -> None:
    """What the library makes of metadata with several keys: the control of the test above."""
    import torch
    from safetensors.torch import save_file

    def save(folder: Path) -> Path:
        metadata = {f"key{number}": str(number) for number in range(8)}
        save_file({"x": torch.ones(2)}, folder / "x.safetensors", metadata=metadata)
        return folder / "x.safetensors"

    _print_fifty(save)


def _with_identity(**changes: Any) -> None:
    import dataclasses

    from hamcli import pipeline

    module: Any = pipeline
    original = module.run_identity
    module.run_identity = lambda *given: dataclasses.replace(original(*given), **changes)


def other_version() -> None:
    """Another version of torch."""
    from hamcli.runstate import installed_versions

    _with_identity(versions={**installed_versions(), "torch": "2.99.0"})


def other_threads() -> None:
    """Another number of threads."""
    import torch

    torch.set_num_threads(2)


def other_processes() -> None:
    """Another number of devices."""
    _with_identity(num_processes=2)


def eat_the_disk() -> None:
    """Fill the disk that holds the file `EAT` when step `EAT_AT_STEP` is done."""
    from hamcli import console

    original = console.PlainWatcher.step

    def step(self: Any, record: Any) -> None:
        original(self, record)
        if record.step == int(os.environ["EAT_AT_STEP"]):
            with open(os.environ["EAT"], "wb", buffering=0) as stream:
                try:
                    while stream.write(b"x" * 4096) == 4096:
                        pass
                except OSError:
                    pass

    console.PlainWatcher.step = step  # type: ignore[method-assign]


def never_load_a_model() -> None:
    """A model that is opened ends the case with a code of its own."""
    from hamcli import opening

    module: Any = opening
    module.load_model = lambda *_, **__: os._exit(55)


def wait_for_go() -> None:
    """Wait until the file `GO` is there: several cases begin at one moment."""
    go = Path(os.environ["GO"])
    while not go.exists():
        pass


def wait_for_go_without_locks() -> None:
    """The same on a file system on which every lock succeeds."""
    import filelock

    filelock._unix.fcntl.flock = lambda *_: None  # type: ignore[attr-defined]
    wait_for_go()
