"""What is merged before the first request: only what fits, with modules of the model's shapes."""

import torch
from harness import MODULES

from merging import METHODS
from server.warm_up import likely_adapter, likely_specs


def test_every_method_is_warmed_up_as_far_as_the_result_fits_the_default_first() -> None:
    ranks = dict.fromkeys(MODULES, 8)

    def recipes(default: str, max_rank: int) -> list[tuple[str, int]]:
        return [(spec.method.name, len(spec.terms)) for spec in likely_specs(default, ranks, max_rank)]

    every = {("cat", 1), *((method, count) for method in METHODS for count in (2, 4))}
    for method in METHODS:
        assert recipes(method, 32)[:3] == [("cat", 1), (method, 2), (method, 4)]
        assert set(recipes(method, 32)) == every
        assert len(recipes(method, 32)) == len(every)
    assert set(recipes("svd", 16)) == every - {("cat", 4)}
    assert set(recipes("svd", 8)) == every - {("cat", 2), ("cat", 4)}


def test_the_adapter_has_the_models_modules_and_is_not_zero() -> None:
    adapter = likely_adapter(MODULES, 4, torch.bfloat16, torch.device("cpu"))
    assert {name: module.shape for name, module in adapter.modules.items()} == MODULES
    assert {module.rank for module in adapter.modules.values()} == {4}
    assert all(module.delta().norm() > 0 for module in adapter.modules.values())
