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
class ReportedRun:
    """A run as its folder tells. Its step s is step offset + s of the page."""

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
        node: object = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


# Label -> key of the configuration.
FACTS = {
    "model": "model",
    "recipe": "recipe",
    "declared deviations": "recipe_deviations",
    "training data": "data.train",
    "evaluation data": "eval.data",
    "prompts per step": "rollout.prompts_per_step",
    "responses per prompt": "rollout.group_size",
    "responses per optimizer step": "batch.global_batch_size",
    "longest response, tokens": "rollout.max_response_tokens",
    "longest sequence, tokens": "rollout.max_total_tokens",
    "temperature": "rollout.temperature",
    "staleness allowed, steps": "rollout.max_staleness",
    "policy loss": "loss.policy_loss",
    "aggregation": "loss.aggregation",
    "KL coefficient": "loss.kl_coef",
    "importance correction": "loss.importance_level",
    "learning rate": "optimizer.lr",
    "trainer's weights": "precision.params",
    "FP8": "precision.fp8",
    "engines": "engine.num_engines",
    "engines' dtype": "engine.dtype",
    "engines' quantization": "engine.quantization",
    "device": "device",
    "seed": "seed",
}


def write(run_dirs: Sequence[str | Path], out: str | Path | None = None, bounds: Bounds = Bounds()) -> Path:
    """The page about runs in the order of their stages, in `out` (None: report/ in the last run's folder). Returns its
    path. Raises InputError."""
    runs = load(run_dirs)
    out = Path(out) if out else runs[-1].folder / "report"
    rows = [{**row, "step": run.offset + row["step"]} for run in runs for row in run.rows]
    boundaries = tuple((run.offset, run.name) for run in runs) if len(runs) > 1 else ()
    data_names = {_data_name(run.key("eval.data")) for run in runs}
    data_name = data_names.pop() if len(data_names) == 1 else ""
    charts = {plot: _chart(plot, rows, boundaries, data_name) for plots in curves.SECTIONS.values() for plot in plots}
    drawn: dict[str, list] = {}
    sections = []
    for heading, plots in curves.SECTIONS.items():
        sections.append(_section(heading, {plot: charts[plot] for plot in plots if charts[plot].series}, rows, drawn))
        sections[-1] += _time_table(rows) if heading.startswith("Time") else ""
    rollouts, left_out = collect_rollouts(runs, bounds)
    page = Path(__file__).with_name("page.html").read_text()
    script = page.split("<script>")[1].split("</script>")[0]
    text = Template(page).substitute(
        title=_escape(" → ".join(run.name for run in runs)),
        header=_header(runs),
        sections="\n".join(sections),
        metrics=_metrics_table(rows),
        left_out=_escape(left_out),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=_json(drawn),
        rollouts=_json(rollouts),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, plot in (("reward.png", curves.REWARD), ("eval.png", curves.EVALUATION)):
            if charts[plot].series:
                curves.png(charts[plot], out / name)
            else:
                (out / name).unlink(missing_ok=True)
        (out / "index.html").write_text(text, encoding="utf-8", newline="\n")
    except OSError as e:
        raise InputError("--out", str(out), f"cannot be written ({e.strerror})", "name another folder") from e
    return out / "index.html"


def load(run_dirs: Sequence[str | Path]) -> list[ReportedRun]:
    """Raises InputError for what is no run's folder, or is named twice."""
    folders = [Path(run_dir) for run_dir in run_dirs]
    whole = [folder.resolve() for folder in folders]
    runs: list[ReportedRun] = []
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
        runs.append(
            ReportedRun(
                visible(name),
                folder,
                run_folder.read_metrics(folder),
                run_folder.read_config(folder),
                run_folder.read_summary(folder),
                run_folder.read_layout(folder),
                run_folder.read_provenance(folder),
                offset=runs[-1].offset + runs[-1].steps if runs else 0,
            )
        )
    return runs


def visible(text: str) -> str:
    """With characters that cannot be seen, or that reorder others, as ⟨U+202E⟩; tabs and line ends stay."""
    return UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)


def _chart(plot: curves.Plot, rows: Sequence[dict], boundaries: tuple, data_name: str) -> curves.Chart:
    """Of the metrics that some row has; a step without one is a gap."""
    if plot is curves.EVALUATION:
        title = f"Accuracy on {visible(data_name)}" if data_name else plot.title
        series = curves.evaluations(rows)
    else:
        title, series = plot.title, []
        names = [name for pattern in plot.metrics for name in fnmatch.filter(_names(rows), pattern)]
        names.sort(key=lambda name: int(re.findall(r"\d*$", name)[0] or 0))  # mismatch by position: 256 before 1024
        for name in names:
            mine = [row for row in rows if run_folder.is_evaluation(row) == name.startswith("eval/")]
            steps, values = [row["step"] for row in mine], [row.get(name, math.nan) for row in mine]
            series.append(curves.Series(visible(name), steps, values))
    return curves.Chart(title, plot.ylabel, tuple(series), plot.stacked, plot.ylim, plot.log, boundaries)


