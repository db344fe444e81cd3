"""Trains: torchrun --nproc-per-node N launch/train.py --cfg FILE [--dry-run | --check | --fit] [key.sub=value ...];
N = 1 needs no torchrun.

--check: all that a run looks at before its engines start, in seconds: data, model, run_dir, disk.
--fit: one worst case of a step, in minutes, with memory and seconds by phase; nothing is saved.
"""

from grpo_mcore import entry

# The guard is not style: writing a checkpoint starts a process that imports this file again.
if __name__ == "__mp_main__":
    entry.die_with_parent()
if __name__ == "__main__":

    def main() -> None:
        import os

        command = entry.parse(__doc__, flags=("--check", "--fit"))
        cfg = command.config

        from grpo_mcore.config import file as config_file, recipe, rules
        from grpo_mcore.parallel import topology

        alone = command.dry_run or command.options["check"]
        # Outside torchrun these are about one replica, whatever its size.
        ranks = cfg.parallel.ranks_per_replica if alone and "WORLD_SIZE" not in os.environ else topology.world_size()
        if command.options["check"]:
            from grpo_mcore.plan import check

            check.main(cfg, ranks)
            return
        rules.check_ranks(cfg, ranks)
        rules.check_metrics(cfg)
        if topology.rank() == 0:
            print(
                f"{config_file.describe(cfg, ranks)}\n{recipe.describe(cfg)}"
                if command.dry_run
                else recipe.summary(cfg),
                flush=True,
            )
        if command.dry_run:
            return
        from grpo_mcore import trainer
        from grpo_mcore.plan import fit

        (fit if command.options["fit"] else trainer).main(cfg)

    entry.run(main)
