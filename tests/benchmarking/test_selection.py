"""The benchmark of selection on small shapes."""

import json
import math

import pytest
import torch

from hamcli import native
from hamcli.benchmarking.selection import bench_selection

SHAPES = [(330, 170), (17,), (4, 3, 3, 3)]
NAMES = ["radix", "threshold", "threshold, masked", "masks", "masks, masked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_native", [True, False])
def test_every_part_has_a_finite_ratio(dtype, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(native, "_settled", native.Status(False, "off for a test"))
    found = bench_selection(SHAPES, dtype=dtype, rounds=2)
    assert [one.name for one in found.variants] == NAMES
    assert found.num_weights == found.mask_bytes == 330 * 170 + 108  # vectors are not pruned
    assert all(0 < one.ratio < math.inf for one in found.variants)
    assert all(0 < one.fastest_ratio < math.inf for one in found.variants)
    assert found.variants[0].ratio == 1.0
    again = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert [one["name"] for one in again["variants"]] == NAMES
