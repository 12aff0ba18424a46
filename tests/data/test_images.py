"""Images to pixels: what a processor asks for, or the data's own numbers."""

import io
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hamcli.data import images
from hamcli.data.dead_leaves import DeadLeaves
from hamcli.data.images import ImageExamples, decode, form_of_config, form_of_processor
from hamcli.data.table import Table
from hamcli.errors import InputRefused
from tests.data.makers import image_config, random_pixels


def table_of(values, folder=None):
    return Table("data", "images", {"image": values}, lambda row: f"data:{row}", "", folder=folder)


def png(pixels, kind="PNG"):
    sink = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(sink, kind)
    return sink.getvalue()


def examples(values, form, labels=None):
    return ImageExamples(values, labels, form, table_of(values))


# ---- processors ----


def processors():
    from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil
    from transformers.image_processing_backends import PilBackend

    class Shortest(PilBackend):
        default_to_square = False
        do_resize = do_center_crop = do_rescale = do_normalize = True
        resample = 3

    words = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    large = {**words, "do_resize": False, "crop_size": {"height": 95, "width": 64}}
    return {
        "exact": ViTImageProcessorPil(size={"height": 24, "width": 30}),
        "shortest and crop": Shortest(**words),
        "crop larger than the image": Shortest(**large),
        "no normalising": ViTImageProcessorPil(
            size={"height": 24, "width": 24}, do_normalize=False
        ),
        "unusual": ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    }


@pytest.mark.parametrize("name", list(processors()))
def test_pixels_are_those_of_the_image_processor(name):
    processor = processors()[name]
    form = form_of_processor(processor, 3)
    assert (form.processor is not None) == (name == "unusual")
    values = [png(random_pixels(seed, 50, 71, 3)) for seed in range(3)]
    found = examples(values, form).batch([0, 1, 2], None)["pixel_values"]
    decoded = [Image.open(io.BytesIO(value)) for value in values]
    expected = processor(images=decoded, return_tensors="pt")["pixel_values"]
    assert torch.allclose(found, expected.float(), atol=1e-5)


def test_a_grey_image_becomes_what_the_model_takes():
    form = form_of_processor(processors()["exact"], 3)
    found = examples([png(random_pixels(0, 20, 20))], form).batch([0], None)["pixel_values"]
    assert found.shape == (1, 3, 24, 30)
    assert torch.equal(found[0, 0], found[0, 1])


# ---- no processor ----


def opened(values, config=None, mean=None, std=None):
    form, notes = form_of_config(config or image_config(), 1, table_of(values), "image")
    made = examples(values, form)
    if mean is None:
        made.form, note = images.with_statistics(made)
        notes.append(note)
    return made, notes


def test_images_are_normalised_by_their_own_statistics():
    values = [png(random_pixels(seed, 6, 5)) for seed in range(20)]
    made, notes = opened(values)
    pixels = made.batch(range(20), None)["pixel_values"].double()
    raw = np.stack([random_pixels(seed, 6, 5) for seed in range(20)]) / 255
    assert made.form.mean == pytest.approx((raw.mean(),), rel=1e-9)
    assert made.form.std == pytest.approx((raw.std(),), rel=1e-9)
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert f"{raw.mean():.4f}" in notes[-1]


def test_images_of_one_size_keep_it():
    made, notes = opened([png(random_pixels(seed, 6, 5)) for seed in range(4)])
    assert made.batch([0], None)["pixel_values"].shape == (1, 1, 6, 5)
    assert len(notes) == 1


def test_images_of_other_sizes_take_that_of_most():
    values = [png(random_pixels(seed, 6, 5 if seed else 9)) for seed in range(4)]
    made, notes = opened(values)
    assert made.batch(range(4), None)["pixel_values"].shape == (4, 1, 6, 5)
    assert "resized to 5x6" in notes[0]


@pytest.mark.parametrize("size", [12, [12, 12], (12, 12)])
def test_the_configs_size_comes_first(size):
    made, _ = opened([png(random_pixels(0, 6, 5))], image_config(image_size=size))
    assert made.batch([0], None)["pixel_values"].shape == (1, 1, 12, 12)


