"""The small problems on the GPU: clusters, roots, singular vectors, against the CPU's own and LAPACK's."""

from types import SimpleNamespace

import pytest
import torch
from torch.linalg import norm

from merging.core import CoreSpace, basis, singular_basis
from merging.eigen import eigh, svd
from merging.kmeans import kmeans
from merging.methods import METHODS
from merging.nearest import leading

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOAT32, FLOAT64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stray(x):
    """How far some rows are from orthonormal."""
    return (x @ x.mT - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)).abs().max().item()


class Units:
    """Random units, all that a method asks of a pool, and the sum itself; `a` and `b` are (L, N, D)."""

    def __init__(self, a, b, coefficient_N, ranks):
        self.a, self.b, self.coefficient_N = a, b, coefficient_N
        grams = [(x.float() @ x.float().mT).double().cuda() for x in (a, b)]
        ends = torch.tensor(ranks).cumsum(0).tolist()
        self.pool = SimpleNamespace(
            gram_a_LNN=grams[0],
            gram_b_LNN=grams[1],
            fine_grams=(*grams, FLOAT32),
            peak_a_LN=a.abs().amax(2).cuda(),
            peak_b_LN=b.abs().amax(2).cuda(),
            sign_a_LN=a.gather(2, a.abs().argmax(dim=2, keepdim=True)).squeeze(2).sign().cuda(),
            coefficient_LN=coefficient_N.expand(len(a), -1).cuda(),
            ranks=ranks,
            units=sum(ranks),
            owners=[slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)],
        )

    @classmethod
    def random(cls, ranks, *, decay=1.0, layers=2, widths=(1700, 1500)):
        units = sum(ranks)
        return cls(
            *(normal(layers, units, width, seed=width) for width in widths), decay ** torch.arange(units).double(), ranks
        )

    @property
    def total(self):
        return self.b.mT @ (self.coefficient_N[:, None] * self.a)

    def merge(self, method, **options):
        mixed = METHODS[method].assemble(self.pool, METHODS[method].parse_options(options))
        return mixed.t_a_LKN.cpu() @ self.a, mixed.t_b_LKN.cpu() @ self.b


