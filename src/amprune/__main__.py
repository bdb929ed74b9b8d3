"""`python -m amprune`."""

from amprune.cli.options import app

app()
