"""Whether the checkpoints of committed spans are still those that were read.

A listing of the run says how large each is and when it was written (or its etag). Only where that
differs from what the commit says is the checkpoint read again, and compared by its checksum.
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
    """Looks at one commit after the other.

    Args:
        out: the output, which the caller has locked.
        series: the run as it is listed now.
        repair: take back the spans of checkpoints that have changed, instead of refusing them.
    """

    def __init__(self, out: Place, series: CheckpointSeries, *, repair: bool = False) -> None:
        self._out, self._series, self._repair = out, series, repair
        self._digests: dict[int, str] = {}  # of those that had to be read
        self._changed: set[int] = set()

    def counts(self, commit: Commit) -> bool:
        """Whether a commit counts still; one that is refused does, until `check`.

        Raises:
            OutputError: if a span is to be taken back and cannot be removed.
        """
        changed = {step for step in commit.stamps if self._differs(commit, step)}
        if changed and self._repair:
            remove(self._out, commit.span)
            return False
        self._changed |= changed
        return True

    def check(self) -> None:
        """Refuse to go on with spans whose checkpoints have changed.

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
        except CheckpointError:  # whether it is wanted is not for here to say
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
    """Refuse to go on from a checkpoint that was written anew since the span before was computed.

    Raises:
        OutputError: naming the steps of that span which have changed.
    """
    commit, revisit = read_commit(out, plan.spans[-1]), Revisit(out, series)
    if commit is not None:
        revisit.counts(commit)
        revisit.check()
