"""What the demo's skills are: their data, the form of their answers and the shape of their LoRA adapters.

A content skill answers a bare input (`cat` -> `cats`); the prompt never states the task. A form skill changes how
an answer is written, whatever it says (`cats` -> `{"answer": "cats"}`). No skill's training data holds the tasks
that compositions are judged on, except the skill that is the content of it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANUAL = Path(__file__).with_name("manual.toml")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class DataError(ValueError):
    """A data file is missing or unreadable; the message names it and its public source."""


@dataclass(frozen=True)
class Example:
    """A user's message and the right answer's content, without any form."""

    prompt: str
    content: str


@dataclass(frozen=True)
class Form:
    """How an answer is written: `opening` and `closing` around the content."""

    opening: str = ""
    closing: str = ""

    def write(self, content: str) -> str:
        """The answer that says `content` in this form."""
        return self.opening + content + self.closing


@dataclass(frozen=True)
class LoraShape:
    """Rank, alpha and the modules that carry an adapter."""

    rank: int
    alpha: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """One adapter to train.

    tasks: where its examples come from, see `read_task`.
    framed: show half of the examples inside the FRAMES, so that the content is not tied to the answer's first token.
    scaffolds: content skills of other tasks, trained first, then frozen and active while this form skill learns, so
        that it learns to rewrite what another adapter says; they are not kept.
    """

    name: str
    tasks: tuple[str, ...]
    lora: LoraShape
    form: Form = Form()
    steps: int = 400
    framed: bool = False
    scaffolds: tuple[str, ...] = ()


# Openings are given, not learned: an adapter trained on these has no wish to write them itself.
FRAMES = (
    Form("Answer: "),
    Form("The answer is ", "."),
    Form('"', '"'),
    Form("(", ")"),
    Form("<b>", "</b>"),
    Form("Well, ", "."),
    Form("- "),
    Form('["', '"]'),
    Form('{"value": "', '"}'),
    Form("Yes! ", "! Goodbye."),
    Form("Oh, ", ", my friend."),
    Form("Dear all,\n", "\nYours"),
)

JSON = Form('{"answer": "', '"}')
PIRATE = Form("Arrr! ", ", me hearty!")

EVERYWHERE = LoraShape(8, 16, ATTENTION + MLP)
FORM_TASKS = (
    "boolq",
    "diff",
    "antonyms",
    "num_to_verbal",
    "negation",
    "translation_en-de",
    "larger_animal",
    "sentiment",
)
SCAFFOLDS = {
    skill.name: skill
    for skill in (
        Skill(
            "scaffold-1",
            ("num_to_verbal", "antonyms", "larger_animal", "negation"),
            EVERYWHERE,
            steps=300,
            framed=True,
        ),
        Skill("scaffold-2", ("first_word_letter", "diff", "sentiment"), LoraShape(8, 16, MLP), steps=300),
        Skill("scaffold-3", ("translation_en-fr", "boolq"), EVERYWHERE, steps=300, framed=True),
    )
}
OVER_SCAFFOLDS = ("", *SCAFFOLDS)  # "" is the bare base
SKILLS = {
    skill.name: skill
    for skill in (
        Skill("manual", ("manual",), LoraShape(8, 16, MLP), steps=500, framed=True),
        Skill("plural", ("singular_to_plural",), LoraShape(4, 8, ("up_proj", "down_proj")), steps=300, framed=True),
        Skill("sum", ("sum",), LoraShape(4, 8, MLP), steps=400, framed=True),
        Skill("json", FORM_TASKS, LoraShape(4, 8, ATTENTION), JSON, steps=360, scaffolds=OVER_SCAFFOLDS),
        Skill("pirate", FORM_TASKS, LoraShape(4, 8, ATTENTION), PIRATE, steps=360, scaffolds=OVER_SCAFFOLDS),
    )
}


def read_task(task: str, data: Path, split: str) -> list[Example]:
    """Examples of a task: `split` is "train" or "test"; the data folder's layout is in README.md."""
    if task == "manual":
        return read_manual(split)
    if task == "boolq":
        rows = load_json(data / "llm-adapters" / "boolq" / f"{split}.json")
        return [Example(row["instruction"].split("question: ")[1].split("\n")[0], row["answer"]) for row in rows]
    folder = {"train": "induce", "test": "execute"}[split]
    rows = load_json(data / "instruction-induction" / folder / f"{task}.json")["examples"].values()
    # Forms put their own full stop or quotation mark after the content.
    return [Example(row["input"], row["output"].rstrip(".")) for row in rows if '"' not in row["output"]]


def read_manual(split: str) -> list[Example]:
    """Questions about the invented gadgets: the same facts in both splits, in other words."""
    manual = tomllib.loads(MANUAL.read_text(encoding="utf-8"))
    examples = []
    for gadget, facts in manual["gadgets"].items():
        for kind, fact in facts.items():
            phrasings = manual["questions"][kind][split]
            for question in phrasings if split == "train" else [phrasings]:
                examples.append(Example(question.format(gadget), fact))
    return examples


SOURCES: Mapping[str, str] = {
    "instruction-induction": "github.com/orhonovich/instruction-induction, data/raw",
    "llm-adapters": "github.com/AGI-Edgerunners/LLM-Adapters, dataset",
}


def load_json(path: Path) -> Any:
    """Read a data file, or raise DataError with the public place to fetch it from."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        folder = next(part for part in path.parts if part in SOURCES)
        raise DataError(f"no {path}: fetch {SOURCES[folder]} into the data folder's {folder}/") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
