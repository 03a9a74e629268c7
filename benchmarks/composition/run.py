"""The study: for each seed train what is missing, learn weights, judge every row. A stopped run goes on where it was.

On a GPU every seed has a process of its own, all at once: steps of so small a model leave most of a GPU idle, and most of the
time is the host's.
"""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from batches import Pair, Rows, streams
from skills import Skill
from training import State
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.composition.data import Data
from benchmarks.composition.groups import Group, Job, Question, Row, groups
from benchmarks.composition.judge import Items, Judge, encoded, lay_out
from benchmarks.composition.lanes import Lanes
from benchmarks.composition.learned import drawn, learned
from benchmarks.composition.study import CONTENTS, Sizes, lora
from benchmarks.composition.work import Score, StudyError, Work
from benchmarks.machine import hardware, head
from merging import LoraAdapter, MergeSpec, Term, merge

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Attributes:
        model: a folder of transformers with a chat template.
        work: the run's folder; see work.py.
        seconds: after which nothing more is begun.
        command: the command line, for the record.
    """

    data: Path
    model: Path
    work: Path
    device: torch.device
    sizes: Sizes
    seconds: float
    command: str


def run(options: Options, say: Say) -> Work:
    """Begin or go on with the run in `options.work`; `left` tells whether it is complete now.

    Args:
        say: told each line; on a GPU it goes to other processes, and has to be fit for that.

    Raises:
        StudyError: where the folder is of another run, or training diverges.
        DataError: where a data file is missing or broken.
    """
    where = hardware(options.device)
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    begun = head("composition", where, versions, options.command)
    work = Work(options.work, begun, options.sizes)
    seeds = [seed for seed in range(options.sizes.seeds) if left(work, options.sizes, [seed])]
    if not seeds:
        return work
    if work.head["hardware"] != where:
        raise StudyError(f"{options.work} was begun on {work.head['hardware']}, this is {where}; choose another --work")
    began = time.monotonic()
    try:
        if options.device.type == "cuda" and len(seeds) > 1:
            _side_by_side(options, seeds, say)
        else:
            _Run(options, work, say).go_on(seeds)
    finally:
        work.took(time.monotonic() - began)
    return Work(options.work, begun, options.sizes)  # with what other processes have written


def left(work: Work, sizes: Sizes, seeds: Sequence[int] | None = None) -> int:
    """Rows that are not judged yet, over all seeds or some of them."""
    over = range(sizes.seeds) if seeds is None else seeds
    return sum(len(_left(work, seed, group)) for seed in over for group in groups(sizes))


def _side_by_side(options: Options, seeds: Sequence[int], say: Say) -> None:
    with ProcessPoolExecutor(len(seeds), multiprocessing.get_context("spawn")) as pool:
        for ended in [pool.submit(_go_on, options, seed, say) for seed in seeds]:
            ended.result()


def _go_on(options: Options, seed: int, say: Say) -> None:
    """One seed, in a process of its own."""
    _Run(options, Work(options.work, {}, options.sizes), say).go_on([seed])


def _left(work: Work, seed: int, group: Group) -> list[Row]:
    return [row for row in group.rows if work.score(seed, group, row) is None]


class _Run:
    """A model, its lanes and its judge, and what they still have to do."""

    def __init__(self, options: Options, work: Work, say: Say) -> None:
        self._started, self._seconds = time.monotonic(), options.seconds
        self._sizes, self._device, self._work, self._say = options.sizes, options.device, work, say
        self._data = Data(options.data)
        self._groups = groups(options.sizes)
        for job in (job for group in self._groups for job in group.jobs):
            for task in (task for skill in job.skills for task in skill.tasks):
                self._data.split(task)  # all data is checked before anything is trained
        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        # A CPU without bf16 units emulates them at a tenth of float32's speed.
        dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
        base: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        self._judge = Judge(base.to(options.device))
        self._lanes = Lanes(base, options.sizes)
        self._rows = cache(self._encode)
        self._items = cache(self._lay_out)

    def go_on(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            for name, stage in {"train": self._train, "learn": self._learn, "score": self._score}.items():
                began = time.monotonic()
                stage(seed)
                self._work.spent(seed, name, time.monotonic() - began)

    def _late(self) -> bool:
        return time.monotonic() - self._started > self._seconds

    def _tell(self, line: str) -> None:
        self._say(f"[{time.monotonic() - self._started:.0f} s] {line}")

    def _train(self, seed: int) -> None:
        known = {job.name: job for group in self._groups for job in group.jobs}
        wanted = {name for group in self._groups for row in _left(self._work, seed, group) for name in row.adapters}
        missing = {name for name in wanted if not self._work.has_adapter(seed, name)}
        under = {name for form in missing for name in known[form].scaffolds}
        missing |= {name for name in under if not self._work.has_adapter(seed, name)}

        def keep(job: Job, state: State) -> None:
            self._work.keep_adapter(seed, job, state)
            self._tell(f"seed {seed}: trained {job.name}")

        for scaffolded in (False, True):  # scaffolds are trained by then
            jobs = [job for name, job in known.items() if name in missing and bool(job.scaffolds) == scaffolded]
            if jobs and not self._late():
                self._tell(f"seed {seed}: training {len(jobs)} adapters, {sum(job.steps for job in jobs)} steps")
                names = {name for job in jobs for name in job.scaffolds}
                scaffolds = {name: self._work.state(seed, name, self._device) for name in names}
                self._lanes.train(jobs, self._rows_of, seed, scaffolds, lambda: not self._late(), keep)

    def _rows_of(self, job: Job) -> Mapping[str, Rows]:
        skills = [dataclasses.replace(skill, lora=lora()) for skill in job.skills]  # the rows are the same for all ranks
        return self._rows(skills[0]) if len(skills) == 1 else {skill.name: self._rows(skill)[""] for skill in skills}

    def _encode(self, skill: Skill) -> dict[str, Rows]:
        # The rows are the same for all seeds, too: tokenising can take longer than training.
        rows = streams(skill, self._tokenizer, self._data.train, 0, CONTENTS, self._sizes.length)
        return {name: part.to(self._device) for name, part in rows.items()}

    def _learn(self, seed: int) -> None:
        for group in self._groups:
            for row in _left(self._work, seed, group):
                known = row.weights in ("uniform", "random") or self._work.fit(seed, group, row) is not None
                if known or self._late():
                    continue
                adapters = self._adapters(seed, row)
                found = learned(self._judge.model, self._tokenizer, adapters, group, row, self._data, self._sizes, seed)
                facts = {"loss_before": found.loss_before, "loss_after": found.loss_after, "steps": found.steps}
                self._work.keep_fit(seed, group, row, found.terms, facts)
                self._tell(
                    f"seed {seed}: learned {row.name} of {group.key}, loss {found.loss_before:.3f} → {found.loss_after:.3f}"
                )

    def _score(self, seed: int) -> None:
        for group in self._groups:
            began = _left(self._work, seed, group)
            for row in began:
                if not self._late():
                    self._work.keep_score(seed, group, row, self._score_of(seed, group, row))
            if began:
                self._tell(f"seed {seed}: judged {group.key}, {len(_left(self._work, seed, group))} rows left")
        self._judge.wear(None)

    def _score_of(self, seed: int, group: Group, row: Row) -> Score:
        items = self._items(row.asked or group.asked, group.validation, group.test)
        merged = self._merged(seed, group, row) if row.adapters else None
        score = {}
        for scale in self._sizes.scales if merged else (1.0,):
            self._judge.wear(merged, scale)
            score[str(scale)] = self._judge.percent(items)
        return score

    def _merged(self, seed: int, group: Group, row: Row) -> LoraAdapter:
        adapters = self._adapters(seed, row)
        match row.weights:
            case "uniform":
                terms = [Term(name) for name in row.adapters]
            case "random":
                terms = drawn(adapters, seed)
            case _:
                terms = self._work.fit(seed, group, row) or []
        return merge(adapters, MergeSpec.create(row.method, terms, row.options), device=self._device)

    def _adapters(self, seed: int, row: Row) -> dict[str, LoraAdapter]:
        return {name: self._work.adapter(seed, name, self._device) for name in row.adapters}

    def _lay_out(self, asked: tuple[Question, ...], validation: int, test: int) -> Items:
        parts: dict[str, list[list[Pair]]] = {"validation": [], "test": []}
        for question in asked:
            split = self._data.split(question.task)
            for part, examples, count in (("validation", split.validation, validation), ("test", split.test, test)):
                parts[part].append(encoded(self._tokenizer, examples, question.form, count, self._sizes.length))
        return lay_out(parts, self._tokenizer.pad_token_id, self._device)
