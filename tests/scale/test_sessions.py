"""What requests are routed by."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ConfigError
from server.scale.sessions import NONE, Sessions

RECIPE = {"method": "lego", "adapters": [{"name": "b"}, {"name": "a", "weight": 0.5}], "rank": 8}
PRESETS = {"tutor": "lego-8(a*0.5+b)"}
SESSIONS = Sessions(["base", "alias"], "cat", PRESETS)


def of(**payload: Any) -> str:
    return SESSIONS.of(json.dumps(payload).encode())


def test_equal_meaning_is_one_session_however_it_is_said() -> None:
    said = [{"model": "lego-8(b+a*0.5)"}, {"model": "lego-8( a*.5 + b*1.00001 )"}, {"model": "tutor"}]
    said += [{"lora": RECIPE}, {"model": "base", "lora": RECIPE, "prompt": "x"}, {"model": "alias", "lora": RECIPE}]
    assert len({of(**payload) for payload in said}) == 1
    assert of(model="a") == of(model="cat(a)") == of(model="cat(a+b*0)")


def test_another_meaning_is_another_session() -> None:
    models = ["a", "b", "a+b", "a+b*0.5", "a*0.5+b", "lego-8(a+b)", "lego-4(a+b)", "svd-8(a+b)", "tutor", "unknown"]
    assert len({of(model=model) for model in models}) == len(models)


@pytest.mark.parametrize("model", ["base", "alias", None, 3, "", "x" * 5000, "cat(a", "nomethod(a)", "a+a"])
def test_the_base_model_and_what_will_be_refused_have_no_session(model: Any) -> None:
    assert of(model=model) == NONE
    assert of() == of(model="a", lora=RECIPE) == of(lora=[]) == NONE


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b"[]", b"null", b'"a"', b'{"model": "\\ud800"}']))
def test_no_body_is_too_strange(body: bytes) -> None:
    assert isinstance(SESSIONS.of(body), str)


def test_presets_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "tutor.json"
    file.write_text(json.dumps({"recipe": RECIPE, "adapters": {"a": "1" * 64, "b": "2" * 64}}))
    assert Sessions(["base"], "cat", {"teacher": str(file)}).of(b'{"model": "teacher"}') == of(model="tutor")
    with pytest.raises(ConfigError, match="preset 'teacher'"):
        Sessions(["base"], "cat", {"teacher": "cat(a"})


def test_the_default_method_counts() -> None:
    assert Sessions(["base"], "linear", {}).of(b'{"model": "a+b"}') == of(model="linear(a+b)") != of(model="a+b")
