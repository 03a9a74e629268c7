"""Training adapters side by side: each lane has a model of its own, and on a GPU a stream of its own.

A step of a small model leaves most of a GPU idle, so several captured steps at a time take little longer than one.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from batches import Rows
from training import State, Trainer

from benchmarks.composition.groups import Job
from benchmarks.composition.study import MOST_RANK, Sizes, lora
from benchmarks.composition.work import StudyError

_LANES, _SCAFFOLDED = 3, 2  # on a GPU; forms, which need scaffolds, are few
_LOOK = 20  # steps between looks at the loss, which wait for the lane


class Lane:
    """A trainer on its own copy of the base, trained on by one job at a time."""

    def __init__(self, base: Any, sizes: Sizes, scaffolded: bool) -> None:
        cuda = base.device.type == "cuda"
        self._stream = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        own = copy.deepcopy(base)
        if cuda:
            torch.cuda.synchronize()
        with self.stream():
            self._trainer = Trainer(own, lora(MOST_RANK), sizes.length, seed=0, scaffolded=scaffolded, batch=sizes.batch)

    def stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def train(
        self, job: Job, rows: Mapping[str, Rows], steps: int, seed: int, scaffolds: Mapping[str, State]
    ) -> Iterator[State | None]:
        """Make a step at each turn; the adapter comes after the last. Raises StudyError where the loss is not finite."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.default_stream())  # rows and scaffolds were brought to the device on it
        self._trainer.restart(job.seed(seed), job.rank)
        for index, loss in enumerate(self._trainer.train(rows, steps, job.seed(seed), scaffolds), 1):
            if (index % _LOOK == 0 or index == steps) and not torch.isfinite(loss):
                raise StudyError(f"training {job.name} diverged: its loss is {loss.item()} after {index} steps")
            yield None
        yield self._trainer.state()


class Lanes:
    """The lanes of a run, made when they are first needed."""

    def __init__(self, base: Any, sizes: Sizes) -> None:
        self._base, self._sizes = base, sizes
        self._made: dict[bool, list[Lane]] = {}

    def train(
        self,
        jobs: Sequence[Job],
        rows_of: Callable[[Job], Mapping[str, Rows]],
        seed: int,
        scaffolds: Mapping[str, State],
        more: Callable[[], bool],
        done: Callable[[Job, State], None],
    ) -> None:
        """Train jobs of one kind (with scaffolds or without), those of most steps first.

        Args:
            more: whether another job may be started; those that are running are finished.
            done: told each adapter, on its lane's stream.
        """
        waiting = deque(sorted(jobs, key=lambda job: -job.steps))
        running: dict[Lane, tuple[Job, Iterator[State | None]]] = {}
        lanes = self._lanes(scaffolded=bool(jobs[0].scaffolds))
        while True:
            for lane in lanes:
                if lane not in running and waiting and more():
                    job = waiting.popleft()
                    steps = max(1, round(self._sizes.effort * job.steps))
                    running[lane] = job, lane.train(job, rows_of(job), steps, seed, scaffolds)
            if not running:
                return
            for lane, (job, turns) in list(running.items()):
                with lane.stream():
                    if (state := next(turns)) is not None:
                        done(job, state)
                        del running[lane]

    def _lanes(self, scaffolded: bool) -> list[Lane]:
        count = (_SCAFFOLDED if scaffolded else _LANES) if self._base.device.type == "cuda" else 1
        if scaffolded not in self._made:
            self._made[scaffolded] = [Lane(self._base, self._sizes, scaffolded) for _ in range(count)]
        return self._made[scaffolded]
