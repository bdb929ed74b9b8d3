"""Data for evaluation: WikiText-2 as the hub serves it, and task files that are refused before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluation import DATA_DIR, needs_data

from amprune.errors import EvaluationError
from amprune.evaluation.data import TASK_FILES, WIKITEXT, load_text, load_wikitext
from amprune.evaluation.run import evaluate

# Texts


@needs_data
@pytest.mark.parametrize(("split", "rows"), [("test", 4358), ("validation", 3760)])
def test_wikitext_is_the_rows_of_the_hub_joined(split: str, rows: int) -> None:
    with (DATA_DIR / "wikitext2" / WIKITEXT[split][0]).open(encoding="utf-8") as file:
        expected = [line if line.strip() else "" for line in file]  # as the hub's own script reads it
    found = load_wikitext(split, data_dir=DATA_DIR)
    assert len(expected) == rows
    assert found.content == "\n\n".join(expected)
    assert found.name == f"wikitext2 {split}"


def altered_wikitext(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    (folder / "wikitext2").mkdir()
    content = (DATA_DIR / "wikitext2" / "wiki.test.raw").read_bytes()
    (folder / "wikitext2" / "wiki.test.raw").write_bytes(change(content))
    return folder


@needs_data
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: content[:-1],
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"",
    ],
    ids=["one bit", "cut", "line ends", "empty"],
)
def test_another_file_is_not_wikitext(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = altered_wikitext(tmp_path, change)
    with pytest.raises(EvaluationError, match=r"wiki\.test\.raw is not the raw file of WikiText-2.*--text"):
        load_wikitext("test", data_dir=folder)


def test_a_missing_wikitext_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no folder .*wikitext2"):
        load_wikitext("test", data_dir=tmp_path)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.tokens").touch()
    with pytest.raises(EvaluationError, match=r"wiki\.test\.raw.* holds wiki\.test\.tokens"):
        load_wikitext("test", data_dir=tmp_path)


def test_without_a_folder_wikitext_comes_from_the_hub() -> None:
    with pytest.raises(EvaluationError, match=r"hub.*--data-dir.*wikitext2/wiki\.valid\.raw"):
        load_wikitext("validation")


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    content = " Zürich\r\n\n\nlast line, no newline "
    (tmp_path / "my.txt").write_bytes(content.encode())
    found = load_text(tmp_path / "my.txt")
    assert found.content == content
    assert found.name == "my.txt"


@pytest.mark.parametrize("content", [b"", b" \n\t\n", "Zürich".encode("latin-1"), b"\xff\xfe\x00a"])
def test_a_text_must_be_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"my\.txt is empty or no UTF-8 text"):
        load_text(tmp_path / "my.txt")


def test_a_text_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    with pytest.raises(EvaluationError, match=r"cannot read .*my\.txt: No such file.* holds other\.txt"):
        load_text(tmp_path / "my.txt")
    with pytest.raises(EvaluationError, match=r"cannot be read: it is a folder, expected a file"):
        load_text(tmp_path)


# Task files: each case is found before MODEL, which is none here, is looked at

ROWS: dict[str, dict[str, Any]] = {
    "winogrande": {"sentence": "The _ is red.", "option1": "fox", "option2": "dog", "answer": "2"},
    "piqa": {"goal": "See.", "sol1": "Open the eyes.", "sol2": "Close the eyes.", "label": 0},
    "arc_challenge": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
}


def written(folder: Path, task: str, lines: list[str], *, name: str | None = None) -> Path:
    file = folder / "tasks" / (name or TASK_FILES[task].file)
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def whole(task: str) -> list[str]:
    """As many rows as the real file has."""
    return [json.dumps({**ROWS[task], "id": number}) for number in range(TASK_FILES[task].rows)]


def refused(folder: Path, task: str) -> str:
    with pytest.raises(EvaluationError) as error:
        evaluate(folder / "no-model", folder / "e.json", measure=["zero_shot"], tasks=[task], data_dir=folder)
    assert not (folder / "e.json").exists()
    return str(error.value)


@pytest.mark.parametrize("task", sorted(ROWS))
def test_a_file_of_the_right_length_and_fields_passes(task: str, tmp_path: Path) -> None:
    from amprune.evaluation.zero_shot import open_tasks

    file = written(tmp_path, task, whole(task))
    (found,) = open_tasks([task], data_dir=tmp_path)
    assert found.data is not None
    assert found.data.file == file


@pytest.mark.parametrize("task", sorted(TASK_FILES))
def test_a_missing_file_is_named(task: str, tmp_path: Path) -> None:
    assert str(tmp_path / "tasks" / TASK_FILES[task].file) in refused(tmp_path, task)


def test_of_a_renamed_file_the_message_says_what_the_folder_holds(tmp_path: Path) -> None:
    written(tmp_path, "piqa", whole("piqa"), name="piqa_val.jsonl")
    assert "holds piqa_val.jsonl" in refused(tmp_path, "piqa")


def test_a_file_cut_within_a_line(tmp_path: Path) -> None:
    file = written(tmp_path, "piqa", whole("piqa"))
    file.write_bytes(file.read_bytes()[:-30])
    message = refused(tmp_path, "piqa")
    assert f"{file}, line 1838: not JSON" in message
    assert "truncated" in message


def test_a_file_cut_between_lines(tmp_path: Path) -> None:
    file = written(tmp_path, "piqa", whole("piqa")[:-5])
    message = refused(tmp_path, "piqa")
    assert f"{file} has 1,833 rows" in message
    assert "1,838" in message
    assert "--limit" in message


def test_a_file_with_rows_twice(tmp_path: Path) -> None:
    written(tmp_path, "piqa", whole("piqa") + whole("piqa"))
    assert "3,676 rows" in refused(tmp_path, "piqa")


def test_an_empty_file(tmp_path: Path) -> None:
    written(tmp_path, "piqa", [])
    assert "is empty" in refused(tmp_path, "piqa")


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no field": ("piqa", {"label": ...}, "has no field 'label', only goal, sol1, sol2"),
    "answer as number": ("winogrande", {"answer": 2}, "field 'answer' is a int, expected a str"),
    "label as text": ("piqa", {"label": "0"}, "field 'label' is a str, expected a int"),
    "choices as list": ("arc_challenge", {"choices": ["a", "b"]}, "field 'choices' is a list, expected a dict"),
    "null": ("piqa", {"goal": None}, "field 'goal' is a NoneType, expected a str"),
    "secret label": ("piqa", {"label": -1}, "no right answer"),
    "third of two": ("winogrande", {"answer": "3"}, "no right answer"),
    "no blank": ("winogrande", {"sentence": "The fox is red."}, "no right answer"),
    "label of none": ("arc_challenge", {"answerKey": "1"}, "no right answer"),
    "a choice too few": ("arc_challenge", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "no right answer"),
    "no labels": ("arc_challenge", {"choices": {"text": ["a", "b"]}}, "no right answer"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_row_is_named_by_its_line(case: str, tmp_path: Path) -> None:
    task, change, expected = WRONG[case]
    lines = whole(task)
    row = {name: value for name, value in {**ROWS[task], **change}.items() if value is not ...}
    lines[41] = json.dumps(row)
    file = written(tmp_path, task, ["", *lines])  # blank lines count
    message = refused(tmp_path, task)
    assert f"{file}, line 43: " in message
    assert expected in message


def test_hellaswag_without_labels(tmp_path: Path) -> None:
    row = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"] * 4, "label": ""}
    written(tmp_path, "hellaswag", [json.dumps(row)])
    assert "line 1: has no right answer" in refused(tmp_path, "hellaswag")


@pytest.mark.parametrize("line", ["[1, 2]", "12", '"text"', "null"])
def test_a_row_that_is_no_object(line: str, tmp_path: Path) -> None:
    file = written(tmp_path, "piqa", [*whole("piqa")[:3], line])
    assert f"{file}, line 4: a " in refused(tmp_path, "piqa")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = written(tmp_path, "piqa", whole("piqa")[:1])
    file.write_bytes(file.read_bytes() + '{"goal": "Zürich"}'.encode("latin-1"))
    assert f"{file}, line 2: not JSON" in refused(tmp_path, "piqa")
