"""What a recipe may say: sections, keys, types, ranges and defaults.

Strict and frozen: an unknown key, a wrong type or a value out of range is refused. Cross-checks
that need the model (does a glob match, does a pattern fit) belong to the rooms that see it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Task = Literal[
    "causal-lm",
    "masked-lm",
    "text-classification",
    "token-classification",
    "image-classification",
    "feature-extraction",
]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Floats = Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=16)]
Globs = Annotated[tuple[str, ...], Field(strict=False)]

PATTERN_REGEX = r"^(unstructured|[1-9][0-9]?:[1-9][0-9]?|block:[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$"
Method = Literal[
    "gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic", "str", "spred", "pilot", "sign-in",
    "ast", "wanda", "sparsegpt",
]  # fmt: skip
WITHOUT_TRAINING = ("wanda", "sparsegpt")
FISHER_METHODS = ("gradual", "ac-dc", "cyclic")
FISHER_BY_ITSELF = ("gradual", "cyclic")  # ac-dc loses by it: up to 19 points of accuracy


class Section(BaseModel):
    """What every section shares: strict types, no unknown keys, finite numbers, no changes."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Model(Section):
    """Which model, and how it is opened."""

    id: str | None = Field(None, description="hub id, folder, .safetensors file or builtin:minilm")
    task: Literal["auto"] | Task = Field("auto", description="what the model does")
    config: str | None = Field(None, description="config.json of a bare .safetensors file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype the weights are trained in; auto = float32"
    )


class DataSection(Section):
    """What the model is trained and measured on."""

    source: str | None = Field(
        None, description="file, folder or dataset id name[:config][:split]; null = built-in sample"
    )
    evaluation: str | None = Field(None, description="another source, held out; null = split one")
    text: str | None = Field(None, description="column of text; null = guess")
    text_pair: str | None = Field(None, description="column of a second text")
    label: str | None = Field(None, description="column of labels; null = guess")
    image: str | None = Field(None, description="column of images; null = guess")
    tokens: str | None = Field(None, description="column of token lists; null = guess")
    split: str = Field("train", description="split of a dataset id to train on")
    evaluation_split: str | None = Field(None, description="split of a dataset id to measure on")
    evaluation_fraction: float = Field(
        0.1, gt=0.0, lt=1.0, description="share held out where no evaluation source is named"
    )
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="share of the training examples that is measured on in place of the held-out "
        "ones, to choose settings by; null = none",
    )
    max_length: int = Field(128, ge=8, le=131072, description="tokens a block or example")
    max_examples: Count | None = Field(None, description="cap on training examples")
    pack: bool | Literal["auto"] = Field("auto", description="join texts into full blocks")
    mask_probability: float = Field(0.15, gt=0.0, lt=1.0, description="share of masked tokens")
    mean: Floats | None = Field(None, description="pixel mean a channel, of values in 0..1")
    std: Floats | None = Field(None, description="pixel standard deviation a channel")


class TargetsSection(Section):
    """Which weights may become zero: globs over module names."""

    include: Annotated[Globs, Field(min_length=1)] = Field(("*",), description="may become zero")
    exclude: Globs | None = Field(
        None, description="stay dense; null = embeddings, heads and poolers, found in the model"
    )


class Distill(Section):
    """What is learned from the dense teacher; a term that the task lacks is left out."""

    logits: NonNegative = Field(0.9, description="weight of the KL divergence of the logits")
    hidden: NonNegative = Field(0.0, description="weight of the error of the hidden states")
    embedding: NonNegative = Field(0.0, description="weight of 1 - cosine of pooled embeddings")
    temperature: Positive = Field(2.0, description="softens the logits")


class ObjectiveSection(Section):
    """What is minimised: a weighted sum."""

    task: NonNegative = Field(0.1, description="weight of the task's own loss (needs labels)")
    distill: Distill = Field(default_factory=lambda: Distill())


class Ham(Section):
    """The mirror step (arXiv 2506.02630)."""

    alpha: Literal["auto"] | NonNegative = Field("auto", description="0 and beta 0 = HAM off")
    beta: Literal["auto"] | NonNegative = Field("auto", description="pull towards zero")
    scaling: Literal["auto", "raw", "calibrated", "tracked", "normalised"] = Field(
        "auto", description="how alpha is found: as given, by calibration, per tensor and step"
    )
    eta: Positive | None = Field(
        None,
        description="mean exponent a step at peak lr that auto scaling aims at; null = by scaling, "
        "no more than lr / (4 mean |w|)",
    )
    clamp: Positive | None = Field(
        None, description="limit of the exponent; null = 25 times eta, at most 0.1; 5 for raw"
    )
    backend: Literal["auto", "rule", "cpu", "gpu"] = Field("auto", description="who computes it")


