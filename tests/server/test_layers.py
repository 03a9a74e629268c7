"""The two packages and their one direction: `server` imports `merging`; only files named vllm_*.py import vLLM."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("merging/**/*.py"), *ROOT.glob("server/**/*.py")])


def imports(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "merging")], ids=lambda p: p.stem)
def test_merging_knows_no_server_no_http_and_no_vllm(path: Path) -> None:
    assert not imports(path) & {"server", "vllm", "fastapi", "starlette", "pydantic", "httpx", "prometheus_client", "typer"}


@pytest.mark.parametrize("path", [p for p in FILES if not p.name.startswith("vllm_")], ids=lambda p: p.stem)
def test_only_files_named_vllm_import_vllm(path: Path) -> None:
    assert "vllm" not in imports(path)


def test_the_rules_look_at_every_file() -> None:
    assert len(FILES) > 25
    assert any("vllm" in imports(path) for path in FILES if path.name.startswith("vllm_"))
