"""How strong the mirror step of a group is: its options, its alpha as found, its decay.

`alpha`, `scaling` and `eta` say:

    raw         alpha as given: the paper's rule
    calibrated  alpha = eta / (lr_peak * mean|g|), one number for all groups: at the peak
                learning rate the mean |exponent| is `eta`, on every model. The mean runs over
                the first ten steps, each of which uses the mean so far, and is then frozen
    tracked     the same, and looked at anew on every tenth step: where gradients have grown,
                alpha falls at once; where they have shrunk, it rises half of the way, as factors
                go. Ours: the exponent stays what was asked for through a run
    normalised  alpha = eta / (lr_peak * rms(g)) for each tensor, anew on every step. Ours,
                not the paper's

In fp32 a decay of lr * beta = 1e-8 a step is below the last digit of every weight, and would be
lost. Hence the decay of a step is

    b = lr * beta + u(step) - u(step - 1),    u between 0 and the dtype's epsilon

with u a fixed pseudo-random sequence. The differences cancel in the sum, so that the weights shrink
by exp(-sum of lr * beta), and they shake every weight by about its last digit, so that the rounding
errors of many steps average out instead of all going one way. It costs no memory and no time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ALPHA_PUBLISHED = 200.0  # arXiv 2506.02630, ImageNet
BETA_PUBLISHED = 1e-3  # arXiv 2506.02630, ImageNet
CLAMPS = {"raw": 5.0, "calibrated": 0.1, "tracked": 0.1, "normalised": 0.1}  # 5: arXiv 2506.02630
ETAS = {"calibrated": 0.004, "tracked": 0.01, "normalised": 0.008}
CALIBRATED = ("calibrated", "tracked")  # alpha is found, one number for all
CALIBRATION_STEPS = 10
TRACKED_EVERY = 10  # steps


def choose_automatic_scaling() -> tuple[Literal["calibrated", "normalised"], float]:
    """What `scaling="auto"` means where alpha is not given: a scaling and its eta."""
    return "calibrated", ETAS["calibrated"]


def require(holds: bool, what: str) -> None:
    """Raise ValueError with `what` unless it holds."""
    if not holds:
        raise ValueError(what)


def settle(group: dict[str, Any]) -> None:
    """Check a group's options, decide those that are automatic, begin its counters."""
    alpha, scaling = group["alpha"], group["scaling"]
    require(scaling in ("auto", *CLAMPS), f"scaling is {scaling!r}: auto, {', '.join(CLAMPS)}")
    if alpha != "auto":
        require(
            scaling in ("auto", "raw") or alpha == 0,
            f"alpha is {alpha}, but scaling {scaling} finds its own: give eta instead",
        )
        scaling = "raw"
    elif scaling == "auto":
        scaling, eta = choose_automatic_scaling()
        group["eta"] = eta if group["eta"] is None else group["eta"]
    elif scaling == "raw":
        group["alpha"] = ALPHA_PUBLISHED
    group["scaling"] = scaling
    group["beta"] = BETA_PUBLISHED if group["beta"] == "auto" else group["beta"]
    group["clamp"] = CLAMPS[scaling] if group["clamp"] is None else group["clamp"]
    if group["eta"] is None:
        group["eta"] = ETAS.get(scaling)
    group.setdefault("lr_peak", float(group["lr"]))
    _check(group)
    for key, start in (
        ("ham_step", 0),
        ("ham_calibration_steps", 0),
        ("ham_grad_mean", 0.0),
        ("ham_alpha_factor", 1.0),
        ("ham_guard_events", 0),
    ):
        group.setdefault(key, start)


