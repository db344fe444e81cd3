"""What trl_peer.py hands to TRL: prompts, rewards, arguments, and the metrics it writes; TRL itself is not needed.

Not covered here: TRL (test_end_to_end.py, where it is installed).
"""

import dataclasses

import pytest
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from benchmarks import end_to_end, trl_recipe
from benchmarks.end_to_end import Step
from grpo_mcore.config import config, file as config_file
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.report import run_folder
from grpo_mcore.reward.grader import Grader


@pytest.fixture
def cfg(recipe, tmp_path) -> config.Config:
    return config_file.load(recipe, [f"run_dir={tmp_path / 'run'}"])


@pytest.fixture
def tokenizer(untaught) -> prompts.Tokenizer:
    return prompts.Tokenizer(str(untaught))


def test_the_prompts_are_a_runs_in_its_order(cfg, tokenizer):
    loaded, _ = prompts.load(cfg.data.train, cfg.data, tokenizer, "data.train")
    drawn = trl_recipe.drawn(cfg, tokenizer)
    assert drawn == [prompts.Stream(loaded, cfg.seed).at(i) for i in range(8)]  # 2 steps of 4
    data = dataclasses.replace(cfg.data, shuffle_seed=cfg.seed + 1, skip_prompts=3)
    other = trl_recipe.drawn(dataclasses.replace(cfg, data=data), tokenizer)
    assert other == [prompts.Stream(loaded, cfg.seed + 1, skip=3).at(i) for i in range(8)] != drawn


def test_a_row_has_the_text_of_the_prompts_tokens(cfg, tokenizer, untaught):
    hf = AutoTokenizer.from_pretrained(untaught)
    for p in trl_recipe.drawn(cfg, tokenizer):
        row = trl_recipe.row(p, cfg.data)
        assert tuple(hf(row["prompt"]).input_ids) == p.token_ids and row["num_prompt_tokens"] == len(p.token_ids)
        assert row["answer"] == p.answer
    chat = trl_recipe.row(p, dataclasses.replace(cfg.data, chat_template=True))
    assert chat["prompt"] == [{"role": "user", "content": f"{p.problem}="}]


def test_arguments_have_the_recipes_batch(cfg):
    # Prompts of 6 and responses of 40 tokens: 2 fit into 128 tokens, 8 a batch in 4 microbatches, 16 a step in 8.
    batch = dataclasses.replace(cfg.batch, max_tokens_per_microbatch=128)
    a = trl_recipe.arguments(dataclasses.replace(cfg, batch=batch), longest_prompt=6)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "max_steps")
    assert [a[name] for name in names] == [2, 4, 8, 4]
    assert (a["num_generations"], a["max_completion_length"], a["temperature"]) == (4, 40, cfg.rollout.temperature)
    assert (a["loss_type"], a["scale_rewards"], a["epsilon"]) == ("dapo", "group", 0.2)
    # 5 would fit, but 8 is no multiple of it.
    batch = dataclasses.replace(cfg.batch, max_tokens_per_microbatch=46 * 5)
    assert trl_recipe.arguments(dataclasses.replace(cfg, batch=batch), 6)["per_device_train_batch_size"] == 4


def test_transformers_knows_all_arguments_that_are_not_grpos(cfg):
    of_grpo = {
        *("num_generations", "max_completion_length", "temperature", "top_k", "top_p", "steps_per_generation"),
        *("shuffle_dataset", "model_init_kwargs", "beta", "epsilon", "epsilon_high", "loss_type", "scale_rewards"),
    }
    arguments = trl_recipe.arguments(cfg, longest_prompt=6)
    seen = TrainingArguments(**{name: value for name, value in arguments.items() if name not in of_grpo})
    assert of_grpo <= arguments.keys() and seen.learning_rate == cfg.optimizer.lr and seen.max_steps == 4


def test_rewards_are_the_graders_and_a_row_is_written_for_each_step(cfg, tokenizer):
    """Two steps of two optimizer steps, told to it as transformers' trainer does."""
    drawn, args, control = trl_recipe.drawn(cfg, tokenizer), TrainingArguments(output_dir=cfg.run_dir), TrainerControl()
    state = TrainerState()
    eos = tokenizer.stop_token_ids[0]
    num_tokens, response_tokens = [], []
    with Grader(cfg.reward) as grader:
        recorder = trl_recipe.Recorder(cfg, tokenizer, grader)
        recorder.on_train_begin(args, state, control)
        for step in (1, 2):
            rows = [trl_recipe.row(p, cfg.data) for p in drawn[4 * step - 4 : 4 * step]]
            right = [[*tokenizer.encode_plain(arithmetic.demonstration(p.problem)), eos] for p in drawn[4 * step - 4 :]]
            # The second answers the third's question, the fourth is cut before its box.
            ids = [right[0], right[2], right[2], right[3][:5]]
            columns = {key: [r[key] for r in rows] for key in ("answer", "num_prompt_tokens")}
            response_tokens.append(sum(map(len, ids)))
            num_tokens.append(sum(columns["num_prompt_tokens"]) + response_tokens[-1])
            state.num_input_tokens_seen = sum(num_tokens)
            rewards = recorder.grade(completion_ids=ids, trainer_state=state, prompts=[], log_metric=print, **columns)
            assert rewards == [1.0, 1.0 if drawn[4 * step - 3].answer == drawn[4 * step - 2].answer else 0.0, 1.0, 0.0]
            for _ in range(cfg.optimizer_steps_per_step):
                state.global_step += 1
                recorder.on_step_end(args, state, control)
        with pytest.raises(RuntimeError, match="TRL has seen"):  # one token more than the recipe's
            state.num_input_tokens_seen += num_tokens[1] + 1
            recorder.grade(completion_ids=ids, trainer_state=state, **columns)
    written = run_folder.read_metrics(cfg.run_dir)
    assert [r["step"] for r in written] == [1, 2] and written[0]["reward/mean"] in (0.5, 0.75)
    steps = [Step(r, clock_s, cpu_s) for r, clock_s, cpu_s in zip(written, (1.0, 3.0), (2.0, 6.0), strict=True)]
    f = end_to_end.figures(*steps, responses_per_step=4)
    assert f["response_tokens"] == response_tokens[1] and f["packed_tokens"] == pytest.approx(num_tokens[1])
    assert (f["step_s"], f["cpu_s"], f["response_tokens_per_s"]) == (2.0, 4.0, response_tokens[1] / 2)
