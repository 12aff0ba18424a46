"""Sources: what a word of the recipe stands for, and which split is held out."""

import socket
import time

import numpy as np
import pytest

from hamcli.data.datasets_hub import DatasetId, parse
from hamcli.data.sources import open_source, read_rows
from hamcli.errors import InputRefused
from tests.data.makers import write_image, write_jsonl


def rows_of(source, *, split="train", evaluation=None, evaluation_split=None):
    return read_rows(
        str(source), split=split, evaluation=evaluation, evaluation_split=evaluation_split
    )


def texts(table):
    return None if table is None else list(table.columns["text"])


def refusal(source, **words):
    with pytest.raises(InputRefused) as caught:
        rows_of(source, **words)
    return caught.value


def fill(folder, **files):
    for name, content in files.items():
        write_jsonl(folder / f"{name.replace('__', '/')}.jsonl", [{"text": content}])
    return folder


# ---- files and folders ----


def test_a_file_has_no_splits(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [{"text": "x"}])
    assert [texts(table) for table in rows_of(path)] == [["x"], None]
    assert refusal(path, split="validation").code == "E474"


def test_files_named_as_splits_are_splits(tmp_path):
    fill(tmp_path, train="a", test="b")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a"], ["b"]]
    assert [texts(table) for table in rows_of(tmp_path, split="test")] == [["b"], None]


def test_a_validation_split_is_held_out_before_a_test_split(tmp_path):
    fill(tmp_path, train="a", test="b", validation="c")
    assert texts(rows_of(tmp_path)[1]) == ["c"]
    assert texts(rows_of(tmp_path, evaluation_split="test")[1]) == ["b"]


def test_files_of_other_names_are_trained_on(tmp_path):
    fill(tmp_path, part_0="a", part_1="b")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a", "b"], None]
    fill(tmp_path, test="c")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a", "b"], ["c"]]


def test_shards_of_a_split_belong_together(tmp_path):
    fill(tmp_path, **{"train-00000": "a", "train-00001": "b", "test-00000": "c"})
    assert [texts(table) for table in rows_of(tmp_path)] == [["a", "b"], ["c"]]


def test_folders_named_as_splits_are_splits(tmp_path):
    fill(tmp_path, train__one="a", train__two="b", val__one="c")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a", "b"], ["c"]]


def test_a_folder_with_nothing_but_a_test_file_is_read(tmp_path):
    fill(tmp_path, test="a")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a"], None]


def test_a_readme_is_no_data(tmp_path):
    fill(tmp_path, train="a")
    (tmp_path / "LICENSE.txt").write_text("words")
    (tmp_path / "README.md").write_text("words")
    assert [texts(table) for table in rows_of(tmp_path)] == [["a"], None]


def test_another_source_is_held_out_where_one_is_named(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "a"}])
    fill(tmp_path / "other", train="b", test="c")
    train, held = rows_of(one, evaluation=str(tmp_path / "other"))
    assert (texts(train), texts(held)) == (["a"], ["c"])
    _, held = rows_of(one, evaluation=str(tmp_path / "other"), evaluation_split="train")
    assert texts(held) == ["b"]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/where", "/no/where", "no where", "a\0b", ""])
def test_what_is_not_there_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    error = refusal(name)
    assert error.code in ("E450", "E451", "E470")
    assert error.exit_code == 4


def test_an_unknown_split_lists_those_there_are(tmp_path):
    fill(tmp_path, train="a", test="b")
    error = refusal(tmp_path, split="dev")
    assert error.code == "E474"
    assert "one of test, train" in error.line()


def test_two_kinds_in_one_folder_are_refused(tmp_path):
    fill(tmp_path, train="a")
    (tmp_path / "train.csv").write_text("text\nx\n")
    assert "several kinds" in refusal(tmp_path).line()


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    assert refusal(tmp_path).code == "E451"


# ---- images ----


def images_in(folder, *names):
    for name in names:
        write_image(folder / name, np.zeros((2, 2)))
    return folder


def test_folders_of_images_are_classes(tmp_path):
    images_in(tmp_path, "dog/2.png", "cat/1.png", "cat/deep/3.jpg")
    train, held = rows_of(tmp_path)
    assert held is None
    assert list(train.columns["image"]) == ["cat/1.png", "cat/deep/3.jpg", "dog/2.png"]
    assert list(train.columns["label"]) == ["cat", "cat", "dog"]
    assert train.place(2).endswith("/dog/2.png")


