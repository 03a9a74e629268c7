"""The state folder: adapters and presets that were added while a server ran, for the next start.

    DIR/adapters/NAME.json   {"path": "/srv/adapters/math", "digest": "5c0f…"}, or
                             {"repo": "org/name", "revision": "<commit>", "digest": "5c0f…"}
    DIR/presets/NAME.json    a preset file (server/preset_file.py), without digests where the preset follows its adapters' names

One small file each, which gets its name by a rename once all of it is on disk: no reader ever meets half of one, and servers
that share the folder have no index to keep in step. Names that begin with a dot are files that are being written.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from server.errors import ConfigError, RequestError, StateError
from server.preset_file import PresetFile

Kind = Literal["adapters", "presets"]
_Model = TypeVar("_Model", bound=BaseModel)
_ENDING = ".json"


class KeptAdapter(BaseModel):
    """Where an added adapter comes from, and the content that it had."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    path: str | None = None
    """Its real folder."""
    repo: str | None = None
    revision: str | None = None
    """The commit, whatever was asked for."""
    digest: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one_place(self) -> "KeptAdapter":
        if (self.path is None) == (self.repo is None) or (self.repo is None) != (self.revision is None):
            raise ValueError("give path, or repo and revision")
        return self


_MODELS: dict[Kind, type[KeptAdapter] | type[PresetFile]] = {"adapters": KeptAdapter, "presets": PresetFile}


class Kept:
    """The state folder of a running server, or the lack of one: then nothing is kept.

    Args:
        folder: made if it is not there.

    Attributes:
        adapters, presets: by name, as they were at the start.
        changing: held from the check of a change of adapters or presets until it is made, in the folder and in memory.

    Raises:
        ConfigError: where the folder cannot be used, or holds what no server has written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.changing = asyncio.Lock()
        self.adapters: dict[str, KeptAdapter] = {}
        self.presets: dict[str, PresetFile] = {}
        if folder is not None:
            self.adapters = _read_all(folder / "adapters", KeptAdapter)
            self.presets = _read_all(folder / "presets", PresetFile)

    async def write(self, kind: Kind, name: str, content: BaseModel) -> bool:
        """Keep it, in the place of what had its name; False where nothing is kept.

        Raises:
            RequestError, StateError: nothing is changed.
        """
        if self._folder is None:
            return False
        try:
            text = content.model_dump_json(indent=1, exclude_defaults=True) + "\n"
        except PydanticSerializationError as error:  # JSON can bring what JSON cannot say: too deep, half characters
            raise RequestError(f"what {name} says of itself cannot be kept as JSON ({error}); send less of it", "fit") from None
        await self._change(_write, self._file(kind, name), text)
        return True

    def read(self, kind: Kind, name: str) -> KeptAdapter | PresetFile | None:
        """What is kept under a name now, by whichever server. Raises ConfigError for what no server has written."""
        file = self._file(kind, name)
        try:
            return _read(file, _MODELS[kind]) if file.exists() else None
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({error.strerror or error})") from error

    async def has(self, kind: Kind, name: str) -> bool:
        """Whether something is kept under a name now."""
        return await asyncio.to_thread(self._file(kind, name).exists)

    def stamps(self) -> dict[tuple[Kind, str], tuple[int, int]]:
        """Of every file by kind and name: another one has another stamp. Presets are looked up first, so that the adapters of
        each are among the rest. Raises OSError."""
        kinds: tuple[Kind, ...] = ("presets", "adapters")
        return {} if self._folder is None else {place: s for kind in kinds for place, s in _stamps(self._folder / kind, kind)}

    async def remove(self, kind: Kind, name: str) -> None:
        """Keep it no longer, if it was kept. Raises StateError: nothing is changed."""
        if self._folder is not None:
            await self._change(_remove, self._file(kind, name))

    def _file(self, kind: Kind, name: str) -> Path:
        assert self._folder is not None, "only asked for where there is one"
        return self._folder / kind / f"{name}{_ENDING}"

    async def _change(self, change: Callable[..., None], *args: object) -> None:
        try:
            await asyncio.to_thread(change, *args)
        except OSError as error:
            raise StateError(
                f"the state folder {self._folder} cannot be written ({error.strerror or error}), so nothing was changed; "
                "mend that and try again"
            ) from error


def _read_all(folder: Path, model: type[_Model]) -> dict[str, _Model]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        return {file.name.removesuffix(_ENDING): _read(file, model) for file in files}
    except OSError as error:
        raise ConfigError(
            f"state folder {folder} cannot be used ({error.strerror or error}); mend that, or choose another --state-dir"
        ) from error


def _stamps(folder: Path, kind: Kind) -> Iterator[tuple[tuple[Kind, str], tuple[int, int]]]:
    with os.scandir(folder) as files:
        for file in files:
            if file.name.endswith(_ENDING) and not file.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    stat = file.stat()
                    yield (kind, file.name.removesuffix(_ENDING)), (stat.st_mtime_ns, stat.st_ino)


def _read(file: Path, model: type[_Model]) -> _Model:
    if not file.name.endswith(_ENDING) or not file.is_file():
        raise ConfigError(f"{file} is no file of a loramix server; remove it, or choose another --state-dir")
    try:
        return model.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{file} is damaged, or not of this server: {where + ': ' if where else ''}{first['msg'].lower()}; "
            "remove it and add again what it names"
        ) from error


def _write(file: Path, text: str) -> None:
    descriptor, scratch = tempfile.mkstemp(prefix=".", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
        os.replace(scratch, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    _settle(file.parent)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    _settle(file.parent)


def _settle(folder: Path) -> None:
    """Have the names in a folder outlive a crash of the machine, where its disk can do that: the change itself is made."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
