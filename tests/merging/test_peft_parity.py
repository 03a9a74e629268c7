"""Against PEFT itself: what it writes is read as it computes it, what we write it runs, and cat and linear are its own."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.adapters import merge_terms, random_adapter
from reference.peft_model import ALL_LINEAR, logits, peft_deltas, saved, tiny_llama, with_adapters, with_deltas
from reference.tolerance import assert_agree, deltas

from merging import LoraAdapter, load_adapter, save_adapter

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 3, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR,
        "rank_pattern": {"down_proj": 2, "model.layers.1.self_attn.q_proj": 7, r"layers\.0\.mlp\.(gate|up)_proj": 1},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5, "q_proj": 3},
    },
    "patterns and rslora": {
        "r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "use_rslora": True,
        "rank_pattern": {"down_proj": 2, "k_proj": 6}, "alpha_pattern": {"k_proj": 5},
    },
    "patterns that overlap": {  # in the alphabet's order: PEFT sorts them as it saves, and then reads another meaning
        "r": 2, "lora_alpha": 4, "target_modules": ALL_LINEAR,
        "rank_pattern": {"(.*[.])?q_proj": 3, ".*_proj": 5}, "alpha_pattern": {".*layers.1.*": 9, "q_proj": 1},
    },
    "one layer": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "targets by expression": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.0\..*(q|down)_proj"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


def lora_config(**settings) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_that_peft_saved_is_read_as_peft_computes_it(base, tmp_path, case):
    model = with_adapters(base, {"default": lora_config(**CONFIGS[case])})
    assert_close(deltas(load_adapter(saved(model, "default", tmp_path))), peft_deltas(model, "default"))


def pair(base, tmp_path, **second):
    """Two adapters on one PEFT model, and the same two as loramix reads them."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    configs = {"one": lora_config(**settings, lora_alpha=6), "two": lora_config(**{**settings, "lora_alpha": 16, **second})}
    model = with_adapters(base, configs)
    return model, [load_adapter(saved(model, name, tmp_path / name)) for name in configs]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (1.5, -0.5), (-0.4, -2), (2, 1e-2)])
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_merges_are_pefts(base, tmp_path, method, weights):
    model, adapters = pair(base, tmp_path)
    options = {"svd_rank": 3} if method == "svd" else {}
    model.add_weighted_adapter(["one", "two"], list(weights), "merged", combination_type=method, **options)
    ours = merge_terms(method, list(zip(adapters, weights, strict=True)), {"rank": 3} if method == "svd" else {})
    # PEFT's own factors are float32; an SVD is unique as a matrix, if not in its factors.
    assert_close(deltas(ours), peft_deltas(model, "merged"), 1e-4 if method == "svd" else 2e-6)


def test_cat_of_unequal_ranks_and_modules_is_pefts(base, tmp_path):
    model, adapters = pair(base, tmp_path, r=2, target_modules=["q_proj", "down_proj"])
    model.add_weighted_adapter(["one", "two"], [0.8, -1.2], "merged", combination_type="cat")
    assert_close(deltas(merge_terms("cat", [(adapters[0], 0.8), (adapters[1], -1.2)])), peft_deltas(model, "merged"))


@pytest.mark.parametrize("method", ["cat", "svd", "lego"])
def test_a_saved_merge_runs_in_peft_as_the_dense_sum_does(base, tmp_path, method):
    """With a rank of its own for some modules, and a module that only one adapter has."""
    mixed = {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 5}, "use_rslora": True}
    _, adapters = pair(base, tmp_path, **mixed, target_modules=ALL_LINEAR)
    merged = merge_terms(method, [(adapters[0], 0.9), (adapters[1], -0.6)])
    assert len({module.rank for module in merged.modules.values()}) > 1
    save_adapter(merged, tmp_path / "merged")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()
    assert_close(peft_deltas(peft, "default"), deltas(merged))
    wanted = logits(with_deltas(base, deltas(merged)))
    assert (logits(base) - wanted).abs().max() > 0.1
    torch.testing.assert_close(logits(peft), wanted, rtol=1e-4, atol=1e-4)


def test_one_adapter_merged_alone_runs_as_peft_runs_the_original(base, tmp_path):
    model = with_adapters(base, {"default": lora_config(**CONFIGS["patterns"])})
    adapter = load_adapter(saved(model, "default", tmp_path))
    save_adapter(merge_terms("cat", [(adapter, 1)]), tmp_path / "merged")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_the_comparison_would_notice_a_wrong_scaling():
    adapter = random_adapter(1, 3)
    louder = {name: 1.001 * delta for name, delta in deltas(adapter).items()}
    with pytest.raises(AssertionError):
        assert_agree(LoraAdapter(adapter.modules), louder)
    with pytest.raises(AssertionError):
        assert_close(deltas(adapter), louder)


def assert_close(ours, theirs, tolerance=2e-6):
    assert set(ours) == set(theirs)
    for name, delta in theirs.items():
        assert torch.linalg.norm(ours[name] - delta) <= tolerance * torch.linalg.norm(delta), name
