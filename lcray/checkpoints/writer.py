"""The background thread of a recorder: bounded buffers, and no failure is ever lost."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

from lcray.checkpoints.snapshot import Slot
from lcray.errors import RecorderError
from lcray.storage import cure


class BackgroundWriter:
    """Writes snapshots in order on one thread.

    At most `limit` slots exist; `acquire` waits while all of them are queued. After the first
    failure nothing more is written, and `acquire`, `check` and `close` always raise it.
    """

    def __init__(self, write: Callable[[int, Slot], None], make: Callable[[], Slot], limit: int):
        self._write, self._make, self._limit = write, make, limit
        self._made = 0
        self._free: list[Slot] = []
        self._queue: deque[tuple[int, Slot]] = deque()
        self._changed = threading.Condition()
        self._failure: tuple[int, BaseException] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lcray-recorder", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the thread's failure, if it has failed.

        Raises:
            RecorderError: a checkpoint could not be written, or the thread is gone.
        """
        if self._failure is not None:
            step, cause = self._failure
            why, first = repr(cause), ""
            if isinstance(cause, OSError):
                why, first = cause.strerror or why, f"{cure(cause)} and "
            raise RecorderError(
                f"the checkpoint of step {step} could not be written: {why}; nothing after it is "
                f"recorded: {first}resume from the last file"
            ) from cause
        if not self._thread.is_alive() and not self._closing:
            raise RecorderError(
                "the recorder's writer thread is gone (a forked process?); record in the process "
                "that made the recorder"
            )

    def acquire(self) -> Slot:
        """A slot to fill; waits for the writer if all are in use."""
        with self._changed:
            while True:
                self.check()
                if self._free:
                    return self._free.pop()  # the last one used: its pages are in memory
                if self._made < self._limit:
                    self._made += 1
                    break
                self._changed.wait(1.0)  # wakes regularly to check that the thread is alive
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._made -= 1
            raise

    def release(self, slot: Slot) -> None:
        """Give back a slot that was not submitted."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def submit(self, step: int, slot: Slot) -> None:
        """Queue a filled slot as the checkpoint of `step`."""
        with self._changed:
            self._queue.append((step, slot))
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is queued and end the thread.

        Raises:
            RecorderError: a checkpoint could not be written.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.check()

    def _run(self) -> None:
        _yield_to_training()
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                step, slot = self._queue.popleft()
            try:
                if self._failure is None:
                    self._write(step, slot)
            except BaseException as error:  # the training thread must be told, whatever it is
                self._failure = (step, error)
            self.release(slot)


def _yield_to_training() -> None:
    """Give this thread the lowest priority: writing can wait, training must not wait for a core."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
