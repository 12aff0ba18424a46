"""Time of one optimizer step on the CPU: HAM beside torch's fused AdamW and SGD.

    python benchmarks/step_cost.py                     # MiniLM (22.7 M) and BERT (109 M) shapes
    python benchmarks/step_cost.py --models minilm --rounds 5 --threads 1

One thread is timed by the process's own CPU time, more by the wall clock. Prints a table and
writes benchmarks/results/DATE-NAME.json.
"""

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hamcli.benchmarking.measuring import VariantCost
from hamcli.benchmarking.model import environment
from hamcli.benchmarking.selection import SelectionCost, bench_selection
from hamcli.benchmarking.step import StepCost, bench_step

RESULTS = Path(__file__).parent / "results"
CONFIGS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
BATCH = (16, 64)  # sequences, tokens


def make_model(name: str) -> torch.nn.Module:
    """A BERT encoder of that size with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_attention_heads=12, **CONFIGS[name]))


def training_pass(model: torch.nn.Module) -> Callable[[], None]:
    """Forward and backward on random tokens."""
    tokens = torch.randint(1000, 30000, BATCH)

    def train() -> None:
        model.zero_grad()
        model(input_ids=tokens).last_hidden_state.square().mean().backward()

    return train


def show_rows(head: str, variants: Sequence[VariantCost]) -> None:
    """One table."""
    columns = f"{'ms':>8s} {'ratio':>6s} {'fastest':>7s}  {'tenth..ninetieth':>16s}"
    print(f"\n{head}\n  {'':18s} {columns} {'extra MiB':>9s}")
    for one in variants:
        low, high = one.ratio_spread
        extra = "-" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:.1f}"
        ratios = f"{one.ratio:6.2f} {one.fastest_ratio:7.2f}  {low:7.2f}..{high:<7.2f}"
        print(f"  {one.name:18s} {one.seconds * 1e3:8.1f} {ratios} {extra:>9s}")


def show(title: str, cost: StepCost) -> None:
    """What a step costs."""
    how = f"{cost.base}, {cost.threads} threads, {cost.clock} time, {cost.rounds} rounds"
    show_rows(f"{title}: {cost.num_weights / 1e6:.1f} M {cost.dtype}, {how}", cost.variants)
    if cost.step_share is not None:
        print(f"  forward and backward {cost.training_seconds * 1e3:.0f} ms; "
              f"the step's share of training {cost.step_share:.1%}")  # fmt: skip


def show_selection(title: str, cost: SelectionCost) -> None:
    """What a selection costs."""
    how = f"{cost.threads} threads, {cost.clock} time, masks {cost.mask_bytes / 2**20:.1f} MiB"
    show_rows(f"{title}: 90 % of {cost.num_weights / 1e6:.1f} M {cost.dtype}, {how}", cost.variants)


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--name", default="step-cost", help="of the file, after the date")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    records: list[dict[str, Any]] = []

    def measure(title: str, *args: Any, **kwargs: Any) -> None:
        cost = bench_step(*args, rounds=options.rounds, only=options.only, **kwargs)
        show(title, cost)
        records.append({"title": title, **cost.as_json()})

    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = "cpu" if threads == 1 else "wall"
        for name in options.models:
            model = make_model(name)
            shapes = [tuple(param.shape) for param in model.parameters()]
            train = training_pass(model) if name == "minilm" else None
            measure(name, shapes, clock=clock, train=train)
            del model, train
            chosen = bench_selection(shapes, rounds=options.rounds, clock=clock)
            show_selection(name, chosen)
            records.append({"title": f"{name}, selection", **chosen.as_json()})
            if name == "minilm":
                measure(name, shapes, clock=clock, base="sgd")
                measure(name, shapes, clock=clock, dtype=torch.bfloat16)
    result = {
        **environment(),
        "commit": commit(),
        "records": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{datetime.date.today():%Y-%m-%d}-{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
