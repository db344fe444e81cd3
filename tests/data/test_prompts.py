"""Problems as token ids, and the seeded stream of prompts.

Not covered here: where problems come from (test_sources.py).
"""

import json
import shutil
from pathlib import Path

import pytest

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.types import Prompt
from tests.data.test_sources import jsonl

PLAIN = config.Data(train="", chat_template=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    arithmetic.make_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> prompts.Tokenizer:
    return prompts.Tokenizer(str(folder))


def test_over_long_prompts_are_counted_and_left_out_and_ids_stay_those_of_the_file(tmp_path, tokenizer):
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "1"} for p in ("1+2", "11+22", "111+222", "3+4")))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)  # characters are tokens
    kept, too_long = prompts.load(source, data, tokenizer, "data.train")
    assert too_long == 1
    assert [(p.id, p.problem, p.answer) for p in kept] == [(0, "1+2", "1"), (1, "11+22", "1"), (3, "3+4", "1")]
    assert all(p.token_ids == tokenizer.encode_plain(p.problem) for p in kept)


def test_an_evaluation_knows_how_many_problems_it_leaves_out_up_to_its_last(tmp_path, tokenizer):
    texts = ("1+2", "111+222", "11+22", "3+4", "333+444")
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "1"} for p in texts))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)

    def taken(most: int | None) -> tuple[list[int], int]:
        evaluation = config.Eval(data=source, max_prompts=most)
        kept, left_out = prompts.load_evaluation(config.Config("", "", 1, data, eval=evaluation), tokenizer)
        return [p.id for p in kept], left_out

    assert [taken(most) for most in (1, 2, 3, None)] == [([0], 0), ([0, 2], 1), ([0, 2, 3], 2), ([0, 2, 3], 2)]


def test_over_long_prompts_may_keep_their_place_cut_and_masked(tmp_path, tokenizer):
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "1"} for p in ("1+2", "111+222", "3+4")))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)
    kept, too_long = prompts.load(source, data, tokenizer, "data.train", overlong="mask")
    assert too_long == 1
    assert [(p.id, tokenizer.decode(p.token_ids), p.masked) for p in kept] == [
        (0, "1+2", False),
        (1, "111+2", True),
        (2, "3+4", False),
    ]


@pytest.mark.parametrize("overlong", ["filter", "mask"])
def test_a_file_without_a_prompt_that_fits_is_refused(tmp_path, tokenizer, overlong):
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": "3"})
    data = config.Data(train="", chat_template=False, max_prompt_tokens=2)
    with pytest.raises(InputError, match="holds no prompt of at most 2 tokens. Remedy: raise data.max_prompt_tokens"):
        prompts.load(source, data, tokenizer, "data.train", overlong=overlong)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{problem}=", "1+2="),
        (r"\boxed{}{problem}", r"\boxed{}1+2"),  # str.format would take {} for a field
        (r"\boxed{{problem}}", r"\boxed{1+2}"),  # and {{ for a brace
        ("{problem}?{problem}", "1+2?1+2"),
    ],
)
def test_only_problem_is_replaced_in_a_template_and_other_braces_are_literal(tokenizer, template, text):
    data = config.Data(train="", chat_template=False, prompt_template=template)
    assert tokenizer.decode(tokenizer.encode("1+2", data)) == text


def test_a_chat_template_that_the_tokenizer_lacks_is_refused(tokenizer):
    with pytest.raises(
        InputError, match="data.chat_template = True: .*has no chat template. Remedy: set data.chat_template=false"
    ):
        tokenizer.encode("1+2", config.Data(train=""))


def test_a_chat_template_wraps_the_text_as_the_users_turn_and_opens_the_answer(tmp_path):
    arithmetic.make_model(tmp_path, seed=0)
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }},{% endfor %}{% if add_generation_prompt "
        "%}assistant:{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = prompts.Tokenizer(str(tmp_path))
    ids = tokenizer.encode("1+2", config.Data(train="", prompt_template="{problem}="))
    assert tokenizer.decode(ids) == "user:1+2=,assistant:"


def test_decode_keeps_the_thinking_tags_and_drops_what_ends_a_response(tokenizer):
    text = r"<think>1+2=3</think>\boxed{3}"
    assert tokenizer.decode(tokenizer.encode_plain(text + "<eos>")) == text


def test_decode_keeps_the_thinking_tags_also_where_the_tokenizer_calls_them_special(folder, tmp_path):
    from transformers import AutoTokenizer

    special = AutoTokenizer.from_pretrained(folder)
    special.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    special.save_pretrained(edited(folder, tmp_path, "config.json"))
    tokenizer = prompts.Tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode_plain("<think>1</think>2<eos>")) == "<think>1</think>2"


