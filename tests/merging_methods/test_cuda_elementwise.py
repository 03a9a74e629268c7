"""Blends on the GPU are what they are on the CPU: the same entries kept, the same signs elected, the same sums."""

import pytest
import torch

from merging.cuda_tables import SideTable, TargetTable
from merging.elementwise import Blend, Largest, Random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BLENDS = {
    "linear": Blend(),
    "magnitude": Blend(Largest(0.5)),
    "magnitude-all": Blend(Largest(1.0)),
    "ties": Blend(Largest(0.2), "total"),
    "ties-frequency": Blend(Largest(0.37), "frequency"),
    "ties-nothing": Blend(Largest(1e-9), "total"),
    "ties-few": Blend(Largest(0.005), "total"),
    "dare": Blend(Random(0.5, 0)),
    "dare-all": Blend(Random(1.0, 3)),
    "dare-few": Blend(Random(0.01, 2**31 - 1)),
    "dare-ties": Blend(Random(0.7, 7), "total"),
    "dare-ties-frequency": Blend(Random(0.3, 7), "frequency"),
}


def drawn(widths, adapters, rank, dtype, seed=0):
    """Factors, L lists of T tensors (R, D): of scales far apart, with some zeros."""
    generator = torch.Generator().manual_seed(seed)

    def factor(width, t):
        x_RD = torch.randn(rank, width, generator=generator) * 10.0 ** (t % 3 - 2)
        return (x_RD * (torch.rand(rank, width, generator=generator) > 0.1)).to(dtype)

    return [[factor(width, t) for t in range(adapters)] for width in widths]


def coefficients(layers, adapters):
    generator = torch.Generator().manual_seed(layers * adapters)
    return (
        torch.randn(layers, adapters, generator=generator),
        torch.randint(2**31, (layers, adapters), generator=generator),
    )


def wanted(blend, factors, weight_LT, key_LT):
    """What the CPU makes of each module's factors, (R, D) float32."""
    return [
        blend([x_RD[None] for x_RD in parts], weight_LT[[module]], key_LT[[module]])[0] for module, parts in enumerate(factors)
    ]


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def blended(blend, factors, weight_LT, key_LT, *, units_fast, dtype, rank=None, windows=None):
    """Through the kernels into poisoned room with a margin: for each module what lies in its window, (K, W)."""
    from merging.cuda_elementwise import blend_rows

    factors = [[x_RD.to(DEVICE) for x_RD in parts] for parts in factors]
    widths = tuple(parts[0].shape[1] for parts in factors)
    windows = windows or [(0, width) for width in widths]
    ranks = tuple(x_RD.shape[0] for x_RD in factors[0])
    rank = rank or ranks[0]
    side = SideTable(
        address_LT=torch.tensor([[x_RD.data_ptr() for x_RD in parts] for parts in factors], device=DEVICE),
        width_L=integers(widths),
        widths=widths,
        owner_N=integers([t for t, r in enumerate(ranks) for _ in range(r)]),
        row_N=integers([row for r in ranks for row in range(r)]),
        ranks=ranks,
        dtype=factors[0][0].dtype,
        aligned=not any(width % 8 for width in widths),
    )
    shapes = [(width, rank) if units_fast else (rank, width) for _, width in windows]
    rooms = [torch.full((rows + 2, columns), torch.nan, dtype=dtype, device=DEVICE) for rows, columns in shapes]
    inner = [room[1:-1] for room in rooms]
    lengths = tuple(width for _, width in windows)
    size = 16 // dtype.itemsize
    even = all(y.data_ptr() % 16 == 0 and y.stride(0) % size == 0 for y in inner)
    target = TargetTable(
        address_L=torch.tensor([y.data_ptr() for y in inner], device=DEVICE),
        stride_k_L=integers([1] * len(widths) if units_fast else lengths),
        stride_d_L=integers([rank if units_fast else 1] * len(widths)),
        first_L=integers([first for first, _ in windows]),
        width_L=integers(lengths),
        widths=lengths,
        rank=rank,
        dtype=dtype,
        units_fast=units_fast,
        aligned=even and not any(number % 8 for window in windows for number in window),
    )
    blend_rows(side, blend, weight_LT.to(DEVICE), key_LT.to(DEVICE), target)
    assert all(room[[0, -1]].isnan().all() for room in rooms), "written beyond the room"
    return [(y.mT if units_fast else y).cpu() for y in inner]


