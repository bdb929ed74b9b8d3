"""Text that a model writes itself: half continuations of nothing, half chats of its own, drawn at temperature 1.

What a dense model says is what a pruned one has to learn again, so that its own text is the text for calibration and
distillation where there is no other (Yang et al., 2024, arXiv 2402.13669; Bandari et al., 2024, arXiv 2410.17711). A
chat begins with the user's turn, which the model writes as well, as in Magpie (Xu et al., 2024, arXiv 2406.08464).
"""

import hashlib
import inspect
import itertools
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from amprune.errors import CalibrationError
from amprune.model.loading import computing_dtype, device_of, load_tokenizer, loaded_model
from amprune.model.reader import Checkpoint, open_model
from amprune.model.source import cache_folder
from amprune.model.writer import check_target
from amprune.records import alone, read, write
from amprune.running import Progress, is_out_of_memory, no_progress, release_memory
from amprune.settings import Compute, PathLike, WritingTextSettings, settle
from amprune.text.files import Record
from amprune.text.tokens import start_token

logger = logging.getLogger(__name__)
LENGTH_ON_CPU, LENGTH = 256, 512
"""Tokens of a text at most; the longer, the dearer each, and the more on a CPU."""
_ROWS_ON_CPU, _ROWS = 64, 256
_SHORTEST = 8
"""Tokens below which a text is empty."""
_PACKED = 0.2
"""A text that zlib packs to less than this share of its bytes is a loop; prose comes to about a half."""
_DROPPED, _BATCHES = 0.9, 4
"""Where so many of the texts of so many batches are dropped, the model does not write."""
WriteBatch = Callable[[int], list[dict[str, Any]]]
"""Writes the batch of a number."""
_MARK = "\x02text\x03"


@dataclass
class Written:
    """What was written so far; kept beside the texts, so that a killed run is gone on with."""

    request: dict[str, Any]
    batches: int = 0
    bytes: int = 0
    """Of the file, up to the last whole batch."""
    texts: int = 0
    tokens: int = 0
    empty: int = 0
    """Texts that were dropped because they ended at once."""
    loops: int = 0
    """Texts that were dropped because they repeat themselves."""
    seconds: float = 0.0
    format: int = 1

    @property
    def dropped(self) -> float:
        """The share of texts that were dropped."""
        return (self.empty + self.loops) / max(1, self.texts + self.empty + self.loops)


