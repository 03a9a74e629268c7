"""The folder of a run, from which a stopped run goes on.

run.json                        head of the record, sizes, seconds spent: a folder is of one run
scores.json                     right answers in percent
seed-0/adapters/<name>/         PEFT folders
seed-0/fits/<group>.<row>.json  learned weights
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
        self._run = _read(folder / "run.json") or {"head": dict(head), "sizes": wanted, "seconds": {}}
        if self._run["sizes"] != wanted:
            raise StudyError(f"{folder} is of a run with other sizes; choose another --work")
        self._scores: dict[str, Score] = _read(folder / "scores.json") or {}
        self.adapter = lru_cache(maxsize=64)(self._adapter)

    @property
    def head(self) -> dict[str, Any]:
        return self._run["head"]

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far by stage."""
        return self._run["seconds"]

    def spent(self, stage: str, seconds: float) -> None:
        """Count time that a stage took."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        _write(self.folder / "run.json", self._run)

    def score(self, seed: int, group: Group, row: Row) -> Score | None:
        return self._scores.get(f"{seed} {group.key} {row.name}")

    def keep_score(self, seed: int, group: Group, row: Row, score: Score) -> None:
        self._scores[f"{seed} {group.key} {row.name}"] = score
        _write(self.folder / "scores.json", self._scores)

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
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content))
    scratch.replace(path)
