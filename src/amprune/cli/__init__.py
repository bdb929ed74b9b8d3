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

from amprune.cli import experimenting, measuring, pruning, recovering, serving
from amprune.cli.options import app

__all__ = ["app", "experimenting", "measuring", "pruning", "recovering", "serving"]
