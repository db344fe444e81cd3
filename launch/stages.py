"""Trains stage after stage: launch/stages.py --cfg FILE [--nproc-per-node N] [--dry-run] [--redo-from STAGE] [--
TORCHRUN_ARGUMENTS ...].

FILE names the stages and their configurations (configs/deepscaler.yaml). Each one trains (under torchrun, if N is more
than 1), is exported to Hugging Face, proved and evaluated, and the next begins from it. The same command goes on
wherever it was stopped.
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def main() -> None:
        import argparse
        import os
        import sys
        from functools import partial
        from pathlib import Path

        from grpo_mcore.config.config import InputError

        split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--cfg", required=True, help="YAML file of stages, such as configs/quickstart_stages.yaml")
        parser.add_argument(
            "--nproc-per-node",
            type=partial(entry.whole_number, "--nproc-per-node", low=1),
            help="ranks of the training (1; with --dry-run, as few as all stages can have)",
        )
        parser.add_argument("--dry-run", action="store_true", help="print the plan of all stages, and exit")
        parser.add_argument(
            "--redo-from",
            type=partial(entry.whole_number, "--redo-from", low=1),
            metavar="STAGE",
            help="do this stage, counted from 1, and those after it again; what they left is moved aside",
        )
        args = parser.parse_args(sys.argv[1:split])
        if "RANK" in os.environ:
            raise InputError(
                "RANK",
                os.environ["RANK"],
                "says that torchrun has started this program, which starts torchrun itself",
                "run it alone, with --nproc-per-node N",
            )

        from grpo_mcore.stages import actions, stages

        plan = stages.load(args.cfg, args.nproc_per_node or (None if args.dry_run else 1))
        if args.redo_from is not None:
            actions.check_redo(plan, args.redo_from)
        print(stages.describe(plan), flush=True)
        if args.dry_run:
            return
        launcher = actions.Launcher(Path(__file__).parent, plan.ranks, tuple(sys.argv[split + 1 :]))
        try:
            actions.run(plan, launcher, args.redo_from)
        except actions.ActionFailed as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            raise SystemExit(e.code) from e

    entry.run(main)
