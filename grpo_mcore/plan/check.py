"""What a run looks at before its engines start, as a table with all that is wrong, not only the first: launch/train.py
--check. No engine is started, and nothing is written but a model that has to be fetched or unpacked.
"""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_mcore import run
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import recipe, rules
from grpo_mcore.config.config import Config, InputError
from grpo_mcore.data import prompts
from grpo_mcore.environment.environments import tools_of
from grpo_mcore.parallel import topology
from grpo_mcore.plan import memory
from grpo_mcore.policy import warm_start
from grpo_mcore.report import claim
from grpo_mcore.rollout import placement
from grpo_mcore.rollout.rollout import try_functions


@dataclass(frozen=True)
class Look:
    name: str
    at: Callable[[], str]  # what there is, in a line; raises InputError
    after: str = ""  # names of those without which there is nothing to look at


class Checks:
    """In the order of their table; each leaves to the next ones what they need."""

    def __init__(self, cfg: Config, ranks: int):
        self.cfg, self.ranks = cfg, ranks
        self.looks = (
            Look("configuration", self._configuration),
            Look("run_dir", self._run_dir),
            Look("device", self._device),
            Look("model", self._model),
            Look("checkpoints", self._checkpoints, "model"),
            Look("tokenizer", self._tokenizer, "model"),
            Look("rows", self._rows),
            Look("environment", self._environment, "tokenizer"),
            Look("data.train", self._train, "tokenizer rows environment"),
            Look("eval.data", self._evaluation, "tokenizer rows environment"),
            Look("answers", self._answers, "rows"),
            Look("reward", self._reward, "data.train"),
            Look("as before", self._as_before, "run_dir data.train"),
        )

    def _configuration(self) -> str:
        rules.check_ranks(self.cfg, self.ranks)
        rules.check_metrics(self.cfg)
        return recipe.summary(self.cfg)

    def _run_dir(self) -> str:
        claim.look(self.cfg.run_dir)
        placement.check_sockets()
        step = checkpoint.newest_step(self.cfg.run_dir)
        return f"{self.cfg.run_dir}: {f'step {step} of {self.cfg.num_steps} is done' if step else 'a new run'}"

    def _device(self) -> str:
        device = topology.pick_device(self.cfg.device)
        rules.check_device(self.cfg, device.type)
        return device.type

    def _model(self) -> str:
        if self.cfg.warm_start is not None and not warm_start.is_made(self.cfg):
            raise NothingYet(f"{self.cfg.model} is made by the warm start as the run begins")
        self.folder, self.hf_config = run.read_model(self.cfg)
        millions = memory.num_parameters(self.hf_config) / 1e6
        return f"{self.hf_config.model_type}, {millions:,.{0 if millions > 10 else 3}f} million parameters"

    def _checkpoints(self) -> str:
        return checkpoint.check_room(self.cfg, self.hf_config)

    def _tokenizer(self) -> str:
        self.tokenizer = prompts.Tokenizer(self.folder)
        return f"stops at tokens {', '.join(map(str, self.tokenizer.stop_token_ids))}"

    def _rows(self) -> str:
        rows = run.read_rows(self.cfg)
        self.answers = {name: [row.answer for row in each] for name, each in rows.items()}
        return ", ".join(f"{len(each)} of {name}" for name, each in rows.items())

    def _environment(self) -> str:
        self.tokenizer.tools = tools_of(self.cfg)
        if self.cfg.environment is None:
            return "none"
        tools = ", ".join(tool["function"]["name"] for tool in self.tokenizer.tools)
        return f"{self.cfg.environment.path}: {f'tools {tools}' if tools else 'an agent'}"

    def _train(self) -> str:
        self.train_prompts, num_overlong = run.read_train_prompts(self.cfg, self.tokenizer)
        self.answers |= prompts.answers_by_source(self.cfg, "data.train", self.train_prompts)
        return f"{len(self.train_prompts)} prompts, {num_overlong} over-long"

    def _evaluation(self) -> str:
        if self.cfg.eval.data is None:
            return "none"
        eval_prompts, num_left_out = prompts.load_evaluation(self.cfg, self.tokenizer)
        self.answers |= prompts.answers_by_source(self.cfg, "eval.data", eval_prompts)
        return f"{len(eval_prompts)} prompts, {num_left_out} over-long left out"

    def _answers(self) -> str:
        """Of the prompts, or of all rows where a tokenizer does not yet tell which are prompts."""
        warnings = [run.check_answers(self.cfg, name, answers) for name, answers in self.answers.items()]
        return "; ".join(filter(None, warnings)) or (
            f"each can be right, by {', '.join(self.cfg.reward.verifiers)}"
            if self.cfg.reward.verifiers
            else "(not asked for)"
        )

    def _reward(self) -> str:
        return try_functions(self.cfg.reward, self.train_prompts)

    def _as_before(self) -> str:
        step = checkpoint.newest_step(self.cfg.run_dir)
        return (
            "; ".join(claim.changes(self.cfg, step, run.contents(self.cfg, self.folder, self.train_prompts)))
            or "the same"
        )


class NothingYet(Exception):
    """What is looked at comes into being with the run. Carries the words for it."""


def main(cfg: Config, ranks: int) -> None:
    """Prints the table. Raises InputError if anything is wrong."""
    looks = Checks(cfg, ranks).looks
    width, seen, wrong = max(len(look.name) for look in looks), set(), []
    for look in looks:
        missing = [name for name in look.after.split(" ") if name and name not in seen]
        try:
            if missing:
                raise NothingYet(f"not without {' and '.join(missing)}")
            words = look.at()
            seen.add(look.name)
        except NothingYet as e:
            words = f"({e})"
        except InputError as e:
            words = f"WRONG: {e}"
            wrong.append(look.name)
        print(f"{look.name:{width}}  {words}", flush=True)
    if wrong:
        raise InputError("--check", ", ".join(wrong), "would end the run before it begins", "see the table above")