@pytest.mark.parametrize("units", [16, 40, 64, 128, 256, 1024])
def test_clusters_are_the_cpus(units):
    k = max(4, units // 8)
    middle, noise = 4 * normal(3, k, 40), normal(3, units, 40, seed=1)
    points = middle[:, torch.randint(k, (units,), generator=torch.Generator().manual_seed(2))] + noise
    gram = points @ points.mT
    for rounds in (1, 3, 20):
        given = kmeans(gram.cuda(), k, restarts=3, rounds=rounds, seed=5)
        assert torch.equal(given.cpu(), kmeans(gram, k, restarts=3, rounds=rounds, seed=5))


def test_more_clusters_than_a_tile_of_the_kernel_holds():
    middle = 4 * normal(2, 150, 40)
    points = torch.cat([middle + 0.1 * normal(2, 150, 40, seed=1), middle - 0.1 * normal(2, 150, 40, seed=2)], dim=1)
    gram = points @ points.mT
    for k in (100, 149):
        given = kmeans(gram.cuda(), k, restarts=2, rounds=20, seed=0).cpu()
        assert torch.equal(given, kmeans(gram, k, restarts=2, rounds=20, seed=0))


def test_copies_of_points_share_a_cluster():
    points = normal(2, 75, 20).repeat(1, 2, 1)
    label = kmeans((points @ points.mT).cuda(), 75, restarts=2, rounds=20, seed=0)
    assert torch.equal(label[:, :75], label[:, 75:])
    assert all(row.unique().numel() == 75 for row in label)


@pytest.mark.parametrize("units", [5, 16, 40, 64, 100, 128])
def test_roots_of_gram_matrices_that_are_singular_and_badly_scaled(units):
    x = normal(3, units, 300, seed=units)
    x[:, 1], x[:, 3] = -2 * x[:, 0], 0
    x *= torch.logspace(-6, 6, units, dtype=torch.float64)[torch.randperm(units)][:, None]
    gram = x @ x.mT
    given = basis(gram.cuda(), FLOAT64)
    root, inverse = given.root_LNN.cpu(), given.inverse_LNN.cpu()
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    assert ((root @ root.mT - gram).abs() <= 1e-13 * length[:, :, None] * length[:, None, :]).all()
    assert (inverse[:, : units - 2] @ x).isfinite().all()
    assert stray(inverse[:, : units - 2] @ x) < 1e-10
    assert not root[:, :, units - 2 :].any()
    assert not inverse[:, units - 2 :].any()


def test_directions_below_the_noise_are_dropped():
    x = normal(1, 40, 500)
    x[:, 20:] = x[:, :20] + 1e-5 * x[:, 20:]
    given = basis((x @ x.mT).cuda(), FLOAT32)
    assert (given.root_LNN.abs().amax(1) > 0).sum() == 20
    left = given.inverse_LNN.cpu()[:, :20] @ x
    assert stray(left) < 1e-3
    assert norm(x - x @ left.mT @ left) < 1e-4 * norm(x)


@pytest.mark.parametrize("spectrum", ["random", "decaying", "clustered", "deficient"])
@pytest.mark.parametrize("units", [16, 40, 64, 100, 128, 129, 256, 512])
def test_singular_values_and_vectors(units, spectrum):
    x = normal(5, units, units, seed=units)
    if spectrum != "random":
        u, _, v = torch.linalg.svd(x)
        place = torch.arange(units)
        sigma = {"decaying": 0.8**place, "clustered": 1 + place // 4, "deficient": (place < units // 2) * 1.0}[
            spectrum
        ].double()
        x = (u * sigma) @ v
    u, sigma, v = (y.cpu() for y in svd(x.cuda()))
    wanted = torch.linalg.svdvals(x)
    assert ((sigma - wanted).abs() <= 3e-5 * wanted[:, :1]).all()
    assert (norm((u * sigma[:, None]) @ v - x, dim=(1, 2)) <= 5e-5 * norm(x, dim=(1, 2))).all()
    sure = int((wanted > 1e-2 * wanted[:, :1]).sum(1).min())
    assert stray(v[:, :sure]) < 2e-4
    assert stray(u.mT[:, :sure]) < 2e-3
    value, vector = (y.cpu() for y in eigh((x @ x.mT).cuda()))
    assert ((value.sqrt() - wanted).abs() <= 3e-5 * wanted[:, :1]).all()
    assert (norm((vector * value[:, None]) @ vector.mT - x @ x.mT, dim=(1, 2)) <= 1e-4 * norm(x @ x.mT, dim=(1, 2))).all()


@pytest.mark.parametrize("units", [129, 256, 512])
def test_vectors_of_large_problems_are_orthonormal_even_where_values_are_0(units):
    x = normal(3, units, units // 3, seed=units)
    x[2] = 0
    value, vector = (y.cpu() for y in eigh((x @ x.mT).cuda()))
    assert stray(vector.mT) < 1e-10
    assert not value[:, units // 3 :].any()
    assert not value[2].any()


@pytest.mark.parametrize("method", ["core-ties", "tsv"])
def test_sixteen_adapters_of_rank_16_merge_as_on_the_cpu(method):
    """Within what entries that are close to TIES' threshold, and singular values to each other, make of rounding."""
    units = Units.random((16,) * 16, decay=0.98)
    given_a, given_b = units.merge(method, rank=16)
    units.pool.__dict__.update({name: x.cpu() for name, x in vars(units.pool).items() if isinstance(x, torch.Tensor)})
    units.pool.fine_grams = (units.pool.gram_a_LNN, units.pool.gram_b_LNN, FLOAT32)
    a, b = units.merge(method, rank=16)
    assert (norm(given_b.mT @ given_a - b.mT @ a, dim=(1, 2)) <= 3e-2 * norm(b.mT @ a, dim=(1, 2))).all()


def test_the_singular_basis_is_that_of_the_cpu():
    x = normal(2, 40, 300) * 0.9 ** torch.arange(40)[:, None]
    given, wanted = singular_basis((x @ x.mT).cuda(), FLOAT64).root_LNN.cpu(), singular_basis(x @ x.mT, FLOAT64).root_LNN
    sign = (given * wanted).sum(1, keepdim=True).sign()
    torch.testing.assert_close(sign * given, wanted, rtol=0, atol=1e-3 * norm(x[:, 0], dim=1).max().item())


@pytest.mark.parametrize("decay", [1, 0.97, 0.8])
@pytest.mark.parametrize(("ranks", "k"), [((16,) * 4, 16), ((64, 64), 64), ((16,) * 16, 16), ((64,) * 4, 64), ((64,) * 16, 64)])
def test_svd_keeps_the_energy_that_can_be_kept(ranks, k, decay):
    units = Units.random(ranks, decay=decay)
    a, b = units.merge("svd", rank=k)
    total = units.total
    sigma = torch.linalg.svdvals(total).square()
    best, wanted = sigma[:, k:].sum(1), sigma[:, :k].sum(1)
    lost = norm(total - b.mT @ a, dim=(1, 2)).square() - best
    assert (lost <= (1e-4 if decay == 1 else 1e-6) * wanted).all()
    sides = (a @ a.mT - b @ b.mT).abs().amax(dim=(1, 2))
    assert (sides <= 1e-3 * sigma[:, 0].sqrt()).all()  # singular values are shared evenly


@pytest.mark.parametrize(("ranks", "k"), [((16,) * 4, 16), ((64, 64), 64), ((16,) * 16, 16), ((64,) * 4, 64), ((64,) * 16, 64)])
def test_iso_evens_the_spectrum(ranks, k):
    units = Units.random(ranks, decay=0.98)
    a, b = units.merge("iso", rank=k)
    u, sigma, v = torch.linalg.svd(units.total, full_matrices=False)
    wanted = sigma[:, :k].mean(1)[:, None, None] * (u[:, :, :k] @ v[:, :k])
    assert (norm(b.mT @ a - wanted, dim=(1, 2)) <= 2e-3 * norm(wanted, dim=(1, 2))).all()


def test_adapters_that_cancel_leave_nothing_and_nearly_equal_ones_their_difference():
    a, b = normal(1, 80, 600), normal(1, 80, 500, seed=1)
    a, b = torch.cat([a, a], dim=1), torch.cat([b, b], dim=1)
    for second in (-1.0, -0.999):
        units = Units(a, b, torch.tensor([1.0] * 80 + [second], dtype=torch.float64)[torch.arange(160).clamp(max=80)], (80, 80))
        merged_a, merged_b = units.merge("svd", rank=80)
        assert norm(merged_b.mT @ merged_a - units.total) <= 1e-4 * norm(units.total) + 1e-6 * norm(b[:, :80].mT @ a[:, :80])


def test_a_huge_unit_does_not_hide_the_others():
    units = Units.random((16,) * 16, decay=0.95)
    units.coefficient_N[7] = 1e4
    units.pool.coefficient_LN = units.coefficient_N.expand(2, -1).cuda()
    a, b = units.merge("svd", rank=16)
    best = torch.linalg.svdvals(units.total)[:, 16:].square().sum(1).sqrt()
    assert (norm(units.total - b.mT @ a, dim=(1, 2)) <= 1.01 * best).all()


@pytest.mark.parametrize("method", ["lego", "svd", "iso", "tsv", "core-ties"])
@pytest.mark.parametrize(("ranks", "k"), [((16,) * 4, 16), ((3, 8), 4), ((32,) * 8, 32)])
def test_graphs_replay_what_was_captured(method, ranks, k):
    pool = Units.random(ranks).pool
    options = METHODS[method].parse_options({"rank": k})

    def assemble():
        mixed = METHODS[method].assemble(pool, options)
        return [x for x in (mixed.t_a_LKN, mixed.t_b_LKN, mixed.peak_LK) if x is not None]

    graph = torch.cuda.CUDAGraph()
    eager = assemble()
    with torch.cuda.graph(graph):
        replayed = assemble()
    for _ in range(2):
        for x in replayed:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(eager, replayed, strict=True))


def test_bases_do_not_matter_to_what_they_span():
    pool = Units.random((16, 24), decay=0.9).pool
    cores = [CoreSpace(pool, root).core() for root in (basis, singular_basis)]
    torch.testing.assert_close(*(torch.linalg.svdvals(core.cpu())[:, :10] for core in cores), rtol=1e-4, atol=0)


def test_iteration_gives_orthonormal_mixtures():
    units = Units.random((16,) * 16)
    left, sigma, right = (x.cpu() for x in leading(*units.pool.fine_grams[:2], units.pool.coefficient_LN, 16, FLOAT32))
    assert stray(left @ units.b) < 1e-4
    assert stray(right @ units.a) < 1e-4
    torch.testing.assert_close(
        (left @ units.b) @ units.total @ (right @ units.a).mT, torch.diag_embed(sigma), rtol=1e-4, atol=1e-2
    )
