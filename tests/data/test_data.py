"""Data: sources, splits, labels, packing, masking; every batch a function of its number."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hamcli.data import batch, evaluation_batches, label_names, open_data
from hamcli.data.rows import read_table
from hamcli.data.texts import IGNORED, MaskRule, align_tags
from hamcli.errors import InputRefused, RecipeError
from hamcli.recipe.schema import DataSection

CONFIG = SimpleNamespace(
    id2label={0: "ham", 1: "spam"}, num_channels=1, image_size=None, vocab_size=300
)


class Letters:
    """A tokenizer of characters with the face that the data room needs."""

    pad_token_id, eos_token_id, mask_token_id, unk_token_id = 0, 1, 2, None
    all_special_ids = (0, 1, 2)

    def __call__(self, texts, pairs=None, *, truncation=False, max_length=None,
                 add_special_tokens=True, verbose=True):  # fmt: skip
        if isinstance(texts, str):
            return {"input_ids": self._one(texts, add_special_tokens, max_length)}
        return {"input_ids": [self._one(text, add_special_tokens, max_length) for text in texts]}

    def _one(self, text, special, limit):
        ids = [ord(char) for char in text]
        return [*ids[: limit - 1 if limit else None], 1] if special else ids


def opened(task="text-classification", positions=None, **section):
    return open_data(
        DataSection(**section),
        task=task,
        tokenizer=Letters(),
        image_processor=None,
        config=CONFIG,
        positions=positions,
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mails(tmp_path):
    rows = [{"text": f"mail {i}", "label": "spam" if i % 3 else "ham"} for i in range(40)]
    return write(tmp_path / "mails.jsonl", rows)


def test_labels_are_mapped_by_name_and_the_split_is_disjoint(mails):
    data = opened(source=mails)
    assert (len(data.train), len(data.evaluation)) == (36, 4)
    texts = {tuple(row) for row in data.train.ids} & {tuple(row) for row in data.evaluation.ids}
    assert texts == set()
    first = next(evaluation_batches(data, batch_size=4, examples=4))
    words = ["".join(chr(i) for i in row if i > 2) for row in first["input_ids"].tolist()]
    expected = [1 if int(word.split()[1]) % 3 else 0 for word in words]
    assert first["labels"].tolist() == expected


def test_a_batch_is_a_function_of_its_number(mails):
    data = opened(source=mails)
    one = batch(data, 7, batch_size=8, seed=3)
    batch(data, 2, batch_size=8, seed=3)
    again = batch(data, 7, batch_size=8, seed=3)
    assert all(torch.equal(one[key], again[key]) for key in one)
    other = batch(data, 7, batch_size=8, seed=4)
    assert one["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        one["input_ids"], other["input_ids"]
    )


def test_an_epoch_sees_every_example_once(mails):
    data = opened(source=mails)
    seen = [tuple(i for i in row if i)
            for step in range(9)
            for row in batch(data, step, batch_size=4, seed=0)["input_ids"].tolist()]  # fmt: skip
    assert sorted(seen) == sorted(tuple(row) for row in data.train.ids)


def test_causal_text_is_packed_into_full_blocks(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join("abcdefghij" * 5 for _ in range(20)))
    data = opened("causal-lm", source=str(path), max_length=16)
    assert {len(row) for row in data.train.ids} == {16}
    one = batch(data, 0, batch_size=2, seed=0)
    assert torch.equal(one["labels"], one["input_ids"])


def test_masking_asks_for_the_share_it_says_and_hides_what_it_asks():
    rule = MaskRule(0.15, mask_id=2, vocab_size=300, special_ids=(0, 1, 2))
    ids = torch.randint(3, 300, (200, 64), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids)
    valid[:, 60:] = 0
    hidden, labels = rule.corrupt(ids, valid, 5, True)
    asked = labels != IGNORED
    assert asked[:, 60:].sum() == 0
    assert asked.sum() / (200 * 60) == pytest.approx(0.15, abs=0.01)
    assert (hidden[asked] == 2).all()
    assert torch.equal(hidden[~asked], ids[~asked])
    trained, labels = rule.corrupt(ids, valid, 5, False)
    asked = labels != IGNORED
    assert (trained[asked] == 2).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (trained[asked] == ids[asked]).float().mean() == pytest.approx(0.1, abs=0.03)


def test_an_image_folder_is_read_with_its_labels_and_own_statistics(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ham", "spam"):
        (tmp_path / name).mkdir()
        for index in range(10):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    data = opened("image-classification", source=str(tmp_path))
    one = batch(data, 0, batch_size=18, seed=0)
    assert one["pixel_values"].shape == (18, 1, 8, 8)
    assert float(one["pixel_values"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(one["pixel_values"].std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert set(one["labels"].tolist()) == {0, 1}
    assert "own mean and std" in data.notes[0]


def test_the_built_in_sample_needs_no_network_and_is_english():
    data = opened("feature-extraction", max_length=32)
    assert len(data.train) > 500
    assert "built-in English sample" in data.description


def test_label_names_are_sorted_numbers_by_value(tmp_path):
    path = write(tmp_path / "n.jsonl", [{"text": "x", "label": i} for i in (10, 2, 1)])
    assert label_names(DataSection(source=path), "text-classification") == ["1", "2", "10"]


def refusal(tmp_path, name, raw, **section):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputRefused) as caught:
        opened(source=str(path), **section)
    return caught.value.line()


@pytest.mark.parametrize(
    ("name", "raw", "pattern"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "line 2"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"words": "x"}\n{"words": "y"}\n', "no column of text"),
        ("a.jsonl", b'{"text": "x", "label": 7}\n{"text": "y", "label": 0}\n', "label unknown"),
        ("a.jsonl", b'{"text": 3}\n{"text": 4}\n', "not text"),
        ("a.jsonl", b'{"text": "x"}\n', "too few rows"),
        ("a.txt", b"good\n\xff\xfe\n", "line 2"),
        ("a.txt", b"a\x00b\nc\n", "NUL"),
        ("a.csv", b"text,label\nx\n", "fields"),
        ("a.parquet", b"PAR1nonsense", "not parquet"),
        ("a.xyz", b"?", "unknown kind"),
    ],
)
def test_broken_data_is_refused_with_its_place(tmp_path, name, raw, pattern):
    assert pattern in refusal(tmp_path, name, raw)


@pytest.mark.parametrize("fault", [{"text": "x", "label": "eggs"}, {"text": 3, "label": "ham"}])
def test_a_faulty_row_is_named_by_its_line_whichever_side_of_the_split_it_is_on(tmp_path, fault):
    lines = [json.dumps({"text": "x", "label": "ham"})] * 40
    for place in (7, 30):
        given = [*lines[:3], "", *lines[3:place], json.dumps(fault), *lines[place:]]
        line = refusal(tmp_path, "a.jsonl", "\n".join(given).encode())
        assert f"line {place + 2}:" in line


def test_a_faulty_row_of_a_source_without_lines_is_named_by_its_number(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["x"] * 40, "label": ["ham"] * 30 + ["eggs"] + ["ham"] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    line = refusal(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert "row 31: 'eggs'" in line


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"tokens": ["a", "b"], "tags": ["ham", "eggs"]}, "label unknown"),
        ({"tokens": ["a", "b"], "tags": ["ham"]}, "differ in number"),
        ({"tokens": ["a", "b"]}, "not a list"),
        ({"tokens": "a b", "tags": "ham ham"}, "not a list"),
        ({"tokens": ["a", 3], "tags": ["ham", "ham"]}, "not text"),
    ],
)
def test_faulty_tags_are_refused_with_the_line_of_their_row(tmp_path, fault, why):
    rows = [{"tokens": ["a", "b"], "tags": ["ham", "spam"]} for _ in range(40)]
    path = write(tmp_path / "t.jsonl", [*rows[:30], fault, *rows[30:]])
    with pytest.raises(InputRefused, match=f"{why}.*line 31:"):
        opened("token-classification", source=path)


def test_tags_that_are_missing_are_refused_where_a_head_is_sized_by_them(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"tokens": ["a"], "tags": ["ham"]}, {"tokens": ["b"]}])
    with pytest.raises(InputRefused, match="line 2"):
        label_names(DataSection(source=path), "token-classification")


def test_labels_that_begin_after_the_first_row_are_not_passed_over(tmp_path):
    raw = b'{"text": "x"}\n' + b'{"text": "y", "label": "ham"}\n' * 39
    assert "line 1: None" in refusal(tmp_path, "a.jsonl", raw)


def test_an_image_that_is_none_is_named_by_its_path(tmp_path):
    for index in range(4):
        Image.new("L", (2, 2)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(InputRefused, match=r"not an image: .*/2\.png"):
        opened("image-classification", source=str(tmp_path))


def test_an_image_too_large_to_be_one_is_refused(tmp_path, monkeypatch):
    for index in range(4):
        Image.new("L", (20, 20)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputRefused, match="not an image"):
        opened("image-classification", source=str(tmp_path))


def test_a_model_of_oblong_images_has_a_built_in_sample():
    config = SimpleNamespace(id2label={0: "ham"}, num_channels=1, image_size=[4, 6])
    data = open_data(
        DataSection(),
        task="image-classification",
        tokenizer=None,
        image_processor=None,
        config=config,
    )
    values = batch(data, 0, batch_size=2, seed=0)["pixel_values"]
    assert values.shape == (2, 1, 4, 6)


def test_a_column_that_is_not_there_lists_those_that_are(tmp_path):
    line = refusal(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": "y"}\n', text="body")
    assert "body" in line
    assert "one of text" in line


def test_csv_and_parquet_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.csv").write_text('text,label\n"one, two",ham\nthree,spam\n')
    table = pyarrow.table({"text": ["one, two", "three"], "label": ["ham", "spam"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = (read_table(str(tmp_path / name)) for name in ("a.csv", "a.parquet"))
    assert first.columns == second.columns


class Halves:
    """Cuts each word in two tokens, between a first and a last one of its own."""

    def __call__(self, words, **_):
        self.words = [None, *(index for index in range(len(words)) for _ in "ab"), None]
        return self

    def __getitem__(self, _):
        return list(range(len(self.words)))

    def word_ids(self):
        return self.words


def test_only_the_first_token_of_a_word_has_its_tag():
    ids, labels = align_tags(Halves(), [["one", "two"]], [[3, 5]], 16)
    assert ids == [[0, 1, 2, 3, 4, 5]]
    assert labels == [[-100, 3, -100, 5, -100, -100]]


def test_who_gave_data_that_do_not_suit_the_model_is_not_told_to_give_data(tmp_path, monkeypatch):
    monkeypatch.setattr(Letters, "unk_token_id", ord("?"))
    path = write(tmp_path / "t.jsonl", [{"text": "?" * 9}] * 40)
    (note,) = opened("feature-extraction", source=path).notes
    assert "are unknown to the model" in note
    assert "--data" not in note


def test_texts_longer_than_the_models_positions_are_refused_before_the_run(tmp_path):
    rows = [{"text": "x" * 30, "label": "ham"} for _ in range(20)]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError) as refused:
        opened(source=source, positions=20, max_length=25)
    assert refused.value.why == "20 positions, a text of 25 tokens where max_length is 25"
    assert refused.value.right == "max_length at most 20"
    assert max(map(len, opened(source=source, positions=20, max_length=20).train.ids)) == 20


@pytest.mark.parametrize("positions", [20, 21, 24, 400, None])
def test_filling_up_passes_neither_positions_nor_a_multiple_of_eight(tmp_path, positions):
    source = write(tmp_path / "rows.jsonl", [{"text": "x" * 17, "label": "ham"} for _ in range(20)])
    data = opened(source=source, positions=positions, max_length=200)
    made = batch(data, 0, batch_size=4, seed=0)
    assert made["input_ids"].shape == (4, min(24, positions or 24))
    assert made["attention_mask"].sum().item() == 4 * 18
