"""A conversation's tokens: what stands between turns is the template's, and nothing is tokenised twice.

Not covered here: engines (test_runs.py).
"""

import json

import pytest
from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_mcore.config.config import Data
from grpo_mcore.data.prompts import Tokenizer
from grpo_mcore.environment.session import Refused, Session
from grpo_mcore.types import Prompt

# As Qwen's: tools in a system message, a tool's answer in a user's turn.
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama's: headers, and an end that is a token of its own.
HEADERS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
HIDES = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
REFUSES = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bytes are tokens, but for some pairs that merge: text cut elsewhere is other tokens."""
    path = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("Ċ", "Ċ"), ("a", "b")]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *("".join(pair) for pair in merges)])}
    fast = Fast(models.BPE(vocabulary, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", additional_special_tokens=SPECIAL)
    made.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": len(made), "eos_token_id": made.eos_token_id}))
    return path


def tokenizer_of(folder, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(str(folder))


def session_of(tokenizer: Tokenizer, limit: int = 500) -> Session:
    chat = ({"role": "user", "content": "1+1?"},)
    return Session(Prompt(0, "1+1?", "2", tokenizer.encode_chat(chat, Data(""), "p"), messages=chat), limit)


def say(session: Session, tokenizer: Tokenizer, text: str, end: str = "<|im_end|>") -> None:
    ids = tokenizer.encode_plain(text + end)
    session.take(ids, [-0.5] * len(ids), [(3, len(ids))], not end, text)


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_recorded_tokens_and_what_is_between_are_the_templates_text(folder, template):
    tokenizer = tokenizer_of(folder, template)
    session = session_of(tokenizer)
    chat = [*session.prompt.messages]
    for text, answer in (("ab12", {"role": "tool", "content": "12"}), ("so 1", {"role": "user", "content": "2?\n"})):
        say(session, tokenizer, text)
        assert session.give([answer], tokenizer, Data(""))
        chat += [{"role": "assistant", "content": text}, answer]
    say(session, tokenizer, "3")
    whole = tokenizer._tokenizer.decode([*session.prompt.token_ids, *session.token_ids], skip_special_tokens=False)
    end = "3<|im_end|>"
    assert whole == tokenizer._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + end
    assert session.messages == [*chat[1:], {"role": "assistant", "content": "3"}]
    given = [session.token_ids[a:b] for a, b in session.given]
    assert len(given) == 2 and sum(map(len, given)) + len(session.logprobs) == len(session.token_ids)
    assert all(len(tokenizer.encode_plain(tokenizer._tokenizer.decode(g))) == len(g) for g in given)
    assert session.num_turns == 3


def test_what_was_sampled_is_never_tokenised_again(folder):
    """A model may write 1 and 2 as two tokens, which no tokenizer would."""
    tokenizer = tokenizer_of(folder, CHATML)
    session = session_of(tokenizer)
    ids = [*tokenizer.encode_plain("1"), *tokenizer.encode_plain("2"), *tokenizer.encode_plain("<|im_end|>")]
    assert len(tokenizer.encode_plain("12")) == 1
    session.take(ids, [-0.5] * 3, [(0, 3)], False, "12")
    session.give([{"role": "tool", "content": "12"}], tokenizer, Data(""))
    assert session.token_ids[:3] == ids and session.given == [(3, len(session.token_ids))]


def test_a_turn_that_was_cut_gets_the_templates_end(folder):
    tokenizer = tokenizer_of(folder, CHATML)
    session = session_of(tokenizer)
    say(session, tokenizer, "and", end="")
    session.give([{"role": "user", "content": "go on"}], tokenizer, Data(""))
    text = tokenizer._tokenizer.decode(session.token_ids, skip_special_tokens=False)
    assert text == "and<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_writes_no_end_leaves_the_sampled_one(folder):
    tokenizer = tokenizer_of(folder, BARE)
    session = session_of(tokenizer)
    say(session, tokenizer, "46")
    session.give([{"role": "user", "content": "1+2="}], tokenizer, Data(""))
    assert tokenizer._tokenizer.decode(session.token_ids, skip_special_tokens=False) == "46<|im_end|>1+2="


@pytest.mark.parametrize(
    ("template", "words"),
    [(HIDES, "does not write an assistant's message as it is"), (REFUSES, "cannot be applied .*no tools")],
)
def test_a_template_that_cannot_go_on_is_refused(folder, template, words):
    tokenizer = tokenizer_of(folder, BARE)
    session = session_of(tokenizer)
    say(session, tokenizer, "46")
    with pytest.raises(Refused, match=words):
        session.give([{"role": "tool", "content": "x"}], tokenizer_of(folder, template), Data(""))


def test_where_no_token_is_left_behind_what_is_given_nothing_is(folder):
    tokenizer = tokenizer_of(folder, BARE)
    session = session_of(tokenizer, limit=8)
    say(session, tokenizer, "46")
    assert not session.give([{"role": "user", "content": "34567"}], tokenizer, Data(""))
    assert (len(session.token_ids), session.given, session.truncated) == (3, [], True)
    assert session.give([{"role": "user", "content": "3456"}], tokenizer, Data("")) and session.room == 1


def test_the_past_cannot_be_rewritten_and_what_is_behind_it_is_new(folder):
    tokenizer = tokenizer_of(folder, BARE)
    session = session_of(tokenizer)
    say(session, tokenizer, "46")
    past = [*session.prompt.messages, *session.messages]
    new = {"role": "user", "content": "more"}
    assert session.new_messages([*past, new]) == [new] and session.new_messages(past) == []
    for other, words in (
        ([{"role": "system", "content": "be brief"}, *past], "message 0 is not what was recorded"),
        ([past[0], {"role": "assistant", "content": "47"}, new], "message 1 is not what was recorded"),
        (past[:1], "has 1 messages, and 2 were recorded"),
    ):
        with pytest.raises(Refused, match=words):
            session.new_messages(other)


def test_a_session_may_begin_with_a_prompt_of_its_own(folder):
    tokenizer = tokenizer_of(folder, CHATML)
    session = session_of(tokenizer, limit=100)
    group = session.prompt
    assert session.go_on([dict(m) for m in group.messages], tokenizer, Data("")) and session.prompt is group
    own = [{"role": "system", "content": "be brief"}, *group.messages]
    assert session.go_on(own, tokenizer, Data(""))
    assert session.prompt.token_ids == tokenizer.encode_chat(tuple(own), Data(""), "p")
    assert session.room == 100 - (len(session.prompt.token_ids) - len(group.token_ids))
    say(session, tokenizer, "2")
    assert session.go_on([*own, *session.messages, {"role": "user", "content": "sure?"}], tokenizer, Data(""))
    for data, limit, words in (
        (Data("", max_prompt_tokens=20), 100, "and data.max_prompt_tokens is 20"),
        (Data(""), 10, "no token is left for an answer"),
    ):
        with pytest.raises(Refused, match=words):
            session_of(tokenizer, limit=limit).go_on(own, tokenizer, data)
    for other in ([], own[:1], [*own, {"role": "assistant", "content": "2"}]):
        with pytest.raises(Refused, match="does not begin with a user's message"):
            session_of(tokenizer).go_on(other, tokenizer, Data(""))


def test_tools_are_told_by_the_template(folder):
    tokenizer = tokenizer_of(folder, CHATML)
    tokenizer.tools = [{"type": "function", "function": {"name": "add"}}]
    ids = tokenizer.encode_chat(({"role": "user", "content": "1+1?"},), Data(""), "p")
    assert '"name": "add"' in tokenizer._tokenizer.decode(ids)
