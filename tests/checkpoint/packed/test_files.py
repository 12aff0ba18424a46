import json
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hamcli.checkpoint.headers import DTYPE_BITS
from hamcli.checkpoint.packed.files import (
    dense_bytes,
    pack_file,
    packed_blocks,
    packed_bytes,
    read_any_header,
    restore_file,
)
from hamcli.checkpoint.packed.tensors import (
    BLOCK_ELEMENTS,
    CODES,
    decode_payload,
    encode_blocks,
    head_of,
)
from hamcli.checkpoint.recount import count_zeros
from hamcli.errors import InputRefused
from tests.checkpoint.pico import entry, refusal, write_header

SHARES = [0.0, 0.5, 0.9, 1.0]


def write_random(path, dtype, share, shapes, seed=0):
    """Tensors of random bits of `dtype`, of which `share` are zero; NaNs and -0.0 among them."""
    generator = np.random.default_rng(seed)
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for index, shape in enumerate(shapes):
        total, width = int(np.prod(shape)), DTYPE_BITS[dtype] // 8
        bits = generator.integers(0, 256, (total, width), np.uint8)
        if width > 1:
            bits[:, -1] = bits[:, -1] % 3 + 60  # exponents close to each other
        bits[generator.random(total) < share] = 0
        header[f"t{index}"] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + bits.size],
        }
        data += bits.tobytes()
    return write_header(path, header, data)


@pytest.mark.parametrize("dtype", sorted(CODES))
@pytest.mark.parametrize("share", SHARES)
def test_every_dtype_comes_back_byte_for_byte(tmp_path, dtype, share):
    shapes = [(70, 33), (), (0, 5), (1,), (4097,), (3, 4, 5, 6)]
    source = write_random(tmp_path / "a.safetensors", dtype, share, shapes)
    size = pack_file(source, tmp_path / "p.safetensors")
    restore_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()
    assert packed_bytes(source) == packed_bytes(tmp_path / "p.safetensors") == size
    assert count_zeros(source) == count_zeros(tmp_path / "p.safetensors")
    header = read_any_header(tmp_path / "p.safetensors")
    assert dense_bytes(header) == source.stat().st_size
    assert any(one.is_packed for one in header.tensors) or share < 0.9


def test_headers_of_any_writer_are_kept(tmp_path):
    text = b'{ "w":{"shape":[64,4],"data_offsets":[0,1024],"dtype":"F32"},\n'
    text += b' "__metadata__":{"z":"1"}}   '
    source = tmp_path / "a.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + bytes(1024))
    pack_file(source, tmp_path / "p.safetensors")
    restore_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()
    with safe_open(tmp_path / "p.safetensors", "np") as packed:
        assert packed.metadata()["z"] == "1"


