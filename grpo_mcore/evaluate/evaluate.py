"""Evaluations of held-out prompts: mean@k, pass@j and maj@k with error bars (scores.py), their protocol,
comparisons."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mcore.checkpoint import checkpoint, convert
from grpo_mcore.config import config, data_sources
from grpo_mcore.data import prompts
from grpo_mcore.environment.environments import tools_of
from grpo_mcore.evaluate import scores
from grpo_mcore.parallel import topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.report.provenance import versions
from grpo_mcore.reward import golds
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Verdict
from grpo_mcore.reward.rewards import Rewards
from grpo_mcore.reward.verifiers import VERIFIERS
from grpo_mcore.rollout.engine import LOADED
from grpo_mcore.rollout.engines import Engines
from grpo_mcore.rollout.rollout import grade, sample, try_functions
from grpo_mcore.rollout.turns import Turns, open_turns
from grpo_mcore.types import Prompt


def result_of(graded: Sequence[Graded], cfg: config.Config, num_left_out: int = 0) -> scores.Result:
    """By what decides: eval.reward."""
    return scores.Result(
        tuple(
            scores.Problem(
                g.group.prompt.id,
                g.group.prompt.answer,
                tuple(_score(v, cfg) for v in g.verdicts),
                tuple(_answer(v, cfg) for v in g.verdicts),
                tuple(len(r.token_ids) for r in g.group.responses),
                tuple(r.truncated for r in g.group.responses),
                g.group.prompt.source,
            )
            for g in graded
        ),
        num_left_out,
        is_verified=cfg.eval_verifier is not None,
    )


def _score(v: Verdict, cfg: config.Config) -> float:
    f = cfg.eval_function
    return v.reward if f is None else next(p.value or 0.0 for p in v.parts if p.name == f.label)


def _answer(v: Verdict, cfg: config.Config) -> str | None:
    """What the response states, in the deciding verifier's spelling."""
    if cfg.eval_verifier is None:
        return None
    f = cfg.eval_function
    answer = v.answer if f is None else next(p.extra["answer"] for p in v.parts if p.name == f.label)
    return answer and VERIFIERS[cfg.eval_verifier].normalise(answer)


def evaluate(
    engines: Engines,
    eval_prompts: Sequence[Prompt],
    tokenizer: prompts.Tokenizer,
    rewards: Rewards,
    cfg: config.Config,
    *,
    version: int,
    num_left_out: int,
    turns: Turns | None = None,
) -> scores.Result:
    """k samples of every prompt, or the greedy response (eval.temperature = 0), with the weights the engines hold. The
    same samples for the same weights and seed. `num_left_out`: problems that are none of the prompts, being over-long.
    """
    groups = sample(
        engines,
        eval_prompts,
        group_size=cfg.eval.samples_per_prompt,
        temperature=cfg.eval.temperature,
        top_p=cfg.eval.top_p,
        max_tokens=lambda prompt_tokens: cfg.response_tokens(prompt_tokens, evaluation=True),
        seed=cfg.seed,
        version=version,
        timeout_s=cfg.rollout.timeout_s,
        turns=turns,
    )
    return result_of(grade(groups, range(len(groups)), tokenizer, rewards), cfg, num_left_out)


def protocol(
    cfg: config.Config, eval_prompts: Sequence[Prompt], num_left_out: int, tokenizer: prompts.Tokenizer
) -> dict:
    """All that the numbers depend on beside the model: two evaluations can be compared if theirs are equal."""
    content = json.dumps([(*([p.source] if p.source else []), p.id, p.problem, p.answer) for p in eval_prompts])
    sets = cfg.eval.data if isinstance(cfg.eval.data, tuple) else ()
    return {
        **{k: v for k, v in dataclasses.asdict(cfg.eval).items() if k != "every"},
        **({"data": [dataclasses.asdict(source) for source in sets]} if sets else {}),
        "max_response_tokens": cfg.response_tokens(0, evaluation=True),
        "max_total_tokens": None if cfg.eval.max_response_tokens else cfg.rollout.max_total_tokens,
        "seed": cfg.seed,
        "engine_dtype": cfg.engine.dtype,
        "num_problems": len(eval_prompts),
        "problems_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "over_long_left_out": num_left_out,
        "max_prompt_tokens": cfg.data.max_prompt_tokens,
        "prompt_template": cfg.data.prompt_template,
        "chat_template": cfg.data.chat_template,
        "template_arguments": dict(cfg.data.template_arguments) or None,
        "system_prompt": cfg.data.system_prompt,
        "first_prompt": tokenizer.decode(eval_prompts[0].token_ids),
        "grader": json.loads(json.dumps(dataclasses.asdict(cfg.reward))),  # lists, as it is read back
        **({"environment": dataclasses.asdict(cfg.environment)} if cfg.environment else {}),
        "versions": versions(),
    }


