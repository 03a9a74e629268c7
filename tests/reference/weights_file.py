"""A safetensors file taken apart and put together by hand: 8 bytes of header length, a JSON header, the data."""

import json
import struct
from typing import Any

import numpy as np


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: str | bytes, data: bytes) -> bytes:
    """A file that says `header`, whatever that is."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def float32_tensors(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file that holds nothing but float32."""
    header, data = header_of(content)
    header.pop("__metadata__", None)
    assert all(said["dtype"] == "F32" for said in header.values())
    return {
        name: np.frombuffer(data[slice(*said["data_offsets"])], dtype="<f4").reshape(said["shape"])
        for name, said in header.items()
    }
