import dataclasses

import pytest
import yaml
from markdown_it import MarkdownIt
from report_samples import SAMPLES, bare, decoder, gate_failed, hostile, minilm, pruned, report

from hamcli.report import card
from hamcli.report.records import ModelRecord, SpeedRecord


def parts(text):
    """The metadata and the Markdown of a card."""
    before, metadata, body = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(metadata), body


def tokens(body):
    """Every token of the Markdown, those inside paragraphs too."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        found += [token, *(token.children or [])]
    return found


def tables(body):
    """Rows of cells, as a reader sees them."""
    rows, row = [], []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        if token.type == "tr_open":
            row = []
        elif token.type == "inline" and token.level >= 3:
            row.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows.append(row)
            row = []
    return rows


def test_the_hub_reads_library_base_model_task_and_tags():
    metadata, _ = parts(card.render(report()))
    assert metadata == {
        "library_name": "transformers",
        "base_model": "google-bert/bert-base-uncased",
        "pipeline_tag": "fill-mask",
        "license": "apache-2.0",
        "tags": ["sparsity", "ham", "pruning"],
    }


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("causal-lm", "text-generation"),
        ("masked-lm", "fill-mask"),
        ("text-classification", "text-classification"),
        ("token-classification", "token-classification"),
        ("image-classification", "image-classification"),
        ("feature-extraction", "feature-extraction"),
    ],
)
def test_each_task_has_its_tag_and_its_class(task, tag):
    made = dataclasses.replace(report(), model=ModelRecord("m", task=task))
    metadata, body = parts(card.render(made))
    assert metadata["pipeline_tag"] == tag
    assert f"model = {card.AUTO_CLASSES[task]}.from_pretrained(folder)" in body


def test_a_local_model_is_no_base_model_and_an_unknown_license_is_left_out():
    metadata, _ = parts(card.render(bare()))
    assert metadata == {"library_name": "transformers", "tags": ["sparsity", "ham", "pruning"]}


def test_a_pinned_hub_id_links_the_model_not_the_commit():
    model = ModelRecord("org/name@abc123", is_hub=True)
    metadata, _ = parts(card.render(dataclasses.replace(bare(), model=model)))
    assert metadata["base_model"] == "org/name"


def test_metadata_takes_no_hostile_text():
    metadata, _ = parts(card.render(hostile()))
    assert metadata.keys() == {"library_name", "tags"}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_card_holds_no_markup_of_others(sample):
    _, body = parts(card.render(SAMPLES[sample]()))
    found = tokens(body)
    assert not [token for token in found if token.type in ("link_open", "image", "html_inline")]
    ours = "<details>\n<summary>Zeros of"
    blocks = [token.content for token in found if token.type == "html_block"]
    assert all(block.startswith((ours, "</details>")) for block in blocks)
    assert len(blocks) == 2
    assert [token.type for token in found].count("heading_open") == 6
    assert all(char == "\n" or char.isprintable() for char in body)


def test_hostile_names_stay_in_their_cells():
    rows = tables(parts(card.render(hostile()))[1])
    names = [row for row in rows if len(row) == 5][1:]
    assert len(names) == len(hostile().tensors)
    assert all(row[1] == "2 \N{MULTIPLICATION SIGN} 3" for row in names)
    assert "a|b||c\\|d" in [row[0] for row in names]
    assert "<script>alert(1)</script>" in [row[0] for row in names]
    assert {len(row) for row in rows} == {2, 5}


@pytest.mark.parametrize(
    "text",
    [
        "1. one",
        "12) x",
        "- x",
        "+ x",
        "---",
        "===",
        "# x",
        "> x",
        "    code",
        "```",
        "~~~",
        "***",
        "| a |",
        "<b>",
        "&amp;",
        "[a]: http://x",
        "www.x.y a@b.c",
        "a\\",
        "``x``",
        "90.00%",
        "1.5 x",
    ],
)
def test_text_shows_as_itself_wherever_a_paragraph_begins(text):
    (opening, inline, closing) = MarkdownIt("commonmark").enable("table").parse(card._text(text))
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    assert "".join(child.content for child in inline.children) == text.strip()
    assert all(child.type in ("text", "text_special") for child in inline.children)


def test_addresses_are_not_turned_into_links():
    shown = card._text("http://evil.example www.evil.example me@evil.example")
    assert shown == "http\\://evil.example www\\.evil.example me\\@evil.example"


@pytest.mark.parametrize("text", ["`", "``x", "a`b", "x`", "|", "<b>", "\\"])
def test_code_shows_as_itself(text):
    (_, inline, _) = MarkdownIt("commonmark").parse(card._code(text))
    assert [child.content for child in inline.children] == [text]
    assert inline.children[0].type == "code_inline"


def test_the_overall_sparsity_stands_beside_the_targets():
    body = parts(card.render(minilm()))[1]
    assert "**90.00%** of the weights of 38 target tensors" in body
    assert "**70.87%** of all 13.9 M parameters" in body
    rows = dict(row for row in tables(body) if len(row) == 2)
    assert rows["sparsity of the target weights"] == "90.00% (9,820,570 of 10,911,744)"
    assert rows["sparsity over all parameters"] == "70.87% (9,820,570 of 13,857,915)"
    assert rows["cosine to dense, sparse"] == "0.9412"
    assert rows["cosine to dense, pruned in one shot, for comparison"] == "0.3121"
    assert rows["weight files"] == "55.4 MB (55,431,660 bytes)"


def test_a_gate_not_met_is_the_first_warning():
    body = parts(card.render(gate_failed()))[1]
    first, second = body.index("Gate not met: drop 0.0287"), body.index("14% of the tokens")
    assert first < second < body.index("## Numbers")


def test_pruning_without_training_is_told_as_that():
    body = parts(card.render(pruned()))[1]
    assert "pruned by magnitude, without training" in body
    assert "Quality was not measured" in body
    assert "Training:" not in body


def test_many_tensors_are_cut_with_a_pointer_to_the_rest():
    body = parts(card.render(decoder()))[1]
    assert "600 more are in `report.json`." in body


def test_a_measured_speed_replaces_the_reason():
    made = dataclasses.replace(report(), speed=SpeedRecord("csr", 10.0, 18.0, 1.8))
    body = parts(card.render(made))[1]
    assert "Speed in `csr`: 1.8 times the dense model's" in body
    assert "No speed-up" not in body


def test_equal_runs_give_equal_cards_whatever_their_time():
    made = report()
    slower = dataclasses.replace(made, training=dataclasses.replace(made.training, seconds=1.0))
    assert card.render(slower) == card.render(made)


def test_the_loading_code_is_python():
    body = parts(card.render(report()))[1]
    fences = [token for token in tokens(body) if token.type == "fence" and token.info == "python"]
    compile(fences[0].content, "card", "exec")