class OptimizerSection(Section):
    """The base optimizer, its schedule, and HAM on top."""

    base: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = Field(1e-4, description="peak learning rate")
    weight_decay: NonNegative = 0.0
    betas: Annotated[
        tuple[
            Annotated[float, Field(ge=0.0, lt=1.0)],
            Annotated[float, Field(ge=0.0, lt=1.0)],
        ],
        Field(strict=False),
    ] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="of base sgd")
    nesterov: bool = Field(False, description="of base sgd")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="to zero")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="share of the run, from zero up")
    max_grad_norm: NonNegative = Field(1.0, description="clip before the base step; 0 = off")
    sam: NonNegative = Field(0.0, description="radius of SAM's ascent, as 0.05; 0 = off")
    bar: NonNegative = Field(0.0, description="BAR of factor pairs: growth over lr; 0 = off")
    ham: Ham = Field(default_factory=lambda: Ham())


class SparsitySection(Section):
    """How many weights, when, and in which shape."""

    target: Fraction = Field(0.9, description="share of the targets that becomes zero")
    levels: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=2)] | None = Field(
        None, description="of ast: sparsities of one run, rising to target; a result each"
    )
    method: Method = Field("gradual", description="wanda and sparsegpt: of ham prune only")
    score: Literal["auto", "magnitude", "fisher", "first-order", "random", "wanda"] = Field(
        "auto",
        description="what makes a weight important; fisher: |w| times the root mean square of its "
        "gradients, which Adam keeps; auto = fisher for gradual and cyclic, else magnitude",
    )
    allocation: Literal["auto", "global", "uniform", "erk", "lamp", "owl"] = Field(
        "auto", description="who loses how many; auto = erk for random and rigl, else global"
    )
    pattern: str = Field(
        "unstructured", pattern=PATTERN_REGEX, description="or N:M, as 2:4, or block:RxC"
    )
    ramp_start: float = Field(0.0, ge=0.0, lt=1.0, description="share of the run before zeros")
    freeze_last: float = Field(
        0.3, ge=0.0, lt=1.0, description="share of the run that trains the final zeros only"
    )
    update_every: Literal["auto"] | Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        "auto", description="share of the run; auto = 0.05 for rigl, else 0.01"
    )
    min_sparsity: Fraction = Field(0.0, description="of every single tensor")
    max_sparsity: Fraction = Field(1.0, description="of every single tensor")
    phase: float = Field(0.05, gt=0.0, le=0.25, description="of ac-dc: share of the run")
    drop_fraction: Fraction = Field(0.3, description="of rigl: exchanged at first")
    cycles: Count = Field(3, description="of cyclic: before the target is pruned")
    start_sparsity: Fraction = Field(0.5, description="of cyclic: before the target is pruned")
    regularisation: NonNegative = Field(
        1e-5, description="of spred and pilot: weight of the sum of squared factors"
    )
    rescale_every: float = Field(0.05, gt=0.0, le=1.0, description="of sign-in: share of the run")
    calibration: Count = Field(
        128, description="training examples that wanda, sparsegpt and owl look at"
    )

    @property
    def one_shot_score(self) -> str:
        """What `score` means where weights go without training."""
        return "magnitude" if self.score == "auto" else self.score

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.ramp_start + self.freeze_last >= 1.0:
            raise PydanticCustomError("ramp", "ramp_start + freeze_last leave no room for a ramp")
        if self.min_sparsity > self.max_sparsity:
            raise PydanticCustomError("clamps", "min_sparsity is above max_sparsity")
        if not self.min_sparsity <= self.target <= self.max_sparsity:
            raise PydanticCustomError(
                "clamps", "target lies outside min_sparsity and max_sparsity of every tensor"
            )
        self._refuse_levels()
        if self.score == "wanda" and self.method not in ("one-shot", *WITHOUT_TRAINING):
            raise PydanticCustomError(
                "score", "score wanda needs a method that prunes once: one-shot"
            )
        if self.score == "fisher" and self.method not in FISHER_METHODS:
            raise PydanticCustomError(
                "score",
                "score fisher needs steps before weights go: method {methods}",
                {"methods": ", ".join(FISHER_METHODS)},
            )
        if self.pattern.startswith("block") and self.pattern == "block:1x1":
            raise PydanticCustomError("pattern", "block:1x1 is unstructured")
        if self.pattern != "unstructured" and not self.pattern.startswith("block"):
            kept, group = map(int, self.pattern.split(":"))
            if kept >= group:
                raise PydanticCustomError(
                    "pattern", "pattern N:M keeps N of each M weights: N must be below M"
                )
            fixed = 1 - kept / group
            if abs(self.target - fixed) > 1e-9:
                raise PydanticCustomError(
                    "pattern",
                    "pattern {pattern} fixes the sparsity at {fixed}: set target to it",
                    {"pattern": self.pattern, "fixed": fixed},
                )
        return self

    def _refuse_levels(self) -> None:
        if self.levels is None:
            return
        if self.method != "ast":
            raise PydanticCustomError("levels", "several targets from one run: method ast")
        if list(self.levels) != sorted(set(self.levels)) or self.levels[-1] != self.target:
            raise PydanticCustomError("levels", "levels must rise to target")
        if ":" in self.pattern and not self.pattern.startswith("block"):
            raise PydanticCustomError("levels", "pattern N:M has one sparsity")


Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "aim", "dvclive", "swanlab"
]


