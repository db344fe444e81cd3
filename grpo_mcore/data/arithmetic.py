"""A world small enough for a laptop: sums and products, a character tokenizer, a Qwen2 of half a million parameters,
and worked demonstrations. Everything is a function of the task's name and a seed; nothing is downloaded.

    problem        47+85
    demonstration  <think>7+5=12,4+8=12,12+1=13</think>\\boxed{132}
"""

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from grpo_mcore.config.config import InputError

SPECIALS = ("<pad>", "<eos>", "<think>", "</think>", "\\boxed{")
# No space: Qwen2's tokenizer class drops it.
CHARACTERS = "0123456789+-*=,.}?:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ()/<>!'\"&%"


def _two_digit_sums() -> list[tuple[int, str, int]]:
    return [(a, "+", b) for a in range(10, 100) for b in range(10, 100)]


def _one_digit() -> list[tuple[int, str, int]]:
    return [(a, "+", b) for a in range(1, 11) for b in range(1, 11)] + [
        (a, "*", b) for a in range(1, 10) for b in range(1, 10)
    ]


# problems, their format, held-out share
TASKS = {"two_digit_sums": (_two_digit_sums, "{}{}{}", 0.1), "one_digit": (_one_digit, "{} {} {}", 0.25)}


def rows(source: str) -> list[tuple[str, str]]:
    """(problem, answer) of `TASK/train` or `TASK/heldout`, in a fixed shuffled order. Raises InputError.

    The splits are disjoint, and a problem with its operands exchanged is in the same one.
    """
    task, _, split = source.partition("/")
    if task not in TASKS or split not in ("train", "heldout"):
        raise InputError(
            "data",
            f"arithmetic:{source}",
            f"must be arithmetic:TASK/train or /heldout with TASK one of {', '.join(TASKS)}",
            "name one of these",
        )
    make, form, held_out_frac = TASKS[task]
    problems = make()
    rng = random.Random(0)
    rng.shuffle(problems)
    pairs = sorted({(min(a, b), op, max(a, b)) for a, op, b in problems})
    held_out = set(rng.sample(pairs, int(len(pairs) * held_out_frac)))
    return [
        (form.format(a, op, b), str(a + b if op == "+" else a * b))
        for a, op, b in problems
        if ((min(a, b), op, max(a, b)) in held_out) == (split == "heldout")
    ]


def demonstration(problem: str, *, corrupt: random.Random | None = None) -> str:
    """The worked answer to a problem of two_digit_sums; with `corrupt`, one digit of the final answer is another."""
    a, b = problem.split("+")
    ones, tens = int(a[1]) + int(b[1]), int(a[0]) + int(b[0])
    carry = ones // 10
    answer = list(str(int(a) + int(b)))
    if corrupt is not None:
        at = corrupt.randrange(len(answer))
        answer[at] = corrupt.choice([d for d in "0123456789" if d != answer[at]])
    steps = f"{a[1]}+{b[1]}={ones},{a[0]}+{b[0]}={tens},{tens}+{carry}={tens + carry}"
    return f"<think>{steps}</think>\\boxed{{{''.join(answer)}}}<eos>"


def make_model(folder: str | Path, seed: int) -> None:
    """Writes a Hugging Face folder: a randomly initialised Qwen2 (float32, tied) and its tokenizer."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.add_tokens(["<think>", "</think>", "\\boxed{"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=vocabulary["<eos>"],
            pad_token_id=vocabulary["<pad>"],
        )
    )
    model.save_pretrained(folder)