@dataclass(frozen=True)
class Author:
    """The model that writes, and how."""

    dense: Checkpoint
    where: Compute = field(default_factory=Compute)
    seed: int = 0
    max_length: int | None = None
    batch_size: int | None = None
    trust_remote_code: bool = False
    progress: Progress = no_progress

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on a CPU."""
        return torch.device(device_of(self.where.device)).type == "cpu"

    @property
    def rows(self) -> int:
        """How many texts are written at a time."""
        return self.batch_size or (_ROWS_ON_CPU if self.on_cpu else _ROWS)

    @property
    def length(self) -> int:
        """How many tokens a text has at most."""
        wanted = self.max_length or (LENGTH_ON_CPU if self.on_cpu else LENGTH)
        return min(wanted, self.dense.positions or wanted)

    def request(self) -> dict[str, Any]:
        """Returns what decides the texts."""
        config = hashlib.sha256(json.dumps(self.dense.config, sort_keys=True).encode()).hexdigest()
        return {
            "model": self.dense.fingerprint, "config": config, "seed": self.seed, "max_length": self.length,
            "batch_size": self.rows, "dtype": str(computing_dtype(self.dense, self.where)).removeprefix("torch."),
            "device": torch.device(device_of(self.where.device)).type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip

    def records(self, tokens: float) -> Iterator[Record]:
        """Yields texts, those of earlier runs first, which are kept in the cache; `tokens` are wanted, about."""
        name = hashlib.sha256(json.dumps(self.request(), sort_keys=True).encode()).hexdigest()[:16]
        file = cache_folder() / "own-text" / f"{name}.jsonl"
        yield from written(file, self, tokens)


def write_text(
    model: PathLike, output: PathLike, settings: WritingTextSettings | None = None, *, progress: Progress = no_progress,
    **options: Any,
) -> Written:  # fmt: skip
    """Lets a model write a set of texts, which `--data` and `--calibration` read like any file.

    The texts are the same for the same seed, batch size, dtype and device. A run that was killed is gone on with by the
    same call.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        output: the `.jsonl` file to write, a text with its number of tokens a line; beside it a record, `OUT.json`.
        settings: what is asked for.
        progress: told how far it is.
        options: of `WritingTextSettings`, such as `tokens="1M"`.

    Raises:
        CalibrationError: the model writes loops, or the number of tokens makes no sense.
        CheckpointError: the model cannot be read, or the file not written.
    """
    asked, file = settle(WritingTextSettings, settings, options), Path(output).expanduser()
    tokens = _amount(asked.tokens)
    if file.suffix != ".jsonl":
        raise CalibrationError(f"the texts go to a file of JSON lines, but {file} is not named .jsonl")
    source, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    check_target(file, source.protected)
    record = _record_of(file)
    author = Author(
        dense, Compute(device=asked.device, dtype=asked.dtype), asked.seed, asked.max_length, asked.batch_size,
        asked.trust_remote_code, progress,
    )  # fmt: skip
    if file.exists() and not asked.overwrite:
        raise CalibrationError(f"{file} exists; choose another file, or give --overwrite")
    partial = file.with_name(f"{file.name}.partial")
    count = 0
    for _, text in written(partial, author, tokens):
        if (count := count + int(text["tokens"])) >= tokens:
            break
    found = _read(partial, author)
    partial.replace(file)
    _record_of(partial).replace(record)
    return found


def written(file: Path, author: Author, tokens: float) -> Iterator[Record]:
    """Yields the texts of a file, and then those that are written behind them, batch by batch, without an end."""
    so_far, numbers = _read(file, author), itertools.count(1)
    for text in _texts(file, 0, so_far.bytes):
        yield f"text {next(numbers)}", text
    with alone(file.with_name(f"{file.name}.lock"), str(file), error=CalibrationError):
        there, so_far = so_far.bytes, _read(file, author)
        for text in _texts(file, there, so_far.bytes):  # of another run meanwhile
            yield f"text {next(numbers)}", text
        left = max(0.0, tokens - so_far.tokens)
        logger.info("%s tokens of own text are written, and kept in %s", f"{left:,.0f}", file)
        with _writer(author) as write_batch, author.progress("Writing", round(min(left, 1e12))) as advance:
            while True:
                for text in _next_batch(file, write_batch, so_far):
                    advance(text["tokens"])
                    yield f"text {next(numbers)}", text


def _texts(file: Path, start: int, end: int) -> Iterator[dict[str, Any]]:
    """Yields the texts of a part of a file."""
    if end > start:
        with file.open("rb") as lines:
            lines.seek(start)
            content = lines.read(end - start).decode("utf-8")
        yield from map(json.loads, filter(None, content.split("\n")))


def _next_batch(file: Path, write_batch: WriteBatch, so_far: Written) -> list[dict[str, Any]]:
    """Writes a batch behind the others, and returns those of its texts that are kept."""
    start = time.perf_counter()
    batch = write_batch(so_far.batches)
    kept = [text for text in batch if not _is_empty(text) and not _is_loop(text)]
    so_far.empty += sum(map(_is_empty, batch))
    so_far.loops += sum(_is_loop(text) and not _is_empty(text) for text in batch)
    so_far.seconds += time.perf_counter() - start
    _append(file, kept, so_far)
    _check(so_far, file)
    return kept


def _append(file: Path, texts: Sequence[dict[str, Any]], so_far: Written) -> None:
    """Writes the texts of a batch, and then that they are whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts).encode("utf-8", "replace")
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.truncate(so_far.bytes)  # what a killed run wrote of a batch
        stream.seek(so_far.bytes)
        stream.write(content)
    so_far.batches += 1
    so_far.bytes += len(content)
    so_far.texts += len(texts)
    so_far.tokens += sum(text["tokens"] for text in texts)
    write(_record_of(file), asdict(so_far))


