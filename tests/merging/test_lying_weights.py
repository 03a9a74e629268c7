"""Weights whose header lies: refused with AdapterError in one line, and nothing is set aside for what they claim."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.folders import PREFIX, Q, read_or_refusal, write_folder
from reference.weights_file import float32_tensors, header_of, with_header

from merging import LoraAdapter

A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
A_BYTES, B_BYTES = 48, 64  # (2, 6) and (8, 2) of float32
GIGABYTES = 2**31
DTYPES_OF_OTHERS = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 I32 U32 I64 U64 F64 C64"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("weights") / "adapter")


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    content = (folder / "adapter_model.safetensors").read_bytes()
    assert list(float32_tensors(content)) == [A, B]
    return content


def read(folder: Path, content: bytes) -> LoraAdapter | str:
    """The adapter with such weights, or the refusal."""
    (folder / "adapter_model.safetensors").write_bytes(content)
    return read_or_refusal(folder)


def said(whole: bytes, **claims) -> bytes:
    """The file with another claim about A."""
    header, data = header_of(whole)
    return with_header(json.dumps({**header, A: header[A] | claims}), data)


LENGTHS = [0, 1, 7, 100, 10**6, 10**8, 10**8 + 1, GIGABYTES, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
HEADERS = {
    "no JSON": b"tensors", "nothing": b"", "spaces": b" " * 1000, "cut JSON": b'{"a":', "a list": b"[]", "a number": b"7",
    "null": b"null", "too deep": b"[" * 100_000, "deep in a value": b'{"a":' * 100_000, "no UTF-8": b'{"\xff\xfe": 1}',
    "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 112]}}',
    "a tensor that is null": b'{"a": null}', "a tensor without offsets": b'{"a": {"dtype": "F32", "shape": [28]}}',
    "metadata a list": b'{"__metadata__": []}', "metadata of numbers": b'{"__metadata__": {"format": 1}}',
    "metadata null": b'{"__metadata__": null}', "metadata alone": b'{"__metadata__": {"format": "pt"}}',
}  # fmt: skip
CLAIMS = {
    "offsets": [
        [0, 0], [0, 47], [0, 49], [0, 96], [8, 56], [48, 0], [48, 96], [64, 112], [-48, 0], [0, -1], [0, GIGABYTES],
        [0, 2**64 - 1], [2**64 - 48, 2**64], [2**63, 2**63 + 48], [0], [0, 24, 48], ["0", "48"], [0.0, 48.0], None, {},
    ],
    "shape": [
        [], [0], [12], [6, 2, 1], [2, 7], [0, 6], [2, 0], [-2, 6], [-2, -6], [2**40, 2**40], [2**63, 2], [2**64 - 1, 6],
        [2**64, 6],
        [2.0, 6], ["2", 6], [None, 6], [True, 12], None, "26", {}, [1] * 100 + [2, 6], [1] * 100_000 + [2, 6],
    ],
    "dtype": ["F33", "f32", "", "torch.float32", "BF16", "F16", 32, None, ["F32"], *DTYPES_OF_OTHERS.split()],
}  # fmt: skip
WRONG = [(field, claim) for field, claims in CLAIMS.items() for claim in claims]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_length_that_lies_is_refused(folder, whole, length):
    assert "copy it again" in read(folder, struct.pack("<Q", length) + whole[8:])


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_none_is_refused(folder, whole, header):
    assert isinstance(read(folder, with_header(header, header_of(whole)[1])), str)
    assert isinstance(read(folder, with_header(header, b"")), str)


@pytest.mark.parametrize(("field", "claim"), WRONG, ids=lambda value: str(value)[:30])
def test_a_claim_that_does_not_hold_is_refused(folder, whole, field, claim):
    assert isinstance(read(folder, said(whole, **{"data_offsets" if field == "offsets" else field: claim})), str)


@pytest.mark.parametrize("shape", [[2, 0], [0, 6], [0, 2**31], [0, 2**63], [2**64 - 1, 0], [2**62, 0], [0] * 100])
@pytest.mark.parametrize("dtype", ["F32", "F4", "F64"])
def test_an_empty_tensor_of_any_size_is_refused(folder, whole, shape, dtype):
    header, data = header_of(whole)
    header[A] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    header[B]["data_offsets"] = [0, B_BYTES]
    assert isinstance(read(folder, with_header(json.dumps(header), data[A_BYTES:])), str)


@pytest.mark.parametrize("dtype", DTYPES_OF_OTHERS.split())
def test_tensors_that_are_truly_of_another_dtype_are_refused_by_its_name(folder, whole, dtype):
    header, data = header_of(whole)
    bits = {"B": 8, "6": 64}.get(dtype[1:2], 8) if dtype in ("BOOL", "C64") else int(dtype.split("_")[0].lstrip("FIU"))
    size = 12 * bits // 8
    header[A] = {"dtype": dtype, "shape": [2, 6], "data_offsets": [0, size]}
    header[B]["data_offsets"] = [size, size + B_BYTES]
    assert "expected one of bfloat16, float16, float32" in read(
        folder, with_header(json.dumps(header), bytes(size) + data[48:])
    )


@pytest.mark.parametrize("gap", [-4, 4])
def test_tensors_that_overlap_or_leave_a_hole_are_refused(folder, whole, gap):
    header, data = header_of(whole)
    header[B]["data_offsets"] = [A_BYTES + gap, A_BYTES + gap + B_BYTES]
    assert "copy it again" in read(folder, with_header(json.dumps(header), data + bytes(4)))
    header[B]["data_offsets"] = [0, B_BYTES]  # altogether
    assert "copy it again" in read(folder, with_header(json.dumps(header), data))


def test_a_name_that_stands_twice_is_refused_unless_it_says_the_same(folder, whole):
    header, data = header_of(whole)
    for twice in ({A: header[A], "A": header[B]}, {A: header[B], "A": header[A]}, {"A": header[A], B: header[B], A: header[B]}):
        assert isinstance(read(folder, with_header(json.dumps(twice).replace('"A"', f'"{A}"'), data)), str)
    same = json.dumps(header).removesuffix("}") + f', "{B}": {json.dumps(header[B])}}}'
    assert read(folder, with_header(same, data)).digest == read(folder, whole).digest


@pytest.mark.parametrize(
    "name", ["a\nb", "a\rb\x1b[2J", "\x00", "", "x" * 10**5, "\u2028", f"{Q}.lora_A\n.weight", "../../etc"]
)
def test_a_tensor_of_any_name_is_refused_in_one_line(folder, whole, name):
    header, data = header_of(whole)
    assert "not a LoRA factor" in read(folder, with_header(json.dumps({name: header[A], B: header[B]}), data))


def test_a_file_cut_anywhere_is_refused(folder, whole):
    for kept in range(len(whole)):
        assert "copy it again" in read(folder, whole[:kept])
    assert isinstance(read(folder, whole), LoraAdapter)


def peak_bytes(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present use from now on
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("lie", ["header length", "offsets", "shape", "all"])
def test_two_gigabytes_that_are_only_claimed_take_no_memory(folder, whole, lie):
    claims = {"header length": {}, "offsets": {"data_offsets": [0, GIGABYTES]}, "shape": {"shape": [2, 2**28]}}
    claims["all"] = claims["offsets"] | claims["shape"]
    content = struct.pack("<Q", GIGABYTES) + whole[8:] if lie == "header length" else said(whole, **claims[lie])
    read(folder, content)
    before = peak_bytes(reset=True)
    assert "copy it again" in read(folder, content)
    assert peak_bytes() - before < 8 * 2**20


edits = st.tuples(st.sampled_from(["flip", "set", "insert", "delete"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))


@settings(max_examples=400)
@given(st.lists(edits, min_size=1, max_size=4), st.booleans())
@example([("flip", 0.0, 1)], False)
def test_what_is_read_from_a_damaged_file_is_what_it_says_or_it_is_refused(folder, whole, edits, in_header):
    content = bytearray(whole)
    for kind, where, value in edits:
        place = int(where * (len(content) - 112 if in_header else len(content)))
        match kind:
            case "flip":
                content[place] ^= value
            case "set":
                content[place] = b'0123456789"{}[],:-'[value % 18]
            case "insert":
                content.insert(place, value)
            case "delete":
                del content[place]
    adapter = read(folder, bytes(content))
    if isinstance(adapter, str):
        return
    (module,) = adapter.modules.values()
    tensors = float32_tensors(bytes(content))
    assert {name.partition("lora_")[2][:1] for name in tensors} == {"A", "B"}
    for name, tensor in tensors.items():
        found = module.a if ".lora_A" in name else module.b
        assert np.array_equal(found.numpy(), tensor)
        assert np.isfinite(tensor).all()
