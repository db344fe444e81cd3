"""One self-contained page about a run, or about stages that follow each other: curves, times, failures, and the
rollouts themselves.

RUN/report/index.html needs no network and no other file; reward.png and eval.png beside it are the two curves of the
guide.

What models wrote is hostile: it reaches the page as data (escaped JSON, shown by textContent), with control,
bidirectional and surrogate characters spelt out, and the page's policy lets no script run but the page's own.
"""

import base64
import fnmatch
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from grpo_mcore.config.config import InputError
from grpo_mcore.report import curves, run_folder

STATUSES = ("correct", "wrong", "no_answer", "truncated", "timed_out")  # reward.Status
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
HEAD_SHARE = 1 / 3  # of a cut text, its beginning; the rest is its end, where the answer stands
MAX_FIELD_CHARS = 600


@dataclass(frozen=True)
class Bounds:
    """Of the rollouts in a page. What they leave out, the page says."""

    steps: int = 24  # evenly chosen, the first and the last among them
    chars: int = 6000  # of a response or problem
    mib: float = 24.0  # of all, each step an equal part; beyond it first texts are left out, then responses

    def __post_init__(self):
        for name in ("steps", "chars", "mib"):
            if getattr(self, name) <= 0:
                raise InputError(
                    f"--{name}", getattr(self, name), "must be positive", f"leave it out for {getattr(Bounds, name)}"
                )