def read_problems(path: str) -> tuple[list[scores.Problem], dict]:
    """(problems, protocol) of what evaluate_model returned earlier, in a JSON file. Raises InputError."""
    try:
        earlier = json.loads(Path(path).read_text())
        rows: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in earlier["problems"]
        ]
        return [scores.Problem(**row) for row in rows], earlier["protocol"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise config.InputError(
            "--compare", path, f"is not what launch/evaluate.py --out wrote ({type(e).__name__})", "name such a file"
        ) from e


def check_paired(eval_prompts: Sequence[Prompt], problems: Sequence[scores.Problem]) -> None:
    """Raises InputError if an earlier evaluation's problems are others than those to be evaluated now."""
    if {(p.source, p.id, p.answer) for p in eval_prompts} != {p.key for p in problems}:
        raise config.InputError(
            "--compare",
            f"{len(problems)} problems",
            f"are not the {len(eval_prompts)} that are evaluated now",
            "evaluate both on the same eval.data and eval.max_prompts",
        )


def compare(result: scores.Result, card: dict, problems: Sequence[scores.Problem], other: dict) -> dict:
    """The paired comparison with an earlier evaluation, and in which of its terms the protocols (`card`, `other`)
    differ."""
    paired = scores.compare(result.problems, problems)
    return {
        **dataclasses.asdict(paired),
        "protocols_differ_in": sorted(k for k in card.keys() | other.keys() if card.get(k) != other.get(k)),
        "text": str(paired),
    }


def evaluate_model(cfg: config.Config, source: str | None, *, compare_with: str | None = None) -> dict:
    """Evaluates a Hugging Face folder or a checkpoint (None: the run's newest, else cfg.model) with engines alone, and
    compares it with an earlier evaluation's JSON file.

    Returns model, metrics, estimates with error bars, protocol, comparison and the table of problems. Raises
    InputError.
    """
    earlier = read_problems(compare_with) if compare_with else None
    if cfg.eval.data is None:
        raise config.InputError("eval.data", None, "names nothing to evaluate on", "set eval.data=FILE")
    source = source or str(next(iter(checkpoint.published(cfg.run_dir)), cfg.model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = source
        if (Path(source) / checkpoint.HF).is_dir():
            folder = f"{scratch}/hf"
            convert.to_hf(source, folder)
        folder = local_folder(folder)
        hf_weights.check(folder, model.load_hf_config(folder))
        tokenizer = prompts.Tokenizer(folder)
        tokenizer.tools = tools_of(cfg)
        eval_prompts, num_left_out = prompts.load_evaluation(cfg, tokenizer)
        answers = prompts.answers_by_source(cfg, "eval.data", eval_prompts)
        for s in data_sources.of(cfg, "eval.data"):
            if warning := golds.check(answers[s.field], cfg.reward, s.field, s.path):
                print(warning, flush=True)
        try_functions(cfg.reward, eval_prompts)
        card = protocol(cfg, eval_prompts, num_left_out, tokenizer)
        if earlier:
            check_paired(eval_prompts, earlier[0])
        cuda = topology.pick_device(cfg.device).type == "cuda"
        engines = Engines(cfg, folder, cuda=cuda, stop_token_ids=tokenizer.stop_token_ids, alone=True)
        try:
            engines.wait_until_ready()
            with Rewards(cfg.reward) as rewards, contextlib.ExitStack() as stack:
                turns = open_turns(cfg, engines, tokenizer, stack)
                result = evaluate(
                    engines,
                    eval_prompts,
                    tokenizer,
                    rewards,
                    cfg,
                    version=LOADED,
                    num_left_out=num_left_out,
                    turns=turns,
                )
        finally:
            engines.stop()
    print(f"{source}: {result}", flush=True)
    out = {
        "model": source,
        **result.metrics(),
        "num_problems": len(result.problems),
        "estimates": {name: dataclasses.asdict(e) for name, e in result.estimates.items()},
        "protocol": card,
    }
    if earlier:
        compared = compare(result, card, *earlier)
        out["comparison"] = {"with": compare_with, **compared}
        differ = ", ".join(compared["protocols_differ_in"]) or "nothing"
        print(f"minus {compare_with}: {compared['text']}; protocols differ in: {differ}", flush=True)
    return {**out, "problems": [dataclasses.asdict(p) for p in result.problems]}
