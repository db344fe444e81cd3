"""Plans, without a GPU: launch/plan.py [memory] --cfg FILE --gpu NAME --num-gpus N [--model-config FILE_OR_FOLDER] [key.sub=value ...].

memory: bytes by part and seconds by phase of one step on GPUs of a kind (h100-80gb, h200-141gb, a100-80gb, a100-40gb, b200-180gb), or
the smallest change that makes it fit. --prompt-tokens and --response-tokens are the mean lengths to assume (192; half of the limit).
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def memory() -> None:
        command = entry.parse(__doc__, "--gpu", "--num-gpus", "--model-config", "--prompt-tokens", "--response-tokens")

        from grpo_mcore import plan, plan_time

        cfg, options = command.config, command.options
        machine, hf_config = plan.machine_of(options["gpu"], options["num-gpus"]), plan.hf_config_of(cfg, options["model-config"])
        plan.check(cfg, hf_config, machine)
        prompt_tokens = float(options["prompt-tokens"] or min(192, cfg.data.max_prompt_tokens))
        response_tokens = float(options["response-tokens"] or cfg.response_tokens(int(prompt_tokens)) / 2)
        print(plan_time.report(cfg, hf_config, machine, plan_time.Assumptions(prompt_tokens, response_tokens)))

    COMMANDS = {"memory": memory}

    def main() -> None:
        import sys

        command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "memory"
        COMMANDS[command]()

    entry.run(main)
