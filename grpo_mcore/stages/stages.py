"""Stages: what is trained after what, from one file. Each stage trains, chooses a checkpoint, exports it to Hugging
Face, proves the export (parity.py) and evaluates it; the next one begins from that export. lineage.py keeps what was
done; actions.py does it.

What a stage takes over from the one before, beside the weights:
    reference policy   the stage's own initial weights, anew (where loss.kl_coef asks for one)
    optimizer          fresh, or with `optimizer: carried` the moments and main weights of the chosen checkpoint
    steps, warm-up     from 0, anew
    prompts            the order goes on after those that led to the chosen checkpoint
    tokenizer          the model's, which every export carries along
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo_mcore.config import data_sources, file as config_file, recipe, rules
from grpo_mcore.config.bounds import PathText
from grpo_mcore.config.config import Config, InputError, Stop
from grpo_mcore.policy import model
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.run import check_lengths

# What the order of prompts depends on, besides the seed; and where over-long prompts are left out.
ORDER = ("data.train", "data.format", "data.problem_key", "data.answer_key", "data.overlong_prompts")
FILTER = (
    "data.max_prompt_tokens",
    "data.prompt_template",
    "data.chat_template",
    "data.system_prompt",
    "data.template_arguments",
)


@dataclass(frozen=True)
class Stage:
    """The stop rule is the configuration's: num_steps and `stop`."""

    name: str  # of its files in `dir`
    cfg: PathText  # its configuration, a path from the stages file's folder
    overrides: tuple[str, ...] = ()  # key.sub=value over it
    # the checkpoint to go on with: the last, or that with the highest checkpoint.best_metric
    choose: Literal["last", "best"] = "last"
    optimizer: Literal["fresh", "carried"] = "fresh"
    # go on in the order of the stage before; own: from the configuration's data.skip_prompts
    prompts: Literal["continue", "own"] = "continue"
    evaluate: tuple[str, ...] = ()  # key.sub=value, of the evaluation of the export alone


@dataclass(frozen=True)
class StagesFile:
    dir: PathText  # of lineage.json, the exports NAME_hf and the evaluations NAME_eval.json
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Plan:
    """A stages file whose configurations are loaded and checked."""

    path: Path
    file: StagesFile
    configs: tuple[Config, ...] = ()  # as they will be, if each stage before does all of its steps
    ranks: int = 1

    @property
    def dir(self) -> Path:
        return Path(self.file.dir)

    def export_of(self, number: int) -> Path:
        return self.dir / f"{self.file.stages[number].name}_hf"

    def config_path(self, number: int) -> Path:
        return self.path.parent / self.file.stages[number].cfg

    def config(self, number: int, carry_over: Sequence[str] = (), *, evaluation: bool = False) -> Config:
        """Of a stage, with what it takes over."""
        return config_file.load(self.config_path(number), self.overrides(number, carry_over, evaluation=evaluation))

    def overrides(self, number: int, carry_over: Sequence[str] = (), *, evaluation: bool = False) -> list[str]:
        stage = self.file.stages[number]
        return [*stage.overrides, *carry_over, *(stage.evaluate if evaluation else ())]


def carry_over(plan: Plan, number: int, *, checkpoint: str, prompts_taken: int) -> list[str]:
    """The overrides by which a stage begins from the one before: `checkpoint` is the chosen one, `prompts_taken` of the
    order led to it."""
    if number == 0:
        return []
    stage = plan.file.stages[number]
    return [
        f"model={plan.export_of(number - 1)}",
        "warm_start=null",
        *([f"data.skip_prompts={prompts_taken}"] if stage.prompts == "continue" else []),
        *([f"checkpoint.start_from={checkpoint}"] if stage.optimizer == "carried" else []),
    ]


def load(path: str | Path, ranks: int | None) -> Plan:
    """Reads the file and all configurations, and checks them for `ranks` ranks; None: as few as all stages can have.
    Raises InputError."""
    file = config_file.read(StagesFile, path)
    if not file.stages:
        raise InputError("stages", [], "names no stage", "see configs/quickstart_stages.yaml")
    configs: list[Config] = []
    plan = Plan(Path(path), file)
    for number, stage in enumerate(file.stages):
        _check_stage(file, number)
        with naming(stage):
            taken = (
                configs[-1].data.skip_prompts + configs[-1].num_steps * configs[-1].rollout.prompts_per_step
                if configs
                else 0
            )
            config = plan.config(number, carry_over(plan, number, checkpoint="the stage before's", prompts_taken=taken))
            plan.config(number, evaluation=True)
            _check_config(stage, config)
            if configs:
                _check_pair(stage, configs, config)
        configs.append(config)
    ranks = ranks or math.lcm(*(c.parallel.ranks_per_replica for c in configs))
    for stage, config in zip(file.stages, configs, strict=True):
        with naming(stage):
            rules.check_ranks(config, ranks)
    return Plan(plan.path, file, tuple(configs), ranks)


