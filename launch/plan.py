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
    import sys
    from functools import partial

    from grpo_mcore import entry

    CASE = ("--gpu", "--num-gpus", "--model-config")
    tokens = partial(entry.number, low=1, high=1e9)

    def memory() -> None:
        command = entry.parse(__doc__, *CASE, types=dict.fromkeys(("--prompt-tokens", "--response-tokens"), tokens))
        from grpo_mcore.plan import memory, time as plan_time

        cfg, ask = command.config, command.options
        machine = memory.machine_of(ask["gpu"], ask["num_gpus"])
        case = memory.Case(cfg, memory.hf_config_of(cfg, ask["model_config"]), machine)
        memory.check(case)
        print(plan_time.report(case, plan_time.assumed(cfg, ask["prompt_tokens"], ask["response_tokens"])))

    def simulate() -> None:
        types = dict.fromkeys(("--median-tokens", "--mean-tokens", "--prompt-tokens"), tokens)
        types |= dict.fromkeys(("--failures-per-day", "--restart-s"), entry.number)
        types |= {"--flat-frac": partial(entry.number, high=1)}
        types |= {
            "--steps": partial(entry.whole_number, low=1),
            "--staleness": entry.whole_numbers,
            "--out": entry.out_file,
        }
        command = entry.parse(__doc__, *CASE, "--like", "--profile", types=types)
        from grpo_mcore.plan import memory, predict

        ask = {name: value for name, value in command.options.items() if value is not None}
        gpu, num_gpus, out = (ask.pop(name, None) for name in ("gpu", "num_gpus", "out"))
        machine = None if gpu is None else memory.machine_of(gpu, num_gpus)
        result = predict.answer(command.config, predict.Question(machine=machine, **ask))
        print(predict.table(result))
        if out:
            predict.write(result, out)

    COMMANDS = {"memory": memory, "simulate": simulate}
    entry.run(COMMANDS[sys.argv.pop(1) if COMMANDS.keys() & sys.argv[1:2] else "memory"])
