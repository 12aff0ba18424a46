"""The words of commands: declared once, and read into layers of a recipe."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hamcli.errors import UsageError, printable


def finite(value: float | None) -> float | None:
    """The value of an option; NaN would pass every gate, since nothing is above or below it."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


ModelWord = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id (org/name[@revision]), folder, .safetensors or builtin:minilm.",
    ),
]
TargetWord = Annotated[
    str | None,
    typer.Option("--target", help="Sparsity, 0 to 1; several, as 0.5,0.8,0.9, with method ast."),
]
PruneTargetWord = Annotated[str | None, typer.Option("--target", help="Sparsity, 0 to 1.")]
RecipeWord = Annotated[
    str | None, typer.Option("--recipe", help="Shipped recipe or YAML file; default by task.")
]
SetWords = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One recipe key; repeatable."),
]
OutWord = Annotated[Path | None, typer.Option("--out", help="Folder of the result.")]
DataWord = Annotated[
    str | None, typer.Option("--data", help="File, folder or dataset id; default: built-in sample.")
]
TaskWord = Annotated[
    str | None, typer.Option("--task", help="What the model does; default: inferred.")
]
ConfigWord = Annotated[str | None, typer.Option("--config", help="config.json of a bare file.")]
MethodWord = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="gradual (default), one-shot, random, ac-dc, rigl, cyclic, str, spred, pilot, "
        "sign-in or ast.",
    ),
]
PruneMethodWord = Annotated[
    str | None,
    typer.Option("--method", help="one-shot (by sparsity.score; default), wanda or sparsegpt."),
]
PatternWord = Annotated[
    str | None,
    typer.Option("--pattern", help="unstructured, N:M, as 2:4, or block:RxC, as block:4x4."),
]
StepsWord = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
SeedWord = Annotated[int | None, typer.Option("--seed", help="Seed of data order and dropout.")]
DeviceWord = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda[:N] or mps.")]
ParallelWord = Annotated[
    str | None,
    typer.Option("--parallel", help="auto, none, ddp or fsdp; under torchrun, auto is ddp."),
]
FormatWord = Annotated[
    str | None, typer.Option("--format", help="Form of the result: dense or packed.")
]
DropWord = Annotated[
    float | None,
    typer.Option("--max-drop", callback=finite, help="Gate: greatest loss of quality."),
]
OverwriteWord = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
JsonWord = Annotated[bool, typer.Option("--json", help="Result as one JSON document on stdout.")]
QuietWord = Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")]
VerboseWord = Annotated[bool, typer.Option("-v", "--verbose", help="Notes too.")]


def layers_of(params: Mapping[str, Any]) -> list[Any]:
    """Parameters of a command as layers of a recipe, the stronger later.

    Args:
        params: By name; those that are no words for recipe keys are left alone.

    Raises:
        UsageError: E103, no model is named; E107, the target is no sparsity.
    """
    from hamcli.recipe import WORDS, recipe_layer, values_layer, words_layer

    recipe, settings = params.get("recipe"), params.get("setting")
    layers = [recipe_layer(recipe)] if recipe is not None else []
    given = {name.rstrip("_"): value for name, value in params.items()}  # format_ is no builtin
    for name in WORDS:
        value = given.get(name)
        if name == "target" and value is not None:
            value = sparsities(value)
        layers.append(values_layer({WORDS[name]: value}, f"--{name.replace('_', '-')}"))
    layers.append(words_layer(settings or []))
    _refuse_no_model(params.get("model"), layers)
    return layers


def sparsities(text: str) -> float | list[float]:
    """One sparsity, or several with commas between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            "E107", "not a sparsity", "--target", printable(text), "0.9, or 0.5,0.8,0.9"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _refuse_no_model(model: str | None, layers: list[Any]) -> None:
    said = [layer.data.get("model") for layer in layers]
    if model is None and not any(isinstance(one, dict) and one.get("id") for one in said):
        raise UsageError("E103", "no model", "MODEL", "", "a hub id, folder or builtin:minilm")


def listed(text: str, kind: Any, flag: str) -> list[Any]:
    """Words with commas between them, each of a kind."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        wanted = "whole numbers, as 0,1,2" if kind is int else "numbers, as 0.9,0.95"
        raise UsageError("E108", "not a list to compare", flag, printable(text), wanted) from None


def switches(text: str) -> tuple[bool, ...]:
    """Whether HAM is on in the runs of a comparison: one of the two, or both."""
    known = {"on": (True,), "off": (False,), "both": (False, True), "on,off": (False, True)}
    if text not in known:
        raise UsageError("E108", "not a list to compare", "--ham", printable(text), "on, off, both")
    return known[text]


def thread_counts(text: str) -> tuple[int, ...]:
    """Numbers of threads with commas between them."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(1 <= one <= 1024 for one in found):
        raise UsageError(
            "E108", "not a list of threads", "--threads", printable(text), "1 to 1024, as 1,2"
        )
    return found


def input_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Rows x tokens with commas between them; tokens are 0 where none are said."""
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        rows, _, tokens = part.strip().partition("x")
        if not rows.isdecimal() or not (tokens or "0").isdecimal() or part.endswith("x"):
            found = []
            break
        found.append((int(rows), int(tokens or 0)))
    if not found or len(set(found)) < len(found) or not all(1 <= one[0] <= 65536 for one in found):
        raise UsageError(
            "E108",
            "not a list of shapes",
            "--shapes",
            printable(text),
            "rows x tokens, as 1x8,8x128",
        )
    return tuple(found)
