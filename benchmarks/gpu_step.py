"""Time of the GPU step beside torch's fused AdamW, and as a share of the copy bandwidth.

    python benchmarks/gpu_step.py                      # 22 M, 110 M and 1 B parameters, on a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu_step.py --sizes 20000 --repeats 1   # does it run?

Every variant is timed twice: replayed from a CUDA graph, which is the device's time alone, and
called from Python. Rounds go through all variants in turn, so that a change of clocks meets all of
them; given are medians and the spread between the tenth and the ninetieth percentile.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamcli.optim import gpu

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
COPY_BYTES = 1 << 30
Step = Callable[[], None]


@dataclass
class Variant:
    """One way to do a step, and the bytes that it has to read and write."""

    name: str
    step: Step
    bytes_moved: int
    replay: Step | None = None
    device_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)


def transformer_shapes(num_params: int) -> Iterator[tuple[int, ...]]:
    """Shapes of transformer layers, until there are about `num_params`; a last one fills up."""
    width = 384 if num_params < 50_000_000 else 768 if num_params < 500_000_000 else 2048
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (4 * width,)]
    layer += [(width,)] * 9
    left = num_params
    while left > 0:
        for shape in layer:
            size = torch.Size(shape).numel()
            if size > left:
                yield (left,)
                return
            yield shape
            left -= size
        if left == 0:
            return


@dataclass
class Lists:
    """Random weights and their state; `dtype` is that of weights and gradients."""

    num_params: int
    dtype: torch.dtype = torch.float32
    has_masters: bool = False

    def __post_init__(self) -> None:
        shapes = list(transformer_shapes(self.num_params))
        self.weights = [0.04 * torch.randn(s, device=DEVICE) for s in shapes]
        self.grads = [(1e-3 * torch.randn_like(w)).to(self.dtype) for w in self.weights]
        self.m = [1e-3 * torch.randn_like(w) for w in self.weights]
        self.v = [1e-6 * torch.rand_like(w) for w in self.weights]
        self.steps = [torch.tensor(10.0, device=DEVICE) for _ in shapes]
        self.lr = torch.tensor(1e-4, device=DEVICE)
        self.absent: list[Tensor | None] = [None] * len(shapes)
        self.rounded = self.absent
        if self.has_masters:
            self.rounded = [w.to(self.dtype) for w in self.weights]
        else:
            self.weights = [w.to(self.dtype) for w in self.weights]

    def ours(self, *, a: float, masks: list[Tensor] | None = None, seed: int | None = None) -> Step:
        """The step of `gpu`; `a` = 0 leaves out the mirror step."""

        def step() -> None:
            torch._foreach_add_(self.steps, 1.0)
            gpu.adam_ham_(
                self.weights,
                self.grads,
                self.m,
                self.v,
                self.steps,
                masks=self.absent if masks is None else masks,
                rounded=self.rounded,
                a=a,
                b=1e-7 if a else 0.0,
                clamp=5.0,
                lr=self.lr,
                decoupled=True,
                seed=seed,
                **BETAS,
            )

        return step

    def fused(self) -> Step:
        """Fused AdamW of torch, without the optimizer around it."""

        def step() -> None:
            torch._foreach_add_(self.steps, 1.0)
            torch._fused_adamw_(
                self.weights,
                self.grads,
                self.m,
                self.v,
                [],
                self.steps,
                lr=self.lr,
                amsgrad=False,
                maximize=False,
                **BETAS,
            )

        return step


def fp32_variants(num_params: int) -> list[Variant]:
    """fp32 weights: torch's step, ours with less and more to do."""
    lists = Lists(num_params)
    masks = [torch.rand_like(w) < 0.5 for w in lists.weights]
    moved = 28 * num_params  # w, g, m, v read, w, m, v written
    return [
        Variant("torch fused adamw", lists.fused(), moved),
        Variant("adamw", lists.ours(a=0.0), moved),
        Variant("adamw + ham", lists.ours(a=0.02), moved),
        Variant("adamw + ham + mask", lists.ours(a=0.02, masks=masks), moved + num_params),
    ]


