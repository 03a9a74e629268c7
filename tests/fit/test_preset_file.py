"""Preset files: written and read again, held to their adapters' digests, and counted in the content key."""

import json
from pathlib import Path

import pytest
from harness import MODULES, tiny_adapter

from merging import MergeSpec, Term, save_adapter
from merging.errors import OutputError
from server.catalog import Catalog
from server.errors import ConfigError
from server.grammar import parse_expression
from server.preset_file import PresetFile, read_preset_file, save_preset_file
from server.presets import read_presets

LEARNED = {name: 0.5 + 0.1 * place for place, name in enumerate(MODULES)}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    for seed, name in enumerate(("math", "code")):
        save_adapter(tiny_adapter(4, seed), tmp_path / name)
        catalog.add(name, tmp_path / name)
    return catalog


def digests(catalog: Catalog) -> dict[str, str]:
    return {name: entry.source.digest for name, entry in catalog.entries.items()}


def learned_spec() -> MergeSpec:
    return MergeSpec.create("cat", [Term.of("math", LEARNED), Term("code", 0.7)])


@pytest.fixture
def file(catalog: Catalog, tmp_path: Path) -> Path:
    save_preset_file(PresetFile.of(learned_spec(), digests(catalog), {"loss_after": 0.25}), tmp_path / "new" / "tutor.json")
    return tmp_path / "new" / "tutor.json"


@pytest.mark.parametrize(
    "spec",
    [
        learned_spec(),
        MergeSpec.create("lego", [Term("math"), Term("code", -0.5)], {"rank": 6, "norm": "2"}),
        MergeSpec.create("ties", [Term("math")]),
    ],
)
def test_a_spec_comes_back_from_its_file(catalog: Catalog, tmp_path: Path, spec: MergeSpec) -> None:
    save_preset_file(PresetFile.of(spec, digests(catalog), {}), tmp_path / "a.json")
    assert read_presets({"tutor": str(tmp_path / "a.json")}, catalog, "svd")["tutor"].spec == spec


def test_the_file_is_name_free_json_whose_recipe_is_a_requests_body_object(catalog: Catalog, file: Path) -> None:
    written = json.loads(file.read_text())
    assert written == {
        "recipe": {
            "method": "cat",
            "adapters": [{"name": "code", "weight": 0.7}, {"name": "math", "weight": {**LEARNED, "*": 1.0}}],
        },
        "adapters": digests(catalog),
        "fit": {"loss_after": 0.25},
    }
    assert [path.name for path in file.parent.iterdir()] == ["tutor.json"]


def test_learned_weights_count_in_the_key(catalog: Catalog, file: Path) -> None:
    learned = read_presets({"tutor": str(file)}, catalog, "cat")["tutor"].spec
    uniform = parse_expression("cat(math+code*0.7)", "cat")
    moved = MergeSpec.create("cat", [Term.of("math", {**LEARNED, next(iter(MODULES)): 0.9}), Term("code", 0.7)])
    keys = {catalog.resolve(spec).key for spec in (learned, uniform, moved)}
    assert len(keys) == 3
    assert catalog.resolve(learned).key == catalog.resolve(learned_spec()).key


def test_an_adapter_of_other_content_is_refused_by_name(catalog: Catalog, file: Path, tmp_path: Path) -> None:
    save_adapter(tiny_adapter(4, seed=99), tmp_path / "math", replace=True)
    other = Catalog(MODULES, 8, "bfloat16", frozenset())
    for name in ("math", "code"):
        other.add(name, tmp_path / name)
    here = other.entries["math"].source.digest
    with pytest.raises(
        ConfigError, match=rf"'tutor': .*another content of adapter 'math' \(digest .{{12}}, here {here[:12]}\)"
    ):
        read_presets({"tutor": str(file)}, other, "cat")


def test_an_adapter_that_is_missing_is_named(file: Path, tmp_path: Path) -> None:
    few = Catalog(MODULES, 8, "bfloat16", frozenset())
    few.add("mathe", tmp_path / "math")
    few.add("code", tmp_path / "code")
    with pytest.raises(ConfigError, match="'tutor': no adapter 'math' here; did you mean 'mathe'"):
        read_presets({"tutor": str(file)}, few, "cat")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no preset file: invalid json"),
        ("[]", "is no preset file: input should be"),
        ('{"adapters": {}}', "recipe: field required"),
        ('{"recipe": {"adapters": [{"nmae": "a"}]}, "adapters": {}}', "recipe.adapters.0.name: field required"),
        ('{"recipe": {"adapters": [{"name": "math"}]}, "adapters": {"code": "x"}}', "no digest of 'math'"),
    ],
)
def test_what_is_no_preset_file_is_refused_with_the_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=says) as raised:
        read_preset_file(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(raised.value)


def test_a_file_that_is_missing_is_named(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match=r"'tutor': preset file nowhere\.json cannot be read \(No such file.*loramix fit"):
        read_presets({"tutor": "nowhere.json"}, catalog, "cat")


def test_a_file_that_cannot_be_written_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"a\.json cannot be written"):
        save_preset_file(PresetFile.of(learned_spec(), digests(catalog), {}), tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
