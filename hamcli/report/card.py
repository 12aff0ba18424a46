"""`README.md`: the model card, Markdown with the metadata that the Hugging Face hub reads."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from hamcli.report import wording
from hamcli.report.records import Report

CARD_NAME = "README.md"
TENSOR_LIMIT = 100

PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "feature-extraction": "feature-extraction",
}

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}

CITATION = """```bibtex
@inproceedings{jacobs2026ham,
  title     = {Hyperbolic Aware Minimization: Implicit Bias for Sparsity},
  author    = {Jacobs, Tom and Gadhikar, Advait and Rubio-Madrigal, Celia and Burkholz, Rebekka},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2506.02630}
}
```"""


def render(report: Report) -> str:
    """The card, as text.

    Args:
        report: All that is shown; every string in it may come from a file nobody vouches for.
    """
    sections = [
        _front_matter(report),
        f"# {_text(_title(report))}",
        _summary(report),
        _warnings(report),
        "## Numbers",
        _numbers(report),
        _honest_lines(report),
        "## Load",
        _loading(report),
        "## How it was made",
        _making(report),
        "## Tensors",
        _tensors(report),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(report: Report) -> str:
    model = report.model
    metadata: dict[str, Any] = {"library_name": "transformers"}
    hub_id = model.id.partition("@")[0]
    if model.is_hub and _HUB_ID.fullmatch(hub_id):
        metadata["base_model"] = hub_id
    if model.task in PIPELINE_TAGS:
        metadata["pipeline_tag"] = PIPELINE_TAGS[model.task]
    if model.license and _LICENSE.fullmatch(model.license):
        metadata["license"] = model.license
    metadata["tags"] = ["sparsity", "ham", "pruning"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _title(report: Report) -> str:
    percent = wording.percent(report.sparsity.achieved)
    return f"{wording.name(report.model.id, 80)}, {percent} sparse"


def _summary(report: Report) -> str:
    sparsity = report.sparsity
    return (
        f"{_code(report.model.id)}, {_how(report)}, by {_code(f'ham {report.ham_version}')}. "
        f"**{wording.percent(sparsity.achieved)}** of the weights of {len(report.tensors):,} "
        f"target tensors are exactly zero, which is "
        f"**{wording.percent(sparsity.overall_achieved)}** of all "
        f"{wording.short_count(sparsity.num_parameters)} parameters."
    )


def _how(report: Report) -> str:
    if report.training is None:
        method = report.sparsity.method
        how = method if method in ("wanda", "sparsegpt") else _score(report)
        return f"pruned by {how}, without training"
    how = "fine-tuned with HAM" if report.training.ham else "fine-tuned"
    is_rising = report.sparsity.method == "gradual" and report.sparsity.target > 0
    return f"{how} while its sparsity rose" if is_rising else how


def _score(report: Report) -> str:
    section = report.recipe.get("sparsity")
    said = section.get("score", "auto") if isinstance(section, dict) else "auto"
    return "magnitude" if said == "auto" else str(said)  # of one shot


def _warnings(report: Report) -> str:
    gate = report.gate
    failed = [] if gate is None else [item for item in gate.conditions if not item.passed]
    lines = [f"> - Gate not met: {_text(wording.condition(item))}" for item in failed]
    lines += [f"> - {_text(wording.sentence(warning))}" for warning in report.warnings]
    return "\n".join(["> **Warnings**", ">", *lines]) if lines else ""


def _numbers(report: Report) -> str:
    sparsity, quality, size = report.sparsity, report.quality, report.size
    rows = [
        (
            "sparsity of the target weights",
            _counted(sparsity.achieved, sparsity.zeros, sparsity.total),
        ),
        (
            "sparsity over all parameters",
            _counted(sparsity.overall_achieved, sparsity.zeros, sparsity.num_parameters),
        ),
        ("target", f"{wording.percent(sparsity.target)} ({wording.exactness(sparsity)})"),
    ]
    if quality is not None:
        metric = wording.name(quality.metric, 60)
        values = [("dense", quality.dense), ("sparse", quality.sparse)]
        if quality.one_shot is not None:
            values.append(("pruned in one shot, for comparison", quality.one_shot))
        rows += [
            (f"{metric}, {label}", wording.metric_value(quality.metric, value))
            for label, value in values
        ]
        rows.append((f"{metric}, change", wording.drop(quality)))
    rows.append(("weight files", _bytes(size.dense_bytes)))
    if size.packed_bytes is not None:
        rows.append(("weight files, packed", _bytes(size.packed_bytes)))
    if size.gzip_bytes is not None:
        rows.append(("weight files in gzip", _bytes(size.gzip_bytes)))
    if size.input_gzip_bytes is not None:
        rows.append(("dense weight files in gzip", _bytes(size.input_gzip_bytes)))
    return _table(("", "value"), [(_text(key), _text(value)) for key, value in rows], "lr")


def _counted(fraction: float, zeros: int, total: int) -> str:
    return f"{wording.percent(fraction)} ({zeros:,} of {total:,})"


def _bytes(size_bytes: int) -> str:
    return f"{wording.megabytes(size_bytes)} ({size_bytes:,} bytes)"


def _honest_lines(report: Report) -> str:
    quality, speed = report.quality, report.speed
    measured = (
        "Quality was not measured: measure it before use."
        if quality is None
        else f"Measured on {quality.num_examples:,} held-out examples "
        f"({_text(wording.sentence(quality.data, 240))}), with the written files loaded again."
    )
    fast = (
        _text(wording.sentence(report.speed_reason or "Speed was not measured."))
        if speed is None
        else f"Speed in {_code(speed.runtime)}: {wording.number(speed.ratio, 3)} times the dense "
        "model's, measured on the machine in `report.json`."
    )
    return f"{measured}\n\n{_text(wording.size_line(report.size))} {fast}"


def _loading(report: Report) -> str:
    task = report.model.task or ""
    auto_class = AUTO_CLASSES.get(task, "AutoModel")
    helper = "AutoImageProcessor" if task == "image-classification" else "AutoTokenizer"
    variable = "processor" if task == "image-classification" else "tokenizer"
    is_packed = report.size.format == "packed"
    need = (
        "A packed checkpoint: `pip install hamcli`, import it, and it loads as any other. "
        "`ham export FOLDER --format dense` makes a stock checkpoint of it, bit for bit."
        if is_packed
        else "A stock checkpoint: the zeros are in the weights, nothing else is needed to load it."
    )
    first = "import hamcli  # registers the packed form\n" if is_packed else ""
    return (
        f"{need}\n\n"
        "```python\n"
        f"{first}"
        f"from transformers import {', '.join(sorted((auto_class, helper)))}\n\n"
        'folder = "path/to/this/folder"\n'
        f"model = {auto_class}.from_pretrained(folder)\n"
        f"{variable} = {helper}.from_pretrained(folder)\n"
        "```"
    )


def _making(report: Report) -> str:
    lines = []
    training, data, sparsity = report.training, report.data, report.sparsity
    if training is not None:
        steps = f"{training.steps:,} steps"
        batch = f" of {training.batch_size:,} examples" if training.batch_size else ""
        lines.append(f"Training: {steps}{batch}.")
        if training.optimizer:
            lines.append(f"Base optimizer: {_text(wording.sentence(training.optimizer, 80))}.")
        if training.objective:
            lines.append(f"Minimised: {_text(wording.sentence(training.objective, 160))}.")
        if training.ham is not None:
            lines.append(f"HAM: {_ham_words(report)}.")
    if data is not None:
        lines.append(f"Data: {_text(wording.sentence(data.description, 240))}.")
    for key, value in (
        ("Method", sparsity.method),
        ("Allocation", sparsity.allocation),
        ("Pattern", sparsity.pattern),
        ("Revision of the dense model", report.model.revision),
    ):
        if value:
            lines.append(f"{key}: {_code(value)}.")
    lines.append("Every setting is in `recipe.yaml`, every number in `report.json`, with charts in")
    return "\n".join(f"- {line}" for line in lines) + " `report.html`."


def _ham_words(report: Report) -> str:
    training = report.training
    assert training is not None
    assert training.ham is not None
    ham = training.ham
    words = [f"{_text(wording.name(ham.scaling, 40))} scaling"]
    for label, value in (("alpha", ham.alpha), ("beta", ham.beta), ("eta", ham.eta)):
        if value is not None:
            words.append(f"{label} {wording.number(value)}")
    if training.ham_moved_fraction is not None:
        words.append(f"{wording.percent(training.ham_moved_fraction)} of weights moved a step")
    return ", ".join(words)


def _tensors(report: Report) -> str:
    shown = report.tensors[:TENSOR_LIMIT]
    rows = [
        (
            _code(tensor.name, in_table=True),
            wording.shape(tensor.shape),
            f"{tensor.zeros:,}",
            f"{tensor.total:,}",
            wording.percent(tensor.sparsity),
        )
        for tensor in shown
    ]
    table = _table(("name", "shape", "zeros", "weights", "sparsity"), rows, "llrrr")
    left = len(report.tensors) - len(shown)
    rest = f"\n\n{left:,} more are in `report.json`." if left else ""
    summary = f"<summary>Zeros of {len(report.tensors):,} target tensors</summary>"
    return f"<details>\n{summary}\n\n{table}{rest}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in sides]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LICENSE = re.compile(r"[\w.-]+", re.ASCII)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~&$#])")
_LINK = re.compile(r"(?i)(?:(?<=[a-z]):(?=//)|(?<=www)\.|@)")
_START = re.compile(r"^(?=[-+=])|^\d{1,9}(?=[.)](?:\s|$))")


def _text(text: str) -> str:
    """`text` as Markdown that shows it and nothing else: no markup, HTML, table cell or link."""
    shown = _SPECIAL.sub(r"\\\1", text.strip())
    shown = _LINK.sub(lambda match: "\\" + match.group(), shown)
    return _START.sub(lambda match: match.group() + "\\", shown)


def _code(text: str, *, in_table: bool = False) -> str:
    """`text` as a code span that nothing in it can end."""
    shown = wording.name(text) or " "
    if in_table and "|" in shown:
        return _text(shown)  # renderers disagree on a backslash before a bar inside a code span
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
