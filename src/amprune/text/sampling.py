"""How a model writes: batches of texts from nothing, token by token, half of them plain and half chats with itself."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache

from amprune.errors import CalibrationError
from amprune.model.loading import input_device
from amprune.model.reader import Checkpoint
from amprune.records import read_object
from amprune.running import Advance
from amprune.text.tokens import start_token, started

logger = logging.getLogger(__name__)

Kind = Literal["plain", "chat"]
_MARKER = "Xq7marker"
"""Stands for what a user says where the chat template is asked what it puts around it."""
_SEPARATOR = "<|endoftext|>"
"""What many tokenizers part the texts of their training by, although they put it before none."""
_ROOM = 16
"""A chat needs so many tokens beside what its template writes."""
_ENDED = 8
"""Where more than one row in so many has ended, these are taken out of the batch."""


@dataclass(frozen=True)
class Openings:
    """What a model is given to go on from, as token ids."""

    plain: int
    chat: tuple[int, ...]
    """All that comes before what a user says; empty where the tokenizer has no chat template of use."""
    after: tuple[int, ...]
    """All that comes between what a user says and the answer."""
    ends: frozenset[int]

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the texts, as JSON has it."""
        return {"plain": self.plain, "chat": [*self.chat], "after": [*self.after], "ends": sorted(self.ends)}


@dataclass
class Row:
    """A text while it is written."""

    kind: Kind
    ids: list[int]
    forced: list[int]
    """What comes next, whatever the model would say."""
    asking: bool
    """Whether it is still the user's turn of a chat."""
    written: list[int] = field(default_factory=list)
    """What the model said, without its ends."""
    ended: bool = False

    def take(self, drawn: int, openings: Openings) -> int:
        """Returns the token that comes next: that which was drawn, unless another is due."""
        if self.ended:
            return drawn
        token = self.forced.pop(0) if (due := bool(self.forced)) else drawn
        self.ids.append(token)
        if due:
            return token
        if self.asking and token == openings.after[0]:
            self.asking, self.forced = False, [*openings.after[1:]]
        elif token in openings.ends:
            self.ended = True
        else:
            self.written.append(token)
        return token


def find_openings(dense: Checkpoint, tokenizer: Any, length: int) -> Openings:
    """Asks tokenizer, chat template and configuration of a model how its texts begin and end."""
    start = start_token(tokenizer)
    before, after = _around_the_user(tokenizer)
    plain = _separator(tokenizer) if start is None else start
    chat, between = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    if not chat or not between or len(chat) + len(between) + _ROOM > length:
        logger.info("the tokenizer has no chat template to begin a chat by; all texts are plain")
        chat, between = [], []
    stated = [dense.config.get("eos_token_id"), tokenizer.eos_token_id, plain]
    if (file := dense.folder / "generation_config.json").is_file():
        stated.append(read_object(file).get("eos_token_id"))
    ends = {one for value in stated for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return Openings(plain, tuple(started(chat, start) if chat else ()), tuple(between), frozenset(ends))


def _separator(tokenizer: Any) -> int:
    """Returns the token that parts texts, for a tokenizer that puts none before them."""
    known = tokenizer.get_added_vocab()
    for found in (known.get(_SEPARATOR), tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise CalibrationError(
        "the tokenizer has neither a start nor an end token, from which a text could begin; give another source of "
        "text than self"
    )


def _around_the_user(tokenizer: Any) -> tuple[str, str]:
    """Returns what a chat template puts before and after the first thing that a user says, or nothing."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", ""
    turn = [{"role": "user", "content": _MARKER}]
    try:
        text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise what they like
        logger.warning("the chat template refuses a user's turn (%s); all texts are plain", error)
        return "", ""
    before, _, after = text.partition(_MARKER)
    return (before, after) if text.count(_MARKER) == 1 else ("", "")


@torch.inference_mode()
def sample_batch(
    model: Any, openings: Openings, count: int, length: int, seed: int, advance: Advance
) -> list[Row]:  # fmt: skip
    """Writes texts of at most `length` tokens at temperature 1 from the whole vocabulary; the same for a seed.

    Plain texts and chats take turns. Every row begins with its first token alone, and the rest of its opening is put in
    the place of what is drawn, so that no row is padded. `advance` is told the tokens as they come.
    """
    device = input_device(model)
    if device.type == "cpu" and model.dtype != torch.float32:  # whose fused kernel takes twice as long for one query
        model.set_attn_implementation("eager")
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = [_row(openings, "chat" if openings.chat and number % 2 else "plain") for number in range(count)]
    active, tokens = rows, [row.ids[0] for row in rows]
    cache = DynamicCache(config=model.config)
    kept: Any = {_cache_name(model): cache, "use_cache": True}
    for place in range(1, length):
        current = torch.tensor(tokens, device=device)[:, None]
        seen = torch.ones(len(active), place, dtype=torch.long, device=device)
        found = model(input_ids=current, attention_mask=seen, **kept)
        logits = found.logits[:, -1].to(device, torch.float32)
        if not bool(logits.isfinite().all()):
            raise CalibrationError(
                "the model's logits are not finite, so that it cannot write text; give --dtype float32, or check the "
                "checkpoint"
            )
        drawn = _drawn(logits.softmax(-1), generator).tolist()
        tokens = [row.take(token, openings) for row, token in zip(active, drawn, strict=True)]
        going = [number for number, row in enumerate(active) if not row.ended]
        advance(len(going))
        if not going:
            break
        if _ENDED * (len(active) - len(going)) > len(active):
            cache.batch_select_indices(torch.tensor(going))
            active, tokens = [active[number] for number in going], [tokens[number] for number in going]
    return rows


def _drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws an index a row; `torch.multinomial` takes a random number for every token of the vocabulary."""
    sums = chances.double().cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)


def _cache_name(model: Any) -> str:
    """Returns what a model calls its cache of keys and values: transformers renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _row(openings: Openings, kind: Kind) -> Row:
    opening = openings.chat if kind == "chat" else (openings.plain,)
    return Row(kind, [opening[0]], [*opening[1:]], asking=kind == "chat")


def text_of(row: Row, tokenizer: Any, openings: Openings) -> dict[str, Any]:
    """Returns a text as a record, whose reader puts the start token before it, and the tokenizer's end token after it.

    All other special tokens stay in the text.
    """
    start, ids = start_token(tokenizer), row.ids
    if row.kind == "plain" or ids[0] == start:
        ids = ids[1:]
    if row.ended and ids and ids[-1] in (tokenizer.eos_token_id, openings.plain):
        ids = ids[:-1]
    text = _decoded(tokenizer, ids)
    read = started(tokenizer(text, verbose=False)["input_ids"], start)
    return {"text": text, "kind": row.kind, "tokens": len(read)}


def words_of(row: Row, tokenizer: Any) -> str:
    """Returns what the model said itself, without the template's words around it."""
    return _decoded(tokenizer, row.written)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def line_of(record: Mapping[str, Any]) -> str:
    """Returns a record as a line of a file."""
    return json.dumps(record, ensure_ascii=False) + "\n"
