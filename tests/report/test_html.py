import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_samples import SAMPLES, bare, bert, gate_failed, hostile, pruned, report

from hamcli.report import html
from hamcli.report.records import Report, SpeedRecord

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """What a page holds, as a browser's tokenizer sees it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages():
    return {name: html.render(make()) for name, make in SAMPLES.items()}


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_element_is_closed(pages, sample):
    assert Page(pages[sample]).open == []


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_chart_is_well_formed(pages, sample):
    for drawing in re.findall(r"<svg.*?</svg>", pages[sample], re.DOTALL):
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_page_runs_nothing_and_asks_nothing_of_the_network(pages, sample):
    page = Page(pages[sample])
    assert not {"script", "link", "iframe", "img", "object", "base", "form", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in pages[sample].lower()
    assert "@import" not in pages[sample].lower()
    assert "default-src 'none'" in pages[sample]


def test_names_of_others_cannot_become_markup_or_deceive(pages):
    page = pages["hostile"]
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    # U+2026, the ellipsis, and the like are printable; control, format and bidi characters are not
    assert all(char == "\n" or char.isprintable() for char in page)
    assert "{{ 7 * 7 }}" in page
    page.encode("utf-8")


def test_a_name_of_ten_thousand_characters_is_cut(pages):
    assert "x" * 1000 not in pages["hostile"]


def test_the_headline_shows_both_sparsities_quality_bytes_and_speed(pages):
    text = Page(pages["minilm"]).text
    assert "90.00% of the target weights, exactly as asked" in text
    assert "70.87% of all 13.9 M parameters" in text
    assert "9,820,570 zeros of 10,911,744 in 38 tensors" in text
    assert "0.9412 0.0588 lower than dense" in text
    assert "one-shot 0.3121" in text
    assert "File size unchanged: a dense file stores its zeros; 21.1 MB if compressed" in text
    assert "No speed-up is claimed" in text


def test_every_tensor_and_file_is_listed(pages):
    page = pages["decoder"]
    made = SAMPLES["decoder"]()
    assert all(f">{tensor.name}</td>" in page for tensor in made.tensors)
    assert all(f">{file.path}</td>" in page for file in made.files)


def test_a_long_list_of_tensors_starts_closed(pages):
    assert '<details class="panel" open>' in pages["bert"]
    assert '<details class="panel" open>' not in pages["decoder"]


def test_the_gate_tells_its_verdict_and_each_condition():
    text = Page(html.render(gate_failed())).text
    assert "Gate not met" in text
    assert "✗ drop 0.0287, at most 0.01" in text
    assert "✓ sparsity 0.9, at least 0.9" in text
    assert "Gate passed" in Page(html.render(report())).text
    assert "Gate" not in Page(html.render(pruned())).text


def test_warnings_have_a_box_only_when_there_are_some():
    text = Page(html.render(gate_failed())).text
    assert "2 warnings 14% of the tokens are unknown" in text
    assert "warnings" not in Page(html.render(report())).text


def test_pruning_without_training_says_so_and_claims_no_quality():
    text = Page(html.render(pruned())).text
    assert "No training: the weights were pruned as they are" in text
    assert "Quality Not measured" in text


def test_a_run_with_curves_draws_loss_sparsity_rate_and_exponent(pages):
    for title in (
        "Loss",
        "Sparsity of the targets",
        "Learning rate",
        "Exponent of the mirror step",
    ):
        assert f"<h3>{title}</h3>" in pages["bert"]
    assert "Weights near zero" in pages["bert"]


def test_a_base_optimizer_alone_has_no_exponent_chart():
    made = report()
    curves = dataclasses.replace(
        made.training.curves,
        exponent_mean=(None,) * len(made.training.curves.step),
        exponent_max=(None,) * len(made.training.curves.step),
    )
    training = dataclasses.replace(made.training, curves=curves, ham=None)
    page = html.render(dataclasses.replace(made, training=training))
    assert "Exponent of the mirror step" not in page
    assert "HAM scaling" not in page


def test_no_zeros_are_no_charts_of_zeros(pages):
    assert "By kind and layer" not in pages["dense-tuned"]
    assert "0.00% of the target weights, exactly as asked" in Page(pages["dense-tuned"]).text


def test_a_measured_speed_is_shown_with_its_runtime():
    made = dataclasses.replace(bare(), speed=SpeedRecord("csr", 100.0, 180.0, 1.8))
    text = Page(html.render(made)).text
    assert "1.8\N{MULTIPLICATION SIGN} the dense speed" in text
    assert "100 dense, 180 sparse, in examples/s" in text
    assert "No gain" not in text


def test_equal_runs_give_equal_pages_whatever_their_time():
    made = report()
    slower = dataclasses.replace(made, training=dataclasses.replace(made.training, seconds=9876.5))
    assert html.render(slower) == html.render(made)


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_page_can_be_made_again_from_report_json(pages, sample):
    assert html.render(Report.from_json(SAMPLES[sample]().to_json())) == pages[sample]


def test_both_themes_define_the_same_colours(pages):
    blocks = re.findall(r"\{((?:color-scheme:[^;]+;)?\s*--page.*?)\}", pages["bare"], re.DOTALL)
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in blocks]
    assert len(names) == 4  # light, dark by the system, light by choice, dark by choice
    assert all(found == names[0] for found in names)
    used = set(re.findall(r"var\((--[\w-]+)\)", pages["bert"])) - {"--width"}
    assert used <= names[0]


def test_a_perplexity_far_off_leaves_the_others_visible(pages):
    shares = re.findall(
        r'bar-fill (dense|sparse|one-shot cut)" style="width:([\d.]+)%', pages["bert"]
    )
    widths = {style: float(width) for style, width in reversed(shares)}
    assert widths["one-shot cut"] == 100.0
    assert 30 < widths["dense"] < widths["sparse"]


def test_a_hostile_report_keeps_its_layout(pages):
    tags = Page(pages["hostile"]).tags
    assert tags.count("tr") == 1 + len(hostile().tensors) + 1 + len(hostile().files) + 2
    assert Page(html.render(report(bert(0.9)))).tags.count("tr") == 1 + 74 + 1 + 4 + 1 + 2
