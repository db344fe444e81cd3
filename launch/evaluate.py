"""Evaluates: launch/evaluate.py --cfg FILE [--model FOLDER_OR_CHECKPOINT] [--data SET[,SET ...]] [--out JSON]
[--compare JSON] [key.sub=value ...].

Prompt template and sampling are the configuration's (eval.*), and so is the data without --data: files, hub data sets,
or aime24 and math500. Without --model, the model is the run's newest checkpoint, or the configuration's model if there
is none. --out keeps all numbers, the protocol and a table of the problems (of several sets, by set); --compare gives
the difference from such a file, problem by problem, with its error bar.
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def main() -> None:
        import dataclasses
        import json

        command = entry.parse(__doc__, "--model", "--data", "--compare", types={"--out": entry.out_file})
        cfg, options = command.config, command.options
        sets = options["data"].split(",") if options["data"] else [cfg.eval.data]

        from grpo_mcore.config import config
        from grpo_mcore.evaluate import evaluate

        if len(sets) > 1 and options["compare"]:
            raise config.InputError(
                "--compare",
                options["compare"],
                f"is of one data set, and --data names {len(sets)}",
                "compare them one by one",
            )
        results = {
            data: evaluate.evaluate_model(
                dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, data=data)),
                options["model"],
                compare_with=options["compare"],
            )
            for data in sets
        }
        if options["out"]:
            options["out"].write_text(json.dumps(results if len(sets) > 1 else results[sets[0]], indent=1) + "\n")

    entry.run(main)
