"""Prompts that are chats: what a row may hold, and what the chat template makes of it.

Not covered here: prompts that are texts (test_prompts.py), other columns (test_sources.py).
"""

import pytest

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts
from tests.data.test_sources import jsonl

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }},{% endfor %}{% if enable_thinking is defined and not "
    "enable_thinking %}quick,{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SYSTEM, USER, SHOT = (
    {"role": "system", "content": "add"},
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> prompts.Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    arithmetic.make_model(folder, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return prompts.Tokenizer(str(folder))


def loaded(tmp_path, tokenizer, *problems: object, **keys: object) -> list:
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "3"} for p in problems))
    return prompts.load(source, config.Data(train="", **keys), tokenizer, "data.train")[0]


def said(tmp_path, tokenizer, *problems: object, **keys: object) -> list[str]:
    return [tokenizer.decode(p.token_ids) for p in loaded(tmp_path, tokenizer, *problems, **keys)]


def test_a_chat_goes_through_the_template_as_it_is(tmp_path, tokenizer):
    (prompt,) = loaded(
        tmp_path, tokenizer, [SYSTEM, {"role": "user", "content": "0+1"}, {**SHOT, "content": "1"}, USER]
    )
    assert tokenizer.decode(prompt.token_ids) == "system:add,user:0+1,assistant:1,user:1+2,assistant:"
    assert prompt.problem == "1+2" and [m["role"] for m in prompt.messages] == ["system", "user", "assistant", "user"]


def test_a_text_and_a_chat_of_one_turn_are_the_same_prompt(tmp_path, tokenizer):
    text, chat = loaded(tmp_path, tokenizer, "1+2", [USER])
    assert text.token_ids == chat.token_ids and text.messages == chat.messages == (USER,)


def test_the_prompt_template_is_of_the_last_turn_alone(tmp_path, tokenizer):
    assert said(tmp_path, tokenizer, [USER, SHOT, USER], prompt_template="{problem}=") == [
        "user:1+2,assistant:3,user:1+2=,assistant:"
    ]


def test_a_system_prompt_goes_before_texts_and_chats(tmp_path, tokenizer):
    assert said(tmp_path, tokenizer, "1+2", [USER, SHOT, USER], system_prompt="add") == [
        "system:add,user:1+2,assistant:",
        "system:add,user:1+2,assistant:3,user:1+2,assistant:",
    ]


def test_arguments_reach_the_template(tmp_path, tokenizer):
    assert said(tmp_path, tokenizer, "1+2", template_arguments={"enable_thinking": False}) == [
        "user:1+2,quick,assistant:"
    ]


@pytest.mark.parametrize(
    "name, words",
    [("enable_thinkin", "is no argument of the tokenizer's chat template"), ("tokenize", "is set by the project")],
)
def test_an_argument_that_the_template_does_not_read_is_refused(tmp_path, tokenizer, name, words):
    with pytest.raises(InputError, match=f"data.template_arguments.{name} = False: {words}"):
        said(tmp_path, tokenizer, "1+2", template_arguments={name: False})


@pytest.mark.parametrize(
    "chat, words",
    [
        ([USER, SHOT], "ends with a message of the assistant, and the answer is to the user's. Remedy: end it with"),
        ([SYSTEM], "ends with a message of the system"),
        ([USER, SHOT, SYSTEM, USER], "has a system message behind another. Remedy: put it first"),
        (
            [{"role": "tool", "content": "3"}, USER],
            "has a message of role 'tool'. Remedy: name one of system, user, as",
        ),
        ([{"content": "3"}], "has a message of role None"),
        ([{"role": "user", "content": " "}], "has a message without a text in its content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "1+2"}]}],
            "has a message without a text in its conten",
        ),
        ([{"role": "user", "content": "x\ud800"}], "has half of a character"),
    ],
)
def test_a_chat_that_nothing_can_answer_is_refused_by_its_row(tmp_path, tokenizer, chat, words):
    with pytest.raises(InputError) as e:
        said(tmp_path, tokenizer, [USER], chat)
    assert str(e.value).startswith("data.train: ") and "d.jsonl, line 2 = " in str(e.value)
    assert f"its 'problem' {words}" in str(e.value)


def test_a_chat_with_a_system_message_refuses_another(tmp_path, tokenizer):
    with pytest.raises(InputError, match="has a system message of its own, and system_prompt is set"):
        said(tmp_path, tokenizer, [SYSTEM, USER], system_prompt="add")


def test_a_chat_needs_a_chat_template(tmp_path, tokenizer):
    with pytest.raises(InputError, match="line 1 = .*: its 'problem' is a chat, and data.chat_template is false. Rem"):
        said(tmp_path, tokenizer, [USER], chat_template=False)