def assert_blend(blend, factors, *, units_fast=False, dtype=torch.float32, rank=None, windows=None):
    weight_LT, key_LT = coefficients(len(factors), len(factors[0]))
    given = blended(blend, factors, weight_LT, key_LT, units_fast=units_fast, dtype=dtype, rank=rank, windows=windows)
    for module, expected_RD in enumerate(wanted(blend, factors, weight_LT, key_LT)):
        first, width = windows[module] if windows else (0, expected_RD.shape[1])
        expected_RW = expected_RD[:, first : first + width]
        merged = len(expected_RW)
        # Where entries cancel, what is left is rounding: of the size of the largest summand.
        noise = 1e-6 * float(expected_RD.abs().max())
        torch.testing.assert_close(given[module][:merged].float(), expected_RW, rtol=RTOL[dtype], atol=noise)
        assert torch.equal(given[module][:merged] == 0, expected_RW.to(dtype) == 0), "other entries were dropped"
        assert not given[module][merged:].any(), "rows beyond the merged rank are zeros"


@pytest.mark.parametrize("units_fast", [False, True])
@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("name", list(BLENDS))
def test_blend_of_modules_of_many_widths(name, dtype, units_fast):
    factors = drawn((96, 200, 72, 136, 1024), adapters=3, rank=7, dtype=dtype)
    assert_blend(BLENDS[name], factors, units_fast=units_fast)


@pytest.mark.parametrize("adapters", range(1, 17))
@pytest.mark.parametrize("name", ["linear", "ties", "dare-ties-frequency"])
def test_any_number_of_adapters(name, adapters):
    assert_blend(BLENDS[name], drawn((160, 72), adapters, rank=8, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("name", ["magnitude", "ties", "dare"])
def test_any_rank_and_width(name, rank, dtype):
    assert_blend(BLENDS[name], drawn((13, 129, 40, 1), 2, rank, dtype), units_fast=True, rank=48, dtype=dtype)


@pytest.mark.parametrize("units_fast", [False, True])
@pytest.mark.parametrize("name", ["linear", "ties", "dare"])
def test_windows_of_a_sharded_module(name, units_fast):
    """What is kept is decided over the whole factor, whichever part is written."""
    factors = drawn((512, 384, 200), adapters=4, rank=16, dtype=torch.bfloat16)
    windows = [(128, 128), (130, 253), (0, 3)]
    assert_blend(BLENDS[name], factors, units_fast=units_fast, dtype=torch.bfloat16, rank=64, windows=windows)


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("name", ["magnitude", "ties"])
def test_entries_that_tie_with_the_last_kept_stay(name, dtype):
    """Entries of few magnitudes, so that every threshold falls among equals."""
    generator = torch.Generator().manual_seed(0)
    factors = [[torch.randint(-3, 4, (8, width), generator=generator).to(dtype) for _ in range(3)] for width in (64, 300)]
    assert_blend(BLENDS[name], factors)


@pytest.mark.parametrize("dtype", list(RTOL))
def test_thresholds_between_neighbours_in_the_last_bit(dtype):
    """All entries differ from the next by the last bit alone: one entry too many or too few would show."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    start = int(torch.tensor([1.0], dtype=dtype).view(bits))
    order = torch.randperm(4 * 100, generator=torch.Generator().manual_seed(0))
    factors = [[(start + order).to(bits).view(dtype).view(4, 100)]]
    for keep in (1, 2, 199, 399):
        assert_blend(Blend(Largest((keep + 0.5) / 400)), factors)


@pytest.mark.parametrize("dtype", list(RTOL))
def test_wide_factors(dtype):
    """Several rounds of the threshold's counting."""
    assert_blend(BLENDS["ties"], drawn((4096, 14336, 1000), 2, 16, dtype), units_fast=True)