def _names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def _section(heading: str, charts: dict[curves.Plot, curves.Chart], rows: Sequence[dict], drawn: dict) -> str:
    """A section's figures; `drawn` gets what the page needs to tell the values under the pointer. What is 0 throughout
    is only named."""
    figures, zero = [], []
    for plot, chart in charts.items():
        broken = sum(not math.isfinite(v) for row in rows for name, v in row.items() if plot.shows(name))
        if not broken and not any(v for s in chart.series for v in s.finite):
            zero += [s.label for s in chart.series]
            continue
        name = f"chart{len(drawn)}"
        svg = curves.svg(chart, f"{name}-")
        series = [[s.label, list(s.steps), [_number(v) for v in s.values]] for s in chart.series]
        drawn[name] = [svg.left, svg.right, svg.first, svg.last, series]
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


def _header(runs: Sequence[ReportedRun]) -> str:
    facts = [
        ("folder", *(str(run.folder) for run in runs)),
        ("state", *map(_state, runs)),
        ("training reward, first and last", *(_first_and_last(run, "reward/mean") for run in runs)),
        ("evaluation, first and last", *(_first_and_last(run, "eval/mean@*") for run in runs)),
        ("wall clock, seconds", *(_fact(run.summary.get("seconds")) for run in runs)),
        ("ranks by axis", *map(_layout, runs)),
        *((label, *(_fact(run.key(dotted)) for run in runs)) for label, dotted in FACTS.items()),
    ]
    facts = [(label, *cells) for label, *cells in facts if any(c != "–" for c in cells)]
    if len(runs) == 1:
        pairs = "".join(f"<div><dt>{_escape(label)}</dt><dd>{_escape(cell)}</dd></div>" for label, cell in facts)
        table = f'<dl class="facts">{pairs}</dl>'
    else:
        table = _table("", ["", *(run.name for run in runs)], facts)
    details: list[tuple[str, object]] = [(f"Configuration of {run.name}", run.config) for run in runs]
    details += [(f"Code, software and hardware of {run.name}, of each start", run.starts) for run in runs]
    return table + "".join(
        f"<details><summary>{_escape(summary)}</summary>"
        f"<pre>{_escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))}</pre></details>"
        for summary, content in details
        if content
    )


def _state(run: ReportedRun) -> str:
    of = run.key("num_steps")
    if not run.steps:
        return "no step is complete yet"
    return f"finished: {run.steps} steps" if run.steps == of else f"unfinished: {run.steps} of {_fact(of)} steps"


def _layout(run: ReportedRun) -> str:
    """As the newest checkpoint says; without one, as far as the configuration does."""
    configured = {axis: run.key(f"parallel.{axis}") for axis in ("tp", "cp", "pp")}
    layout = run.layout or {axis: size for axis, size in configured.items() if size is not None}
    return " x ".join(f"{axis} {size}" for axis, size in layout.items()) or "–"


def _first_and_last(run: ReportedRun, pattern: str) -> str:
    seen = [
        f"{name.partition('/')[2]} {row[name]:.4g} (step {row['step']})"
        for row in run.rows
        for name in fnmatch.filter(row, pattern)
    ]
    return "; ".join(dict.fromkeys((seen[0], seen[-1]))) if seen else "–"


def _data_name(given: object) -> str:
    """Of data.train or eval.data as a configuration has it: a path, or several with theirs."""
    if isinstance(given, list):
        return ", ".join(_data_name(source.get("path")) for source in given if isinstance(source, dict))
    return Path(str(given or "")).stem


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item.get("path")) if isinstance(item, dict) else str(item) for item in value) or "–"
    return "–" if value is None else str(value)


def _time_table(rows: Sequence[dict]) -> str:
    totals = {
        name: math.fsum(v for row in rows if math.isfinite(v := row.get(name, 0.0)))
        for name in fnmatch.filter(_names(rows), "time/*")
    }
    whole = math.fsum(totals.values())
    if not whole:
        return ""
    longest_first = sorted(totals.items(), key=lambda item: -item[1])
    cells = [[name, f"{seconds:.1f}", f"{seconds / whole:.1%}"] for name, seconds in longest_first]
    return _table("Seconds of all steps", ["phase", "seconds", "share"], cells)


