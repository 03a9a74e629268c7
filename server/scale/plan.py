"""What the parts around the replicas have to know of the command line that all replicas are started with."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from server.errors import ConfigError

_REFUSED = {
    "--uds": "each replica has a port chosen for it",
    "--ssl-keyfile": "end TLS in front of Ray's proxy",
    "--ssl-certfile": "end TLS in front of Ray's proxy",
}
_RUNNING = 256  # sequences that vLLM runs at a time unless told otherwise


@dataclass(frozen=True)
class Plan:
    """Read from the words that follow `loramix serve`.

    Attributes:
        words: for a replica: the same without host and port.
        host, port: where Ray's proxy listens on a single machine; a cluster's configuration file says so itself.
        base_models: names of the base model, as served.
        options: loramix's own, by their parameters' names.
        gpus: that one replica takes, where there are any.
        running: requests that a replica runs at a time; what goes beyond it is better off at another.
        drain_seconds: for streams to end once a replica is told to stop.
    """

    words: tuple[str, ...]
    host: str
    port: int
    base_models: tuple[str, ...]
    options: Mapping[str, Any]
    gpus: int
    running: int
    drain_seconds: float

    @classmethod
    def read(cls, words: Sequence[str]) -> "Plan":
        """Raises ConfigError for options that make no sense behind Ray's proxy, and for values that are no numbers."""
        from server.cli import app  # which itself imports the command

        command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
        context = command.make_context("loramix serve", list(words))
        rest = [_dashed(word) for word in context.args]
        for option, remedy in _REFUSED.items():
            if any(word.split("=")[0] == option for word in rest):
                raise ConfigError(f"{option} does not go with replicas: {remedy}")
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--served-model-name", nargs="+", default=[context.params["model"]])
        parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
        parser.add_argument("--max-num-seqs", type=int, default=_RUNNING)
        parser.add_argument("--shutdown-timeout", type=float, default=30.0)  # as in server/vllm_launch.py
        known, _ = parser.parse_known_args(rest)
        return cls(
            (*own_words(context), *_without(rest, "--host", "--port")), known.host, known.port,
            tuple(known.served_model_name), context.params, known.tensor_parallel_size, known.max_num_seqs,
            known.shutdown_timeout,
        )  # fmt: skip


def own_words(context: typer.Context) -> list[str]:
    """The model and loramix's own options as they were given, but for --replicas."""
    words = [str(context.params["model"])]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in ("model", "replicas") or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return words


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _dashed(word: str) -> str:
    """An option by the one name that it has with dashes, as vLLM reads it."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _without(words: Sequence[str], *options: str) -> list[str]:
    """Words without options that have one value each, as `--option value` or `--option=value`."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word.split("=")[0] not in options:
            kept.append(word)
        skip = not skip and word in options
    return kept
