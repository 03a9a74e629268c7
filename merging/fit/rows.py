"""Examples as token ids, read from JSON lines."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.fit.errors import FitError

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Rows:
    """Tokenised examples.

    Attributes:
        ids: token ids of each, prompt and answer.
        answers: the index of the first token of the answer in each, 1 or more; loss "all" does without.
    """

    ids: list[list[int]]
    answers: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, part: float, seed: int) -> tuple["Rows", "Rows"]:
        """All but a random part, and the part. Raises FitError where one would be empty."""
        held_out = round(part * len(self))
        if not 0 < held_out < len(self):
            raise FitError(f"{len(self)} rows cannot be split with {part:g} of them held out; give more, or a held-out file")
        order = random.Random(seed).sample(range(len(self)), len(self))
        return self._of(sorted(order[held_out:])), self._of(sorted(order[:held_out]))

    def _of(self, places: Sequence[int]) -> "Rows":
        return Rows([self.ids[i] for i in places], [self.answers[i] for i in places])


def read_rows(
    path: Path | str, tokenizer: Any, *, fields: tuple[str, str] = ("prompt", "answer"), most_tokens: int
) -> tuple[Rows, int]:
    """Examples from a file of JSON lines, one object a line: two named texts, or a chat under `messages`.

    The prompt goes through the tokenizer's chat template where it has one; the answer follows, then the end token. Of a chat
    the last message, the assistant's, is the answer.

    Args:
        tokenizer: of transformers.
        fields: names of the prompt and of the answer.
        most_tokens: longer rows are cut at the end; a row that has no token of its answer left is dropped.

    Returns:
        The rows, and how many were cut or dropped.

    Raises:
        FitError: naming the file, the line and what is wrong with it; where no rows are left.
    """
    texts = _texts(Path(path), fields, tokenizer)
    prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=not tokenizer.chat_template)["input_ids"]
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, cut = Rows([], []), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer, *end]
        cut += len(ids) > most_tokens
        first = max(1, len(prompt))  # nothing predicts a row's first token
        if first < min(len(ids), most_tokens):
            rows.ids.append(ids[:most_tokens])
            rows.answers.append(first)
    if not rows.ids:
        raise FitError(f"{path}: no row has a token of its answer within {most_tokens} tokens; give shorter rows")
    return rows, cut


def _texts(path: Path, fields: tuple[str, str], tokenizer: Any) -> list[tuple[str, str]]:
    """Prompt, as the model is to see it, and answer of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FitError(f"{path} cannot be read ({reason}); give a file of JSON lines") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                chat = _chat(line, fields)
            except FitError as error:
                raise FitError(f"{path}, line {number}: {error}") from error
            texts.append((_prompt(chat[:-1], tokenizer), chat[-1]["content"]))
    if not texts:
        raise FitError(f"{path} is empty; give an example a line")
    return texts


def _chat(line: str, fields: tuple[str, str]) -> Messages:
    """The messages of a line, the answer last."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FitError(f"no JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise FitError(f"{type(row).__name__} instead of an object; write one object a line")
    prompt, answer = (row.get(field) for field in fields)
    if isinstance(prompt, str) and isinstance(answer, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    chat = row.get("messages")
    if not isinstance(chat, list):
        found = ", ".join(row) or "none"
        raise FitError(f"no texts {fields[0]!r} and {fields[1]!r}, and no 'messages'; its fields are {found}, name two of them")
    for message in chat:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise FitError(f"message {message!r}; write an object with the texts role and content")
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise FitError("its messages do not end with an answer of the assistant; give one after the prompt")
    return chat


def _prompt(chat: Messages, tokenizer: Any) -> str:
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))
    return "\n".join(message["content"] for message in chat)
