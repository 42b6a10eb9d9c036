"""The command `lcray convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

import lcray
from lcray.cli.options import Answer, answers, command


@command(
    "lcray convert lightning_logs/version_0/checkpoints runs/mine --strip-prefix model.",
    "lcray convert saved/ runs/mine --key model",
)
@click.argument("source")
@click.argument("run")
@click.option(
    "--strip-prefix",
    default="",
    metavar="PREFIX",
    help="Keep only the tensors under this prefix, as in 'model.', and remove it from their names.",
)
@click.option("--key", help="The entry of each file that holds the model.  [default: found out]")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Unpickle files that cannot be read otherwise. This RUNS any code that their author put "
    "in, with your rights: only for files that you made, or whose author you trust.",
)
@answers
def convert(source: str, run: str, **options: Any) -> Answer:
    """Turn checkpoints of torch.save, Lightning or torch.distributed at SOURCE into the run RUN.

    SOURCE is one checkpoint or a directory of them: .pt, .pth, .bin, .ckpt, or directories that
    torch.distributed.checkpoint wrote (these need --trust-pickle). Steps come from the files
    (global_step), or from their names. Nothing is overwritten; the same command resumes where it
    stopped.
    """
    found = lcray.convert(source, run, **options)
    said = (
        f"{run}: {len(found.steps)} checkpoints, steps {found.steps[0]} to {found.steps[-1]}, "
        f"{len(found.layers)} tensors each; {found.written} written now\nnext: lcray inspect {run}"
    )
    return Answer(asdict(found), lambda: said)
