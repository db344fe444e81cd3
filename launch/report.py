"""Reports: launch/report.py RUN [RUN ...] [--out FOLDER] [--steps N] [--chars N] [--mib N].

Writes RUN/report/index.html, one self-contained page with curves and rollouts, and reward.png and eval.png beside it;
also of a run that is still going. Several RUNs are stages that follow each other; the page is then in the last one's
folder.
"""

if __name__ == "__main__":
    from grpo_mcore import entry

    def main() -> None:
        import argparse
        from functools import partial

        from grpo_mcore.report import report

        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("runs", nargs="+", metavar="RUN")
        parser.add_argument("--out", help="folder of the page")
        parser.add_argument(
            "--steps",
            type=partial(entry.whole_number, "--steps", low=1),
            default=report.Bounds.steps,
            help="steps whose rollouts are shown, evenly chosen (%(default)s)",
        )
        parser.add_argument(
            "--chars",
            type=partial(entry.whole_number, "--chars", low=1, high=10**9),
            default=report.Bounds.chars,
            help="characters shown of a response (%(default)s)",
        )
        parser.add_argument(
            "--mib",
            type=partial(entry.number, "--mib", low=0.001, high=1e6),
            default=report.Bounds.mib,
            help="size of all rollouts shown (%(default)s)",
        )
        args = parser.parse_args()
        page = report.write(args.runs, args.out, report.Bounds(args.steps, args.chars, args.mib))
        print(f"wrote {page} ({page.stat().st_size / 2**20:.1f} MiB)")

    entry.run(main)
