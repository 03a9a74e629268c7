"""What a worker merges before the first request, so that none has to wait for kernels to compile and graphs to be captured."""

from collections.abc import Mapping

import torch

from merging import METHODS, LoraAdapter, LoraModule, MergeSpec, Term, check_rank

_COUNTS = (2, 4)  # adapters in a recipe


def likely_specs(default_method: str, ranks: Mapping[str, int], max_rank: int) -> list[MergeSpec]:
    """One adapter as it is, and recipes of a few by every method, the default first, as far as the result fits `max_rank`.

    A method that is first asked for while others decode would compile its kernels beside them.

    Args:
        ranks: of the modules of all adapters.
    """
    recipes = [("cat", 1), *((method, count) for method in dict.fromkeys([default_method, *METHODS]) for count in _COUNTS)]
    specs = [MergeSpec.create(method, [Term(f"copy-{number}") for number in range(count)]) for method, count in recipes]
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
