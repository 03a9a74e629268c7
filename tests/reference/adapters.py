"""Seeded random adapters: any ranks, alphas, scalings, dtypes, with or without missing modules."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from merging import LoraAdapter, LoraModule, MergeSpec, Term, merge

# (d_out, d_in): two modules of one shape, so that blocks hold more than one module, and two of other shapes.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (14, 12),
    "model.layers.1.self_attn.q_proj": (14, 12),
    "model.layers.0.mlp.up_proj": (20, 12),
    "model.layers.0.mlp.down_proj": (12, 20),
}
ONE = {"model.layers.0.self_attn.q_proj": (14, 12)}

Terms = Sequence[tuple[LoraAdapter, float]]


def random_adapter(
    seed: int,
    rank: int | Mapping[str, int] = 4,
    *,
    alpha: float | Mapping[str, float] = 8,
    rslora: bool = False,
    without: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> LoraAdapter:
    """An adapter with normal factors; `rank` and `alpha` may differ from module to module; modules in `without` are missing."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (d_out, d_in) in shapes.items():
        r = rank if isinstance(rank, int) else rank[name]
        own_alpha = alpha[name] if isinstance(alpha, Mapping) else alpha
        a = torch.randn(r, d_in, generator=generator).to(dtype)
        b = (0.3 * torch.randn(d_out, r, generator=generator)).to(dtype)
        if name not in without:
            modules[name] = LoraModule(a, b, own_alpha / (math.sqrt(r) if rslora else r))
    return LoraAdapter(modules, base_model="tiny")


def motley(dtype: torch.dtype = torch.float32) -> list[tuple[LoraAdapter, float]]:
    """Three adapters that differ in everything that may differ, with weights of both signs."""
    mixed = dict(zip(SHAPES, (3, 3, 1, 5), strict=True))
    alphas = dict(zip(SHAPES, (8, 3, 2, 20), strict=True))
    return [
        (random_adapter(1, 4, alpha=alphas, dtype=dtype), 0.7),
        (random_adapter(2, mixed, alpha=16, rslora=True, dtype=dtype), -1.3),
        (random_adapter(3, 2, alpha=1, without=["model.layers.0.mlp.up_proj"], dtype=dtype), 0.45),
    ]


def of_units(a: Tensor, b: Tensor, scaling: float = 1.0) -> LoraAdapter:
    """An adapter of one module with the given factors."""
    return LoraAdapter({next(iter(ONE)): LoraModule(a, b, scaling)})


def zeroed(adapter: LoraAdapter) -> LoraAdapter:
    """The same adapter with B = 0, as training starts: its ΔW is zero."""
    return LoraAdapter({name: LoraModule(m.a, torch.zeros_like(m.b), m.scaling) for name, m in adapter.modules.items()})


def permuted(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """The same units in another order, so the same ΔW."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in adapter.modules.items():
        order = torch.randperm(module.rank, generator=generator)
        modules[name] = LoraModule(module.a[order], module.b[:, order], module.scaling)
    return LoraAdapter(modules)


def halves(adapter: LoraAdapter) -> tuple[LoraAdapter, LoraAdapter]:
    """The adapter's units shared out between two, each with the scaling of the whole: their sum is the adapter."""
    cut = {name: module.rank // 2 for name, module in adapter.modules.items()}
    first = {n: LoraModule(m.a[: cut[n]], m.b[:, : cut[n]], m.scaling) for n, m in adapter.modules.items()}
    second = {n: LoraModule(m.a[cut[n] :], m.b[:, cut[n] :], m.scaling) for n, m in adapter.modules.items()}
    return LoraAdapter(first), LoraAdapter(second)


def merge_terms(
    method: str, terms: Terms, options: Mapping[str, object] | None = None, dtype: torch.dtype = torch.float32
) -> LoraAdapter:
    """loramix's merge of the terms, which need no names here."""
    adapters = {f"adapter{i}": adapter for i, (adapter, _) in enumerate(terms)}
    spec = MergeSpec.create(method, [Term(f"adapter{i}", w) for i, (_, w) in enumerate(terms)], options)
    return merge(adapters, spec, dtype=dtype)


def modules_of(terms: Terms) -> list[str]:
    """Every module that some adapter adapts."""
    return sorted({name for adapter, _ in terms for name in adapter.modules})


def at_module(terms: Terms, name: str) -> list[tuple[LoraModule, float]]:
    """The factors and weights of the adapters that adapt one module: what the references work on."""
    return [(adapter.modules[name], weight) for adapter, weight in terms if name in adapter.modules]
