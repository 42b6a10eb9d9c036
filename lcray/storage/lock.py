"""The lock of an output: one driver at a time, on one machine or on several.

``OUT/.locks/<number>.json`` says who holds the lock, with a counter that the holder raises. A
file is created only if absent, so each number has one holder, and the highest number has the lock.
A process that finds a holder watches the counter by its own monotonic clock, since the clocks of
machines need not agree. If the counter stands still for `STALE` seconds, the next number is free to
be created, and of several processes that try it, one succeeds. The old holder sees the higher
number at its next beat, stops, and cannot disturb the new one: it only ever writes the file of its
own number. A holder that died on this machine is recognised as dead, by a lock of the operating
system or by its process.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lcray.errors import LcrayError, OutputError
from lcray.storage import Place, Remote, storage_of
from lcray.storage.files import confined, writing
from lcray.storage.json_types import build
from lcray.storage.processes import exists, start_ticks
from lcray.storage.processes import machine as _machine

LOCK = ".locks"  # the name of the folder in an output
BEAT = 5.0  # seconds between two beats
STALE = 30.0  # seconds without a beat after which a holder counts as dead
_LOCAL = "local"  # the file of the folder that the operating system locks
_NAME = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: unique to this holding.
        host: the machine's name.
        pid: of the process, if `machine` is this machine.
        started: when the process started, in seconds of that machine's clock, which may be set.
        machine: identifies the machine, and the set of processes on it.
        since: when it got the lock, by its own clock.
        beat: the counter.
        released: whether it has released the lock.
        ticks: when the process started, in clock ticks since the machine's boot; -1 if unknown,
            as from an older lcray.
    """

    token: str
    host: str
    pid: int
    started: float
    machine: str
    since: str
    beat: int = 0
    released: bool = False
    ticks: int = -1

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        started = psutil.Process().create_time()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        token, pid = uuid.uuid4().hex, os.getpid()
        ticks = -1
        with suppress(OSError):
            ticks = start_ticks(pid)
        return cls(token, platform.node(), pid, started, _machine(), since, ticks=ticks)

    def encode(self) -> bytes:
        """The file."""
        return json.dumps(asdict(self)).encode()

    @property
    def is_dead(self) -> bool:
        """Whether this is known to be a process of this machine that has ended.

        Where its number may now belong to another process and the system does not say, the
        counter decides.
        """
        if self.machine != _machine():
            return False
        if not exists(self.pid):
            return True
        try:
            return self.ticks not in (-1, start_ticks(self.pid))
        except OSError:
            if os.path.exists("/proc/self/stat"):  # /proc may hide other users' processes
                return False
        with suppress(psutil.Error):
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        return False


