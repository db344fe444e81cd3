"""TRL's GRPOTrainer on a recipe of this project: what end_to_end.py measures ours against.

    OMP_NUM_THREADS=2 python benchmarks/trl_peer.py --cfg configs/quickstart.yaml run_dir=DIR num_steps=4

The same model, prompts (token by token and in order), batch, sampling, loss, learning rate (without warm-up) and
grading. Generation is transformers', the only one of TRL's that needs neither a GPU nor patches. Where there is a
choice TRL has its fast one: weights and Adam in precision.params (ours keeps float32 main weights beside bfloat16), no
gradient checkpointing, no logging, and no pass for old log-probs where a step is one optimizer step. Attention is its
default. Writes DIR/metrics.jsonl with the names of grpo_mcore.report.metrics; what is neither generation nor reward is
`update`.
"""

import json
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_mcore import entry  # first: it says how threads wait before torch starts them
from grpo_mcore.config import config
from grpo_mcore.data import prompts
from grpo_mcore.policy import hf_weights
from grpo_mcore.reward.grader import Grader


class Recorder(TrainerCallback):
    """TRL's reward function and its callback in one: they see each moment at which a phase ends."""

    def __init__(self, cfg: config.Config, tokenizer: prompts.Tokenizer, grader: Grader):
        self._cfg, self._tokenizer, self._grader = cfg, tokenizer, grader
        self._file = (Path(cfg.run_dir) / "metrics.jsonl").open("w", buffering=1)
        self._row, self._num_tokens, self._num_tokens_before = {}, 0, 0

    def on_train_begin(self, args, state, control, **_):
        self._began = time.perf_counter()

    def grade(self, *, completion_ids, answer, num_prompt_tokens, trainer_state, **_) -> list[float]:
        rollout_ended = time.perf_counter()
        verdicts = self._grader.grade(
            [
                (self._tokenizer.decode(ids), gold, ids[-1] not in self._tokenizer.stop_token_ids)
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
        self._file.write(
            json.dumps({"step": step, **self._row, "time/update_s": now - self._reward_ended, "tokens_per_s": rate})
            + "\n"
        )
        self._num_tokens_before, self._began = self._num_tokens, now


def arguments(cfg: config.Config, longest_prompt: int) -> GRPOConfig:
    """The recipe in TRL's words; microbatches as large as the recipe's bound allows for the longest responses."""
    o, r, batch = cfg.optimizer, cfg.rollout, cfg.batch.global_batch_size
    fitting = cfg.batch.max_tokens_per_microbatch // (longest_prompt + r.max_response_tokens)
    loss_type = {"token_mean": "dapo", "sequence_mean": "grpo", "constant": "dr_grpo"}[cfg.loss.aggregation]
    microbatch = max(n for n in range(1, max(fitting, 1) + 1) if batch % n == 0)
    return GRPOConfig(
        output_dir=cfg.run_dir,
        seed=cfg.seed,
        use_cpu=True,
        max_steps=cfg.num_steps * cfg.optimizer_steps_per_step,
        num_generations=r.group_size,
        max_completion_length=r.max_response_tokens,
        temperature=r.temperature,
        top_k=0,
        top_p=1.0,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=batch // microbatch,
        steps_per_generation=cfg.responses_per_step // microbatch,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": cfg.precision.params},
        bf16=False,
        gradient_checkpointing=False,
        beta=cfg.loss.kl_coef,
        epsilon=cfg.loss.clip_low,
        epsilon_high=cfg.loss.clip_high,
        loss_type=loss_type,
        scale_rewards="group" if cfg.advantage.normalize_by_std else "none",
        learning_rate=o.lr,
        lr_scheduler_type=o.lr_schedule,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_epsilon=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.clip_grad,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    cfg = entry.parse(__doc__).config
    folder = hf_weights.local_folder(cfg.model)
    tokenizer = prompts.Tokenizer(folder)
    stream = prompts.Stream(prompts.load(cfg.data.train, cfg.data, tokenizer, "data.train")[0], cfg.seed)
    drawn = stream.next(cfg.num_steps * cfg.rollout.prompts_per_step)

    def row(p: prompts.Prompt) -> dict:
        text = cfg.data.prompt_template.replace("{problem}", p.problem)
        prompt = [{"role": "user", "content": text}] if cfg.data.chat_template else text
        return {"prompt": prompt, "answer": p.answer, "num_prompt_tokens": len(p.token_ids)}

    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    with Grader(cfg.reward) as grader:
        recorder = Recorder(cfg, tokenizer, grader)
        GRPOTrainer(
            model=folder,
            reward_funcs=recorder.grade,
            args=arguments(cfg, max(len(p.token_ids) for p in drawn)),
            train_dataset=Dataset.from_list([row(p) for p in drawn]),
            callbacks=[recorder],
        ).train()


if __name__ == "__main__":
    entry.run(main)
