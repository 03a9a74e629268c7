"""What a worker merges before the first request, so that none has to wait for kernels to compile and graphs to be captured."""

from collections.abc import Mapping

import torch

from merging import LoraAdapter, LoraModule, MergeSpec, Term, check_rank

_METHODS = ("lego", "svd")  # beside the server's default: what most kernels are for
_COUNTS = (2, 4)  # adapters in a recipe


def likely_specs(default_method: str, ranks: Mapping[str, int], max_rank: int) -> list[MergeSpec]:
    """Recipes of a few adapters, all with modules of these `ranks`, as far as the result fits `max_rank`."""
    specs = [
        MergeSpec.create(method, [Term(f"copy-{number}") for number in range(count)])
        for method in dict.fromkeys([default_method, *_METHODS])
        for count in _COUNTS
    ]
    return [spec for spec in specs if check_rank(spec, {term.adapter: ranks for term in spec.terms}) <= max_rank]


def likely_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype, device: torch.device) -> LoraAdapter:
    """A random adapter of all modules, (d_out, d_in) each; random, because merges of zeros take shorter ways."""
    modules = {
        name: LoraModule(
            torch.randn(rank, d_in, dtype=dtype, device=device), torch.randn(d_out, rank, dtype=dtype, device=device)
        )
        for name, (d_out, d_in) in shapes.items()
    }
    adapter = LoraAdapter(modules).to(device)
    adapter.__dict__["digest"] = ""  # its content does not count
    return adapter
