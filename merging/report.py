"""What a merge kept of each adapter, module by module: measured on Gram matrices, no dense ΔW is ever formed.

For a merged M and a source ΔW_t of one module, with <X, Y> = tr(Xᵀ Y):
    energy   ‖P_B ΔW_t P_A‖² / ‖ΔW_t‖², with P the projections on the row and column spaces of M: what M could still say
    cosine   <M, ΔW_t> / (‖M‖ ‖ΔW_t‖): how much of M is ΔW_t
    gain     <M, ΔW_t> / ‖ΔW_t‖²: how strongly M does what ΔW_t did; 1 is as strongly as the source
    shared   part of the source's units that lego put in one cluster with another source's
Shape suffixes as in pool.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import one_hot

from merging.adapter import LoraAdapter
from merging.core import basis
from merging.merge import merge, ordered
from merging.methods.lego import LegoOptions, clusters
from merging.pool import Pool, pool_units
from merging.spec import MergeSpec
from merging.term import Term

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Overlap:
    """Sums over some modules from which a source's part in the merged adapter follows; overlaps of module sets add up.

    Attributes:
        kept: ‖P_B ΔW_t P_A‖². inner: <M, ΔW_t>. own: ‖ΔW_t‖². merged: ‖M‖².
        units, shared_units: of the source, all and those in shared clusters (lego only).
    """

    kept: float = 0.0
    inner: float = 0.0
    own: float = 0.0
    merged: float = 0.0
    units: int = 0
    shared_units: int = 0

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            self.kept + other.kept,
            self.inner + other.inner,
            self.own + other.own,
            self.merged + other.merged,
            self.units + other.units,
            self.shared_units + other.shared_units,
        )

    @property
    def energy(self) -> float:
        return self.kept / self.own if self.own else 0.0

    @property
    def cosine(self) -> float:
        scale = (self.own * self.merged) ** 0.5
        return self.inner / scale if scale else 0.0

    @property
    def gain(self) -> float:
        return self.inner / self.own if self.own else 0.0

    @property
    def shared(self) -> float:
        return self.shared_units / self.units if self.units else 0.0


@dataclass(frozen=True)
class ModuleReport:
    """One module of a merged adapter.

    Attributes:
        layer: the first number in the module's name, None if it has none.
        kind: the last part of its name, such as `q_proj`.
        sources: the overlap of each adapter that adapts the module, by name.
    """

    module: str
    layer: int | None
    kind: str
    rank: int
    sources: Mapping[str, Overlap]


def explain(
    adapters: Mapping[str, LoraAdapter],
    spec: MergeSpec,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[ModuleReport]:
    """Merge `spec` in float32 and compare the result with each of its adapters, module by module in the order of names.

    Args:
        progress: told how many modules more have been compared, now and then.

    Raises:
        RecipeError: where the spec cannot be merged.
    """
    device = torch.device(device)
    merged = merge(adapters, spec, device=device, dtype=torch.float32)
    names = [term.adapter for term in spec.terms]
    shared = _shared_units(adapters, spec, device) if isinstance(spec.options, LegoOptions) else {}
    reports = []
    everything = [merged, *(adapters[name] for name in names)]
    for pool in pool_units(everything, [Term("merged"), *map(Term, names)], device):
        sources = {names[place - 1]: overlaps for place, overlaps in _overlaps(pool).items()}
        for row, module in enumerate(pool.modules):
            reports.append(
                ModuleReport(
                    module,
                    layer_of(module),
                    kind_of(module),
                    pool.ranks[0] if pool.adapters[0] == 0 else 0,
                    {n: replace(column[row], shared_units=shared.get((module, n), 0)) for n, column in sources.items()},
                )
            )
        if progress is not None:
            progress(len(pool.modules))
    return sorted(reports, key=lambda report: report.module)


def layer_of(module: str) -> int | None:
    """The first number in a module's name, None if it has none."""
    layer = _LAYER.search(module)
    return int(layer[1]) if layer else None


