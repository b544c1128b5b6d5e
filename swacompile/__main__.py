"""`python -m swacompile` is the command `swacompile`."""

from swacompile.cli import main

main()
