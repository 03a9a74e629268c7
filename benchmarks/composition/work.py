"""The folder of a run, from which a stopped run goes on.

run.json                        head of the record and sizes, for a folder is of one run; seconds it took so far
seed-0/scores.json              right answers in percent
seed-0/seconds.json             time spent by stage
seed-0/adapters/<name>/         PEFT folders
seed-0/fits/<group>.<row>.json  learned weights

Processes go on with a run at the same time, each with a seed of its own: what they write is in their seed's folder.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from training import State, save

from benchmarks.composition.groups import Group, Job, Row
from benchmarks.composition.study import Sizes, lora
from merging import LoraAdapter, LoramixError, Term, load_adapter
from merging.peft_folder import WEIGHTS

Score = dict[str, dict[str, list[float]]]  # scale -> "validation" or "test" -> percent right of each question


class StudyError(LoramixError):
    """The study cannot be run, or cannot go on: the message says why, and the remedy, in one line."""


class Work:
    """What a run has so far; everything in the folder is whole or not there."""

    def __init__(self, folder: Path, head: Mapping[str, Any], sizes: Sizes) -> None:
        """Begin in an empty folder, or go on. Raises StudyError where the folder is of a run with other sizes.

        Args:
            head: of the record; that of the call that began the run is kept.
        """
        self.folder = folder
        wanted = json.loads(json.dumps(dataclasses.asdict(sizes)))
        path = folder / "run.json"
        run = _read(path)
        if run is None:
            _write(path, run := {"head": dict(head), "sizes": wanted, "seconds": 0.0})
        if run["sizes"] != wanted:
            raise StudyError(f"{folder} is of a run with other sizes; choose another --work")
        self.head: dict[str, Any] = run["head"]
        self.wall_seconds: float = run["seconds"]
        self._scores: list[dict[str, Score]] = [_read(self._of(seed, "scores")) or {} for seed in range(sizes.seeds)]
        self._seconds: list[dict[str, float]] = [_read(self._of(seed, "seconds")) or {} for seed in range(sizes.seeds)]
        self.adapter = lru_cache(maxsize=64)(self._adapter)

    def took(self, seconds: float) -> None:
        """Count what a call took from its beginning to its end; for one process at a time."""
        self.wall_seconds += seconds
        path = self.folder / "run.json"
        _write(path, _read(path) | {"seconds": self.wall_seconds})

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far by stage, of all seeds together, as if it had been one after another."""
        return {stage: sum(of.get(stage, 0.0) for of in self._seconds) for stage in dict.fromkeys(chain(*self._seconds))}

    def spent(self, seed: int, stage: str, seconds: float) -> None:
        """Count time that a stage took."""
        self._seconds[seed][stage] = self._seconds[seed].get(stage, 0.0) + seconds
        _write(self._of(seed, "seconds"), self._seconds[seed])

    def score(self, seed: int, group: Group, row: Row) -> Score | None:
        return self._scores[seed].get(f"{group.key} {row.name}")

    def keep_score(self, seed: int, group: Group, row: Row, score: Score) -> None:
        self._scores[seed][f"{group.key} {row.name}"] = score
        _write(self._of(seed, "scores"), self._scores[seed])

    def has_adapter(self, seed: int, name: str) -> bool:
        return self._adapters(seed, name).exists()

    def keep_adapter(self, seed: int, job: Job, state: State) -> None:
        save(state, lora(job.rank), self._adapters(seed, job.name))

    def state(self, seed: int, name: str, device: torch.device) -> State:
        """An adapter's tensors by PEFT's names."""
        return load_file(self._adapters(seed, name) / WEIGHTS, device=str(device))

    def fit(self, seed: int, group: Group, row: Row) -> list[Term] | None:
        found = _read(self._fit(seed, group, row))
        return None if found is None else [Term.of(name, weight) for name, weight in found["weights"].items()]

    def keep_fit(self, seed: int, group: Group, row: Row, terms: Sequence[Term], facts: Mapping[str, Any]) -> None:
        weights = {term.adapter: term.plain_weight for term in terms}
        _write(self._fit(seed, group, row), {**facts, "weights": weights})

    def _adapter(self, seed: int, name: str, device: torch.device) -> LoraAdapter:
        adapter = load_adapter(self._adapters(seed, name))
        _ = adapter.digest  # goes along to the device, where computing it takes longer
        return adapter.to(device)

    def _of(self, seed: int, what: str) -> Path:
        return self.folder / f"seed-{seed}" / f"{what}.json"

    def _adapters(self, seed: int, name: str) -> Path:
        return self.folder / f"seed-{seed}" / "adapters" / name

    def _fit(self, seed: int, group: Group, row: Row) -> Path:
        return self.folder / f"seed-{seed}" / "fits" / f"{group.key}.{row.name}.json"


def _read(path: Path) -> Any:
    """A JSON file's content; None without the file. Raises StudyError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read ({error}); remove it, and what it held is made again") from error


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content))
    scratch.replace(path)
