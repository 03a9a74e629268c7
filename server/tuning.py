"""Configurations of vLLM's LoRA kernels: which launches a model makes, the search for a faster one, and the files.

vLLM multiplies by A (`shrink`) and by B (`expand`) with one launch each for all layers that share an input; they are its
slices: 3 for query, key and value, 2 for gate and up. It looks a launch's configuration up in a file of
VLLM_TUNED_CONFIG_FOLDER by `[max_loras + 1][slices][tokens][k][n]`, and takes the nearest number at every level but slices,
where a missing one ends the engine (vllm/lora/ops/triton_ops/utils.py, the same in 0.26 and 0.32). So a file has entries for
all numbers of slices.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.shapes import ModelShape

Config = dict[str, int | None]
FOLDER = (
    Path(__file__).parents[1] / "deploy" / "lora_configs"
)  # those that come with loramix, all measured on the GPU they name

# What may be changed of vLLM's own configuration, what matters most first.
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "shrink": {
        "split_k": (1, 2, 4, 8, 16, 32, 64), "block_k": (64, 128, 256, 512, 1024), "num_warps": (1, 2, 4, 8),
        "block_m": (16, 32, 64), "block_n": (16, 32, 64), "num_stages": (1, 2, 3, 4),
    },
    "expand": {
        "block_n": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8), "block_m": (16, 32, 64, 128),
        "block_k": (16, 32, 64), "num_stages": (1, 2, 3),
    },
}  # fmt: skip
_SLICES = range(1, 9)  # more than any layer of vLLM's packs
_GAIN = 0.99  # of the best time so far, that a new one has to stay under: less is noise


@dataclass(frozen=True)
class Launch:
    """One launch of a LoRA kernel.

    Attributes:
        kernel: `shrink` or `expand`.
        inputs: d_in of the layers (of a shard); unused by `expand`.
        outputs: d_out of each slice (of a shard).
        rank: `--max-lora-rank`.
        tokens: in the batch.
    """

    kernel: str
    inputs: int
    outputs: tuple[int, ...]
    rank: int
    tokens: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """(slices, tokens, k, n): where its configuration stands."""
        sizes = (self.inputs, self.rank) if self.kernel == "shrink" else (self.rank, max(self.outputs))
        return len(self.outputs), self.tokens, *sizes


def launches(shape: ModelShape, rank: int, tokens: Sequence[int], shards: int = 1) -> list[Launch]:
    """Every launch of one block that has a configuration of its own, in the order of `tokens`.

    Args:
        shards: `--tensor-parallel-size`: the first layers of a pair are split by outputs, the second by inputs.
    """
    groups = (
        (shape.hidden, (shape.query // shards, shape.kv // shards, shape.kv // shards)),
        (shape.query // shards, (shape.hidden,)),
        (shape.hidden, (shape.mlp // shards, shape.mlp // shards)),
        (shape.mlp // shards, (shape.hidden,)),
    )
    every = [Launch(kernel, inputs, outputs, rank, count) for count in tokens for kernel in SPACE for inputs, outputs in groups]
    return list({(launch.kernel, launch.place): launch for launch in reversed(every)}.values())[::-1]


def search(
    starts: Iterable[Config], space: Mapping[str, Sequence[int]], microseconds: Callable[[Config], float], until: float
) -> Config:
    """The fastest configuration found: from the best start, one setting changed at a time, as long as that helps.

    Args:
        starts: tried all of them, however little time there is.
        microseconds: measures a configuration; infinite where it cannot be used.
        until: `time.monotonic()` at which the search ends with what it has.
    """
    times: dict[tuple[tuple[str, int | None], ...], float] = {}

    def tried(config: Config) -> float:
        key = tuple(sorted(config.items()))
        if key not in times:
            times[key] = microseconds(config)
        return times[key]

    best = min(starts, key=tried)
    better = True
    while better:
        better = False
        for name, values in space.items():
            for value in values:
                candidate = best | {name: value}
                if time.monotonic() > until:
                    return best
                if tried(candidate) < _GAIN * tried(best):
                    best, better = candidate, True
    return best


@dataclass(frozen=True)
class Tuned:
    """A launch with its configuration, and microseconds with it and with vLLM's own."""

    launch: Launch
    config: Config
    microseconds: float
    default_microseconds: float


def tune(
    todo: Sequence[Launch],
    default: Callable[[Launch], Config],
    timer: Callable[[Launch], Callable[[Config], float]],
    seconds: float,
) -> Iterator[Tuned]:
    """Search for each launch in turn, as each is done; the time that is left is shared evenly among those that are left.

    A search starts from vLLM's own configuration and from what the launch before with the same kernel and layers ended with.
    """
    end = time.monotonic() + seconds
    ended: dict[tuple[str, int, tuple[int, ...]], Config] = {}
    for done, launch in enumerate(todo):
        now = time.monotonic()
        own, measure = default(launch), timer(launch)
        group = launch.kernel, launch.inputs, launch.outputs
        starts = [own, ended[group]] if group in ended else [own]
        found = search(starts, SPACE[launch.kernel], measure, now + (end - now) / (len(todo) - done))
        # Both once more: of many that are measured, the fastest looks faster than it is.
        best, usual = measure(found), measure(own)
        if best >= usual:
            found, best = own, usual
        ended[group] = found
        yield Tuned(launch, found, best, usual)


def write(results: Sequence[Tuned], default: Callable[[Launch], Config], max_loras: int, gpu: str, folder: Path) -> list[Path]:
    """Put configurations into the files of that GPU; what else stands in them stays.

    Numbers of slices that the model has not get vLLM's own configurations, so that another model finds some.

    Raises:
        ConfigError: where a file that is there cannot be read.
    """
    stem = gpu.replace(" ", "_").replace("-", "_")
    paths = {"shrink": folder / f"{stem}_SHRINK.json", "expand": folder / f"{stem}_EXPAND_TRUE.json"}
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, path in paths.items():
        try:
            table = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON ({error}); move it away") from error
        by_slices = table.setdefault(str(max_loras + 1), {})  # one more: tokens without an adapter
        own = [tuned for tuned in results if tuned.launch.kernel == kernel]
        for tuned in own:
            _put(by_slices, tuned.launch.place, tuned.config)
        for slices in _SLICES:
            if str(slices) not in by_slices:
                for tuned in own:
                    _put(by_slices, (slices, *tuned.launch.place[1:]), default(tuned.launch))
        path.write_text(json.dumps(table, indent=1) + "\n")
    return list(paths.values())


def _put(table: dict[str, Any], place: Sequence[int], config: Config) -> None:
    for level in place[:-1]:
        table = table.setdefault(str(level), {})
    table[str(place[-1])] = config
