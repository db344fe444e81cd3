"""Curves of metrics over steps: which ones a run has (SECTIONS), as PNG files, and as SVG that a page can colour.

A chart is data (Chart); matplotlib draws it, the same way in both formats.
"""

import fnmatch
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore.report import run_folder

# Of PNG files. A page has a variable for each: --c0, --c1, ... and --ink, so that light and dark can differ.
COLOURS = ("#1f6fb4", "#c2570c", "#1a7f4b", "#8a4fb5", "#b3261e", "#6b7280", "#a67c00", "#0f7f8c")
INK = "#1b1f24"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
STATUSES = ("correct", "wrong", "no_answer", "truncated", "timed_out")  # of verifiers (reward's Status)


@dataclass(frozen=True)
class Series:
    """Values at steps, ascending; NaN is a gap. `error`: half the length of each error bar."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    error: Sequence[float] | None = None

    @property
    def finite(self) -> list[float]:
        return [v for v in self.values if math.isfinite(v)]


@dataclass(frozen=True)
class Chart:
    """Lines (those with error bars also have markers) or, if `stacked`, layers over each other, where a gap is 0."""

    title: str
    ylabel: str
    series: tuple[Series, ...]
    stacked: bool = False
    ylim: tuple[float, float | None] | None = None
    log: bool = False  # the y axis, if all finite values are positive and differ much
    boundaries: tuple[tuple[int, str], ...] = ()  # (first step, name) of each stage, if there are several


@dataclass(frozen=True)
class Plot:
    """What a chart shows of metrics.jsonl."""

    title: str
    ylabel: str
    metrics: tuple[str, ...]  # names or patterns
    note: str = ""
    stacked: bool = False
    log: bool = False
    ylim: tuple[float, float | None] | None = None  # where all values lie within

    def shows(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.metrics)


SHARE = (-0.02, 1.08)
REWARD = Plot(
    "Training reward",
    "mean reward",
    ("reward/mean", "reward/mean/*"),
    "Of a step's responses, and of each source's; of a verifier the share that is right.",
    ylim=SHARE,
)
EVALUATION = Plot(
    "Evaluation",
    "mean score",
    ("eval/mean@*", "eval/*/mean@*"),
    "Mean over the problems; the bars are one standard error from problem to problem.",
    ylim=SHARE,
)
SECTIONS = {  # of the report's page
    "Curves": (
        REWARD,
        EVALUATION,
        Plot("Evaluation: pass@k and maj@k", "share of problems", ("eval/pass@*", "eval/maj@*"), ylim=SHARE),
        Plot(
            "Groups that teach",
            "share of groups",
            ("reward/mixed_groups_frac", "reward/mixed_groups_frac/*"),
            "Groups whose rewards differ: only they have advantages.",
            ylim=SHARE,
        ),
        Plot("Entropy", "nats a token", ("update/entropy",)),
        Plot("KL to the reference", "nats a token", ("update/kl_to_ref",)),
        Plot("Clip fraction", "share of tokens", ("update/clip_frac", "update/clip_dual_frac")),
        Plot("Gradient norm", "norm before the clip", ("update/grad_norm",)),
        Plot("Loss", "loss", ("update/loss",)),
        Plot("Learning rate", "learning rate", ("update/lr",)),
    ),
    "Length and truncation": (
        Plot("Turns of a response", "turns", ("environment/turns_mean",), "Those that were sampled."),
        Plot("Sessions without an end", "responses", ("environment/failed", "environment/timed_out")),
        Plot("Response length", "tokens", ("rollout/response_tokens_mean", "rollout/response_tokens_max")),
        Plot(
            "Truncated responses",
            "share of responses",
            ("rollout/truncated_frac", "rollout/truncated_frac/*", "eval/truncated_frac"),
            "Those that hit the length limit.",
            ylim=(0, None),
        ),
    ),
    "Mismatch": (
        Plot(
            "|old - rollout| log-prob",
            "nats",
            ("mismatch/logprob_abs_mean", "mismatch/logprob_abs_max"),
            "What the engines sampled with against what the trainer scores.",
            log=True,
        ),
        Plot(
            "By position in the sequence",
            "nats",
            ("mismatch/logprob_abs_mean_from_*",),
            "Means over tokens from each position to the next. A rise with length points to the engines' precision.",
            log=True,
        ),
        Plot("Tokens beyond the cap", "share of tokens", ("mismatch/beyond_cap_frac", "importance/beyond_cap_frac")),
        Plot("k3 of KL(rollout || old)", "nats a token", ("mismatch/k3",), log=True),
        Plot("Importance weights", "", ("importance/weight_mean", "importance/effective_frac")),
        Plot(
            "Staleness",
            "steps",
            ("rollout/staleness_mean", "rollout/staleness_max"),
            "How many versions behind the policy a token was sampled.",
        ),
        Plot(
            "Engines against the trainer after a refit",
            "nats",
            ("refit/canary_abs_mean",),
            "Mean |log-prob difference| of fixed tokens.",
            log=True,
        ),
    ),
    "Time and throughput": (
        Plot("Time by phase", "seconds a step", ("time/*_s",), "As the driver waits for them.", stacked=True),
        Plot(
            "Throughput",
            "tokens/s",
            ("tokens_per_s",),
            "Prompt and response tokens over the step's seconds, without evaluation and checkpoint.",
        ),
        Plot("Packing and balance", "", ("update/packed_frac", "update/imbalance")),
        Plot("Refit", "GB/s", ("refit/gb_per_s",)),
    ),
    "Grading": (
        Plot(
            "Statuses",
            "responses",
            tuple(f"reward/{status}" for status in STATUSES),
            "Why each response got its reward.",
            stacked=True,
        ),
        Plot("Reward functions", "mean value", ("reward/*/mean",), "Of the responses that each has a value for."),
        Plot(
            "Responses without a value",
            "responses",
            ("reward/failed", "reward/timed_out", "reward/not_applicable"),
            "Of some reward function, or, where it does not apply, of all.",
        ),
        Plot("Verifiers disagree", "responses", ("reward/disagree",)),
        Plot("Grading time", "seconds", ("reward/seconds",)),
    ),
    "Failures": (
        Plot("Engines that failed", "since the process began", ("rollout/engine_failures",)),
        Plot(
            "Groups not trained on as drawn",
            "groups",
            ("rollout/groups_passed_over", "rollout/groups_without_variance", "rollout/groups_dropped"),
        ),
        Plot(
            "Comparisons stopped",
            "responses",
            ("reward/timed_out",),
            "Wrong answers only because the grader ran out of time.",
        ),
        Plot("Masked prompts", "share of groups", ("rollout/masked_prompts_frac",)),
    ),
}


def png(chart: Chart, path: Path) -> Path:
    _figure(chart, (7, 4.2)).savefig(path, dpi=120, facecolor="white")
    return path


@dataclass(frozen=True)
class Svg:
    text: str  # an <svg> element
    left: float  # of the axes, as a share of the width
    right: float
    first: float  # step at `left`
    last: float  # step at `right`


def svg(chart: Chart, prefix: str) -> Svg:
    """To stand in a page: ids begin with `prefix`, colours are the page's variables."""
    import matplotlib

    out = io.StringIO()
    figure = _figure(chart, (6, 2.9))
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", text[text.index("<svg") :])
    text = re.sub(r"<style.*?</style>", "", text, count=1)  # it would hold for the whole page
    text = re.sub(
        r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1
    )
    for name, colour in (*((f"--c{i}", colour) for i, colour in enumerate(COLOURS)), ("--ink", INK)):
        text = text.replace(colour, f"var({name})")
    box, (first, last) = figure.axes[0].get_position(), figure.axes[0].get_xlim()
    return Svg(text, box.x0, box.x1, first, last)


