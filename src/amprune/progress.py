"""How long work reports how far it is, without knowing who watches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""`with progress("Scoring", total) as advance:` and then `advance(steps)` as work gets done."""


@contextmanager
def no_progress(description: str, total: int) -> Iterator[Advance]:
    """Watches nothing."""
    yield lambda steps: None
