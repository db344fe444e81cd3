"""benchmarks/RESULTS.md, from results/*.json: of each result its headline figures, and what they depend on; and the
table in docs/gpu.md of what has been run on which GPU.

    python benchmarks/results.py

What a result does not say is "not recorded". Figures of one file compare with each other, those of two files only where
hardware and versions are the same.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPU_PAGE = HERE.parent / "docs/gpu.md"
NOT_RECORDED = "not recorded"
HEAD = """# Results

Written by `python benchmarks/results.py` from `benchmarks/results/*.json`, which hold all figures and what they mean.
They are of the day and the commit that stand beside them, not of the code as it is now.
"""

Table = list[list[str]]  # its first row: the titles


def number(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:,.{digits}f}"


def end_to_end(result: dict) -> Table:
    out = [["recipe", "what", "step, s", "response tokens/s", "packed tokens/s", "CPU s a step", "steps"]]
    for r in result["results"]:
        for name, f in r.items():
            if isinstance(f, dict) and "step_s" in f:
                rates = [number(f[key], 1) for key in ("response_tokens_per_s", "packed_tokens_per_s")]
                out.append(
                    [r["recipe"], name, number(f["step_s"]), *rates, number(f["cpu_s"]), number(f["num_steps"], 0)]
                )
        if ratio := r.get("ours_over_peer"):
            rates = [number(ratio[f"{kind}_tokens_per_s"]) for kind in ("response", "packed")]
            out.append([r["recipe"], "ours / peer", number(1 / ratio["steps_per_s"]), *rates, "-", "-"])
        if "step_over_longer_side" in r:
            what = f"step ahead / the longer side in turns (target: {r['target']})"
            out.append([r["recipe"], what, number(r["step_over_longer_side"], 3), *["-"] * 4])
    return out


def gpu_acceptance(result: dict) -> Table:
    out = [["step", "status", "seconds", "why"]]
    for step in result["steps"]:
        why = (step.get("reason") or "-").strip().splitlines()[-1]
        out.append([step["name"], step["status"], number(step.get("s"), 0), why[:160]])
    return out


def kernels(result: dict) -> Table:
    passes = ("forward", "forward_backward")
    titles = [
        f"{p.replace('_', ' + ')}, {unit}" for p in passes for unit in ("s", "of the naive form's time", "of peak")
    ]
    out = [["implementation", "rows", "vocabulary", *titles, "extra memory, MB"]]
    for r in result["results"]:
        size = [r["implementation"], number(r["rows"], 0), number(r["vocabulary"], 0)]
        if r["status"] != "ok":
            out.append([*size, r["status"], *["-"] * 6])
            continue
        figures = [(r[p]["s"], r[p].get("time_of_naive"), r[p]["share_of_peak"]) for p in passes]
        cells = [cell for s, of_naive, share in figures for cell in (number(s, 4), number(of_naive), f"{share:.1%}")]
        out.append([*size, *cells, number(r["extra_bytes"] / 1e6, 1)])
    return out


def kill_resume(result: dict) -> Table:
    return [
        ["kills", "steps", "weights equal", "metrics equal"],
        [str(len(result["kills"])), str(result["steps"])]
        + ["yes" if result[what] else "NO" for what in ("weights_equal", "metrics_equal")],
    ]


def engine_deaths(result: dict) -> Table:
    kinds = Counter(f"{death['of']} {death['how']}" for death in result["deaths"])
    titles = ["deaths", "of which", "corrupted refits", "steps", "responses", "lost", "graded twice", "all equal"]
    equal = all(result[f"{what}_equal"] for what in ("rollouts", "weights", "metrics"))
    numbers = [number(result[key], 0) for key in ("steps", "responses", "responses_lost", "responses_twice")]
    of_which = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    row = [str(len(result["deaths"])), of_which, str(result["corrupted_refits"]), *numbers, "yes" if equal else "NO"]
    return [titles, row]


def refit(result: dict) -> Table:
    out = [["what", "median, ms", "least, ms", "GB/s of the median", "/ memcpy, of medians"]]
    for name, p in result["phases"].items():
        ratio = result["ratio_to_memcpy"].get(f"{name}_median")
        seconds = [number(p[kind] * 1e3) for kind in ("median_s", "min_s")]
        out.append([name, *seconds, number(p.get("gb_per_s_of_median")), number(ratio)])
    size = f"{result['bytes'] / 1e6:.0f} MB by {result['transport']} to {result['engines']} engines"
    return [*out, [f"{size}; target: {result['target']}", *["-"] * 4]]


def rollout(result: dict) -> Table:
    load = result["load"]
    out = [["responses running on each engine", "an iteration, ms", f"tokens/s of {result['engines']} engines"]]
    for n, s in result["profile"]["iteration_s"]:
        out.append([str(n), number(s * 1e3), number(result["tokens_per_s"][str(n)], 0)])
    what = f"load of {load['responses']} responses: {load['s']:.3f} s, simulated {load['simulated_s']:.3f} s"
    return [*out, [what, "-", number(load["tokens_per_s"], 0)]]


def simulate(result: dict) -> Table:
    out = [["seconds of a step", "measured", "predicted", "predicted / measured"]]
    for name, m in result["measured"].items():
        seconds = [number(m[kind], 3) for kind in ("measured", "predicted")]
        given = "" if name in ("rollout_s", "step_s") else " (given, not predicted)"
        out.append([name.removesuffix("_s") + given, *seconds, number(m["predicted_over_measured"], 3)])
    return out


def train_step(result: dict) -> Table:
    phases = ("logprob", "forward_backward", "step")
    titles = [f"{p.replace('_', ' + ')}, {unit}" for p in phases for unit in ("tokens/s", "MFU")]
    out = [["precision", "tokens of a sequence", *titles, "optimizer step, s", "peak memory, GiB"]]
    for r in result["results"]:
        case = [r["precision"], number(r["sequence_tokens"], 0)]
        if r["status"] != "ok":
            out.append([*case, r["status"], *["-"] * 7])
            continue
        for p in phases:
            mfu = r["phases"][p][f"mfu_of_measured_{r['dtype']}_peak"]
            case += [number(r["phases"][p]["tokens_per_s"], 1), f"{mfu:.1%}"]
        peak = r["phases"]["step"]["peak_memory_bytes"] / 2**30
        out.append([*case, number(r["phases"]["optimizer_step"]["s"]), number(peak)])
    return out


HEADLINES: dict[str, Callable[[dict], Table]] = {
    f.__name__: f
    for f in (end_to_end, engine_deaths, gpu_acceptance, kernels, kill_resume, refit, rollout, simulate, train_step)
}


def depends_on(result: dict) -> Table:
    """What the figures depend on, as far as the result says it."""
    commit, dirty, _ = result.get("git_commit", "unknown").partition("-dirty")
    commit = NOT_RECORDED if commit == "unknown" else f"`{commit[:12]}`{', with uncommitted changes' if dirty else ''}"
    # Results without `hardware` say the processor themselves.
    hw = result.get("hardware", {"cpu": result.get("cpu"), "cores": result.get("num_cpus")})
    gpu = f"{hw['gpus']} x {hw['gpu']} (CUDA {hw['cuda']})" if "gpu" in hw else None
    units = (("cores", "{} cores"), ("memory_gib", "{} GiB"))
    parts = [gpu, hw.get("cpu"), *(text.format(hw[key]) for key, text in units if hw.get(key))]
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    return [
        ["date", "commit", "hardware", "versions"],
        [
            result.get("date", NOT_RECORDED),
            commit,
            ", ".join(filter(None, parts)) or NOT_RECORDED,
            versions or NOT_RECORDED,
        ],
    ]


def markdown(table: Table) -> str:
    titles, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def section(name: str, result: dict) -> str:
    """Raises ValueError for a file that no benchmark has written."""
    command = result.get("command", "")
    program = re.search(r"benchmarks/(\w+)\.py", command)
    if not program or program[1] not in HEADLINES:
        raise ValueError(f"{name}: command = {command!r}: must name one of {', '.join(HEADLINES)} in benchmarks/")
    tables = [markdown(depends_on(result)), markdown(HEADLINES[program[1]](result))]
    return "\n\n".join([f"## {name}", f"`{command}`", *tables]) + "\n"


def page(folder: Path = HERE / "results") -> str:
    files = sorted(folder.glob("*.json"))
    return "\n".join([HEAD, *(section(f.name, json.loads(f.read_text())) for f in files)])


def seen_on_gpus(folder: Path = HERE / "results") -> str:
    """The results of gpu_acceptance.py, a row for each."""
    rows = [["date", "commit", "hardware", "versions", "ok", "not ok"]]
    for path in sorted(folder.glob("gpu_acceptance*.json")):
        result = json.loads(path.read_text())
        names: dict[bool, list[str]] = {True: [], False: []}
        for step in result["steps"]:
            fine = step["status"] == "ok"
            names[fine].append(step["name"] if fine else f"{step['name']} ({step['status']})")
        rows.append([*depends_on(result)[1], *(", ".join(names[fine]) or "-" for fine in (True, False))])
    return markdown(rows) if len(rows) > 1 else "Nothing yet."


def gpu_page(text: str) -> str:
    """docs/gpu.md with the table of today between its two marks."""
    before, begin, rest = text.partition("<!-- written by benchmarks/results.py -->")
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{begin}\n\n{seen_on_gpus()}\n\n{end}{after}"


if __name__ == "__main__":
    for path, text in ((HERE / "RESULTS.md", page()), (GPU_PAGE, gpu_page(GPU_PAGE.read_text()))):
        path.write_text(text)
        print(f"written to {path}")
