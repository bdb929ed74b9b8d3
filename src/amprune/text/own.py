"""Text that the dense model writes itself, as a file that is written batch by batch and gone on with.

A batch is made by its number and the seed alone, so that it can be made again: a longer set begins with the shorter.
Beside the file lies a record of what it holds, renewed after every batch; what stands in the file beyond it is half a
batch of a process that was killed.
"""

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from amprune.errors import CalibrationError, CheckpointError
from amprune.model.loading import computing_dtype, device_of, load_tokenizer, loaded_model
from amprune.model.reader import Checkpoint, open_model
from amprune.model.source import cache_folder
from amprune.model.writer import check_file
from amprune.records import Count, Figure, Whole, alone, changes, read, write
from amprune.running import Advance, Progress, no_progress, out_of_memory, release_memory
from amprune.settings import Compute, PathLike, WritingTextSettings, settle
from amprune.text.files import Record, json_lines
from amprune.text.sampling import Openings, Row, find_openings, line_of, sample_batch, text_of, words_of
from amprune.text.sources import Amount

logger = logging.getLogger(__name__)

_LENGTH_ON_CPU, _LENGTH = 256, 512
"""Tokens of a text; the longer, the dearer each, and the more so on a CPU."""
_ROWS_ON_CPU, _ROWS = 64, 1024
_SHARE = 0.25
"""Of a device's memory, which keys and values may take."""
_SHORTEST = 8
"""A text of which the model wrote fewer tokens is dropped."""
_LOOP = 0.25
"""A text that zlib packs to less of its bytes is a loop: prose comes to about half of them, programs to a third."""
_ENOUGH_BATCHES, _MOST_DROPPED = 4, 0.9


