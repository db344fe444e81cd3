"""A run's reward and evaluation curves as one PNG."""

from pathlib import Path

from grpo_mcore import metrics


def draw(run_dir: str | Path) -> Path:
    """RUN/curves.png from RUN/metrics.jsonl. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = metrics.read(run_dir)
    train = [(r["step"], r["reward/mean"]) for r in rows if "reward/mean" in r]
    evals = [r for r in rows if "eval/standard_error" in r]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="training reward")
    if evals:
        (key,) = {k for r in evals for k in r if k.startswith("eval/mean@")}
        axes.errorbar(
            [r["step"] for r in evals], [r[key] for r in evals], [r["eval/standard_error"] for r in evals],
            color="tab:orange", marker="o", capsize=3, label=f"held-out {key.removeprefix('eval/')} ± standard error")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1.02), title=Path(run_dir).name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
