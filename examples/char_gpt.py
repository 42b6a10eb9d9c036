"""Shakespeare with a small character GPT (tied embeddings) and AdamW.

Train and record:  python examples/char_gpt.py --run runs/gpt
Allocate:          lcray analyze runs/gpt --task examples/char_gpt.py:task --out out/gpt

An item of the loss is a character, not a window: 64 items per sample. The groups are kinds of
characters, which are mixed within a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import SHAKESPEARE, arguments, load_text, minibatches, samples
from torch import Tensor, nn

from lcray import Recorder, Task
from lcray.errors import TaskError

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 65, 64, 64, 4, 2
WINDOWS = {"train": 256, "val": 64}  # windows of 64 characters; more cost more in the analysis
BATCH, LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 64, 3e-3, 20, 0.1
KINDS = ("letter", "space or newline", "punctuation")  # what the groups 0, 1 and 2 mean

Batch = tuple[Tensor, Tensor, Tensor]  # characters, next characters and their kinds, [n, 64] each


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a LayerNorm and added to its input (pre-LN)."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.ln2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, WIDTH] to the same shape."""
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [n, HEADS, t, WIDTH / HEADS] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class CharGPT(nn.Module):
    """Two blocks; the head is the token embedding, one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [n, t, VOCABULARY] of the next character, for ids [n, t]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)
        return self.head(self.ln(self.blocks(x)))


def kind(character: str) -> int:
    """The group of a character, an index of `KINDS`."""
    return 0 if character.isalpha() else 1 if character.isspace() else 2


def splits() -> dict[str, Batch]:
    """Non-overlapping windows, drawn from the first 90 % of the text and from the rest."""
    ids, vocabulary = load_text(SHAKESPEARE)
    if len(vocabulary) != VOCABULARY:
        raise TaskError(f"{SHAKESPEARE} has {len(vocabulary)} characters: set VOCABULARY to that")
    kinds = torch.tensor([kind(character) for character in vocabulary])
    border = len(ids) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    result = {}
    for split, part in (("train", ids[:border]), ("val", ids[border:])):
        starts = torch.arange(0, len(part) - CONTEXT, CONTEXT)
        chosen = torch.randperm(len(starts), generator=generator)[: samples(WINDOWS[split])]
        rows = starts[chosen][:, None] + torch.arange(CONTEXT)
        result[split] = (part[rows], part[rows + 1], kinds[part[rows + 1]])
    return result


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every next character, [n * 64], in nats."""
    ids, targets, _ = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")


def groups(batch: Batch) -> Tensor:
    """The kind of every next character, [n * 64]."""
    return batch[2].flatten()


task = Task(model=CharGPT, splits=splits, loss=loss, groups=groups)


def main() -> None:
    """Train for a number of steps, one checkpoint per step."""
    options = arguments(__doc__, run="runs/gpt", needs=SHAKESPEARE)
    torch.manual_seed(options.seed)
    model = CharGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / WARM_UP))
    batches = minibatches(splits()["train"], size=BATCH, steps=options.steps, seed=options.seed)
    with Recorder(model, options.run, task=f"{__file__}:task") as recorder:
        for step, batch in enumerate(batches, start=1):
            optimizer.zero_grad()
            mean_loss = loss(model, batch).mean()
            mean_loss.backward()
            optimizer.step()
            warm_up.step()
            recorder.step()
            if step % 20 == 0:
                print(f"step {step}: mini-batch loss {mean_loss.item():.4f}")


if __name__ == "__main__":
    main()