@dataclass
class Lock:
    """A lock that this process holds.

    Attributes:
        out: the output.
        number: of the lock's file.
    """

    out: Place
    number: int
    _holder: Holder
    _lost: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raise an OutputError if another process has taken the lock."""
        if self._lost:
            raise OutputError(f"{self.out}: {self._lost}; what is committed is kept")

    def holds(self) -> bool:
        """Whether this process still has the lock, read now and not remembered from the last beat.

        Raises:
            OutputError: if that cannot be read.
        """
        return not self._lost and newest(self.out) == self.number

    def beat(self) -> None:
        """Raise the counter, unless another process has taken the lock."""
        holders = _numbers(self.out)
        if not holders or max(holders) != self.number:
            self._lost = "the lock was lost to another lcray process, so this one has stopped"
            return
        self._holder = replace(self._holder, beat=self._holder.beat + 1)
        _storage_write(self.out, self.number, self._holder)

    def _beat_on(self, every: float, stale: float, main: int | None) -> None:
        last = time.monotonic()
        while not self._ended.wait(every):
            try:
                self.beat()
                last = time.monotonic()
            except (OSError, LcrayError) as error:
                if time.monotonic() - last > stale:
                    reason = getattr(error, "strerror", None) or error
                    self._lost = f"the lock could not be kept ({reason})"
            with self._guard:
                if self._lost:
                    if main is not None and not self._ended.is_set():
                        signal.pthread_kill(main, signal.SIGINT)  # it may wait for workers
                    return

    def _release(self, thread: threading.Thread) -> None:
        with self._guard:
            self._ended.set()
        thread.join()
        holder = replace(self._holder, released=True)
        if self._lost:
            return
        try:
            _storage_write(self.out, self.number, holder)
        except (OSError, LcrayError):
            with suppress(OSError, LcrayError):
                _overwrite(self.out, self.number, holder)


@contextmanager
def locked(out: Place, *, every: float = BEAT, stale: float = STALE) -> Iterator[Lock]:
    """Keep every other process that asks for the lock out of `out`, while the block lasts.

    If another process takes the lock meanwhile, because this one did not beat for long, the block
    is interrupted as by Ctrl-C, if it runs in the main thread.

    Args:
        out: the output.
        every: seconds between two beats.
        stale: seconds without a beat after which a holder counts as dead.

    Raises:
        OutputError: if another process is at work there, the lock cannot be written, or is lost.
        CorruptionError: if a link in `out` leads out of it.
    """
    confined(out, out / LOCK)
    with ExitStack() as stack:
        alone = not isinstance(out, Remote) and stack.enter_context(_flocked(out))
        with writing(out / LOCK):
            lock = _acquire(out, stale, alone)
        is_main = threading.current_thread() is threading.main_thread()
        main = threading.get_ident() if is_main else None
        if is_main:
            stack.enter_context(_interruptible())
        thread = threading.Thread(
            target=lock._beat_on, args=(every, stale, main), name="lcray-lock", daemon=True
        )
        thread.start()
        try:
            yield lock
        except KeyboardInterrupt:
            lock.check()
            raise
        finally:
            try:
                lock._release(thread)
            except KeyboardInterrupt:  # from the thread as the block ended, or from the user
                lock._release(thread)
                if not lock._lost:
                    raise
        lock.check()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT interrupts, even in a process that a script started in the background."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def newest(out: Place) -> int:
    """The number of the lock's current file; it changes when another driver takes over.

    Raises:
        OutputError: if it cannot be read.
    """
    with writing(out / LOCK):
        return max(_numbers(out), default=0)


def pulse(out: Place) -> tuple[int, int]:
    """The number of the lock's current file and its counter: they change while a holder lives.

    Both are 0 if there is no lock, or none that can be read.
    """
    with suppress(OSError, LcrayError):
        last, holder = _latest(out)
        return last, holder.beat if holder is not None else 0
    return 0, 0


def driver_has_ended(out: Place) -> bool:
    """Whether the last driver of `out` is known to have ended; False if this is not known.

    It has released the lock, or was a process of this machine that has ended.
    """
    with suppress(OSError, LcrayError):
        _, holder = _latest(out)
        return holder is not None and (holder.released or (bool(holder.host) and holder.is_dead))
    return False


def _acquire(out: Place, stale: float, alone: bool) -> Lock:
    """The lock, once there is no holder or no living one.

    `alone`: no other process of this machine can be at work there.
    """
    me, storage = Holder.this(), storage_of(out)
    while True:
        last, holder = _latest(out)
        if holder is not None and not _is_free(out, last, holder, stale, alone):
            raise _refusal(out, holder)
        mine = _file(out, last + 1)
        if not storage.create(mine, me.encode()):
            continue  # another process was faster: find out who it is
        if isinstance(out, Remote) and storage.create(mine, me.encode() + b" "):
            storage.delete([mine])
            raise OutputError(
                f"{out}: this storage overwrites files that must be created only if absent, so it "
                "cannot keep two analyses apart; use another storage for the output"
            )
        storage.delete([_file(out, number) for number in _numbers(out) if number < last])
        return Lock(out, last + 1, me)


def _is_free(out: Place, number: int, holder: Holder, stale: float, alone: bool) -> bool:
    """Whether a holder has released the lock or died; waits up to `stale` seconds to find out."""
    if holder.released or holder.is_dead or (alone and holder.machine == _machine()):
        return True
    end = time.monotonic() + stale
    while time.monotonic() < end:
        time.sleep(min(0.5, stale / 10))
        now = _read(out, number)
        if now is None or max(_numbers(out), default=0) != number:
            return True  # the next try of `_acquire` sees who is there now
        if now.released:
            return True
        if now.beat != holder.beat:
            return False
    return True


def _refusal(out: Place, holder: Holder | None) -> OutputError:
    who = "another lcray process"
    if holder is not None and holder.host:
        who += f" (on {holder.host}, pid {holder.pid}, since {holder.since})"
    return OutputError(f"{out}: {who} is at work on it; wait until it has ended, or stop it")


def _plainly(path: str, flags: int) -> int:
    """Does not follow a link, and does not wait on a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextmanager
def _flocked(out: Path) -> Iterator[bool]:
    """The operating system's lock, which is released when the process ends, however it ends.

    Yields whether it is held. Some file systems have no such lock: there, the counter decides.
    """
    path = confined(out, out / LOCK / _LOCAL)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        file = open(path, "a", opener=_plainly)  # noqa: SIM115 - its errors are not the block's
    held = True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = None
            with suppress(OSError):
                _, holder = _latest(out)
            raise _refusal(out, holder) from error
        except OSError:
            held = False
        yield held


def _file(out: Place, number: int) -> Place:
    return confined(out, out / LOCK / f"{number:08d}.json")


def _storage_write(out: Place, number: int, holder: Holder) -> None:
    storage_of(out).write(_file(out, number), holder.encode())


def _overwrite(out: Place, number: int, holder: Holder) -> None:
    """Writes into the existing file: a full disk has no room for another one."""
    path, text = _file(out, number), holder.encode()
    if isinstance(path, Path):
        with open(path, "r+b", buffering=0, opener=_plainly) as file:
            file.write(text)
            file.truncate(len(text))


def _numbers(out: Place) -> list[int]:
    found = storage_of(out).find(out / LOCK)
    return [int(match[1]) for item in found if (match := _NAME.fullmatch(item.name))]


def _latest(out: Place) -> tuple[int, Holder | None]:
    """The highest number, 0 if there is none, and its holder."""
    confined(out, out / LOCK)
    last = max(_numbers(out), default=0)
    return last, _read(out, last) if last else None


def _read(out: Place, number: int) -> Holder | None:
    """The holder of a number; None if its file is gone. A damaged file names no holder."""
    try:
        text = storage_of(out).read(_file(out, number), 0, None)
    except FileNotFoundError:
        return None
    try:
        holder = _holder(json.loads(text))
    except (RecursionError, TypeError, ValueError):
        return Holder("", "", 0, 0.0, "", "")
    return replace(holder, host=_word(holder.host), since=_word(holder.since))


def _holder(data: object) -> Holder:
    """The holder in a file's JSON; unknown fields, of a later lcray, are ignored."""
    known = {each.name for each in fields(Holder)}
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name in known}
    return build(Holder, data)


def _word(text: str) -> str:
    """The text in a form that fits into a message of one line."""
    return "".join(c for c in text[:80] if c.isprintable())