def test_every_end_token_that_the_folder_names_stops_a_response(folder, tmp_path):
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    before = prompts.Tokenizer(str(folder))
    (eos,) = before.stop_token_ids
    (z,) = before.encode_plain("z")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, z]}))
    tokenizer = prompts.Tokenizer(str(tmp_path))
    assert tokenizer.stop_token_ids == sorted([eos, z])
    assert tokenizer.decode(tokenizer.encode_plain("yz")) == "y"


def edited(folder: Path, to: Path, name: str, **keys: object) -> Path:
    """A copy, with other keys in one of its JSON files."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    path = to / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **keys}))
    return to


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "eos, words",
    [
        ("<eos>", "eos_token_id is '<eos>', and no token's id"),
        (["<eos>"], "and no token's id"),
        (True, "and no token's id"),
        (-1, "and no token's id"),
        (1000, r"ends texts by token 1000, and has \d+ \(vocab_size in config.json\)"),
    ],
)
def test_an_end_of_text_that_is_no_token_of_the_model_is_refused(folder, tmp_path, name, eos, words):
    with pytest.raises(InputError, match=words):
        prompts.Tokenizer(str(edited(folder, tmp_path, name, eos_token_id=eos)))


def test_a_model_that_names_no_end_of_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"1": 0, "+": 1}, []))).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 2}')
    with pytest.raises(InputError, match="names no token that ends a text: .*Remedy: write eos_token"):
        prompts.Tokenizer(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert prompts.Tokenizer(str(tmp_path)).stop_token_ids == [1]


def test_a_prompt_that_cannot_be_made_tokens_is_named(tokenizer):
    data = config.Data(train="", chat_template=False, prompt_template="\ud800{problem}")
    with pytest.raises(
        InputError, match=r"prompt 7 = '\\ud8001\+2': cannot be made tokens .* mend data.prompt_template"
    ):
        tokenizer.encode("1+2", data, "prompt 7")


@pytest.mark.parametrize("contents", ["", "{", "{}", '{"model": 3}'])
def test_a_tokenizer_that_is_broken_is_said(folder, tmp_path, contents):
    (edited(folder, tmp_path, "config.json") / "tokenizer.json").write_text(contents)
    with pytest.raises(InputError, match="has a tokenizer that cannot be read"):
        prompts.Tokenizer(str(tmp_path))


@pytest.mark.parametrize("contents", ["", "{", "[]", "\xff"])
def test_a_generation_config_that_is_broken_is_named(folder, tmp_path, contents):
    (edited(folder, tmp_path, "config.json") / "generation_config.json").write_text(contents, "latin1")
    with pytest.raises(InputError, match="generation_config.json'?: is n"):
        prompts.Tokenizer(str(tmp_path))


def test_a_prompt_with_a_token_that_the_model_lacks_is_named(folder, tmp_path):
    (z,) = prompts.Tokenizer(str(folder)).encode_plain("z")
    (tmp_path / "model").mkdir()
    small = prompts.Tokenizer(str(edited(folder, tmp_path / "model", "config.json", vocab_size=z)))
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": "3"}, {"problem": "z", "answer": "3"})
    with pytest.raises(InputError, match=f"d.jsonl, prompt 1 = 'z': has token {z}, and the model has {z}"):
        prompts.load(source, PLAIN, small, "data.train")


def with_affixes(folder: Path, to: Path, single: str) -> prompts.Tokenizer:
    """The tokenizer that puts what `single` says around each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    ids = [(t, made.convert_tokens_to_ids(t)) for t in ("<eos>", "z")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    made.bos_token = "z"
    made.save_pretrained(edited(folder, to, "config.json"))
    return prompts.Tokenizer(str(to))


def test_a_tokenizer_that_ends_every_prompt_is_refused_by_the_first_of_them(folder, tmp_path):
    with pytest.raises(InputError, match=r"a prompt = '1\+2': ends with token \d+, which ends a text.*add_eos_token"):
        with_affixes(folder, tmp_path, "$A <eos>").encode("1+2", PLAIN)


def test_a_beginning_of_text_that_template_and_tokenizer_both_put_there_is_refused(folder, tmp_path):
    tokenizer = with_affixes(folder, tmp_path, "z $A")
    assert tokenizer.decode(tokenizer.encode("1+2", PLAIN)) == "z1+2"
    with pytest.raises(InputError, match="begins with two tokens .*take it out of data.prompt_template"):
        tokenizer.encode("1+2", config.Data(train="", chat_template=False, prompt_template="z{problem}"))


def test_a_prompt_without_a_token_is_named(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # A vocabulary without a word for what it lacks: that is left out.
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"1": 0, "+": 1, ".": 2}, []))).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "eos_token_id": 2}')
    tokenizer = prompts.Tokenizer(str(tmp_path))
    assert tokenizer.encode("1+1", PLAIN) == (0, 1, 0)
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+1", "answer": "3"}, {"problem": "\u4e8c", "answer": "3"})
    with pytest.raises(InputError, match="prompt 1 = '\u4e8c': has no token"):
        prompts.load(source, PLAIN, tokenizer, "data.train")


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('no user here') }}", "TemplateError: no user here"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[3]['content'] }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10 ** 15 }}", "MemoryError"),
        ("{{ '\\ud800' }}", "TypeError"),
    ],
)
def test_a_chat_template_that_raises_is_said_with_the_prompt(folder, tmp_path, template, words):
    (edited(folder, tmp_path, "config.json") / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=rf"data.chat_template = True: .* applied to prompt 7 \({words}"):
        prompts.Tokenizer(str(tmp_path)).encode("1+2", config.Data(train=""), "prompt 7")


