"""A recipe of this project in TRL's words: data, reward function, arguments. Needs no TRL; trl_peer.py hands it over.

The same model, prompts (token by token and in order), batch, sampling, loss, learning rate (without warm-up) and
grading. Where there is a choice TRL has its fast one: weights and Adam in precision.params (ours keeps float32 main
weights beside bfloat16), no gradient checkpointing, no logging, and no pass for old log-probs where a step is one
optimizer step. Attention is its default.
"""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from grpo_mcore.config import config, data_sources
from grpo_mcore.data import prompts
from grpo_mcore.reward.grader import Grader
from grpo_mcore.types import Prompt


def drawn(cfg: config.Config, tokenizer: prompts.Tokenizer) -> list[Prompt]:
    """The prompts of all steps, in the order in which a run takes them. Raises InputError."""
    loaded, _ = prompts.load(cfg.data.train, cfg.data, tokenizer, "data.train")
    seed = cfg.seed if cfg.data.shuffle_seed is None else cfg.data.shuffle_seed
    weights = data_sources.weights(cfg.data.train)
    stream = prompts.Stream(loaded, seed, skip=cfg.data.skip_prompts, weights=weights)
    return [stream.at(position) for position in range(cfg.num_steps * cfg.rollout.prompts_per_step)]


def row(p: Prompt, data: config.Data) -> dict:
    """Of TRL's data set; its columns come back to `Recorder.grade`."""
    text = data.prompt_template.replace("{problem}", p.problem)
    prompt = [{"role": "user", "content": text}] if data.chat_template else text
    return {"prompt": prompt, "answer": p.answer, "num_prompt_tokens": len(p.token_ids)}


class Recorder(TrainerCallback):
    """TRL's reward function and its callback in one: they see each moment at which a phase ends.

    Writes run_dir/metrics.jsonl with the names of grpo_mcore.report.metrics; what is neither generation nor reward is
    `update`.
    """

    def __init__(self, cfg: config.Config, tokenizer: prompts.Tokenizer, grader: Grader):
        self._cfg, self._tokenizer, self._grader = cfg, tokenizer, grader
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        self._file = (Path(cfg.run_dir) / "metrics.jsonl").open("w", buffering=1)
        self._row, self._num_tokens, self._num_tokens_before = {}, 0, 0

    def on_train_begin(self, args, state, control, **_):
        self._began = time.perf_counter()

    def grade(self, *, completion_ids, answer, num_prompt_tokens, trainer_state, **_) -> list[float]:
        rollout_ended = time.perf_counter()
        stops = self._tokenizer.stop_token_ids
        verdicts = self._grader.grade(
            [
                (self._tokenizer.decode(ids), gold, ids[-1] not in stops)
                for ids, gold in zip(completion_ids, answer, strict=True)
            ]
        )
        num_response_tokens = sum(map(len, completion_ids))
        self._num_tokens += sum(num_prompt_tokens) + num_response_tokens
        if self._num_tokens != trainer_state.num_input_tokens_seen:
            raise RuntimeError(
                f"TRL has seen {trainer_state.num_input_tokens_seen} tokens; the recipe's prompts and the "
                f"responses are {self._num_tokens}"
            )
        self._reward_ended = time.perf_counter()
        self._row = {
            "reward/mean": sum(v.reward for v in verdicts) / len(verdicts),
            "rollout/response_tokens_mean": num_response_tokens / len(completion_ids),
            "time/rollout_s": rollout_ended - self._began,
            "time/reward_s": self._reward_ended - rollout_ended,
        }
        return [v.reward for v in verdicts]

    def on_step_end(self, args, state, control, **_):
        step, more = divmod(state.global_step, self._cfg.optimizer_steps_per_step)
        if more:
            return
        now = time.perf_counter()
        rate = (self._num_tokens - self._num_tokens_before) / (now - self._began)
        end = {"time/update_s": now - self._reward_ended, "tokens_per_s": rate}
        self._file.write(json.dumps({"step": step, **self._row, **end}) + "\n")
        self._num_tokens_before, self._began = self._num_tokens, now


def arguments(cfg: config.Config, longest_prompt: int) -> dict:
    """Of GRPOConfig; microbatches as large as the recipe's bound allows for the longest responses."""
    o, r, batch = cfg.optimizer, cfg.rollout, cfg.batch.global_batch_size
    fitting = cfg.batch.max_tokens_per_microbatch // (longest_prompt + r.max_response_tokens)
    microbatch = max(n for n in range(1, max(fitting, 1) + 1) if batch % n == 0)
    return {
        "output_dir": cfg.run_dir,
        "seed": cfg.seed,
        "use_cpu": True,
        "max_steps": cfg.num_steps * cfg.optimizer_steps_per_step,
        "num_generations": r.group_size,
        "max_completion_length": r.max_response_tokens,
        "temperature": r.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": batch // microbatch,
        "steps_per_generation": cfg.responses_per_step // microbatch,
        "shuffle_dataset": False,
        "model_init_kwargs": {"dtype": cfg.precision.params},
        "bf16": False,
        "gradient_checkpointing": False,
        "beta": cfg.loss.kl_coef,
        "epsilon": cfg.loss.clip_low,
        "epsilon_high": cfg.loss.clip_high,
        "loss_type": {"token_mean": "dapo", "sequence_mean": "grpo", "constant": "dr_grpo"}[cfg.loss.aggregation],
        "scale_rewards": "group" if cfg.advantage.normalize_by_std else "none",
        "learning_rate": o.lr,
        "lr_scheduler_type": o.lr_schedule,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_epsilon": o.eps,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.clip_grad,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
