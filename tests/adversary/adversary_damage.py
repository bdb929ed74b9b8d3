"""Damage: ways in which a file that somebody hands over may be wrong, drawn by Hypothesis."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

VALUES: dict[str, str] = {
    "null": "null", "true": "true", "minus one": "-1", "zero": "0", "huge": "1" + "0" * 30, "fraction": "0.5",
    "infinity": "Infinity", "nan": "NaN", "endless integer": "9" * 5000, "empty text": '""', "text": '"fox"',
    "number as text": '"12"', "long text": '"' + "x" * 20_000 + '"', "markup": '"[/bold]x[v2]"',
    "escape": '"\\u001b[31mred\\u001b[0m"', "surrogate": '"\\ud800"', "path": '"../../etc/passwd"', "list": "[]",
    "object": "{}", "list of null": "[null]", "nested": "[" * 1200 + "]" * 1200,
    "nested object": '{"a":' * 1200 + "1" + "}" * 1200,
}  # fmt: skip
"""JSON text that a value is replaced by."""

WHOLE: dict[str, bytes] = {
    "empty": b"", "space": b" \n", "not UTF-8": b'{"a": "\xff\xfe"}', "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark": b"\xef\xbb\xbf{}", "a list": b"[1, 2]", "a number": b"3", "null": b"null", "a text": b'"fox"',
    "an empty object": b"{}", "nested": b"[" * 100_000, "cut off": b'{"a": {"b":', "zeros": b"\0" * 4096,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
}  # fmt: skip
"""Bytes that a file is replaced by."""


def damages(file: Path) -> st.SearchStrategy[str]:
    """Draws damage to a file, does it, and says what was done."""
    kinds = [_whole(file), _kind(file), _bytes(file)]
    if file.suffix == ".json":
        kinds = [_json(file)] * 3 + kinds
    elif file.suffix == ".jsonl":
        kinds = [_lines(file)] * 2 + kinds
    elif file.suffix == ".safetensors":
        kinds = [_header(file)] * 3 + kinds
    elif file.suffix in (".yaml", ".md", ".jinja", ".txt"):
        kinds = [_text(file)] * 2 + kinds
    return st.one_of(kinds)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the places of a JSON value, few of a long list."""
    found = [at]
    if isinstance(value, dict):
        for name, part in list(value.items())[:60]:
            found += _paths(part, (*at, name))
    elif isinstance(value, list):
        for index, part in enumerate(value[:4]):
            found += _paths(part, (*at, index))
    return found[:2000]


def _put(value: Any, at: tuple[Any, ...], mark: Any) -> Any:
    if not at:
        return mark
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = _put(copied[at[0]], at[1:], mark)
    return copied


def _changed(value: Any, at: tuple[Any, ...], text: str) -> str:
    return json.dumps(_put(value, at, "\0mark\0")).replace(json.dumps("\0mark\0"), text)


@st.composite
def _json(draw: st.DrawFn, file: Path) -> str:
    value = json.loads(file.read_text(encoding="utf-8"))
    at = draw(st.sampled_from(_paths(value)))
    parent = value
    for step in at[:-1]:
        parent = parent[step]
    how = draw(st.sampled_from([*VALUES, "removed", "twice", "added"]))
    if how == "removed" and at:
        del parent[at[-1]]
        text = json.dumps(value)
    elif how == "twice" and at and isinstance(parent, list):
        parent.append(parent[at[-1]])
        text = json.dumps(value)
    elif how in VALUES:
        text = _changed(value, at, VALUES[how])
    else:
        how = "added"
        text = json.dumps({**value, "unknown": 1} if isinstance(value, dict) else [value, value])
    file.write_text(text, encoding="utf-8")
    return f"{'.'.join(map(str, at)) or 'the whole'} {how}"


