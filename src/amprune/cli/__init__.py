"""The command line. Heavy imports stay inside the commands, so that `--help` is instant.

options.py   the application, how a function becomes a command, and how it says what goes wrong
commands.py  every command, in the order of the data's way
display.py   what is shown
demo.py      the demonstration
"""

import gc
import signal
import sys

from amprune.cli import commands
from amprune.cli.options import app

__all__ = ["app", "commands", "main"]

_PRUNING = ("demo", "inspect", "score", "plan", "apply", "verify", "prune")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line in a process of its own, which starts as fast as it can."""
    signal.signal(signal.SIGTERM, _interrupt)  # what is half-done goes as it does after ctrl-C
    gc.set_threshold(100_000)  # imports make millions of objects that stay; memory is handed back by running.py
    if sys.argv[1:2] and sys.argv[1] in _PRUNING:
        # Where they are installed, transformers imports them with any model; pruning needs neither.
        sys.modules.update({"torchao": None, "scipy": None})  # type: ignore[dict-item]  # None halts an import
    app()
