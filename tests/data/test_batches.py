"""Batches are pure functions of their number."""

import numpy as np
import pytest
import torch

from hamcli.data.batches import Data, batch, evaluation_batches


class Numbers:
    """Examples that are their own number, and say what they were asked."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def batch(self, places, draw):
        luck = -1.0 if draw is None else draw.random()
        return {"n": torch.tensor(places), "luck": torch.tensor([luck])}


def data(size=10, held=7):
    return Data(Numbers(size), Numbers(held), False, "", "", "")


def numbers(step, size=10, **more):
    words = {"batch_size": 4, "seed": 0, **more}
    return batch(data(size), step, **words)["n"].tolist()


def test_every_epoch_sees_each_example_once_in_another_order():
    stream = [number for step in range(15) for number in numbers(step)]
    epochs = [stream[begin : begin + 10] for begin in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_depends_on_its_number_alone():
    first = batch(data(), 7, batch_size=4, seed=3)
    for step in (0, 99, 3):
        batch(data(), step, batch_size=4, seed=step)
    again = batch(data(), 7, batch_size=4, seed=3)
    assert torch.equal(first["n"], again["n"])
    assert torch.equal(first["luck"], again["luck"])


def test_seeds_and_steps_draw_other_numbers():
    lucks = {
        float(batch(data(), step, batch_size=4, seed=seed, rank=rank, world=2)["luck"])
        for step in range(3)
        for seed in range(3)
        for rank in range(2)
    }
    assert len(lucks) == 18
    assert numbers(0, size=1000) != numbers(0, size=1000, seed=1)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(numbers(0, size=3, batch_size=7)[:6]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_examples_of_one(world):
    together = [
        number
        for step in range(8 // world)
        for rank in range(world)
        for number in numbers(step, size=100, rank=rank, world=world)
    ]
    assert together == [number for step in range(8) for number in numbers(step, size=100)]


def test_measuring_takes_all_in_order_or_a_fixed_choice():
    whole = list(evaluation_batches(data(), batch_size=3, examples=100))
    assert [one["n"].tolist() for one in whole] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {float(one["luck"]) for one in whole} == {-1.0}
    some = [
        [number for one in evaluation_batches(data(held=1000), batch_size=size, examples=100)
         for number in one["n"].tolist()]
        for size in (7, 100)
    ]  # fmt: skip
    assert some[0] == some[1]
    assert len(set(some[0])) == 100
    # no prefix: rows may be sorted by class
    assert np.mean(some[0]) == pytest.approx(500, abs=100)