def test_splits_may_stand_above_the_classes(tmp_path):
    images_in(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png")
    train, held = rows_of(tmp_path)
    assert list(train.columns["label"]) == ["cat", "dog"]
    assert list(held.columns["image"]) == ["cat/2.png"]


def test_images_in_no_folder_have_no_labels(tmp_path):
    images_in(tmp_path, "1.png", "2.png", ".hidden.png")
    train, _ = rows_of(tmp_path)
    assert list(train.columns) == ["image"]
    assert len(train) == 2


def test_images_beside_classes_are_refused(tmp_path):
    images_in(tmp_path, "1.png", "cat/2.png")
    assert "1.png" in refusal(tmp_path).line()


def test_a_loop_of_links_ends(tmp_path):
    images_in(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    assert len(rows_of(tmp_path)[0]) == 2


# ---- dataset ids ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("name", ("name", None, None)),
        ("org/name:en", ("org/name", "en", None)),
        ("org/name:en:test", ("org/name", "en", "test")),
        ("org/name::test[:10%]", ("org/name", None, "test[:10%]")),
        ("org/na..me", None),
        ("../name", None),
        ("a/b/c", None),
        ("hf://datasets/x", None),
        ("buckets/x", None),
        ("org/name:a:b:c", None),
        ("org/name;ls", None),
    ],
)
def test_dataset_ids_are_taken_apart(text, parts):
    assert parse(text) == (DatasetId(*parts) if parts is not None else None)


def test_a_dataset_that_is_not_cached_is_refused_in_seconds_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    open_source_once()  # the first call imports the library
    begun = time.monotonic()
    error = refusal("org/name")
    assert time.monotonic() - begun < 5
    assert (error.code, error.exit_code) == ("E470", 4)
    assert "offline" in error.line()
    assert error.hints


def open_source_once():
    with pytest.raises(InputRefused):
        open_source("org/never")


def test_a_server_that_does_not_answer_is_given_up_in_seconds(tmp_path, monkeypatch):
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hamcli.data.datasets_hub._ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        begun = time.monotonic()
        error = refusal("org/name")
    assert time.monotonic() - begun < 10
    assert error.code == "E470"
    assert "no answer" in error.line() or "cannot be reached" in error.line()


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """`org/tiny`, configs `en` and `de`, in the library's cache as a download leaves it."""
    from datasets import ClassLabel, Dataset, Features, Value, config
    from datasets.info import DatasetInfo
    from datasets.splits import SplitDict, SplitInfo

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    for language in ("en", "de"):
        folder = tmp_path / "org___tiny" / language / "0.0.0" / "0123456789abcdef"
        folder.mkdir(parents=True)
        splits = SplitDict()
        for split, number in (("train", 3), ("test", 2)):
            rows = {
                "text": [f"{language} {split} {row}" for row in range(number)],
                "label": [row % 2 for row in range(number)],
            }
            arrow_file(Dataset.from_dict(rows, features=features), folder / f"tiny-{split}.arrow")
            splits.add(SplitInfo(split, num_examples=number, dataset_name="tiny"))
        info = DatasetInfo(features=features, splits=splits, config_name=language)
        info.dataset_name, info.version = "tiny", "0.0.0"
        info.write_to_directory(str(folder))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def arrow_file(dataset, path):
    import pyarrow as pa

    table = dataset.data.table
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.usefixtures("cached_dataset")
def test_a_cached_dataset_is_read_offline():
    train, held = rows_of("org/tiny:en")
    assert texts(train) == ["en train 0", "en train 1", "en train 2"]
    assert texts(held) == ["en test 0", "en test 1"]
    assert train.class_names == {"label": ("ham", "spam")}
    assert train.place(1) == "org/tiny:en:train: row 1"


@pytest.mark.usefixtures("cached_dataset")
def test_the_id_may_name_a_split():
    train, held = rows_of("org/tiny:de:test")
    assert texts(train) == ["de test 0", "de test 1"]
    assert held is None


@pytest.mark.usefixtures("cached_dataset")
def test_a_split_that_the_dataset_lacks_lists_those_it_has():
    error = refusal("org/tiny:en", split="dev")
    assert error.code == "E474"
    assert "train" in error.line()
