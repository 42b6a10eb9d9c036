"""Following a run that training still writes: its new checkpoints, and its end."""

from __future__ import annotations

import time
from dataclasses import replace

from lcray.checkpoints import CheckpointSeries, open_series
from lcray.checkpoints.listing import Folders
from lcray.checkpoints.runfile import NAME as RUN_FILE
from lcray.checkpoints.runfile import load
from lcray.errors import CheckpointError, RecorderError, UsageError
from lcray.storage import PlaceLike, Remote, place
from lcray.storage.files import exists, read_json

SECONDS_A_LOOK = 5.0
IDLE_SECONDS = 600.0


class Growth:
    """Looks for new checkpoints of a run, until it has ended.

    A run with a ``run.json`` has ended once `Recorder.close` has noted that there. Any other run
    has ended after `idle` seconds without a new checkpoint; until then its newest checkpoint may be
    incomplete, and is left out.

    Args:
        run: the directory of checkpoints.
        steps: the range of steps to analyze, ``a:b``.
        idle: seconds; None is 600, or no limit if there is a ``run.json``.

    Raises:
        UsageError: if `idle` is not positive.
    """

    def __init__(self, run: PlaceLike, steps: str | None, idle: float | None) -> None:
        if idle is not None and not idle > 0:
            raise UsageError(f"idle {idle:g}: must be positive, in seconds")
        self._run, self._steps, self._idle = place(run), steps, idle
        self._newest = -1
        self._since = time.monotonic()
        self.ended = False

    def first(self) -> CheckpointSeries:
        """The series, after waiting until it has an interval.

        Raises:
            CheckpointError: if there is no such run (on object storage: nothing below its address),
                or it ends without an interval.
        """
        while True:
            series = self.look()
            if series is not None:
                return series
            if self.ended:
                return open_series(self._run, self._steps)
            time.sleep(SECONDS_A_LOOK)

    def look(self) -> CheckpointSeries | None:
        """The series as far as it can be used now; None if it has no interval yet.

        Raises:
            CheckpointError: if there is no such run, or it cannot be listed.
        """
        content = self._content()
        ended = content is not None and bool(content.get("ended"))
        try:
            series = open_series(self._run, self._steps, minimum=1)
        except CheckpointError:
            folders = Folders(self._run)
            folders.entries(folders.root)  # refuses an address without a run
            series = None
        now = time.monotonic()
        if series is not None and series.steps[-1] != self._newest:
            self._newest, self._since = series.steps[-1], now
        idle = IDLE_SECONDS if content is None and self._idle is None else self._idle
        self.ended = ended or (idle is not None and now - self._since >= idle)
        if series is None:
            if self.ended:
                open_series(self._run, self._steps)  # says why nothing can be used
            return None
        if content is None and not self.ended:
            series = replace(series, checkpoints=series.checkpoints[:-1])
        return series if len(series.checkpoints) > 1 else None

    def _content(self) -> dict[str, object] | None:
        path = self._run / RUN_FILE
        if isinstance(path, Remote):  # a copy of a recorder's directory
            return read_json(path) if exists(path) else None
        try:
            return load(path.parent)
        except RecorderError as error:
            if path.exists():
                raise CheckpointError(str(error)) from error
            return None
