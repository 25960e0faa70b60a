"""Shared fixtures. Tests read golden tensors from `tests/golden` and write only below `tmp_path`."""

import os
from pathlib import Path

# Before any Hugging Face import: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the local Hub of the tests speaks Git LFS

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of tensors made by the original code."""
    return GOLDEN


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """How long the code would have slept; it does not."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
