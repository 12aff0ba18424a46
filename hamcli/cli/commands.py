"""The commands: read words, call one function, show; nothing heavy at the top."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from hamcli import __version__
from hamcli.cli.words import (
    ConfigWord,
    DataWord,
    DeviceWord,
    DropWord,
    FormatWord,
    JsonWord,
    MethodWord,
    ModelWord,
    OutWord,
    OverwriteWord,
    ParallelWord,
    PatternWord,
    PruneMethodWord,
    PruneTargetWord,
    QuietWord,
    RecipeWord,
    SeedWord,
    SetWords,
    StepsWord,
    TargetWord,
    TaskWord,
    VerboseWord,
    layers_of,
    listed,
    switches,
)
from hamcli.errors import GateFailed, UsageError, printable
from hamcli.parallel.launch import refuse_several

app = typer.Typer(
    name="ham",
    help="Make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good.",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)
recipes = typer.Typer(help="Shipped recipes, validation and the JSON Schema.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
bench = typer.Typer(
    help="What HAM costs, and what zeros gain, on this machine.", no_args_is_help=True
)
app.add_typer(bench, name="bench")


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"ham {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make pretrained networks sparse with Hyperbolic Aware Minimization, and keep them good."""
    if ctx.invoked_subcommand not in (None, "sparsify"):
        refuse_several(ctx.invoked_subcommand)