class TrainingSection(Section):
    """How long, how much at once, in which numbers, on what."""

    steps: Count = Field(1000, description="optimizer steps")
    batch_size: Count = Field(32, description="examples a micro-step, of all processes together")
    accumulation: Count = Field(1, description="micro-steps an optimizer step")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="autocast; auto = bf16 where a GPU has it, fp32 elsewhere"
    )
    dropout: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether the model's own dropout acts in training; auto = off where the dense "
        "model teaches",
    )
    seed: int = Field(0, ge=0, lt=2**31)
    checkpoint_every: Count = Field(100, description="optimizer steps between run checkpoints")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)$")
    trackers: tuple[Tracker, ...] = Field(
        (), strict=False, description="told of every step; their files lie in OUT.logs"
    )
    parallel: Literal["auto", "none", "ddp", "fsdp"] = Field(
        "auto",
        description="of several processes: ddp, each holds all weights; fsdp, each a part; auto = "
        "ddp where a launcher started several",
    )


class EvaluationSection(Section):
    """How quality is measured."""

    examples: Count = Field(512, description="held-out examples at most")
    batch_size: Count = 32
    speed: Literal["auto", "off"] = Field(
        "auto",
        description="seconds of inference by hamcli.load beside dense, after a run on a CPU in "
        "fp32; off = not measured",
    )


class ExportSection(Section):
    """How the result is written."""

    format: Literal["dense", "packed"] = Field(
        "dense",
        description="dense: stock safetensors with zeros; packed: smaller, needs `import hamcli`",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto = the dtype of the input files"
    )
    max_shard_size: str = Field("5GB", pattern=r"^[1-9][0-9]{0,6}(KB|MB|GB)$")


class GateSection(Section):
    """What must hold for exit code 0."""

    max_drop: NonNegative | None = Field(None, description="greatest loss of quality")
    min_sparsity: Fraction | None = Field(None, description="of the targets")


class Recipe(Section):
    """All that a run depends on besides its input files and versions."""

    model: Model = Field(default_factory=Model)
    data: DataSection = Field(default_factory=lambda: DataSection())
    targets: TargetsSection = Field(default_factory=lambda: TargetsSection())
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection())
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection())
    sparsity: SparsitySection = Field(default_factory=lambda: SparsitySection())
    training: TrainingSection = Field(default_factory=lambda: TrainingSection())
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection())
    export: ExportSection = Field(default_factory=lambda: ExportSection())
    gate: GateSection = Field(default_factory=lambda: GateSection())

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        by_hand = self.sparsity.method in ("str", "spred", "pilot", "sign-in", "ast")
        if self.training.precision == "fp16" and (by_hand or self.optimizer.sam > 0):
            raise PydanticCustomError(
                "precision",
                "fp16 scales gradients, which {what} cannot undo: bf16 or fp32",
                {"what": self.sparsity.method if by_hand else "sam"},
            )
        if self.sparsity.score == "fisher" and self.optimizer.base == "sgd":
            raise PydanticCustomError(
                "score", "score fisher reads the second moments of base adamw or adam; sgd has none"
            )
        return self

    @property
    def score(self) -> str:
        """What `sparsity.score` means in training: auto is fisher where that pays, with moments."""
        if self.sparsity.score != "auto":
            return self.sparsity.score
        gains = self.sparsity.method in FISHER_BY_ITSELF and self.optimizer.base != "sgd"
        return "fisher" if gains else "magnitude"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as YAML or JSON would hold it."""
        return self.model_dump(mode="json")


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
