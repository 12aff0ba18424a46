"""Texts to tensors: padding, masks, words, blocks."""

import numpy as np
import pytest
import torch

from hamcli.data.labels import IGNORED
from hamcli.data.texts import Encoder, Encoding, MaskRule, TextExamples, choose, pack, tag_labels
from tests.data.makers import bert_tokenizer, byte_tokenizer

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
A, B, C = 5, 6, 7
RULE = MaskRule(0.15, MASK, frozenset(range(5)), np.arange(5, 300))


def examples(rows, **more):
    words = {"pad_id": PAD, "limit": 512, **more}
    encodings = [row if isinstance(row, Encoding) else Encoding(row) for row in rows]
    return TextExamples(len(rows), lambda places: [encodings[place] for place in places], **words)


# ---- padding ----


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(3, 512, 8), (8, 512, 8), (9, 512, 16), (9, 12, 12), (13, 12, 13)],
)
def test_rows_are_padded_to_a_multiple_of_eight_within_the_limit(longest, limit, width):
    batch = examples([[A] * longest, [A]], limit=limit).batch([0, 1], None)
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [longest, 1]
    assert batch["input_ids"][1].tolist() == [A] + [PAD] * (width - 1)


def test_next_token_labels_are_the_tokens_and_no_padding():
    batch = examples([[A, B], [A]], predicts_next=True).batch([0, 1], None)
    assert batch["labels"].tolist() == [[A, B] + [IGNORED] * 6, [A] + [IGNORED] * 7]


def test_labels_and_segments_follow_their_rows():
    rows = [Encoding([A, B], [0, 1], 1), Encoding([A], [0], 0)]
    batch = examples(rows).batch([1, 0], None)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0, 1] + [0] * 6]
    rows = [Encoding([A, B], None, [1, IGNORED]), Encoding([A], None, [0])]
    batch = examples(rows).batch([0, 1], None)
    assert batch["labels"].tolist() == [[1] + [IGNORED] * 7, [0] + [IGNORED] * 7]


# ---- masks ----


def masked(rows, draw=None, **more):
    batch = examples(rows, mask=RULE, **more).batch(range(len(rows)), draw)
    return batch["input_ids"], batch["labels"], batch["attention_mask"]


def random_rows(number=400, length=62):
    draw = np.random.default_rng(0)
    return [[CLS, *draw.integers(5, 300, length).tolist(), SEP] for _ in range(number)]


def test_measuring_hides_every_asked_token_and_changes_no_other():
    rows = random_rows()
    shown, labels, _ = masked(rows)
    true = torch.tensor(rows)
    asked = labels != IGNORED
    assert (shown[asked] == MASK).all()
    assert torch.equal(shown[~asked], true[~asked])
    assert torch.equal(labels[asked], true[asked])


def test_a_share_of_the_tokens_is_asked_for():
    _, labels, _ = masked(random_rows())
    share = float((labels != IGNORED).sum() / (400 * 62))
    # 24,800 draws: a standard deviation of 0.0023
    assert share == pytest.approx(0.15, abs=0.01)


def test_special_tokens_and_padding_are_never_asked_for():
    rows = [[CLS, A, SEP], [CLS, *[A] * 14, SEP]]
    for seed in range(50):
        _, labels, attention = masked(rows, np.random.default_rng(seed))
        asked = labels != IGNORED
        assert not (asked & (attention == 0)).any()
        assert not asked[:, 0].any()
        assert not asked[0, 2:].any()


def test_every_example_is_asked_for_something():
    _, labels, _ = masked([[CLS, A, SEP]] * 100)
    assert (labels != IGNORED).sum(1).tolist() == [1] * 100
    may = np.array([False, True, True])
    assert choose(may, np.array([0.1, 0.9, 0.5]), 0.15).tolist() == [False, False, True]
    assert not choose(np.zeros(3, dtype=bool), np.zeros(3), 0.15).any()


def test_training_shows_eight_masks_one_random_and_one_true_token_in_ten():
    rows = random_rows(2000)
    shown, labels, _ = masked(rows, np.random.default_rng(1))
    asked = labels != IGNORED
    true = torch.tensor(rows)
    number = int(asked.sum())  # about 18,600: a standard deviation of 0.003 at most
    assert int((shown[asked] == MASK).sum()) / number == pytest.approx(0.8, abs=0.012)
    # of random tokens one in 295 is the true one
    assert int((shown[asked] == true[asked]).sum()) / number == pytest.approx(0.1, abs=0.01)
    assert torch.equal(shown[~asked], true[~asked])
    random_ones = shown[asked & (shown != MASK) & (shown != true)]
    assert int(random_ones.min()) >= 5