def test_numbers_a_channel_are_checked():
    assert images.per_channel("mean", [0.5], 3) == (0.5, 0.5, 0.5)
    for key, values in (("mean", [0.1, 0.2]), ("std", [0.1, 0.0, 0.2])):
        with pytest.raises(InputRefused) as caught:
            images.per_channel(key, values, 3)
        assert caught.value.code == "E468"


def test_a_model_of_five_channels_is_refused():
    with pytest.raises(InputRefused, match="num_channels"):
        images.num_channels(SimpleNamespace(num_channels=5))


def test_kept_pixels_are_those_decoded_anew(monkeypatch):
    values = [png(random_pixels(seed, 6, 5)) for seed in range(9)]
    made, _ = opened(values)
    kept = made.batch([4, 4, 8], None)["pixel_values"]
    assert made.kept is not None
    monkeypatch.setattr(images, "KEPT_BYTES", 0)
    again, _ = opened(values)
    assert torch.equal(again.batch([4, 4, 8], None)["pixel_values"], kept)
    assert again.kept is None


def test_labels_follow_their_images():
    values = [png(random_pixels(seed, 6, 5)) for seed in range(3)]
    form, _ = form_of_config(image_config(), 1, table_of(values), "image")
    made = examples(values, form, labels=[2, 0, 1])
    assert made.batch([2, 0], None)["labels"].tolist() == [1, 2]


# ---- decoding ----


def pixels_of(value, channels=3, folder=None):
    return np.asarray(decode(value, channels, table_of([value], folder), 0))


def test_bytes_structs_and_paths_are_images(tmp_path):
    pixels = random_pixels(0, 4, 6, 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(pixels))
    for value in (
        png(pixels),
        {"bytes": png(pixels), "path": "elsewhere.png"},
        {"bytes": None, "path": "a/1.png"},
        "a/1.png",
        pixels,
    ):
        assert np.array_equal(pixels_of(value, folder=tmp_path), pixels)


def test_sixteen_bits_are_scaled_not_clipped():
    sink = io.BytesIO()
    Image.fromarray(np.array([[0, 256 * 200]], dtype=np.uint16)).save(sink, "PNG")
    assert pixels_of(sink.getvalue(), 1).tolist() == [[0, 200]]


def test_a_photo_is_turned_as_its_camera_says():
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(random_pixels(0, 4, 8, 3)).save(sink, "JPEG", exif=exif)
    assert pixels_of(sink.getvalue()).shape == (8, 4, 3)


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not an image",
        cut(png(random_pixels(0, 50, 50, 3))),
        cut(png(random_pixels(0, 50, 50, 3), "JPEG")),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        None,
        7,
        {"bytes": None, "path": None},
        "missing.png",
        "../outside.png",
        "/etc/passwd",
    ],
)
def test_what_is_no_image_is_refused_at_its_row(tmp_path, value):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    with pytest.raises(InputRefused) as caught:
        pixels_of(value, folder=tmp_path / "inner")
    assert caught.value.code == "E466"
    assert "data:0" in caught.value.line()


def test_a_bomb_is_refused_by_its_header():
    bomb = bytearray(png(np.zeros((1, 1))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(InputRefused, match=r"too large \(at most 100 million pixels\)"):
        pixels_of(bytes(bomb))


# ---- procedural images ----


def test_procedural_images_are_functions_of_their_number():
    leaves = DeadLeaves(5, 24, 32, 3)
    assert np.array_equal(leaves[3], DeadLeaves(9, 24, 32, 3)[3])
    assert not np.array_equal(leaves[3], leaves[2])
    assert (leaves[0].shape, leaves[0].dtype) == ((24, 32, 3), np.uint8)
    with pytest.raises(IndexError):
        leaves[5]


def test_procedural_images_are_neither_flat_nor_noise():
    for image in DeadLeaves(8, 48, 48, 1)[0:8]:
        values = image[..., 0].astype(float)
        assert values.std() > 10
        # neighbours are mostly on one leaf; in noise they would differ as much as any two pixels
        assert np.abs(np.diff(values, axis=1)).mean() < 0.35 * values.std()
