"""Evaluates: launch/evaluate.py --cfg FILE [--model FOLDER_OR_CHECKPOINT] [--out JSON] [--compare JSON] [key.sub=value ...].

Data, prompt template and sampling are the configuration's (eval.*); without --model, the model is the run's newest
checkpoint, or the configuration's model if there is none. --out keeps all numbers, the protocol and a table of the problems;
--compare gives the difference from such a file, problem by problem, with its error bar.
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def main() -> None:
        import json
        from pathlib import Path

        command = entry.parse(__doc__, "--model", "--out", "--compare")

        from grpo_mcore import evaluate

        result = evaluate.evaluate_model(command.config, command.options["model"], compare_with=command.options["compare"])
        if command.options["out"]:
            Path(command.options["out"]).write_text(json.dumps(result, indent=1) + "\n")

    entry.run(main)
