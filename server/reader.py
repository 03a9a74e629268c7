"""Reads source adapters from disk, and holds them to the content that was checked when the server started."""

from concurrent.futures import Future
from threading import Lock
from typing import NamedTuple

from merging import AdapterError, LoraAdapter
from merging.peft_folder import read_adapter


class SourceFile(NamedTuple):
    """A source adapter as a merge asks for it: its name there, its folder, and the content that it must have."""

    name: str
    folder: str
    digest: str


class Reader:
    """Reads adapters for any thread; threads that want the same one at the same time share one reading."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._readings: dict[str, Future[LoraAdapter]] = {}  # under way, by digest

    def read(self, source: SourceFile) -> LoraAdapter:
        """The adapter, on the CPU.

        Raises:
            AdapterError: for a folder that is broken, or no longer what it was when it was checked.
        """
        mine = Future[LoraAdapter]()
        with self._lock:
            reading = self._readings.setdefault(source.digest, mine)
        if reading is mine:
            try:
                mine.set_result(_checked(source))
            except BaseException as error:  # noqa: BLE001  (raised by `result`, here and wherever else it is waited for)
                mine.set_exception(error)
            with self._lock:
                del self._readings[source.digest]
        return reading.result()


def _checked(source: SourceFile) -> LoraAdapter:
    adapter = read_adapter(source.folder)
    if adapter.digest != source.digest:
        raise AdapterError(
            f"adapter {source.name!r} in {source.folder} has changed since it was checked; "
            "restart the server to serve the new version"
        )
    return adapter.to("cpu")
