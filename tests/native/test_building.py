"""Building: whatever is missing costs speed, never a run."""

import multiprocessing
import os
import stat

import pytest
import torch

from hamcli import native
from hamcli.native import building
from hamcli.native.building import CannotBuild

FAKE_COMPILER = """#!/bin/sh
echo started >> {log}
sleep 0.2
for word in "$@"; do
  if [ "$previous" = -o ]; then : > "$word"; fi
  previous="$word"
done
{end}
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not built yet, with an empty cache."""
    monkeypatch.setattr(native, "_settled", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HAM_NATIVE", raising=False)
    return tmp_path


def fake_compiler(monkeypatch, folder, end="exit 0"):
    """A compiler that writes down each call, and makes empty files."""
    log = folder / "log"
    program = folder / "fake-c++"
    program.write_text(FAKE_COMPILER.format(log=log, end=end))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    return log


@pytest.mark.skipif(os.environ.get("HAM_NATIVE") == "0", reason="HAM_NATIVE=0")
@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX2")
def test_where_it_should_work_it_is_in_use():
    """The other tests of the extension are skipped where it is off, whatever turned it off."""
    try:
        building.find_compiler()
    except CannotBuild as why:
        pytest.skip(str(why))
    assert native.status().reason.startswith("native step on"), native.status().reason


def test_it_can_be_turned_off(fresh, monkeypatch):
    log = fake_compiler(monkeypatch, fresh)
    monkeypatch.setenv("HAM_NATIVE", "0")
    assert native.operators() is None
    assert native.status().reason == "native step off: HAM_NATIVE=0"
    assert not log.exists()


def test_nothing_is_built_for_those_who_need_no_haste(fresh, monkeypatch):
    log = fake_compiler(monkeypatch, fresh)
    native._is_built.cache_clear()
    assert native.operators_if_built() is None
    assert not log.exists()
    building.build()
    assert building.find_built() is not None
    native._is_built.cache_clear()


def test_without_a_compiler_it_says_so(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert native.operators() is None
    assert "no C++ compiler was found" in native.status().reason
    assert "\n" not in native.status().reason


def test_a_failing_compiler_is_quoted_in_one_line(fresh, monkeypatch):
    end = "echo 'step.cpp:1:10: fatal error: ATen/Parallel.h: No such file' >&2; exit 1"
    fake_compiler(monkeypatch, fresh, end=end)
    status = native.status()
    assert not status.is_available
    assert status.reason.endswith("step.cpp:1:10: fatal error: ATen/Parallel.h: No such file")
    assert not list((fresh / "cache").rglob("*.so"))


def test_a_library_that_does_not_load_is_no_crash(fresh, monkeypatch):
    fake_compiler(monkeypatch, fresh)
    assert native.operators() is None
    assert "cannot be loaded" in native.status().reason


def test_it_is_tried_once_in_a_process(fresh, monkeypatch):
    log = fake_compiler(monkeypatch, fresh, end="exit 1")
    for _ in range(3):
        native.operators()
    assert log.read_text().count("started") == len(building.SOURCES)


def test_a_built_library_is_found_again(fresh, monkeypatch):
    log = fake_compiler(monkeypatch, fresh)
    assert building.build() == building.build()
    assert log.read_text().count("started") == len(building.SOURCES) + 1


@pytest.mark.parametrize("lost", ["library", "sum"])
def test_a_library_that_is_no_longer_whole_is_built_anew(fresh, monkeypatch, lost):
    log = fake_compiler(monkeypatch, fresh)
    library = building.build()
    (library if lost == "library" else building._sum_file(library)).write_bytes(b"a part")
    assert building.find_built() is None
    assert building.build() == library
    assert log.read_text().count("started") == 2 * (len(building.SOURCES) + 1)
    assert building.find_built() == library


def test_the_name_depends_on_flags_and_compiler(fresh, monkeypatch):
    fake_compiler(monkeypatch, fresh)
    compiler = building.find_compiler()
    flags = building.compile_flags()
    key = building._key(compiler, flags)
    assert building._key(compiler, (*flags, "-g")) != key
    os.utime(compiler, (0, 0))
    assert building._key(compiler, flags) != key


def test_a_build_is_announced_and_a_hit_is_not(fresh, monkeypatch):
    fake_compiler(monkeypatch, fresh)
    said = []
    building.build(said.append)
    building.build(said.append)
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_build_once(fresh, monkeypatch):
    log = fake_compiler(monkeypatch, fresh)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=building.build) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text().count("started") == len(building.SOURCES) + 1


def test_a_home_that_cannot_be_written_leads_to_a_private_folder(fresh, monkeypatch):
    (fresh / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(building.tempfile, "gettempdir", lambda: str(fresh))
    folder = building.cache_folder()
    assert folder.parent == fresh
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_is_not_used(fresh, monkeypatch):
    (fresh / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(building.tempfile, "gettempdir", lambda: str(fresh))
    planted = fresh / f"ham-native-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(CannotBuild, match="no folder"):
        building.cache_folder()


def test_a_cpu_without_vectors_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    with pytest.raises(CannotBuild, match="AVX2"):
        building.compile_flags()
