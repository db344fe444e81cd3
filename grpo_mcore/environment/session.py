"""A conversation as token ids: what was sampled and what was given, nothing tokenised twice.

The next turn's prompt is the recorded ids, and the ids of the new messages with the chat template's own text between
the turns. That text is what the template writes behind an assistant's message (data/prompts.py, `between`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_mcore.config import config
from grpo_mcore.data.prompts import Tokenizer
from grpo_mcore.types import Prompt

Message = Mapping[str, Any]


class Refused(Exception):
    """Messages that do not go on from what was recorded, in words."""


@dataclass
class Session:
    """One response, as it grows."""

    prompt: Prompt
    limit_tokens: int  # of all behind the prompt
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # behind the prompt's
    num_turns: int = 0  # sampled ones
    truncated: bool = False

    @property
    def room(self) -> int:
        """Tokens that the next turn may have."""
        return self.limit_tokens - len(self.token_ids)

    def take(self, token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence, truncated: bool, text: str):
        """A turn that was sampled."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += versions
        self.truncated = truncated
        self.num_turns += 1
        self.messages.append({"role": "assistant", "content": text})

    def go_on(self, conversation: Sequence[Message], tokenizer: Tokenizer, data: config.Data) -> bool:
        """The conversation that the next turn answers. False if no token is left for one. Raises Refused."""
        if self.num_turns:
            return self.give(self.new_messages(conversation), tokenizer, data)
        if list(conversation) != list(self.prompt.messages):
            self._begin(conversation, tokenizer, data)
        return True

    def _begin(self, conversation: Sequence[Message], tokenizer: Tokenizer, data: config.Data) -> None:
        """With a prompt of its own. What it has more than the group's, the response has less."""
        if not conversation or conversation[-1].get("role") != "user":
            raise Refused("it does not begin with a user's message, to which the first turn is the answer")
        try:
            token_ids = tokenizer.encode_chat(tuple(conversation), data, "what a session begins with")
        except config.InputError as e:
            raise Refused(str(e)) from None
        if len(token_ids) > data.max_prompt_tokens:
            raise Refused(
                f"it begins with {len(token_ids)} tokens, and data.max_prompt_tokens is {data.max_prompt_tokens}"
            )
        more = len(token_ids) - len(self.prompt.token_ids)
        if more >= self.limit_tokens:
            raise Refused(f"it begins with {more} tokens more than its prompt has, and no token is left for an answer")
        self.limit_tokens -= max(more, 0)
        self.prompt = replace(self.prompt, token_ids=token_ids, messages=tuple(conversation))

    def give(self, messages: Sequence[Message], tokenizer: Tokenizer, data: config.Data) -> bool:
        """Messages that answer the last turn. False, and nothing is given, if no room is left behind them. Raises
        Refused."""
        try:
            between = tokenizer.between(self.prompt.messages, messages, self.token_ids[-1], data)
        except ValueError as e:
            raise Refused(str(e)) from None
        if len(between) >= self.room:
            self.truncated = True
            return False
        if between:
            self.given.append((len(self.token_ids), len(self.token_ids) + len(between)))
        self.token_ids += between
        self.messages += messages
        return True

    def new_messages(self, conversation: Sequence[Message]) -> list[Message]:
        """What a conversation has behind the recorded one. Raises Refused if it is another."""
        recorded = [*self.prompt.messages, *self.messages]
        for i, (mine, other) in enumerate(zip(recorded, conversation, strict=False)):
            if (mine["role"], mine["content"]) != (other.get("role"), other.get("content")):
                raise Refused(f"message {i} is not what was recorded: the past of a session cannot be rewritten")
        if len(conversation) < len(recorded):
            raise Refused(f"the conversation has {len(conversation)} messages, and {len(recorded)} were recorded")
        return list(conversation[len(recorded) :])
