"""What flows through a step. No behaviour.

Shapes: P prompts, G responses of a group, N = P*G responses, S sequences of a microbatch, T packed tokens of it,
R response tokens of it (the positions that carry a loss; with context parallelism T and R are of this rank), V
vocabulary shard, D hidden.

A worked example, P = 1 and G = 2:

    prompt    "7+5="           token_ids (7, +, 5, =)
    responses "12" EOS, "13"   token_ids (1, 2, EOS) and (1, 3); the second hit the length limit
    Microbatch of both, T = 4+3 + 4+2 = 13:
        token_ids_T  7 + 5 = 1 2 EOS 7 + 5 = 1 3        cu_seqlens 0 7 13
        branch_T     0 0 0 0 1 1 1 0 0 0 0 1 1
        target_R     1 2 EOS 1 3                        R = 5
        position_R   3 4 5 10 11                        the token BEFORE each target: its hidden state predicts it
        sequence_R   0 0 0 1 1

    and with a shared prompt, T = 4+3+2 = 9, one block in which no response sees the other:
        token_ids_T  7 + 5 = 1 2 EOS 1 3                cu_seqlens 0 9
        branch_T     0 0 0 0 1 1 1 2 2                  position_ids_T 0 1 2 3 4 5 6 4 5
        position_R   3 4 5 3 7

    and the first of them on cp = 2 context ranks: each block is padded to a multiple of 2 * cp = 4 and cut into 4
    chunks, of which rank 0 holds the outer and rank 1 the inner two (parallel/context.py); T = 8+8, _ is padding:
        whole        7 + 5 = 1 2 EOS _ 7 + 5 = 1 3 _ _  cu_seqlens 0 8 16 and max_seqlen 8 on both ranks
        rank 0       7 + EOS _ 7 + _ _                  index_R -           position_R -          R = 0
        rank 1       5 = 1 2 5 = 1 3                    index_R 0 1 2 3 4   position_R 1 2 3 5 6

    and of two turns, where a tool answered "9": the response "5+4" EOS "9" "9" EOS, of which the first 9 is given
        token_ids    5 + 4 EOS 9 9 EOS                  given ((4, 5),), with 6 rollout_logprobs
        token_ids_T  7 + 5 = 5 + 4 EOS 9 9 EOS          cu_seqlens 0 11
        target_R     5 + 4 EOS 9 EOS                    R = 6: the given token is attended to, and has no loss
        position_R   3 4 5 6 8 9                        the second 9 is predicted by the given one
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    id: int  # position in its source: stable over epochs and resumes
    problem: str  # of a chat its last turn's text
    answer: str
    token_ids: tuple[int, ...]
    masked: bool = False  # over-long and cut: takes its place in a batch, where nothing is learnt from its responses
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # all columns, for rewards
    # the turns of the chat that the template made tokens of; none without a chat template
    messages: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)
    gold: Any = field(default=None, compare=False, repr=False)  # the answer's column, where it is no text; None: it is
    source: str = ""  # the name of the source whose id it is; of one source alone ""


@dataclass(frozen=True)
class Outcome:
    """What an environment says of a session at its end."""

    reward: float | None  # None: it says nothing, or could not
    status: str  # a reward Status
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else it says: numbers and short texts
    num_turns: int = 1  # sampled ones


@dataclass(frozen=True)
class Response:
    """What one engine sampled for one prompt."""

    token_ids: tuple[int, ...]  # all behind the prompt: EOS included, and of several turns what was given between them
    rollout_logprobs: tuple[float, ...]  # one a sampled token, natural log, at the sampling temperature
    truncated: bool  # hit the length limit before EOS
    # (policy_version, tokens sampled with it), in order; none: not sampled by the policy
    versions: tuple[tuple[int, int], ...] = ()
    # [start, end) of the tokens that were not sampled but given, by a tool, the environment or the chat template:
    # ascending, apart from each other, none of them empty
    given: tuple[tuple[int, int], ...] = ()
    outcome: Outcome | None = None  # of a session; None: there is no environment
    prompt: Prompt | None = None  # its own, where its environment began with another than the group's


@dataclass(frozen=True)
class Group:
    """The G responses to one prompt, in sample order."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass
class Microbatch:
    """Packed sequences: what one forward pass of one rank sees. See the module's docstring for an example.

    Padding stands at the end of a block, goes on with its last response and is no response token.
    """

    token_ids_T: torch.Tensor  # int64
    position_ids_T: torch.Tensor  # int64, of the token within its sequence
    branch_T: torch.Tensor  # int64, 0 in prompts, k in the k-th response of a block
    # Of all context ranks together, padding included:
    cu_seqlens: torch.Tensor  # int32, bounds of the blocks: a prompt and the one or more responses that share it
    max_seqlen: int  # longest sequence, a prompt and one response
    num_sequences: int  # S
    # This rank's again:
    position_R: torch.Tensor  # int64, index into T of the hidden state that predicts target_R
    target_R: torch.Tensor  # int64
    sequence_R: torch.Tensor  # int64, which of the S sequences
    advantage_R: torch.Tensor  # float32
    weight_R: torch.Tensor  # float32, loss_mask over the global denominator: loss = sum(weight_R * per-token loss)
    rollout_logprobs_R: torch.Tensor  # float32, recorded by the engine
    index_R: torch.Tensor  # int64, which of the response tokens of all context ranks together; ascending
    old_logprobs_R: torch.Tensor | None = None  # float32, the trainer's, before the step's first update
    ref_logprobs_R: torch.Tensor | None = None  # float32, the frozen reference's
    # float32, what corrects the surrogate for what sampled (loss.importance); None: 1
    importance_R: torch.Tensor | None = None


@dataclass
class GlobalBatch:
    """This rank's share of one optimizer step."""

    microbatches: list[Microbatch] = field(default_factory=list)
    num_loss_tokens: int = 0  # over all data ranks
    num_tokens: int = 0  # of all sequences over all data ranks, prompts included
    # tokens without padding, shared prompts once, over all that the microbatches of all ranks could hold
    packed_frac: float = 0.0
    imbalance: float = 0.0  # cost of the dearest data rank over the ranks' mean, minus 1: 0 if none waits for another
