"""The content of ``analysis.json``: the run, the task, the plan, and what else decides numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcray.planning.check import read_plan
from lcray.planning.plan import Plan
from lcray.storage.json_types import value_of


@dataclass(frozen=True)
class Record:
    """The origin of an output.

    Attributes:
        run: the directory of checkpoints, or its URI.
        task: the reference of the task.
        plan: the plan.
        fingerprint: what decides the numbers besides settings and plan, by name.
        versions: of Python and of the libraries that only carry the numbers.
        notes: remarks on the numbers, one line each.
    """

    run: str
    task: str
    plan: Plan
    fingerprint: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return {
            "run": self.run,
            "task": self.task,
            "fingerprint": dict(self.fingerprint),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The record that `to_dict` described; unknown entries, of a later lcray, are ignored.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: if `data` does not describe a record.
        """
        return cls(
            run=value_of(str, data["run"], "run"),
            task=value_of(str, data["task"], "task"),
            plan=read_plan(data["plan"]),
            fingerprint=dict(data["fingerprint"]),
            versions={k: value_of(str, v, "versions") for k, v in data["versions"].items()},
            notes=value_of(tuple[str, ...], data["notes"], "notes"),
        )


def plan_digest(plan: Mapping[str, Any]) -> str:
    """The checksum that links tables to their plan; the expected duration does not count.

    Args:
        plan: as in ``analysis.json``: an earlier lcray wrote fewer fields.
    """
    data = {name: value for name, value in plan.items() if name != "seconds"}
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
