"""The parts of the benchmark: what is asked of which servers, and which figures follow.

A part raises TrafficError where a server does not answer as it must; figures it had before that stand.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.serving.bench import Bench
from benchmarks.serving.client import TrafficError
from benchmarks.serving.servers import BASE, SETUPS
from benchmarks.serving.trace import spread
from benchmarks.serving.traffic import Request, Script, recipes, zipf
from server.process import ServerProcess

TIERS = ("device", "host", "disk")
_PHASES = ("queue", "load", "copy", "merge", "commit")
ZIPF_EXPONENT = 1.1
ZIPF_TOKENS = 32
RATIO_TOKENS = 64


def storm(bench: Bench, loramix: ServerProcess, vllm: ServerProcess) -> None:
    """Gaps between tokens of running streams, in phases of equal length, each with streams of its own.

    `quiet`: nothing else (before and after the others, pooled). `traffic`: short requests for a composition that is resident,
    so that the price of the requests themselves is known. `storm`: the same requests, each for a composition never asked for
    before, of few adapters, used before. `storm_host`: the same, of all adapters in turn, so that on a GPU their store has none
    of them. Then vLLM's own server: `vllm_quiet`, and `vllm_load`: it loads one merged adapter after another
    from folders that the page cache holds, half a second between, each followed by a short request.

    `ready_ms_…` is the header `x-loramix-merge-ms`: from the request being parsed to the slot being written.
    """
    scale, names, seconds = bench.scale, bench.stage.names, bench.seconds / 7
    voices = list(bench.stage.voices)
    decodes = bench.decodes(voices)
    count = int(seconds / scale.every) + 1
    hot = names[: scale.hot]
    bench.ask(loramix, [*voices, *recipes(hot, scale.terms, scale.method, 3, 2 * len(hot), in_turn=True)])

    def arrivals(models: list[str]) -> list[Script]:
        short = itertools.cycle((1, 2, 3, 4))
        asked = ((i, bench.prompts.completion(model, next(short))) for i, model in enumerate(models))
        return [Script((request,), start=i * scale.every) for i, request in asked if i * scale.every < seconds]

    quiet = bench.window(loramix, decodes, seconds)
    bench.gaps("traffic", bench.window(loramix, decodes, seconds, arrivals([voices[0]] * count)))
    tier = "device" if bench.device == "cuda" else "host"
    _storm(bench, loramix, seconds, arrivals(recipes(hot, scale.terms, scale.method, 4, count)), "storm", tier)
    if bench.device == "cuda":
        bench.ask(loramix, recipes(names, scale.terms, scale.method, 5, len(names), in_turn=True))
        cold = recipes(names, scale.terms, scale.method, 6, count, in_turn=True)
        _storm(bench, loramix, seconds, arrivals(cold), "storm_host", "host")
    bench.gaps("quiet", quiet, bench.window(loramix, decodes, seconds))
    bench.figures["gap_ratio_p99_storm"] = bench.figures["gap_ms_p99_storm"] / bench.figures["gap_ms_p99_quiet"]
    if worst := loramix.metric("loramix_commit_seconds_max"):
        bench.figures["commit_ms_max"] = 1e3 * worst

    decodes = bench.decodes([f"v{i}" for i in range(scale.voices)])
    bench.gaps("vllm_quiet", bench.window(vllm, decodes, seconds))
    loading = bench.window(vllm, decodes, seconds, [Script(tuple(_loads(bench)), repeat=True)])
    bench.gaps("vllm_load", loading)
    loads = [1e3 * (answer.done - answer.sent) for answer in loading.beside.answers if answer.label == "load" and answer.done]
    bench.figures |= {"vllm_loads": len(loads)} | spread("vllm_load_ms", loads, "call")


def _storm(bench: Bench, server: ServerProcess, seconds: float, arrivals: list[Script], phase: str, tier: str) -> None:
    before = _sources(server), _phase_seconds(server)
    window = bench.window(server, bench.decodes(list(bench.stage.voices)), seconds, arrivals)
    bench.gaps(phase, window)
    bench.figures |= spread("ready_ms", window.beside.merged(), tier)
    bench.figures |= {
        f"{phase}_arrivals": len(window.beside.answers),
        f"{phase}_merged": len(window.beside.merged()),
        f"{phase}_failed": len(window.beside.failed()),
    }
    bench.figures |= _shares(f"{phase}_sources", before[0], _sources(server))
    for name, (total, count) in _phase_seconds(server).items():
        if grown := count - before[1][name][1]:
            bench.figures[f"{phase}_{name}_ms_mean"] = 1e3 * (total - before[1][name][0]) / grown


def _loads(bench: Bench) -> list[Request]:
    """Load, use and unload merged adapters; more rounds than there is time for, each load under a name of its own."""
    requests = []
    for i in range(4 * bench.scale.loads):
        name, folder = f"l{i}", str(bench.stage.merged / f"l{i % bench.scale.loads}")
        requests.append(Request("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, "load"))
        requests.append(bench.prompts.completion(name, 2))
        requests.append(Request("/v1/unload_lora_adapter", {"lora_name": name}, "unload", pause=0.5))
    return requests


def ttft(bench: Bench, loramix: ServerProcess) -> None:
    """Time to the first token of a cold composition, the same one warm, and a plain adapter; beside streams, and idle.

    One client asks in turn, with prompts of equal length and no shared prefix. From sending the request to its first chunk.
    """
    scale, seconds = bench.scale, bench.seconds / 2
    hot = bench.stage.names[: scale.hot]
    voices = list(bench.stage.voices)
    bench.ask(loramix, [*voices, *recipes(hot, scale.terms, scale.method, 7, len(hot), in_turn=True), hot[0]])
    fresh = iter(recipes(hot, scale.terms, scale.method, 8, 2 * int(50 * seconds + 10)))
    for suffix, streams in (("", bench.decodes(voices)), ("_idle", [])):
        requests = []
        for model in itertools.islice(fresh, int(50 * seconds + 10)):
            for label, name in (("cold", model), ("warm", model), ("plain", hot[0])):
                requests.append(bench.prompts.completion(name, 1, label))
        script = Script(tuple(requests), repeat=True)
        if streams:
            seen = bench.window(loramix, streams, seconds, [script]).beside
        else:
            seen = bench.window(loramix, [script], seconds).streams
        for label, tier in (("cold", "merged"), ("warm", "device"), ("plain", "device")):
            seen.answers = [a for a in seen.answers if a.label != label or a.cache in (tier, "")]
            times = seen.first_tokens(label)
            bench.figures |= spread("ttft_ms", times, label + suffix)
            bench.series.setdefault("ttft", {})[label + suffix] = [round(time, 3) for time in times]
    missing = {"ttft_ms_p50_cold", "ttft_ms_p50_warm", "ttft_ms_p50_plain"} - set(bench.figures)
    if missing:
        raise TrafficError(f"too little time for {', '.join(sorted(missing))}; give it more with --seconds-per-part")
    bench.figures["ttft_ms_cold_over_warm"] = bench.figures["ttft_ms_p50_cold"] - bench.figures["ttft_ms_p50_warm"]


def throughput(bench: Bench, loramix: ServerProcess) -> None:
    """Zipf traffic in a closed loop: every client asks for one composition after another, drawn by a power law."""
    scale = bench.scale
    population = recipes(bench.stage.names, scale.terms, scale.method, 9, scale.population)
    prompts = {model: bench.prompts.completion(model, ZIPF_TOKENS, "zipf") for model in population}
    draws = [zipf(population, ZIPF_EXPONENT, seed) for seed in range(scale.clients)]
    length = int(50 * bench.seconds + 10)
    scripts = [Script(tuple(prompts[model] for model in itertools.islice(draw, length)), repeat=True) for draw in draws]
    sources, hits = _sources(loramix), _lookups(loramix)
    window = bench.window(loramix, scripts, bench.seconds)
    answers = [a for a in window.streams.answers if a.done and window.begin <= a.done <= window.end]
    found = {result: count - hits[result] for result, count in _lookups(loramix).items()}
    bench.figures |= {
        "zipf_requests_per_s": len(answers) / (window.end - window.begin),
        "zipf_tokens_per_s": window.streams.token_rate(window.begin, window.end),
        "zipf_slot_hit_rate": found["hit"] / max(1.0, sum(found.values())),
    }
    bench.figures |= spread("zipf_ttft_ms", window.streams.first_tokens("zipf"), "all")
    bench.figures |= _shares("zipf_sources", sources, _sources(loramix))


def ratio(bench: Bench, loramix: ServerProcess, vllm: ServerProcess) -> None:
    """Warm compositions against plain vLLM LoRA requests: the same adapters, merged offline; closed loops, windows A B B A …"""
    models = {"warm": (loramix, list(bench.stage.voices)), "vllm": (vllm, [f"v{i}" for i in range(bench.scale.voices)])}
    for server, names in models.values():
        bench.ask(server, names)
    rounds = 4
    rates: dict[str, list[float]] = {"warm": [], "vllm": []}
    for turn in range(rounds):
        for side in ("warm", "vllm") if turn % 2 == 0 else ("vllm", "warm"):
            server, names = models[side]
            scripts = bench.prompts.streams(names, bench.scale.clients, RATIO_TOKENS)
            window = bench.window(server, scripts, bench.seconds / (2 * rounds))
            rates[side].append(window.streams.token_rate(window.begin, window.end))
    pairs = [a / b for a, b in zip(rates["warm"], rates["vllm"], strict=True)]
    bench.figures |= {
        "throughput_ratio_warm": sum(rates["warm"]) / sum(rates["vllm"]),
        "throughput_ratio_warm_min": min(pairs),
        "throughput_ratio_warm_max": max(pairs),
        "tokens_per_s_warm": sum(rates["warm"]) / rounds,
        "tokens_per_s_vllm": sum(rates["vllm"]) / rounds,
    }


def ranks(bench: Bench, server: ServerProcess, setup: str) -> None:
    """Tokens a second of the streams at a `--max-lora-rank`, with the voices as they are, and as exact sums where they fit."""
    limit = SETUPS[setup].ranks * bench.scale.rank
    recipes_by_name = {"lego": list(bench.stage.voices)}
    if SETUPS[setup].ranks >= bench.scale.terms:
        recipes_by_name["cat"] = [text.replace(bench.scale.method, "cat", 1) for text in bench.stage.voices]
    for name, models in recipes_by_name.items():
        bench.ask(server, models)
        window = bench.window(server, bench.decodes(models), bench.seconds / 4)
        bench.figures[f"tokens_per_s_rank{limit}_{name}"] = window.streams.token_rate(window.begin, window.end)


def price(bench: Bench, server: ServerProcess, setup: str) -> None:
    """Milliseconds a token of each stream: what LoRA costs, and what vLLM's settings for it bring."""
    models = [BASE] if SETUPS[setup].kind == "bare" else [f"v{i}" for i in range(bench.scale.voices)]
    window = bench.window(server, bench.decodes(models), bench.seconds / 3)
    rate = window.streams.token_rate(window.begin, window.end)
    bench.figures[f"token_ms_{setup}"] = 1e3 * bench.scale.streams / rate
    if "token_ms_base" in bench.figures:
        bench.figures[f"token_ratio_{setup}"] = bench.figures[f"token_ms_{setup}"] / bench.figures["token_ms_base"]


