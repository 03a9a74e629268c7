"""The tasks' examples, split so that what is judged was neither trained on nor tuned on."""

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from skills import Example, read_manual, read_task

from benchmarks.composition.study import TASKS

VALIDATION, TEST = 100, 250
TRAIN = 3000  # of a task at most: tokenising more takes longer than training on it


@dataclass(frozen=True)
class Split:
    """Examples of a task; no prompt stands in two of the lists, nor twice in one."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


class Data:
    """The public data; layout and sources are those of examples/README.md.

    Raises DataError where a file is missing or is not what it should be, here and from `split`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.split = cache(self._split)

    def train(self, task: str) -> list[Example]:
        return self.split(task).train

    def _split(self, task: str) -> Split:
        """The same split whenever it is asked for: the public test items and some more are the test."""
        if task == "manual":
            return _manual()
        source, prompt = TASKS[task].source, TASKS[task].prompt
        public_test = [] if task == "boolq" else read_task(source, self.folder, "test")
        rest = read_task(source, self.folder, "train")
        if task == "sum-words":
            words = {e.prompt: e.content for part in ("train", "test") for e in read_task("num_to_verbal", self.folder, part)}
            public_test, rest = ([replace(e, content=words[e.content]) for e in part] for part in (public_test, rest))
        test = {example.prompt: example for example in public_test}
        others = list({example.prompt: example for example in rest if example.prompt not in test}.values())
        random.Random(source).shuffle(others)  # alike for a chained task and what it is made of
        few = len(others) // 4  # of each part, where the data is small
        tested = max(0, min(TEST - len(test), few))
        validated = tested + min(VALIDATION, few)
        parts = others[validated:][:TRAIN], others[tested:validated], [*test.values(), *others[:tested]]
        return Split(*([replace(e, prompt=prompt.format(e.prompt)) for e in part] for part in parts))


def _manual() -> Split:
    """The same facts in each part, asked in other words: four phrasings to train, one to validate, two to test."""
    learned, test = read_manual("train"), read_manual("test")
    phrasings = len(learned) // len(test)
    by_phrasing = [learned[i::phrasings] for i in range(phrasings)]
    return Split([e for part in by_phrasing[:-2] for e in part], by_phrasing[-2], by_phrasing[-1] + test)