def _check(so_far: Written, file: Path) -> None:
    if so_far.batches >= _BATCHES and so_far.dropped >= _DROPPED:
        raise CalibrationError(
            f"the model writes no text: of {so_far.texts + so_far.empty + so_far.loops} texts {so_far.loops} are loops "
            f"and {so_far.empty} empty; give a file or a set as --data or --calibration instead (see {file})"
        )


def _read(file: Path, author: Author) -> Written:
    """Returns what a file holds that was written on the same request, else nothing."""
    if not (record := _record_of(file)).is_file() or not file.is_file():
        return Written(author.request())
    found = read(Written, record, error=CalibrationError, remedy=f"remove it and {file}", format=1)
    if found.request != author.request():
        logger.info("%s was written on another request, and is written anew", file)
        return Written(author.request())
    if file.stat().st_size < found.bytes:
        raise CalibrationError(f"{file} has lost some of its texts; remove it and {record}")
    return found


def _record_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _is_empty(text: dict[str, Any]) -> bool:
    return text["tokens"] < _SHORTEST or not text["text"].strip()


def _is_loop(text: dict[str, Any]) -> bool:
    content = text["text"].encode("utf-8", "replace")
    return len(zlib.compress(content)) < _PACKED * len(content)


def _amount(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kKmM]?)", str(text).strip().replace("_", ""))
    value = 0 if found is None else int(float(found[1]) * {"": 1, "k": 1000, "m": 1_000_000}[found[2].lower()])
    if value < 1:
        raise CalibrationError(f"--tokens is {text!r}, expected a number such as 200000, 200k or 1M")
    return value


# How a batch is written.


@dataclass(frozen=True)
class _Openings:
    """With what texts begin, and what stands between the user's turn and the answer."""

    plain: list[int]
    chat: list[int]
    between: list[int]
    ends: frozenset[int]
    start: int | None


@contextmanager
def _writer(author: Author) -> Iterator[WriteBatch]:
    """Yields a function that writes the batch of a number: even ones plain text, odd ones chats."""
    tokenizer = load_tokenizer(author.dense.folder, trust_remote_code=author.trust_remote_code)
    dtype = str(computing_dtype(author.dense, author.where)).removeprefix("torch.")
    with loaded_model(author.dense, dtype=dtype, device=author.where.device) as model:
        if author.on_cpu and dtype != "float32":  # whose fused attention is slow for single tokens
            model.set_attn_implementation("eager")
        openings = _openings(tokenizer, model)

        def write_batch(number: int) -> list[dict[str, Any]]:
            chat = bool(openings.chat) and number % 2 == 1
            rows = _rows(model, openings, author, number, author.length, chat=chat)
            kind = "chat" if chat else "plain"
            return [{**_text(row, tokenizer, openings), "kind": kind, "batch": number} for row in rows]

        yield write_batch


def _openings(tokenizer: Any, model: Any) -> _Openings:
    start, (before, after) = start_token(tokenizer), _around_the_user(tokenizer)
    plain = [_first_token(tokenizer, before + after) if start is None else start]
    stated = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])} - {None}
    chat, between = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    if not between or not chat:
        chat = between = []
    return _Openings(plain, chat, between, frozenset(ends), start)


