"""Which images a model takes."""

from types import SimpleNamespace

import pytest

from hamcli.checkpoint.pixels import image_size, num_channels


def config(**known):
    return SimpleNamespace(**known)


@pytest.mark.parametrize(
    ("known", "processor", "size"),
    [
        ({"image_size": 7}, None, (7, 7)),
        ({"image_size": [3, 4]}, {"size": {"height": 9, "width": 9}}, (3, 4)),
        ({"vision_config": config(image_size=6)}, None, (6, 6)),
        ({"vision_config": config(image_size=6), "image_size": 5}, None, (5, 5)),
        ({"vision_config": config()}, {"size": {"height": 5, "width": 6}}, (5, 6)),
        ({}, {"size": {"height": 5, "width": 6}}, (5, 6)),
        ({}, {"size": {"shortest_edge": 8}, "crop_size": {"height": 5, "width": 6}}, (5, 6)),
        ({}, {"size": {"shortest_edge": 8, "longest_edge": 9}}, (8, 8)),
        ({}, {"size": {"longest_edge": 9}}, (9, 9)),
        ({}, {"size": {"height": 9}}, None),
        ({}, {"size": None}, None),
        ({}, None, None),
    ],
)
def test_the_size_of_images_is_the_configs_or_the_processors(known, processor, size):
    processor = processor and config(**processor)
    assert image_size(config(**known), processor) == size


def test_the_channels_are_the_configs_or_its_vision_towers():
    assert num_channels(config(num_channels=1)) == 1
    assert num_channels(config(vision_config=config(num_channels=4))) == 4
    assert num_channels(config(vision_config=config())) == num_channels(config()) == 3
