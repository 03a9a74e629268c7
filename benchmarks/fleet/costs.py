"""What things cost, from the files of results: no figure stands in this code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.parts import RATIO_TOKENS
from benchmarks.serving.stage import SCALES
from server.shapes import ModelShape

_MEASURED = SCALES["cuda"]  # the sizes that serve-h100.json was measured with


@dataclass(frozen=True)
class Costs:
    """Of one replica: an H100 with an 8B shape and adapters of rank 16.

    Attributes:
        seats: requests that decode at a time: as many as the throughput was measured with.
        first_seconds: to a warm request's first token.
        token_seconds: of each further token, all seats taken.
        way_seconds: of a build, outside the helper threads: to the engine, between two of its steps.
        merge_seconds: of a helper thread, all sources on the device.
        host_seconds: what each source in host memory adds to that.
        read_seconds: what reading and checking one adapter file takes a helper thread.
        nbytes: of an adapter, merged or not.
    """

    seats: int
    first_seconds: float
    token_seconds: float
    way_seconds: float
    merge_seconds: float
    host_seconds: float
    read_seconds: float
    nbytes: int

    def request_seconds(self, tokens: int) -> float:
        """How long a request has a seat."""
        return self.first_seconds + (tokens - 1) * self.token_seconds

    def capacity(self, tokens: int) -> float:
        """Warm requests a second of one replica."""
        return self.seats / self.request_seconds(tokens)


def read_costs(results: Path, read_seconds: float) -> Costs:
    """The costs that `serve-h100.json` in the folder `results` tells.

    A build was measured with all sources on the device, and with nearly all in host memory: the line through both tells what
    a source in host memory costs. A token's time is what the throughput of warm compositions leaves of it.

    Args:
        read_seconds: to read and check an adapter's file, which that file does not tell.
    """
    figures: Mapping[str, float] = json.loads((results / "serve-h100.json").read_text())["figures"]
    first = figures["ttft_ms_p50_warm"] / 1e3
    request = _MEASURED.clients * RATIO_TOKENS / figures["tokens_per_s_warm"]
    near, host = (
        sum(figures[f"{phase}_{part}_ms_mean"] for part in ("copy", "merge")) / 1e3 for phase in ("storm", "storm_host")
    )
    waits = sum(figures[f"storm_{part}_ms_mean"] for part in ("queue", "load")) / 1e3
    return Costs(
        seats=_MEASURED.clients,
        first_seconds=first,
        token_seconds=(request - first) / (RATIO_TOKENS - 1),
        way_seconds=figures["ready_ms_p50_device"] / 1e3 - near - waits,
        merge_seconds=near,
        host_seconds=(host - near) / (_MEASURED.terms * figures["storm_host_sources_host_share"]),
        read_seconds=read_seconds,
        nbytes=adapter_bytes("llama-8b", _MEASURED.rank),
    )


def adapter_bytes(shape: str, rank: int) -> int:
    """Bytes of an adapter's factors in bfloat16, on all linear layers."""
    sizes = ModelShape.named(shape)
    return 2 * rank * sizes.layers * sum(d_out + d_in for d_out, d_in in sizes.linears.values())
