"""What is learnt: sections of the configuration about data, rewards, environments and evaluation (config.py)."""

import typing
from dataclasses import dataclass, field
from typing import Literal

from grpo_mcore.config.bounds import (
    Fraction,
    LearningRate,
    MetricName,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Samples,
    Scalars,
    Seconds,
    TemperatureOrGreedy,
    Template,
    Threads,
    WithGroup,
)

DataFormat = Literal["columns", "verl", "gsm8k"]
AnswerFrom = Literal["column", "boxed", "last_number", "hash"]
Verifier = Literal["math_verify", "boxed", "dapo", "gsm8k"]
VERIFIERS: tuple[str, ...] = typing.get_args(Verifier)
ENVIRONMENT = "environment"  # among reward.functions: what the environment says


@dataclass(frozen=True)
class Source:
    """One of several sources of prompts. What is null here is as in `data`; of the columns' keys only where `format` is
    the same."""

    path: PathText  # as data.train says
    name: str | None = None  # of its metrics: letters, digits, ., _ and -; null: made of the path
    weight: PositiveFloat = 1.0  # its share of the prompts that are trained on is weight / the sum of all weights
    limit: PositiveInt | None = None  # the first so many rows; null: all
    subset: str | None = None  # configuration of a data set; null: its only one
    split: str | None = None  # of a data set; null: train, or what a short name stands for
    revision: str | None = None  # of a data set of the hub: a branch, a tag or a commit; null: its main branch
    format: DataFormat | None = None  # how its rows are laid out
    problem_key: str | None = None  # the column that holds the problem
    answer_key: str | None = None  # the column that holds the right answer
    answer_regex: WithGroup | None = None  # the answer is its first group; takes the place of data.answer_from too
    answer_from: AnswerFrom | None = None  # where in its column the answer is; takes the place of data.answer_regex too
    system_prompt: str | None = None  # the system's turn before the problem


@dataclass(frozen=True)
class Data:
    """Where prompts come from."""

    # a .jsonl or .parquet file, a hub data set, or arithmetic:TASK/SPLIT (made, see arithmetic.py); or several of them
    train: PathText | tuple[Source, ...]
    # columns: those that the keys below name; verl: that project's, prompt and reward_model.ground_truth; gsm8k: that
    # data set's, question and the answer behind ####
    format: DataFormat = "columns"
    # the column that holds the problem, a text or a list of chat messages; a dot leads into a column that is a mapping
    problem_key: str = "problem"
    # the column that holds the right answer, likewise; null: there is none, and reward.functions do without
    answer_key: str | None = "answer"
    # a regular expression whose first group is the answer, where the column holds more, as '#### (.+)'; null: all of it
    answer_regex: WithGroup | None = None
    # where in its column the answer is; column: all of it; boxed: in the last \boxed{}; last_number; hash: behind the
    # last ####; null: as answer_regex or the format says
    answer_from: AnswerFrom | None = None
    system_prompt: str | None = None  # the system's turn before the problem's; null: none
    template_arguments: Scalars = field(
        default_factory=dict, hash=False
    )  # of the chat template: enable_thinking: false
    prompt_template: Template = "{problem}"  # the prompt: `{problem}` is replaced, every other brace is literal
    chat_template: bool = True  # wrap the prompt as the user's turn in the tokenizer's chat template
    max_prompt_tokens: PositiveInt = 1024  # longer prompts are over-long
    # filter: over-long prompts are left out; mask: they keep their place, cut to max_prompt_tokens, without a loss
    overlong_prompts: Literal["filter", "mask"] = "filter"
    # a prompt whose group has this mean reward or more is left out from then on, as the checkpoints know; null: none is
    max_pass_rate: PositiveFraction | None = None
    shuffle_seed: int | None = None  # of the prompts' order; null: `seed`
    skip_prompts: NonNegativeInt = 0  # prompts at the start of their order, which former stages trained on


@dataclass(frozen=True)
class WarmStart:
    """The supervised pass that makes `model` where it does not exist: a tiny Qwen2 on arithmetic demonstrations. Null:
    no such pass."""

    task: Literal["two_digit_sums"]  # the arithmetic task that is demonstrated
    corrupted_frac: Fraction = 0.4  # demonstrations whose final answer is wrong: leaves GRPO something to learn
    batch_size: PositiveInt = 64  # demonstrations per optimizer step
    lr: LearningRate = 2e-3  # learning rate, constant
    stop_at_pass_rate: Fraction = 0.3  # mean probability of the right demonstration on held-out problems
    max_steps: PositiveInt = 450  # optimizer steps, if stop_at_pass_rate is not reached before


