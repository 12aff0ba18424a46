"""Reports as real runs leave them, made from counts and fixed seeds; no weights are needed."""

import dataclasses
import math
import random
from collections.abc import Iterator

from hamcli.report.records import (
    Curves,
    DataRecord,
    EnvironmentRecord,
    FileRecord,
    GateCondition,
    GateRecord,
    HamRecord,
    Histogram,
    ModelRecord,
    QualityRecord,
    Report,
    SizeRecord,
    SparsityRecord,
    TensorRecord,
    TrainingRecord,
)

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "quote": "\"'><img src=x onerror=alert(1)>",
    "escape": "\x1b[31mred\x1b[0m\x9b2J\x07",
    "bidi": "evil\u202egnp.exe\u2066",
    "line": "first\r\nsecond\nthird\u2028fourth",
    "pipe": "a|b||c\\|d",
    "markdown": "`x` **bold** [link](http://evil.example) # head <b>",
    "formula": "=1+1",
    "template": "{{ 7 * 7 }}{% raw %}",
    "long": "layer." + "x" * 10_000,
    "surrogate": "\ud800",
}


def bert(sparsity: float = 0.9, *, layers: int = 12, width: int = 768) -> list[TensorRecord]:
    """The targets of a BERT: 12 layers of 6 tensors, and 2 more; 74."""
    kinds = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (4 * width, width),
        "output.dense": (width, 4 * width),
    }
    named = [
        (f"bert.encoder.layer.{layer}.{kind}.weight", shape)
        for layer in range(layers)
        for kind, shape in kinds.items()
    ]
    named += [
        ("cls.predictions.transform.dense.weight", (width, width)),
        ("bert.pooler.dense.weight", (width, width)),
    ]
    return counted(named, sparsity)


def llama(sparsity: float = 0.5, *, layers: int = 100) -> list[TensorRecord]:
    """The targets of a decoder of 100 layers; 700."""
    kinds = {
        "self_attn.q_proj": (1024, 1024),
        "self_attn.k_proj": (256, 1024),
        "self_attn.v_proj": (256, 1024),
        "self_attn.o_proj": (1024, 1024),
        "mlp.gate_proj": (2816, 1024),
        "mlp.up_proj": (2816, 1024),
        "mlp.down_proj": (1024, 2816),
    }
    named = [
        (f"model.layers.{layer}.{kind}.weight", shape)
        for layer in range(layers)
        for kind, shape in kinds.items()
    ]
    return counted(named, sparsity)


def counted(named: list[tuple[str, tuple[int, int]]], sparsity: float) -> list[TensorRecord]:
    """Tensors whose zeros vary as under a global threshold, and add up exactly."""
    draw = random.Random(0)
    sizes = [rows * columns for _, (rows, columns) in named]
    asked = round(sparsity * sum(sizes))
    left_over = 1 - sparsity
    zeros = []
    for place, size in enumerate(sizes):
        depth = place / len(sizes)
        kept = left_over * (0.5 + depth + draw.uniform(-0.35, 0.35))
        zeros.append(min(size, max(0, round(size * (1 - kept)))) if sparsity else 0)
    place = 0
    while (gap := asked - sum(zeros)) != 0:
        step = max(-zeros[place], min(sizes[place] - zeros[place], gap))
        zeros[place] += step if abs(gap) < len(sizes) else round(step / len(sizes)) or step
        place = (place + 1) % len(sizes)
    return [
        TensorRecord.counted(name, shape=shape, dtype="F32", zeros=number, total=size)
        for (name, shape), number, size in zip(named, zeros, sizes, strict=True)
    ]


def history(steps: int = 600, target: float = 0.9) -> Iterator[dict[str, float | int | None]]:
    """What a training loop reports at each step."""
    draw = random.Random(1)
    first, last = round(0.05 * steps), round(0.75 * steps)
    for step in range(1, steps + 1):
        left = min(max((last - step) / (last - first), 0.0), 1.0)
        sparsity = target * (1 - left**3)
        warm = min(1.0, step / (0.1 * steps))
        loss = 0.02 + 0.5 * math.exp(-step / 40) + 0.25 * sparsity**6
        yield {
            "step": step,
            "loss": loss * math.exp(draw.gauss(0, 0.12)),
            "sparsity": sparsity,
            "lr": 5e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "exponent_mean": 4e-5 * warm * math.exp(draw.gauss(0, 0.2)),
            "exponent_max": 3e-3 * warm * math.exp(draw.gauss(0, 0.4)),
        }


