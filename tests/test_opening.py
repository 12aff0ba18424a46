"""What a run stands on."""

from hamcli.opening import data_digests
from hamcli.recipe import read_recipe, values_layer


def digests(source, evaluation):
    words = {"data.source": str(source), "data.evaluation": str(evaluation)}
    return data_digests(read_recipe([values_layer(words, "test")]).recipe)


def test_two_files_of_one_name_have_a_digest_each(tmp_path):
    paths = [tmp_path / folder / "rows.jsonl" for folder in ("train", "test")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    before = digests(*paths)
    assert len(set(before.values())) == 2
    for path in paths:
        path.write_text("changed")
        assert digests(*paths) != before
        path.write_text(path.parent.name)


def test_a_file_that_is_held_out_too_has_one_digest(tmp_path):
    (tmp_path / "rows.jsonl").write_text("rows")
    assert list(digests(*[tmp_path / "rows.jsonl"] * 2)) == ["rows.jsonl"]
