"""What any safetensors checkpoint holds: from headers at once, from values when they are asked for.

Names, shapes, dtypes, bytes and ties come from headers and config.json, whatever the size. Zeros,
the mass near zero, N:M fit and duplicates need every value, which are streamed in two passes.
Imports no torch. No config is needed. docs/inspect.md says what each key of the JSON means.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hamcli.checkpoint.folder import CONFIG, find_file, read_json
from hamcli.checkpoint.headers import DTYPE_BITS, FLOATS, Header, TensorInfo
from hamcli.checkpoint.packed.files import read_any_header, tensor_bytes
from hamcli.checkpoint.recount import count_block, refuse_twice
from hamcli.checkpoint.source import weight_files
from hamcli.checkpoint.stream import Shard, chunks, open_shards
from hamcli.errors import InputRefused, RecipeError
from hamcli.sparsity.families import FileTargets, Undecided, by_family

SCHEMA_VERSION = 3

NEAR_ZERO = 1e-3
"""A weight is near zero below this share of the tensor's root mean square."""

EDGES = (1e-4, NEAR_ZERO, 1e-2, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Upper edges of the histogram of magnitudes, in root mean squares; the last bin has none."""

PATTERNS = ((2, 4), (4, 8))

UNIT_LIMIT = 1 << 24
"""Elements that the neighbours of a group may span: they are in memory together."""

Advance = Callable[[int], None]


def _no_advance(_: int) -> None:
    pass


def _sparsity(zeros: int | None, total: int) -> float | None:
    if zeros is None:
        return None
    return zeros / total if total else 0.0


@dataclass(frozen=True, slots=True)
class TensorInspection:
    """One tensor, in elements. What needs values is None where they were not asked for.

    Elements of 4 and 6 bits share bytes and are never counted: None there too.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    """In the file, packed or not."""
    total: int
    input_dim: int | None
    """Axis along which N:M groups are looked for; None of a vector or scalar."""
    tied: tuple[str, ...] = ()
    """Other names under which the model uses it, by config.json or the file's metadata."""
    zeros: int | None = None
    negative_zeros: int | None = None
    nonfinite: int | None = None
    near_zero: int | None = None
    """Not zero, and below `NEAR_ZERO` of the root mean square; None too where there is no rms."""
    histogram: tuple[int, ...] | None = None
    """How many magnitudes lie below each of `EDGES` and not below the one before; zeros aside."""
    rms: float | None = None
    fits: dict[str, float] | None = None
    """`"2:4"` -> share of groups along the input axis with at least 2 zeros of 4."""

    @property
    def sparsity(self) -> float | None:
        """Zeros over all elements."""
        return _sparsity(self.zeros, self.total)


@dataclass(frozen=True, slots=True)
class GroupInspection:
    """Tensors whose names differ in numbers only: the same place in every layer."""

    name: str
    """With `*` for the numbers that differ."""
    num_tensors: int
    shapes: tuple[tuple[int, ...], ...]
    """Each once."""
    dtypes: tuple[str, ...]
    bytes: int
    total: int
    tied: tuple[str, ...]
    counted: int | None
    """Elements that `zeros` is about; fewer than `total` where tensors cannot be counted."""
    zeros: int | None
    """None where no tensor was counted."""
    near_zero: int | None
    """Of the tensors that have it, `measured` elements."""
    measured: int | None
    fits: dict[str, float] | None
    """Means of the tensors' fits, weighted by their elements."""

    @property
    def sparsity(self) -> float | None:
        """Zeros over the elements counted."""
        return _sparsity(self.zeros, self.counted or 0)


@dataclass(frozen=True, slots=True)
class InspectRecord:
    """A checkpoint: its tensors in the order of the files, and their sums."""

    path: str
    files: tuple[str, ...]
    file_bytes: int
    dense_bytes: int
    """Of the tensors when not packed."""
    tensors: tuple[TensorInspection, ...]
    groups: tuple[GroupInspection, ...]
    total: int
    counted: int | None
    """Elements whose zeros were counted; all but those of 4 and 6 bits."""
    zeros: int | None
    """Of those counted; None where there was nothing that could be."""
    matrix_total: int
    """Elements of the tensors with two or more dimensions."""
    matrix_counted: int | None
    matrix_zeros: int | None
    dtypes: dict[str, int]
    """dtype -> elements."""
    duplicates: tuple[tuple[str, ...], ...] | None
    """Names of tensors with the same dtype, shape and bytes; None where values were not read."""
    schema_version: int = SCHEMA_VERSION


def inspect(path: Path, *, values: bool = False, advance: Advance = _no_advance) -> InspectRecord:
    """Look at every tensor of the safetensors file or folder at `path`.

    Args:
        path: A file, or a folder of files.
        values: Whether to read the values too.
        advance: Told of dense bytes read, of which there are twice `dense_size`.

    Raises:
        InputRefused: There is no such file, or it is damaged.
    """
    headers = _headers(path)
    shapes = {one.name: one.shape for header in headers.values() for one in header.tensors}
    if len(shapes) < sum(len(header.tensors) for header in headers.values()):
        _refuse_twice(headers)
    axes, tied = _told_by_config(path, shapes)
    for header in headers.values():
        for name, kept in header.metadata.items():
            if kept in shapes and name not in shapes:
                tied[kept] = tuple(dict.fromkeys([*tied.get(kept, ()), name]))
    tensors = [
        _from_header(file, tensor, axes, tied)
        for file, header in headers.items()
        for tensor in header.tensors
    ]
    duplicates = None
    if values:
        digests: dict[tuple[Any, ...], list[str]] = {}
        shards = {shard.name: shard for shard in open_shards(headers)}
        places = {one.name: one for header in headers.values() for one in header.tensors}
        tensors = [
            _with_values(shards[one.file], places[one.name], one, digests, advance)
            for one in tensors
        ]
        duplicates = tuple(tuple(names) for names in digests.values() if len(names) > 1)
    return _record(path, headers, tensors, duplicates)


def dense_size(path: Path) -> int:
    """Bytes of all tensors at `path` when not packed."""
    return sum(tensor_bytes(one) for header in _headers(path).values() for one in header.tensors)


def _headers(path: Path) -> dict[str, Header]:
    if not path.exists():
        raise InputRefused(
            "E401", "no such checkpoint", path, right="a folder or .safetensors file"
        )
    return {name: read_any_header(file) for name, file in weight_files(path).items()}


def _refuse_twice(headers: Mapping[str, Header]) -> None:
    seen: dict[str, Path] = {}
    for header in headers.values():
        for tensor in header.tensors:
            if tensor.name in seen:
                refuse_twice(tensor.name, seen[tensor.name], header.path)
            seen[tensor.name] = header.path


# ---- what headers tell ----


def _told_by_config(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """Input axes and further names, by tensor of the files, where config.json is known."""
    targets = _all_targets(path, shapes)
    axes = {piece: one.piece_axis for one in targets or () for piece in one.pieces}
    tied = {one.pieces[0]: one.names[1:] for one in targets or () if len(one.names) > 1}
    return axes, tied


def _all_targets(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> FileTargets | None:
    """Every matrix of a known architecture; None of an unknown one."""
    config = find_file(path.resolve(), CONFIG) if path.is_dir() else None
    if config is None:
        return None
    try:
        return by_family(read_json(config, "the model's config", code="E406"), shapes, ["*"], [])
    except (Undecided, InputRefused, RecipeError):
        return None


def _from_header(
    file: str,
    tensor: TensorInfo,
    axes: Mapping[str, int],
    tied: Mapping[str, tuple[str, ...]],
) -> TensorInspection:
    is_matrix = len(tensor.shape) >= 2
    return TensorInspection(
        tensor.name,
        file,
        tensor.dtype,
        tensor.shape,
        tensor.end - tensor.begin,
        tensor.total,
        axes.get(tensor.name, 1) if is_matrix else None,
        tied.get(tensor.name, ()),
    )


def _record(
    path: Path,
    headers: Mapping[str, Header],
    tensors: Sequence[TensorInspection],
    duplicates: tuple[tuple[str, ...], ...] | None,
) -> InspectRecord:
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.total
    return InspectRecord(
        path=str(path),
        files=tuple(headers),
        file_bytes=sum(header.file_bytes for header in headers.values()),
        dense_bytes=sum(
            tensor_bytes(tensor) for header in headers.values() for tensor in header.tensors
        ),
        tensors=tuple(tensors),
        groups=tuple(_grouped(tensors)),
        total=sum(tensor.total for tensor in tensors),
        counted=None if duplicates is None else _told(tensors, "zeros"),
        zeros=_sum(tensor.zeros for tensor in tensors),
        matrix_total=sum(tensor.total for tensor in matrices),
        matrix_counted=None if duplicates is None else _told(matrices, "zeros"),
        matrix_zeros=_sum(tensor.zeros for tensor in matrices),
        dtypes=dtypes,
        duplicates=duplicates,
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    """Of those that are known; None if none of them is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _told(tensors: Iterable[TensorInspection], key: str) -> int:
    """Elements of the tensors of which `key` is known."""
    return sum(one.total for one in tensors if getattr(one, key) is not None)


# ---- groups ----


def _grouped(tensors: Sequence[TensorInspection]) -> Iterator[GroupInspection]:
    """Groups in the natural order of their first names."""
    groups: dict[str, list[TensorInspection]] = {}
    for tensor in sorted(tensors, key=lambda one: _natural(one.name)):
        groups.setdefault(_starred(tensor.name.split(".")), []).append(tensor)
    for members in groups.values():
        yield _group(_common_name([one.name.split(".") for one in members]), members)


def _group(name: str, members: Sequence[TensorInspection]) -> GroupInspection:
    fits: dict[str, list[tuple[float, int]]] = {}
    with_values = members[0].fits is not None
    for one in members:
        for pattern, fit in (one.fits or {}).items():
            fits.setdefault(pattern, []).append((fit, one.total))
    return GroupInspection(
        name=name,
        num_tensors=len(members),
        shapes=tuple(dict.fromkeys(one.shape for one in members)),
        dtypes=tuple(dict.fromkeys(one.dtype for one in members)),
        bytes=sum(one.bytes for one in members),
        total=sum(one.total for one in members),
        tied=tuple(name for one in members for name in one.tied),
        counted=_told(members, "zeros") if with_values else None,
        zeros=_sum(one.zeros for one in members),
        near_zero=_sum(one.near_zero for one in members),
        measured=_told(members, "near_zero") if with_values else None,
        fits={
            pattern: sum(fit * total for fit, total in found) / sum(total for _, total in found)
            for pattern, found in fits.items()
        }
        if with_values
        else None,
    )


def _starred(words: Sequence[str]) -> str:
    return ".".join("*" if word.isdigit() else word for word in words)


def _common_name(names: Sequence[Sequence[str]]) -> str:
    """The words of the first name, with stars where another has another number."""
    return ".".join(
        word if all(name[place] == word for name in names) else "*"
        for place, word in enumerate(names[0])
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


# ---- what values tell ----


def _with_values(
    shard: Shard,
    tensor: TensorInfo,
    one: TensorInspection,
    digests: dict[tuple[Any, ...], list[str]],
    advance: Advance,
) -> TensorInspection:
    if DTYPE_BITS[one.dtype] % 8:  # elements share bytes
        advance(2 * tensor_bytes(tensor))
        return replace(one, fits={})
    if not one.total:
        return replace(one, zeros=0, negative_zeros=0, nonfinite=0, near_zero=0, fits={})
    groups = _groups_of(one)
    unit = max([size * inner for _, size, inner in groups], default=1)
    zeros = negative = nonfinite = 0
    squares = 0.0
    fitting = [0] * len(groups)
    digest = hashlib.sha256()
    for bits in chunks(shard, tensor, unit):
        found = count_block(bits.view(np.uint8).data, one.dtype)
        zeros, negative, nonfinite = zeros + found[0], negative + found[1], nonfinite + found[2]
        digest.update(bits.data)
        if one.dtype in FLOATS:
            squares += _squares(_floats(bits, one.dtype))
            for place, (kept, size, inner) in enumerate(groups):
                fitting[place] += _fitting(bits, kept, size, inner)
        advance(bits.nbytes)
    digests.setdefault((one.dtype, one.shape, digest.digest()), []).append(one.name)
    made = replace(one, zeros=zeros, negative_zeros=negative, nonfinite=nonfinite)
    if one.dtype not in FLOATS:
        advance(tensor_bytes(tensor))
        return replace(made, fits={})
    rms = math.sqrt(squares / max(1, one.total - nonfinite))
    histogram = _histogram(shard, tensor, rms, zeros, nonfinite, advance)
    return replace(
        made,
        rms=rms,
        histogram=histogram,
        near_zero=sum(histogram[: EDGES.index(NEAR_ZERO) + 1]),
        fits={
            f"{kept}:{size}": fits / (one.total // size)
            for (kept, size, _), fits in zip(groups, fitting, strict=True)
        },
    )


def _groups_of(one: TensorInspection) -> list[tuple[int, int, int]]:
    """(kept, size, distance of neighbours) of each pattern that the input axis can be cut into."""
    if one.input_dim is None:
        return []
    inner = math.prod(one.shape[one.input_dim + 1 :])
    return [
        (kept, size, inner)
        for kept, size in PATTERNS
        if not one.shape[one.input_dim] % size and size * inner <= UNIT_LIMIT
    ]


def _floats(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The elements as floats that numpy can compute with."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32 if dtype == "F32" else np.float64)


def _squares(values: NDArray[Any]) -> float:
    finite = np.where(np.isfinite(values), values, 0).astype(np.float64)
    return float(np.dot(finite, finite))


def _fitting(bits: NDArray[Any], kept: int, size: int, inner: int) -> int:
    """How many groups have no more non-zeros than the pattern keeps."""
    alive = (bits << 1 != 0).reshape(-1, size, inner)
    return int(np.count_nonzero(np.count_nonzero(alive, axis=1) <= kept))


def _histogram(
    shard: Shard, tensor: TensorInfo, rms: float, zeros: int, nonfinite: int, advance: Advance
) -> tuple[int, ...]:
    below = [0] * len(EDGES)
    for bits in chunks(shard, tensor):
        values = np.abs(_floats(bits, tensor.dtype))
        for place, edge in enumerate(EDGES):
            below[place] += int(np.count_nonzero(values < edge * rms))
        advance(bits.nbytes)
    # all values are below the edges of a tensor of zeros alone, or none
    reached = [max(0, count - zeros) for count in below]
    rest = tensor.total - zeros - nonfinite
    steps = zip([0, *reached], [*reached, rest], strict=True)
    return tuple(after - before for before, after in steps)