def test_a_chat_template_that_leaves_the_problem_out_is_refused(folder, tmp_path):
    (edited(folder, tmp_path, "config.json") / "chat_template.jinja").write_text("answer this:")
    source = jsonl(tmp_path / "d.jsonl", *({"problem": f"{n}+{n}", "answer": "1"} for n in range(3)))
    with pytest.raises(InputError, match="data.chat_template = True: makes the same tokens of every problem"):
        prompts.load(source, config.Data(train=""), prompts.Tokenizer(str(tmp_path)), "data.train")


PROMPTS = [Prompt(i, "", "", (i,)) for i in range(7)]


def order(seed: int, start: int, end: int) -> list[int]:
    """Ids of the prompts at these positions, by a stream that was asked for no others."""
    stream = prompts.Stream(PROMPTS, seed)
    return [stream.at(position).id for position in range(start, end)]


def test_each_epoch_is_another_permutation_of_all_prompts():
    epochs = [tuple(order(3, 7 * i, 7 * i + 7)) for i in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1 and epochs[0] != tuple(range(7))


def test_the_order_is_a_function_of_the_seed():
    assert order(3, 0, 21) == order(3, 0, 21)
    assert len({tuple(order(seed, 0, 21)) for seed in range(5)}) == 5


def test_what_stands_at_a_position_does_not_depend_on_what_was_asked_before():
    whole = order(3, 0, 30)
    # 7 prompts: over an epoch's end wherever a start is not on it
    assert all(order(3, start, start + 7) == whole[start : start + 7] for start in range(23))
    stream = prompts.Stream(PROMPTS, 3)
    assert [stream.at(p).id for p in reversed(range(30))] == whole[::-1]


def test_a_later_stage_begins_where_the_former_stopped_and_repeats_no_prompt_before_all_were_seen():
    whole = order(3, 0, 30)
    stages = [(skip, prompts.Stream(PROMPTS, 3, skip=skip)) for skip in (0, 4, 6)]
    assert [stream.at(p).id for (skip, stream), n in zip(stages, (4, 2, 24), strict=True) for p in range(n)] == whole
    assert len(set(whole[:7])) == 7
