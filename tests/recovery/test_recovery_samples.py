"""What a model is recovered on: tokens, labels, lengths, packing, and the split."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_recovery import training_data
from tiny_tokenizer import make_tokenizer
from tokenizers import processors

from amprune import CalibrationError, RecoveryError
from amprune.text.training import IGNORED, Sample, TrainingData

TOKENIZER = make_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA = {"instruction": "Name a colour.", "output": "Red, or green."}
CHAT = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]}


class Slow:
    """A tokenizer without offsets, of characters and of one pair that may join prompt and response."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, *, ends: bool = False) -> None:
        self.ends = ends

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = [ord(character) for character in text.replace("\n!", "\x7f")]
        return {"input_ids": [1] * add_special_tokens + ids + [2] * (add_special_tokens and self.ends)}


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def encoded(folder: Path, record: dict[str, Any], tokenizer: Any = TOKENIZER, **options: Any) -> Sample:
    data = training_data(write(folder, [record]), tokenizer, validation_share=0, **options)
    (sample,) = data.training
    return sample


def labelled(sample: Sample) -> list[int]:
    """Returns the tokens with a label, which have to be the last."""
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels)
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    assert labels == [IGNORED] * start + ids[start:]
    return ids[start:]


# Tokens and labels.


def test_an_alpaca_record_is_tokenised_as_one_text_and_learned_from_its_response_on(tmp_path: Path) -> None:
    sample = encoded(tmp_path, ALPACA)
    whole = f"{HEAD}### Instruction:\nName a colour.\n\n### Response:\nRed, or green."
    assert sample["input_ids"] == [*TOKENIZER(whole)["input_ids"], EOS]
    assert sample["input_ids"].count(BOS) == 1
    assert sample["input_ids"][0] == BOS
    assert labelled(sample)[-1] == EOS
    assert TOKENIZER.decode(labelled(sample)[:-1]) == "Red, or green."


def test_a_chat_ends_as_its_template_ends_it(tmp_path: Path) -> None:
    sample = encoded(tmp_path, CHAT)
    whole = "<s><|user|>\nWhich?</s>\n<|assistant|>\nThis one.</s>\n"
    assert sample["input_ids"] == TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    assert sample["input_ids"].count(BOS) == 1
    ids = labelled(sample)
    assert TOKENIZER.decode(ids[: ids.index(EOS)]) == "This one."
    assert ids.count(EOS) == 1
    assert TOKENIZER.decode(ids[ids.index(EOS) + 1 :]).strip() == ""


def test_plain_text_is_learned_but_for_its_first_token(tmp_path: Path) -> None:
    sample = encoded(tmp_path, {"text": "The quick brown fox."})
    assert sample["input_ids"] == [*TOKENIZER("The quick brown fox.")["input_ids"], EOS]
    assert sample["labels"] == [IGNORED, *sample["input_ids"][1:]]


def test_a_tokenizer_that_ends_texts_itself_adds_no_second_end_and_hides_no_token_of_the_response(
    tmp_path: Path,
) -> None:
    ending = make_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert ending("a")["input_ids"][-1] == EOS
    assert encoded(tmp_path, ALPACA, ending) == encoded(tmp_path, ALPACA)


@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_without_offsets_gives_the_same_labels(ends: bool, tmp_path: Path) -> None:
    sample = encoded(tmp_path, ALPACA, Slow(ends=ends))
    whole = f"{HEAD}### Instruction:\nName a colour.\n\n### Response:\nRed, or green."
    assert sample["input_ids"] == [1, *map(ord, whole), 2]
    assert labelled(sample) == [*map(ord, "Red, or green."), 2]


def test_a_token_of_prompt_and_response_belongs_to_the_response(tmp_path: Path) -> None:
    sample = encoded(tmp_path, {**ALPACA, "output": "!"}, Slow())
    assert labelled(sample) == [127, 2]


# Lengths.


def test_long_samples_are_cut_and_those_without_a_response_left_out_and_both_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amprune")
    prompt = len(encoded(tmp_path, {**ALPACA, "output": ""})["input_ids"]) - 1
    records = [{**ALPACA, "output": "Red"}, {**ALPACA, "output": "Green " * 40}, {"text": "A fox."}]
    records.append({**ALPACA, "instruction": "Name " * 200})
    data = training_data(write(tmp_path, records), TOKENIZER, max_length=prompt + 20, validation_share=0)
    assert (len(data.training), data.truncated, data.skipped) == (3, 2, 1)
    assert max(len(sample["input_ids"]) for sample in data.training) == prompt + 20
    cut = next(sample for sample in data.training if len(sample["input_ids"]) == prompt + 20)
    assert labelled(cut) == cut["input_ids"][prompt:]
    assert EOS not in cut["input_ids"]
    assert f"2 of 4 samples are cut at {prompt + 20} tokens" in caplog.text
    assert f"1 of 4 samples have no response within {prompt + 20} tokens and are left out" in caplog.text
    assert data.to_dict()["tokens"] == sum(len(sample["input_ids"]) for sample in data.training)


