"""The judge of the study against greedy decoding, and the weights that it wears against dense sums."""

import pytest
import torch
from batches import Rows
from skills import Example, Form

from benchmarks.composition.groups import PLAIN
from benchmarks.composition.judge import Judge, encoded, lay_out
from benchmarks.composition.work import StudyError
from merging import LoraAdapter, LoraModule

ANSWER, END = 7, 257


@pytest.fixture
def judge(tiny_model) -> Judge:
    return Judge(tiny_model(hidden=64))


def adapter(judge: Judge, size: float) -> LoraAdapter:
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for name, linear in judge.model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            d_out, d_in = linear.weight.shape
            a, b = torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator)
            modules[name] = LoraModule(size * a, b, 0.5)
    return LoraAdapter(modules)


def said(judge: Judge, prompts: list[torch.Tensor]) -> list[list[int]]:
    """What transformers decodes greedily, one prompt at a time."""
    return [
        judge.model.generate(p[None], do_sample=False, max_new_tokens=ANSWER, pad_token_id=END)[0, len(p) :].tolist()
        for p in prompts
    ]


def asked(prompts: list[torch.Tensor], answers: list[list[int]], length: int) -> Rows:
    ids = torch.full((len(prompts), length), END)
    labels = torch.full((len(prompts), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.cat([prompt, torch.tensor(answer)])
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return Rows(ids, labels)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it(judge, scale) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (n,), generator=generator) for n in (3, 9, 5, 12, 7, 4)]
    judge.wear(adapter(judge, 0.02), scale)
    decoded = said(judge, prompts)
    expected = [list(answer) for answer in decoded]
    expected[1][3] += 1 if expected[1][3] < 255 else -1  # another token in the middle,
    expected[2][-1] = (expected[2][-1] + 5) % 256  # at the end,
    expected[4] = [*expected[4][:4], END]  # and an end where there is none
    right = judge.right(asked(prompts, expected, 24))
    assert right.tolist() == [True, False, False, True, False, True]


def test_wearing_adds_the_scaled_sum_and_takes_all_of_it_off_again(judge) -> None:
    before = {name: tensor.clone() for name, tensor in judge.model.state_dict().items()}
    worn = adapter(judge, 0.1)
    judge.wear(worn, 2.0)
    judge.wear(worn, 0.7)
    for name, module in worn.modules.items():
        dense = before[f"{name}.weight"].double() + 0.7 * module.delta()
        torch.testing.assert_close(judge.model.get_submodule(name).weight.double(), dense, rtol=0, atol=1e-6)
    judge.wear(LoraAdapter({name: module for name, module in worn.modules.items() if "q_proj" in name}), 1.0)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(judge.model.state_dict()[down], before[down])
    judge.wear(None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in judge.model.state_dict().items())


def test_percentages_are_of_each_question_by_part(judge, tokenizer) -> None:
    examples = [Example("ab", "c"), Example("d", "efg"), Example("h", "i")]
    first, second = (encoded(tokenizer, part, PLAIN, 9, 64) for part in (examples[:1], examples))
    items = lay_out({"validation": [first], "test": [second, first]}, END, torch.device("cpu"))
    judge.right = lambda rows: torch.tensor([True, True, False, False, False])
    assert judge.percent(items) == {"validation": [100.0], "test": [pytest.approx(100 / 3), 0.0]}


def test_items_that_are_too_long_are_left_out_and_none_left_is_an_error(tokenizer) -> None:
    examples = [Example("x" * 50, "long"), Example("y", "short"), Example("z", "short"), Example("w", "short")]
    kept = encoded(tokenizer, examples, Form("<", ">"), 2, 20)
    assert [tokenizer.decode(ids) for ids, _ in kept] == ["<s>y</s><s><short></s>", "<s>z</s><s><short></s>"]
    with pytest.raises(StudyError, match="has at most 20 tokens"):
        encoded(tokenizer, examples[:1], PLAIN, 2, 20)
