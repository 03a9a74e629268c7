"""A job: what the server asks the workers to merge."""

from typing import Any, TypedDict


class Job(TypedDict):
    """A recipe as it crosses to the worker's process, in plain values.

    key: content key. nbytes: about what the merged adapter takes up.
    request_id: of the request that began the build; its log lines in the worker bear it.
    terms: [name, weight (as Term.of takes it), folder, digest, bytes of its factors] each.
    """

    lora_id: int
    key: str
    nbytes: int
    request_id: str | None
    method: str
    options: dict[str, Any]
    terms: list[tuple[str, float | dict[str, float], str, str, int]]