def _check(group: Mapping[str, Any]) -> None:
    """Refuse what is out of range, NaN among it."""
    at_least_0 = ["lr", "lr_peak", "weight_decay", "eps", "momentum", "beta"]
    at_least_0.append("alpha" if group["scaling"] == "raw" else "eta")
    for name in at_least_0:
        require(0 <= group[name] < math.inf, f"{name} is {group[name]}: 0 or more is needed")
    require(
        all(0 <= number < 1 for number in group["betas"]),
        f"betas are {group['betas']}: 0 or more and below 1 is needed",
    )
    require(group["clamp"] > 0, f"clamp is {group['clamp']}: more than 0 is needed")
    require(not group["nesterov"] or group["momentum"] > 0, "nesterov needs a momentum above 0")
    for param in group["params"]:
        require(not param.is_complex(), "HAM takes no complex parameters")


def mirrors(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a parameter of the group takes the mirror step."""
    return bool(group["mirror"]) and param.dim() >= 2


def has_mirrored(group: Mapping[str, Any]) -> bool:
    """Whether any parameter of the group does."""
    return any(mirrors(group, param) for param in group["params"])


def is_guarded(group: Mapping[str, Any]) -> bool:
    """Whether the guard looks after the group: alpha is found, not given."""
    return group["scaling"] in CALIBRATED and has_mirrored(group)


def calibrates_now(group: Mapping[str, Any]) -> bool:
    """Whether the coming step looks at mean|g|."""
    if group["scaling"] not in CALIBRATED:
        return False
    is_tracked = group["scaling"] == "tracked" and (group["ham_step"] + 1) % TRACKED_EVERY == 0
    return bool(is_tracked or group["ham_calibration_steps"] < CALIBRATION_STEPS)


def calibrate(
    groups: Sequence[dict[str, Any]], norms: Sequence[Sequence[Sequence[tuple[float, float, int]]]]
) -> None:
    """Take this step's mean |g| over all calibrated groups into their running means."""
    found = [
        (group, [norm for of_batch in of_group for norm in of_batch])
        for group, of_group in zip(groups, norms, strict=True)
        if calibrates_now(group)
    ]
    total = math.fsum(norm[0] for _, of_group in found for norm in of_group)
    count = sum(norm[2] for _, of_group in found for norm in of_group)
    if count == 0 or not 0 < total < math.inf:
        return
    for group, _ in found:
        done, mean = group["ham_calibration_steps"], group["ham_grad_mean"]
        if done < CALIBRATION_STEPS:
            group["ham_grad_mean"] += (total / count - mean) / (done + 1)
            group["ham_calibration_steps"] = done + 1
        else:  # exponents too large do harm at once; too small ones may take a while to grow
            now = total / count
            group["ham_grad_mean"] = max(now, math.sqrt(mean * now))


def alpha_now(group: Mapping[str, Any]) -> float | None:
    """Alpha of a group now; None where each tensor has its own."""
    if group["scaling"] == "raw":
        return float(group["alpha"])
    if group["scaling"] == "normalised":
        return None
    scale = group["lr_peak"] * group["ham_grad_mean"]
    # with no gradient seen there is nothing to scale by, and nothing to do
    return float(group["ham_alpha_factor"] * group["eta"] / scale) if scale > 0 else 0.0


def scaled_alphas(
    group: Mapping[str, Any], norms: Sequence[tuple[float, float, int]]
) -> list[float]:
    """The factor a = lr * alpha of each tensor."""
    lr = float(group["lr"])
    alpha = alpha_now(group)
    if alpha is not None:
        return [lr * alpha] * len(norms)
    now = group["eta"] * lr / group["lr_peak"] if group["lr_peak"] > 0 else 0.0
    return [
        now / math.sqrt(squares / count) if 0 < squares < math.inf else 0.0
        for _, squares, count in norms
    ]


def decay_now(group: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The decay b of this step; see the module."""
    decay = float(group["lr"]) * float(group["beta"])
    if decay == 0:
        return 0.0
    step = group["ham_step"]
    return decay + torch.finfo(dtype).eps * (_uniform(step) - _uniform(step - 1))


def _uniform(index: int) -> float:
    """A number in [0, 1) that looks random: splitmix64 (Steele, Lea, Flood 2014) of `index`."""
    word = (index * 0x9E3779B97F4A7C15) % 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return (word ^ (word >> 31)) / 2.0**64
