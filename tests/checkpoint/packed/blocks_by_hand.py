"""A second reader of the block layout, written from docs/packed-format.md, one value at a time."""

import struct

import zstandard


def read_block(data: bytes, size: int, width: int, rotated: bool) -> list[int]:
    """The elements of a block as unsigned integers."""
    mask_coding, top_coding, _, num_values, offset = struct.unpack_from("<BBHIQ", data)
    if mask_coding == 3:
        return [0] * size
    planes = []
    position = 16 + 12 * (width + 2)
    for index in range(width + 2):
        codec, length, stored = struct.unpack_from("<B3xII", data, 16 + 12 * index)
        body = data[position : position + stored]
        plane = zstandard.ZstdDecompressor().decompress(body) if codec else body
        assert len(plane) == length
        planes.append(plane)
        position += stored
    mask, top, escapes, *rest = planes
    return placed(
        mask_coding, mask, size, [
            value_of(one, [plane[index] for plane in rest], offset, width, rotated)
            for index, one in enumerate(tops_of(top_coding, top, list(escapes), num_values))
        ],
    )  # fmt: skip


def tops_of(coding: int, top: bytes, escapes: list[int], num_values: int) -> list[int]:
    if coding == 0:
        return list(top)
    codes = [top[index // 4] >> 2 * (index % 4) & 3 for index in range(num_values)]
    return [escapes.pop(0) if code == 3 else code for code in codes]


def value_of(top: int, rest: list[int], offset: int, width: int, rotated: bool) -> int:
    value = top
    for low in rest:
        value = value << 8 | low
    value = (value + offset) % (1 << 8 * width)
    return value >> 1 | (value & 1) << (8 * width - 1) if rotated else value


def placed(coding: int, mask: bytes, size: int, values: list[int]) -> list[int]:
    if coding == 0:
        return values
    if coding == 1:
        kept = [mask[index // 8] >> index % 8 & 1 for index in range(size)]
        return [values.pop(0) if bit else 0 for bit in kept]
    found = []
    for gap in mask:
        found += [0] * gap
        if gap < 255:
            found.append(values.pop(0))
    return found + [0] * (size - len(found))
