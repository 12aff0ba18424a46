"""The road of images: rows → examples of pixels."""

import hashlib
from dataclasses import replace
from typing import Any

from hamcli.data import images
from hamcli.data.batches import Data
from hamcli.data.columns import find_column, need_column
from hamcli.data.dead_leaves import DeadLeaves
from hamcli.data.division import capped, divide
from hamcli.data.images import ImageExamples, ImageForm
from hamcli.data.labels import ClassIds
from hamcli.data.sources import read_rows
from hamcli.data.table import Table, digest_of
from hamcli.recipe.schema import DataSection

_SAMPLE_IMAGES, _SAMPLE_HELD_OUT = 1024, 256
_SAMPLE_EDGE = 32


def open_images(section: DataSection, *, task: str, processor: Any, config: Any) -> Data:
    """Data of a task on images; arguments as `open_data`."""
    notes: list[str] = []
    if section.source is None:
        train, held = builtin_images(processor, config)
        column = other = "image"
        label = None
        notes.append(
            "no --data: the model learns from procedural images; images of its own kind are better"
        )
    else:
        train, held, column, other = _tables(section)
        label = None
        if task == "image-classification":
            label = find_column(train, section.label, "label")
            find_column(held, label, "label")  # held-out rows may lack what the others have
    form, told = _form(section, processor, config, train, column)
    notes += told
    first = ImageExamples(train.columns[column], _labels(train, label, config), form, train)
    if form.processor is None and form.mean is None and processor is None:
        first.form, note = images.with_statistics(first)
        notes.append(note)
    second = ImageExamples(held.columns[other], _labels(held, label, config), first.form, held)
    tail = "with labels" if label is not None else "without labels"
    return Data(
        first,
        second,
        label is not None,
        f"{train.name}: {len(first):,} images, {tail}",
        f"{held.name}: {len(second):,} images held out",
        digest_of(train, held),
        tuple(notes),
    )


def _tables(section: DataSection) -> tuple[Table, Table, str, str]:
    """Training and held-out rows, each with the name of its column of images."""
    assert section.source is not None  # the caller has looked
    train, held = read_rows(
        section.source,
        split=section.split,
        evaluation=section.evaluation,
        evaluation_split=section.evaluation_split,
    )
    column = need_column(train, section.image, "image")
    if held is None:
        train, held = divide(train, train.columns[column], section.evaluation_fraction)
    other = column if column in held.columns else need_column(held, None, "image")
    return capped(train, column, section.max_examples), held, column, other


def _labels(table: Table, label: str | None, config: Any) -> list[int] | None:
    return None if label is None else ClassIds(config.id2label).of_column(table, label)


def _form(
    section: DataSection, processor: Any, config: Any, table: Table, column: str
) -> tuple[ImageForm, list[str]]:
    channels = images.num_channels(config)
    notes: list[str] = []
    if processor is not None:
        form = images.form_of_processor(processor, channels)
    else:
        form, notes = images.form_of_config(config, channels, table, column)
    if (section.mean is not None or section.std is not None) and form.processor is None:
        mean, std = section.mean or form.mean or (0.0,), section.std or form.std or (1.0,)
        form = replace(
            form,
            mean=images.per_channel("mean", mean, channels),
            std=images.per_channel("std", std, channels),
        )
    return form, notes


def builtin_images(processor: Any, config: Any) -> tuple[Table, Table]:
    """Procedural images of the size that the model takes: to train on, and held out."""
    size = images.processor_size(processor) if processor is not None else None
    height, width = size or images.config_size(config) or (_SAMPLE_EDGE, _SAMPLE_EDGE)
    number = _SAMPLE_IMAGES + _SAMPLE_HELD_OUT
    leaves = DeadLeaves(number, height, width, images.num_channels(config))
    table = Table(
        "built-in procedural images",
        "images",
        {"image": leaves},
        lambda row: f"built-in image {row}",
        hashlib.sha256(f"dead leaves 1 {height} {width} {leaves.channels}".encode()).hexdigest(),
    )
    return table.take(range(_SAMPLE_IMAGES)), table.take(range(_SAMPLE_IMAGES, number))
