"""Tests of what takes another way on a GPU; `make gpu` runs them. They are skipped without one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: run make gpu on a machine with one")
