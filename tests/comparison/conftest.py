"""A tiny comparison: labelled images on disk, a pico ResNet, four steps a run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hamcli.opening import complete
from hamcli.recipe import values_layer

RESNET = str(Path(__file__).parents[1] / "assets" / "fashion-mnist-resnet-tiny")
SETTINGS = {
    "model.id": RESNET,
    "training.steps": 4,
    "training.batch_size": 4,
    "training.checkpoint_every": 100,
    "evaluation.examples": 16,
    "sparsity.update_every": 0.3,
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of noise: 40 images to train on and 16 held out, ten classes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{index}.png")
    return folder


@pytest.fixture
def base(pictures):
    def made(**more):
        words = {**SETTINGS, "data.source": str(pictures), **more}
        return complete([values_layer(words, "test")], has_recipe=False)

    return made
