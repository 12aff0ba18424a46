import pytest

from hamcli.sparsity.schedule import AtOnce, Ramp, cubic, make_ramp


def test_cubic_holds_at_both_ends() -> None:
    due = [cubic(step, first=10, last=20, target=0.9) for step in (0, 10, 20, 99)]
    assert due == [0.0, 0.0, 0.9, 0.9]


def test_cubic_is_seven_eighths_there_at_half_time() -> None:
    assert cubic(15, first=10, last=20, target=0.8) == pytest.approx(0.8 * 7 / 8, rel=1e-15)


def test_cubic_starts_from_what_the_model_has() -> None:
    assert cubic(0, first=0, last=8, target=0.9, start=0.5) == 0.5
    assert cubic(4, first=0, last=8, target=0.9, start=0.5) == pytest.approx(0.5 + 0.4 * 7 / 8)


def test_cubic_never_undoes_a_start_above_the_target() -> None:
    assert {cubic(step, first=0, last=4, target=0.5, start=0.7) for step in range(9)} == {0.7}


def test_cubic_never_falls() -> None:
    due = [cubic(step, first=3, last=90, target=0.95, start=0.01) for step in range(100)]
    assert due == sorted(due)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("freeze_last", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("ramp_start", [0.0, 0.5])
def test_a_ramp_of_any_length_reaches_its_target_within_the_run(
    steps: int, freeze_last: float, ramp_start: float
) -> None:
    ramp = make_ramp(
        0.9, steps=steps, ramp_start=ramp_start, freeze_last=freeze_last, update_every=0.01
    )
    assert 0 <= ramp.first < ramp.last <= steps
    assert ramp.is_due(ramp.last)
    assert ramp.sparsity(ramp.last, 0.0) == 0.9
    assert not any(ramp.is_due(step) for step in range(ramp.last + 1, steps + 1))


def test_masks_are_due_at_the_start_every_few_steps_and_at_the_end() -> None:
    ramp = Ramp(target=0.9, first=2, last=10, every=3)
    assert [step for step in range(20) if ramp.is_due(step)] == [0, 5, 8, 10]


def test_at_once_is_due_before_the_first_step_only() -> None:
    once = AtOnce(0.9)
    assert [step for step in range(5) if once.is_due(step)] == [0]
    assert once.sparsity(0, 0.2) == 0.9
    assert once.sparsity(0, 0.95) == 0.95
