"""`python -m amprune`."""

from amprune.cli import app

app()
