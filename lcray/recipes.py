"""What has to be asked of an analysis for an output to have a table."""

from __future__ import annotations

#: By table, for those that an output may lack.
OPTIONS = {
    "elements": "analyze with --elements",
    "parameters": "analyze with --parameters",
    "traces": "analyze with --parameters",
    "fisher": "analyze with --fisher",
    "units": "analyze with --units",
    "groups": "give the task groups, and analyze",
    "replicates": "analyze with --samples",
    "replicate_layers": "analyze with --samples",
}


def recipe_for(table: str) -> str:
    """What gives an output the table that it lacks, in a few words."""
    return f"{OPTIONS.get(table, 'analyze')} into a new output"
