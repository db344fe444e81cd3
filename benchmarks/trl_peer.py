"""TRL's GRPOTrainer on a recipe of this project: what end_to_end.py measures ours against.

    OMP_NUM_THREADS=2 python benchmarks/trl_peer.py --cfg configs/quickstart.yaml run_dir=DIR num_steps=4

trl_recipe.py says what both share. Generation is transformers', the only one of TRL's that needs neither a GPU nor
patches. Writes DIR/metrics.jsonl.
"""

from grpo_mcore import entry  # noqa: I001  first: it says how threads wait before torch starts them

import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import trl_recipe
from grpo_mcore.data.prompts import Tokenizer
from grpo_mcore.policy import model_folder
from grpo_mcore.reward.grader import Grader


def main() -> None:
    cfg = entry.parse(__doc__).config
    folder = model_folder.local_folder(cfg.model)
    tokenizer = Tokenizer(folder)
    prompts = trl_recipe.drawn(cfg, tokenizer)
    with Grader(cfg.reward) as grader:
        recorder = trl_recipe.Recorder(cfg, tokenizer, grader)
        GRPOTrainer(
            model=folder,
            reward_funcs=recorder.grade,
            args=GRPOConfig(**trl_recipe.arguments(cfg, max(len(p.token_ids) for p in prompts))),
            train_dataset=Dataset.from_list([trl_recipe.row(p, cfg.data) for p in prompts]),
            callbacks=[recorder],
        ).train()


if __name__ == "__main__":
    entry.run(main)