def _figure(chart: Chart, size: tuple[float, float]):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw_series = _draw_layers if chart.stacked else _draw_lines
        draw_series(axes, chart.series)
        finite = [v for s in chart.series for v in s.finite]
        if chart.ylim and all(chart.ylim[0] <= v <= (chart.ylim[1] or math.inf) for v in finite):
            axes.set_ylim(*chart.ylim)
        if chart.log and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.set(xlabel="step", ylabel=chart.ylabel, title=chart.title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for step, name in chart.boundaries:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
            axes.annotate(
                name,
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
        if len(chart.series) > 1 or any(s.error for s in chart.series):
            longest = max(len(s.label) for s in chart.series)
            figure.legend(
                loc="outside lower center",
                ncols=max(1, min(len(chart.series), 4, 92 // (longest + 6))),
                frameon=False,
                fontsize=8,
            )
        return figure


def _draw_lines(axes, series: Sequence[Series]) -> None:
    for i, s in enumerate(series):
        colour, y = COLOURS[i % len(COLOURS)], [v if math.isfinite(v) else math.nan for v in s.values]
        # Those that no line reaches.
        alone = [
            k
            for k, v in enumerate(y)
            if not math.isnan(v) and all(math.isnan(n) for n in y[max(k - 1, 0) : k] + y[k + 1 : k + 2])
        ]
        if s.error:
            axes.errorbar(
                s.steps, y, s.error, color=colour, marker="o", markersize=4, linewidth=1.2, capsize=3, label=s.label
            )
        else:
            axes.plot(s.steps, y, color=colour, linewidth=1.2, marker="o", markersize=3, markevery=alone, label=s.label)


def _draw_layers(axes, series: Sequence[Series]) -> None:
    steps = [step for s in series for step in s.steps]
    first, last = (min(steps), max(steps)) if steps else (0, 0)
    below = [0.0] * (last - first + 1)
    for i, s in enumerate(series):
        at = dict(zip(s.steps, s.values, strict=True))
        above = [b + (v if math.isfinite(v := at.get(first + k, 0.0)) else 0.0) for k, b in enumerate(below)]
        axes.stairs(
            above,
            [first - 0.5 + k for k in range(len(above) + 1)],
            baseline=below,
            fill=True,
            color=COLOURS[i % len(COLOURS)],
            linewidth=0,
            label=s.label,
        )
        below = above


def evaluations(rows: Sequence[dict]) -> list[Series]:
    """mean@k with its standard error, one series for each k; then that of each of several data sets, without."""
    names = {name for row in rows for name in row if EVALUATION.shows(name)}
    out = []
    for key in sorted(names, key=lambda name: (name.count("/"), name)):
        mine = [row for row in rows if key in row]
        steps, values, label = [row["step"] for row in mine], [row[key] for row in mine], key.removeprefix("eval/")
        if key.count("/") > 1:
            out.append(Series(f"held-out {label}", steps, values))
            continue
        error = [e if math.isfinite(e := row.get("eval/standard_error", 0.0)) else 0.0 for row in mine]
        out.append(Series(f"held-out {label} ± standard error", steps, values, error))
    return out


def draw(run_dir: str | Path) -> Path:
    """RUN/curves.png from RUN/metrics.jsonl: training reward and evaluations. Returns its path."""
    rows = run_folder.read_metrics(run_dir)
    train = [row for row in rows if "reward/mean" in row]
    series = (
        [Series("training reward", [row["step"] for row in train], [row["reward/mean"] for row in train])]
        if train
        else []
    )
    return png(
        Chart(Path(run_dir).name, "share of right answers", (*series, *evaluations(rows)), ylim=(0, 1.02)),
        Path(run_dir) / "curves.png",
    )
