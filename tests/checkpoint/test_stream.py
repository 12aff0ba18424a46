"""Tensors read and written in bounded memory, dense and packed."""

import errno
import os

import numpy as np
import pytest

from hamcli.checkpoint import stream
from hamcli.checkpoint.packed.files import pack_file
from hamcli.checkpoint.source import find_weights
from hamcli.checkpoint.stream import Writer, chunks, open_shards
from tests.checkpoint.pico import entry, refusal, write_header


@pytest.fixture
def shard(tmp_path):
    """Three tensors, one of them large enough for several chunks, one empty, one a scalar."""
    values = (np.arange(3 * 2**20) % 251 + 0x3F00).astype(np.uint16)
    header = {
        "__metadata__": {"format": "pt"},
        "w": entry("BF16", [3, 2**20], 0, values.nbytes),
        "none": entry("F32", [0, 4], values.nbytes, values.nbytes),
        "one": entry("F64", [], values.nbytes, values.nbytes + 8),
        "odd": entry("F16", [3], values.nbytes + 8, values.nbytes + 14),
    }
    data = values.tobytes() + b"scalar_8" + b"sixbit"
    path = write_header(tmp_path / "model.safetensors", header, data)
    return path, values


def opened(path):
    (made,) = open_shards(find_weights(path))
    return made, {one.name: one for one in made.header.tensors}


def copied(path, stage):
    made, tensors = opened(path)
    writer = Writer(stage, [made])
    writer.begin()
    done = []
    for name in reversed(list(tensors)):  # any order will do
        writer.copy(made, tensors[name], done.append)
    return (stage / path.name).read_bytes(), sum(done)


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("unit", [1, 3, 2**20, 3 * 2**20])
def test_chunks_are_whole_units_and_the_whole_tensor(shard, unit):
    path, values = shard
    made, tensors = opened(path)
    parts = [part.copy() for part in chunks(made, tensors["w"], unit)]
    assert all(part.size % unit == 0 and part.flags.writeable for part in parts)
    assert np.array_equal(np.concatenate(parts), values)
    assert len(parts) == (1 if unit == 3 * 2**20 else 2)
    assert list(chunks(made, tensors["none"])) == []
    assert [part.nbytes for part in chunks(made, tensors["one"])] == [8]


@pytest.mark.parametrize("unit", [1, 2**19, 3 * 2**20])
def test_chunks_of_a_packed_tensor_are_the_same(shard, tmp_path, unit):
    path, values = shard
    packed = tmp_path / "packed.safetensors"
    pack_file(path, packed)
    made, tensors = opened(packed)
    assert tensors["w"].is_packed
    parts = [part.copy() for part in chunks(made, tensors["w"], unit)]
    assert all(part.size % unit == 0 for part in parts)
    assert np.array_equal(np.concatenate(parts), values)


def test_a_copy_is_the_same_file_byte_for_byte(shard, stage):
    path, _ = shard
    raw, done = copied(path, stage)
    assert raw == path.read_bytes()
    assert done == 3 * 2**21 + 14


def test_a_copy_without_the_kernels_help_is_the_same(shard, stage, monkeypatch):
    def refuses(*_):
        raise OSError(22, "not here")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    path, _ = shard
    assert copied(path, stage)[0] == path.read_bytes()


@pytest.mark.parametrize("has_help", [True, False])
def test_a_large_copy_goes_part_by_part_also_where_the_disk_takes_little(
    shard, stage, monkeypatch, has_help
):
    whole = os.pwrite
    monkeypatch.setattr(stream, "COPY_BYTES", 2**20 + 1)
    monkeypatch.setattr(os, "pwrite", lambda to, raw, at: whole(to, raw[: 2**17 + 1], at))
    if not has_help:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    path, _ = shard
    assert copied(path, stage)[0] == path.read_bytes()


def test_a_disk_that_fails_is_not_asked_again(shard, stage, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "it is broken")

    monkeypatch.setattr(os, "copy_file_range", fails, raising=False)
    path, _ = shard
    with pytest.raises(OSError, match="it is broken"):
        copied(path, stage)


def test_a_file_has_its_length_before_its_tensors(shard, stage):
    path, _ = shard
    made, _ = opened(path)
    Writer(stage, [made]).begin()
    assert (stage / path.name).stat().st_size == made.dense_bytes == path.stat().st_size
    with pytest.raises(FileExistsError):  # nothing is written over
        Writer(stage, [made]).begin()


def test_a_packed_file_gives_its_dense_one(shard, stage, tmp_path):
    path, _ = shard
    packed = tmp_path / "model.packed.safetensors"
    pack_file(path, packed)
    raw, done = copied(packed, stage)
    assert raw == path.read_bytes()
    assert done == 3 * 2**21 + 14


def test_a_file_without_tensors_is_its_header(tmp_path, stage):
    path = write_header(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    assert copied(path, stage) == (path.read_bytes(), 0)


@pytest.mark.parametrize("way", ["read", "copy"])
def test_a_file_that_becomes_shorter_is_refused(shard, stage, way):
    path, _ = shard
    made, tensors = opened(path)
    os.truncate(path, 2**20)
    if way == "read":
        refusal("E416", "changed while", lambda: list(chunks(made, tensors["w"])))
    else:
        writer = Writer(stage, [made])
        writer.begin()
        refusal("E416", "changed while", writer.copy, made, tensors["w"], lambda _: None)


def test_memory_is_that_of_a_chunk(shard):
    path, _ = shard
    made, tensors = opened(path)
    places = {part.__array_interface__["data"][0] for part in chunks(made, tensors["w"])}
    sizes = [part.nbytes for part in chunks(made, tensors["w"])]
    assert len(places) == 1
    assert max(sizes) == stream.CHUNK_BYTES