def near_zero(total: int, sparsity: float, *, bins: int = 80) -> Histogram:
    """Normal weights before; after, the small ones are gone."""
    edges = [round(-1 + 2 * index / bins, 6) for index in range(bins + 1)]
    density = [math.exp(-(((low + 1 / bins) / 0.45) ** 2)) for low in edges[:-1]]
    scale = 0.95 * total / sum(density)
    before = [round(scale * value) for value in density]
    after = list(before)
    to_drop = round(sparsity * total)
    for index in sorted(range(bins), key=lambda place: abs(edges[place] + 1 / bins)):
        dropped = min(after[index], to_drop)
        after[index] -= dropped
        to_drop -= dropped
    # training moves some of what is left back towards zero
    spread = [round(sum(after[max(0, place - 2) : place + 3]) / 5) for place, _ in enumerate(after)]
    return Histogram(
        tuple(edges),
        tuple(before),
        tuple(spread),
        0,
        round(sparsity * total),
        total,
        "weight / standard deviation of the dense targets",
    )


def report(
    tensors: list[TensorRecord] | None = None, *, target: float = 0.9, steps: int = 600
) -> Report:
    """A finished `ham sparsify` of a BERT for masked words."""
    tensors = bert(target) if tensors is None else tensors
    zeros = sum(tensor.zeros for tensor in tensors)
    total = sum(tensor.total for tensor in tensors)
    weights = 4 * round(total * 1.27)
    return Report(
        ham_version="0.1.0",
        command="sparsify",
        model=ModelRecord(
            id="google-bert/bert-base-uncased",
            revision="86b5e0934494bd15c9632b12f734a8a67f723594",
            sha256={"config.json": "7b4e5f53" * 8, "model.safetensors": "68d45e23" * 8},
            task="masked-lm",
            architecture="BertForMaskedLM",
            is_hub=True,
            license="apache-2.0",
        ),
        recipe={
            "model": {"id": "google-bert/bert-base-uncased", "task": "masked-lm"},
            "targets": {
                "include": ["*"],
                "exclude": ["bert.embeddings.*", "cls.predictions.decoder"],
            },
            "optimizer": {"base": "adamw", "lr": 5e-4, "ham": {"alpha": "auto", "beta": "auto"}},
            "sparsity": {"target": target, "method": "gradual", "allocation": "global"},
            "training": {"steps": steps, "batch_size": 32, "seed": 0},
            "gate": {"max_drop": 0.05},
        },
        environment=EnvironmentRecord(
            versions={"torch": "2.13.0+cpu", "transformers": "5.23.0", "safetensors": "0.8.0"},
            device="cpu",
            device_name="Intel(R) Xeon(R) Processor @ 2.70GHz",
            threads=2,
            precision="fp32",
            python="3.11.2",
            platform="Linux x86_64",
        ),
        sparsity=SparsityRecord.counted(
            target,
            zeros=zeros,
            total=total,
            num_parameters=round(total * 1.27),
            threshold=0.0312 if target else None,
            method="gradual",
            allocation="global",
            pattern="unstructured",
        ),
        tensors=tuple(tensors),
        quality=QualityRecord(
            metric="masked perplexity",
            dense=5.831,
            sparse=6.012,
            drop=6.012 / 5.831 - 1,
            data="built-in English sample, held-out tenth",
            num_examples=512,
            higher_is_better=False,
            one_shot=412.6,
            agreement=0.931,
            dense_loss=1.7632,
            sparse_loss=1.7938,
        ),
        files=(
            FileRecord("config.json", 612, "ab" * 32),
            FileRecord("model.safetensors", weights, "cd" * 32),
            FileRecord("tokenizer.json", 711_396, "ef" * 32),
            FileRecord("recipe.yaml", 1_843, "01" * 32),
        ),
        size=SizeRecord(
            dense_bytes=weights,
            gzip_bytes=round(weights * (0.92 - 0.6 * target)),
            input_bytes=weights,
            input_gzip_bytes=round(weights * 0.926),
        ),
        training=TrainingRecord(
            steps=steps,
            seconds=512.3,
            ham_moved_fraction=0.9231,
            sign_flips=0.0041,
            curves=Curves.from_rows(list(history(steps, target))),
            ham=HamRecord(
                scaling="normalised",
                eta=0.002,
                beta=1e-3,
                clamp=0.1,
                exponent_mean=3.4e-5,
                exponent_max=8.2e-3,
                clamped_fraction=0.0,
            ),
            batch_size=32,
            objective="task loss + 1.0 x distillation of logits (T = 2)",
            optimizer="adamw",
        ),
        gate=GateRecord.of(
            GateCondition("min_sparsity", target, zeros / total, passed=True),
            GateCondition("max_drop", 0.05, 6.012 / 5.831 - 1, passed=True),
        ),
        data=DataRecord(
            "built-in English sample (public domain), 4,213 blocks of 128 tokens",
            num_train=4213,
            num_evaluation=468,
        ),
        histogram=near_zero(total, target),
    )


