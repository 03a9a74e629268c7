"""Reads adapters from disk for the store; source adapters are held to the content that was checked when the server started."""

from concurrent.futures import Future
from threading import Lock
from typing import NamedTuple, Protocol

from merging import AdapterError, LoraAdapter
from merging.peft_folder import read_adapter


class Readable(Protocol):
    """An adapter as a merge asks for it: its name there, what its content is known by, and how it is read."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def read(self) -> LoraAdapter:
        """The adapter, on the CPU; its digest is known."""
        ...


class SourceFile(NamedTuple):
    """A source adapter: its name, its folder, and the content that it must have."""

    name: str
    folder: str
    digest: str

    def read(self) -> LoraAdapter:
        """The adapter, on the CPU.

        Raises:
            AdapterError: for a folder that is broken, or no longer what it was when it was checked.
        """
        adapter = read_adapter(self.folder)
        if adapter.digest != self.digest:
            raise AdapterError(
                f"adapter {self.name!r} in {self.folder} has changed since it was checked; "
                "add it again (POST /v1/lora/adapters) or restart the server to serve the new version"
            )
        return adapter.to("cpu")


class Reader:
    """Reads adapters for any thread; threads that want the same one at the same time share one reading."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._readings: dict[str, Future[LoraAdapter]] = {}  # under way, by digest

    def read(self, source: Readable) -> LoraAdapter:
        """What `source.read` returns or raises."""
        mine = Future[LoraAdapter]()
        with self._lock:
            reading = self._readings.setdefault(source.digest, mine)
        if reading is mine:
            try:
                mine.set_result(source.read())
            except BaseException as error:  # noqa: BLE001  (raised by `result`, here and wherever else it is waited for)
                mine.set_exception(error)
            with self._lock:
                del self._readings[source.digest]
        return reading.result()
