"""Processes that play a role: a JSON object a line in, one out.

``Player`` is the side that asks; run as a module, this file is the side that answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from .suite import ROOT


class Player:
    """A process that holds an object and calls its methods; use as a context manager.

    Args:
        role: ``module:class`` of the object; a module's name alone is one of this package's.
        environment: variables to set; None unsets one.
        **arguments: of the class; JSON values, as are the arguments of the methods and the answers.
    """

    def __init__(
        self, role: str, environment: Mapping[str, str | None] | None = None, **arguments: Any
    ) -> None:
        merged = {**os.environ, **(environment or {})}
        self._role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.player"],
            env={name: value for name, value in merged.items() if value is not None},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.send(role, **arguments)

    def __enter__(self) -> Player:
        self.receive()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def send(self, do: str, **arguments: Any) -> None:
        """Have a method called; its answer is to be received."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The answer to the request that was sent first.

        Raises:
            RuntimeError: if the process ended instead; what it said is on stderr.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._role}: its process ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Call a method and wait for the answer."""
        self.send(do, **arguments)
        return self.receive()


def ask_all(players: Iterable[Player], do: str, **arguments: Any) -> list[Any]:
    """Have all players do the same at once; the answers in their order."""
    asked = list(players)
    for player in asked:
        player.send(do, **arguments)
    return [player.receive() for player in asked]


def serve(lines: Iterable[str], answer: Callable[[str], object]) -> None:
    """Make the object that the first line names, and call the methods that the others name."""
    requests = (json.loads(line) for line in lines)
    first = next(requests)
    module, _, name = first.pop("do").partition(":")
    player = getattr(import_module(module), name)(**first)
    answer("null\n")
    for request in requests:
        answer(json.dumps(getattr(player, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print is not an answer
    serve(sys.stdin, answers.write)