def test_tensors_of_several_blocks_and_one_block_read_alone(tmp_path):
    values = torch.randn(2 * BLOCK_ELEMENTS + 1000).to(torch.bfloat16)
    values[torch.rand(len(values)) < 0.9] = 0
    save_file({"w": values}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    payload = memoryview(load_file(tmp_path / "p.safetensors")["w"].numpy())
    head, bits = decode_payload(payload, "w")
    assert len(head.blocks) == 3
    assert np.array_equal(bits, values.view(torch.uint16).numpy())
    header = read_any_header(tmp_path / "p.safetensors")
    with (tmp_path / "p.safetensors").open("rb") as file:
        parts = list(packed_blocks(file.fileno(), header.path, header.tensors[0]))
    assert [len(part) for part in parts] == [BLOCK_ELEMENTS, BLOCK_ELEMENTS, 1000]


def test_a_packed_vector_never_has_the_length_that_it_had(tmp_path):
    # header, table and an empty block are 48 bytes
    found = 48
    save_file({"w": torch.zeros(found)}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    assert load_file(tmp_path / "p.safetensors")["w"].shape == (found + 1,)
    restore_file(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_form_that_is_there_already_is_refused(tmp_path):
    source = write_random(tmp_path / "a.safetensors", "F32", 0.9, [(64, 64)])
    pack_file(source, tmp_path / "p.safetensors")
    refusal("E443", "", pack_file, tmp_path / "p.safetensors", tmp_path / "q.safetensors")
    refusal("E443", "", restore_file, source, tmp_path / "q.safetensors")


@pytest.fixture
def packed(tmp_path):
    source = write_random(tmp_path / "a.safetensors", "BF16", 0.9, [(50, 60), (17,)])
    pack_file(source, tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_every_damaged_byte_of_a_file_is_noticed(packed, tmp_path):
    sound = packed.read_bytes()
    generator = np.random.default_rng(0)
    target, damaged = tmp_path / "out.safetensors", tmp_path / "d.safetensors"
    # the zstandard frame of the header has spare bits; what it decodes to is what counts
    dense = (tmp_path / "a.safetensors").read_bytes()
    refused = 0
    for position in range(len(sound)):
        changed = bytearray(sound)
        changed[position] ^= 1 << int(generator.integers(8))
        damaged.write_bytes(changed)
        try:
            restore_file(damaged, target)
            assert target.read_bytes() == dense, position
        except InputRefused:
            refused += 1
        target.unlink(missing_ok=True)
    assert refused > 0.9 * len(sound)


def test_a_file_cut_short_anywhere_is_refused(packed, tmp_path):
    sound = packed.read_bytes()
    for length in range(0, len(sound), 37):
        (tmp_path / "d.safetensors").write_bytes(sound[:length])
        with pytest.raises(InputRefused):
            restore_file(tmp_path / "d.safetensors", tmp_path / "out.safetensors")


def edited(path, edit, tmp_path):
    """The packed file with its header changed, its data as they were."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    return write_header(tmp_path / "edited.safetensors", header, raw[8 + length :])


def test_another_version_is_refused(packed, tmp_path):
    path = edited(
        packed, lambda header: header["__metadata__"].update({"ham.packed": "2"}), tmp_path
    )
    refusal("E441", "version", read_any_header, path)


@pytest.mark.parametrize("value", ["", "AAAA", "!!", "KLUv/SAAAQAA"])
def test_a_header_that_is_no_header_is_refused(packed, tmp_path, value):
    path = edited(
        packed, lambda header: header["__metadata__"].update({"ham.header": value}), tmp_path
    )
    with pytest.raises(InputRefused):
        read_any_header(path)


def test_a_shape_that_promises_more_than_the_file_has_is_refused():
    blocks = encode_blocks("F32", iter([np.zeros(64, "<u4")]))
    lying = bytearray(head_of("F32", (64,), blocks))
    lying[12:20] = (2**40).to_bytes(8, "little")
    lying[-4:] = zlib.crc32(lying[:-4]).to_bytes(4, "little")
    refusal("E442", "table", decode_payload, memoryview(bytes(lying) + blocks[0]), "w")


def test_every_damaged_byte_of_a_tensor_is_refused():
    bits = np.random.default_rng(0).integers(0, 2**16, 700, np.uint16)
    bits[:600] = 0
    blocks = encode_blocks("BF16", iter([bits]))
    sound = head_of("BF16", (7, 100), blocks) + blocks[0]
    assert np.array_equal(decode_payload(memoryview(sound), "w")[1], bits)
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        with pytest.raises(InputRefused):
            decode_payload(memoryview(damaged), "w")


def test_packing_keeps_a_block_in_memory_and_no_tensor(tmp_path, monkeypatch):
    import tracemalloc

    values = np.random.default_rng(0).standard_normal(20 * BLOCK_ELEMENTS, np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    path = write_header(
        tmp_path / "m.safetensors", {"w": entry("BF16", [20 * BLOCK_ELEMENTS], 0, len(raw))}, raw
    )
    pack_file(path, tmp_path / "first.safetensors")  # scratch memory is made once
    tracemalloc.start()
    size = pack_file(path, tmp_path / "packed.safetensors")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 20 * 2**20 < size < len(raw)
    assert most < size, most
