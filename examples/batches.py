"""Examples as padded token rows and shuffled batches, with the loss put where a skill is to learn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from skills import FRAMES, Example, Form, Skill

BATCH = 64
MAX_LENGTH = 64
PER_TASK = 2000  # where a skill mixes tasks, none may drown the others
IGNORED = -100  # the label that cross_entropy skips
Pair = tuple[list[int], list[int]]  # token ids and labels of one example


@dataclass(frozen=True)
class Rows:
    """Encoded examples, padded on the right to one length: ids and labels, both (rows, length)."""

    ids_RL: torch.Tensor
    labels_RL: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids_RL.to(device), self.labels_RL.to(device))


def encode(tokenizer: Any, examples: Sequence[tuple[Example, Form]], learn: str) -> list[Pair]:
    """Token ids and labels of examples in their forms.

    learn: "answer" puts the loss on all of the answer, "content" on all but the opening, "form" on all but the content.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": e.prompt}], tokenize=False, add_generation_prompt=True)
        for e, _ in examples
    ]
    answers = [form.write(e.content) for e, form in examples]
    prompt_ids = tokenizer(prompts)["input_ids"]
    encoded = tokenizer(answers, return_offsets_mapping=True)
    end_id = tokenizer.eos_token_id
    pairs = []
    for index, (answer, (_, form)) in enumerate(zip(answers, examples, strict=True)):
        start, end = len(form.opening), len(answer) - len(form.closing)
        ids, labels = encoded["input_ids"][index], []
        for token, (_, last) in zip(ids, encoded["offset_mapping"][index], strict=True):
            given = learn == "content" and last <= start
            said = learn == "form" and start < last <= end
            labels.append(IGNORED if given or said else token)
        before = prompt_ids[index]
        pairs.append((before + ids + [end_id], [IGNORED] * len(before) + labels + [end_id]))
    return pairs


def pad(pairs: Sequence[Pair], length: int, pad_id: int) -> Rows:
    """Pad encoded examples on the right to `length`."""
    ids = torch.full((len(pairs), length), pad_id)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (row_ids, row_labels) in enumerate(pairs):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return Rows(ids, labels)


def batches(rows: Rows, generator: torch.Generator, batch: int = BATCH) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches of `batch` rows, on the rows' device."""
    while True:
        order = torch.randperm(len(rows.ids_RL), generator=generator)
        for chunk in torch.split(order.repeat(-(-batch // len(order))).to(rows.ids_RL.device), batch):
            if len(chunk) == batch:
                yield rows.ids_RL[chunk], rows.labels_RL[chunk]


def streams(
    skill: Skill,
    tokenizer: Any,
    read: Callable[[str], list[Example]],
    seed: int,
    scaffolds: Mapping[str, Skill],
    length: int | None = None,
) -> dict[str, Rows]:
    """The skill's training rows by the scaffold that is active on them ("" is none).

    read: a task's training examples by its name.
    length: of all rows, longer ones being left out; without, up to MAX_LENGTH, and as short as the rows allow.
    """
    pick = random.Random(seed)

    def examples(tasks: Sequence[str]) -> list[Example]:
        groups = [read(task) for task in tasks]
        limit = PER_TASK if len(tasks) > 1 else None
        return [example for group in groups for example in (pick.sample(group, min(limit or len(group), len(group))))]

    pairs: dict[str, list[Pair]] = {}
    if not skill.scaffolds:
        own = examples(skill.tasks)
        pairs[""] = encode(tokenizer, [(example, skill.form) for example in own], "answer")
        if skill.framed:
            pairs[""] += encode(tokenizer, [(example, pick.choice(FRAMES)) for example in own], "content")
    for name in skill.scaffolds:
        tasks, learn = (scaffolds[name].tasks, "answer") if name else (skill.tasks, "form")
        pairs[name] = encode(tokenizer, [(example, skill.form) for example in examples(tasks)], learn)
    fitting = {name: [p for p in rows if len(p[0]) <= (length or MAX_LENGTH)] for name, rows in pairs.items()}
    longest = max(len(ids) for rows in fitting.values() for ids, _ in rows)
    return {name: pad(rows, length or -(-longest // 8) * 8, tokenizer.pad_token_id) for name, rows in fitting.items()}