def _first_token(tokenizer: Any, chat: str) -> int:
    """Returns what comes before a text where the tokenizer puts nothing: a special token that no chat is marked by."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    known = [token for name in names if (token := getattr(tokenizer, name, None)) is not None]
    found = next((token for token in known if token not in chat), known[0] if known else None)
    return 0 if found is None else int(tokenizer.convert_tokens_to_ids(found))


def _around_the_user(tokenizer: Any) -> tuple[str, str]:
    """Returns what the chat template puts before and after what a user says; nothing where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", ""
    turn = [{"role": "user", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise what they like
        logger.warning("the chat template refuses a user's turn (%s); all texts are plain", error)
        return "", ""
    before, mark, after = text.partition(_MARK)
    return (before, after) if mark else ("", "")


def _text(row: list[int], tokenizer: Any, openings: _Openings) -> dict[str, Any]:
    """Returns a text without the start token before it and the end token behind it, which reading adds again."""
    ids = row[1:] if row[:1] == [openings.start] or row[:1] == openings.plain != openings.chat[:1] else row
    ids = ids[:-1] if ids and ids[-1] in openings.ends else ids
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"text": text, "tokens": len(ids)}


def _rows(model: Any, openings: _Openings, author: Author, number: int, length: int, *, chat: bool) -> list[list[int]]:
    """Writes a batch, a part of it at a time where memory is short."""
    opening, rows = (openings.chat if chat else openings.plain), author.rows
    draw = torch.Generator(device=model.device).manual_seed(author.seed * 2**24 + number)
    done: list[list[int]] = []
    most = rows
    while len(done) < rows:
        count = min(most, rows - len(done))
        try:
            done += _sampled(model, opening, openings, count, max(1, length - len(opening)), draw, chat=chat)
        except Exception as error:
            if not is_out_of_memory(error) or most == 1:
                raise
            most //= 2
            logger.warning("%d texts at a time do not fit the memory; going on with %d", count, most)
            release_memory()
    return done


@torch.inference_mode()
def _sampled(
    model: Any, opening: list[int], openings: _Openings, rows: int, length: int, draw: torch.Generator, *, chat: bool
) -> list[list[int]]:
    """Draws token after token of all rows, until each has ended or is long enough."""
    accepted = inspect.signature(model.forward).parameters
    cache = transformers.DynamicCache(config=model.config)
    options = {"use_cache": True, ("cache" if "cache" in accepted else "past_key_values"): cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    texts = [_Row(list(opening), list(openings.between) if chat else None) for _ in range(rows)]
    live, ids = texts, torch.tensor([opening] * rows, device=model.device)
    for _ in range(length):
        chances = model(input_ids=ids, **options).logits[:, -1].float().softmax(-1)
        drawn = _drawn(chances, draw).tolist()
        ids = torch.tensor([[row.take(token, openings.ends)] for row, token in zip(live, drawn, strict=True)])
        going = [index for index, row in enumerate(live) if not row.ended]
        if not going:
            break
        if len(going) < 7 / 8 * len(live):  # no time is spent on rows that have ended
            kept = torch.tensor(going)
            cache.batch_select_indices(kept.to(model.device))
            live, ids = [live[index] for index in going], ids[kept]
        ids = ids.to(model.device)
    return [row.ids for row in texts]


def _drawn(chances: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Draws an index a row; `torch.multinomial` takes a random number for every token of the vocabulary."""
    sums = chances.double().cumsum(-1)
    at = torch.rand(len(sums), 1, generator=draw, dtype=torch.float64, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)


@dataclass
class _Row:
    """A text that is being written."""

    ids: list[int]
    between: list[int] | None
    """Of a chat whose user still speaks: what comes before the answer."""
    forced: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, ends: frozenset[int]) -> int:
        """Adds the token that was drawn, or what has to stand there; returns it."""
        if self.ended:
            return token
        if self.forced:
            token = self.forced.pop(0)
        elif self.between and token == self.between[0]:
            self.forced, self.between = self.between[1:], None
        elif token in ends:
            self.ended = True
        self.ids.append(token)
        return token
