"""Converts: launch/convert.py to-megatron --hf FOLDER --out CHECKPOINT, or to-hf --checkpoint FOLDER --out HF_FOLDER."""

from grpo_mcore import entry

# The guard is not style: writing a checkpoint starts a process that imports this file again.
if __name__ == "__mp_main__":
    entry.die_with_parent()
if __name__ == "__main__":

    def main() -> None:
        import argparse
        from pathlib import Path

        parser = argparse.ArgumentParser(description=__doc__)
        commands = parser.add_subparsers(dest="command", required=True)
        to_megatron = commands.add_parser("to-megatron", help="Hugging Face folder, hub name or .gguf -> Megatron checkpoint")
        to_megatron.add_argument("--hf", required=True)
        to_megatron.add_argument("--out", required=True)
        to_hf = commands.add_parser("to-hf", help="Megatron checkpoint, such as RUN/checkpoints/step_000010 -> Hugging Face folder")
        to_hf.add_argument("--checkpoint", required=True)
        to_hf.add_argument("--out", required=True)
        args = parser.parse_args()

        import torch

        from grpo_mcore import config, convert, hf_weights
        from grpo_mcore.parallel import topology

        if Path(args.out).exists():
            raise config.InputError("--out", args.out, "exists already", "remove it, or name another folder")
        if args.command == "to-hf":
            convert.to_hf(args.checkpoint, args.out)
        else:
            source = hf_weights.local_folder(args.hf)
            topo = topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=600, seed=0)
            convert.from_hf(source, args.out, topo)
            topology.disconnect()
        print(f"wrote {args.out}")

    entry.run(main)