def test_the_question_does_not_depend_on_the_batch():
    rows = [[CLS, *[A] * length, SEP] for length in range(1, 40)]
    whole = examples(rows, mask=RULE).batch(range(39), None)
    for place in (0, 7, 38):
        alone = examples(rows, mask=RULE).batch([place], None)
        width = len(rows[place])
        assert torch.equal(alone["labels"][0, :width], whole["labels"][place, :width])


def test_the_same_draw_hides_the_same():
    rows = random_rows(8)
    one, two = (masked(rows, np.random.default_rng(3))[0] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, masked(rows, np.random.default_rng(4))[0])


# ---- words ----


def test_a_words_first_token_carries_its_tag():
    encoder = Encoder(bert_tokenizer(), 16)
    ids, owners, types = encoder.words(["a", "playing", "b"])
    assert owners == [None, 0, 1, 1, 2, None]
    assert len(ids) == 6
    assert types == [0] * 6
    assert tag_labels(owners, [1, 2, 3]) == [IGNORED, 1, 2, IGNORED, 3, IGNORED]


def test_words_that_are_cut_off_take_their_tags_along():
    encoder = Encoder(bert_tokenizer(), 8)
    _, owners, _ = encoder.words(["a"] * 20)
    assert len(tag_labels(owners, [1] * 20)) == 8


def test_byte_level_tokenizers_find_their_words_too():
    encoder = Encoder(byte_tokenizer(), 64)
    ids, owners, _ = encoder.words(["ab", "ü", "c"])
    labels = tag_labels(owners, [1, 2, 3])
    assert len(ids) == len(owners) == len(labels)
    # a tag of each word, once
    assert [label for label in labels if label != IGNORED] == [1, 2, 3]


def test_special_tokens_around_a_text_are_found():
    assert Encoder(bert_tokenizer(), 8).around() == ([CLS], [SEP])
    assert Encoder(byte_tokenizer(), 8).around() == ([], [])


# ---- blocks ----


def packed(texts, limit=8, most=None, order=None, tokenizer=None, **words):
    encoder = Encoder(tokenizer or bert_tokenizer(), limit)
    blocks = pack(encoder, texts, order or range(len(texts)), most=most, **words)
    return [block.tolist() for block in blocks]


def test_masked_blocks_begin_and_end_as_texts_do():
    blocks = packed(["a b c", "a b c", "a b c"], separator=SEP, keeps_special=True)
    assert blocks == [[CLS, A, B, C, A, B, C, SEP]]
    blocks = packed(["a b c"] * 3, separator=None, keeps_special=True)
    assert blocks == [[CLS, A, B, C, A, B, C, SEP]]
    blocks = packed(["a b"] * 4, separator=A, keeps_special=True)
    assert blocks == [[CLS, A, B, A, A, B, A, SEP], [CLS, A, B, A, A, B, A, SEP]]


def test_causal_blocks_cut_one_stream():
    stream = packed(["abc", "defgh", "i"], limit=4, separator=0, keeps_special=False,
                    tokenizer=byte_tokenizer())  # fmt: skip
    whole = [token for block in stream for token in block]
    ids = byte_tokenizer()(["abc", "defgh", "i"])["input_ids"]
    assert whole == [*ids[0], 0, *ids[1], 0, *ids[2], 0][:12]
    assert {len(block) for block in stream} == {4}


def test_a_tokenizers_own_end_is_not_doubled():
    blocks = packed(["a b", "c"], limit=7, separator=SEP, keeps_special=False)
    assert blocks == [[CLS, A, B, SEP, CLS, C, SEP]]


def test_what_is_left_over_counts_only_where_it_is_all():
    assert packed(["a b"], separator=SEP, keeps_special=True) == [[CLS, A, B, SEP]]
    assert len(packed(["a b c"] * 5, separator=SEP, keeps_special=True)) == 2
    assert packed([], separator=SEP, keeps_special=True) == []


def test_no_more_blocks_are_made_than_needed():
    texts = ["a b c d e f"] * 5000
    order = list(range(4999, -1, -1))
    blocks = packed(texts, most=3, order=order, separator=None, keeps_special=True)
    assert len(blocks) == 3
