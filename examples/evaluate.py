"""Measure adapters and their compositions by exact match, through a running OpenAI-compatible server.

    python examples/evaluate.py --url http://127.0.0.1:8000/v1 --data DIR [--items 100] [--json FILE]

Every row asks held-out questions of one model (the base, an adapter or a composition) at temperature 0 and counts the
answers that equal the expected text, character for character. The server must know the adapters of examples/adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import APIError, AsyncOpenAI
from skills import JSON, PIRATE, DataError, Example, Form, read_task
from tqdm.asyncio import tqdm

MAX_TOKENS = 32
CONCURRENCY = 16
PLAIN = Form()
TASKS = {"manual": "manual", "plural": "singular_to_plural", "sum": "sum"}
FORMS = {"json": JSON, "pirate": PIRATE}


@dataclass(frozen=True)
class Row:
    """One measurement: `model` asked about `skill`, its answer expected in `form`."""

    model: str
    skill: str
    form: Form


@dataclass(frozen=True)
class Score:
    """Exact matches of a row, and how many answers had the form's opening and closing, right or not."""

    model: str
    skill: str
    form: str
    right: int
    in_form: int
    items: int


def rows(base: str) -> list[Row]:
    """All that is measured: each part alone, then the compositions, those that fail included."""
    plan = []
    for skill in TASKS:
        plan += [Row(base, skill, PLAIN), Row(skill, skill, PLAIN)]
    for name, form in FORMS.items():
        for skill in TASKS:
            weights = ("", "*1.5", "*1.6") if skill == "manual" else ("", "*1.3")
            plan += [Row(name, skill, form), Row(skill, skill, form)]
            plan += [Row(f"cat({skill}+{name}{weight})", skill, form) for weight in weights]
            plan.append(Row(f"cat({skill}*0.5+{name}*0.5)", skill, form))
        plan += [Row(f"lego-12(manual+{name}*1.6)", "manual", form), Row(f"lego-8(plural+{name})", "plural", form)]
        plan.append(Row(f"linear(plural+{name})", "plural", form))
        for first, second in (("plural", "sum"), ("manual", "plural")):
            plan += [Row(f"cat({first}*0.7+{second}*0.7+{name}*1.6)", skill, form) for skill in (first, second)]
    return plan


async def measure(client: AsyncOpenAI, row: Row, examples: list[Example]) -> Score:
    """Ask all of the row's questions, at most CONCURRENCY at a time, and count."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def ask(example: Example) -> str:
        async with gate:
            reply = await client.chat.completions.create(
                model=row.model,
                messages=[{"role": "user", "content": example.prompt}],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
        return (reply.choices[0].message.content or "").strip()

    answers = await asyncio.gather(*(ask(example) for example in examples))
    form = row.form
    right = sum(answer == form.write(e.content) for answer, e in zip(answers, examples, strict=True))
    in_form = sum(answer.startswith(form.opening) and answer.endswith(form.closing) for answer in answers)
    name = next((name for name, known in FORMS.items() if known == form), "plain")
    return Score(row.model, row.skill, name, right, in_form, len(examples))


async def run(url: str, base: str | None, data: Path, items: int, done: Callable[[Score], None]) -> None:
    """Measure every row, one after the other, under a progress bar; `done` is told each."""
    examples = {skill: read_task(task, data, "test")[:items] for skill, task in TASKS.items()}
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        base = base or (await client.models.list()).data[0].id
        async for row in tqdm(rows(base), unit="row"):
            done(await measure(client, row, examples[row.skill]))


def main() -> None:
    """Measure; each row is printed, and written as JSON if asked to, as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's OpenAI route")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the public data")
    parser.add_argument("--base", metavar="NAME", help="the base model's name; the server's first model if not given")
    parser.add_argument("--items", type=int, default=100, help="questions a row (default 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    options = parser.parse_args()
    scores: list[Score] = []

    def done(s: Score) -> None:
        scores.append(s)
        tqdm.write(f"{s.model:44} {s.skill:7} {s.form:7} {100 * s.right / s.items:8.1f} {100 * s.in_form / s.items:10.1f}")
        if options.json:
            options.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n", encoding="utf-8")

    print(f"{'model':44} {'asked':7} {'form':7} {'right %':>8} {'in form %':>10}")
    try:
        asyncio.run(run(options.url, options.base, options.data, options.items, done))
    except (APIError, DataError) as error:
        sys.exit(f"evaluate.py: {options.url}: {error}" if isinstance(error, APIError) else f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
