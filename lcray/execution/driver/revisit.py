"""Checks that the checkpoints of committed spans are still those that were read.

A listing of the run gives the size and the modification time (or etag) of each checkpoint. If these
differ from the commit, the checkpoint is read again, and its checksum is compared.
"""

from __future__ import annotations

from lcray.checkpoints import CheckpointSeries
from lcray.checkpoints.reading import sha256_of_checkpoint
from lcray.errors import CheckpointError, OutputError
from lcray.execution.driver.repair import remove
from lcray.planning.plan import Plan
from lcray.storage import Place
from lcray.tables.shards.commit import Commit, read_commit

_NAMED = 6  # steps in a message


class Revisit:
    """Checks the checkpoints of commits, one commit after another.

    Args:
        out: the output, which the caller has locked.
        series: the run as it is listed now.
        repair: remove the commits of spans whose checkpoints have changed, instead of refusing.
    """

    def __init__(self, out: Place, series: CheckpointSeries, *, repair: bool = False) -> None:
        self._out, self._series, self._repair = out, series, repair
        self._digests: dict[int, str] = {}  # of checkpoints that had to be read
        self._changed: set[int] = set()

    def counts(self, commit: Commit) -> bool:
        """Whether a commit still counts; a commit that `check` will refuse does.

        Raises:
            OutputError: if the commit of a span cannot be removed.
        """
        changed = {step for step in commit.stamps if self._differs(commit, step)}
        if changed and self._repair:
            remove(self._out, commit.span)
            return False
        self._changed |= changed
        return True

    def check(self) -> None:
        """Refuse to continue with spans whose checkpoints have changed.

        Raises:
            OutputError: naming the steps.
        """
        if not self._changed:
            return
        steps = sorted(self._changed)
        named = ", ".join(map(str, steps[:_NAMED]))
        more = f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else ""
        raise OutputError(
            f"{self._out}: what is committed was computed from other checkpoints of steps {named}"
            f"{more} than {self._series.root} has now; put those back, compute their spans anew "
            "with --repair, or choose another --out"
        )

    def _differs(self, commit: Commit, step: int) -> bool:
        try:
            checkpoint = self._series.checkpoint(step)
        except CheckpointError:  # whether it is needed is checked elsewhere
            return False
        if checkpoint.stamp in ("", commit.stamps[step]):
            return False
        if step not in self._digests:
            try:
                self._digests[step] = sha256_of_checkpoint(checkpoint)
            except CheckpointError:
                self._digests[step] = ""
        return self._digests[step] != commit.checkpoints[step]


def revisit_last(out: Place, series: CheckpointSeries, plan: Plan) -> None:
    """Refuse to continue from a checkpoint that was rewritten since the last span was computed.

    Raises:
        OutputError: naming the changed steps of that span.
    """
    commit, revisit = read_commit(out, plan.spans[-1]), Revisit(out, series)
    if commit is not None:
        revisit.counts(commit)
        revisit.check()
