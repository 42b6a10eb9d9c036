"""``python -m lcray``: the command line."""

from lcray.cli import main

main()
