"""Every adapter folder that cannot be served is refused with the folder, the fault and a remedy, and only with AdapterError."""

import math
import re

import pytest
import torch
from reference.folders import PREFIX, UP, Q, factors, write_folder
from safetensors.torch import save_file

from merging import AdapterError, load_adapter

# What a message must tell people to do: some verb that they can follow.
REMEDY = re.compile(
    r"\b(check|copy|save|train|convert|export|remove|use|expected|must|needed|point|add|fix|set|correct|name)\b"
)

A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


def refusal(folder):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


SETTINGS = {  # case: (settings, what the message says)
    "another kind of adapter": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, "DoRA is not supported; train a plain LoRA"),
    "bias": ({"bias": "all"}, "bias='all' is not supported; train with bias='none'"),
    "bias of LoRA layers": ({"bias": "lora_only"}, "bias='lora_only'"),
    "bias of B": ({"lora_bias": True}, "LoRA bias is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head.*fully trained modules"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer replication"),
    "trained tokens": ({"trainable_token_indices": [5]}, "trained tokens"),
    "target parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target parameters"),
    "QALoRA": ({"use_qalora": True}, "QALoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base.*; convert it"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "OLoRA, as PEFT also spells it": ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA'"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    "LoRA-GA, which moves the base weights too": ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
    "a setting of tomorrow": ({"use_hyperlora": True}, "use_hyperlora=True.*does not know.*remove it"),
    "a number of tomorrow": ({"hyper_rank": 3}, "hyper_rank=3"),
    "rank 0": ({"r": 0}, r"r=0 .* must be a positive number"),
    "negative rank": ({"r": -2}, r"r=-2 .* must be a positive number"),
    "rank in words": ({"r": "two"}, r"r='two' .* must be a positive number"),
    "no rank": ({"r": None}, r"r=None .* must be a positive number"),
    "alpha 0": ({"lora_alpha": 0}, r"lora_alpha=0 .* must be a positive number"),
    "alpha NaN": ({"lora_alpha": math.nan}, r"lora_alpha=nan .* must be a positive number"),
    "alpha infinite": ({"lora_alpha": math.inf}, r"lora_alpha=inf .* must be a positive number"),
    "another rank": ({"r": 4}, rf"{Q}: A is \(2, 6\).*B \(8, 2\).*rank 4"),
    "another rank by pattern": ({"rank_pattern": {"q_proj": 1}}, rf"{Q}: A is .*rank 1"),
    "rank 0 by pattern": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
    "alpha NaN by pattern": ({"alpha_pattern": {"q_proj": math.nan}}, "alpha"),
    "alpha infinite by pattern": ({"alpha_pattern": {"q_proj": math.inf}}, "alpha"),
    "alpha in words by pattern": ({"alpha_pattern": {"q_proj": "four"}}, "alpha_pattern|four"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha"),
    "pattern that is no regular expression": ({"rank_pattern": {"(q_proj": 2}}, r"\(q_proj"),
    "patterns that are no mapping": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_served_are_refused(tmp_path, case):
    settings, wanted = SETTINGS[case]
    assert re.search(wanted, refusal(write_folder(tmp_path / "bad", settings)))


def spoiled(key, value):
    tensors = factors()
    tensors[key][-1, -1] = value
    return tensors


def without(key):
    return {k: v for k, v in factors().items() if k != key}


TENSORS = {
    "NaN in A": (spoiled(A, math.nan), rf"{Q}.lora_A.weight holds NaN or infinite.*again"),
    "NaN in B": (spoiled(B, math.nan), rf"{Q}.lora_B.weight holds NaN"),
    "infinite": (spoiled(B, -math.inf), rf"{Q}.lora_B.weight holds NaN or infinite"),
    "A alone": (without(B), rf"{Q} has only lora_A; both"),
    "B alone": (without(A), rf"{Q} has only lora_B; both"),
    "A and B of unlike ranks": ({**factors(), B: torch.ones(8, 3)}, rf"{Q}: A is \(2, 6\).*B \(8, 3\)"),
    "A and B of unlike dtypes": ({**factors(), B: torch.ones(8, 2).half()}, rf"{Q}: A is .*float32.*float16"),
    "float64": ({**factors(), B: torch.ones(8, 2).double()}, "float64; expected one of bfloat16, float16, float32"),
    "integers": ({**factors(), B: torch.ones(8, 2, dtype=torch.int8)}, "int8; expected one of"),
    "float8": ({**factors(), B: torch.ones(8, 2).to(torch.float8_e4m3fn)}, "float8_e4m3fn; expected one of"),
    "an embedding": (
        {f"{PREFIX}embed.lora_embedding_A": torch.ones(2, 9), f"{PREFIX}embed.lora_embedding_B": torch.ones(6, 2)},
        "lora_embedding_A .* not a LoRA factor of a linear layer",
    ),
    "a convolution": ({A: torch.ones(2, 6, 1, 1), B: torch.ones(8, 2, 1, 1)}, r"\(2, 6, 1, 1\) is not a LoRA factor"),
    "a magnitude": ({**factors(), f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector"),
    "a whole module": ({**factors(), f"{PREFIX}lm_head.weight": torch.ones(8, 6)}, "lm_head.weight"),
    "a bias": ({**factors(), f"{PREFIX}{Q}.lora_B.bias": torch.ones(8)}, "lora_B.bias"),
    "nothing": ({}, "holds no tensors"),
    "one factor under two names": ({**factors(), f"{PREFIX}{Q}.lora_A.default.weight": torch.ones(2, 6)}, Q),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_served_are_refused(tmp_path, case):
    tensors, wanted = TENSORS[case]
    assert re.search(wanted, refusal(write_folder(tmp_path / "bad", tensors=tensors)))


@pytest.mark.parametrize("case", [*SETTINGS, *TENSORS])
def test_every_refusal_says_what_to_do(tmp_path, case):
    settings, tensors = SETTINGS.get(case, ({}, ""))[0], TENSORS.get(case, (None, ""))[0]
    assert REMEDY.search(refusal(write_folder(tmp_path / "bad", settings, tensors)).partition("bad: ")[2])


def test_a_rank_of_zero_is_refused_even_if_the_tensors_have_it(tmp_path):
    empty = {A: torch.ones(0, 6), B: torch.ones(8, 0)}
    assert "rank_pattern['q_proj']=0" in refusal(write_folder(tmp_path / "bad", {"rank_pattern": {"q_proj": 0}}, empty))


def test_one_bad_module_among_good_ones_is_enough(tmp_path):
    bad = factors(module=UP)
    bad[f"{PREFIX}{UP}.lora_A.weight"][0, 0] = math.nan
    assert f"{UP}.lora_A.weight holds NaN" in refusal(write_folder(tmp_path / "bad", tensors={**factors(), **bad}))


def test_a_missing_folder_is_refused(tmp_path):
    assert "no such folder; check the path" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "no such folder" in refusal(tmp_path / "file")


def test_a_missing_configuration_is_refused_with_a_remedy(tmp_path):
    folder = write_folder(tmp_path / "bad")
    (folder / "adapter_config.json").unlink()
    message = refusal(folder)
    assert "adapter_config.json is missing" in message
    assert REMEDY.search(message.partition("missing or no file;")[2])


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'["LORA"]', b"null"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, content):
    folder = write_folder(tmp_path / "bad")
    (folder / "adapter_config.json").write_bytes(content)
    refusal(folder)


def test_missing_weights_are_refused_with_a_remedy(tmp_path):
    folder = write_folder(tmp_path / "bad")
    (folder / "adapter_model.safetensors").unlink()
    message = refusal(folder)
    assert "adapter_model.safetensors is missing" in message
    assert REMEDY.search(message.partition("missing")[2])


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.pth"])
def test_pickled_weights_are_refused_unread(tmp_path, name, monkeypatch):
    folder = write_folder(tmp_path / "bad")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(factors(), folder / name)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    assert re.search(rf"pickled \({name}\), which can run code; save them as adapter_model.safetensors", refusal(folder))


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    folder = write_folder(tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "truncated or not a safetensors file" in refusal(folder)
    assert "copy it again" in refusal(folder)


def test_a_file_of_another_format_is_refused(tmp_path):
    folder = write_folder(tmp_path / "bad")
    torch.save(factors(), folder / "adapter_model.safetensors")
    assert "not a safetensors file" in refusal(folder)


def test_an_overwritten_file_does_not_reach_into_a_loaded_adapter(tmp_path):
    """An adapter is checked and digested once: what is in memory must not follow the file that it came from."""
    folder = write_folder(tmp_path / "good")
    adapter = load_adapter(folder)
    kept = adapter.modules[Q].delta()
    save_file({key: 3 * tensor for key, tensor in factors().items()}, tmp_path / "new.safetensors")
    with open(folder / "adapter_model.safetensors", "r+b") as weights:  # in place, as cp and rsync --inplace do
        weights.write((tmp_path / "new.safetensors").read_bytes())
    assert torch.equal(adapter.modules[Q].delta(), kept)