@dataclass(frozen=True)
class Stage:
    """A run. Its step s is step offset + s of the page."""

    name: str
    folder: Path
    rows: list[dict]  # of metrics.jsonl, its own steps
    config: dict
    summary: dict
    layout: dict
    starts: list[dict]  # of provenance.jsonl
    offset: int

    @property
    def steps(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    def key(self, dotted: str) -> object:
        """Of the configuration; None: not there."""
        node = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


@dataclass(frozen=True)
class Plot:
    title: str
    ylabel: str
    metrics: tuple[str, ...]  # names or patterns
    note: str = ""
    stacked: bool = False
    log: bool = False
    ylim: tuple[float, float | None] | None = None


SHARE = (-0.02, 1.08)
SECTIONS: tuple[tuple[str, tuple[Plot, ...]], ...] = (
    (
        "Curves",
        (
            Plot(
                "Training reward",
                "share of right answers",
                ("reward/mean",),
                "Mean reward of a step's responses.",
                ylim=SHARE,
            ),
            Plot(
                "Evaluation",
                "share of right answers",
                ("eval/mean@*",),
                "Mean over the problems; the bars are one standard error from problem to problem.",
                ylim=SHARE,
            ),
            Plot("Evaluation: pass@k and maj@k", "share of problems", ("eval/pass@*", "eval/maj@*"), ylim=SHARE),
            Plot(
                "Groups that teach",
                "share of groups",
                ("reward/mixed_groups_frac",),
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
    ),
    (
        "Length and truncation",
        (
            Plot("Response length", "tokens", ("rollout/response_tokens_mean", "rollout/response_tokens_max")),
            Plot(
                "Truncated responses",
                "share of responses",
                ("rollout/truncated_frac", "eval/truncated_frac"),
                "Those that hit the length limit.",
                ylim=(0, None),
            ),
        ),
    ),
    (
        "Mismatch",
        (
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
                "Means over tokens from each position to the next. A rise with length points to the engines' "
                "precision.",
                log=True,
            ),
            Plot(
                "Tokens beyond the cap", "share of tokens", ("mismatch/beyond_cap_frac", "importance/beyond_cap_frac")
            ),
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
    ),
    (
        "Time and throughput",
        (
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
    ),
    (
        "Grading",
        (
            Plot(
                "Statuses",
                "responses",
                tuple(f"reward/{status}" for status in STATUSES),
                "Why each response got its reward.",
                stacked=True,
            ),
            Plot("Verifiers disagree", "responses", ("reward/disagree",)),
            Plot("Grading time", "seconds", ("reward/seconds",)),
        ),
    ),
    (
        "Failures",
        (
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
    ),
)

FACTS = (
    ("model", "model"),
    ("recipe", "recipe"),
    ("declared deviations", "recipe_deviations"),
    ("training data", "data.train"),
    ("evaluation data", "eval.data"),
    ("prompts per step", "rollout.prompts_per_step"),
    ("responses per prompt", "rollout.group_size"),
    ("responses per optimizer step", "batch.global_batch_size"),
    ("longest response, tokens", "rollout.max_response_tokens"),
    ("longest sequence, tokens", "rollout.max_total_tokens"),
    ("temperature", "rollout.temperature"),
    ("staleness allowed, steps", "rollout.max_staleness"),
    ("policy loss", "loss.policy_loss"),
    ("aggregation", "loss.aggregation"),
    ("KL coefficient", "loss.kl_coef"),
    ("importance correction", "loss.importance_level"),
    ("learning rate", "optimizer.lr"),
    ("trainer's weights", "precision.params"),
    ("FP8", "precision.fp8"),
    ("engines", "engine.num_engines"),
    ("engines' dtype", "engine.dtype"),
    ("engines' quantization", "engine.quantization"),
    ("device", "device"),
    ("seed", "seed"),
)


def write(run_dirs: Sequence[str | Path], out: str | Path | None = None, bounds: Bounds = Bounds()) -> Path:
    """The page about runs in the order of their stages, in `out` (None: report/ in the last run's folder). Returns its
    path. Raises InputError."""
    stages = load(run_dirs)
    out = Path(out) if out else stages[-1].folder / "report"
    rows = [{**row, "step": stage.offset + row["step"]} for stage in stages for row in stage.rows]
    boundaries = tuple((stage.offset, stage.name) for stage in stages) if len(stages) > 1 else ()
    data_names = {Path(str(stage.key("eval.data") or "")).stem for stage in stages}
    data_name = data_names.pop() if len(data_names) == 1 else ""
    sections, drawn = [], {}
    for heading, plots in SECTIONS:
        charts = [(plot, chart) for plot in plots if (chart := _chart(plot, rows, boundaries, data_name)).series]
        sections.append(
            _section(heading, charts, rows, drawn) + (_time_table(rows) if heading.startswith("Time") else "")
        )
    rollouts, left_out = collect_rollouts(stages, bounds)
    page = Path(__file__).with_name("page.html").read_text()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    text = Template(page).substitute(
        title=_escape(" → ".join(stage.name for stage in stages)),
        header=_header(stages),
        sections="\n".join(sections),
        metrics=_metrics_table(rows),
        left_out=_escape(left_out),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=_json(drawn),
        rollouts=_json(rollouts),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, plot in (("reward.png", SECTIONS[0][1][0]), ("eval.png", SECTIONS[0][1][1])):
            chart = _chart(plot, rows, boundaries, data_name)
            if chart.series:
                curves.png(chart, out / name)
            else:
                (out / name).unlink(missing_ok=True)
        (out / "index.html").write_text(text, encoding="utf-8", newline="\n")
    except OSError as e:
        raise InputError("--out", str(out), f"cannot be written ({e.strerror})", "name another folder") from e
    return out / "index.html"


def load(run_dirs: Sequence[str | Path]) -> list[Stage]:
    """Raises InputError for what is no run's folder, or is named twice."""
    folders = [Path(run_dir) for run_dir in run_dirs]
    whole = [folder.resolve() for folder in folders]
    stages: list[Stage] = []
    for i, folder in enumerate(folders):
        if not (folder / "metrics.jsonl").is_file() and not (folder / "config.yaml").is_file():
            raise InputError(
                "RUN",
                str(folder),
                "holds neither metrics.jsonl nor config.yaml" if folder.is_dir() else "there is no such folder",
                "give a folder that launch/train.py wrote",
            )
        if whole[i] in whole[:i]:
            raise InputError("RUN", str(folder), "is named twice", "name each stage once, in their order")
        name = whole[i].name if [w.name for w in whole].count(whole[i].name) == 1 else "/".join(whole[i].parts[-2:])
        stages.append(
            Stage(
                visible(name),
                folder,
                run_folder.read_metrics(folder),
                run_folder.read_config(folder),
                run_folder.read_summary(folder),
                run_folder.read_layout(folder),
                run_folder.read_provenance(folder),
                offset=stages[-1].offset + stages[-1].steps if stages else 0,
            )
        )
    return stages


def visible(text: str) -> str:
    """With characters that cannot be seen, or that reorder others, as ⟨U+202E⟩; tabs and line ends stay."""
    return UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)


def _chart(plot: Plot, rows: Sequence[dict], boundaries: tuple, data_name: str) -> curves.Chart:
    """Of the metrics that some row has; a step without one is a gap."""
    names = [name for pattern in plot.metrics for name in _names(rows) if fnmatch.fnmatchcase(name, pattern)]
    names.sort(key=lambda name: int(re.search(r"\d*$", name)[0] or 0))  # mismatch by position: 256 before 1024
    title = plot.title
    if plot.metrics == ("eval/mean@*",):
        series = curves.evaluations(rows)
        title = f"Accuracy on {visible(data_name)}" if data_name else title
    else:
        series = []
        for name in names:
            mine = [row for row in rows if _is_eval(row) == name.startswith("eval/")]
            series.append(
                curves.Series(visible(name), [row["step"] for row in mine], [row.get(name, math.nan) for row in mine])
            )
    return curves.Chart(title, plot.ylabel, tuple(series), plot.stacked, plot.ylim, plot.log, boundaries)


def _of(plot: Plot, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in plot.metrics)


def _is_eval(row: dict) -> bool:
    return any(name.startswith("eval/") for name in row)


def _names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def _section(heading: str, charts: list[tuple[Plot, curves.Chart]], rows: Sequence[dict], drawn: dict) -> str:
    """A section's figures; `drawn` gets what the page needs to tell the values under the pointer. What is 0 throughout
    is only named."""
    figures, zero = [], []
    for plot, chart in charts:
        broken = sum(not math.isfinite(v) for row in rows for metric, v in row.items() if _of(plot, metric))
        if not broken and not any(v for s in chart.series for v in s.finite):
            zero += [s.label for s in chart.series]
            continue
        name = f"chart{len(drawn)}"
        svg = curves.svg(chart, f"{name}-")
        drawn[name] = [
            svg.left,
            svg.right,
            svg.first,
            svg.last,
            [[s.label, list(s.steps), [_number(v) for v in s.values]] for s in chart.series],
        ]
        said = "; ".join(
            f"{s.label}: {len(s.finite)} values from {s.finite[0]:.6g} to {s.finite[-1]:.6g}, lowest "
            f"{min(s.finite):.6g}, highest {max(s.finite):.6g}"
            for s in chart.series
            if s.finite
        )
        gaps = f" {broken} values are not finite and not drawn." if broken else ""
        figures.append(
            f'<figure id="{name}"><div class="chart" role="img" aria-label="{_escape(chart.title)}. '
            f'{_escape(said)}">{svg.text}</div>'
            f"<figcaption>{_escape(plot.note)}{gaps}</figcaption><output></output></figure>"
        )
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    body += f"<p>0 throughout: {_escape(', '.join(zero))}.</p>" if zero else ""
    return f"<section><h2>{heading}</h2>{body or '<p>No step has metrics of this kind.</p>'}</section>"


def _header(stages: Sequence[Stage]) -> str:
    facts = [("folder", [str(stage.folder) for stage in stages]), ("state", [_state(stage) for stage in stages])]
    facts += [(label, [_fact(stage.key(dotted)) for stage in stages]) for label, dotted in FACTS]
    facts.insert(2, ("training reward, first and last", [_first_and_last(stage, "reward/mean") for stage in stages]))
    facts.insert(3, ("evaluation, first and last", [_first_and_last(stage, "eval/mean@*") for stage in stages]))
    facts.insert(4, ("wall clock, seconds", [_fact(stage.summary.get("seconds")) for stage in stages]))
    facts.insert(5, ("ranks by axis", [_layout(stage) for stage in stages]))
    facts = [(label, *cells) for label, cells in facts if any(c != "–" for c in cells)]
    pairs = "".join(f"<div><dt>{_escape(label)}</dt><dd>{_escape(cells[0])}</dd></div>" for label, *cells in facts)
    table = (
        f'<dl class="facts">{pairs}</dl>'
        if len(stages) == 1
        else _table("", ["", *(stage.name for stage in stages)], facts)
    )
    details = [(f"Configuration of {stage.name}", stage.config) for stage in stages if stage.config]
    details += [
        (f"Code, software and hardware of {stage.name}, of each start", stage.starts)
        for stage in stages
        if stage.starts
    ]
    return table + "".join(
        f"<details><summary>{_escape(summary)}</summary>"
        f"<pre>{_escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))}</pre></details>"
        for summary, content in details
    )


def _state(stage: Stage) -> str:
    of = stage.key("num_steps")
    if not stage.steps:
        return "no step is complete yet"
    return f"finished: {stage.steps} steps" if stage.steps == of else f"unfinished: {stage.steps} of {_fact(of)} steps"


def _layout(stage: Stage) -> str:
    """As the newest checkpoint says; without one, as far as the configuration does."""
    layout = stage.layout or {
        axis: size for axis in ("tp", "cp", "pp") if (size := stage.key(f"parallel.{axis}")) is not None
    }
    return " x ".join(f"{axis} {size}" for axis, size in layout.items()) or "–"


def _first_and_last(stage: Stage, pattern: str) -> str:
    seen = [
        (name.partition("/")[2], row["step"], value)
        for row in stage.rows
        for name, value in row.items()
        if fnmatch.fnmatchcase(name, pattern)
    ]
    return (
        "; ".join(f"{name} {value:.4g} (step {step})" for name, step, value in dict.fromkeys((seen[0], seen[-1])))
        if seen
        else "–"
    )


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def _time_table(rows: Sequence[dict]) -> str:
    totals = {
        name: math.fsum(v for row in rows if math.isfinite(v := row.get(name, 0.0)))
        for name in _names(rows)
        if name.startswith("time/")
    }
    whole = math.fsum(totals.values())
    cells = (
        [[name, f"{s:.1f}", f"{s / whole:.1%}"] for name, s in sorted(totals.items(), key=lambda item: -item[1])]
        if whole
        else []
    )
    return _table("Seconds of all steps", ["phase", "seconds", "share"], cells) if cells else ""


def _metrics_table(rows: Sequence[dict]) -> str:
    cells = []
    for name in sorted(_names(rows)):
        values = [row[name] for row in rows if name in row]
        finite = [v for v in values if math.isfinite(v)] or [math.nan]
        cells.append(
            [
                name,
                *(f"{v:.6g}" for v in (values[0], values[-1], min(finite), max(finite))),
                str(len(values)),
                str(len(values) - len([v for v in values if math.isfinite(v)])),
            ]
        )
    return _table(
        "Every metric of metrics.jsonl", ["metric", "first", "last", "lowest", "highest", "rows", "not finite"], cells
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cap = f"<caption>{_escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_escape(row[0])}</th>'
        + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>{cap}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def collect_rollouts(stages: Sequence[Stage], bounds: Bounds) -> tuple[list, str]:
    """([[step of the page, stage, step, groups], ...], what was left out). A group: [position, prompt, problem, gold,
    responses]; a response: [sample, tokens, truncated, versions, reward, status, answer, rule, other verifier's, text];
    a text: [beginning, characters left out, end]."""
    files = [(stage, step, path) for stage in stages for step, path in run_folder.rollout_files(stage.folder).items()]
    chosen = [files[i] for i in evenly(len(files), bounds.steps)]
    total = int(bounds.mib * 2**20 / max(len(chosen), 1))
    out, cut, cut_chars, texts_out, rows_out = [], 0, 0, 0, 0
    for stage, step, path in chosen:
        groups: dict[tuple, list] = {}
        left = total
        for row in run_folder.read_rollouts(path):
            key = (_field(row.get("position")), _field(row.get("prompt_id")))
            text, problem = _text(row.get("response"), bounds.chars), _text(row.get("problem"), bounds.chars)
            response = [*_response(row), text]
            group = groups.get(key) or [*key, problem, _field(row.get("gold")), []]
            size = len(_json(response).encode()) + (len(_json(group).encode()) if key not in groups else 0)
            if size > left and text:
                response[-1] = None
                group[2] = group[2] if key in groups else None
                size, texts_out, text = (
                    len(_json(response).encode()) + (len(_json(group).encode()) if key not in groups else 0),
                    texts_out + 1,
                    None,
                )
            if size > left:
                rows_out += 1
                continue
            left -= size
            groups.setdefault(key, group)[4].append(response)
            if text and text[1]:
                cut, cut_chars = cut + 1, cut_chars + text[1]
        out.append([stage.offset + step, stage.name, step, list(groups.values())])
    said = [f"{len(chosen)} of {len(files)} steps that have rollouts are shown"]
    said += [f"{cut} responses are cut to {bounds.chars} characters ({cut_chars} characters left out)"] if cut else []
    said += (
        [f"{texts_out} texts and {rows_out} responses are left out beyond {bounds.mib:g} MiB"]
        if texts_out or rows_out
        else []
    )
    return (
        out,
        "; ".join(said) + ". Of each step, the run keeps the texts of the first rollout.keep_texts groups."
        if files
        else "This run has kept no rollouts.",
    )


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of range(n), with the last and (if two fit) the first."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if most > 1 else [n - 1]


def _response(row: dict) -> list:
    versions = row.get("versions") if isinstance(row.get("versions"), list) else []
    said = ", ".join(
        f"{v[0]} ({v[1]})" if len(versions) > 1 else str(v[0]) for v in versions if isinstance(v, list) and len(v) == 2
    )
    other = row.get("other_verifier")
    return [
        _field(row.get("sample")),
        _number(row.get("response_tokens")),
        bool(row.get("truncated")),
        _field(said),
        _number(row.get("reward")),
        _field(row.get("status")),
        _field(row.get("answer")),
        _field(row.get("detail")),
        [
            _number(other.get("reward")),
            _field(other.get("status")),
            _field(other.get("answer")),
            _field(other.get("detail")),
        ]
        if isinstance(other, dict)
        else None,
    ]


def _text(value: object, most: int) -> list | None:
    """[beginning, characters left out, end]"""
    if not isinstance(value, str):
        return None
    if len(value) <= most:
        return [visible(value), 0, ""]
    head = int(most * HEAD_SHARE)
    return [visible(value[:head]), len(value) - most, visible(value[len(value) - (most - head) :])]


def _field(value: object) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    return (
        visible(text)
        if len(text) <= MAX_FIELD_CHARS
        else f"{visible(text[:MAX_FIELD_CHARS])} … ({len(text) - MAX_FIELD_CHARS} characters left out)"
    )


def _number(value: object) -> float | str | None:
    """As JSON has it: no NaN there."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, int) or value is None else _field(value)


def _json(value: object) -> str:
    """To stand in a <script>, which "</script" or "<!--" would end or open."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _escape(text: str) -> str:
    return html.escape(visible(text))
