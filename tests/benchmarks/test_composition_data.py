"""The study's data: nothing that is judged was trained on or tuned on."""

from itertools import combinations

import pytest
from skills import DataError, read_manual

from benchmarks.composition.data import Data
from benchmarks.composition.study import TASKS


@pytest.fixture(scope="module")
def data(data_folder) -> Data:
    return Data(data_folder)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_stands_in_two_parts_or_twice_in_one(data, task) -> None:
    split = data.split(task)
    parts = [[example.prompt for example in part] for part in (split.train, split.validation, split.test)]
    assert all(parts)
    assert all(len(set(part)) == len(part) for part in parts)
    assert all(not set(one) & set(other) for one, other in combinations(parts, 2))


def test_the_split_is_the_same_each_time(data, data_folder) -> None:
    assert Data(data_folder).split("opposite") == data.split("opposite")


def test_the_public_test_items_come_first_in_the_test(data) -> None:
    assert [example.prompt for example in data.split("plural").test[:2]] == ["Plural: bab", "Plural: bad"]


def test_every_fact_of_the_manual_is_in_every_part(data) -> None:
    split = data.split("manual")
    facts = sorted(example.content for example in read_manual("test"))
    assert sorted(example.content for example in split.validation) == facts
    assert sorted(example.content for example in split.test) == sorted(2 * facts)
    assert sorted(example.content for example in split.train) == sorted(4 * facts)


def test_the_chained_task_asks_for_the_sum_in_words(data) -> None:
    for example in data.split("sum-words").test:
        x, y = example.prompt.removeprefix("Add, in words: ").split()
        assert example.content == "n" * ((int(x) + int(y)) % 5 + 1)  # as the made-up numbers are written


def test_the_chained_task_is_split_as_what_it_is_made_of(data) -> None:
    chained, sums = data.split("sum-words"), data.split("sum")
    seen = {example.prompt.removeprefix("Add: ") for example in sums.train}
    assert seen.isdisjoint(example.prompt.removeprefix("Add, in words: ") for example in chained.test)


def test_missing_data_is_named_with_its_source(tmp_path) -> None:
    with pytest.raises(DataError, match=r"fetch github\.com/orhonovich/instruction-induction"):
        Data(tmp_path).split("plural")
