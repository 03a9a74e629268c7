"""merge_into writes what merge returns, wherever the rooms lie, and nothing else."""

import pytest
import torch
from reference.adapters import random_adapter

from merging import METHODS, MergeSpec, RecipeError, Room, Rooms, Term, merge, merge_into

SHAPES = {f"model.layers.{i}.{kind}": (96, 160) if kind == "q" else (200, 72) for i in range(3) for kind in "qv"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]
RANK = 16


def rooms_of(windows=lambda width: (0, width), device="cpu", dtype=torch.float32, rank=RANK):
    """Poisoned rooms in slabs with a margin of one row around each, as an engine's slots lie side by side; the slabs too."""
    rooms, slabs = {}, []
    for name, (d_out, d_in) in SHAPES.items():
        (first_i, inputs), (first_o, outputs) = windows(d_in), windows(d_out)
        a = torch.full((3, rank, inputs), torch.nan, dtype=dtype, device=device)
        b = torch.full((3, outputs, rank), torch.nan, dtype=dtype, device=device)
        rooms[name] = Room(a[1], b[1], first_i, first_o)
        slabs += [a, b]
    return Rooms(rooms), slabs


def recipe(method, count=2, rank=4):
    adapters = {f"a{t}": random_adapter(t, rank, shapes=SHAPES) for t in range(count)}
    return adapters, MergeSpec.create(
        method, [Term(f"a{t}", weight) for t, weight in zip(range(count), (0.7, -1.2), strict=True)]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_rooms_hold_the_merged_factors_and_zeros_beyond_their_rank(method, device):
    adapters, spec = recipe(method)
    wanted = merge(adapters, spec, device=device, dtype=torch.float32)
    rooms, slabs = rooms_of(device=device)
    for _ in range(3):  # on a GPU: as it is, captured, replayed
        merge_into(adapters, spec, rooms)
    for name, room in rooms.items():
        module = wanted.modules[name]
        assert torch.equal(room.a_KI[: module.rank], module.a), name
        assert torch.equal(room.b_OK[:, : module.rank], module.b), name
        assert not room.a_KI[module.rank :].any(), name
        assert not room.b_OK[:, module.rank :].any(), name
    assert all(slab[[0, 2]].isnan().all() for slab in slabs), "written beyond a room"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["cat", "lego", "ties"])
@pytest.mark.parametrize("half", [0, 1])
def test_a_window_holds_its_part_of_the_whole(method, half, device):
    adapters, spec = recipe(method)
    whole, part = (
        rooms_of(device=device)[0],
        rooms_of(lambda width: (half * (width // 2), width // 2), device=device)[0],
    )
    merge_into(adapters, spec, whole)
    merge_into(adapters, spec, part)
    for name, room in part.items():
        inputs, outputs = room.a_KI.shape[1], room.b_OK.shape[0]
        assert torch.equal(room.a_KI, whole[name].a_KI[:, half * inputs : (half + 1) * inputs]), name
        assert torch.equal(room.b_OK, whole[name].b_OK[half * outputs : (half + 1) * outputs]), name


@pytest.mark.parametrize("device", DEVICES)
def test_rooms_that_the_recipe_does_not_touch_become_zeros(device):
    rooms, slabs = rooms_of(device=device)
    touched = {name: shape for name, shape in SHAPES.items() if name.endswith("q")}
    adapter = random_adapter(1, 4, shapes=touched)
    merge_into({"a": adapter}, MergeSpec.create("cat", [Term("a")]), rooms)
    for name, room in rooms.items():
        assert room.a_KI.any() == room.b_OK.any() == (name in touched), name
    assert all(slab[[0, 2]].isnan().all() for slab in slabs)


def test_a_merge_that_does_not_fit_writes_nothing():
    adapters, spec = recipe("cat", rank=9)
    rooms, slabs = rooms_of()
    with pytest.raises(RecipeError, match="rank 18, over the 16"):
        merge_into(adapters, spec, rooms)
    assert all(slab.isnan().all() for slab in slabs)


def test_a_module_without_room_is_refused():
    adapters, spec = recipe("cat")
    rooms, _ = rooms_of()
    with pytest.raises(RecipeError, match=r"no room for module model\.layers\.0\.q"):
        merge_into(adapters, spec, Rooms({name: room for name, room in rooms.items() if name != "model.layers.0.q"}))
