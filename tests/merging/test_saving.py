"""Saving: all or nothing, never over anything, and what comes back is what was saved."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.adapters import merge_terms, motley, random_adapter
from reference.drawn import methods, terms
from reference.tolerance import TOLERANCE, assert_same_bytes

import merging.peft_folder as under_test
from merging import LoraAdapter, LoraModule, load_adapter, save_adapter


def plain(adapter: LoraAdapter) -> LoraAdapter:
    return LoraAdapter({name: LoraModule(m.a, m.b) for name, m in adapter.modules.items()}, adapter.base_model)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", ["cat", "svd", "lego"])
def test_a_merge_comes_back_as_it_was_saved(tmp_path, method, dtype):
    merged = merge_terms(method, motley(), dtype=dtype)
    save_adapter(merged, tmp_path / "merged")
    back = load_adapter(tmp_path / "merged")
    assert_same_bytes(back, merged)
    assert back.digest == merged.digest
    assert back.base_model == merged.base_model == "tiny"
    assert all(module.scaling == 1 for module in back.modules.values())


@given(method=methods, terms=terms(rank=3), dtype=st.sampled_from(list(TOLERANCE)))
def test_saving_loading_and_merging_again_gives_the_same_bytes(tmp_path_factory, method, terms, dtype):
    folder = tmp_path_factory.mktemp("again")
    for i, (adapter, _) in enumerate(terms):
        save_adapter(plain(adapter), folder / f"source{i}")
    sources = [(load_adapter(folder / f"source{i}"), weight) for i, (_, weight) in enumerate(terms)]
    once = merge_terms(method, [(plain(adapter), weight) for adapter, weight in terms], dtype=dtype)
    again = merge_terms(method, sources, dtype=dtype)
    assert_same_bytes(once, again)
    save_adapter(once, folder / "once")
    save_adapter(again, folder / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "once" / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(FileExistsError, match=r"mine exists; choose another folder or remove it"):
        save_adapter(plain(random_adapter(1)), tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


def test_an_empty_folder_and_a_file_are_left_alone_too(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("keep")
    for name in ("empty", "file"):
        with pytest.raises(FileExistsError):
            save_adapter(plain(random_adapter(1)), tmp_path / name)
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize("step", ["save_file", "os.replace", "json.dumps"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(f"merging.peft_folder.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(plain(random_adapter(1)), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(under_test, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(plain(random_adapter(1)), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_no_reader_ever_sees_half_a_folder(tmp_path, monkeypatch):
    """Until the rename, nothing stands under the name."""
    target = tmp_path / "merged"
    rename = under_test.os.replace

    def watched(source, destination):
        assert not target.exists()
        assert {path.name for path in source.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        rename(source, destination)

    monkeypatch.setattr(under_test.os, "replace", watched)
    save_adapter(plain(random_adapter(1)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_others_may_read_what_was_saved(tmp_path):
    save_adapter(plain(random_adapter(1)), tmp_path / "merged")
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o755


def test_missing_parents_are_made(tmp_path):
    save_adapter(plain(random_adapter(1)), tmp_path / "a" / "b" / "merged")
    assert load_adapter(tmp_path / "a" / "b" / "merged").modules


def test_an_unfolded_scaling_is_not_lost_in_silence(tmp_path):
    with pytest.raises(AssertionError, match="fold the scaling"):
        save_adapter(random_adapter(1, 2, alpha=4), tmp_path / "loud")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_modules_of_which_one_name_ends_with_the_other_keep_their_ranks(tmp_path, ranks):
    """As a multimodal model has them; PEFT's patterns match the ends of names."""
    names = ("model.layers.0.q_proj", "vision.model.layers.0.q_proj")
    adapter = LoraAdapter(
        {name: LoraModule(torch.ones(rank, 6), torch.ones(8, rank)) for name, rank in zip(names, ranks, strict=True)}
    )
    save_adapter(adapter, tmp_path / "merged")
    assert_same_bytes(load_adapter(tmp_path / "merged"), adapter)


def test_factors_that_are_views_or_share_memory_can_be_saved(tmp_path):
    whole = torch.arange(48.0).reshape(6, 8)
    adapter = LoraAdapter({"x": LoraModule(whole.T[:2], whole.T[:, :2]), "y": LoraModule(whole[:2], whole[:, :2])})
    save_adapter(adapter, tmp_path / "merged")
    assert_same_bytes(load_adapter(tmp_path / "merged"), adapter)


def test_the_configuration_says_alpha_equal_to_rank_everywhere(tmp_path):
    merged = merge_terms("cat", motley())
    save_adapter(merged, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == merged.rank
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["target_modules"]) == sorted(merged.modules)
