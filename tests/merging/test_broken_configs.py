"""An adapter_config.json with anything in it: the adapter is read as PEFT reads it,
or refused in one line that names the file."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.folders import CONFIG, Q, read_or_refusal, write_folder
from reference.json_values import json_values

from merging import LoraAdapter, load_adapter
from merging.peft_folder import _HARMLESS, _VARIANTS

# re says on the side what it thinks of a pattern such as [[a; here that is no error.
pytestmark = pytest.mark.filterwarnings("ignore:Possible")
ANYTHING = [
    None, True, False, 0, 1, -1, 2, 3, 10**12, 10**400, -(10**400), 0.0, 1.5, -2.5, 5e-324, 1e308, math.nan, math.inf,
    -math.inf,
    "", "2", "none", "none\n", "all", "a\nb", "\x00", "\ud800", "LORA", "q" * 10**5, [], [1], [[[]]], ["q_proj"], {}, {"a": 1},
    {"q_proj": 2}, {"q_proj": None}, {"q_proj": [2]}, {"q_proj": {"q_proj": 2}}, {"": 2}, {"\n": 2}, {"\ud800": 2}, {".*": 2},
]  # fmt: skip
FIELDS = sorted(_HARMLESS | set(_VARIANTS) | {"bias", "of_tomorrow", "of\ntomorrow\ud800"})
NO_PATTERNS = [
    "(", ")", "[", "*", "+", "?", "a**", "a{2,1}", "a{99999999999999999999}", "(?i)q_proj", "(?P<a>", "(?P=a)", "(?<=a*)b",
    r"\9",
    "\\", "(" * 5000, "(?#", "[b-a]", "x)|(?i:", r"\p", "(?z)",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("configs") / "adapter")


@pytest.fixture(scope="module")
def digest(folder) -> str:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return load_adapter(folder).digest


def read(folder: Path, content: bytes | str) -> LoraAdapter | str:
    """The adapter with such a configuration, or the refusal."""
    (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_or_refusal(folder)
    assert not isinstance(found, str) or len(found) < 1000
    return found


@pytest.mark.parametrize("field", FIELDS, ids=ascii)
def test_a_field_may_hold_anything(folder, digest, field):
    """Only r, alpha and what goes with them decide what the adapter is."""
    for value in ANYTHING:
        adapter = read(folder, json.dumps({**CONFIG, field: value}))
        if isinstance(adapter, LoraAdapter) and field not in ("lora_alpha", "alpha_pattern", "use_rslora"):
            assert adapter.digest == digest
        if isinstance(adapter, LoraAdapter) and field in _VARIANTS:
            assert not value


@pytest.mark.parametrize("pattern", NO_PATTERNS, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_where_it_stands_is_refused(folder, key, pattern):
    assert "no regular expression" in read(folder, json.dumps({**CONFIG, key: {pattern: 2}}))


@pytest.mark.parametrize("name", ["q_proj", "rank_of.q_proj"])
def test_an_alpha_need_not_be_whole_whatever_its_module_is_called(folder, name):
    assert isinstance(read(folder, json.dumps({**CONFIG, "alpha_pattern": {name: 1.5}})), LoraAdapter)


@pytest.mark.parametrize("init", [["pissa"], {"pissa": 1}, 1])
def test_an_initialisation_that_peft_has_no_name_for_is_refused(folder, init):
    assert "init_lora_weights" in read(folder, json.dumps({**CONFIG, "init_lora_weights": init}))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_the_encodings_of_json_are_read_and_only_those(folder, digest, encoding):
    assert read(folder, json.dumps(CONFIG).encode(encoding)).digest == digest


NO_JSON = {
    "latin-1": '{"peft_type": "LORA", "revision": "é"}'.encode("latin-1"),
    "a number of 5000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "deep": b'{"a":' * 10**5, "zeros": bytes(1000), "a comment": b'{"r": 2} // rank', "two objects": b"{}{}",
    "spaces": b" " * 1000,
    "the weights": b"\x80\x00\x00\x00\x00\x00\x00\x00{}", "single quotes": b"{'r': 2}", "utf-7": b"{+AGE-: 2}",
}  # fmt: skip


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused_by_the_name_of_the_file(folder, content):
    assert "adapter_config.json cannot be read" in read(folder, content)


def test_of_a_key_that_stands_twice_the_last_counts_as_it_does_for_peft(folder, digest):
    twice = json.dumps({**CONFIG, "lora_alpha": 99}).replace("}", ', "lora_alpha": 4}')
    assert read(folder, twice).digest == digest
    assert "rank 4" in read(folder, json.dumps(CONFIG).replace("}", ', "r": 4}'))


def test_a_file_cut_anywhere_is_refused(folder):
    content = json.dumps(CONFIG).encode()
    for kept in range(len(content)):
        assert "copy it again" in read(folder, content[:kept])


values = json_values(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_random_settings_are_read_or_refused(folder, changes):
    adapter = read(folder, json.dumps({**CONFIG, **changes}))
    if isinstance(adapter, LoraAdapter):
        assert {**CONFIG, **changes}["r"] == 2 or changes["rank_pattern"]
        assert list(adapter.modules) == [Q]
        assert math.isfinite(adapter.modules[Q].scaling)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans()), min_size=1, max_size=3))
def test_a_file_with_random_bytes_is_read_as_json_reads_it_or_refused(folder, edits):
    content = bytearray(json.dumps(CONFIG).encode())
    for where, value, flip in edits:
        place = int(where * len(content))
        content[place : place + flip] = [content[place] ^ value if flip else value]
    adapter = read(folder, bytes(content))
    if isinstance(adapter, LoraAdapter):
        config = json.loads(bytes(content))
        assert (config["peft_type"], config["r"]) == ("LORA", 2)
        assert adapter.modules[Q].scaling == config["lora_alpha"] / 2
        assert adapter.base_model == config.get("base_model_name_or_path")
