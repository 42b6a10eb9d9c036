"""Work in a process that is the user's, after which it is as it was before."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from lcray.tasks.model.precision import precision_kept

#: Analyses in several threads of one process wait for each other: its state is theirs in turn.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def state_kept() -> Iterator[None]:
    """A context inside which gradients are on and autocast is off, as in a worker's process.

    Afterwards, and after an error too, these are as before: torch's threads, default dtype and
    device, determinism, precision, modes and random state; the random states of numpy and Python;
    the variables of the environment, ``sys.path``, the working directory, filters of warnings,
    handlers of signals.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(precision_kept())
        stack.enter_context(warnings.catch_warnings())
        for read, write in _SWITCHES:
            stack.callback(_put_back, read, write, read())
        for read, write in _generators():
            stack.callback(write, read())
        _keep_process(stack)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def folder_kept() -> Iterator[None]:
    """A context that leaves the working directory as it was; also a decorator."""
    folder = _folder()
    try:
        yield
    finally:
        if folder is not None:
            with suppress(OSError):  # it may be gone
                os.chdir(folder)


def _folder() -> str | None:
    """The working directory; None if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _put_back(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> None:
    if read() != value:
        write(value)


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


#: How to read a switch of torch, and how to set it.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _flag(torch.utils.deterministic, "fill_uninitialized_memory"),
    _flag(torch.backends.cudnn, "benchmark"),
    _flag(torch.backends.cudnn, "deterministic"),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
)


def _generators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    yield torch.get_rng_state, torch.set_rng_state
    yield np.random.get_state, np.random.set_state
    yield random.getstate, random.setstate
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all


def _keep_process(stack: ExitStack) -> None:
    """Keep what belongs to the process, not to torch."""
    stack.callback(_restore_variables, dict(os.environ))
    stack.enter_context(folder_kept())
    stack.callback(sys.path.__setitem__, slice(None), list(sys.path))
    if threading.current_thread() is threading.main_thread():
        handlers: dict[int, Any] = {n: signal.getsignal(n) for n in signal.valid_signals()}
        stack.callback(_restore_handlers, handlers)


def _restore_variables(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _restore_handlers(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
