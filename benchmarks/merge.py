"""How long a merge takes, beside PEFT's on the same adapters and beside the time that moving the bytes must take.

Needs torch and, for the comparison, peft. Adapters are drawn at random on the device, several sets of them, taken in turn,
so that no cache holds the inputs. Times are wall clock with the device synchronised: medians, with the quartiles beside.
"""

import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.adapters import random_adapter
from benchmarks.machine import device_name, hardware, head
from merging import LoraAdapter, MergeSpec, Term, merge
from server.shapes import ModelShape

SHAPES = {
    "smollm2-135m": ModelShape(layers=30, hidden=576, query=576, kv=192, mlp=1536),
    "llama-8b": ModelShape.named("llama-8b"),
    "llama-70b": ModelShape(layers=80, hidden=8192, query=8192, kv=1024, mlp=28672),
}
# PEFT's name for each method, where it has one.
METHODS: dict[str, str | None] = {
    "cat": "cat", "linear": "linear", "magnitude": "magnitude_prune", "ties": "ties", "dare": "dare_linear",
    "svd": "svd", "lego": None, "core-ties": None, "tsv": None, "iso": None,
}  # fmt: skip
_MOST_UNITS = {"core-ties": 256, "tsv": 256}  # their decompositions grow by the cube: beyond, seconds a merge on a GPU
_DENSITY = 0.5
_SCALING = 2
_WARM_UPS = 2  # after a first merge, in which a GPU's kernels are compiled: one is captured as a graph, one is launched as such
_CACHE_BYTES = 128 << 20  # over any device's last-level cache


def adapters_of(shape: str, count: int, rank: int, device: torch.device, seed: int) -> dict[str, LoraAdapter]:
    """Random adapters in bfloat16 on the device, digests known."""
    adapters = {}
    for t in range(count):
        adapters[f"a{t}"] = random_adapter(SHAPES[shape], rank, 100 * seed + t, device, _SCALING).to(device)
        adapters[f"a{t}"].__dict__["digest"] = f"{seed:08d}{t:02d}"  # content is random: reading it back would take longer
    return adapters


def spec_of(method: str, count: int, rank: int) -> MergeSpec:
    options = {"rank": rank} if method in ("lego", "svd", "tsv", "iso", "core-ties") else {}
    if method in ("ties", "dare", "magnitude", "core-ties"):
        options["density"] = _DENSITY
    return MergeSpec.create(method, [Term(f"a{t}", 0.5) for t in range(count)], options)


def timed(
    work: Callable[[int], object], device: torch.device, *, seconds: float, most: int = 50, warm_ups: int = 1
) -> list[float]:
    """Milliseconds of each run after those to warm up; as many as fit in `seconds`, three at least.

    A run of more than ten times `seconds` is all there is time for, and stands for itself; the first of several to warm up
    does not, since kernels are compiled in it.
    """
    times: list[float] = []
    for turn in range(most + warm_ups):
        _synchronise(device)
        started = time.perf_counter()
        work(turn)
        _synchronise(device)
        took = time.perf_counter() - started
        slow = took > 10 * seconds and (turn > 0 or warm_ups == 1)
        if turn >= warm_ups or slow:
            times.append(1e3 * took)
        if slow or (len(times) >= 3 and sum(times) > 1e3 * seconds):
            break
    return times


