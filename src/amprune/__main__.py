"""`python -m amprune`."""

from amprune.cli import main

main()
