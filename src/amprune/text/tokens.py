"""Rows of token ids: each begins with the token that the tokenizer begins a text with.

Models that were trained with a start token before every text are far worse without one (docs/evaluation.md).
"""

from collections.abc import Iterator, Sequence
from typing import Any


def start_token(tokenizer: Any) -> int | None:
    """Returns the token id that a tokenizer puts before a text; None where it puts none there."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    return None if not whole or whole[:1] == plain[:1] else int(whole[0])


def spans(ids: Sequence[int], length: int, start: int | None) -> Iterator[tuple[list[int], slice]]:
    """Cuts ids into rows of `length`, the last of what is left: yields what comes before a row, and its part of `ids`.

    Before a row comes the start token, unless the part begins with it.
    """
    at = 0
    while at < len(ids):
        head = [] if start is None or ids[at] == start else [start]
        yield head, slice(at, at := min(len(ids), at + max(1, length - len(head))))


def started(ids: Sequence[int], start: int | None) -> list[int]:
    """Returns a text's ids with the start token before them, where they lack it."""
    return [*ids] if start is None or ids[:1] == [start] else [start, *ids]
