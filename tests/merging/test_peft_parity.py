"""Against PEFT itself: what it writes is read as it computes it, what we write it runs, merges by its methods are its own."""

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


def some(base, tmp_path, *settings):
    """Adapters on one PEFT model, and the same as loramix reads them."""
    common = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    names = ("one", "two", "three")[: len(settings)]
    configs = {name: lora_config(**{**common, **own}) for name, own in zip(names, settings, strict=True)}
    model = with_adapters(base, configs)
    return model, [load_adapter(saved(model, name, tmp_path / name)) for name in configs]


def pair(base, tmp_path, **second):
    return some(base, tmp_path, {}, {"lora_alpha": 16, **second})


PAIRS = [  # our method and options, PEFT's combination type and arguments
    ("cat", {}, "cat", {}),
    ("linear", {}, "linear", {}),
    ("magnitude", {"density": 0.4}, "magnitude_prune", {"density": 0.4}),
    ("ties", {"density": 0.4}, "ties", {"density": 0.4}),
    ("ties", {"density": 0.7, "majority": "frequency"}, "ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    ("dare", {"density": 1}, "dare_linear", {"density": 1}),
    ("dare", {"density": 1, "consensus": "ties"}, "dare_ties", {"density": 1}),
]


@pytest.mark.filterwarnings("ignore:The density 1 is greater than or equal to 1")  # PEFT's: it prunes nothing, as asked
@pytest.mark.parametrize("weights", [(0.7, 0.3, 0.5), (1, 1, 1), (1.5, -0.5, 0.2), (-0.4, -2, -1), (2, 1e-2, -3)])
@pytest.mark.parametrize(("method", "options", "theirs", "arguments"), PAIRS)
def test_merges_are_pefts(base, tmp_path, method, options, theirs, arguments, weights):
    """Weights of both signs need no adjusting: PEFT too puts √|w c| on both sides, the sign on A."""
    model, adapters = some(base, tmp_path, {}, {"lora_alpha": 16}, {"lora_alpha": 2, "use_rslora": True})
    model.add_weighted_adapter(list(model.peft_config), list(weights), "merged", combination_type=theirs, **arguments)
    ours = merge_terms(method, list(zip(adapters, weights, strict=True)), options)
    assert_close(deltas(ours), peft_deltas(model, "merged"))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5), (-0.4, -2)])
@pytest.mark.parametrize("rank", [1, 3])
def test_svd_is_as_near_to_the_sum_as_pefts(base, tmp_path, rank, weights):
    """By optimality: singular vectors are unique up to signs only, and not even that where values are equal."""
    model, adapters = pair(base, tmp_path)
    model.add_weighted_adapter(["one", "two"], list(weights), "merged", combination_type="svd", svd_rank=rank)
    terms = list(zip(adapters, weights, strict=True))
    sums, theirs = deltas(merge_terms("cat", terms)), peft_deltas(model, "merged")
    for name, ours in deltas(merge_terms("svd", terms, {"rank": rank})).items():
        size, nearest = torch.linalg.norm(sums[name]), torch.linalg.norm(sums[name] - theirs[name])
        assert abs(torch.linalg.norm(sums[name] - ours) - nearest) <= 1e-5 * size
        assert torch.linalg.norm(ours - theirs[name]) <= 1e-4 * size


def test_dare_is_spread_as_pefts(base, tmp_path):
    """Other random numbers, the same distribution: mean and mean square of ΔW over many seeds."""
    model, adapters = pair(base, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    ours, theirs = [], []
    for seed in range(150):
        merged = merge_terms("dare", [(adapters[0], 0.7), (adapters[1], -0.4)], {"density": 0.5, "seed": seed})
        ours.append(merged.modules[name].delta())
        torch.manual_seed(seed)
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "merged", combination_type="dare_linear", density=0.5)
        theirs.append(peft_deltas(model, "merged")[name])
        model.delete_adapter("merged")
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    spread = torch.linalg.norm(theirs.std(dim=0)) * (2 / 150) ** 0.5  # of the difference of two means
    assert torch.linalg.norm(ours.mean(dim=0) - theirs.mean(dim=0)) < 1.5 * spread
    assert float(ours.square().sum()) == pytest.approx(float(theirs.square().sum()), rel=0.2)


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
