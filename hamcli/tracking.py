"""What a run tells experiment trackers (TensorBoard, Weights & Biases, MLflow and others).

accelerate knows how to speak to each; this module says what. Files lie in `OUT.logs` beside the
result, one folder for a run and its resumptions. A tracker that fails does not fail the run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hamcli.errors import UsageError
from hamcli.progress import Progress, StepRecord
from hamcli.report.records import Report

PROJECT = "ham"
_PACKAGES = {"comet_ml": "comet-ml"}  # where they are not called like their tracker
LONGEST = 250  # characters of a setting: MLflow has a limit


def logs_folder(out: Path) -> Path:
    """`OUT.logs`, beside OUT."""
    return out.with_name(f"{out.name}.logs")


def refuse_missing(names: Sequence[str]) -> None:
    """See that every tracker is installed, before anything is loaded.

    Raises:
        UsageError: E247, one is not.
    """
    from accelerate.tracking import get_available_trackers

    installed = {str(one) for one in get_available_trackers()}
    for name in names:
        if name not in installed:
            package = _PACKAGES.get(name, name)
            raise UsageError(
                "E247",
                "the tracker is not installed",
                "training.trackers",
                name,
                f"pip install {package}, or leave it out",
            )


class Trackers:
    """The trackers of one run; of process 0 only.

    Args:
        names: As accelerate calls them; may be empty.
        out: The run's OUT.
        recipe: Shown as the run's settings.
        progress: Hears when a tracker fails.
    """

    def __init__(
        self, names: Sequence[str], out: Path, recipe: Mapping[str, Any], progress: Progress
    ) -> None:
        self._progress = progress
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder = logs_folder(out)
        folder.mkdir(exist_ok=True)
        settings = flat_settings(recipe)
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            places = [str(folder)] if kind.requires_logging_directory else []
            more = {"dir": str(folder)} if name == "wandb" else {}
            self._guard(lambda: self._start(kind(PROJECT, *places, **more), settings))  # noqa: B023 - called at once

    def _start(self, tracker: Any, settings: Mapping[str, Any]) -> None:
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        self._trackers.append(tracker)

    def step(self, record: StepRecord) -> None:
        """Tell of one optimizer step."""
        if not self._trackers:
            return
        values = {
            "train/loss": record.loss,
            "train/lr": record.lr,
            "train/grad_norm": record.grad_norm,
            "sparsity/masked": record.sparsity,
            "ham/exponent_mean": record.exponent_mean,
            "ham/exponent_max": record.exponent_max,
            "ham/moved_fraction": record.moved_fraction,
        }
        self._log({key: one for key, one in values.items() if one is not None}, record.step)

    def result(self, report: Report) -> None:
        """Tell of the written model."""
        if not self._trackers:
            return
        values: dict[str, float | None] = {
            "result/sparsity": report.sparsity.achieved,
            "result/zeros": float(report.sparsity.zeros),
        }
        if report.quality is not None:
            values |= {
                "result/dense": report.quality.dense,
                "result/sparse": report.quality.sparse,
                "result/drop": report.quality.drop,
            }
        steps = report.training.steps if report.training is not None else 0
        self._log({key: one for key, one in values.items() if one is not None}, steps)

    def close(self) -> None:
        """Write what is left, also where the run was stopped."""
        for tracker in self._trackers:
            self._guard(tracker.finish)
        self._trackers = []

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in list(self._trackers):
            if not self._guard(lambda: tracker.log(dict(values), step=step)):  # noqa: B023 - called at once
                self._trackers.remove(tracker)

    def _guard(self, speak: Any) -> bool:
        try:
            speak()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises is not the run's end
            self._progress.warn(
                f"a tracker failed and is left out: {type(error).__name__}: {error}"
            )
            return False
        return True


def flat_settings(recipe: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """The recipe as `section.key` to a plain value; lists as text."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{head}{key}"
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{name}.")
        elif isinstance(value, bool | int | float):
            found[name] = value
        else:
            found[name] = str(value)[:LONGEST]
    return found
