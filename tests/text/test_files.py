"""Sets in the formats that people have: chats of ShareGPT and of tools, pairs, CSV, gzip, folders; and bombs."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import make_tokenizer

from amprune import CalibrationError
from amprune.text import files
from amprune.text.calibration import load_calibration
from amprune.text.records import Rendered, read_records, render

TOKENIZER = make_tokenizer()
CHAT = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "Blue."}]
SHAREGPT = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Blue."}]


def rendered(record: dict[str, Any], tokenizer: Any = TOKENIZER, **options: Any) -> Rendered:
    return render(record, tokenizer, "here", **options)


def test_the_chats_of_sharegpt_are_chats() -> None:
    chat = rendered({"messages": CHAT})
    assert "Blue." in chat.response
    assert "Red?" in chat.prompt
    for record in ({"conversations": SHAREGPT}, {"conversations": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
        assert rendered(record) == chat
    system = {"conversations": [{"from": "system", "value": "Be kind."}, *SHAREGPT]}
    assert rendered(system) == rendered({"messages": [{"role": "system", "content": "Be kind."}, *CHAT]})


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_a_prompt_and_its_completion_are_one_behind_the_other(answer: str) -> None:
    assert rendered({"prompt": "2 + {x} =", answer: " 4"}) == Rendered("2 + {x} =", " 4", True)


def test_a_question_is_asked_as_an_instruction_is() -> None:
    asked = rendered({"question": "Why?", "answer": "Because."})
    assert asked == rendered({"instruction": "Why?", "output": "Because."})


def test_null_content_of_a_call_is_left_to_the_template() -> None:
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
        "{{ m.role }}:{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %};"
        "{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    turns = [CHAT[0], call, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Wet."}]
    found = rendered({"messages": turns, "tools": tools}, tokenizer)
    assert found.prompt + found.response == "[look]user:Red?;assistant:look;tool:rain;assistant:Wet.;"
    with pytest.raises(CalibrationError, match="no list of objects with role and content"):
        rendered({"messages": [{"role": "user", "content": None}]}, tokenizer)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amprune.text.records._SECONDS", 0.2)
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    start = time.monotonic()
    with pytest.raises(CalibrationError, match="the chat template refuses these messages: it takes more than 0 sec"):
        rendered({"messages": CHAT}, tokenizer)
    assert time.monotonic() - start < 2


ROWS = [{"instruction": 'Say "a, b".', "output": "a,\nb", "input": ""}, {"instruction": "Red?", "output": "Blue."}]


def test_rows_of_csv_are_records(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    file.write_text('\ufeffinstruction,output,input\r\n"Say ""a, b"".","a,\nb",\r\nRed?,Blue.,\r\n', encoding="utf-8")
    _, records = read_records(file)
    assert [rendered(dict(record)) for _, record in records] == [rendered(row) for row in ROWS]
    assert [place for place, _ in records] == ["row 1", "row 2"]
    file.write_text("text\na,b\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"set\.csv, row 1: has more cells than the first row has names"):
        read_records(file)
    file.write_text('text\n"a', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"set\.csv, row \d: broken CSV"):
        read_records(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv"])
def test_a_file_that_gzip_packed_is_read_as_what_it_is(suffix: str, tmp_path: Path) -> None:
    text = {
        ".jsonl": '{"text": "fox"}\n{"text": "dog"}\n', ".json": '[{"text": "fox"}, {"text": "dog"}]',
        ".txt": "fox\ndog\n", ".csv": "text\nfox\ndog\n",
    }[suffix]  # fmt: skip
    (tmp_path / f"set{suffix}.gz").write_bytes(gzip.compress(text.encode()))
    _, records = read_records(tmp_path / f"set{suffix}.gz")
    assert [record["text"] for _, record in records] == ["fox", "dog"]


def test_what_is_no_gzip_or_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl.gz").write_bytes(b"fox")
    with pytest.raises(CalibrationError, match="cannot be read as gzip"):
        read_records(tmp_path / "set.jsonl.gz")
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(b"fox" * 1000)[:-20])
    with pytest.raises(CalibrationError, match="cannot be read as gzip"):
        read_records(tmp_path / "set.jsonl.gz")
    (tmp_path / "set.parquet.gz").write_bytes(b"fox")
    with pytest.raises(CalibrationError, match="unknown type of file"):
        read_records(tmp_path / "set.parquet.gz")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_memory", lambda _: 4 * 2**20)
    (tmp_path / "set.txt.gz").write_bytes(gzip.compress(b"fox " * 2**19))
    with pytest.raises(CalibrationError, match=r"on disk, unpacks to more than 1\.0 MiB"):
        read_records(tmp_path / "set.txt.gz")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2**20, pyarrow.int32()), pyarrow.array(["fox"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "set.parquet")
    assert (tmp_path / "set.parquet").stat().st_size < 2**14
    with pytest.raises(CalibrationError, match=r"on disk, unpacks to more than 1\.0 MiB"):
        read_records(tmp_path / "set.parquet")


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "fox"}, {"text": "dog"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(str(tmp_path / "unknown"))
    for name in ("one", "split"):
        assert [record["text"] for _, record in read_records(tmp_path / name)[1]] == ["fox", "dog"]
    assert len(load_calibration(tmp_path / "one", TOKENIZER, samples=2).samples) == 2
    with pytest.raises(CalibrationError, match="holds the splits a, b, none of them train"):
        read_records(tmp_path / "unknown")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(CalibrationError, match="is a folder, and none that the library datasets saved"):
        read_records(tmp_path / "other")
