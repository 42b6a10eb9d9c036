"""``python -m lcray``: the command line."""

from lcray.cli.app import main

main()
