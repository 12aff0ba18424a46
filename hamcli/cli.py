"""Typer commands: read words, call one function, show, exit; nothing heavy at the top."""

import os
import shlex
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hamcli import __version__
from hamcli.errors import (
    EXIT_INTERNAL,
    GateFailed,
    HamError,
    InputRefused,
    ResourceError,
    UsageError,
    printable,
    shorten,
)

app = typer.Typer(
    name="ham",
    help="Make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good.",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)
recipes = typer.Typer(help="Shipped recipes, validation and the JSON Schema.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
bench = typer.Typer(help="What HAM costs on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

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
FormatWord = Annotated[
    str | None, typer.Option("--format", help="Form of the result: dense or packed.")
]
DropWord = Annotated[
    float | None, typer.Option("--max-drop", help="Gate: greatest loss of quality.")
]
OverwriteWord = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
JsonWord = Annotated[bool, typer.Option("--json", help="Result as one JSON document on stdout.")]
QuietWord = Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")]
VerboseWord = Annotated[bool, typer.Option("-v", "--verbose", help="Notes too.")]


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"ham {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good."""


def _layers(recipe: str | None, settings: list[str] | None, **words: Any) -> list[Any]:
    """The words of a command as layers of a recipe, the stronger later."""
    from hamcli.recipe import recipe_layer, values_layer, words_layer

    layers = [recipe_layer(recipe)] if recipe is not None else []
    for key, value in words.items():
        if key == "target" and value is not None:
            value = _targets(value)
        layers.append(values_layer({FLAGS[key]: value}, f"--{key.replace('_', '-')}"))
    return [*layers, words_layer(settings or [])]


def _targets(text: str) -> float | list[float]:
    """One sparsity, or several with commas between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            "E107", "not a sparsity", "--target", printable(text), "0.9, or 0.5,0.8,0.9"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


FLAGS = {
    "model": "model.id",
    "config": "model.config",
    "task": "model.task",
    "data": "data.source",
    "target": "sparsity.target",
    "method": "sparsity.method",
    "pattern": "sparsity.pattern",
    "steps": "training.steps",
    "seed": "training.seed",
    "device": "training.device",
    "format": "export.format",
    "max_drop": "gate.max_drop",
}


@app.command()
def sparsify(
    model: ModelWord = None,
    target: TargetWord = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    out: OutWord = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    method: MethodWord = None,
    pattern: PatternWord = None,
    steps: StepsWord = None,
    seed: SeedWord = None,
    device: DeviceWord = None,
    format_: FormatWord = None,
    max_drop: DropWord = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last run checkpoint.")
    ] = False,
    overwrite: OverwriteWord = False,
    keep_run: Annotated[bool, typer.Option("--keep-run", help="Keep OUT.run when done.")] = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Fine-tune with HAM to a sparsity, prune exactly, export, report."""
    layers = _layers(
        recipe,
        setting,
        model=model,
        config=config,
        task=task,
        data=data,
        target=target,
        method=method,
        pattern=pattern,
        steps=steps,
        seed=seed,
        device=device,
        format=format_,
        max_drop=max_drop,
    )
    _refuse_no_model(model, layers)
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher("sparsify") as watcher:
        watcher.stage("starting")
        from hamcli.defaults import out_folder
        from hamcli.opening import complete
        from hamcli.pipeline import run_sparsify

        read = complete(layers, has_recipe=recipe is not None)
        folder = out or out_folder(read.recipe.model.id or "", read.recipe.sparsity.target)
        report = run_sparsify(
            read,
            out=folder,
            resume=resume,
            overwrite=overwrite,
            keep_run=keep_run,
            progress=watcher,
            command=shlex.join(["ham", *sys.argv[1:]]),
        )
    _show_report(screen, report, folder)


@app.command()
def prune(
    model: ModelWord = None,
    target: TargetWord = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    out: OutWord = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    method: PruneMethodWord = None,
    pattern: PatternWord = None,
    max_drop: DropWord = None,
    overwrite: OverwriteWord = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Prune exactly in one shot, without training; export, report."""
    layers = _layers(
        recipe,
        setting,
        model=model,
        config=config,
        task=task,
        data=data,
        target=target,
        method=method,
        pattern=pattern,
        max_drop=max_drop,
    )
    _refuse_no_model(model, layers)
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher("prune") as watcher:
        watcher.stage("starting")
        from hamcli.defaults import out_folder
        from hamcli.opening import complete
        from hamcli.pruning import prune as prune_model

        read = complete(layers, has_recipe=recipe is not None)
        folder = out or out_folder(read.recipe.model.id or "", read.recipe.sparsity.target)
        report = prune_model(read, out=folder, overwrite=overwrite, progress=watcher)
    _show_report(screen, report, folder)


def _refuse_no_model(model: str | None, layers: list[Any]) -> None:
    said = [layer.data.get("model") for layer in layers]
    if model is None and not any(isinstance(one, dict) and one.get("id") for one in said):
        raise UsageError("E103", "no model", "MODEL", "", "a hub id, folder or builtin:minilm")


def _show_report(screen: Any, report: Any, folder: Path) -> None:
    from hamcli.console import size, table

    found, quality = report.sparsity, report.quality
    rows = [
        ("sparsity of targets", f"{found.achieved:.4%}", f"{found.zeros:,} of {found.total:,}"),
        ("of all parameters", f"{found.overall_achieved:.4%}", f"of {found.num_parameters:,}"),
    ]
    if quality is not None:
        rows.append((quality.metric + ", sparse", _number(quality.sparse), quality.data))
        if quality.dense is not None:
            rows.append((quality.metric + ", dense", _number(quality.dense), ""))
        if quality.one_shot is not None:
            rows.append((quality.metric + ", one-shot", _number(quality.one_shot), "no training"))
        if quality.drop is not None:
            rows.append(
                ("drop", _number(quality.drop), "" if quality.higher_is_better else "relative")
            )
    rows.append(
        (
            "size",
            size(report.size.dense_bytes),
            f"{size(report.size.packed_bytes)} packed, {size(report.size.gzip_bytes)} after gzip",
        )
    )
    screen.result(
        report.to_dict(),
        table("", ["", "", ""], rows),
        "speed: " + (_speed(report) or "not measured"),
        f"written to {folder}",
    )
    if report.gate is not None and not report.gate.passed:
        failed = [one for one in report.gate.conditions if not one.passed]
        faults = [GateFailed("E301", "gate failed", folder, _condition(one)) for one in failed]
        raise GateFailed("E301", "gate failed", folder, faults[0].why, others=faults[1:])


def _speed(report: Any) -> str:
    """The honest line on speed."""
    if report.speed is None:
        return str(report.speed_reason or "")
    return f"{report.speed.ratio:.2f} x dense with {report.speed.runtime}"


def _condition(one: Any) -> str:
    relation = "above" if one.name == "max_drop" else "below"
    return f"{one.name}: {_number(one.value)} is {relation} {one.limit:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or .safetensors file.")],
    as_json: JsonWord = False,
    all_: Annotated[bool, typer.Option("--all", help="Every tensor, not the largest 40.")] = False,
) -> None:
    """Sparsity, near-zero mass, 2:4 fit, dtype and bytes of each tensor of a checkpoint."""
    from hamcli.checkpoint.inspection import inspect as inspect_path
    from hamcli.console import Screen, size, table

    if not path.exists():
        raise InputRefused(
            "E401", "no such checkpoint", path, "", "a folder or a .safetensors file"
        )
    found = inspect_path(path)
    shown = found.tensors if all_ else sorted(found.tensors, key=lambda one: -one.total)[:40]
    rows = [
        (
            one.name,
            "x".join(map(str, one.shape)),
            one.dtype,
            size(one.bytes),
            f"{one.sparsity:.2%}",
            f"{one.near_zero / max(1, one.total):.2%}",
            f"{one.fits['2:4']:.1%}" if "2:4" in one.fits else "-",
        )
        for one in shown
    ]
    left = len(found.tensors) - len(shown)
    Screen(as_json=as_json).result(
        asdict(found),
        table("", ["tensor", "shape", "dtype", "bytes", "zeros", "near zero", "2:4 fit"], rows),
        *([f"... and {left} smaller tensors (--all shows them)"] if left else []),
        f"matrices: {found.matrix_zeros:,} zeros of {found.matrix_total:,} "
        f"({found.matrix_zeros / max(1, found.matrix_total):.4%}); "
        f"all: {found.zeros:,} of {found.total:,}; "
        f"{size(found.file_bytes)} in {len(found.files)} file(s)",
    )


@app.command("eval")
def evaluate(
    model: ModelWord = None,
    against: Annotated[str | None, typer.Option("--against", help="The dense model.")] = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    max_drop: DropWord = None,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Quality of a checkpoint on held-out data, and its loss against the dense one."""
    layers = _layers(recipe, setting, model=model, config=config, task=task, data=data)
    _refuse_no_model(model, layers)
    if max_drop is not None and against is None:
        raise UsageError("E105", "nothing to compare with", "--max-drop", "", "--against DENSE")
    from hamcli.console import Screen, table

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher("eval") as watcher:
        watcher.stage("starting")
        from hamcli.opening import complete
        from hamcli.pruning import evaluate as evaluate_model

        read = complete(layers, has_recipe=recipe is not None)
        found = evaluate_model(read, against=against, progress=watcher)
    rows = [(found.metric, _number(found.value)), ("dense", _number(found.dense))]
    rows += [("drop", _number(found.drop)), ("agreement with dense", _number(found.agreement))]
    rows += [("loss", _number(found.loss)), ("examples", str(found.num_examples))]
    screen.result(asdict(found), table("", ["", ""], rows), found.data)
    if max_drop is not None and found.drop is not None and found.drop > max_drop:
        raise GateFailed(
            "E301", "gate failed", model or "", f"drop {found.drop:.6g} is above {max_drop:g}"
        )


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or .safetensors file.")],
    min_sparsity: Annotated[
        float | None, typer.Option("--min-sparsity", min=0.0, max=1.0, help="Least share of zeros.")
    ] = None,
    max_drop: DropWord = None,
    as_json: JsonWord = False,
) -> None:
    """CI gate: exit 0, or 3 with one line a failed condition. Counts the zeros anew."""
    from hamcli.console import Screen
    from hamcli.gate import check as check_path
    from hamcli.gate import refuse_failures

    found = check_path(path, min_sparsity=min_sparsity, max_drop=max_drop)
    drop = "" if found.drop is None else f", drop {found.drop:.6g}"
    verdict = "failed" if found.failures else "passed"
    Screen(as_json=as_json).result(
        asdict(found),
        f"{verdict}: sparsity {found.sparsity:.6g} ({found.zeros:,} of {found.total:,}){drop}",
    )
    refuse_failures(found)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or .safetensors file.")],
    form: Annotated[str, typer.Option("--format", help="dense or packed.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder, or file, of the result.")
    ] = None,
    overwrite: OverwriteWord = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Convert dense to packed, which is smaller and needs `import hamcli`, or back, bit for bit."""
    if form not in ("dense", "packed"):
        raise UsageError("E118", "no such format", f"--format {form}", "", "dense or packed")
    from hamcli.console import Screen, size
    from hamcli.exporting import export as export_path

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    suffix = path.suffix if path.is_file() else ""
    target = out or path.with_name(f"{path.name.removesuffix(suffix)}-{form}{suffix}")
    with screen.watcher("export") as watcher:
        found = export_path(path, form, out=target, overwrite=overwrite, progress=watcher)
    screen.result(
        asdict(found),
        f"{size(found.dense_bytes)} dense, {size(found.packed_bytes)} packed: "
        f"{found.ratio:.2f} x smaller",
        f"written to {found.out}",
    )


@app.command()
def plan(
    model: ModelWord = None,
    target: TargetWord = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    method: MethodWord = None,
    pattern: PatternWord = None,
    steps: StepsWord = None,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Dry run: matched weights, steps, memory, disk, time; writes nothing."""
    layers = _layers(
        recipe,
        setting,
        model=model,
        config=config,
        task=task,
        data=data,
        target=target,
        method=method,
        pattern=pattern,
        steps=steps,
    )
    _refuse_no_model(model, layers)
    from hamcli.console import Screen, duration, size, table

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher("plan") as watcher:
        watcher.stage("starting")
        from hamcli.opening import complete
        from hamcli.planning import plan as plan_run

        found = plan_run(complete(layers, has_recipe=recipe is not None), watcher)
    rows = [
        ("task", found.task),
        ("data", found.data),
        ("targets", f"{len(found.targets)} tensors, {found.prunable:,} weights"),
        ("zeros at the end", f"{found.zeros:,} ({found.overall_sparsity:.2%} of all parameters)"),
        ("stay dense", ", ".join(found.excluded) or "nothing"),
        ("steps", f"{found.steps:,}, about {duration(found.seconds)} here"),
        ("memory", f"{size(found.memory_bytes)} and activations"),
        ("disk", size(found.disk_bytes)),
        *(("cost", cost) for cost in found.costs),
    ]
    wide = table("", ["", ""], rows)
    wide.columns[1].justify = "left"
    screen.result(asdict(found), wide)


@app.command()
def theory(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for theory.html, .png and .json.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random problem.")] = 0,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Check the paper's claims on linear regression with our own step; exit 3 if one fails."""
    from hamcli.console import Screen, duration, table

    screen = Screen(quiet=quiet, as_json=as_json)
    began = time.monotonic()
    with screen.watcher("theory") as watcher:
        watcher.stage("starting")
        from hamcli.theory import run_checks
        from hamcli.theory.page import cell_text, make_folder, write_results
        from hamcli.theory.references import require_scipy

        require_scipy()
        if out is not None:
            make_folder(out)
        found = run_checks(seed, stage=watcher.stage)
        if out is not None:
            watcher.stage("drawing")
            write_results(found, out)
    shown: list[Any] = []
    for one in found.checks:
        rows = [[cell_text(cell) for cell in row] for row in one.rows]
        shown += [one.title, *(f"  {line.line}" for line in one.claims)]
        shown += [table("", one.columns, rows), ""]
    where = f"written to {out}" if out is not None else "--out DIR writes the plots"
    screen.result(found.to_dict(__version__), *shown, where)
    screen.say(f"ham: {duration(time.monotonic() - began)}")
    failed = [GateFailed("E302", "a claim of the theory fails", "", one.line.split("  ", 1)[1])
              for one in found.failures]  # fmt: skip
    if failed:
        first = failed[0]
        raise GateFailed("E302", first.what, "", first.why, others=failed[1:])


@app.command()
def compare(
    model: ModelWord = None,
    methods: Annotated[
        str, typer.Option("--methods", help="As gradual,ac-dc; dense = fine-tuned as long.")
    ] = "gradual,ac-dc,rigl,str",
    targets: Annotated[str, typer.Option("--targets", help="Sparsities, as 0.9,0.95.")] = "0.9",
    seeds: Annotated[str, typer.Option("--seeds", help="The same for all, as 0,1,2.")] = "0,1,2",
    ham: Annotated[str, typer.Option("--ham", help="on, off or both.")] = "both",
    trials: Annotated[
        int,
        typer.Option("--trials", min=1, help="Learning rates tried for each method; 1 = none."),
    ] = 3,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    out: OutWord = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    pattern: PatternWord = None,
    steps: StepsWord = None,
    device: DeviceWord = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models, in OUT/runs.")] = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Methods and sparsities under one budget: lr tuned alike, paired seeds; goes on when rerun."""
    layers = _layers(
        recipe,
        setting,
        model=model,
        config=config,
        task=task,
        data=data,
        pattern=pattern,
        steps=steps,
        device=device,
    )
    _refuse_no_model(model, layers)
    from hamcli.console import Screen, table

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher("compare") as watcher:
        watcher.stage("starting")
        from hamcli.comparison import Grid
        from hamcli.comparison import compare as compare_methods
        from hamcli.comparison.page import pair_table, quality_table, references
        from hamcli.defaults import compare_folder
        from hamcli.opening import complete

        grid = Grid(
            tuple(_listed(methods, str, "--methods")),
            tuple(_listed(targets, float, "--targets")),
            tuple(_listed(seeds, int, "--seeds")),
            _switches(ham),
            trials,
        )
        read = complete(layers, has_recipe=recipe is not None)
        folder = out or compare_folder(read.recipe.model.id or "")
        found = compare_methods(read, grid, out=folder, keep=keep, progress=watcher)
    better = "higher" if found.higher_is_better else "lower"
    screen.result(
        found.to_dict(__version__),
        f"{found.metric}, {better} is better, mean ± standard error",
        table("", *quality_table(found)),
        *(f"{name}: {value}" for name, value in references(found)),
        *(["", "HAM on minus off, seed by seed"] if found.pairs else []),
        *([table("", *pair_table(found))] if found.pairs else []),
        f"written to {folder}",
    )


def _listed(text: str, kind: Any, flag: str) -> list[Any]:
    """Words with commas between them, each of a kind."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        wanted = "whole numbers, as 0,1,2" if kind is int else "numbers, as 0.9,0.95"
        raise UsageError("E108", "not a list to compare", flag, printable(text), wanted) from None


def _switches(text: str) -> tuple[bool, ...]:
    known = {"on": (True,), "off": (False,), "both": (False, True), "on,off": (False, True)}
    if text not in known:
        raise UsageError("E108", "not a list to compare", "--ham", printable(text), "on, off, both")
    return known[text]


@recipes.command("list")
def list_recipes() -> None:
    """Names and first lines of the shipped recipes."""
    from hamcli.recipe import shipped_names, shipped_text

    for name in shipped_names():
        first = shipped_text(name).splitlines()[0].lstrip("# ")
        sys.stdout.write(f"{name:22} {first}\n")


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A shipped recipe or a file.")]) -> None:
    """Text of a recipe."""
    from hamcli.recipe import recipe_layer, shipped_names, shipped_text

    recipe_layer(name)
    text = shipped_text(name) if name in shipped_names() else Path(name).read_text("utf-8")
    sys.stdout.write(text)


@recipes.command("validate")
def validate_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe or a file.")],
) -> None:
    """Check a recipe; every fault with its line and column."""
    from hamcli.recipe import read_recipe, recipe_layer

    read_recipe([recipe_layer(name)])
    sys.stdout.write(f"{printable(name)}: valid\n")


@recipes.command("schema")
def show_schema() -> None:
    """JSON Schema of recipes, for editors."""
    import json

    from hamcli.recipe import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n")


@bench.command("step")
def bench_step(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="Hub id (org/name[@revision]), folder, .safetensors or builtin:minilm.",
        ),
    ] = "builtin:minilm",
    base: Annotated[
        Literal["adamw", "adam", "sgd"], typer.Option("--base", help="Base optimizer.")
    ] = "adamw",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the weights.")
    ] = "float32",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Default: torch's own.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, help="How often each form is timed.")
    ] = 15,
    config: ConfigWord = None,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """What an optimizer step with HAM and a choice of masks cost here, beside torch's own step."""
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher("bench") as watcher:
        watcher.stage("starting")
        from hamcli.benchmarking.model import bench_model

        found = bench_model(
            model,
            config=config,
            base=base,
            dtype=dtype,
            threads=threads,
            rounds=rounds,
            progress=watcher,
        )
    _show_costs(screen, found)


def _show_costs(screen: Any, found: Any) -> None:
    from hamcli.console import table

    step, chosen = found.step, found.selection
    how = f"{step.threads} thread(s), {step.clock} time, {step.rounds} rounds"
    columns = ["ms", "ratio", "fastest", "10 % .. 90 %", "extra MiB"]
    screen.result(
        found.as_json(),
        f"one step: {step.base}, {step.num_weights:,} weights in {step.dtype}, {how}",
        table("", ["form", *columns], map(_cost_row, step.variants)),
        f"training: {_training_words(found)}",
        f"exponents: {_exponent_words(step.exponents)}",
        f"extension: {step.native}",
        f"\nchoice of 90 % of {chosen.num_weights:,} weights, "
        f"which leaves {chosen.mask_bytes / 2**20:.1f} MiB of masks",
        table("", ["part", *columns], map(_cost_row, chosen.variants)),
        f"\n{found.conclusion}",
    )


def _cost_row(one: Any) -> tuple[str, ...]:
    low, high = one.ratio_spread
    extra = "-" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:.1f}"
    ratios = f"{one.ratio:.2f}", f"{one.fastest_ratio:.2f}", f"{low:.2f} .. {high:.2f}"
    return (one.name, f"{one.seconds * 1e3:.1f}", *ratios, extra)


def _training_words(found: Any) -> str:
    seconds = found.step.training_seconds
    if seconds is None:
        return str(found.training)
    return (
        f"forward and backward {seconds * 1e3:.0f} ms ({found.training}); "
        f"the step is {found.step.step_share:.1%} of both"
    )


def _exponent_words(found: Any) -> str:
    if found is None:
        return "not measured"
    return (
        f"mean {found.mean:.2g}, greatest {found.max:.2g}, {found.moved_fraction:.1%} of the "
        f"weights moved, {found.clamped_fraction:.1%} at the clamp"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if argv is not None:
        sys.argv = ["ham", *argv]
    sys.exit(_settled(_run()))


def _run() -> int:
    try:
        code = app(prog_name="ham", standalone_mode=False)
    except HamError as error:
        return _told(error)
    except KeyboardInterrupt:
        sys.stderr.write("\nham: interrupted before anything was saved\n")
        return 130
    except MemoryError:
        return _told(ResourceError("E543", "not enough memory", "", "", "a smaller batch_size"))
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _told(
            ResourceError(
                "E506", "the system refused", error.filename or "", error.strerror or str(error)
            )
        )
    except Exception as error:  # noqa: BLE001 - the one place that catches: one line, not a trace
        return _unknown(error)
    return code if isinstance(code, int) else 0


def _unknown(error: Exception) -> int:
    # Typer's own errors of usage are of private classes, told apart by what they can do.
    if hasattr(error, "format_message"):
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(error.format_message() + "\n")
            return 2
        why = " ".join(error.format_message().split())
        return _told(UsageError("E101", why, hints=["ham --help, or ham COMMAND --help"]))
    if type(error).__name__ == "Abort":
        return 130
    if os.environ.get("HAM_DEBUG") == "1":
        traceback.print_exc()
    if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        return _told(ResourceError("E543", "not enough memory", "", "", "a smaller batch_size"))
    text = f"ham: error[HAM-E001]: internal error: {type(error).__name__}: {printable(str(error))}"
    sys.stderr.write(shorten(text, 300) + "\n  hint: HAM_DEBUG=1 shows where; please report it\n")
    return EXIT_INTERNAL


def _told(error: HamError) -> int:
    if os.environ.get("HAM_DEBUG") == "1":
        traceback.print_exc()
    try:
        sys.stderr.write("\n".join(error.lines()) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    return error.exit_code


def _settled(code: int) -> int:
    """Flush what is left; a reader that has gone changes nothing."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed by the end of the process
    return code
