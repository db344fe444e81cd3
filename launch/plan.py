"""Plans, without a GPU: launch/plan.py [memory | simulate] --cfg FILE --gpu NAME --num-gpus N [--model-config
FILE_OR_FOLDER] [key.sub=value ...].

memory: bytes by part and seconds by phase of one step on GPUs of a kind (h100-80gb, h200-141gb, a100-80gb, a100-40gb,
b200-180gb), or the smallest change that makes it fit. --prompt-tokens and --response-tokens are the mean lengths to
assume (192; half of the limit).

simulate: step time, utilisation and staleness, in virtual time. --staleness 0,1,2 side by side; lengths log-normal
(--median-tokens, --mean-tokens, --prompt-tokens) or those of a run (--like RUN); --profile JSON: engines as
benchmarks/rollout.py measured them; without --gpu, trainers as RUN measured them, and prediction beside measurement;
--failures-per-day N, each back after --restart-s; --flat-frac: groups without variance; --steps; --out JSON. A cluster
of 1,024 GPUs:

    python launch/plan.py simulate --cfg configs/deepscaler_24k.yaml --gpu h100-80gb --num-gpus 1024 --staleness 0,1,2
    --failures-per-day 8 \\
        engine.placement=disaggregated engine.num_engines=896 engine.tp=1 rollout.prompts_per_step=2048
        rollout.group_size=16 batch.global_batch_size=4096
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def memory() -> None:
        command = entry.parse(__doc__, "--gpu", "--num-gpus", "--model-config", "--prompt-tokens", "--response-tokens")

        from grpo_mcore.plan import memory, time as plan_time

        cfg, options = command.config, command.options
        machine, hf_config = (
            memory.machine_of(options["gpu"], options["num-gpus"]),
            memory.hf_config_of(cfg, options["model-config"]),
        )
        memory.check(cfg, hf_config, machine)
        prompt_tokens = float(options["prompt-tokens"] or min(192, cfg.data.max_prompt_tokens))
        response_tokens = float(options["response-tokens"] or cfg.response_tokens(int(prompt_tokens)) / 2)
        print(plan_time.report(cfg, hf_config, machine, plan_time.Assumptions(prompt_tokens, response_tokens)))

    def simulate() -> None:
        import dataclasses

        from grpo_mcore.plan import predict

        names = {f.name: f.name.replace("_", "-") for f in dataclasses.fields(predict.Question)}
        command = entry.parse(__doc__, *(f"--{option}" for option in names.values()), "--out")
        result = predict.answer(
            command.config, predict.Question(**{name: command.options[option] for name, option in names.items()})
        )
        print(predict.table(result))
        if command.options["out"]:
            predict.write(result, command.options["out"])

    COMMANDS = {"memory": memory, "simulate": simulate}

    def main() -> None:
        import sys

        command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "memory"
        COMMANDS[command]()

    entry.run(main)
