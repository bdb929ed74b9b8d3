"""Start tokens: every row that a model reads begins with the one that its tokenizer begins a text with."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import BOS, CHAT_TEMPLATE, EOS, make_tokenizer
from tokenizers import processors

from amprune.cut.refit.run import packed
from amprune.text.calibration import CalibrationSet, load_calibration
from amprune.text.tokens import spans, start_token, started


def tokenizer_with(template: str | None) -> Any:
    """Returns a tokenizer that puts special tokens around a text as a template says."""
    made: Any = make_tokenizer()
    special = [(name, made.convert_tokens_to_ids(name)) for name in (BOS, EOS)]
    post = processors.TemplateProcessing(single=template or "$A", special_tokens=special)
    made.backend_tokenizer.post_processor = post
    return made


@pytest.mark.parametrize(
    ("template", "expected"), [(f"{BOS} $A", 1), (f"{BOS} $A {EOS}", 1), (f"$A {EOS}", None), (None, None)]
)
def test_the_start_token_is_what_stands_before_a_text(template: str | None, expected: int | None) -> None:
    assert start_token(tokenizer_with(template)) == expected


ids = st.lists(st.integers(1, 3), max_size=60)


@given(ids, st.integers(2, 9), st.sampled_from([None, 1]))
def test_rows_hold_every_token_once_behind_a_start_token(ids: list[int], length: int, start: int | None) -> None:
    parts = list(spans(ids, length, start))
    rows = [head + ids[part] for head, part in parts]
    assert [token for _, part in parts for token in ids[part]] == ids
    assert all(len(row) == length for row in rows[:-1])
    assert all(0 < len(row) <= length for row in rows)
    if start is not None:
        assert all(row[0] == start for row in rows)
        assert all(head in ([], [start]) for head, _ in parts)
        assert not any(head and ids[part.start] == start for head, part in parts)  # none is doubled
    else:
        assert rows == [ids[at : at + length] for at in range(0, len(ids), length)]


def test_a_start_token_is_not_doubled() -> None:
    assert started([5, 6], 1) == [1, 5, 6]
    assert started([1, 5], 1) == [1, 5]
    assert started([5, 6], None) == [5, 6]


def test_rows_of_the_refit_begin_with_the_start_token() -> None:
    texts = ["Red, green and blue. " * 8, "The quick brown fox. " * 9]
    drawn = load_calibration(texts, make_tokenizer(), samples=2)
    assert drawn.start == 1
    assert {row[0] for row in packed(drawn, longest=20, eos=2).tolist()} == {1}
    without = load_calibration(texts, tokenizer_with(None), samples=2)
    assert without.start is None
    assert packed(without, longest=20).flatten().tolist()[:40] == [t for s in without.samples for t in s][:40]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("{{ bos_token }}", "")])
def test_samples_of_a_chat_begin_with_the_start_token(template: str, tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Name three colours."}]}\n')
    (sample,) = load_calibration(file, tokenizer, samples=1).samples
    assert sample.count(1) == 1
    assert sample[0] == 1


def test_a_set_of_token_ids_has_no_start_token_unless_it_says_so() -> None:
    samples = (tuple(range(3, 60)),)
    assert packed(CalibrationSet("made", samples), longest=5).shape == (11, 5)
    assert packed(CalibrationSet("made", samples, start=1), longest=5)[:, 0].unique().tolist() == [1]
