"""What is asked and compared: rows that answer the same questions, and the adapters that they need."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from skills import Form, Skill

from benchmarks.composition.study import CONTENTS, FORMS, PAIRS, RANK, SETS, Sizes, content_skill, lora
from merging import METHODS, RecipeError

PLAIN = Form()


@dataclass(frozen=True)
class Job:
    """An adapter to train on the data of one skill, or of several in turn with the steps of all of them."""

    name: str
    skills: tuple[Skill, ...]

    @property
    def steps(self) -> int:
        return sum(skill.steps for skill in self.skills)

    @property
    def rank(self) -> int:
        return self.skills[0].lora.rank

    def seed(self, seed: int) -> int:
        """Of the adapter's start and the order of its rows: adapters of one seed of the study start apart, as strangers' do."""
        return zlib.crc32(f"{seed} {self.name}".encode())

    @property
    def scaffolds(self) -> tuple[str, ...]:
        """The adapters that must be there before this one is trained."""
        return tuple(name for skill in self.skills for name in skill.scaffolds if name)


@dataclass(frozen=True)
class Question:
    """Held-out items of a task, their answers expected in a form; `own` is the adapter that was trained for it, if one was."""

    task: str
    form: Form = PLAIN
    own: str | None = None


Weights = Literal["uniform", "free", "softmax", "random", "target"]


@dataclass(frozen=True)
class Row:
    """What is compared: the base (no adapters), one adapter, or a merge.

    Attributes:
        weights: all 1; learned ("free", "softmax") on the skills' own data, or ("target") free on a few examples of the target;
            or the softmax of logits drawn from a normal distribution ("random"), where learning starts in the authors' code.
        asked: what is asked instead of the group's questions.
    """

    name: str
    adapters: tuple[str, ...] = ()
    method: str = "cat"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = "uniform"
    asked: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Group:
    """Rows that are asked the same questions: a pair of skills, or a set of tasks.

    Attributes:
        study: "skills" or "tasks".
        own: the skills of the merged adapters, on whose data weights are learned.
        jobs: all adapters that the rows need, and those that these are trained over.
        validation, test: items of each question.
    """

    study: str
    name: str
    asked: tuple[Question, ...]
    rows: tuple[Row, ...]
    own: tuple[Skill, ...]
    jobs: tuple[Job, ...]
    validation: int
    test: int

    @property
    def key(self) -> str:
        return f"{self.study}.{self.name}"


def groups(sizes: Sizes) -> list[Group]:
    return [*(_pair(name, sizes) for name in sizes.pairs), *(_set(name, sizes) for name in sizes.sets)]


def _pair(name: str, sizes: Sizes) -> Group:
    content, other = PAIRS[name]
    if other.name in CONTENTS:
        target = Skill(f"target-{content.name}-{other.name}", (f"{content.name}-{other.name}",), lora(), steps=content.steps)
    else:
        form = other.name.removesuffix("-alone")
        target = Skill(f"target-{content.name}-{form}", content.tasks, lora(), other.form, steps=content.steps)
    mixed = FORMS.get(f"{other.name}-alone", other)
    union = Job(target.name.replace("target", "union"), (content, mixed))
    merged = (content.name, other.name)
    rows = (
        Row("base"),
        Row(content.name, (content.name,)),
        Row(other.name, (other.name,)),
        Row("content-in-plain", (content.name,), asked=(Question(content.tasks[0]),)),
        *_merges(merged, (RANK, RANK)),
        *_learned(merged),
        Row("cat-target", merged, weights="target"),
        Row("union", (union.name,)),
        Row("target", (target.name,)),
    )
    asked = (Question(target.tasks[0], target.form),)
    jobs = (Job(content.name, (content,)), Job(other.name, (other,)), union, Job(target.name, (target,)))
    return Group("skills", name, asked, rows, (content, mixed), _with_scaffolds(jobs), *sizes.pair_items)


def _set(name: str, sizes: Sizes) -> Group:
    ranks = SETS[name]
    skills = {_set_adapter(task, rank): content_skill(task, CONTENTS[task].steps, rank) for task, rank in ranks.items()}
    merged = tuple(skills)
    union = Job("union-" + "-".join(ranks), tuple(CONTENTS[task] for task in ranks))
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= sum(ranks.values())] if len(set(ranks.values())) == 1 else []
    rows = (
        Row("base"),
        *(Row(adapter, (adapter,)) for adapter in merged),
        *_merges(merged, tuple(ranks.values())),
        *(Row(f"{method}-{k}", merged, method, {"rank": k}) for method in ("lego", "svd") for k in ks),
        *_learned(merged),
        Row("union", (union.name,)),
    )
    asked = tuple(Question(task, own=_set_adapter(task, rank)) for task, rank in ranks.items())
    jobs = (*(Job(adapter, (skill,)) for adapter, skill in skills.items()), union)
    return Group("tasks", name, asked, rows, tuple(skills.values()), jobs, *sizes.set_items)


def _set_adapter(task: str, rank: int) -> str:
    return task if rank == RANK else f"{task}-rank-{rank}"


def _merges(adapters: tuple[str, ...], ranks: Sequence[int]) -> list[Row]:
    """A row for every method that merges such ranks, with its default options."""
    rows = []
    for name, method in METHODS.items():
        try:
            method.rank(ranks, method.options())
        except RecipeError:
            continue  # the elementwise methods refuse mixed ranks
        rows.append(Row(name, adapters, name))
    return rows


def _learned(adapters: tuple[str, ...]) -> list[Row]:
    kinds: tuple[Weights, ...] = ("free", "softmax", "random")
    return [Row(f"cat-{weights}", adapters, weights=weights) for weights in kinds]


def _with_scaffolds(jobs: tuple[Job, ...]) -> tuple[Job, ...]:
    needed = dict.fromkeys(name for job in jobs for name in job.scaffolds)
    return (*(Job(name, (CONTENTS[name],)) for name in needed), *jobs)
