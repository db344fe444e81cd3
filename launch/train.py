"""Trains: torchrun --nproc-per-node N launch/train.py --cfg FILE [--dry-run] [key.sub=value ...]; N = 1 needs no torchrun."""

from grpo_mcore import entry

# The guard is not style: writing a checkpoint starts a process that imports this file again.
if __name__ == "__mp_main__":
    entry.die_with_parent()
if __name__ == "__main__":

    def main() -> None:
        from grpo_mcore import config_file, rules
        from grpo_mcore.parallel import topology

        command = entry.parse(__doc__)
        cfg = command.config
        rules.check_ranks(cfg, topology.world_size())
        if command.dry_run:
            if topology.rank() == 0:
                print(config_file.describe(cfg, topology.world_size()))
            return
        from grpo_mcore import trainer

        trainer.main(cfg)

    entry.run(main)
