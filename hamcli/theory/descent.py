"""Gradient descent with the step under test, in float64: the shipped optimizer over plain SGD.

The theorems are about a flow, so the steps must be small: `lr` is set anew on each, as large as
keeps every |exponent| below `exponent_limit` and the descent stable. Neither changes where the flow
goes, only how fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hamcli.optim import HAM
from hamcli.theory.potentials import Vector
from hamcli.theory.references import Matrix

LOOK_EVERY = 20  # steps between looks at the curvature and at whether the end is reached
STEP_LIMIT = 30_000

# (weights, alpha, beta) -> what steps them; the tests put broken ones here
MakeOptimizer = Callable[[Tensor, float, float], torch.optim.Optimizer]


def ham_sgd(weights: Tensor, alpha: float, beta: float) -> torch.optim.Optimizer:
    """The optimizer of the project: SGD, then the mirror step of the paper, by the slow rule."""
    return HAM([weights], base="sgd", lr=1.0, alpha=alpha, beta=beta, clamp=5.0, backend="rule")


@dataclass(frozen=True, slots=True)
class Trail:
    """A descent: where it ended, and where it was at each look.

    Attributes:
        weights: [weights], the last point.
        steps: Steps done at each look.
        points: The weights at each look.
    """

    weights: Vector
    steps: tuple[int, ...]
    points: tuple[Vector, ...]


def descend(
    features: Matrix,
    labels: Vector,
    start: Vector,
    *,
    alpha: float,
    beta: float = 0.0,
    exponent_limit: float,
    tolerance: float,
    stability: float = 1.5,
    make: MakeOptimizer = ham_sgd,
) -> Trail:
    """Descend |features @ w - labels|^2 / 2 until its flow stands still.

    Args:
        features: [rows, weights].
        labels: [rows].
        start: [weights].
        alpha: HAM's, 0 or more.
        beta: HAM's, 0 or more.
        exponent_limit: Greatest lr * alpha * |gradient| of a step.
        tolerance: With beta = 0 the |error| to reach, relative to that of zero weights; else the
            norm of the gradient of loss + beta * M, relative likewise.
        stability: Greatest lr times curvature; at 2 a descent begins to swing.
        make: Makes the optimizer under test.
    """
    inputs, outputs = torch.from_numpy(features), torch.from_numpy(labels)
    turned = inputs.T.contiguous()
    param = torch.from_numpy(start.copy())[None].requires_grad_()  # HAM mirrors matrices only
    weights = param.detach()[0]
    optimizer = make(param, alpha, beta)
    direction = torch.ones_like(outputs)
    scale = float(outputs.norm() if beta == 0 else (turned @ outputs).norm())
    steps, points = [], []
    slow = 0.0
    for step in range(STEP_LIMIT + 1):
        error = inputs @ weights - outputs
        grad = turned @ error
        if step % LOOK_EVERY == 0:
            steps.append(step)
            points.append(weights.numpy().copy())
            speed = 1 + alpha * weights.abs()
            left = error if beta == 0 else grad + beta * weights / speed
            if not float(left.norm()) > tolerance * scale:
                break
            curvature, direction = _curvature(inputs, turned, speed, direction)
            slow = stability / (curvature + beta)
        pull = alpha * float(grad.abs().max())
        param.grad = grad[None]
        for group in optimizer.param_groups:
            group["lr"] = min(slow, exponent_limit / pull) if pull > 0 else slow
        optimizer.step()
    return Trail(weights.numpy().copy(), tuple(steps), tuple(points))


def _curvature(
    inputs: Tensor, turned: Tensor, speed: Tensor, direction: Tensor
) -> tuple[float, Tensor]:
    """Largest eigenvalue of inputs * speed * inputs^T, about, by power iteration from the last."""
    size = 0.0
    for _ in range(3):
        direction = inputs @ (speed * (turned @ direction))
        size = float(direction.norm())
        direction = direction / size
    return size, direction


def cross_zero(
    start: float,
    target: float,
    *,
    alpha: float,
    lr: float,
    until: float,
    make: MakeOptimizer = ham_sgd,
) -> tuple[Vector, float | None]:
    """One weight on its way to `target` under the loss (w - target)^2 / 2.

    Args:
        start: The first weight, below zero.
        target: Where the loss is least, above zero.
        alpha: HAM's; 0 is gradient descent.
        lr: Size of a step, in units of time of the flow.
        until: Time to follow it.
        make: Makes the optimizer under test.

    Returns:
        The weight at each step from 0 on, and the time at which it was zero; None if it never was.
    """
    param = torch.tensor([[start]], dtype=torch.float64, requires_grad=True)
    optimizer = make(param, alpha, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    path = [start]
    for _ in range(round(until / lr)):
        param.grad = param.detach() - target
        optimizer.step()
        path.append(float(param.detach()[0, 0]))
    return np.array(path), _zero_time(path, lr)


def cross_zero_factored(
    start: float, target: float, *, lr: float, until: float
) -> tuple[Vector, float | None]:
    """As `cross_zero`, for gradient descent on the two factors of a balanced w = m * v, |m| = |v|.

    Its flow dw = -2 |w| dL stands still at zero.
    """
    size = float(np.sqrt(abs(start)))
    factors = torch.tensor([size, np.copysign(size, start)], dtype=torch.float64)
    optimizer = torch.optim.SGD([factors], lr=lr)
    path = [start]
    for _ in range(round(until / lr)):
        factors.grad = (factors.prod() - target) * factors.flip(0)
        optimizer.step()
        path.append(float(factors.prod()))
    return np.array(path), _zero_time(path, lr)


def _zero_time(path: list[float], lr: float) -> float | None:
    """Time of the first crossing, on a line between the two steps around it."""
    for step, (before, after) in enumerate(pairwise(path)):
        if after >= 0:
            return lr * (step + before / (before - after))
    return None
