"""Adapters with entries that a model overflows with are refused before they have a name."""

import json
from pathlib import Path

import pytest
import torch

from merging import AdapterError, LoraAdapter, LoraModule, save_adapter
from server.survey import LARGEST_ENTRY, survey


def folder_of(path: Path, a: float, b: float, scaling: float = 1.0) -> Path:
    """An adapter of rank 2, every entry of its ΔW 2ab times the scaling, beside a smaller module."""
    modules = {"layers.0.q": LoraModule(torch.ones(2, 8), torch.zeros(4, 2))}
    modules["layers.1.q"] = LoraModule(torch.full((2, 8), a), torch.full((4, 2), b))
    save_adapter(LoraAdapter(modules), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * scaling}))
    return path


@pytest.mark.parametrize(
    ("a", "b", "scaling"),
    [(1.0, 501.0, 1.0), (1.0, -1.0, 501.0), (1e30, 1.0, 1.0), (1e20, 1e20, 1.0), (1e-30, 1e38, 1.0), (3e38, 3e38, 1.0)],
)
def test_an_adapter_with_which_a_model_would_overflow_is_refused(tmp_path: Path, a: float, b: float, scaling: float) -> None:
    with pytest.raises(
        AdapterError, match=r"ΔW of layers\.1\.q may have entries of up to .*, over 1000, .*export the adapter again"
    ):
        survey(folder_of(tmp_path / "large", a, b, scaling))


def test_the_largest_that_is_let_through(tmp_path: Path) -> None:
    assert survey(folder_of(tmp_path / "large", 1.0, LARGEST_ENTRY / 2.01)).rank == 2
    assert survey(folder_of(tmp_path / "zeros", 1.0, 0.0)).rank == 2
