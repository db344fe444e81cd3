"""mean@k and pass@k of held-out prompts, with error bars."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


from grpo_mcore import checkpoint, config, convert, hf_weights, model, prompts, reward
from grpo_mcore.engine import LOADED
from grpo_mcore.engines import Engines
from grpo_mcore.parallel import topology
from grpo_mcore.rollout import grade, sample
from grpo_mcore.types import Prompt


@dataclass(frozen=True)
class Result:
    """Scores of P problems with k samples each."""

    k: int
    num_problems: int
    mean_at_k: float  # mean over problems of the share of right samples
    pass_at_k: float  # share of problems with a right sample
    standard_error: float  # of mean_at_k, over problems
    truncated_frac: float

    @classmethod
    def of(cls, rewards_PG: Sequence[Sequence[float]], truncated_frac: float) -> "Result":
        """
        >>> Result.of([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], 0.0).mean_at_k
        0.5
        """
        means = [sum(row) / len(row) for row in rewards_PG]
        P = len(means)
        mean = sum(means) / P
        variance = sum((m - mean) ** 2 for m in means) / (P - 1) if P > 1 else 0.0
        return cls(len(rewards_PG[0]), P, mean, sum(any(row) for row in rewards_PG) / P, math.sqrt(variance / P), truncated_frac)

    def metrics(self) -> dict[str, float]:
        return {f"eval/mean@{self.k}": self.mean_at_k, f"eval/pass@{self.k}": self.pass_at_k,
                "eval/standard_error": self.standard_error, "eval/truncated_frac": self.truncated_frac}

    def __str__(self) -> str:
        return (f"mean@{self.k} {self.mean_at_k:.3f} ± {self.standard_error:.3f}, pass@{self.k} {self.pass_at_k:.3f} "
                f"({self.num_problems} problems, {self.truncated_frac:.1%} truncated)")


def evaluate(engines: Engines, eval_prompts: Sequence[Prompt], tokenizer: prompts.Tokenizer, grader: reward.Grader, cfg: config.Config, *, version: int) -> Result:
    """k samples of every prompt with the weights the engines hold. The same samples for the same weights and seed."""
    groups = sample(
        engines, eval_prompts, group_size=cfg.eval.samples_per_prompt, temperature=cfg.eval.temperature, top_p=cfg.eval.top_p,
        max_tokens=lambda prompt_tokens: cfg.response_tokens(prompt_tokens, evaluation=True), seed=cfg.seed, version=version, timeout_s=cfg.rollout.timeout_s)
    rewards_PG, _ = grade(groups, tokenizer, grader)
    truncated = [r.truncated for g in groups for r in g.responses]
    return Result.of(rewards_PG, sum(truncated) / len(truncated))


def evaluate_model(cfg: config.Config, source: str | None) -> dict:
    """Evaluates a Hugging Face folder or a checkpoint (None: the run's newest, else cfg.model) with engines alone.

    Returns the metrics with the model and the protocol beside them. Raises InputError.
    """
    if cfg.eval.data is None:
        raise config.InputError("eval.data", None, "names nothing to evaluate on", "set eval.data=FILE")
    source = source or str(next(iter(checkpoint.published(cfg.run_dir)), cfg.model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = source
        if (Path(source) / checkpoint.HF).is_dir():
            folder = f"{scratch}/hf"
            convert.to_hf(source, folder)
        folder = hf_weights.local_folder(folder)
        model.load_hf_config(folder)
        tokenizer = prompts.Tokenizer(folder)
        eval_prompts = prompts.load(cfg.eval.data, cfg.data, tokenizer, "eval.data")[0][: cfg.eval.max_prompts]
        cuda = topology.pick_device(cfg.device).type == "cuda"
        engines = Engines(cfg, folder, cuda=cuda, stop_token_ids=tokenizer.stop_token_ids, load_weights=True)
        try:
            engines.wait_until_ready()
            with reward.Grader(**dataclasses.asdict(cfg.reward)) as grader:
                result = evaluate(engines, eval_prompts, tokenizer, grader, cfg, version=LOADED)
        finally:
            engines.stop()
    print(f"{source}: {result}", flush=True)
    return {"model": source, **result.metrics(), "num_problems": result.num_problems, "protocol": dataclasses.asdict(cfg.eval)}
