"""What a good PEFT folder says is what is loaded: patterns, rsLoRA, names and dtypes."""

import math

import pytest
import torch
from reference.folders import PREFIX, UP, Q, factors, write_folder

from merging import load_adapter


def loaded(tmp_path, settings=None, tensors=None):
    return load_adapter(write_folder(tmp_path / "adapter", settings, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_come_as_they_are_stored(tmp_path, dtype):
    module = loaded(tmp_path, tensors=factors(dtype=dtype)).modules[Q]
    assert module.a.dtype == dtype
    assert torch.equal(module.a, factors(dtype=dtype)[f"{PREFIX}{Q}.lora_A.weight"])
    assert torch.equal(module.b, factors(dtype=dtype)[f"{PREFIX}{Q}.lora_B.weight"])
    assert (module.rank, module.shape) == (2, (8, 6))


def test_scaling_is_alpha_over_rank(tmp_path):
    assert loaded(tmp_path, {"lora_alpha": 5}).modules[Q].scaling == 5 / 2


def test_rslora_scaling_is_alpha_over_the_root_of_the_rank(tmp_path):
    assert loaded(tmp_path, {"lora_alpha": 5, "use_rslora": True}).modules[Q].scaling == pytest.approx(5 / math.sqrt(2))


@pytest.mark.parametrize(
    "pattern", ["q_proj", "self_attn.q_proj", Q, "layers.0.self_attn.q_proj", r"layers\.[0-3]\..*q_proj", "(q|k)_proj"]
)
def test_a_pattern_is_a_regular_expression_for_the_end_of_a_name(tmp_path, pattern):
    tensors = {**factors(3, Q), **factors(2, UP)}
    modules = loaded(tmp_path, {"rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 12}}, tensors).modules
    assert (modules[Q].rank, modules[Q].scaling) == (3, 4)
    assert (modules[UP].rank, modules[UP].scaling) == (2, 2)


@pytest.mark.parametrize("pattern", ["proj", "q", "model", "layers.0", "1.self_attn.q_proj", "f_attn.q_proj"])
def test_a_pattern_matches_whole_parts_of_a_name_only(tmp_path, pattern):
    assert loaded(tmp_path, {"alpha_pattern": {pattern: 12}}).modules[Q].scaling == 2


def test_the_first_of_two_patterns_counts(tmp_path):
    assert loaded(tmp_path, {"alpha_pattern": {"q_proj": 12, ".*": 20}}).modules[Q].scaling == 6


def test_an_alpha_pattern_is_divided_by_the_modules_own_rank(tmp_path):
    settings = {"rank_pattern": {"q_proj": 3}, "use_rslora": True}
    assert loaded(tmp_path, settings, factors(3)).modules[Q].scaling == pytest.approx(4 / math.sqrt(3))


@pytest.mark.parametrize("key", ["{}.lora_{}.weight", "{}.lora_{}.default.weight"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_names_are_the_base_models_whatever_wrote_the_file(tmp_path, key, prefix):
    tensors = {prefix + key.format(Q, "A"): torch.ones(2, 6), prefix + key.format(Q, "B"): torch.ones(8, 2)}
    assert list(loaded(tmp_path, tensors=tensors).modules) == [Q]


def test_settings_that_change_nothing_are_let_through(tmp_path):
    settings = {
        "lora_dropout": 0.1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "layers_to_transform": [0],
        "init_lora_weights": "gaussian", "modules_to_save": None, "use_dora": False, "of_tomorrow": None, "off": False,
        "revision": "main", "peft_version": "0.21.2", "rank_pattern": None, "alpha_pattern": {},
    }  # fmt: skip
    assert loaded(tmp_path, settings).base_model == "tiny"


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_let_through(tmp_path, init):
    assert loaded(tmp_path, {"init_lora_weights": init}).modules


def test_the_same_content_in_another_folder_has_the_same_digest(tmp_path):
    one = load_adapter(write_folder(tmp_path / "one"))
    other = load_adapter(write_folder(tmp_path / "other", {"lora_dropout": 0.5, "base_model_name_or_path": "elsewhere"}))
    louder = load_adapter(write_folder(tmp_path / "louder", {"lora_alpha": 8}))
    assert one.digest == other.digest != louder.digest
