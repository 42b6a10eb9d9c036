"""Functions of torch that are replaced while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class Replacements(TorchFunctionMode):
    """While active, calls other functions in place of some functions of torch.

    Args:
        functions: by the function of torch, a function that takes the same arguments. Within it,
            torch's own functions are active.
    """

    def __init__(self, functions: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the replacement of a function, or the function."""
        return self._functions.get(func, func)(*args, **(kwargs or {}))
