"""One of two processes that train together and record: ``ranks_worker.py SCENE FOLDER``."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lcray
from lcray.errors import RecorderError

STEPS, SHARE = 4, 4  # samples a rank and step


class Net(nn.Module):
    """A tied weight, a frozen one, and batch statistics that move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def build() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, 2 * SHARE, 6, generator=generator)
    return [(each, each[:, :3].argmax(1)) for each in x]


def wrapped(scene: str, rank: int) -> nn.Module:
    model = build()
    if scene.startswith("ddp"):
        if scene == "ddp-compiled":
            model = torch.compile(model, backend="eager")
        return DistributedDataParallel(model)
    if scene.startswith("fully_shard"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.last)
        return fully_shard(model)
    from torch.distributed.fsdp import FullyShardedDataParallel

    if scene == "refused":
        model.requires_grad_(True)
    return FullyShardedDataParallel(
        model, use_orig_params=scene == "fsdp1", device_id=torch.device("cpu")
    )


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


def train(scene: str, folder: Path | None, rank: int, every: int = 1) -> list[dict]:
    """The states of all steps; recorded in `folder` if there is one."""
    model = wrapped(scene, rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recorder = None if folder is None else lcray.Recorder(model, folder, every=every)
    states = [full_state(model)]
    for x, y in batches():
        mine = slice(rank * SHARE, (rank + 1) * SHARE)
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step()
        states.append(full_state(model))
    if recorder is not None:
        assert recorder.last_step == STEPS
        recorder.close()
    return states


def same(one: list[dict], two: list[dict]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


def lightning(folder: Path, rank: int) -> None:
    """Lightning's DDP in the place of the loop."""
    import lightning.pytorch as parts

    from lcray.integrations.lightning import RecorderCallback

    class Module(parts.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(2)
    x = torch.randn(STEPS * 2 * SHARE, 6)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    trainer = parts.Trainer(
        strategy="ddp", devices=2, accelerator="cpu", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RecorderCallback(folder, module="model")],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, SHARE))
    if rank == 0:
        torch.save(module.model.state_dict(), folder.parent / "states.pt")


def main() -> None:
    scene, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    if scene != "lightning":  # which does so itself
        dist.init_process_group("gloo")
    # What a rank is given is its own: rank 1 must leave its own empty.
    own = folder / f"rank-{rank}"
    if scene == "refused":
        with suppress(RecorderError):
            train(scene, own, rank)
            raise AssertionError("was not refused")
    elif scene == "blocked":  # rank 0 cannot write: no rank waits for it
        own.mkdir()
        (own / "run.json").write_text("[]")
        try:
            train("fully_shard", own, rank)
            raise AssertionError("was not refused")
        except RecorderError as error:
            (folder / f"error-{rank}").write_text(str(error))
    elif scene == "lightning":
        lightning(own, rank)
    elif scene == "resumed":
        with lcray.Recorder(wrapped("ddp", rank), folder / "run") as recorder:
            for _ in range(3):
                recorder.step()
        dist.barrier()  # the run has ended
        with lcray.Recorder(wrapped("ddp", rank), folder / "run") as recorder:
            dist.barrier()  # every rank has begun
            (folder / f"start-{rank}").write_text(str(recorder.last_step))
            recorder.step()
            (folder / f"end-{rank}").write_text(str(recorder.last_step))
    elif scene == "every_rank":
        with lcray.Recorder(build(), own, every_rank=True) as recorder:
            recorder.step()
    else:
        plain = train(scene, None, rank)
        states = train(scene, own, rank)
        assert same(plain, states), "recording changed training"
        train(scene, folder / f"every-{rank}", rank, every=3)
        if rank == 0:
            torch.save(states, folder / "states.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
