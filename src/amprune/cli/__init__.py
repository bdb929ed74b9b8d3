"""The command line. Heavy imports stay inside the commands, so that `--help` is instant.

options.py        the application, and how a function becomes a command
pruning.py        from a model to a smaller one
recovering.py     from a pruned model to a recovered one
measuring.py      what that cost and what it gained
experimenting.py  the paper's tables and figures
serving.py        to what serves a model, and to the hub
display.py        what is shown
demo.py           the demonstration
"""

import gc
import sys

from amprune.cli import experimenting, measuring, pruning, recovering, serving
from amprune.cli.options import app

__all__ = ["app", "experimenting", "main", "measuring", "pruning", "recovering", "serving"]

_PRUNING = ("demo", "inspect", "score", "plan", "apply", "verify", "prune")


def main() -> None:
    """Runs the command line in a process of its own, which starts as fast as it can."""
    gc.set_threshold(100_000)  # imports make millions of objects that stay; memory is handed back by running.py
    if sys.argv[1:2] and sys.argv[1] in _PRUNING:
        # Where they are installed, transformers imports them with any model; pruning needs neither.
        sys.modules.update({"torchao": None, "scipy": None})  # type: ignore[dict-item]  # None halts an import
    app()
