"""What no dtype can hold is refused with value and remedy: weights by the recipe, factors before they are written."""

from pathlib import Path

import pytest
import torch

from merging import METHODS, LoraAdapter, LoraModule, MergeSpec, RecipeError, Term, merge, save_adapter
from merging.errors import OutputError


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_weight_beyond_any_use_is_refused(method: str) -> None:
    with pytest.raises(RecipeError, match=r"weight 1e\+30 of 'a' is over 10000 in size; use 10000 at most"):
        MergeSpec.create(method, [Term("a", 1e30), Term("b", 0.5)])
    with pytest.raises(RecipeError, match=r"weight -20000.0 of 'a' at '\*.q'"):
        MergeSpec.create(method, [Term("a", 1.0, (("*.q", -20000.0),))])
    MergeSpec.create(method, [Term("a", -1e4)])


def test_factors_that_overflowed_their_dtype_are_not_saved(tmp_path: Path) -> None:
    large = LoraAdapter({"layers.0.q": LoraModule(torch.ones(2, 8), 10 * torch.ones(4, 2))})
    spec = MergeSpec.create("cat", [Term("a", 1e4)])
    with pytest.raises(OutputError, match=r"layers\.0\.q\.lora_B.* too large for float16; merge with --dtype float32"):
        save_adapter(merge({"a": large}, spec, dtype=torch.float16), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    save_adapter(merge({"a": large}, spec, dtype=torch.float32), tmp_path / "out")  # the remedy works
