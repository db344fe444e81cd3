"""The supervised pass that makes a model for the quickstart: a tiny Qwen2, taught arithmetic by flawed demonstrations.

Runs as a process of its own (`python -m grpo_mcore.policy.warm_start CONFIG`), always on one rank: the model it makes
does not depend on the layout of the run that asked for it. Uses the same Policy, packing and log-probs as GRPO.

It stops when the model's probability of the right demonstration, averaged over held-out problems, reaches
stop_at_pass_rate. That is a lower bound on the sampled pass rate, exact and without sampling.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic
from grpo_mcore.data.prompts import Tokenizer
from grpo_mcore.loss import batch
from grpo_mcore.loss.loss import supervised
from grpo_mcore.parallel import topology
from grpo_mcore.policy import hf_weights
from grpo_mcore.policy.policy import Policy
from grpo_mcore.types import GlobalBatch, Microbatch, Prompt, Response

RECORD = "warm_start.json"
CHECK_EVERY = 10  # optimizer steps


def is_made(cfg: config.Config) -> bool:
    """Whether cfg.model is there. Raises InputError if something else is."""
    folder = Path(cfg.model)
    wanted = {"seed": cfg.seed, **dataclasses.asdict(_asked(cfg))}
    if not folder.is_dir():
        return False
    record = folder / RECORD
    if not record.is_file() or json.loads(record.read_text()) != wanted:
        constraint = "exists, but was not made by this warm_start and seed"
        raise InputError("model", cfg.model, constraint, "remove the folder, or name another")
    return True


def ensure(cfg: config.Config) -> None:
    """Makes cfg.model if it is not there. Raises InputError, RuntimeError."""
    if is_made(cfg):
        return
    # One rank on a CPU, whatever torchrun's environment says of this process, and whatever torch could see.
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TORCHELASTIC", "MASTER_")) and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as resolved:
        resolved.write(config_file.to_yaml(cfg))
        resolved.flush()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "grpo_mcore.policy.warm_start", resolved.name],
            env=env,
            timeout=cfg.collective_timeout_s,
        )
    if done.returncode:
        raise RuntimeError(f"the warm start ended with {done.returncode}; its own words stand above")


def _asked(cfg: config.Config) -> config.WarmStart:
    if cfg.warm_start is None:
        raise InputError("warm_start", None, "asks for no model to be made", "set warm_start.task, or give a model")
    return cfg.warm_start


def make(cfg: config.Config) -> None:
    folder, warm_start = Path(cfg.model), _asked(cfg)
    made = folder.with_name(folder.name + ".initial")
    shutil.rmtree(made, ignore_errors=True)
    arithmetic.make_model(made, cfg.seed)
    topo = topology.connect(
        config.Parallel(),
        device=torch.device("cpu"),
        timeout_s=cfg.collective_timeout_s,
        seed=cfg.seed,
        num_threads=cfg.num_threads,
    )
    policy = Policy(
        str(made),
        topo,
        precision=config.Precision(params="float32"),
        temperature=1.0,
        optimizer=config.Optimizer(lr=warm_start.lr),
        pointwise=True,
    )
    teach(policy, cfg)
    (made / RECORD).write_text(json.dumps({"seed": cfg.seed, **dataclasses.asdict(warm_start)}))
    hf_weights.save_folder(
        folder, policy.export(), made, shapes=hf_weights.shapes(policy.hf_config), dtype=torch.float32
    )
    shutil.rmtree(made)
    topology.disconnect()


def teach(policy: Policy, cfg: config.Config) -> None:
    """Optimizer steps on demonstrations until the pass rate is reached, or max_steps."""
    w, tokenizer, rng = _asked(cfg), Tokenizer(policy.folder), random.Random(cfg.seed)
    train, held_out = (arithmetic.rows(f"{w.task}/{split}") for split in ("train", "heldout"))

    def sample(problem: str, corrupt: bool) -> batch.Sample:
        text = arithmetic.demonstration(problem, corrupt=rng if corrupt else None)
        token_ids = tokenizer.encode_plain(text)
        response = Response(token_ids, (0.0,) * len(token_ids), truncated=False)
        return batch.Sample(Prompt(0, problem, "", tokenizer.encode(problem, cfg.data)), response, 0.0)

    def packed(samples: list[batch.Sample]) -> Microbatch:
        weight = 1.0 / sum(len(s.response.token_ids) for s in samples)
        return batch.microbatch(samples, [weight] * len(samples))

    test = packed([sample(problem, corrupt=False) for problem, _ in held_out[:256]])
    for step in range(1, w.max_steps + 1):
        samples = [sample(rng.choice(train)[0], rng.random() < w.corrupted_frac) for _ in range(w.batch_size)]
        policy.update(GlobalBatch([packed(samples)]), supervised, lr=w.lr)
        if step % CHECK_EVERY == 0:
            logprobs_R = policy.logprobs_everywhere(test, temperature=1.0)
            total = torch.zeros(test.num_sequences).index_add_(0, test.sequence_R, logprobs_R)
            pass_rate = total.exp().mean().item()
            print(f"warm start: optimizer step {step}, pass rate {pass_rate:.3f}", flush=True)
            if pass_rate >= w.stop_at_pass_rate:
                return


if __name__ == "__main__":
    make(config_file.load(sys.argv[1]))