@dataclass(frozen=True)
class RewardFunction:
    """One of the functions that make the reward together (docs/tasks.md says how each style is called)."""

    # FILE.py:NAME, package.module:NAME, a verifier (math_verify, boxed, dapo, gsm8k), or environment: what it says
    path: PathText
    # how it is called; auto: as the names of its parameters say; group: with all responses of a prompt at once
    style: Literal["auto", "verl", "trl", "plain", "group"] = "auto"
    weight: float = 1.0  # what its value is multiplied by
    name: MetricName | None = (
        None  # in metrics: reward/NAME/mean and others; null: what stands behind the colon of path
    )
    cpu_s: Seconds | None = None  # CPU time of one call; null: reward.cpu_s
    wall_s: Seconds | None = None  # wall clock of one call; null: reward.wall_s

    @property
    def label(self) -> str:
        return self.name or self.path.rpartition(":")[2]

    @property
    def is_verifier(self) -> bool:
        return ":" not in self.path and self.path != ENVIRONMENT

    @property
    def is_function(self) -> bool:
        """Of the user's own."""
        return ":" in self.path


@dataclass(frozen=True)
class Reward:
    """The last \\boxed{} after the thinking against the answer, or functions of the user's own; in processes that can
    be killed."""

    functions: tuple[RewardFunction, ...] = ()  # given, they alone make the reward, and not the verifier below
    # sum: of weight times value; normalized_sum: each value is first normalised within its group, to mean 0 and
    # standard deviation 1 (GDPO)
    combine: Literal["sum", "normalized_sum"] = "sum"

    # math_verify: formulas as that library reads them, compared exactly (math_answer.py); boxed: the rules of the
    # original DeepScaleR run (boxed_answer.py); dapo: what follows the last "Answer:", as DAPO's run compared it
    # (dapo_answer.py); gsm8k: the number after the last ####
    verifier: Verifier = "math_verify"
    require_think: bool = False  # a response without </think> has no answer
    # ask boxed too (for boxed: math_verify): the metric reward/disagree counts what they judge differently, and
    # RUN/rollouts has both verdicts
    compare_verifiers: bool = False
    num_processes: Threads = 2  # grading processes of the run, and of each function
    cpu_s: Seconds = 2.0  # CPU time of one comparison
    wall_s: Seconds = 20.0  # wall clock of one comparison
    # address space of one grading process; of one of a function, memory beyond what it has taken when it is loaded
    memory_bytes: PositiveInt = 2 << 30

    @property
    def verifiers(self) -> tuple[Verifier, ...]:
        """Those that the reward is made of."""
        if not self.functions:
            return (self.verifier,)
        return tuple(dict.fromkeys(typing.cast(Verifier, f.path) for f in self.functions if f.is_verifier))


@dataclass(frozen=True)
class Environment:
    """What answers the model's turns: an environment's class, whose methods are tools, or an agent (docs/tasks.md).
    Null: a response is one turn."""

    path: PathText  # FILE.py:NAME or package.module:NAME
    max_turns: PositiveInt = 8  # sampled turns of a response, of an environment's class
    num_processes: Threads = 2  # processes that share the sessions
    wall_s: Seconds = 60.0  # wall clock between two turns
    memory_bytes: PositiveInt = 2 << 30  # of a process, beyond what it has taken when it is loaded


@dataclass(frozen=True)
class Shaping:
    """What is added to the rewards before the advantages. The metrics reward/* and evaluations are of the grader's
    rewards alone."""

    # the last tokens before rollout.max_response_tokens, over which a penalty grows linearly from 0; 0: no penalty
    overlong_buffer_tokens: NonNegativeInt = 0
    overlong_penalty: NonNegativeFloat = 1.0  # the penalty at rollout.max_response_tokens


@dataclass(frozen=True)
class Eval:
    """Evaluation on problems that are not trained on. The prompts' keys are those of `data`."""

    # problems, as data.train says, or aime24, math500; of several, each is scored by itself too; null: no evaluation
    data: PathText | tuple[Source, ...] | None = None
    every: PositiveInt = 10  # steps between two evaluations; also before the first and after the last
    samples_per_prompt: Samples = 8  # k of mean@k and pass@k
    max_prompts: PositiveInt | None = None  # the first so many problems of each source; null: all
    # of sampling; 0: greedy, the likeliest token each time, and then samples_per_prompt is 1
    temperature: TemperatureOrGreedy = 1.0
    top_p: PositiveFraction = 1.0  # sample from the likeliest tokens that have this share of the probability
    # longest response; null: as in training, rollout.max_total_tokens included
    max_response_tokens: PositiveInt | None = None
    # the name of the one of reward.functions whose value is the score; null: of a single one that one's, else the
    # whole reward
    reward: str | None = None
