"""Converts: launch/convert.py to-megatron --hf FOLDER --out CHECKPOINT, or to-hf --checkpoint FOLDER --out HF_FOLDER.

prove --checkpoint FOLDER --hf HF_FOLDER [--out JSON] shows that an export is what was trained: see
grpo_mcore/checkpoint/parity.py.
"""

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
        to_megatron = commands.add_parser(
            "to-megatron", help="Hugging Face folder, hub name or .gguf -> Megatron checkpoint"
        )
        to_megatron.add_argument("--hf", required=True)
        to_megatron.add_argument("--out", required=True)
        to_hf = commands.add_parser(
            "to-hf", help="Megatron checkpoint, such as RUN/checkpoints/step_000010 -> Hugging Face folder"
        )
        to_hf.add_argument("--checkpoint", required=True)
        to_hf.add_argument("--out", required=True)
        prove = commands.add_parser("prove", help="is the Hugging Face folder what the policy of the checkpoint was?")
        prove.add_argument("--checkpoint", required=True)
        prove.add_argument("--hf", required=True)
        prove.add_argument("--out", help="JSON file for the proof's numbers")
        args = parser.parse_args()
        entry.hide_gpus()  # all of it is work on a CPU

        import torch

        from grpo_mcore.checkpoint import convert, parity
        from grpo_mcore.config import config
        from grpo_mcore.parallel import topology
        from grpo_mcore.policy import model_folder

        if args.command == "prove":
            return parity.prove(args.checkpoint, args.hf, args.out and entry.out_file("--out", args.out))
        if Path(args.out).exists():
            raise config.InputError("--out", args.out, "exists already", "remove it, or name another folder")
        if args.command == "to-hf":
            convert.to_hf(args.checkpoint, args.out)
        else:
            source = model_folder.local_folder(args.hf)
            topo = topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=600, seed=0)
            convert.from_hf(source, args.out, topo)
            topology.disconnect()
        print(f"wrote {args.out}")

    entry.run(main)
