"""The recipe's words on data → `Data`; the classes of data before there is a model."""

from typing import Any

from hamcli.data.batches import Data
from hamcli.data.columns import check_lists, find_column
from hamcli.data.image_data import open_images
from hamcli.data.labels import IGNORED, names_of
from hamcli.data.sources import read_training_rows
from hamcli.data.text_data import open_texts
from hamcli.errors import InputRefused
from hamcli.recipe.schema import DataSection

LABELLED = ("text-classification", "token-classification", "image-classification")


def label_names(section: DataSection, task: str) -> list[str] | None:
    """The classes in the training data, to size a new head; None where there are no labels.

    Raises:
        InputRefused: The source cannot be read, or its labels are no classes.
    """
    if section.source is None or task not in LABELLED:
        return None
    table = read_training_rows(section.source, section.split)
    kind = "tags" if task == "token-classification" else "label"
    column = find_column(table, section.label, kind)
    if column is None:
        return None
    values = table.columns[column]
    if kind == "label":
        return names_of(table, column, values) or None
    check_lists(table, column)
    tags = (tag for row in values for tag in row or () if tag != IGNORED)
    return names_of(table, column, tags) or None


def open_data(
    section: DataSection,
    *,
    task: str,
    tokenizer: Any,
    image_processor: Any,
    config: Any,
    most: int | None = None,
) -> Data:
    """Read, split and prepare the data of a run.

    Args:
        section: The recipe's words on data.
        task: What the model does.
        tokenizer: Of the model; needed for texts.
        image_processor: Of the model, or None.
        config: Of the model: its labels, sizes and channels.
        most: Training examples that the run will draw at most, where that is known: blocks of
            tokens beyond them are not made.

    Raises:
        InputRefused: A source is missing, empty or broken, a column is missing, a label is none of
            the model's, or the model cannot take such data.
        ResourceError: A file may not be read.
    """
    if takes_images(task, tokenizer, image_processor, config):
        return open_images(section, task=task, processor=image_processor, config=config)
    if tokenizer is None:
        right = "the files of its tokenizer beside it"
        raise InputRefused("E464", "the model has no tokenizer", "data", "texts need one", right)
    return open_texts(section, task=task, tokenizer=tokenizer, config=config, most=most)


def takes_images(task: str, tokenizer: Any, image_processor: Any, config: Any) -> bool:
    """Whether the model takes images."""
    if task == "image-classification":
        return True
    if task != "feature-extraction" or tokenizer is not None:
        return False
    return image_processor is not None or getattr(config, "num_channels", None) is not None
