"""Times of kernels: measured once for what they depend on, kept, and never trusted blindly."""

import json
import os

import pytest
import torch
from torch import nn

from hamcli.runtime import calibrating
from hamcli.runtime.calibrating import Calibration, cache_path, fastest
from hamcli.runtime.modules import SparseLinear


def module(shape=(6, 8), *, is_transposed=False, zeros=24, names=("csr",)):
    dense = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        dense.weight.fill_(1.0).view(-1)[:zeros] = 0.0
    return SparseLinear(dense, is_transposed, dict.fromkeys(names), lambda *_: "dense")


@pytest.fixture
def measured(monkeypatch):
    """Rows of each measurement, which takes no time."""
    rows = []

    def measure(module, count):
        rows.append(count)
        return {"dense": 1.0, **{name: 0.5 for name in module.backends}}

    monkeypatch.setattr(calibrating, "_measure", measure)
    return rows


def test_the_limit_of_the_gain():
    assert fastest({"dense": 1.1, "csr": 1.0}) == "csr"
    assert fastest({"dense": 1.09, "csr": 1.0}) == "dense"
    assert fastest({"dense": 1.0}) == "dense"


def test_rows_are_rounded_to_powers_of_two_up_to_a_limit(measured):
    times = Calibration()
    for rows in (0, 1, 100, 128, 150, 5_000, 1_000_000):
        assert times.choose(module(), rows) == "csr"
    assert measured == [1, 128, 4096]


def test_what_times_depend_on_is_measured_anew(measured):
    times = Calibration()
    base = {"shape": (8, 8), "zeros": 32}
    before = torch.get_num_threads()
    for more in (
        {}, {"is_transposed": True}, {"shape": (16, 4)}, {"zeros": 48}, {"names": ("csr", "native")}
    ):  # fmt: skip
        times.times(module(**{**base, **more}), 8)
    assert len(measured) == 5
    try:
        torch.set_num_threads(before + 1)
        times.times(module(**base), 8)
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 6
    times.times(module(**base), 8)
    times.times(module(**{**base, "zeros": 33}), 8)  # 0.516 counts as 0.50
    assert len(measured) == 6


def test_times_are_kept_and_found_again(measured, tmp_path):
    path = tmp_path / "cache" / "times.json"
    first = Calibration(path)
    found = first.times(module(), 8)
    first.save()
    assert os.listdir(path.parent) == [path.name]
    assert Calibration(path).times(module(), 8) == found == {"csr": 0.5, "dense": 1.0}
    assert len(measured) == 1


def test_what_another_process_kept_meanwhile_stays(measured, tmp_path):
    path = tmp_path / "times.json"
    one, other = Calibration(path), Calibration(path)
    one.times(module(), 8)
    other.times(module(), 16)
    one.save()
    other.save()
    assert len(json.loads(path.read_text())) == 2
    again = path.stat().st_mtime_ns, path.stat().st_ino
    other.save()  # nothing new
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == again


@pytest.mark.parametrize(
    "bad", [{"dense": -1.0}, {"dense": 0}, {"dense": 1}, {"csr": float("inf")}, [1.0], None]
)
def test_what_is_no_time_is_measured_anew(bad, measured, tmp_path):
    path = tmp_path / "times.json"
    first = Calibration(path)
    first.times(module(), 8)
    first.save()
    (key,) = json.loads(path.read_text())
    held = {"csr": 0.5, "dense": 1.0, **bad} if isinstance(bad, dict) else bad
    path.write_text(json.dumps({key: held}))
    assert Calibration(path).times(module(), 8) == {"csr": 0.5, "dense": 1.0}
    assert len(measured) == 2
    for text in ("{", "[]", "3"):
        path.write_text(text)
        Calibration(path).times(module(), 8)
    assert len(measured) == 5


def test_the_file_is_of_this_machine_and_these_versions(monkeypatch):
    paths = {cache_path()}
    for room, name, value in (
        (torch, "__version__", "0"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (calibrating, "_cpu_name", lambda: "other"),
        (os, "cpu_count", lambda: 1_000),
    ):
        monkeypatch.setattr(room, name, value)
        paths.add(cache_path())
    assert len(paths) == 5


def test_a_cache_that_cannot_be_finished_leaves_nothing(tmp_path, measured, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrating.json, "dump", full)
    times = Calibration(tmp_path / "cache" / "times.json")
    times.choose(module(), 1)
    times.save()
    assert list((tmp_path / "cache").iterdir()) == []
