"""Servers that share a state folder know of each other's adapters and presets within a second."""

import asyncio
import logging

from server.adapters import Adapters
from server.kept import Kept, Kind
from server.preset_index import PresetIndex

SECONDS = 1.0
logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own


class KeptWatch:
    """Looks at the folder; what its own server has changed there it finds known already."""

    def __init__(self, kept: Kept, adapters: Adapters, presets: PresetIndex) -> None:
        self._kept = kept
        self._adapters = adapters
        self._presets = presets
        self._seen: dict[tuple[Kind, str], tuple[int, int]] = {}
        self._unreadable = False

    async def run(self) -> None:
        """Look again and again, until cancelled. A look that fails is told of, once while they fail, and does not end this."""
        failing = False
        while True:
            try:
                await self.look()
                failing = False
            except Exception:  # nobody waits for this task, so nobody would hear of it
                if not failing:
                    logger.exception("the state folder was not looked at; it will be, every second")
                failing = True
            await asyncio.sleep(SECONDS)

    async def look(self) -> None:
        """Learn what is new in the folder, and forget what is gone from it. A folder that cannot be read changes nothing."""
        try:
            stamps = await asyncio.to_thread(self._kept.stamps)
        except OSError as error:
            if not self._unreadable:
                logger.warning("the state folder cannot be read (%s); what other servers change is not known here", error)
            self._unreadable = True
            return
        self._unreadable = False
        new = {place for place, stamp in stamps.items() if self._seen.get(place) != stamp}
        if any(kind == "adapters" for kind, _ in new):  # there may be what a preset was in want of
            new |= {("presets", name) for name in self._presets.skipped} & stamps.keys()
        parts: dict[Kind, Adapters | PresetIndex] = {"presets": self._presets, "adapters": self._adapters}
        kept: set[tuple[Kind, str]] = {(kind, name) for kind, part in parts.items() for name in part.kept}
        gone = (kept | self._seen.keys()) - stamps.keys()
        self._seen = stamps
        for kind, name in sorted(gone, reverse=True):  # presets before the adapters that they are made of
            await parts[kind].forget(name)
        for kind, name in sorted(new):
            part = parts[kind]
            await part.learn(name)
            if name in part.skipped:
                logger.warning("%s %s, which is kept, is left out: %s", kind.removesuffix("s"), name, part.skipped[name])
