"""Calibration sets: what is drawn, how each record becomes tokens, and what is said of bad input."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import BOS, EOS, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from amprune import CalibrationError, CalibrationSet, load_calibration

TEXTS = [f"Sample number {number} of the set." for number in range(20)]
WITHOUT_INPUT = {"instruction": "Name a colour.", "input": "", "output": "Red."}
WITH_INPUT = {"instruction": "Add the numbers.", "input": "1 {and} 2", "output": "3"}
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd the numbers.\n\n### Input:\n1 {and} 2\n\n### Response:\n"
)
CHAT = [
    {"role": "user", "content": "What is blue?"},
    {"role": "assistant", "content": "The sky."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "A rose."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=False)


def write_lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    """Writes records in the form that the file's suffix names."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        write_lines(file, records)
    return file


def load_all(source: Any, tokenizer: Any, count: int, **options: Any) -> set[tuple[int, ...]]:
    """Loads every sample of a set; the draw decides their order."""
    return set(load_calibration(source, tokenizer, samples=count, **options).samples)


def ids_of(tokenizer: Any, *texts: str) -> set[tuple[int, ...]]:
    return {tuple(tokenizer(text)["input_ids"]) for text in texts}


def test_the_same_seed_draws_the_same_tokens(tokenizer: Any) -> None:
    first, again, other = (load_calibration(TEXTS, tokenizer, samples=8, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.sha256 == again.sha256
    assert first.samples != other.samples
    assert first.sha256 != other.sha256


def test_a_draw_is_without_replacement_and_leaves_the_global_generator_alone(tokenizer: Any) -> None:
    random.seed(0)
    state = random.getstate()
    drawn = load_calibration(TEXTS, tokenizer, samples=len(TEXTS))
    assert set(drawn.samples) == ids_of(tokenizer, *TEXTS)
    assert random.getstate() == state


def test_a_set_says_what_it_is_made_of(tokenizer: Any) -> None:
    drawn = load_calibration(TEXTS, tokenizer, samples=5, max_length=7, seed=2)
    assert drawn.to_dict() == {
        "name": "texts",
        "samples": 5,
        "tokens": 35,
        "seed": 2,
        "max_length": 7,
        "prompts_only": False,
        "sha256": drawn.sha256,
    }
    assert drawn.sha256 == CalibrationSet("another name", drawn.samples).sha256


@pytest.mark.parametrize("max_length", [1, 2, 6])
def test_samples_are_cut_to_max_length_from_the_front(tokenizer: Any, max_length: int) -> None:
    long = load_calibration(TEXTS, tokenizer, samples=4)
    cut = load_calibration(TEXTS, tokenizer, samples=4, max_length=max_length)
    assert cut.samples == tuple(sample[:max_length] for sample in long.samples)


def test_max_length_holds_for_a_tokenizer_that_adds_more_special_tokens_than_that() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    )
    for max_length in (1, 2, 3):
        drawn = load_calibration(TEXTS, tokenizer, samples=4, max_length=max_length)
        assert {len(sample) for sample in drawn.samples} == {max_length}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_alpaca_records_take_the_template_with_or_without_input(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path / f"set{suffix}", [WITHOUT_INPUT, WITH_INPUT])
    expected = ids_of(tokenizer, PROMPT_WITHOUT_INPUT + "Red.", PROMPT_WITH_INPUT + "3")
    assert load_all(file, tokenizer, 2) == expected
    prompts = load_calibration(file, tokenizer, samples=2, prompts_only=True)
    assert set(prompts.samples) == ids_of(tokenizer, PROMPT_WITHOUT_INPUT, PROMPT_WITH_INPUT)
    assert prompts.name == file.name
    assert prompts.prompts_only


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": "  \n"}])
def test_an_input_that_is_absent_null_or_blank_is_none(absent: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    record = {"instruction": "Name a colour.", "output": "Red.", **absent}
    file = write_lines(tmp_path / "set.jsonl", [record])
    assert load_all(file, tokenizer, 1) == ids_of(tokenizer, PROMPT_WITHOUT_INPUT + "Red.")


def test_prompts_only_needs_no_output(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", [{"instruction": "Name a colour."}])
    assert load_all(file, tokenizer, 1, prompts_only=True) == ids_of(tokenizer, PROMPT_WITHOUT_INPUT)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_text_column_is_taken_as_it_is(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path / f"set{suffix}", [{"text": text, "source": "web"} for text in TEXTS])
    assert load_all(file, tokenizer, len(TEXTS)) == ids_of(tokenizer, *TEXTS)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_messages_take_the_chat_template(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path / f"set{suffix}", [{"messages": CHAT}])
    (sample,) = load_calibration(file, tokenizer, samples=1).samples
    assert sample.count(tokenizer.bos_token_id) == 1
    assert sample[0] == tokenizer.bos_token_id
    assert list(sample) == tokenizer.apply_chat_template(CHAT, return_dict=False)
    (prompt,) = load_calibration(file, tokenizer, samples=1, prompts_only=True).samples
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert list(prompt) == tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)


def test_messages_that_end_with_the_user_are_a_whole_prompt(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", [{"messages": CHAT[:3]}])
    (prompt,) = load_calibration(file, tokenizer, samples=1, prompts_only=True).samples
    assert list(prompt) == tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"One fox\n\n  \nTwo dogs\n", ["One fox", "Two dogs"]),
        (b"One fox\r\n\r\nTwo dogs", ["One fox", "Two dogs"]),
        (b"\xef\xbb\xbfOne fox\nTwo dogs\n", ["One fox", "Two dogs"]),
        (b"One\x0cfox\nTwo\xe2\x80\xa8dogs\n", ["One\x0cfox", "Two\u2028dogs"]),
    ],
    ids=["blank lines", "Windows line ends", "byte order mark", "other separators stay"],
)
def test_a_text_file_has_a_sample_a_line(content: bytes, expected: list[str], tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_bytes(content)
    assert load_all(file, tokenizer, 2) == ids_of(tokenizer, *expected)
    with pytest.raises(CalibrationError, match="holds 2 samples"):
        load_calibration(file, tokenizer, samples=3)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_may_have_a_byte_order_mark_and_windows_line_ends(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path / f"set{suffix}", [{"text": text} for text in TEXTS])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_all(file, tokenizer, len(TEXTS)) == ids_of(tokenizer, *TEXTS)


def test_the_suffix_may_be_upper_case_and_the_path_a_text(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "SET.JSONL", [{"text": text} for text in TEXTS])
    assert load_all(str(file), tokenizer, len(TEXTS)) == ids_of(tokenizer, *TEXTS)


def test_a_list_of_texts_is_a_set_without_its_blank_ones(tokenizer: Any) -> None:
    assert load_all(["one", "", " \n", "two"], tokenizer, 2) == ids_of(tokenizer, "one", "two")


def test_builtin_draws_its_records_in_both_templates(tokenizer: Any) -> None:
    drawn = load_calibration("builtin", tokenizer)
    assert drawn.name == "builtin"
    assert len(drawn.samples) == 50
    assert all(drawn.samples)
    whole, prompts = (load_calibration("builtin", tokenizer, samples=128, prompts_only=only) for only in (False, True))
    assert len(set(whole.samples)) == 128
    assert prompts.tokens < whole.tokens


def test_every_builtin_record_is_well_formed() -> None:
    import amprune

    lines = (Path(amprune.__file__).parent / "data" / "builtin.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) >= 128
    assert len({record["instruction"] for record in records}) == len(records)
    for record in records:
        assert record.keys() == {"instruction", "input", "output"}
        assert all(isinstance(value, str) and value == value.strip() for value in record.values())
        assert record["instruction"]
        assert record["output"]


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _records(*records: Any) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "set.jsonl", list(records))


def _table(**columns: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "set.parquet")
        return folder / "set.parquet"

    return write


def _cut_parquet(folder: Path) -> Path:
    file = write_records(folder / "set.parquet", [{"text": text} for text in TEXTS])
    file.write_bytes(file.read_bytes()[:-20])
    return file


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty lines": (_file("set.jsonl", b""), r"set\.jsonl is empty; .* needs at least one sample"),
    "empty json": (_file("set.json", b" \n"), r"set\.json is empty"),
    "empty list": (_file("set.json", b"[]"), r"set\.json is empty"),
    "empty text": (_file("set.txt", b"\n \r\n"), r"set\.txt is empty"),
    "empty parquet": (_table(text=[]), r"set\.parquet is empty"),
    "broken line": (
        _file("set.jsonl", b'{"text": "one"}\n\n{"text": "two"\n'),
        r"set\.jsonl, line 3: broken JSON \(.*column 15\)",
    ),
    "line that is no object": (
        _file("set.jsonl", b'{"text": "one"}\n["two"]\n'),
        r"line 2: a list, expected an object",
    ),
    "record that is no object": (
        _file("set.json", b'[{"text": "one"}, "two"]'),
        r"record 2: a str, expected an object",
    ),
    "broken json": (_file("set.json", b'[\n{"text": "one"},\n{"text": }\n]'), r"set\.json, line 3: broken JSON"),
    "lines named json": (
        _file("set.json", b'{"text": "one"}\n{"text": "two"}\n'),
        r"set\.json, line 2: broken JSON .*is it JSON lines\? Then name it \.jsonl",
    ),
    "one line named json": (
        _file("set.json", b'{"text": "one"}\n'),
        r"set\.json holds a dict, expected a list of records; if it is JSON lines, name it \.jsonl",
    ),
    "other fields": (
        _records({"question": "?", "reply": "!"}),
        r"set\.jsonl, line 1: has the fields \['question', 'reply'\], expected messages .* and output .*text",
    ),
    "other fields of parquet": (_table(question=["?"]), r"set\.parquet, row 1: has the fields \['question'\]"),
    "no output": (_records({"instruction": "Do."}), r"line 1: field 'output' is missing, expected text"),
    "null instruction": (
        _records({"instruction": None, "output": "x"}),
        r"line 1: field 'instruction' is null, expected text",
    ),
    "number as output": (_records({"instruction": "Do.", "output": 3}), r"field 'output' is a int, expected text"),
    "list as input": (_records({"instruction": "Do.", "input": [], "output": ""}), r"field 'input' is a list, expec"),
    "null text": (_table(text=pyarrow.array([None], pyarrow.string())), r"row 1: field 'text' is null, expected text"),
    "messages as text": (_records({"messages": "Hello"}), r"line 1: messages is no list of objects with role and cont"),
    "no messages": (_records({"messages": []}), r"line 1: messages is no list of objects"),
    "message as text": (_records({"messages": ["Hello"]}), r"line 1: messages is no list of objects"),
    "message without role": (_records({"messages": [{"content": "Hello"}]}), r"messages is no list of objects"),
    "message without content": (_records({"messages": [{"role": "user"}]}), r"messages is no list of objects"),
    "number as content": (_records({"messages": [{"role": "user", "content": 1}]}), r"messages is no list of objects"),
    "lone surrogate": (_records({"text": "\ud800"}), r"set\.jsonl, line 1: the tokenizer refuses this sample"),
    "unknown suffix": (_file("set.tsv", b"text\none\n"), r"set\.tsv: unknown type of file; expected one of \.json, "),
    "missing file": (
        lambda folder: folder / "set.jsonl",
        r"no calibration set '.*set\.jsonl': give alpaca, mixed, builtin, self, hub:OWNER/SET or the path",
    ),
    "folder": (lambda folder: folder, r"is a folder, and none that the library datasets saved"),
    "Latin 1": (_file("set.txt", "Café".encode("latin-1")), r"set\.txt cannot be read as UTF-8 text"),
    "Latin 1 lines": (_file("set.jsonl", '{"text": "Café"}'.encode("latin-1")), r"set\.jsonl cannot be read as UTF-8"),
    "text named parquet": (_file("set.parquet", b"one\n"), r"set\.parquet cannot be read as parquet"),
    "truncated parquet": (_cut_parquet, r"set\.parquet cannot be read as parquet"),
    "number in a list": (lambda _: [1], r"texts, text 1: field 'text' is a int, expected text"),
    "empty list of texts": (lambda _: [], r"texts holds 0 samples, but 1 were asked for; give a larger set"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_input_is_named(make: Callable[[Path], Any], message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(make(tmp_path), tokenizer, samples=1)


@pytest.mark.parametrize("option", ["samples", "max_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(option: str, value: int, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=f"{option} is {value}, expected at least 1"):
        load_calibration(TEXTS, tokenizer, **{option: value})


def test_fewer_samples_than_asked_for_says_both_numbers(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", [{"text": text} for text in TEXTS])
    message = "set.jsonl holds 20 samples, but 21 were asked for; give --samples 20 or a larger set"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        load_calibration(file, tokenizer, samples=21)


def test_messages_need_a_chat_template(plain_tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "set.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"line 1: has messages, but .* no chat template; use text instead"):
        load_calibration(file, plain_tokenizer, samples=1)


def test_a_refusal_of_the_chat_template_names_the_record(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = write_lines(tmp_path / "set.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"line 1: the chat template refuses .*: roles must alternate"):
        load_calibration(file, tokenizer, samples=1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "Plain."}, "line 1: prompts_only needs records with a prompt, but this one is plain text"),
        ({"messages": CHAT[-1:]}, "line 1: prompts_only leaves nothing of messages that are one assistant turn"),
    ],
    ids=["text", "one assistant turn"],
)
def test_prompts_only_needs_a_prompt(record: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(write_lines(tmp_path / "set.jsonl", [record]), tokenizer, samples=1, prompts_only=True)


def test_a_tokenizer_that_makes_no_tokens_is_reported() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(CalibrationError, match="texts, text 1: the tokenizer makes no token of this sample"):
        load_calibration(["Hello"], tokenizer, samples=1)


def test_alpaca_without_the_hub_names_what_works_without_it(tokenizer: Any) -> None:
    with pytest.raises(
        CalibrationError, match=r"yahma/alpaca-cleaned on the hub, .*cannot be reached \(.+\)"
    ) as caught:
        load_calibration("alpaca", tokenizer)
    assert "--calibration mixed or builtin" in str(caught.value)
    assert "--calibration PATH" in str(caught.value)
