"""Which skills are trained and composed, and how much of everything.

A prompt states the task (`Plural: match`), never the form of the answer. All adapters are on all linear layers, with
alpha twice the rank, so that in every module there is something to merge.
"""

from dataclasses import dataclass

from skills import ATTENTION, JSON, MLP, PIRATE, Form, LoraShape, Skill

RANK, MOST_RANK = 8, 16


@dataclass(frozen=True)
class Task:
    """Where a task's examples come from (see `read_task` in examples/skills.py), and how a prompt states it."""

    source: str
    prompt: str = "{}"


TASKS = {
    "plural": Task("singular_to_plural", "Plural: {}"),
    "sum": Task("sum", "Add: {}"),
    "words": Task("num_to_verbal", "In words: {}"),
    "opposite": Task("antonyms", "Opposite: {}"),
    "animal": Task("larger_animal", "Larger: {}"),
    "letter": Task("first_word_letter", "First letter: {}"),
    "passive": Task("active_to_passive", "Passive: {}"),
    "sentiment": Task("sentiment", "Sentiment: {}"),
    "difference": Task("diff", "Subtract: {}"),
    "negation": Task("negation", "Negate: {}"),
    "german": Task("translation_en-de", "In German: {}"),
    "boolq": Task("boolq"),
    "manual": Task("manual"),
    "sum-words": Task("sum", "Add, in words: {}"),  # its answers are those of `words`: see data.py
}
FORM_TASKS = ("boolq", "difference", "opposite", "words", "negation", "german", "animal", "sentiment")
# Content that forms are learned over; none of it is asked for in a pair with a form.
SCAFFOLDS = ("words", "opposite", "animal", "letter", "sentiment")


def lora(rank: int = RANK) -> LoraShape:
    return LoraShape(rank, 2 * rank, ATTENTION + MLP)


def content_skill(task: str, steps: int, rank: int = RANK) -> Skill:
    return Skill(task, (task,), lora(rank), steps=steps, framed=True)


def _form(name: str, form: Form, steps: int, scaffolds: tuple[str, ...] = ()) -> Skill:
    return Skill(name, FORM_TASKS, lora(), form, steps=steps, scaffolds=scaffolds)


CONTENTS = {
    task: content_skill(task, steps)
    for task, steps in {
        "plural": 160, "sum": 300, "words": 120, "opposite": 120, "animal": 120, "letter": 120, "passive": 120,
        "sentiment": 120, "manual": 400,
    }.items()
}  # fmt: skip
FORMS = {
    "json": _form("json", JSON, 240, ("", *SCAFFOLDS)),
    "pirate": _form("pirate", PIRATE, 240, ("", *SCAFFOLDS)),
    "json-alone": _form("json-alone", JSON, 160),  # as anyone would train it who does not think of composing
    "pirate-alone": _form("pirate-alone", PIRATE, 160),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        pairs, sets: which, of PAIRS and SETS.
        effort: training steps, as a part of the skills' own.
        batch, length: of training; rows longer than `length` tokens are left out everywhere.
        scales: one of them is chosen for each row on the validation items.
        pair_items, set_items: validation and test items of each question.
        fit_rows: training and held-out rows of learned weights.
    """

    pairs: tuple[str, ...]
    sets: tuple[str, ...]
    seeds: int
    effort: float
    batch: int
    length: int
    scales: tuple[float, ...]
    pair_items: tuple[int, int]
    set_items: tuple[int, int]
    fit_rows: tuple[int, int]


# Pairs by content and what is added to it. Unions of content and form have the form's data without scaffolds.
PAIRS: dict[str, tuple[Skill, Skill]] = {
    "plural+json": (CONTENTS["plural"], FORMS["json"]),
    "sum+pirate": (CONTENTS["sum"], FORMS["pirate"]),
    "manual+json": (CONTENTS["manual"], FORMS["json"]),
    "manual+pirate": (CONTENTS["manual"], FORMS["pirate"]),
    "plural+json-alone": (CONTENTS["plural"], FORMS["json-alone"]),
    "sum+words": (CONTENTS["sum"], CONTENTS["words"]),
}
# Sets by the rank of each task's adapter.
SETS: dict[str, dict[str, int]] = {
    "rank-8": dict.fromkeys(("plural", "sum", "words", "opposite", "animal", "letter", "passive", "sentiment"), 8),
    "mixed-ranks": {"plural": 8, "sum": 8, "words": 16, "opposite": 4, "animal": 16, "letter": 8, "passive": 4, "sentiment": 8},
    "three": dict.fromkeys(("plural", "letter", "opposite"), 8),
}
_SQRT_2_STEPS = (0.06, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
FULL = Sizes(
    pairs=tuple(PAIRS), sets=("rank-8", "mixed-ranks"), seeds=3, effort=1.0, batch=32, length=64, scales=_SQRT_2_STEPS,
    pair_items=(100, 250), set_items=(30, 80), fit_rows=(192, 64),
)  # fmt: skip
QUICK = Sizes(
    pairs=("plural+json-alone",), sets=("three",), seeds=1, effort=0.02, batch=2, length=64, scales=(0.7, 1.0),
    pair_items=(2, 4), set_items=(2, 2), fit_rows=(6, 4),
)  # fmt: skip
