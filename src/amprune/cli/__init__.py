"""The command line. Heavy imports stay inside the commands, so that `--help` is instant.

options.py        the application, and the arguments and options that commands share
pruning.py        from a model to a smaller one
recovering.py     from a pruned model to a recovered one
measuring.py      what that cost and what it gained
experimenting.py  the paper's tables and figures
serving.py        to what serves a model
sharing.py        to the hub
"""

from amprune.cli import experimenting, measuring, pruning, recovering, serving, sharing
from amprune.cli.options import app

__all__ = ["app", "experimenting", "measuring", "pruning", "recovering", "serving", "sharing"]
