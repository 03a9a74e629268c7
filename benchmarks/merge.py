"""How long a merge takes, beside PEFT's on the same adapters and beside the time that moving the bytes must take.

Needs torch and, for the comparison, peft. Adapters are drawn at random on the device, several sets of them, taken in turn,
so that no cache holds the inputs. Times are wall clock with the device synchronised: medians, with the quartiles beside.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merging import LoraAdapter, LoraModule, MergeSpec, Term, merge
from merging.eigen import CUDA_LARGEST

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def _llama(hidden: int, kv: int, mlp: int) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear layers of one block."""
    return {
        _Q: (hidden, hidden), _K: (kv, hidden), _V: (kv, hidden), _O: (hidden, hidden),
        _GATE: (mlp, hidden), _UP: (mlp, hidden), _DOWN: (hidden, mlp),
    }  # fmt: skip


SHAPES = {  # layers, linear layers of one
    "smollm2-135m": (30, _llama(576, 192, 1536)),
    "llama-8b": (32, _llama(4096, 1024, 14336)),
    "llama-70b": (80, _llama(8192, 1024, 28672)),
}
# PEFT's name for each method, where it has one.
METHODS: dict[str, str | None] = {
    "cat": "cat", "linear": "linear", "magnitude": "magnitude_prune", "ties": "ties", "dare": "dare_linear",
    "svd": "svd", "lego": None, "core-ties": None, "tsv": None, "iso": None,
}  # fmt: skip
_DENSITY = 0.5
_WARM_UPS = 3  # on a GPU: kernels are compiled in the first merge of a layout, and captured as a graph in the second
_CACHE_BYTES = 128 << 20  # over any device's last-level cache


def adapters_of(shape: str, count: int, rank: int, device: torch.device, seed: int) -> dict[str, LoraAdapter]:
    """Random adapters in bfloat16 on the device, digests known."""
    layers, linears = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(seed)
    adapters = {}
    for t in range(count):
        modules = {}
        for layer in range(layers):
            for name, (d_out, d_in) in linears.items():
                a = torch.randn(rank, d_in, generator=generator, device=device) * d_in**-0.5
                b = torch.randn(d_out, rank, generator=generator, device=device) * 0.02
                modules[f"model.layers.{layer}.{name}"] = LoraModule(a.bfloat16(), b.bfloat16(), 2.0)
        adapters[f"a{t}"] = LoraAdapter(modules).to(device)
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
    layers, linears = SHAPES[shape]

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
    base.model.layers = nn.ModuleList(Layer() for _ in range(layers))
    model: Any = None
    for name, adapter in sets[0].items():
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=[n.split(".")[1] for n in linears])
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
            if device.type == "cuda" and method in ("core-ties", "tsv") and count * rank > CUDA_LARGEST:
                continue  # cuSOLVER takes minutes for one figure
            spec = spec_of(method, count, rank)
            out: LoraAdapter | None = None

            def work(turn: int, spec: MergeSpec = spec, sets: list[dict[str, LoraAdapter]] = sets) -> LoraAdapter:
                return merge(sets[turn % len(sets)], spec, device=device)

            times = timed(work, device, seconds=seconds, warm_ups=_WARM_UPS)
            out = work(0)
            yield f"{case}.{method}.ms", statistics.median(times)
            if len(times) >= 3:
                quartiles = statistics.quantiles(times, n=4)
                yield f"{case}.{method}.q1_ms", quartiles[0]
                yield f"{case}.{method}.q3_ms", quartiles[2]
            yield f"{case}.{method}.floor_ms", 1e3 * (size + out.nbytes) / bandwidth
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


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.processor()}, {torch.get_num_threads()} threads"


def save(figures: dict[str, float], device: torch.device, command: str, folder: Path) -> Path:
    """Write `merge-<device>.json`; the device is `h100` for an NVIDIA H100, `cpu` for a processor."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("peft", "triton"):
        if package in sys.modules:
            versions[package] = sys.modules[package].__version__
    name = "cpu" if device.type == "cpu" else hardware(device).split()[1].lower()
    path = folder / f"merge-{name}.json"
    record = {
        "benchmark": "merge", "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "hardware": hardware(device),
        "versions": versions, "command": command, "figures": {key: round(value, 4) for key, value in figures.items()},
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", action="append", help="SHAPE.TxRANK, such as llama-8b.4x16; repeatable")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--peft-seconds", type=float, default=60.0, help="for PEFT in all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    device = torch.device(given.device)
    cases = [parse_case(text) for text in given.case or (["llama-8b.4x16"] if device.type == "cuda" else ["smollm2-135m.4x8"])]
    figures = {}
    for name, value in measure(cases, given.methods.split(","), device, peft_seconds=given.peft_seconds, seconds=given.seconds):
        figures[name] = value
        if not name.endswith(("q1_ms", "q3_ms")):
            print(f"{name:40} {value:10.3f}", flush=True)
    print(save(figures, device, "loramix bench merge " + " ".join(sys.argv[1:]), given.out))


def parse_case(text: str) -> tuple[str, int, int]:
    """`llama-8b.4x16` -> ("llama-8b", 4, 16). Raises ValueError."""
    shape, _, size = text.rpartition(".")
    count, _, rank = size.partition("x")
    if shape not in SHAPES or not (count.isdecimal() and rank.isdecimal()):
        raise ValueError(f"{text!r} is no case; write SHAPE.TxRANK with a shape of {', '.join(SHAPES)}")
    return shape, int(count), int(rank)


if __name__ == "__main__":
    main()