@app.command()
def sparsify(
    ctx: typer.Context,
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
    parallel: ParallelWord = None,
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
    layers = layers_of(ctx.params)
    from hamcli.cli.shown import show_report
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.completing import complete
        from hamcli.defaults import out_folder
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
    named = read.recipe.model
    show_report(screen, report, folder, model=named.id, config=named.config)


@app.command()
def prune(
    ctx: typer.Context,
    model: ModelWord = None,
    target: PruneTargetWord = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    out: OutWord = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    method: PruneMethodWord = None,
    pattern: PatternWord = None,
    format_: FormatWord = None,
    max_drop: DropWord = None,
    overwrite: OverwriteWord = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Prune exactly in one shot, without training. File by file where that will do."""
    layers = layers_of(ctx.params)
    from hamcli.cli.shown import show_report
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.completing import complete
        from hamcli.defaults import out_folder
        from hamcli.pruning.by_files import prune as prune_model

        read = complete(layers, has_recipe=recipe is not None)
        folder = out or out_folder(read.recipe.model.id or "", read.recipe.sparsity.target)
        report = prune_model(read, out=folder, overwrite=overwrite, progress=watcher)
    named = read.recipe.model
    show_report(screen, report, folder, model=named.id, config=named.config)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or .safetensors file.")],
    as_json: JsonWord = False,
    all_: Annotated[
        bool, typer.Option("--all", help="Each tensor, not a line for all layers.")
    ] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Read the values: zeros, N:M fit, duplicates.")
    ] = False,
    quiet: QuietWord = False,
) -> None:
    """Tensors of a checkpoint: shapes, dtypes, bytes, ties. From headers alone unless --values."""
    from hamcli.checkpoint.inspection import dense_size
    from hamcli.checkpoint.inspection import inspect as inspect_path
    from hamcli.cli.shown import show_inspection
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, as_json=as_json)
    if not values:
        show_inspection(screen, inspect_path(path), each=all_)
        return
    with screen.watcher() as watcher:
        watcher.begin_bytes("reading values", 2 * dense_size(path))
        found = inspect_path(path, values=True, advance=watcher.bytes_done)
        watcher.end_bytes()
    show_inspection(screen, found, each=all_)


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: ModelWord = None,
    against: Annotated[str | None, typer.Option("--against", help="The dense model.")] = None,
    recipe: RecipeWord = None,
    setting: SetWords = None,
    data: DataWord = None,
    task: TaskWord = None,
    config: ConfigWord = None,
    limit: DropWord = None,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Quality of a checkpoint, and its loss against the dense one. On held-out data."""
    layers = layers_of(ctx.params)
    if limit is not None and against is None:
        raise UsageError("E105", "nothing to compare with", "--max-drop", "", "--against DENSE")
    from hamcli.cli.shown import show_evaluation
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.checkpoint_quality import evaluate as evaluate_model
        from hamcli.completing import complete

        read = complete(layers, has_recipe=recipe is not None)
        found = evaluate_model(read, against=against, progress=watcher)
    show_evaluation(screen, found)
    if limit is not None and found.drop is not None and found.drop > limit:
        raise GateFailed(
            "E301", "gate failed", model or "", f"drop {found.drop:.6g} is above {limit:g}"
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
    from hamcli.cli.shown import show_check
    from hamcli.console import Screen
    from hamcli.gate import check as check_path
    from hamcli.gate import refuse_failures

    found = check_path(path, min_sparsity=min_sparsity, max_drop=max_drop)
    show_check(Screen(as_json=as_json), found)
    refuse_failures(found)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or .safetensors file.")],
    form: Annotated[str, typer.Option("--format", help="dense, packed or onnx.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder, or file, of the result.")
    ] = None,
    overwrite: OverwriteWord = False,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
    verbose: VerboseWord = False,
) -> None:
    """Convert to packed, dense or ONNX.

    Packed is smaller, needs `import hamcli` to load, and goes back to dense bit for bit.
    """
    if form not in ("dense", "packed", "onnx"):
        raise UsageError(
            "E118", "no such format", f"--format {printable(form)}", "", "dense, packed or onnx"
        )
    from hamcli.cli.shown import show_export, show_onnx
    from hamcli.console import Screen
    from hamcli.defaults import export_path

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    target = out or export_path(path, form)
    with screen.watcher() as watcher:
        if form == "onnx":
            watcher.stage("starting")
            from hamcli.onnx.exporting import export_onnx

            graph = export_onnx(path, out=target, overwrite=overwrite, progress=watcher)
        else:
            from hamcli.exporting import export as convert

            found = convert(path, form, out=target, overwrite=overwrite, progress=watcher)
    if form == "onnx":
        show_onnx(screen, graph)
    else:
        show_export(screen, found)


@app.command()
def plan(
    ctx: typer.Context,
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
    parallel: ParallelWord = None,
    world: Annotated[
        int, typer.Option("--world", min=1, help="Processes that would train together.")
    ] = 1,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Dry run: targets, steps, memory, disk, time, file sizes. Writes nothing."""
    layers = layers_of(ctx.params)
    from hamcli.cli.shown import show_plan
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.completing import complete
        from hamcli.planning import plan as plan_run

        found = plan_run(complete(layers, has_recipe=recipe is not None), watcher, world)
    show_plan(screen, found)


@app.command()
def theory(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for theory.html, .png and .json.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random problem.")] = 0,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Check the paper's claims on linear regression. With our own step; exit 3 if one fails."""
    from hamcli.cli.shown import refuse_failed_claims, show_theory
    from hamcli.console import Screen, duration

    screen = Screen(quiet=quiet, as_json=as_json)
    began = time.monotonic()
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.theory import run_checks
        from hamcli.theory.page import make_folder, write_results
        from hamcli.theory.references import require_scipy

        require_scipy()
        if out is not None:
            make_folder(out)
        found = run_checks(seed, stage=watcher.stage)
        if out is not None:
            watcher.stage("drawing")
            write_results(found, out)
    show_theory(screen, found, out)
    screen.say(f"ham: {duration(time.monotonic() - began)}")
    refuse_failed_claims(found)


@app.command()
def compare(
    ctx: typer.Context,
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
    """Compare methods and sparsities under one budget.

    Learning rates are tuned alike, seeds paired; the same command goes on where it stopped.
    """
    layers = layers_of(ctx.params)
    from hamcli.cli.shown import show_comparison
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, verbose=verbose, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.comparison import Grid
        from hamcli.comparison import compare as compare_methods
        from hamcli.completing import complete
        from hamcli.defaults import compare_folder
        from hamcli.recipe import values_layer

        grid = Grid(
            tuple(listed(methods, str, "--methods")),
            tuple(listed(targets, float, "--targets")),
            tuple(listed(seeds, int, "--seeds")),
            switches(ham),
            trials,
        )
        if grid.targets:  # every run says its own; the recipe of the task may hang on it
            layers.append(values_layer({"sparsity.target": max(grid.targets)}, "--targets"))
        read = complete(layers, has_recipe=recipe is not None)
        folder = out or compare_folder(read.recipe.model.id or "")
        found = compare_methods(read, grid, out=folder, keep=keep, progress=watcher)
    show_comparison(screen, found, folder)


@recipes.command("list")
def list_recipes() -> None:
    """Names of the shipped recipes, and what each is for."""
    from hamcli.recipe import shipped_names, shipped_summary

    for name in shipped_names():
        sys.stdout.write(f"{name:22} {shipped_summary(name)}\n")


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
    from hamcli.cli.shown import show_costs
    from hamcli.console import Screen

    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher() as watcher:
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
    show_costs(screen, found)


@bench.command("runtime")
def bench_runtime(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Finished folder, hub id or .safetensors; default: builtin:minilm, pruned to 0.9.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option("--target", min=0.0, max=1.0, help="Prune in one shot first, in memory."),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="Rows x tokens, as 1x8,8x128; of images the rows, as 1,8."),
    ] = None,
    threads: Annotated[str, typer.Option("--threads", help="As 1,2; each by itself.")] = "1",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, help="How often each runtime is timed.")
    ] = 9,
    config: ConfigWord = None,
    as_json: JsonWord = False,
    quiet: QuietWord = False,
) -> None:
    """Dense torch, hamcli.load, CSR, onnxruntime and OpenVINO on one model, in turns."""
    from hamcli.cli.shown import show_runtimes
    from hamcli.cli.words import input_shapes, thread_counts
    from hamcli.console import Screen

    sizes = input_shapes(shapes) if shapes is not None else None
    numbers = thread_counts(threads)
    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.watcher() as watcher:
        watcher.stage("starting")
        from hamcli.benchmarking.runtime import bench_runtime as bench

        found = bench(
            model,
            config=config,
            target=target,
            shapes=sizes,
            threads=numbers,
            rounds=rounds,
            progress=watcher,
        )
    show_runtimes(screen, found)