def test_a_length_without_room_for_any_response_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    file = write(tmp_path, [ALPACA, ALPACA])
    with pytest.raises(RecoveryError, match=r"leaves 0 samples with a response within 8 tokens.*larger --max-length"):
        training_data(file, TOKENIZER, max_length=8)


def test_an_empty_response_is_its_end_alone_and_an_unanswered_chat_none_at_all(tmp_path: Path) -> None:
    assert labelled(encoded(tmp_path, {**ALPACA, "output": ""})) == [EOS]
    records = [ALPACA, {"messages": CHAT["messages"][:1]}]
    data = training_data(write(tmp_path, records), TOKENIZER, validation_share=0)
    assert (len(data.training), data.skipped) == (1, 1)


# The draw and the split.


def texts(count: int) -> list[str]:
    return [f"Number {index} of the dogs." for index in range(count)]


def content(samples: tuple[Sample, ...]) -> list[tuple[int, ...]]:
    return [tuple(sample["input_ids"]) for sample in samples]


def test_the_held_out_samples_are_not_trained_on() -> None:
    data = training_data(texts(50), TOKENIZER, validation_share=0.1)
    training, validation = content(data.training), content(data.validation)
    assert (len(training), len(validation)) == (45, 5)
    assert len({*training, *validation}) == 50


@pytest.mark.parametrize(("count", "share", "held"), [(50, 0.001, 1), (2, 0.9, 1), (1, 0.5, 0), (5, 0, 0)])
def test_at_least_one_is_held_out_and_at_least_one_trained_on(count: int, share: float, held: int) -> None:
    data = training_data(texts(count), TOKENIZER, validation_share=share)
    assert (len(data.training), len(data.validation)) == (count - held, held)


def test_the_seed_decides_draw_order_and_split() -> None:
    def draw(seed: int) -> TrainingData:
        return training_data(texts(40), TOKENIZER, samples=20, validation_share=0.2, seed=seed)

    assert draw(1) == draw(1)
    assert content(draw(1).validation) != content(draw(2).validation)
    assert content(draw(1).training) != content(draw(2).training)
    assert len(draw(1).training) + len(draw(1).validation) == 20


def test_more_samples_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match=r"data\.jsonl holds 1 samples, but --samples 2 were asked for"):
        training_data(write(tmp_path, [ALPACA]), TOKENIZER, samples=2)
    with pytest.raises(CalibrationError, match=r"no data set 'nowhere\.jsonl'"):
        training_data("nowhere.jsonl", TOKENIZER)


# Packing.


def test_packed_sequences_are_full_but_the_last_and_keep_every_token_and_label() -> None:
    apart = training_data(texts(20), TOKENIZER, validation_share=0.1)
    data = training_data(texts(20), TOKENIZER, validation_share=0.1, max_length=64, packing=True)
    lengths = [len(sample["input_ids"]) for sample in data.training]
    assert set(lengths[:-1]) == {64}
    assert 0 < lengths[-1] <= 64
    assert len(lengths) > 3
    ids = [i for sample in apart.training for i in sample["input_ids"]]
    labels = [label for sample in apart.training for label in (IGNORED, *sample["labels"][1:])]
    at = 0
    for sample in data.training:  # a row that begins within a text has a start token before that
        head = int(ids[at] != TOKENIZER.bos_token_id)
        assert sample["input_ids"][:head] == [TOKENIZER.bos_token_id] * head
        assert sample["labels"][0] == IGNORED
        content = sample["input_ids"][head:]
        assert content == ids[at : at + len(content)]
        assert sample["labels"][1:] == labels[at + 1 - head : at + len(content)]
        at += len(content)
    assert at == len(ids)
    assert data.validation == apart.validation


def test_no_packed_sample_learns_its_first_token_from_the_one_before() -> None:
    data = training_data(texts(20), TOKENIZER, validation_share=0, max_length=64, packing=True)
    firsts = [
        label
        for sample in data.training
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
        if token == BOS
    ]
    assert len(firsts) >= 20  # those of the samples, and of rows that begin within one
    assert set(firsts) == {IGNORED}
