"""Rows of data: what is read from a file, what is cut, and what is refused in one line."""

import copy
import json

import pytest

from merging.fit import FitError, Rows, read_rows

TEMPLATE = "{% for message in messages %}w30 {{ message.content }} {% endfor %}w31"


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def chatty(tokenizer):
    """With a chat template and an end token, as models that follow instructions have them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "w39"
    return tokenizer


def test_prompt_and_answer_are_joined_and_the_answers_place_is_kept(tokenizer, tmp_path):
    data = write(
        tmp_path / "data.jsonl", {"prompt": "w1 w2", "answer": "w3", "more": 1}, "", {"prompt": "w4", "answer": "w5 w6"}
    )
    assert read_rows(data, tokenizer, most_tokens=32) == (Rows([[1, 2, 3], [4, 5, 6]], [2, 1]), 0)


def test_fields_may_have_other_names(tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", {"question": "w1 w2", "reply": "w3"})
    assert read_rows(data, tokenizer, fields=("question", "reply"), most_tokens=32)[0] == Rows([[1, 2, 3]], [2])


def test_prompts_go_through_the_chat_template_and_answers_end_with_the_end_token(chatty, tmp_path):
    chat = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    data = write(tmp_path / "data.jsonl", {"prompt": "w1", "answer": "w2"}, {"messages": chat})
    assert read_rows(data, chatty, most_tokens=32)[0] == Rows([[30, 1, 31, 2, 39], [30, 7, 30, 1, 31, 2, 3, 39]], [3, 5])


def test_long_rows_are_cut_and_those_without_an_answer_left_dropped_and_both_counted(tokenizer, tmp_path):
    lines = [{"prompt": "w1 " * n, "answer": "w2 w3"} for n in (1, 2, 3, 4)]
    data = write(tmp_path / "data.jsonl", *lines)
    assert read_rows(data, tokenizer, most_tokens=3) == (Rows([[1, 2, 3], [1, 1, 2]], [1, 2]), 3)


def test_a_line_separator_inside_a_text_ends_no_line(tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", '{"prompt": "w1\u2028w2", "answer": "w3"}')
    assert read_rows(data, tokenizer, most_tokens=32)[0] == Rows([[1, 2, 3]], [2])


REFUSED = {
    "empty": ([], "data.jsonl is empty; give an example a line"),
    "no JSON": (['{"prompt": "w1", "answer": "w2"}', "w3"], r"line 2: no JSON \(.*\); write one object a line"),
    "no object": (["[1]"], "line 1: list instead of an object"),
    "other fields": (
        [{"question": "w1", "text": "w2"}],
        "line 1: no texts 'prompt' and 'answer', and no 'messages'; .*question, text",
    ),
    "no text": ([{"prompt": "w1", "answer": 2}], "line 1: no texts"),
    "a message without content": ([{"messages": [{"role": "user"}]}], "line 1: message {'role': 'user'}; write"),
    "no answer": ([{"messages": [{"role": "user", "content": "w1"}]}], "line 1: its messages do not end with an answer"),
    "all too long": ([{"prompt": "w1 " * 9, "answer": "w2"}], "no row has a token of its answer within 8 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_read_is_refused_with_its_line(case, tokenizer, tmp_path):
    lines, says = REFUSED[case]
    with pytest.raises(FitError, match=says) as raised:
        read_rows(write(tmp_path / "data.jsonl", *lines), tokenizer, most_tokens=8)
    assert str(tmp_path / "data.jsonl") in str(raised.value)


def test_a_file_that_is_missing_is_named(tokenizer, tmp_path):
    with pytest.raises(FitError, match=r"none\.jsonl cannot be read \(No such file"):
        read_rows(tmp_path / "none.jsonl", tokenizer, most_tokens=8)


def test_a_split_shares_the_rows_out_and_is_drawn_from_the_seed():
    rows = Rows([[i, i] for i in range(20)], [1] * 20)
    train, held_out = rows.split(0.2, seed=3)
    assert (len(train), len(held_out)) == (16, 4)
    assert sorted(train.ids + held_out.ids) == rows.ids
    assert rows.split(0.2, seed=3) == (train, held_out)
    assert rows.split(0.2, seed=4) != (train, held_out)


@pytest.mark.parametrize(("count", "part"), [(1, 0.5), (4, 0.0), (4, 1.0), (2, 0.1)])
def test_a_split_that_leaves_nothing_is_refused(count, part):
    with pytest.raises(FitError, match=f"{count} rows cannot be split"):
        Rows([[1, 2]] * count, [1] * count).split(part, seed=0)
