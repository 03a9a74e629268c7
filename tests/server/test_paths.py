"""Names lead nowhere: whatever a request calls an adapter, no file is opened for it, in the adapters' folder or outside."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MODULES, Harness, tiny_adapter

from merging import AdapterError, LoramixError, MergeSpec, Term, save_adapter
from merging.errors import RecipeError
from server.caller import ANYONE
from server.catalog import Catalog
from server.config import Settings
from server.errors import ConfigError, RecipeSyntaxError, RequestError, UnknownModelError
from server.presets import read_presets
from server.service import Service
from server.sources import adapter_folders

_opened: list[str] | None = None  # paths that Python was asked for, while somebody wants to know


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of the adapters; beside it lies a valid one that nobody named."""
    save_adapter(tiny_adapter(4, 0), tmp_path / "adapters" / "math")
    save_adapter(tiny_adapter(4, 1), tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.fixture
def service(root: Path) -> Service:
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    for name, folder in adapter_folders(Settings(adapters=[root])):
        catalog.add(name, folder)
    presets = {"tutor": MergeSpec.create("cat", [Term("math")])}
    return Service(("tiny",), catalog, presets, Harness(catalog, 2, False, 1.0).composer, "cat")


def hostile_names(root: Path) -> dict[str, str]:
    """Names of paths that are there, and names that trip up code which takes them for paths."""
    outside = root.parent / "outside"
    return {
        "here": ".", "above": "..", "beside": "../outside", "above and back": "../adapters/math",
        "below": "math/adapter_config.json",
        "through": "math/../../outside", "itself": "./math", "slash": "math/", "absolute": str(outside), "root": "/",
        "home": "~", "url": f"file://{outside}", "Windows": "..\\outside", "drive": "C:\\outside",
        "encoded": "%2e%2e%2foutside",
        "half-width": "．．/outside", "slash of another script": "..∕outside", "NUL": "math\0",
        "NUL in the middle": "../outside\0math",
        "newline": "math\n", "line separator": "math\u2028", "half a character": "math\ud800", "right to left": "\u202ehtam",
        "hidden": ".math", "glob": "*", "glob of one": "mat?", "variable": "$HOME", "hub": "org/repo",
        "preset file": "preset.json",
        "absolute preset file": str(root.parent / "preset.json"), "long": "m" * 300, "very long": "m" * 10**6,
        "long path": "../" * 5000 + "etc/passwd", "empty": "", "space": " ", "case": "MATH",
        "weights": "adapter_model.safetensors",
    }  # fmt: skip


CASES = list(hostile_names(Path("/adapters")))


def refused(service: Service, payload: dict[str, Any]) -> LoramixError:
    with pytest.raises((UnknownModelError, RecipeSyntaxError, RequestError, RecipeError)) as raised:
        service.recipe_of(payload, ANYONE)
    assert len(str(raised.value)) < 2000
    str(raised.value).encode()
    return raised.value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["{}", "{}*0.5", "math+{}", "lego-4(math+{})", "{}(math)", "{}-4(math)"])
def test_an_expression_with_the_name_of_a_path_is_refused_without_looking(
    service: Service, root: Path, opened: list[str], case: str, form: str
) -> None:
    text = form.format(hostile_names(root)[case])
    if not text or hostile_names(root)[case].strip() == "math":  # nothing is the base model; spaces do not count
        return
    refused(service, {"model": text})
    assert opened == []


@pytest.mark.parametrize("case", CASES)
def test_an_object_with_the_name_of_a_path_is_refused_without_looking(
    service: Service, root: Path, opened: list[str], case: str
) -> None:
    name = hostile_names(root)[case]
    for lora in (
        {"adapters": [{"name": name}]},
        {"adapters": [{"name": "math"}, {"name": name, "weight": {"*": 0.5}}]},
        {"adapters": [{"name": "math"}], "method": name or "."},
        {"adapters": [{"name": "math", "weight": {name: 2.0}}]} if name != "*" else {"adapters": name},
        {"adapters": [{"name": "math"}], "options": {name: name}},
        {"adapters": [{"name": "math"}], name or "path": name},
        {"adapters": name},
        name,
    ):
        error = refused(service, json.loads(json.dumps({"lora": lora})))
        assert isinstance(error, RecipeError | RequestError | UnknownModelError)
    assert opened == []


@pytest.mark.parametrize("case", CASES)
def test_a_preset_of_a_path_stops_the_start(service: Service, root: Path, opened: list[str], case: str) -> None:
    name = hostile_names(root)[case]
    if name.strip() == "math":
        return
    with pytest.raises(ConfigError):
        read_presets({"new": name}, service.catalog, "cat")
    with pytest.raises(ConfigError):
        read_presets({"new": f"cat(math+{name})"}, service.catalog, "cat")
    assert set(opened) <= {name}  # a name that ends in .json is a preset file that the operator named
    file = root.parent / "preset.json"
    recipe = {"adapters": [{"name": name.replace("\ud800", "?")}]}
    file.write_text(json.dumps({"recipe": recipe, "adapters": {recipe["adapters"][0]["name"]: "0" * 64}}))
    with pytest.raises(ConfigError, match=r"no adapter|name: string should have at most 256 characters"):
        read_presets({"new": str(file)}, service.catalog, "cat")
    assert str(root.parent / "outside") not in opened


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("here", "above", "hidden", "preset file")])
def test_an_adapter_cannot_be_added_under_the_name_of_a_path(root: Path, opened: list[str], case: str) -> None:
    name = hostile_names(root)[case]
    if name.replace("m", "") == "" or name in ("MATH", "adapter_model.safetensors"):
        return  # letters and dots alone: odd, and no path
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    with pytest.raises(AdapterError, match="letters, digits"):
        catalog.add(name, root / "math")
    assert opened == []


def test_a_linked_subfolder_is_an_adapter_since_only_the_operator_can_have_put_it_there(root: Path) -> None:
    (root / "linked").symlink_to(root.parent / "outside")
    (root / "dangling").symlink_to(root.parent / "nowhere")
    (root / "itself").symlink_to("itself")
    (root / "file").symlink_to(root / "math" / "adapter_config.json")
    (root / ".hidden").symlink_to(root.parent / "outside")
    assert [name for name, _ in adapter_folders(Settings(adapters=[root]))] == ["linked", "math"]


def test_a_link_that_is_turned_to_another_folder_after_the_check_is_not_followed_again(root: Path) -> None:
    (root / "linked").symlink_to(root.parent / "outside")
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    catalog.add("linked", root / "linked")
    (root / "linked").unlink()
    (root / "linked").symlink_to(root / "math")
    assert catalog.entries["linked"].source.path == root.parent / "outside"


@pytest.mark.parametrize(
    "source", ["x" * 300, "x/" * 3000, "~nobody-of-that-name/x", "~" * 300, "./../nowhere", "/nowhere", "a\0b"]
)
def test_a_single_adapter_from_a_path_that_cannot_be_is_refused_by_name(source: str) -> None:
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    ((name, folder),) = adapter_folders(Settings(adapter={"new": source}))
    with pytest.raises(AdapterError, match="no such folder; check the path"):
        catalog.add(name, folder)
