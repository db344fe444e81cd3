"""Predicts: launch/plan.py simulate --cfg FILE [--like RUN] [--profile JSON] [--gpu NAME] [options ...] [key.sub=value ...].

Step time, utilisation and staleness in virtual time: the configuration's rollout.* and engine.* (num_engines, tp,
max_running_responses), with what a run (--like: lengths, trainers) and benchmarks/rollout.py (--profile: engines) measured, and
estimates for --gpu where nothing is given. With --like the same is printed beside what was measured.

A cluster of 1,024 GPUs:

    python launch/plan.py simulate --cfg configs/quickstart.yaml --gpu H100 --trainer-gpus 128 --staleness 0,1,2 --failures-per-day 8 \\
        model=configs/benchmarks/1.5b engine.num_engines=896 engine.max_running_responses=256 rollout.prompts_per_step=2048 \\
        rollout.group_size=16 rollout.max_response_tokens=24576 batch.max_tokens_per_microbatch=32768
"""

import dataclasses
import sys

if __name__ == "__main__":
    from grpo_mcore import entry

    def main() -> None:
        from grpo_mcore import config, predict

        what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
        if what != "simulate":
            raise config.InputError("launch/plan.py", what, "must be followed by what to do", "write launch/plan.py simulate --cfg FILE ...")
        names = [f.name for f in dataclasses.fields(predict.Question)]
        command = entry.parse(__doc__, *(f"--{name.replace('_', '-')}" for name in names), "--out")
        result = predict.answer(command.config, predict.Question(**{name: command.options[name] for name in names}))
        print(predict.table(result))
        if command.options["out"]:
            predict.write(result, command.options["out"])

    entry.run(main)