def _metrics_table(rows: Sequence[dict]) -> str:
    cells = []
    for name in sorted(_names(rows)):
        values = [row[name] for row in rows if name in row]
        finite = [v for v in values if math.isfinite(v)]
        shown = values[0], values[-1], min(finite, default=math.nan), max(finite, default=math.nan)
        cells.append([name, *(f"{v:.6g}" for v in shown), str(len(values)), str(len(values) - len(finite))])
    head = ["metric", "first", "last", "lowest", "highest", "rows", "not finite"]
    return _table("Every metric of metrics.jsonl", head, cells)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cap = f"<caption>{_escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_escape(first)}</th>{"".join(f"<td>{_escape(cell)}</td>" for cell in others)}</tr>'
        for first, *others in rows
    )
    return f'<div class="wide"><table>{cap}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def collect_rollouts(runs: Sequence[ReportedRun], bounds: Bounds) -> tuple[list, str]:
    """([[step of the page, run, step, groups], ...], what was left out). A group: [position, prompt, problem, gold,
    responses]; a response: [sample, tokens, truncated, versions, reward, status, answer, rule, other verifier's, text];
    a text: [beginning, characters left out, end]."""
    files = [(run, step, path) for run in runs for step, path in run_folder.rollout_files(run.folder).items()]
    if not files:
        return [], "This run has kept no rollouts."
    chosen = [files[i] for i in evenly(len(files), bounds.steps)]
    out, cut, cut_chars, texts_out, rows_out = [], 0, 0, 0, 0
    for run, step, path in chosen:
        groups: dict[tuple, list] = {}
        left = int(bounds.mib * 2**20 / len(chosen))
        for row in run_folder.read_rollouts(path):
            key = (_field(row.get("position")), _field(row.get("prompt_id")))
            text, problem = _response_text(row, bounds.chars), _text(row.get("problem"), bounds.chars)
            response = [*_response(row), text]
            added = [response]
            if key not in groups:
                added.append([*key, problem, _field(row.get("gold")), []])
            size = _num_bytes(added)
            if size > left and text:
                response[-1] = text = None
                if key not in groups:
                    added[-1][2] = None
                size, texts_out = _num_bytes(added), texts_out + 1
            if size > left:
                rows_out += 1
                continue
            left -= size
            groups.setdefault(key, added[-1])[4].append(response)
            if text and text[1]:
                cut, cut_chars = cut + 1, cut_chars + text[1]
        out.append([run.offset + step, run.name, step, list(groups.values())])
    said = [f"{len(chosen)} of {len(files)} steps that have rollouts are shown"]
    if cut:
        said.append(f"{cut} responses are cut to {bounds.chars} characters ({cut_chars} characters left out)")
    if texts_out or rows_out:
        said.append(f"{texts_out} texts and {rows_out} responses are left out beyond {bounds.mib:g} MiB")
    return out, "; ".join(said) + ". Of each step, the run keeps the texts of the first rollout.keep_texts groups."


def _num_bytes(parts: Sequence[list]) -> int:
    return sum(len(_json(part).encode()) for part in parts)


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of range(n), with the last and (if two fit) the first."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if most > 1 else [n - 1]


def _response(row: dict) -> list:
    versions = seen if isinstance(seen := row.get("versions"), list) else []
    said = ", ".join(
        f"{v[0]} ({v[1]})" if len(versions) > 1 else str(v[0]) for v in versions if isinstance(v, list) and len(v) == 2
    )
    other = row.get("other_verifier")
    return [
        _field(row.get("sample")),
        _number(row.get("response_tokens")),
        bool(row.get("truncated")),
        _field(said),
        *_verdict(row),
        _verdict(other) if isinstance(other, dict) else None,
    ]


def _verdict(row: dict) -> list:
    return [_number(row.get("reward")), *(_field(row.get(name)) for name in ("status", "answer", "detail"))]


def _response_text(row: dict, most: int) -> list | None:
    """That of _text; of several turns [nothing, characters left out, nothing, [[sampled or given, *_text], ...]]"""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        return _text(row.get("response"), most)
    parts = [[_field(who), *(_text(text, most // len(turns)) or ("", 0, ""))] for who, text in turns]
    return ["", sum(left_out for _, _, left_out, _ in parts), "", parts]


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
    text = str(value)
    more = len(text) - MAX_FIELD_CHARS
    return visible(text[:MAX_FIELD_CHARS]) + (f" … ({more} characters left out)" if more > 0 else "")


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
