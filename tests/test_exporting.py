"""`ham export` in one process: what is refused, what is left, what is told."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from hamcli import exporting
from hamcli.checkpoint.packed.files import pack_file
from hamcli.errors import HamError
from hamcli.exporting import export
from hamcli.progress import Silent
from tests.checkpoint import pico
from tests.oracles.safetensors_reader import read_folder

RESNET = Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny"
FILE = RESNET / "model.safetensors"


class Watcher(Silent):
    """Remembers what it was told."""

    def __init__(self):
        self.notes, self.total, self.done = [], 0, 0

    def note(self, text):
        self.notes.append(text)

    def begin_bytes(self, text, total):
        self.total = total

    def bytes_done(self, count):
        self.done += count


def to(form, path, out, *, overwrite=False, progress=None):
    return export(path, form, out=out, overwrite=overwrite, progress=progress or Silent())


def refused(code, *given, **more):
    with pytest.raises(HamError) as caught:
        to(*given, **more)
    assert caught.value.code == code
    return caught.value.line()


def test_sizes_are_those_of_the_files(tmp_path):
    packed = to("packed", RESNET, tmp_path / "packed")
    dense = to("dense", tmp_path / "packed", tmp_path / "dense")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "packed")]
    assert sizes[0] == FILE.stat().st_size
    for found in (packed, dense):
        assert [found.dense_bytes, found.packed_bytes] == sizes
        assert found.ratio == sizes[0] / sizes[1]
    assert (packed.format, dense.format) == ("packed", "dense")
    assert packed.files == {
        path.name: path.stat().st_size for path in (tmp_path / "packed").iterdir()
    }
    assert b"quantization_config" in (tmp_path / "packed" / "config.json").read_bytes()
    for path in (tmp_path / "dense").iterdir():
        assert path.read_bytes() == (RESNET / path.name).read_bytes(), path.name


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_the_form_that_it_has_already_is_refused(is_folder, tmp_path):
    source, packed = (RESNET if is_folder else FILE), tmp_path / "packed.safetensors"
    assert "it is dense already" in refused("E443", "dense", source, tmp_path / "out")
    to("packed", source, packed)
    assert "it is packed already" in refused("E443", "packed", packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [packed]


def test_a_folder_that_pruning_a_bare_file_leaves_goes_there_and_back(tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(FILE, tmp_path / "out" / "mine.safetensors")
    (tmp_path / "out" / "README.md").write_text("a card")
    packed = to("packed", tmp_path / "out", tmp_path / "packed")
    assert set(packed.files) == {"README.md", "mine.safetensors"}
    to("dense", tmp_path / "packed", tmp_path / "back")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_files_of_both_forms_are_refused(tmp_path):
    folder = pico.save(pico.llama(), tmp_path / "m", max_shard_size="20KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    pack_file(first, tmp_path / "packed")
    (tmp_path / "packed").replace(first)
    for form in ("dense", "packed"):
        assert "it is mixed already" in refused("E443", form, folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_too_small_for_dense_files_is_told_before(tmp_path, monkeypatch):
    from hamcli.runstate import disk

    to("packed", FILE, tmp_path / "p.safetensors")
    monkeypatch.setattr(disk, "free_bytes", lambda _: FILE.stat().st_size - 1)
    refused("E504", "dense", tmp_path / "p.safetensors", tmp_path / "d.safetensors")
    monkeypatch.setattr(disk, "free_bytes", lambda _: FILE.stat().st_size)
    to("dense", tmp_path / "p.safetensors", tmp_path / "d.safetensors")


def test_an_output_file_may_not_be_a_folder_the_input_or_there(tmp_path):
    source = Path(shutil.copy(FILE, tmp_path / "m.safetensors"))
    (tmp_path / "link.safetensors").hardlink_to(source)
    (tmp_path / "old.safetensors").write_text("old")
    refused("E111", "packed", source, tmp_path, overwrite=True)
    refused("E110", "packed", source, source, overwrite=True)
    refused("E110", "packed", source, tmp_path / "link.safetensors", overwrite=True)
    refused("E112", "packed", source, tmp_path / "old.safetensors")
    assert (tmp_path / "old.safetensors").read_text() == "old"
    assert source.read_bytes() == FILE.read_bytes()
    to("packed", source, tmp_path / "old.safetensors", overwrite=True)
    assert (tmp_path / "old.safetensors").read_bytes() != b"old"


def test_an_output_file_by_another_name_is_refused_as_nothing_would_read_it(tmp_path):
    source = Path(shutil.copy(FILE, tmp_path / "m.safetensors"))
    assert "a name in .safetensors" in refused("E111", "packed", source, tmp_path / "packed")
    assert sorted(tmp_path.iterdir()) == [source]


def test_folders_above_an_output_file_are_made(tmp_path):
    found = to("packed", FILE, tmp_path / "a" / "b" / "m.safetensors")
    assert found.packed_bytes == (tmp_path / "a" / "b" / "m.safetensors").stat().st_size


def test_a_folder_may_not_be_written_into_itself(tmp_path):
    shutil.copytree(RESNET, tmp_path / "m")
    refused("E110", "packed", tmp_path / "m", tmp_path / "m", overwrite=True)
    assert read_folder(tmp_path / "m").keys() == read_folder(RESNET).keys()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(source, stage, advance):
        stage.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "pack_file", fails)
    refused("E501", "packed", FILE, tmp_path / "p.safetensors")
    refused("E501", "packed", RESNET, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_files_name_is_durable(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def noted(handle):
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *two: (order.append("rename"), replace(*two)))
    to("packed", FILE, tmp_path / "p.safetensors")
    assert order == ["file", "rename", "folder"]


def test_what_is_not_copied_is_told(tmp_path):
    shutil.copytree(RESNET, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    watcher = Watcher()
    to("packed", tmp_path / "m", tmp_path / "out", progress=watcher)
    assert [note for note in watcher.notes if "not copied" in note] == ["not copied: notes.txt"]


@pytest.mark.parametrize("path", [RESNET, FILE], ids=["folder", "file"])
def test_progress_ends_with_every_byte_of_the_dense_files(path, tmp_path):
    packed, suffix = Watcher(), path.suffix
    to("packed", path, tmp_path / f"packed{suffix}", progress=packed)
    assert packed.done == packed.total == FILE.stat().st_size
    dense = Watcher()
    to("dense", tmp_path / f"packed{suffix}", tmp_path / f"dense{suffix}", progress=dense)
    assert dense.done == dense.total == FILE.stat().st_size


def test_nothing_is_no_checkpoint(tmp_path):
    refused("E401", "packed", tmp_path / "nowhere", tmp_path / "out")
