import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.masks import apply_masks_, num_dropped, prune_masks
from hamcli.sparsity.methods import Sparsifier, make_sparsifier
from hamcli.sparsity.targets import Target, Targets, select_targets
from tests.sparsity import pico

STEPS = 40


def make_targets(natural: float = 0.0, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for index, shape in enumerate([(8, 12), (4, 16), (2, 4, 8)]):
        param = torch.randn(shape, generator=generator)
        param[torch.rand(shape, generator=generator) < natural] = 0.0
        targets.append(Target(f"layer.{index}", param, len(shape) - 1, len(shape) == 3))
    return Targets(tuple(targets))


def shake_(targets: Targets, step: int) -> None:
    """A training step as the pruner sees it: every weight moves."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in targets.params:
        param.add_(torch.randn(param.shape, generator=generator), alpha=0.3)


def run(sparsifier: Sparsifier, targets: Targets, steps: range, *, train: bool = True) -> list[int]:
    """Train, mask after each step; the number of masked weights after each."""
    counts = []
    for step in steps:
        if step and train:
            shake_(targets, step)
        sparsifier.masks_due(step)
        if sparsifier.masks is not None:
            apply_masks_(targets, sparsifier.masks)
        counts.append(sparsifier.num_masked)
    return counts


def zeros_in(targets: Targets) -> int:
    return sum(int((param == 0).sum()) for param in targets.params)


def copies(masks: list[Tensor] | None) -> list[Tensor]:
    assert masks is not None
    return [mask.clone() for mask in masks]


@pytest.mark.parametrize("method", ["gradual", "one-shot"])
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("target", [0.0, 0.37, 0.9, 1.0])
def test_a_run_ends_with_exactly_the_zeros_asked_for(
    method: str, allocation: str, target: float
) -> None:
    targets = make_targets()
    sparsifier = make_sparsifier(method, targets, target=target, steps=STEPS, allocation=allocation)
    run(sparsifier, targets, range(STEPS + 1))
    assert zeros_in(targets) == sparsifier.num_zeros == num_zeros(target, targets.total)


@given(
    st.integers(1, 30),
    st.sampled_from(["global", "uniform", "erk"]),
    st.sampled_from([0.0, 0.2, 0.8]),
    st.sampled_from([(0.0, 1.0), (0.5, 1.0), (0.0, 0.75), (0.6, 0.8), (0.7, 0.7)]),
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_masked_weights_stay_masked_and_counts_never_fall(
    steps: int, allocation: str, natural: float, bounds: tuple[float, float], seed: int
) -> None:
    targets = make_targets(natural, seed)
    sparsifier = make_sparsifier(
        "gradual",
        targets,
        target=0.7,
        steps=steps,
        allocation=allocation,
        update_every=0.1,
        min_sparsity=bounds[0],
        max_sparsity=bounds[1],
    )
    before = [param != 0 for param in targets.params]
    for step in range(steps + 1):
        run(sparsifier, targets, range(step, step + 1))
        if sparsifier.masks is None:
            continue
        for mask, earlier in zip(sparsifier.masks, before, strict=True):
            assert not (mask & ~earlier).any()
        before = copies(sparsifier.masks)
        assert sparsifier.num_masked == num_dropped(sparsifier.masks)
        assert sparsifier.num_masked <= sparsifier.num_zeros
    assert zeros_in(targets) == sparsifier.num_zeros
    if natural == 0.0:
        for param in targets.params:
            zeros, size = int((param == 0).sum()), param.numel()
            assert bounds[0] * size - 1 < zeros < bounds[1] * size + 1


def test_the_ramp_follows_the_schedule_and_then_stands_still() -> None:
    targets = make_targets()
    sparsifier = make_sparsifier(
        "gradual", targets, target=0.9, steps=STEPS, ramp_start=0.1, freeze_last=0.5
    )
    counts = run(sparsifier, targets, range(STEPS + 1))
    due = [num_zeros(sparsifier.sparsity_due(step), targets.total) for step in range(STEPS + 1)]
    assert counts == due
    assert counts[4] == 0
    assert counts[5] > 0
    assert counts[15] < counts[20] == counts[40]


def test_masks_are_made_only_when_due() -> None:
    targets = make_targets()
    sparsifier = make_sparsifier(
        "gradual", targets, target=0.9, steps=STEPS, update_every=0.25, freeze_last=0.25
    )
    due = [step for step in range(STEPS + 1) if sparsifier.masks_due(step) is not None]
    assert due == [10, 20, 30]


def test_one_shot_prunes_before_the_first_step_as_prune_does() -> None:
    targets = make_targets()
    sparsifier = make_sparsifier("one-shot", targets, target=0.9, steps=STEPS)
    expected = prune_masks(targets, 0.9)
    masks = sparsifier.masks_due(0)
    assert masks is not None
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    assert sparsifier.sparsity_due(0) == 0.9
    assert [sparsifier.masks_due(step) for step in range(1, STEPS + 1)] == [None] * STEPS


def test_natural_zeros_are_masked_from_the_start_and_the_ramp_begins_there() -> None:
    targets = make_targets(natural=0.4)
    natural = zeros_in(targets)
    sparsifier = make_sparsifier("gradual", targets, target=0.9, steps=STEPS, ramp_start=0.5)
    counts = run(sparsifier, targets, range(STEPS + 1))
    assert sparsifier.natural_zeros == natural
    assert counts[:21] == [natural] * 21
    assert sparsifier.sparsity_due(0) == natural / targets.total
    assert counts[-1] == num_zeros(0.9, targets.total)


@pytest.mark.parametrize("method", ["gradual", "one-shot"])
def test_a_model_sparser_than_the_target_trains_what_it_has(method: str) -> None:
    targets = make_targets(natural=0.9)
    support = [param != 0 for param in targets.params]
    sparsifier = make_sparsifier(method, targets, target=0.5, steps=STEPS)
    run(sparsifier, targets, range(STEPS + 1))
    assert sparsifier.num_zeros == sparsifier.natural_zeros > num_zeros(0.5, targets.total)
    for param, mask in zip(targets.params, support, strict=True):
        assert torch.equal(param != 0, mask)


@pytest.mark.parametrize("natural", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("method", ["gradual", "one-shot"])
def test_a_pattern_holds_at_the_end(method: str, natural: float) -> None:
    targets = make_targets(natural)
    sparsifier = make_sparsifier(method, targets, target=0.5, steps=STEPS, pattern="2:4")
    counts = run(sparsifier, targets, range(STEPS + 1))
    assert counts == sorted(counts)
    assert zeros_in(targets) == sparsifier.num_zeros
    for target in targets:
        kept = (target.param != 0).movedim(target.input_dim, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept == 2).all() if natural == 0.0 else (kept <= 2).all()
    if natural == 0.0:
        assert sparsifier.num_zeros == targets.total // 2
    if natural == 0.0 and method == "gradual":
        assert 0 < counts[5] < counts[15] < targets.total // 2


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("natural", [0.0, 0.4])
@pytest.mark.parametrize("stop", [0, 1, 7, 25, 28, 39])
def test_a_resumed_run_makes_the_same_masks(stop: int, natural: float, pattern: str) -> None:
    words = {"target": 0.5, "steps": STEPS, "ramp_start": 0.1, "pattern": pattern}

    def fresh(targets: Targets) -> Sparsifier:
        return make_sparsifier("gradual", targets, **words)

    straight = make_targets(natural)
    reference = fresh(straight)
    run(reference, straight, range(STEPS + 1))

    stopped = make_targets(natural)
    first = fresh(stopped)
    run(first, stopped, range(stop + 1))
    state = {key: value.clone() for key, value in first.state().items()}
    # the new process may build its sparsifier on weights that are already loaded
    second = fresh(stopped)
    second.load_state(state)
    run(second, stopped, range(stop + 1, STEPS + 1))

    assert second.num_zeros == reference.num_zeros
    for one, other in zip(copies(second.masks), copies(reference.masks), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(stopped.params, straight.params, strict=True):
        assert torch.equal(one, other)


def test_a_broken_restore_is_noticed() -> None:
    targets = make_targets(0.4)
    first = make_sparsifier("gradual", targets, target=0.9, steps=STEPS)
    run(first, targets, range(10))
    state = first.state()
    state["natural_zeros"] = torch.tensor(0)
    second = make_sparsifier("gradual", targets, target=0.9, steps=STEPS)
    second.load_state(state)
    assert second.num_zeros_due(11) != first.num_zeros_due(11)


def test_masks_that_come_back_as_floats_are_bool_again() -> None:
    targets = make_targets()
    first = make_sparsifier("one-shot", targets, target=0.5, steps=STEPS)
    first.masks_due(0)
    second = make_sparsifier("one-shot", targets, target=0.5, steps=STEPS)
    second.load_state({key: value.float() for key, value in first.state().items()})
    assert [mask.dtype for mask in copies(second.masks)] == [torch.bool] * len(targets)
    assert second.num_masked == first.num_masked


def test_the_state_of_nothing_masked_is_nothing_masked() -> None:
    targets = make_targets()
    sparsifier = make_sparsifier("gradual", targets, target=0.5, steps=STEPS)
    state = sparsifier.state()
    sparsifier.masks_due(sparsifier.last_update)
    sparsifier.load_state(state)
    assert sparsifier.masks is None
    assert sparsifier.num_masked == 0
    assert sparsifier.sparsity == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_reach_the_target(steps: int) -> None:
    targets = make_targets()
    sparsifier = make_sparsifier("gradual", targets, target=0.9, steps=steps)
    run(sparsifier, targets, range(steps + 1))
    assert zeros_in(targets) == num_zeros(0.9, targets.total)


@pytest.mark.parametrize("family", pico.MODELS)
def test_every_family_goes_through_a_run_in_bf16(family: str) -> None:
    targets = select_targets(pico.MODELS[family]().bfloat16(), ["*"], None)
    for param in targets.params:
        param.requires_grad_(False)
    sparsifier = make_sparsifier("gradual", targets, target=0.9, steps=4, max_sparsity=0.97)
    run(sparsifier, targets, range(5))
    assert zeros_in(targets) == num_zeros(0.9, targets.total)
    assert all((param != 0).any() for param in targets.params)
