"""``python -m lcray``: the command line."""

from __future__ import annotations

from lcray.cli.signals import leave_at_once


def main() -> None:
    """Run the command line; a signal while it loads ends it in a line."""
    leave_at_once()
    from lcray.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