def kind_of(module: str) -> str:
    """The last part of a module's name, such as `q_proj`."""
    return module.rpartition(".")[2]


def norms(adapter: LoraAdapter) -> dict[str, float]:
    """Root mean square of ‖ΔW‖ (Frobenius) over the modules of each kind."""
    squares: dict[str, list[float]] = {}
    for pool in pool_units([adapter], [Term("")], torch.device("cpu")):
        scale_LN = pool.coefficient_LN
        square_L = (scale_LN[:, :, None] * pool.gram_a_LNN * pool.gram_b_LNN * scale_LN[:, None, :]).sum(dim=(1, 2))
        for name, square in zip(pool.modules, square_L.tolist(), strict=True):
            squares.setdefault(kind_of(name), []).append(max(square, 0.0))
    return {kind: (sum(values) / len(values)) ** 0.5 for kind, values in squares.items()}


def total(reports: Sequence[ModuleReport], name: str) -> Overlap:
    """One adapter's overlap over all of the given modules, taken as one."""
    return sum((report.sources[name] for report in reports if name in report.sources), Overlap())


def _overlaps(pool: Pool) -> dict[int, list[Overlap]]:
    """By place of each source, its overlap with the adapter in place 0 in each module of the pool."""
    owners = dict(zip(pool.adapters, pool.owners, strict=True))
    gram_a_LNN, gram_b_LNN, noise = pool.fine_grams
    scale_LN = pool.coefficient_LN
    product_LNN = scale_LN[:, :, None] * gram_a_LNN * gram_b_LNN * scale_LN[:, None, :]
    zero_L = torch.zeros_like(scale_LN[:, 0])
    m = owners.get(0)  # None where the merge left the module out
    if m is not None:
        basis_a, basis_b = basis(gram_a_LNN[:, m, m], noise), basis(gram_b_LNN[:, m, m], noise)
    result = {}
    for place, t in owners.items():
        if place == 0:
            continue
        sums = {"kept": zero_L, "inner": zero_L, "merged": zero_L, "own": product_LNN[:, t, t].sum(dim=(1, 2))}
        if m is not None:
            seen_a_LKR, seen_b_LKR = basis_a.inverse_LNN @ gram_a_LNN[:, m, t], basis_b.inverse_LNN @ gram_b_LNN[:, m, t]
            sums["kept"] = ((seen_b_LKR * scale_LN[:, None, t]) @ seen_a_LKR.mT).square().sum(dim=(1, 2))
            sums["inner"], sums["merged"] = product_LNN[:, m, t].sum(dim=(1, 2)), product_LNN[:, m, m].sum(dim=(1, 2))
        columns = {name: sum_L.tolist() for name, sum_L in sums.items()}
        units = t.stop - t.start
        result[place] = [
            Overlap(kept, inner, own, merged, units)
            for kept, inner, own, merged in zip(*(columns[n] for n in ("kept", "inner", "own", "merged")), strict=True)
        ]
    return result


def _shared_units(adapters: Mapping[str, LoraAdapter], spec: MergeSpec, device: torch.device) -> dict[tuple[str, str], int]:
    """By (module, adapter): its units that lego puts in clusters with units of another adapter."""
    assert isinstance(spec.options, LegoOptions)
    terms, shared = ordered(adapters, spec), {}
    for pool in pool_units([adapters[term.adapter] for term in terms], terms, device):
        label_LN = clusters(pool, spec.options)
        count_TLK = torch.stack([one_hot(label_LN[:, t], int(label_LN.max()) + 1).sum(dim=1) for t in pool.owners])
        foreign_TLK = (count_TLK.sum(dim=0) > count_TLK) & (count_TLK > 0)
        units_TL = (count_TLK * foreign_TLK).sum(dim=2).tolist()
        for row, module in enumerate(pool.modules):
            shared.update({(module, terms[place].adapter): units_TL[t][row] for t, place in enumerate(pool.adapters)})
    return shared