def held_bytes(merged: Callable[[], LoraAdapter], device: torch.device) -> tuple[int | None, LoraAdapter]:
    """The most that a merge holds beyond its inputs, its result included, on a GPU; and the result.

    To be asked of the first merge of a layout: later ones find the memory that their graph keeps.
    """
    if device.type != "cuda":
        return None, merged()
    _synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = merged()
    _synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before, out


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(1 << 30 if device.type == "cuda" else 1 << 28, dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    milliseconds = timed(lambda _: target.copy_(source), device, seconds=1.0)
    return 2 * source.nbytes / (statistics.median(milliseconds) / 1e3)


def with_peft(shape: str, sets: list[dict[str, LoraAdapter]], device: torch.device) -> Any:
    """A PEFT model that holds the first set's adapters on the device, its base weights empty."""
    import peft

    warnings.filterwarnings("ignore")
    linears = SHAPES[shape].linears

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (d_out, d_in) in linears.items():
                part, leaf = name.split(".")
                if not hasattr(self, part):
                    setattr(self, part, nn.Module())
                weight = torch.empty(1, device=device, dtype=torch.bfloat16).expand(d_out, d_in)
                linear = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                setattr(getattr(self, part), leaf, linear)

    base = nn.Module()
    base.model = nn.Module()
    base.model.layers = nn.ModuleList(Layer() for _ in range(SHAPES[shape].layers))
    model: Any = None
    for name, adapter in sets[0].items():
        targets = [linear.split(".")[1] for linear in linears]
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=_SCALING * adapter.rank, target_modules=targets)
        with torch.device(device):
            if model is None:
                model = peft.PeftModel(base, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
        for module, factors in adapter.modules.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = factors.a, factors.b.contiguous()
    return model


def peft_ms(model: Any, method: str, count: int, rank: int, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of PEFT's add_weighted_adapter."""
    options: dict[str, Any] = {"combination_type": METHODS[method]}
    if method in ("ties", "dare", "magnitude"):
        options["density"] = _DENSITY
    if method == "svd":
        options |= {"svd_rank": rank, "svd_full_matrices": False}

    def work(_: int) -> None:
        model.add_weighted_adapter([f"a{t}" for t in range(count)], [0.5] * count, "merged", **options)
        _synchronise(device)
        model.delete_adapter("merged")

    return timed(work, device, seconds=seconds, most=5)


def measure(
    cases: list[tuple[str, int, int]], methods: list[str], device: torch.device, *, peft_seconds: float, seconds: float
) -> Iterator[tuple[str, float]]:
    """Figures by name, as they come: `<shape>.<T>x<rank>.<method>.ms`, `.q1_ms`, `.q3_ms`, `.floor_ms`, `.peft_ms`.

    On a GPU also `.held_mib`, see `held_bytes`, and `.held_allowed_mib`: the result, and 20 % of inputs and result. A method is
    left out where a module has more units than `_MOST_UNITS` says.

    Args:
        peft_seconds: time for PEFT in all; what no longer fits is left out. svd, its slowest by far, comes last.
        seconds: time for each of our figures.
    """
    bandwidth = copy_bandwidth(device)
    yield "copy_gb_per_s", bandwidth / 1e9
    for shape, count, rank in cases:
        first = adapters_of(shape, count, rank, device, 0)
        size = sum(adapter.nbytes for adapter in first.values())
        sets = [first] + [adapters_of(shape, count, rank, device, seed) for seed in range(1, 1 + min(8, _CACHE_BYTES // size))]
        case = f"{shape}.{count}x{rank}"
        for method in methods:
            if count * rank > _MOST_UNITS.get(method, math.inf):
                continue
            spec = spec_of(method, count, rank)

            def work(turn: int, spec: MergeSpec = spec, sets: list[dict[str, LoraAdapter]] = sets) -> LoraAdapter:
                return merge(sets[turn % len(sets)], spec, device=device)

            held, out = held_bytes(partial(work, 0), device)
            times = timed(work, device, seconds=seconds, warm_ups=_WARM_UPS)
            if held is not None:
                yield f"{case}.{method}.held_mib", held / 2**20
                yield f"{case}.{method}.held_allowed_mib", (out.nbytes + 0.2 * (size + out.nbytes)) / 2**20
            yield f"{case}.{method}.floor_ms", 1e3 * (size + out.nbytes) / bandwidth
            if len(times) >= 3:
                quartiles = statistics.quantiles(times, n=4)
                yield f"{case}.{method}.q1_ms", quartiles[0]
                yield f"{case}.{method}.q3_ms", quartiles[2]
            yield f"{case}.{method}.ms", statistics.median(times)
        theirs = [method for method in sorted(methods, key=lambda m: m == "svd") if METHODS[method]]
        if peft_seconds > 0 and theirs:
            started = time.perf_counter()
            model = with_peft(shape, sets, device)
            for method in theirs:
                left = peft_seconds - (time.perf_counter() - started)
                if left <= 0 or (method == "svd" and shape != "smollm2-135m"):  # minutes for each merge: METHODS.md
                    continue
                yield f"{case}.{method}.peft_ms", statistics.median(peft_ms(model, method, count, rank, device, min(left, 3.0)))
            peft_seconds -= time.perf_counter() - started
            del model
        del sets, first


def save(figures: dict[str, float], device: torch.device, command: str, folder: Path) -> Path:
    """Write `merge-<device>.json`; the device is `h100` for an NVIDIA H100, `cpu` for a processor."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("peft", "triton"):
        if package in sys.modules:
            versions[package] = sys.modules[package].__version__
    where = hardware(device)
    path = folder / f"merge-{device_name(where, device.type)}.json"
    record = head("merge", where, versions, command) | {"figures": {key: round(value, 4) for key, value in figures.items()}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_case(text: str) -> tuple[str, int, int]:
    """`llama-8b.4x16` -> ("llama-8b", 4, 16). Raises ValueError."""
    shape, _, size = text.rpartition(".")
    count, _, rank = size.partition("x")
    if shape not in SHAPES or not (count.isdecimal() and rank.isdecimal()):
        raise ValueError(f"{text!r} is no case; write SHAPE.TxRANK with a shape of {', '.join(SHAPES)}")
    return shape, int(count), int(rank)