@st.composite
def _lines(draw: st.DrawFn, file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[index])
    at = draw(st.sampled_from(_paths(value)))
    how = draw(st.sampled_from(list(VALUES)))
    lines[index] = _changed(value, at, VALUES[how])
    everywhere = draw(st.booleans())
    file.write_text("\n".join([lines[index]] * len(lines) if everywhere else lines) + "\n", encoding="utf-8")
    return f"{'every line' if everywhere else f'line {index}'}: {'.'.join(map(str, at)) or 'the whole'} {how}"


@st.composite
def _header(draw: st.DrawFn, file: Path) -> str:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = draw(st.sampled_from(["length", "value", "removed", "renamed", "not a number", "short", "long"]))
    if how == "length":
        claimed = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        file.write_bytes(struct.pack("<Q", claimed) + content[8:])
        return f"a header of {claimed} bytes"
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    text = json.dumps(header)
    if how == "value":
        at = draw(st.sampled_from(_paths(header)))
        value = draw(st.sampled_from(list(VALUES)))
        text, how = _changed(header, at, VALUES[value]), f"{'.'.join(map(str, at))} {value}"
    elif how == "removed":
        del header[name]
        text, how = json.dumps(header), f"{name} removed"
    elif how == "renamed":
        header[draw(st.sampled_from(["module." + name, "[/b]" + name, "\x1b[31m" + name, "x"]))] = header.pop(name)
        text, how = json.dumps(header), f"{name} renamed"
    elif how == "not a number":
        start, end = header[name]["data_offsets"]
        data = data[:start] + b"\xff" * (end - start) + data[end:]
        how = f"{name} is not a number"
    else:
        data = data[: len(data) // 2] if how == "short" else data + b"\0" * 100
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return how


TEXTS: dict[str, list[str]] = {
    ".jinja": [
        "{{", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ raise_exception('no') }}",
    ],
    ".md": [
        "---\n- a\n- b\n---\n", "---\n: : :\n---\n", "---\na: &a [*a]\n---\n", "---\n",
        "---\nlicense: 3\nbase_model: {x: 1}\n---\n",
    ],
    ".yaml": [
        "- 1\n- 2\n", "ratio: much\n", "unknown: 1\n", "command: [x\n", "ratio: null\n", "ratio: -1\n", "a: &a [*a]\n",
        "!!python/object/apply:os.system ['true']\n",
    ],
}  # fmt: skip
"""What a text is replaced by, or gets beside it."""


@st.composite
def _text(draw: st.DrawFn, file: Path) -> str:
    content = file.read_text(encoding="utf-8")
    new = draw(st.sampled_from(TEXTS.get(file.suffix, TEXTS[".yaml"])))
    whole = draw(st.booleans())
    file.write_text(new if whole else new + content if file.suffix == ".md" else content + new, encoding="utf-8")
    return f"{new[:60]!r} {'alone' if whole else 'beside'}"


@st.composite
def _whole(draw: st.DrawFn, file: Path) -> str:
    how = draw(st.sampled_from(list(WHOLE)))
    file.write_bytes(WHOLE[how])
    return how


@st.composite
def _kind(draw: st.DrawFn, file: Path) -> str:
    how = draw(
        st.sampled_from(["missing", "a folder", "a pipe", "a dangling link", "/dev/zero", "/dev/null", "a loop"])
    )
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a pipe":
        os.mkfifo(file)
    elif how != "missing":
        target = {"a dangling link": "nowhere", "a loop": file.name}.get(how, how)
        file.symlink_to(target)
    return how


@st.composite
def _bytes(draw: st.DrawFn, file: Path) -> str:
    content = file.read_bytes()
    how = draw(st.sampled_from(["truncated", "flipped", "cut out", "doubled"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "truncated":
        content = content[:place]
    elif how == "flipped" and content:
        content = content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    elif how == "cut out":
        content = content[:place] + content[place + draw(st.integers(1, 64)) :]
    elif how == "doubled":
        content += content
    file.write_bytes(content)
    return f"{how} at {place}"