def minilm() -> Report:
    """An encoder measured by its likeness to its dense self."""
    base = report(bert(0.9, layers=6, width=384))
    return dataclasses.replace(
        base,
        model=ModelRecord(
            "builtin:minilm",
            None,
            {"model.safetensors": "53aa5117" * 8},
            "feature-extraction",
            "BertModel",
            license="apache-2.0",
        ),
        quality=QualityRecord(
            "cosine to dense",
            1.0,
            0.9412,
            0.0588,
            "built-in English sample, held-out tenth",
            512,
            one_shot=0.3121,
        ),
    )


def decoder() -> Report:
    """A model of 700 tensors in two shards, in bfloat16."""
    base = report(llama(), target=0.5, steps=20_000)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            id="example-org/decoder-1b",
            task="causal-lm",
            architecture="LlamaForCausalLM",
        ),
    )


def dense_tuned() -> Report:
    """Target 0: fine-tuned as long, nothing pruned."""
    return report(bert(0.0), target=0.0)


def gate_failed() -> Report:
    """Complete and written, with its quality condition unmet and warnings to tell."""
    base = report()
    quality = dataclasses.replace(
        base.quality,
        metric="accuracy",
        dense=0.9,
        sparse=0.8713,
        drop=0.0287,
        one_shot=0.171,
        higher_is_better=True,
    )
    return dataclasses.replace(
        base,
        quality=quality,
        gate=GateRecord.of(
            GateCondition("min_sparsity", 0.9, 0.9, passed=True),
            GateCondition("max_drop", 0.01, 0.0287, passed=False),
        ),
        warnings=(
            "14% of the tokens are unknown to the tokenizer: is this the data you meant?",
            "3 steps were skipped, since a gradient was not finite",
        ),
    )


def pruned() -> Report:
    """`ham prune`: no training, no quality, no gate."""
    return dataclasses.replace(
        report(), command="prune", training=None, quality=None, gate=None, data=None
    )


def bare() -> Report:
    """Only what must be there."""
    return Report(
        ham_version="0.1.0",
        model=ModelRecord("m"),
        recipe={},
        environment=EnvironmentRecord(),
        sparsity=SparsityRecord.counted(0.5, zeros=2, total=4, num_parameters=10),
        tensors=(TensorRecord.counted("w", shape=(2, 2), dtype="F32", zeros=2, total=4),),
        files=(FileRecord("model.safetensors", 100),),
        size=SizeRecord(100),
        speed_reason=None,
    )


def hostile() -> Report:
    """Every string that others may choose holds something nasty."""
    base = report(
        [
            TensorRecord.counted(name, shape=(2, 3), dtype="F32", zeros=5, total=6)
            for name in HOSTILE.values()
        ]
    )
    every = " ".join(text for key, text in HOSTILE.items() if key != "long")
    return dataclasses.replace(
        base,
        ham_version=every,
        command=every,
        model=ModelRecord(every, every, {every: every}, every, every, True, every),
        recipe={every: [every], "long": HOSTILE["long"]},
        environment=EnvironmentRecord({every: every}, every, 2, every, every, every, every),
        quality=dataclasses.replace(base.quality, metric=every, data=every),
        files=tuple(FileRecord(text, 3, text) for text in HOSTILE.values()),
        data=DataRecord(every, every, 1, 1, (every, HOSTILE["long"])),
        training=dataclasses.replace(
            base.training, objective=every, optimizer=every, ham=HamRecord(every)
        ),
        gate=GateRecord.of(GateCondition(every, 0.1, 0.2, passed=False)),
        histogram=dataclasses.replace(base.histogram, unit=every),
        sparsity=dataclasses.replace(base.sparsity, method=every, allocation=every, pattern=every),
        speed_reason=every,
        warnings=tuple(HOSTILE.values()),
    )


SAMPLES = {
    "bert": report,
    "minilm": minilm,
    "decoder": decoder,
    "dense-tuned": dense_tuned,
    "gate-failed": gate_failed,
    "pruned": pruned,
    "bare": bare,
    "hostile": hostile,
}
