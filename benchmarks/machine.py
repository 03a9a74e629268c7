"""What every record of a benchmark begins with: what was measured, when, and on what."""

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device) -> str:
    """A GPU's name; a processor's, with the threads that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.processor()}, {torch.get_num_threads()} threads"


def device_name(hardware: str, device: str) -> str:
    """`cpu`, or the model of a GPU: `NVIDIA H100 80GB HBM3` -> `h100`."""
    return "cpu" if device == "cpu" else hardware.split()[1].lower()


def head(benchmark: str, hardware: str, versions: Mapping[str, str], command: str) -> dict[str, Any]:
    """The first fields of a record, of today."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"benchmark": benchmark, "date": date, "hardware": hardware, "versions": dict(versions), "command": command}
