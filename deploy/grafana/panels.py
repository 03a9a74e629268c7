"""What the dashboard shows: rows of panels, each with what it tells, its unit and its queries by legend.

In a query `@` stands for the servers that are looked at, and `[*]` for a span that suits the zoom.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One graph. `unit` is Grafana's name of one; a query's legend may name labels, as `{{method}}`."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]


def quantiles(histogram: str, by: str, legend: str, selector: str = "@") -> dict[str, str]:
    """The median and the 99th percentile of a histogram, for each value of the labels `by`."""
    return {
        f"{legend} {name}": f"histogram_quantile({q}, sum by (le, {by}) (rate({histogram}_bucket{{{selector}}}[*])))"
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Servers", "Servers that answer Prometheus. One that loads its model does not yet.", "short",
            {"up": 'sum(up{job="loramix", @})'},
        ),
        Panel(
            "Answers", "By why they ended: stop and length are as they should be.", "reqps",
            {"{{finished_reason}}": "sum by (finished_reason) (rate(vllm:request_success_total{@}[*]))"},
        ),
        Panel(
            "Streams by what they ask for", "Base model, a single adapter, or a composition; and where that came from.",
            "reqps",
            {"{{kind}}, {{tier}}": "sum by (kind, tier) (rate(loramix_first_token_seconds_count{@}[*]))"},
        ),
        Panel(
            "Refusals", "What the server could not take (queue, deadline, memory), what one client asked too much of (rate), "
            "what was too large (body, recipe), and what came while it was told to stop (draining).", "reqps",
            {"{{reason}}": "sum by (reason) (rate(loramix_refused_total{@}[*]))"},
        ),
        Panel(
            "Tokens", "Read and written, in a second.", "short",
            {
                "prompt": "sum(rate(vllm:prompt_tokens_total{@}[*]))",
                "generated": "sum(rate(vllm:generation_tokens_total{@}[*]))",
            },
        ),
        Panel(
            "Requests in the engine", "Waiting ones have their adapter, and wait for room in the batch.", "short",
            {"running": "sum(vllm:num_requests_running{@})", "waiting": "sum(vllm:num_requests_waiting{@})"},
        ),
    ],
    "Latency": [
        Panel(
            "First token, by kind", "Of streams, from the request's arrival, merge included.", "s",
            quantiles("loramix_first_token_seconds", "kind", "{{kind}}"),
        ),
        Panel(
            "First token of compositions, by where they came from",
            "device: it was in a slot; disk: read back; merged: this request waited for its merge.", "s",
            quantiles("loramix_first_token_seconds", "tier", "{{tier}}", '@, kind="composition"'),
        ),
        Panel(
            "Gaps between tokens", "Of all requests: a step of the engine decodes for all kinds together.", "s",
            quantiles("vllm:inter_token_latency_seconds", "model_name", "{{model_name}}"),
        ),
    ],
    "Merged adapters": [
        Panel(
            "Hit rate, by tier", "Of what was looked up there: device is a slot, disk what was not in one.", "percentunit",
            {
                "{{tier}}": 'sum by (tier) (rate(loramix_cache_requests_total{@, result="hit"}[*]))'
                " / sum by (tier) (rate(loramix_cache_requests_total{@}[*]))"
            },
        ),
        Panel(
            "Merges", "Those that nobody waited for any more are dropped; anything but ok and dropped needs a look.", "ops",
            {"{{method}}, {{outcome}}": "sum by (method, outcome) (rate(loramix_merges_total{@}[*]))"},
        ),
        Panel(
            "Evictions", "Merged adapters that left their slot for another. As fast as merges: slots are too few.", "ops",
            {
                "evictions": "sum(rate(loramix_evictions_total{@}[*]))",
                "merges": 'sum(rate(loramix_merges_total{@, outcome="ok"}[*]))',
            },
        ),
        Panel(
            "In slots, by method", "Merged adapters that the next request finds ready.", "short",
            {"{{method}}": "sum by (method) (loramix_resident_adapters{@})"},
        ),
        Panel(
            "Waiting for merges", "Requests that wait for one; merges that wait for a slot. The latter for long: more slots.",
            "short",
            {
                "requests": "sum(loramix_waiting_requests{@})",
                "merges in line": "sum(loramix_merge_queue_length{@})",
            },
        ),
        Panel(
            "Leases", "Requests that hold a merged adapter. Some while the engine has no requests for minutes: a leak.",
            "short",
            {"{{instance}}": "sum by (instance) (loramix_leases{@})"},
        ),
    ],
    "Merging": [
        Panel(
            "Time of a build, by phase",
            "queue: for a thread; disk: looking in the cache; load: sources from disk; copy: to the device; merge; "
            "commit: in the engine's thread, which decodes nothing meanwhile.", "s",
            quantiles("loramix_merge_seconds", "phase", "{{phase}}"),
        ),
        Panel(
            "Time of merging, by method", "The phase merge alone.", "s",
            quantiles("loramix_merge_seconds", "method", "{{method}}", '@, phase="merge"'),
        ),
        Panel(
            "Longest hold of the engine", "The longest that a build ever kept the engine's thread. Over 5 ms: tell us.", "s",
            {"{{instance}}": "max by (instance) (loramix_commit_seconds_max{@})"},
        ),
        Panel(
            "Sources, by where they were found", "Much from disk: more --adapter-host-gib.", "ops",
            {"{{tier}}": "sum by (tier) (rate(loramix_source_requests_total{@}[*]))"},
        ),
        Panel(
            "Adapters and presets", "What requests can name. Servers that differ were told different things.", "short",
            {
                "adapters, {{instance}}": "max by (instance) (loramix_adapters{@})",
                "presets, {{instance}}": "max by (instance) (loramix_presets{@})",
            },
        ),
    ],
    "Disk cache": [
        Panel(
            "Reads", "corrupt: an entry did not hold what it says, was removed and merged again.", "ops",
            {"{{result}}": "sum by (result) (rate(loramix_disk_reads_total{@}[*]))"},
        ),
        Panel(
            "Writes", "dropped: too many were waiting; left: its slot was given away first.", "ops",
            {"{{outcome}}": "sum by (outcome) (rate(loramix_disk_writes_total{@}[*]))"},
        ),
        Panel(
            "Time of an entry", "To read one that was there, and to write one.", "s",
            quantiles("loramix_disk_seconds", "operation", "{{operation}}"),
        ),
        Panel(
            "Errors", "What the disk refused. It costs time only.", "ops",
            {"{{operation}}, {{kind}}": "sum by (operation, kind) (rate(loramix_disk_errors_total{@}[*]))"},
        ),
        Panel(
            "Entries and evictions", "What a server saw in the folder; evictions as fast as writes: more --cache-disk-gib.",
            "short",
            {
                "entries": "max(loramix_disk_entries{@})",
                "evictions in a second": "sum(rate(loramix_disk_evictions_total{@}[*]))",
            },
        ),
        Panel(
            "Size", "At the limit (--cache-disk-gib) the entries unused for longest leave.", "bytes",
            {"on disk": "max(loramix_disk_bytes{@})"},
        ),
    ],
    "Memory": [
        Panel(
            "Adapters", "Merged ones in slots; sources on the device and in host memory.", "bytes",
            {
                "in slots": "sum(loramix_resident_bytes{@})",
                "sources, {{tier}}": "sum by (tier) (loramix_source_bytes{@})",
            },
        ),
        Panel(
            "KV cache in use", "Near 1, requests wait or are preempted.", "percentunit",
            {"{{instance}}": "max by (instance) (vllm:kv_cache_usage_perc{@})"},
        ),
        Panel(
            "Servers' host memory", "Of the process that answers requests; workers are not in it.", "bytes",
            {"{{instance}}": "sum by (instance) (process_resident_memory_bytes{@})"},
        ),
        Panel(
            "GPU memory", "From NVIDIA's DCGM exporter, of all GPUs that it watches.", "mbytes",
            {"{{Hostname}} GPU {{gpu}}": "DCGM_FI_DEV_FB_USED"},
        ),
    ],
}  # fmt: skip