@dataclass(frozen=True)
class WrittenText:
    """What a file of written text holds; its record beside it."""

    model: str
    request: dict[str, Any]
    """All that decides the texts."""
    format: int = 1
    batches: Whole = 0
    bytes: Whole = 0
    """Of the file, as far as it is whole."""
    texts: Whole = 0
    chats: Whole = 0
    tokens: Whole = 0
    """As they are read: with start tokens, and without the end tokens that a training puts behind them."""
    empty: Whole = 0
    """Texts that were dropped because the model ended them at once."""
    loops: Whole = 0
    """Texts that were dropped because they say the same again and again."""
    seconds: Figure = 0.0

    @property
    def tokens_per_second(self) -> float:
        """How fast it was written, texts that were dropped counted as time alone."""
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0

    def dropped(self, count: int) -> float:
        """Returns which share of all texts a number of them is."""
        return count / max(1, self.texts + self.empty + self.loops)

    def to_dict(self) -> dict[str, Any]:
        """Returns what the record keeps."""
        shares = {"empty": round(self.dropped(self.empty), 4), "loops": round(self.dropped(self.loops), 4)}
        return {**asdict(self), "dropped": shares, "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class _Author:
    """Who writes, and how."""

    name: str
    dense: Checkpoint
    tokenizer: Any
    openings: Openings
    where: Compute
    seed: int
    length: Count
    rows: Count

    @property
    def dtype(self) -> str:
        return str(computing_dtype(self.dense, self.where)).removeprefix("torch.")

    def request(self) -> dict[str, Any]:
        """Returns all that decides the texts."""
        config = hashlib.sha256(json.dumps(self.dense.config, sort_keys=True).encode()).hexdigest()
        return {
            "fingerprint": self.dense.fingerprint, "config": config, "openings": self.openings.to_dict(),
            "seed": self.seed, "max_length": self.length, "batch_size": self.rows, "dtype": self.dtype,
            "device": torch.device(device_of(self.where.device)).type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip


def _author(dense: Checkpoint, tokenizer: Any, asked: WritingTextSettings, where: Compute, name: str) -> _Author:
    on_cpu = torch.device(device_of(where.device)).type == "cpu"
    length = asked.max_length or (_LENGTH_ON_CPU if on_cpu else _LENGTH)
    length = min(length, dense.positions or length)
    rows = asked.batch_size
    if rows is None:
        rows = _ROWS_ON_CPU if on_cpu else _rows_in_memory(dense, length, where)
    for option, value, least in (("max_length", length, 2), ("batch_size", rows, 1)):
        if value < least:
            raise CalibrationError(f"{option} is {value}, expected at least {least}")
    return _Author(name, dense, tokenizer, find_openings(dense, tokenizer, length), where, asked.seed, length, rows)


def _rows_in_memory(dense: Checkpoint, length: int, where: Compute) -> int:
    """Returns how many texts an accelerator writes at a time, so that the same device always writes the same."""
    shape, device = dense.shape, torch.device(device_of(where.device))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**33
    row = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * length * 2
    return max(16, min(_ROWS, 1 << max(0, int(_SHARE * memory / row).bit_length() - 1)))


def write_text(
    model: PathLike, output: PathLike, settings: WritingTextSettings | None = None, *,
    progress: Progress = no_progress, **options: Any,
) -> WrittenText:  # fmt: skip
    """Lets a model write text of its own, a set for `--data` and `--calibration`; goes on where it was interrupted.

    Half are continuations of nothing, half chats in which the model writes both the user's words and the answer.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        output: the file to write, `.jsonl`; its record lies beside it, as `OUT.json`. Until both are whole, they are
            called `OUT.partial` and `OUT.partial.json`.
        settings: how much is written, and how.
        progress: told how far it is.
        options: of `WritingTextSettings`, such as `tokens="200k"`.

    Raises:
        CalibrationError: options make no sense, or nine tenths of what the model writes is no text.
        CheckpointError: the model cannot be read, or OUT not written.
    """
    asked, file = settle(WritingTextSettings, settings, options), Path(output).expanduser()
    amount = Amount(tokens=_count(asked.tokens))
    if file.suffix != ".jsonl":
        raise CalibrationError(f"OUT is {file}, expected a file that ends in .jsonl, by which it is read as what it is")
    source, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    for one in (file, _record(file)):
        check_file(one, overwrite=asked.overwrite, protected=source.protected)
    tokenizer = load_tokenizer(dense.folder, trust_remote_code=asked.trust_remote_code)
    author = _author(dense, tokenizer, asked, Compute(device=asked.device, dtype=asked.dtype), source.name)
    partial = file.with_name(f"{file.name}.partial")
    with alone(partial.with_name(f"{partial.name}.lock"), str(file)):
        so_far = _begun(partial, author, overwrite=asked.overwrite)
        try:
            written = _extended(partial, so_far, author, amount, progress)
        except CalibrationError:  # nothing that could be gone on with
            partial.unlink(missing_ok=True)
            _record(partial).unlink(missing_ok=True)
            raise
        partial.replace(file)
        _record(partial).replace(_record(file))
    return written


def own_records(
    dense: Checkpoint, tokenizer: Any, amount: Amount, *, seed: int, where: Compute, max_length: int,
    progress: Progress = no_progress,
) -> list[Record]:  # fmt: skip
    """Returns so much text of a model's own, from the cache, after writing there what it lacks.

    Texts are no longer than `max_length`, at which the reader would cut them.
    """
    author = _author(dense, tokenizer, WritingTextSettings(seed=seed), where, dense.folder.name)
    if author.length > max_length:
        author = _author(dense, tokenizer, WritingTextSettings(seed=seed, max_length=max_length), where, author.name)
    key = hashlib.sha256(json.dumps(author.request(), sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "own-text" / f"{key[:32]}.jsonl"
    so_far = _so_far(file, author)
    if not amount.met_by(so_far.texts, so_far.tokens):
        with alone(file.with_name(f"{file.name}.lock"), f"the model's own text, {file},"):
            so_far = _extended(file, _so_far(file, author), author, amount, progress)
    return _first(file, so_far, amount)


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _so_far(file: Path, author: _Author) -> WrittenText:
    """Reads what a file holds; nothing where there is none."""
    if not (record := _record(file)).is_file():
        return WrittenText(author.name, author.request())
    remedy = f"remove it and {file.name}, which are written anew then"
    found = read(WrittenText, record, error=CheckpointError, remedy=remedy)
    if found.bytes and (not file.is_file() or file.stat().st_size < found.bytes):
        raise CheckpointError(f"{file} is missing or shorter than {record.name} says; {remedy}")
    return found


def _begun(partial: Path, author: _Author, *, overwrite: bool) -> WrittenText:
    """Finds what an interrupted run of the same request has written, or begins anew where nothing is in the way."""
    if partial.exists() and not _record(partial).is_file():
        raise CheckpointError(f"{partial} is in the way and was not made by amprune; move it and run again")
    so_far, now = _so_far(partial, author), author.request()
    if otherwise := changes(so_far.request, now):
        if not overwrite:
            raise CheckpointError(
                f"{_record(partial)} tells of an interrupted run that was asked for with another "
                f"{', '.join(otherwise)}; ask for the same again, or give --overwrite to start anew"
            )
        so_far = WrittenText(author.name, now)
    if so_far.batches:
        logger.info("going on with %s, which holds %s tokens", partial, f"{so_far.tokens:,}")
    return so_far


def _extended(
    file: Path, so_far: WrittenText, author: _Author, amount: Amount, progress: Progress
) -> WrittenText:  # fmt: skip
    """Writes batch after batch until there is enough; each is whole in the file before the next is begun."""
    _check_worth(so_far)
    if amount.met_by(so_far.texts, so_far.tokens):
        return so_far
    left = amount.less(so_far.texts, so_far.tokens)
    wanted = left.tokens if left.tokens is not None else (left.samples or 0) * author.length
    file.parent.mkdir(parents=True, exist_ok=True)
    write(_record(file), so_far.to_dict())
    place = (
        {"device": author.where.device} if author.where.device_map is None else {"device_map": author.where.device_map}
    )
    rows = author.rows
    with loaded_model(author.dense, dtype=author.dtype, **place) as model, progress("Writing text", wanted) as advance:
        told = _telling(advance, wanted, rows * author.length, file)
        while not amount.met_by(so_far.texts, so_far.tokens):
            start = time.perf_counter()
            batch, rows = _batch(model, author, so_far.batches, rows, told)
            kept = [_text(row, author, so_far.batches) for row in batch[0]]
            so_far = _kept(file, so_far, kept, *batch[1:], time.perf_counter() - start)
            _check_worth(so_far)
    if so_far.empty + so_far.loops:
        logger.info(
            "of the texts that the model wrote, %.1f %% are dropped as empty and %.1f %% as loops",
            100 * so_far.dropped(so_far.empty), 100 * so_far.dropped(so_far.loops),
        )  # fmt: skip
    return so_far


def _batch(
    model: Any, author: _Author, number: int, rows: int, advance: Advance
) -> tuple[tuple[list[Row], int, int], int]:
    """Writes one batch: the texts worth keeping, how many are empty and loops, and how many texts fit at a time."""
    seed = int.from_bytes(hashlib.sha256(f"{author.seed} {number}".encode()).digest()[:7], "big")
    while True:
        try:
            found = sample_batch(model, author.openings, rows, author.length, seed, advance)
            break
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not out_of_memory(error):
                raise
        rows //= 2  # outside the handler, whose traceback would keep the cache alive
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory; going on with %d texts at a time, which are not those of larger batches", rows)
    said = [(row, words_of(row, author.tokenizer)) for row in found]
    full = [(row, words) for row, words in said if len(row.written) >= _SHORTEST and words.strip()]
    kept = [row for row, words in full if not is_loop(words)]
    return (kept, len(said) - len(full), len(full) - len(kept)), rows


def _text(row: Row, author: _Author, batch: int) -> dict[str, Any]:
    """Returns a text as its line has it; the tokenizer may read more tokens than the model wrote, which are cut."""
    found = text_of(row, author.tokenizer, author.openings)
    return {**found, "tokens": min(found["tokens"], author.length), "batch": batch}


def is_loop(words: str) -> bool:
    """Tells whether a text says the same again and again: zlib packs it to less than a quarter of its bytes."""
    content = words.encode(errors="replace")
    return len(zlib.compress(content, 9)) < _LOOP * len(content)


def _kept(
    file: Path, so_far: WrittenText, texts: Sequence[dict[str, Any]], empty: int, loops: int, seconds: float
) -> WrittenText:
    """Writes the texts of a batch behind those before it, and then the record."""
    content = "".join(map(line_of, texts)).encode(errors="replace")
    with file.open("ab") as stream:
        stream.truncate(so_far.bytes)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    now = replace(
        so_far, batches=so_far.batches + 1, bytes=so_far.bytes + len(content), texts=so_far.texts + len(texts),
        chats=so_far.chats + sum(text["kind"] == "chat" for text in texts), empty=so_far.empty + empty,
        tokens=so_far.tokens + sum(text["tokens"] for text in texts), loops=so_far.loops + loops,
        seconds=round(so_far.seconds + seconds, 3),
    )  # fmt: skip
    write(_record(file), now.to_dict())
    return now


def _check_worth(so_far: WrittenText) -> None:
    """Refuses a model that writes no text."""
    gone = so_far.dropped(so_far.empty + so_far.loops)
    if so_far.batches >= _ENOUGH_BATCHES and gone >= _MOST_DROPPED:
        raise CalibrationError(
            f"of {so_far.texts + so_far.empty + so_far.loops} texts that {so_far.model} wrote, {so_far.loops} say the "
            f"same again and again and {so_far.empty} are empty, {gone:.0%} in all; text of its own is of no use: give "
            "another source of text, such as mixed or a file"
        )


def _telling(advance: Advance, wanted: int, batch: int, file: Path) -> Advance:
    """Passes on how far it is; says once, when a third of the first batch is written, how long it will take."""
    start, done, told, whole = time.perf_counter(), 0, False, -(-wanted // batch) * batch

    def step(tokens: int) -> None:
        nonlocal done, told
        advance(tokens)
        done += tokens
        if not told and 3 * done >= batch:
            told, seconds = True, whole * (time.perf_counter() - start) / done
            time_left = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
            logger.info("the model writes about %s tokens of its own text, which takes about %s; they are kept in %s",
                        f"{whole:,}", time_left, file)  # fmt: skip

    return step


def _first(file: Path, so_far: WrittenText, amount: Amount) -> list[Record]:
    """Reads the first texts of a file, as many as are wanted."""
    with file.open("rb") as stream:
        every = json_lines(stream.read(so_far.bytes).decode(), str(file))
    found, tokens = list[Record](), 0
    for place, text in every:
        if amount.met_by(len(found), tokens):
            break
        found.append((place, text))
        tokens += int(text["tokens"])
    return found


def _count(tokens: int | str) -> int:
    """Reads a number of tokens such as 200k or 1M."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([km]?)", str(tokens).strip().lower().replace("_", ""))
    value = int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6}[found[2]]) if found else 0
    if value < 1:
        raise CalibrationError(f"tokens is {tokens!r}, expected a number such as 200000, 200k or 1M")
    return value