@contextlib.contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Has an InputError say in which stage."""
    try:
        yield
    except InputError as e:
        e.args = (f"stage {stage.name}: {e}",)
        raise


def _check_stage(file: StagesFile, number: int) -> None:
    stage = file.stages[number]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stage.name):
        raise InputError(
            f"stages[{number}].name", stage.name, "is part of file names: letters, digits, ., _ and -", "choose another"
        )
    if stage.name in [s.name for s in file.stages[:number]]:
        raise InputError(f"stages[{number}].name", stage.name, "is another stage's too", "choose another")
    if number == 0 and stage.optimizer == "carried":
        raise InputError(
            "stages[0].optimizer",
            stage.optimizer,
            "has no stage before it to be carried from",
            "set it to fresh (checkpoint.start_from begins from another run)",
        )


def _check_config(stage: Stage, config: Config) -> None:
    if not config.checkpoint.every:
        raise InputError("checkpoint.every", 0, "keeps no checkpoint, and a stage's is exported", "raise it")
    rules.check_metrics(config)
    if stage.choose == "best" and not config.checkpoint.keep_best:
        raise InputError(
            "checkpoint.keep_best",
            0,
            "may remove the best checkpoint, which `choose: best` takes",
            "raise it, or choose the last",
        )


def _check_pair(stage: Stage, before: Sequence[Config], config: Config) -> None:
    for other in before:
        if Path(other.run_dir).absolute() == Path(config.run_dir).absolute():
            raise InputError("run_dir", config.run_dir, "is another stage's too", "give each stage one of its own")
    if stage.prompts == "own":
        return
    keys = (*ORDER, *(FILTER if config.data.overlong_prompts == "filter" else ()))
    was, now = (_order(c, keys) for c in (before[-1], config))
    for dotted in now:
        if was[dotted] != now[dotted]:
            raise InputError(
                dotted,
                now[dotted],
                f"makes another order of prompts than the stage before's {was[dotted]!r}, so that prompts would come "
                "again",
                "give both the same, or set prompts: own",
            )


def _order(config: Config, keys: Sequence[str]) -> dict[str, object]:
    seed = config.seed if config.data.shuffle_seed is None else config.data.shuffle_seed
    return {"data.shuffle_seed": seed, **{dotted: recipe.key(dotted)(config) for dotted in keys}}


def check_model(plan: Plan) -> None:
    """Whether every stage fits the first one's model, whose shape all have. Raises InputError."""
    first = plan.configs[0]
    if first.warm_start is not None and not Path(first.model).is_dir():
        return  # it is yet to be made
    hf_config = model.load_hf_config(local_folder(first.model))
    for stage, config in zip(plan.file.stages, plan.configs, strict=True):
        with naming(stage):
            model.check_parallel(hf_config, config.parallel, config.precision)
            check_lengths(config, hf_config)


def describe(plan: Plan) -> str:
    """The plan of all stages, quantity by quantity, a column each."""
    columns = [_quantities(plan, number) for number in range(len(plan.configs))]
    rows = [(name, *(str(column[name]) for column in columns)) for name in columns[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return f"{table}\nlineage: {plan.dir / 'lineage.json'}"


def _quantities(plan: Plan, number: int) -> dict[str, object]:
    """Of a stage, by name."""
    stage, c, evaluated = plan.file.stages[number], plan.configs[number], plan.config(number, evaluation=True)
    p, e, samples = c.parallel, evaluated.eval, evaluated.eval.samples_per_prompt
    if_done = " if all steps before are done" if number and stage.prompts == "continue" else ""
    return {
        "": stage.name,
        "configuration": plan.config_path(number),
        "run_dir": c.run_dir,
        "model": c.model,
        "follows": c.recipe or "no recipe",
        "ends after": stop_rule(c),
        "a step": f"{c.rollout.prompts_per_step} prompts x {c.rollout.group_size} responses",
        "optimizer steps": recipe.optimizer_steps(c),
        "longest sequence": f"{c.longest_train_tokens} tokens",
        "longest response": f"{c.response_tokens(0)} tokens",
        "learning rate": f"{c.optimizer.lr:g} {c.optimizer.lr_schedule}, warm-up {recipe.warm_up(c)}",
        "optimizer": stage.optimizer,
        "reference policy": reference(c),
        "KL coefficient": f"{c.loss.kl_coef:g}",
        "ratio clip": f"{c.loss.clip_low:g} / {c.loss.clip_high:g}",
        "prompts skipped": f"{c.data.skip_prompts}{if_done}",
        "ranks by axis": f"tp {p.tp} x cp {p.cp} x pp {p.pp} x dp {plan.ranks // p.ranks_per_replica}; "
        f"{c.engine.num_engines} engines",
        "goes on with": "last" if stage.choose == "last" else f"best by {c.checkpoint.best_metric}",
        "export": plan.export_of(number),
        "evaluated on": data_sources.shown(e.data) or "nothing",
        "evaluation": f"{samples} x {evaluated.response_tokens(0, evaluation=True)} tokens "
        + (f"at T={e.temperature:g}, top_p={e.top_p:g}" if e.temperature else "greedy")
        if e.data
        else "none",
    }


def stop_rule(config: Config) -> str:
    rule, out = config.stop, [f"{config.num_steps} steps"]
    if rule.plateau_window:
        out.append(f"{rule.plateau_metric} gains at most {rule.plateau_min_gain:g} over {rule.plateau_window} values")
    if rule.truncated_above is not None:
        out.append(f"truncated_frac above {rule.truncated_above:g} in {rule.truncated_steps} steps")
    return " or ".join(out) + (f" (after {rule.after_steps})" if rule != Stop() and rule.after_steps else "")


def reference(config: Config) -> str:
    return "the stage's initial weights" if config.loss.kl_coef > 0 else "none (loss.kl_coef = 0)"
