"""The recipe's words to data, for each task."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from hamcli.data import batch, evaluation_batches, label_names, open_data
from hamcli.data.labels import IGNORED
from hamcli.errors import InputRefused
from hamcli.recipe.schema import DataSection
from tests.data.makers import (
    bert_tokenizer,
    byte_tokenizer,
    config,
    image_config,
    random_pixels,
    write_image,
    write_jsonl,
)

ASSETS = Path(__file__).parents[1] / "assets"
CLS, SEP, MASK, A, B, C = 2, 3, 4, 5, 6, 7
LETTERS = "abcdefghij"
WORDS = [" ".join(words) for words in itertools.product(LETTERS, repeat=3)][:60]


def opened(task, *, tokenizer=None, model=None, most=None, **section):
    return open_data(
        DataSection(**section),
        task=task,
        tokenizer=tokenizer or bert_tokenizer(),
        image_processor=None,
        config=model or config(),
        most=most,
    )


def refusal(task, **words):
    with pytest.raises(InputRefused) as caught:
        opened(task, **words)
    assert caught.value.exit_code == 4
    return caught.value


def labelled(path, **more):
    rows = [{"text": text, "label": ("ham", "spam")[text < "a d"], **more} for text in WORDS]
    return write_jsonl(path, rows)


# ---- classes of texts ----


def test_texts_come_with_their_labels(tmp_path):
    data = opened("text-classification", source=labelled(tmp_path / "a.jsonl"))
    assert (len(data.train), len(data.evaluation), data.has_labels) == (54, 6, True)
    assert data.description == "a.jsonl: 54 texts, with labels"
    assert data.evaluation_description == "a.jsonl: 6 texts held out"
    tokenizer = bert_tokenizer()
    for one in (batch(data, 0, batch_size=54, seed=0), next(held(data))):
        for ids, label in zip(one["input_ids"], one["labels"], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert int(label) == int(text < "a d")
    assert set(one) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def held(data):
    return evaluation_batches(data, batch_size=1000, examples=1000)


def rows_of(data):
    train = batch(data, 0, batch_size=len(data.train), seed=0)["input_ids"]
    measured = next(held(data))["input_ids"]
    return [{tuple(row) for row in rows.tolist()} for rows in (train, measured)]


def test_no_text_is_both_trained_on_and_held_out(tmp_path):
    train, measured = rows_of(opened("text-classification", source=labelled(tmp_path / "a.jsonl")))
    assert (len(train), len(measured)) == (54, 6)
    assert not train & measured


def test_texts_without_labels_teach_by_the_teacher_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in WORDS])
    data = opened("text-classification", source=path)
    assert not data.has_labels
    assert "labels" not in batch(data, 0, batch_size=4, seed=0)
    assert data.description.endswith("without labels")


def test_the_builtin_sample_has_no_labels_and_says_when_it_does_not_suit():
    data = opened("text-classification")
    assert not data.has_labels
    assert data.description.startswith("built-in English sample")
    assert any("pass --data" in note for note in data.notes)


def test_pairs_are_read_as_two_segments(tmp_path):
    rows = [{"premise": "a b", "hypothesis": one, "label": 0} for one in LETTERS]
    data = opened("text-classification", source=write_jsonl(tmp_path / "a.jsonl", rows))
    one = batch(data, 0, batch_size=1, seed=0)
    assert one["input_ids"][0, :4].tolist() == [CLS, A, B, SEP]
    assert one["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_labels_in_one_part_alone_are_refused(tmp_path):
    labelled(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a"}])
    error = refusal("text-classification", source=str(tmp_path))
    assert error.code == "E456"
    assert "test.jsonl: label" in error.line()


def test_a_label_that_the_model_lacks_names_its_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b", "label": "eggs"}, *rows(30)])
    line = refusal("text-classification", source=path).line()
    assert "a.jsonl:1: label: 'eggs' is no class of the model" in line


def rows(number):
    return [{"text": text, "label": "ham"} for text in WORDS[:number]]


def test_rows_without_a_text_are_left_out_and_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(30), {"text": None, "label": "ham"}])
    data = opened("text-classification", source=path)
    assert len(data.train) + len(data.evaluation) == 30
    assert any("1 rows without a text" in note for note in data.notes)


def test_most_examples_are_a_cap(tmp_path):
    data = opened("text-classification", source=labelled(tmp_path / "a.jsonl"), max_examples=10)
    assert (len(data.train), len(data.evaluation)) == (10, 6)


def test_long_texts_are_cut_and_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text} " * 9} for text in WORDS])
    data = opened("text-classification", source=path, max_length=16)
    assert batch(data, 0, batch_size=4, seed=0)["input_ids"].shape == (4, 16)
    assert any("100% of the texts are longer than 16 tokens" in note for note in data.notes)


def test_a_models_own_length_is_the_limit(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text} " * 9} for text in WORDS])
    model = config(max_position_embeddings=16)
    data = opened("text-classification", source=path, model=model, max_length=64)
    assert batch(data, 0, batch_size=4, seed=0)["input_ids"].shape == (4, 16)
    assert data.notes[0] == "data.max_length 64 is over the model's 16: 16 is used"
    model = config(max_position_embeddings=18, model_type="roberta", pad_token_id=1)
    data = opened("text-classification", source=path, model=model, max_length=64)
    assert batch(data, 0, batch_size=4, seed=0)["input_ids"].shape == (4, 16)


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (config(num_labels=1), "E465"),
        (config(problem_type="multi_label_classification"), "E465"),
        (config(pad_token_id=None), "E464"),
    ],
)
def test_heads_that_give_no_classes_are_refused(tmp_path, model, code):
    assert refusal("text-classification", model=model).code == code


def test_a_model_without_a_tokenizer_takes_no_texts():
    with pytest.raises(InputRefused, match="no tokenizer"):
        open_data(
            DataSection(),
            task="causal-lm",
            tokenizer=None,
            image_processor=None,
            config=config(),
        )


# ---- language models ----


def test_short_lines_are_examples_of_their_own(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS))
    data = opened("masked-lm", source=str(path))
    assert data.description == "a.txt: 54 lines"
    one = next(held(data))
    assert one["input_ids"].shape == (6, 8)
    assert (one["input_ids"][one["labels"] != IGNORED] == MASK).all()


def test_prose_is_packed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{one} " * 10 for one in WORDS))
    data = opened("masked-lm", source=str(path), max_length=32)
    assert "blocks of 32 tokens" in data.description
    assert batch(data, 0, batch_size=4, seed=0)["input_ids"].shape == (4, 32)
    data = opened("masked-lm", source=str(path), max_length=32, pack=False)
    assert len(data.train) == 54


def test_causal_text_is_packed_and_predicts_itself(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS))
    data = opened("causal-lm", source=str(path), max_length=16, tokenizer=byte_tokenizer())
    # 54 lines of 5 bytes and an end each
    assert len(data.train) == 54 * 6 // 16
    one = batch(data, 0, batch_size=4, seed=0)
    assert torch.equal(one["labels"], one["input_ids"])
    assert one["attention_mask"].all()


def test_no_more_blocks_are_made_than_the_run_draws(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS))
    words = {"source": str(path), "max_length": 16, "tokenizer": byte_tokenizer()}
    assert len(opened("causal-lm", most=3, **words).train) == 3
    assert len(opened("causal-lm", max_examples=2, most=3, **words).train) == 2


def test_a_tokenizer_without_a_mask_cannot_be_asked_to_fill_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS))
    error = refusal("masked-lm", source=str(path), tokenizer=byte_tokenizer())
    assert error.code == "E464"


# ---- tags ----


def tagged(path, number=30, **more):
    made = [
        {"tokens": [*text.split(), "playing"], "ner_tags": ["ham", "spam", "ham", "spam"], **more}
        for text in WORDS[:number]
    ]
    return write_jsonl(path, made)


def test_tags_stand_on_the_first_token_of_their_word(tmp_path):
    data = opened("token-classification", source=tagged(tmp_path / "a.jsonl"))
    assert data.description == "a.jsonl: 27 sentences, with labels"
    one = batch(data, 0, batch_size=2, seed=0)
    expected = [IGNORED, 0, 1, 0, 1, IGNORED, IGNORED, IGNORED]
    assert one["labels"].tolist() == [expected, expected]


def test_words_without_tags_teach_by_the_teacher_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": text.split()} for text in WORDS])
    data = opened("token-classification", source=path)
    assert not data.has_labels
    assert "labels" not in batch(data, 0, batch_size=2, seed=0)


def test_plain_texts_serve_a_tagger_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in WORDS])
    assert not opened("token-classification", source=path).has_labels
    assert not opened("token-classification").has_labels


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"tokens": ["a"], "ner_tags": ["ham", "ham"]}, "E467", "2 tags, 1 words"),
        ({"tokens": "a b", "ner_tags": ["ham"]}, "E454", "a str"),
        ({"tokens": ["a"], "ner_tags": ["eggs"]}, "E460", "'eggs'"),
    ],
)
def test_rows_of_tags_that_do_not_fit_are_refused(tmp_path, row, code, words):
    first = tagged(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", [row])
    error = refusal("token-classification", source=str(tmp_path))
    assert Path(first).exists()
    assert error.code == code
    assert "test.jsonl:1" in error.line()
    assert words in error.line()


# ---- encoders ----


def test_encoders_need_no_labels(tmp_path):
    data = opened("feature-extraction", source=labelled(tmp_path / "a.jsonl"))
    assert not data.has_labels
    assert set(batch(data, 0, batch_size=2, seed=0)) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }


# ---- classes of data ----


def test_classes_are_found_before_there_is_a_model(tmp_path):
    source = labelled(tmp_path / "a.jsonl")
    assert label_names(DataSection(source=source), "text-classification") == ["ham", "spam"]
    assert label_names(DataSection(source=source), "causal-lm") is None
    assert label_names(DataSection(), "text-classification") is None
    source = tagged(tmp_path / "b.jsonl")
    assert label_names(DataSection(source=source), "token-classification") == ["ham", "spam"]
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    assert label_names(DataSection(source=source), "text-classification") is None


# ---- images ----


def pictures(folder, number=10):
    for name in ("cat", "dog"):
        for index in range(number):
            write_image(folder / name / f"{index}.png", random_pixels(index, 6, 6))
    return str(folder)


def open_pictures(task="image-classification", model=None, **section):
    return open_data(
        DataSection(**section),
        task=task,
        tokenizer=None,
        image_processor=None,
        config=model or image_config(),
    )


def test_folders_of_images_are_data(tmp_path):
    data = open_pictures(source=pictures(tmp_path / "pets"))
    assert data.description == "pets: 18 images, with labels"
    one = batch(data, 0, batch_size=18, seed=0)
    assert one["pixel_values"].shape == (18, 1, 6, 6)
    assert float(one["pixel_values"].mean()) == pytest.approx(0, abs=1e-5)
    assert set(one["labels"].tolist()) == {0, 1}


def test_held_out_images_are_normalised_as_the_others(tmp_path):
    for split, value in (("train", 100), ("test", 200)):
        for index in range(3):
            pixels = np.full((4, 4), value)
            pixels[0] = 20 * index
            write_image(tmp_path / split / f"{index}.png", pixels)
    data = open_pictures(source=str(tmp_path))
    mean, std = data.train.form.mean[0], data.train.form.std[0]
    shown = next(held(data))["pixel_values"]
    assert float(shown.max()) == pytest.approx((200 / 255 - mean) / std, rel=1e-5)


def test_the_recipes_numbers_normalise(tmp_path):
    source = pictures(tmp_path)
    data = open_pictures(source=source, mean=(0.25,), std=(0.5,))
    assert (data.train.form.mean, data.train.form.std) == ((0.25,), (0.5,))
    assert data.notes == ()


def test_images_in_parquet_are_data(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [
        write_image(tmp_path / "x.png", random_pixels(seed, 6, 6)).read_bytes()
        for seed in range(20)
    ]
    structs = [{"bytes": one, "path": None} for one in content]
    table = pa.table({"image": structs, "label": [seed % 2 for seed in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.set_column(0, "image", [content]), tmp_path / "b.parquet")
    first, second = (
        batch(open_pictures(source=str(tmp_path / name)), 0, batch_size=18, seed=0)
        for name in ("a.parquet", "b.parquet")
    )
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["labels"], second["labels"])


def test_procedural_images_fit_the_model():
    data = open_pictures(model=image_config(image_size=20, num_channels=3))
    assert (len(data.train), len(data.evaluation)) == (1024, 256)
    assert batch(data, 0, batch_size=2, seed=0)["pixel_values"].shape == (2, 3, 20, 20)
    assert not data.has_labels
    assert "procedural" in data.notes[0]


def test_an_encoder_of_images_takes_images(tmp_path):
    data = open_pictures("feature-extraction", source=pictures(tmp_path))
    assert not data.has_labels
    assert "pixel_values" in batch(data, 0, batch_size=2, seed=0)


# ---- all ----


def test_the_digest_tells_data_apart(tmp_path):
    one = opened("text-classification", source=labelled(tmp_path / "a.jsonl"))
    same = opened("text-classification", source=labelled(tmp_path / "b.jsonl"))
    other = opened("text-classification", source=labelled(tmp_path / "c.jsonl", extra=1))
    assert one.digest == same.digest
    assert one.digest != other.digest


def test_a_real_tokenizer_reads_molecules(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    folder = ASSETS / "rxnmapper-albert-mlm"
    path = tmp_path / "a.txt"
    molecules = ["CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"]
    path.write_text("\n".join(f"{one}{'C' * index}" for one in molecules for index in range(5)))
    data = opened(
        "masked-lm",
        source=str(path),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        model=AutoConfig.from_pretrained(folder),
    )
    assert data.notes == ()
    one = batch(data, 0, batch_size=18, seed=0)
    assert one["input_ids"].shape[1] % 8 == 0
    assert (one["labels"] != IGNORED).any(1).all()
