"""Rounds, spreads and memory."""

import os

import pytest
import torch

from hamcli.benchmarking.measuring import extra_peak_bytes, ratio_spread, spread, time_rounds


def test_a_round_goes_through_all_jobs_in_turn():
    calls = []
    jobs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = time_rounds(jobs, rounds=3, clock="wall")
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_spread_is_the_tenth_and_ninetieth_percentile():
    assert spread([4.0]) == (4.0, 4.0)
    assert spread([float(i) for i in range(11)]) == pytest.approx((1.0, 9.0))
    assert ratio_spread([2.0, 9.0], [1.0, 3.0]) == pytest.approx((2.1, 2.9))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to reset")
def test_memory_that_a_job_takes_and_frees_is_seen():
    size = 64 << 20
    found = extra_peak_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    assert size - (2 << 20) <= found <= size + (16 << 20)
    assert extra_peak_bytes(lambda: None) < 2 << 20
