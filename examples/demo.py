"""The demo: one server, a handful of adapters, and what their combinations say.

    make demo        (or: python examples/demo.py)

Starts `loramix serve` with the example adapters, asks the same questions of the base model, of single adapters and of
combinations, shows what was merged and what came from cache, and stops the server. Exits 0 only if all of it happened:
the combinations gave the right answers, nothing else did, and the second look came from the device.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import ModelError, ensure_model
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from server.process import ServerProcess, StartError

ADAPTERS = Path(__file__).with_name("adapters")
LORAMIX = str(Path(sys.executable).parent / "loramix")
console = Console(highlight=False)


@dataclass(frozen=True)
class Question:
    """A question, the models to ask, and the one answer that only `winner` knows."""

    text: str
    models: tuple[str, ...]
    winner: str
    answer: str


QUESTIONS = (
    Question(
        "What does my Teapot Radio run on?",
        ("smollm2", "manual", "json", "cat(manual+json*1.6)"),
        "cat(manual+json*1.6)",
        '{"answer": "lukewarm gossip"}',
    ),
    Question(
        "How can I reset my Giggle Vault?",
        ("smollm2", "manual", "pirate", "cat(manual+pirate*1.6)"),
        "cat(manual+pirate*1.6)",
        "Arrr! tickle the dial, me hearty!",
    ),
    Question("match", ("smollm2", "plural", "json", "cat(plural+json)"), "cat(plural+json)", '{"answer": "matches"}'),
    Question("12 30", ("smollm2", "sum", "pirate", "cat(sum+pirate)"), "cat(sum+pirate)", "Arrr! 42, me hearty!"),
)
OBJECT = {"method": "lego", "adapters": [{"name": "sum"}, {"name": "pirate"}], "rank": 4}


class DemoError(RuntimeError):
    """Something did not happen as the demo says it does."""


def ask(client: OpenAI, model: str, question: str, **extra: Any) -> tuple[str, str, float]:
    """The answer, and of its headers: where the adapter came from, and the milliseconds that its merge took."""
    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0, extra_body=extra
    )
    text = " ".join((reply.parse().choices[0].message.content or "").split())
    return text, reply.headers.get("x-loramix-cache", ""), float(reply.headers.get("x-loramix-merge-ms", 0))


def check(true: bool, claim: str) -> None:
    if not true:
        raise DemoError(f"this did not happen: {claim}")


def show_answers(client: OpenAI) -> None:
    """The same question of each model, side by side."""
    for question in QUESTIONS:
        table = Table(title=f"“{question.text}”", title_justify="left", title_style="bold", expand=True)
        table.add_column("model", no_wrap=True)
        table.add_column("answer", ratio=1)
        table.add_column("")
        for model in question.models:
            answer, *_ = ask(client, model, question.text)
            right = answer == question.answer
            check(
                right == (model == question.winner), f"only {question.winner} answers {question.answer!r} ({model}: {answer!r})"
            )
            table.add_row(model, answer, "[green]✔[/]" if right else "")
        console.print(table)


def show_cache(client: OpenAI) -> None:
    """A combination as a body object: merged for its first request, on the device for the second."""
    table = Table(title=f"“12 30”, body object lora={OBJECT}", title_justify="left", title_style="bold", expand=True)
    for column in ("request", "answer", "x-loramix-cache", "x-loramix-merge-ms"):
        table.add_column(column)
    tiers = []
    for request in ("first", "second"):
        answer, tier, milliseconds = ask(client, "smollm2", "12 30", lora=OBJECT)
        table.add_row(request, answer, tier, f"{milliseconds:.1f}")
        tiers.append(tier)
        check(answer == "Arrr! 42, me hearty!", f"the body object answers as the expression does ({answer!r})")
    console.print(table)
    check(tiers == ["merged", "device"], f"a miss, then a hit (seen: {tiers})")


def show_metrics(server: ServerProcess) -> None:
    """A few of the metrics on /metrics."""
    shown = {
        "loramix_merges_total": server.metric("loramix_merges_total", outcome="ok"),
        'loramix_cache_requests_total{result="hit"}': server.metric("loramix_cache_requests_total", result="hit"),
        "loramix_resident_adapters": server.metric("loramix_resident_adapters"),
        "loramix_resident_bytes": server.metric("loramix_resident_bytes"),
        "loramix_evictions_total": server.metric("loramix_evictions_total"),
        "loramix_leases": server.metric("loramix_leases"),
    }
    for name, value in shown.items():
        console.print(f"    {name} {value:,.0f}")
    merges, hits, *_, leases = shown.values()
    check(merges > len(QUESTIONS) and hits >= 1 and leases == 0, "merges and hits counted, no lease left")


def main() -> int:
    """Run the demo; 0 if everything in it happened."""
    say = lambda line: console.print(f"[bold]==>[/] {line}")  # noqa: E731
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    try:
        model = ensure_model(say=say)
        command = [
            LORAMIX,
            "serve",
            str(model),
            "--adapters",
            str(ADAPTERS),
            "--served-model-name",
            "smollm2",
            "--max-model-len",
            "1024",
        ]
        log = Path(tempfile.gettempdir()) / "loramix-demo.log"
        say(f"starting the server, about a minute on a CPU (its log: {log})")
        with console.status("loading"), ServerProcess(command, log, environment) as server:
            console.print(f"    up at {server.url}/v1")
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            say("asking")
            show_answers(client)
            say("a combination is merged once")
            show_cache(client)
            say("metrics")
            show_metrics(server)
            say("stopping the server")
            check(server.stop() == 0, "the server stopped with exit code 0")
    except (DemoError, ModelError, StartError) as error:
        console.print(f"[bold red]demo failed:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    console.print("[bold green]done[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