@dataclass(frozen=True)
class Trial:
    """A part, or a step of one: the servers it needs at the same time, and what it does with them."""

    part: str
    servers: tuple[str, ...]
    measure: Callable[..., None]

    def run(self, bench: Bench, up: dict[str, ServerProcess]) -> None:
        self.measure(bench, *(up[name] for name in self.servers))


def _step(part: Callable[[Bench, ServerProcess, str], None], setup: str) -> Trial:
    return Trial(part.__name__, (setup,), lambda bench, server: part(bench, server, setup))


TRIALS = (
    Trial("ttft", ("loramix",), ttft),
    Trial("zipf", ("loramix",), throughput),
    Trial("storm", ("loramix", "vllm"), storm),
    Trial("ratio", ("loramix", "vllm"), ratio),
    *(_step(ranks, setup) for setup in ("loramix", "loramix-2", "loramix-4")),
    *(_step(price, setup) for setup in SETUPS if setup in ("base", "lora") or setup.startswith("lora_")),
)
PARTS = tuple(dict.fromkeys(trial.part for trial in TRIALS))


def waves(trials: list[Trial], at_once: int, alike: Mapping[str, str]) -> list[list[Trial]]:
    """Trials in groups whose servers, all started at once, are at most `at_once` (a trial's own servers always fit).

    Args:
        alike: for each setup the one that stands for it.
    """
    groups: list[list[Trial]] = []
    servers: set[str] = set()
    for trial in trials:
        needed = {alike[name] for name in trial.servers}
        if not groups or len(servers | needed) > at_once:
            groups.append([])
            servers = set()
        groups[-1].append(trial)
        servers |= needed
    return groups


def _sources(server: ServerProcess) -> dict[str, float]:
    return {tier: server.metric("loramix_source_requests_total", tier=tier) for tier in TIERS}


def _lookups(server: ServerProcess) -> dict[str, float]:
    return {result: server.metric("loramix_cache_requests_total", result=result) for result in ("hit", "miss")}


def _phase_seconds(server: ServerProcess) -> dict[str, tuple[float, float]]:
    """(seconds in all, builds) by phase of a build."""
    name = "loramix_merge_seconds"
    return {
        phase: (server.metric(f"{name}_sum", phase=phase), server.metric(f"{name}_count", phase=phase)) for phase in _PHASES
    }


def _shares(name: str, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Which share of source adapters came from which tier; none where nothing was counted."""
    grown = {tier: after[tier] - before[tier] for tier in after}
    total = sum(grown.values())
    return {f"{name}_{tier}_share": count / total for tier, count in grown.items()} if total else {}
