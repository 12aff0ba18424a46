"""The numba form: what it falls back on, what it keeps on disk, which form is chosen."""

import importlib.util
import os
import stat

import pytest
import torch

from hamcli import native
from hamcli.optim import HAM, cpu, forms, fused, jit
from tests.optim.numbers import normal

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not compiled yet, with an empty cache."""
    from hamcli.optim import loop

    monkeypatch.setattr(jit, "_settled", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HAM_NUMBA", raising=False)
    held = (jit._cache, loop.compiled)
    for one in held:
        one.cache_clear()
    yield tmp_path
    for one in held:
        one.cache_clear()


def off(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "_settled", native.Status(False, f"no {module.__name__}"))


def sgd_step():
    w, g = normal(60, 61, seed=0), normal(60, 61, seed=1)
    jit.sgd_ham_(
        [w], [g], [None], masks=[None], rounded=[None], a=[0.1], b=0.0, clamp=0.1, lr=0.1,
        momentum=0.0, nesterov=False, weight_decay=0.0, is_first_step=False,
    )  # fmt: skip
    return w


@needs_numba
@pytest.mark.skipif(os.environ.get("HAM_NUMBA") == "0", reason="HAM_NUMBA=0")
@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX2")
def test_where_it_should_work_it_is_in_use():
    """The other tests of this form are skipped where it is off, whatever turned it off."""
    assert jit.status().reason.startswith("numba step on"), jit.status().reason


@needs_numba
def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("HAM_NUMBA", "0")
    assert not jit.is_usable()
    assert jit.status().reason == "numba step off: HAM_NUMBA=0"


def test_without_numba_it_says_so(monkeypatch):
    monkeypatch.setattr(jit, "_settled", None)
    monkeypatch.delenv("HAM_NUMBA", raising=False)
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    assert not jit.is_usable()
    assert jit.status().reason == "numba step off: numba is not installed"


@needs_numba
def test_an_unknown_vector_unit_is_left_to_torch(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(jit.platform, "machine", lambda: "x86_64")
    assert not jit.is_usable()
    assert "vector unit" in jit.status().reason


@needs_numba
def test_other_rounding_than_torchs_turns_it_off(fresh, monkeypatch):
    monkeypatch.setattr(jit, "_lanes", lambda: 16)  # 1,037 numbers: the last 13 are not the same
    assert not jit.is_usable()
    assert "bit for bit" in jit.status().reason


@needs_numba
def test_what_is_compiled_lies_in_a_private_folder_and_is_found_again(fresh):
    import numba

    from hamcli.optim import loop

    before = numba.config.CACHE_DIR
    made = sgd_step()
    assert before == numba.config.CACHE_DIR  # others' caches stay where they were
    folder = fresh / "ham" / "native"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = sorted((folder / "numba").rglob("*.nbc"))
    assert len(kept) == 1
    loop.compiled.cache_clear()
    assert torch.equal(sgd_step(), made)
    assert sorted((folder / "numba").rglob("*.nbc")) == kept


@needs_numba
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_costs_time_alone(fresh, suffix):
    from hamcli.optim import loop

    made = sgd_step()
    (kept,) = fresh.rglob(f"*.{suffix}")
    kept.write_bytes(kept.read_bytes()[:100])
    loop.compiled.cache_clear()
    assert torch.equal(sgd_step(), made)


@needs_numba
def test_without_a_folder_nothing_is_kept(fresh, monkeypatch):
    monkeypatch.setattr(jit, "_cache", lambda: None)
    sgd_step()
    assert not list(fresh.rglob("*.nb?"))


def test_the_extension_is_chosen_before_numba_and_numba_before_blocks(monkeypatch):
    weights = torch.zeros(3, 3)
    optimizer = HAM([torch.nn.Parameter(weights)])
    monkeypatch.setattr(fused, "is_usable", lambda: True)
    monkeypatch.setattr(jit, "is_usable", lambda: True)
    assert optimizer._backend_for(weights) is fused
    monkeypatch.setattr(fused, "is_usable", lambda: False)
    assert optimizer._backend_for(weights) is jit
    monkeypatch.setattr(jit, "is_usable", lambda: False)
    assert optimizer._backend_for(weights) is cpu


def test_one_line_says_which_form_steps(monkeypatch):
    off(monkeypatch, native, jit)
    blocks = forms.prepare(print)
    assert blocks.count("\n") == 0
    assert blocks.endswith("the slower step in plain torch is used")
    monkeypatch.setattr(jit, "_settled", native.Status(True, "numba step on: numba 1"))
    assert forms.prepare(print) == "no hamcli.native; numba step on: numba 1"
    monkeypatch.setattr(native, "_settled", native.Status(True, "native step on"))
    assert forms.prepare(print) is None
