"""The quality benchmark: presets of `ham compare` over the sets that prepare.py makes.

    python benchmarks/quality/run.py PRESET --cache DIR --out DIR [--small | --full] [--keep]

    fashion    tiny ResNet on Fashion-MNIST, 90, 95 and 98 %
    mlp        multilayer perceptron on the same, from its own dense training
    rxnfp      BERT masked language model on MOSES SMILES, 80, 90 and 95 %
    rxnmapper  ALBERT masked language model on the same
    spam       MiniLM on mails, 80 and 90 %, from its own dense fine-tune
    movies     MiniLM on rated sentences, 80 and 90 %, the same way
    speeches   SmolLM2-135M on State of the Union speeches, 50 %

`dense` is the same model fine-tuned as long. A preset that was stopped goes on by the same command.
--small is a rehearsal of minutes and proves nothing; --full, the default, is what is reported.
DIR/PRESET-SIZE gets compare.json, compare.html and table.md, which are what is committed.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamcli.comparison import Grid, compare
from hamcli.comparison.page import TABLE
from hamcli.console import Screen
from hamcli.errors import HamError
from hamcli.opening import complete
from hamcli.pipeline import run_sparsify
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe, recipe_layer, values_layer

OFF = {"optimizer.ham.alpha": 0.0, "optimizer.ham.beta": 0.0}
SMALL = {"training.steps": 10, "evaluation.examples": 64, "data.max_examples": 2000}
SMALL_GRID = {"seeds": (0, 1), "trials": 2}


@dataclass(frozen=True)
class Preset:
    """What is compared on what.

    Attributes:
        model: Hub id, builtin, or the name of a set in the cache.
        recipe: Shipped recipe below the settings.
        settings: Over the recipe; `{cache}` stands for the folder of sets.
        grid: Methods, sparsities, seeds, trials.
        head: Settings of the dense training that makes the model, or its head; None needs none.
    """

    model: str
    recipe: str
    settings: dict[str, Any]
    grid: Grid
    head: dict[str, Any] | None = None


MASKED = {
    "data.source": "{cache}/moses/train.txt",
    "data.evaluation": "{cache}/moses/test.txt",
    "data.max_examples": 50_000,
    "training.steps": 400,
    "evaluation.examples": 2000,
}
MASKED_GRID = Grid(("dense", "gradual", "ac-dc"), (0.8, 0.9, 0.95), (0, 1, 2), trials=4)
HEAD = {"sparsity.target": 0.0, "training.steps": 300, "optimizer.lr": 2e-4, "objective.task": 1.0}
LABELLED_GRID = Grid(("dense", "gradual", "ac-dc"), (0.8, 0.9), (0, 1, 2))


def labelled(name: str) -> Preset:
    """MiniLM with a new head on one of the labelled sets."""
    data = {
        "model.task": "text-classification",
        "data.source": f"{{cache}}/{name}/train.jsonl",
        "data.evaluation": f"{{cache}}/{name}/test.jsonl",
        "training.steps": 400,
    }
    return Preset("builtin:minilm", "text-classifier-90", data, LABELLED_GRID, HEAD)


IMAGES = {
    "data.source": "{cache}/fashion-mnist/train.parquet",
    "data.evaluation": "{cache}/fashion-mnist/test.parquet",
}
IMAGES_GRID = Grid(("dense", "gradual", "ac-dc", "rigl", "str"), (0.9, 0.95, 0.98), (0, 1, 2))
# a depthwise convolution over one place has 48 weights of 49 that see nothing
MLP = {**IMAGES, "targets.exclude": ["classifier", "*.dwconv"], "optimizer.lr": 0.01}
MLP_HEAD = {
    "sparsity.target": 0.0,
    "training.steps": 4000,
    "optimizer.lr": 1e-3,
    "objective.task": 1.0,
    "objective.distill.logits": 0.0,
}

PRESETS = {
    "fashion": Preset("{cache}/fashion-resnet", "image-classifier-95", IMAGES, IMAGES_GRID),
    "mlp": Preset(
        "{cache}/fashion-mlp", "image-classifier-95", MLP, replace(IMAGES_GRID, trials=5), MLP_HEAD
    ),
    "rxnfp": Preset("{cache}/rxnfp", "masked-lm-80", MASKED, MASKED_GRID),
    "rxnmapper": Preset("{cache}/rxnmapper", "masked-lm-80", MASKED, MASKED_GRID),
    "spam": labelled("spam"),
    "movies": labelled("movies"),
    "speeches": Preset(
        "{cache}/smollm2",
        "causal-lm-50",
        {
            "data.source": "{cache}/speeches/speeches.txt",
            "data.max_length": 128,
            "training.batch_size": 4,
            "training.steps": 100,
        },
        Grid(("dense", "gradual"), (0.5,), (0,)),
    ),
}


def main() -> None:
    """Run one preset and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="sets made before")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results")
    parser.add_argument("--model", help="another model, as a folder of the same one")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a rehearsal of minutes")
    size.add_argument("--full", action="store_true", help="what is reported; the default")
    words = parser.parse_args()
    name = f"{words.preset}-{'small' if words.small else 'full'}"
    preset = PRESETS[words.preset]
    if words.model:
        preset = replace(preset, model=words.model)
    try:
        with Screen().watcher() as watcher:
            run(preset, words.cache, words.out / name, words.small, words.keep, watcher)
    except HamError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        sys.exit(error.exit_code)
    print((words.out / name / TABLE).read_text("utf-8"))


def run(preset: Preset, cache: Path, out: Path, small: bool, keep: bool, watcher: Progress) -> None:
    """Compare what a preset says; results in `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    smaller = SMALL if small else {}
    if preset.head is not None:
        folder = out.with_name(f"{out.name}-head")
        settings = {**preset.settings, **preset.head, **OFF, **smaller}
        if not folder.exists():
            run_sparsify(
                recipe_of(preset, cache, settings),
                out=folder,
                resume=folder.with_name(f"{folder.name}.run").exists(),
                overwrite=False,
                keep_run=False,
                progress=watcher,
            )
        preset = replace(preset, model=str(folder))
    grid = replace(preset.grid, **SMALL_GRID) if small else preset.grid
    read = recipe_of(preset, cache, {**preset.settings, **smaller})
    compare(read, grid, out=out, keep=keep, progress=watcher)


def recipe_of(preset: Preset, cache: Path, settings: dict[str, Any]) -> ReadRecipe:
    """The shipped recipe with the settings over it."""
    words = {"model.id": preset.model, **settings}
    placed = {
        key: value.replace("{cache}", str(cache)) if isinstance(value, str) else value
        for key, value in words.items()
    }
    return complete([recipe_layer(preset.recipe), values_layer(placed, "preset")], has_recipe=True)


if __name__ == "__main__":
    main()