def bf16_variants(num_params: int) -> list[Variant]:
    """bf16 weights and gradients, with masters, and rounded stochastically."""
    masters = Lists(num_params, torch.bfloat16, has_masters=True)
    alone = Lists(num_params, torch.bfloat16)
    return [
        Variant("bf16, masters: adamw + ham", masters.ours(a=0.02), 28 * num_params),
        Variant("bf16, stochastic: adamw + ham", alone.ours(a=0.02, seed=1), 22 * num_params),
    ]


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def captured(step: Step) -> Step:
    """`step` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def device_ms(step: Step, count: int) -> float:
    """Milliseconds of a step by the device's clock, over `count` of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def call_ms(step: Step, count: int) -> float:
    """Milliseconds of a step by the clock on the wall, the device's work included."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - begin) * 1e3 / count


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of a copy from device to device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = [device_ms(lambda: target.copy_(source), 5) for _ in range(repeats)]
    return 2 * COPY_BYTES / (statistics.median(times) * 1e-3)


def measure(variants: list[Variant], repeats: int, count: int) -> None:
    """Time all variants in turn, `repeats` times."""
    for variant in variants:
        variant.step()
        if DEVICE == "cuda":
            variant.replay = captured(variant.step)
    for _ in range(repeats):
        for variant in variants:
            if variant.replay is not None:
                variant.device_ms.append(device_ms(variant.replay, count))
            variant.call_ms.append(call_ms(variant.step, count))


def spread(times: list[float]) -> dict[str, float] | None:
    """Median, and tenth and ninetieth percentile."""
    if not times:
        return None
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def summary(
    variants: list[Variant], reference: Variant, bandwidth: float | None
) -> list[dict[str, Any]]:
    """What is printed and written of each variant; ratios are to torch's fused AdamW in fp32."""
    found = []
    for variant in variants:
        on_device, called = spread(variant.device_ms), spread(variant.call_ms)
        row = {"name": variant.name, "bytes": variant.bytes_moved}
        row |= {"device_ms": on_device, "call_ms": called}
        if on_device is not None and bandwidth is not None:
            per_second = variant.bytes_moved / (on_device["median"] * 1e-3)
            pairs = zip(variant.device_ms, reference.device_ms, strict=True)
            row["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
            row["bytes_per_second"] = per_second
            row["bandwidth_share"] = per_second / bandwidth
        found.append(row)
    return found


def print_table(num_params: int, rows: list[dict[str, Any]]) -> None:
    """One line a variant."""
    print(f"\n{num_params:,} parameters")
    print(f"{'':32} {'device ms':>10} {'ratio':>6} {'of copy':>8} {'call ms':>9}")
    for row in rows:
        on_device = row["device_ms"]
        left = ["-", "-", "-"]
        if on_device is not None:
            left = [f"{on_device['median']:.4f}", f"{row['ratio']:.3f}"]
            left.append(f"{row['bandwidth_share']:.1%}")
        print(f"{row['name']:32} {left[0]:>10} {left[1]:>6} {left[2]:>8} "
              f"{row['call_ms']['median']:>9.4f}")  # fmt: skip


def environment() -> dict[str, Any]:
    """Where the numbers are from."""
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    """Measure every size, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[22_000_000, 110_000_000, 10**9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(options.repeats) if DEVICE == "cuda" else None
    record: dict[str, Any] = {"environment": environment(), "repeats": options.repeats}
    record |= {"copy_bytes_per_second": bandwidth, "sizes": []}
    print(", ".join(f"{key} {value}" for key, value in record["environment"].items()))
    if bandwidth is not None:
        print(f"copy: {bandwidth / 1e12:.2f} TB/s read and written")
    for num_params in options.sizes:
        count = max(5, min(20, 10**9 // num_params)) if DEVICE == "cuda" else 1
        rows: list[dict[str, Any]] = []
        reference: Variant | None = None
        for make in (fp32_variants, bf16_variants):
            variants = make(num_params)
            measure(variants, options.repeats, count)
            reference = reference or variants[0]
            rows += summary(variants, reference, bandwidth)
            del variants
        print_table(num_params, rows)
        record["sizes"].append({"num_params": num_params, "variants": rows})
        del reference
    out = options.out or RESULTS / f"{record['environment']['date']}-gpu-step.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
