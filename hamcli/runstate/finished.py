"""An OUT that is complete already: what it was made from, and what a killed run left beside it."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamcli.errors import HamError
from hamcli.runstate.folders import read_report, run_folder
from hamcli.runstate.identity import RunIdentity, differences
from hamcli.runstate.run import RunState


@dataclass(frozen=True, slots=True)
class Finished:
    """What a complete OUT says it was made from."""

    recipe: Any
    model: dict[str, str]
    data: dict[str, str] | None
    versions: dict[str, str]

    def is_of(self, identity: RunIdentity) -> bool:
        """Whether a run of `identity` would make the same folder again."""
        saved = replace(
            identity,
            recipe=self.recipe,
            model=self.model,
            data=identity.data if self.data is None else self.data,
        )
        return not differences(saved, identity)


def finished(out: Path) -> Finished | None:
    """What OUT was made from, when it is a complete folder of ours: nothing listed is missing."""
    report = read_report(out)
    if report is None:
        return None
    try:
        if not all((out / one["path"]).stat().st_size == one["bytes"] for one in report["files"]):
            return None
        return Finished(
            report["recipe"],
            dict(report["model"]["sha256"]),
            (report.get("data") or {}).get("sha256"),
            dict(report["environment"]["versions"]),
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None


def remove_leftovers(out: Path) -> None:
    """Remove the OUT.run of a finished OUT, left by a run that was killed at its very end.

    Nothing happens when there is none, or another process holds it.
    """
    if run_folder(out).is_dir():
        with suppress(HamError):
            RunState(out, overwrite=True, resume=True).finish()
