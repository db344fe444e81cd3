"""The report page, from run folders written by hand: what it says is parsed out of it again.

Not covered here: how it looks, and its drawing of a real run's metrics (test_trainer.py makes one). What its script
does is asked of Chromium where there is one.
"""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from grpo_mcore.config.config import InputError
from grpo_mcore.report import curves, report
from grpo_mcore.reward.grader import OF_VERIFIERS
from tests.dist import program

HOSTILE = (
    "</script><img src=x onerror=Alert(1)><!-- <script> $title ${script_hash} &amp; \x00\x1b[31m "
    "\u202egnp.exe \ud800 \\boxed{1}"
)
TRAINED = [
    {
        "step": s,
        "reward/mean": s / 8,
        "reward/correct": 2.0 * s,
        "reward/wrong": 16.0 - 2 * s,
        "reward/timed_out": 0.0,
        "time/rollout_s": 3.0,
        "time/update_s": 1.0,
        "update/grad_norm": 1 / 3,
    }
    for s in (1, 2, 3)
]
EVALUATED = [
    {"step": 0, "eval/mean@16": 0.25, "eval/standard_error": 0.0625},
    {"step": 3, "eval/mean@16": 0.5, "eval/standard_error": 0.125},
]
CONFIG = """model: some/model
num_steps: 3
recipe: guide/8k
eval: {data: data/aime_2024.jsonl}
parallel: {tp: 2, cp: 1, pp: 1}
"""


def response(sample: int = 0, *, position: int = 7, text: str | None = "so \\boxed{4}", **over) -> dict:
    """One row as samples.rollout_rows writes it."""
    row = {
        "position": position,
        "prompt_id": 100 + position,
        "sample": sample,
        "prompt_tokens": 5,
        "response_tokens": 12,
        "truncated": False,
        "versions": [[2, 12]],
        "reward": 1.0,
        "status": "correct",
        "answer": "4",
        "detail": "equal by text",
    }
    return row | ({"problem": "2+2", "gold": "4", "response": text} if text is not None else {}) | over


def make_run(
    folder, rows=(*TRAINED, *EVALUATED), rollouts: dict[int, list[dict]] | None = None, config: str | None = CONFIG
):
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    for step, responses in (rollouts or {}).items():
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
    return folder


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each by its innermost element."""

    def __init__(self, path):
        super().__init__()
        self.raw = path.read_bytes()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict, str]] = []
        self._in = None
        self.feed(self.raw.decode())
        self.data = {attrs["id"]: json.loads(text) for attrs, text in self.scripts if attrs}
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = (tag, dict(attrs))

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in and self._in[0] == "script":
            self.scripts.append((self._in[1], data))
        else:
            self.texts.append(data)

    def chart(self, label: str) -> list[list]:
        """[steps, values] of a series."""
        (found,) = [
            [steps, values]
            for *_, series in self.data["charts"].values()
            for name, steps, values in series
            if name == label
        ]
        return found

    def responses(self) -> list[list]:
        return [r for *_, groups in self.data["data"] for g in groups for r in g[4]]

    def cells(self, first: str) -> list[str]:
        """Of the table row that begins with `first`."""
        (row,) = re.findall(rf'<tr><th scope="row">{re.escape(first)}</th>(.*?)</tr>', self.raw.decode())
        return re.findall("<td>(.*?)</td>", row)


def page_of(*runs, **bounds) -> Page:
    return Page(report.write(runs, bounds=report.Bounds(**bounds)))


def path_points(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """Of each path with that colour inside the axes."""
    paths = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*var\({colour}\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", d)] for d in paths]


def test_the_page_says_the_numbers_of_the_files(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "provenance.jsonl").write_text(
        json.dumps({"git_commit": "abc-dirty", "versions": {"vllm": "<0.32>"}}) + "\n"
    )
    page = page_of(run)
    assert page.chart("reward/mean") == [[1, 2, 3], [0.125, 0.25, 0.375]]
    assert page.chart("held-out mean@16 ± standard error") == [[0, 3], [0.25, 0.5]]
    assert page.chart("update/grad_norm")[1] == [0.333333] * 3
    # First, last, lowest, highest, rows, not finite.
    assert page.cells("reward/correct") == ["2", "6", "2", "6", "3", "0"]
    assert {name for name in TRAINED[0] | EVALUATED[0] if name != "step"} <= set(
        re.findall(r'<th scope="row">(.*?)</th>', page.raw.decode())
    )
    for said in (
        "some/model",
        "guide/8k",
        "finished: 3 steps",
        "tp 2 x cp 1 x pp 1",
        "mean 0.125 (step 1); mean 0.375 (step 3)",
        "mean@16 0.25 (step 0); mean@16 0.5 (step 3)",
        "Accuracy on aime_2024",
        "0 throughout: reward/timed_out",
        "of each start",
        "git_commit: abc-dirty",
        "vllm: <0.32>",
    ):
        assert said in page.text, said


def test_seconds_by_phase_are_summed_over_the_steps(tmp_path):
    text = report.write([make_run(tmp_path / "run")]).read_text()
    assert (
        '<th scope="row">time/rollout_s</th><td>9.0</td><td>75.0%</td>' in text
        and '<th scope="row">time/update_s</th><td>3.0</td><td>25.0%</td>' in text
    )


def test_a_line_goes_through_its_values_and_a_gap_stays_a_gap():
    svg = curves.svg(curves.Chart("t", "y", (curves.Series("a", [1, 2, 4], [0.0, 1.0, 3.0]),), ylim=(0, 4)), "p-")
    (((x1, y1), (x2, y2), (x4, y4)),) = path_points(svg.text, "--c0")
    # y grows downwards.
    assert (
        math.isclose((x4 - x1) / (x2 - x1), 3, rel_tol=1e-4)
        and math.isclose((y1 - y4) / (y1 - y2), 3, rel_tol=1e-4)
        and y2 < y1
    )
    width = float(re.search(r'viewBox="0 0 (\S+) ', svg.text)[1])
    # What the page's pointer reads.
    assert math.isclose(
        svg.first + (x2 / width - svg.left) / (svg.right - svg.left) * (svg.last - svg.first), 2, abs_tol=1e-3
    )
    gap = curves.svg(
        curves.Chart("t", "y", (curves.Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 1.0, 2.0]),)), "p-"
    )
    assert re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*var\(--c0\)', gap.text)[0].count("M") == 2


def test_error_bars_are_as_long_as_the_standard_errors():
    rows = [
        {"step": 0, "eval/mean@16": 0.25, "eval/standard_error": 0.05},
        {"step": 3, "eval/mean@16": 0.5, "eval/standard_error": 0.1},
    ]
    svg = curves.svg(curves.Chart("t", "y", tuple(curves.evaluations(rows)), ylim=(0, 1)), "p-")
    *bars, line = sorted(path_points(svg.text, "--c0"), key=lambda points: points[-1][0] - points[0][0])
    lengths = sorted(abs(a[1] - b[1]) for a, b in bars)
    rise = line[0][1] - line[1][1]  # of 0.25
    assert (
        len(bars) == 2
        and math.isclose(lengths[0] / rise, 0.1 / 0.25, rel_tol=1e-3)
        and math.isclose(lengths[1] / rise, 0.2 / 0.25, rel_tol=1e-3)
    )


def test_names_are_no_formulas(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("$\\frac{$", "a_b^c$x$")]  # the first would not even parse
    assert ">a_b^c$x$</text>" in page_of(*runs).raw.decode()


def test_layers_stand_on_each_other_and_are_as_high_as_their_values():
    # b has no step 1: 0 there.
    chart = curves.Chart(
        "t", "y", (curves.Series("a", [1, 2], [1.0, 1.0]), curves.Series("b", [2], [3.0])), stacked=True
    )
    (below,), (above,) = (path_points(curves.svg(chart, "p-").text, colour) for colour in ("--c0", "--c1"))
    floor, top_a = max(y for _, y in below), min(y for _, y in below)
    assert math.isclose(max(y for _, y in above), top_a, abs_tol=1e-3)
    assert math.isclose((top_a - min(y for _, y in above)) / (floor - top_a), 3, rel_tol=1e-4)


def test_positions_are_in_their_order_and_statuses_in_theirs(tmp_path):
    row = {
        "step": 1,
        **{f"mismatch/logprob_abs_mean_from_{p}": 0.5 for p in (0, 1024, 256)},
        **{f"reward/{status}": 1.0 for status in sorted(curves.STATUSES)},
    }
    labels = [
        label
        for *_, series in page_of(make_run(tmp_path / "run", rows=[row])).data["charts"].values()
        for label, *_ in series
    ]
    assert [int(label.rpartition("_")[2]) for label in labels if "from_" in label] == [0, 256, 1024]
    assert [label for label in labels if label.startswith("reward/")][:5] == [
        f"reward/{status}" for status in curves.STATUSES
    ]


def test_pngs_are_written_and_follow_the_values(tmp_path):
    run = make_run(tmp_path / "run")
    report.write([run])
    seen = [(run / "report" / name).read_bytes() for name in ("reward.png", "eval.png")] + [
        curves.draw(run).read_bytes()
    ]
    assert all(data.startswith(b"\x89PNG") for data in seen) and len(set(seen)) == 3
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRAINED))
    assert curves.draw(run).read_bytes() != seen[2]  # without evaluations
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5}) + "\n")
    report.write([run])
    assert (run / "report/reward.png").read_bytes() != seen[0] and not (run / "report/eval.png").exists()


def test_what_models_wrote_is_data_and_nothing_else(tmp_path):
    folder = tmp_path / "a</title><script>alert(1)</script>"
    rows = [
        response(
            0,
            text=HOSTILE,
            answer=HOSTILE,
            detail=HOSTILE,
            status=HOSTILE,
            problem=HOSTILE,
            gold=HOSTILE,
            reward=math.nan,
            other_verifier={"reward": 0.0, "answer": HOSTILE},
        ),
        response(1, text="x" * 3_000_000),
    ]
    make_run(folder, rollouts={1: rows}, config=f"model: {json.dumps('</pre>' + HOSTILE[:40])}\nnum_steps: 3\n")
    page = page_of(folder)
    assert [tag for tag, _ in page.elements if tag in ("script", "img", "iframe", "object", "link", "base")] == [
        "script"
    ] * 3
    assert not [name for tag, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", page.raw) and "\u202e" not in page.raw.decode()
    group = page.data["data"][0][3][0]
    expected = (
        HOSTILE.replace("\x00", "⟨U+0000⟩")
        .replace("\x1b", "⟨U+001B⟩")
        .replace("\u202e", "⟨U+202E⟩")
        .replace("\ud800", "⟨U+D800⟩")
    )
    assert group[2] == [expected, 0, ""] and group[3] == expected
    reward_, *strings, other, text = group[4][0][4:]
    assert (reward_, *strings, other[2], text) == ("nan", *[expected] * 4, [expected, 0, ""])
    assert len(page.raw) < 1_500_000


def test_no_script_but_the_pages_own_may_run_and_nothing_is_fetched(tmp_path):
    page = page_of(make_run(tmp_path / "run", rollouts={1: [response()]}))
    (policy,) = [
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    (script,) = [text for attrs, text in page.scripts if not attrs]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    targets = [
        v for _, attrs in page.elements for k, v in attrs.items() if k in ("src", "href", "xlink:href", "action")
    ]
    assert targets and all(v.startswith("#") for v in targets)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) and all(v[1:] in ids for v in targets)


def test_turns_are_shown_apart_and_cut_each(tmp_path):
    turns = [["sampled", "abc" + "x" * 40 + "defghij"], ["given", "5"], ["sampled", "so 5"]]
    rows = [response(turns=turns), response(1, turns=[["sampled", 5]]), response(2, turns="x"), response(3)]
    texts = [r[-1] for r in page_of(make_run(tmp_path / "run", rollouts={1: rows}), chars=30).responses()]
    parts = [["sampled", "abc", 40, "defghij"], ["given", "5", 0, ""], ["sampled", "so 5", 0, ""]]
    assert texts[0] == ["", 40, "", parts]
    assert texts[1] == ["", 0, "", [["sampled", "", 0, ""]]]
    assert texts[2] == texts[3] == ["so \\boxed{4}", 0, ""]


def test_rollouts_come_with_reward_answer_and_rule_in_groups(tmp_path):
    rows = [
        response(0),
        response(
            1,
            reward=0.0,
            status="wrong",
            answer="5",
            detail="not equal by text",
            versions=[[1, 4], [2, 8]],
            truncated=True,
        ),
        response(0, position=9, text=None),
    ]
    page = page_of(make_run(tmp_path / "run", rollouts={3: rows}))
    ((step, stage, its_step, groups),) = page.data["data"]
    assert (step, stage, its_step) == (3, "run", 3)
    assert [(g[0], g[1], g[2], g[3]) for g in groups] == [("7", "107", ["2+2", 0, ""], "4"), ("9", "109", None, None)]
    assert groups[0][4][1] == [
        "1",
        12,
        True,
        "1 (4), 2 (8)",
        0.0,
        "wrong",
        "5",
        "not equal by text",
        None,
        ["so \\boxed{4}", 0, ""],
    ]
    assert groups[1][4][0][-1] is None


def test_bounds_hold_and_the_page_says_what_it_leaves_out(tmp_path):
    long = "a" * 500 + "b" * 4000 + "\\boxed{4}"
    rollouts = {
        s: [response(i, position=g, text=long if g == 0 else None) for g in range(3) for i in range(4)]
        for s in range(1, 41)
    }
    run = make_run(tmp_path / "run", rollouts=rollouts)
    page = page_of(run, steps=5, chars=900)
    assert [step for step, *_ in page.data["data"]] == [1, 11, 21, 30, 40]
    kept = [r[-1] for r in page.responses() if r[-1]]
    assert len(kept) == 20 and all(t == [long[:300], len(long) - 900, long[-600:]] for t in kept)
    assert "5 of 40 steps that have rollouts are shown" in page.text
    assert f"20 responses are cut to 900 characters ({20 * (len(long) - 900)} characters left out)" in page.text
    for mib in (0.005, 0.018):
        page = page_of(run, steps=5, chars=900, mib=mib)
        texts, rows = map(int, re.search(r"(\d+) texts and (\d+) responses are left out beyond", page.text).groups())
        shown = page.responses()
        # 50: a step's own fields.
        assert len(json.dumps(page.data["data"], separators=(",", ":"))) < mib * 2**20 + 5 * 50
        assert (
            texts > 0
            and len(shown) + rows == 60
            and sum(r[-1] is not None for r in shown) + texts == 20
            and (rows > 0) == (mib == 0.005)
        )


def test_steps_are_chosen_evenly():
    assert (
        report.evenly(3, 5) == [0, 1, 2]
        and report.evenly(0, 5) == []
        and report.evenly(9, 1) == [8]
        and report.evenly(9, 3) == [0, 4, 8]
    )
    for n in (25, 240, 1040):
        chosen = report.evenly(n, 24)
        assert len(set(chosen)) == 24 and chosen[0] == 0 and chosen[-1] == n - 1


def test_stages_follow_each_other(tmp_path):
    first = make_run(tmp_path / "8k", rollouts={3: [response()]})
    second = make_run(
        tmp_path / "16k",
        rows=({"step": 0, "eval/mean@8": 0.5, "eval/standard_error": 0.1}, {"step": 1, "reward/mean": 0.75}),
        rollouts={1: [response()]},
    )
    path = report.write([first, second])
    page = Page(path)
    assert path == second / "report/index.html"
    assert page.chart("reward/mean") == [[1, 2, 3, 4], [0.125, 0.25, 0.375, 0.75]]
    assert page.chart("held-out mean@8 ± standard error") == [[3], [0.5]]
    assert [tuple(row[:3]) for row in page.data["data"]] == [(3, "8k", 3), (4, "16k", 1)]
    assert page.cells("state") == ["finished: 3 steps", "unfinished: 1 of 3 steps"]
    assert ">16k</text>" in page.raw.decode()  # at its boundary in the charts


def test_numbers_that_are_none_are_counted_and_not_drawn(tmp_path):
    rows = (
        {"step": 1, "reward/mean": 0.5, "update/grad_norm": math.nan},
        {"step": 2, "reward/mean": math.inf, "update/grad_norm": 2.0},
        {"step": 3, "update/grad_norm": 3.0},
    )
    page = page_of(make_run(tmp_path / "run", rows=rows))
    assert page.chart("update/grad_norm") == [[1, 2, 3], ["nan", 2.0, 3.0]] and page.chart("reward/mean")[1] == [
        0.5,
        "inf",
        "nan",
    ]
    assert page.cells("update/grad_norm") == ["nan", "3", "2", "3", "3", "1"] and page.cells("reward/mean") == [
        "0.5",
        "inf",
        "0.5",
        "0.5",
        "2",
        "1",
    ]
    assert page.text.count("1 values are not finite and not drawn") == 2


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = page_of(make_run(tmp_path / "run", rows=()))
    assert (
        "no step is complete yet" in page.text
        and "This run has kept no rollouts" in page.text
        and page.data["data"] == []
        and page.data["charts"] == {}
    )
    unknown = page_of(make_run(tmp_path / "other", config=None))
    assert "unfinished: 3 of – steps" in unknown.text


def test_half_written_last_lines_are_dropped(tmp_path):
    run = make_run(tmp_path / "run", rollouts={1: [response(0)]})
    for path in (run / "metrics.jsonl", run / "rollouts/step_000001.jsonl"):
        path.write_text(path.read_text() + '{"step": 4, "rew')
    page = page_of(run)
    assert page.chart("reward/mean")[0] == [1, 2, 3] and len(page.responses()) == 1


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("metrics.jsonl", '{"step": 1}\n{"step"\n', "metrics.jsonl:2"),
        ("metrics.jsonl", '{"reward/mean": 1.0}\n', "step is no number"),
        ("metrics.jsonl", '{"step": 1, "a": "b"}\n', "a is no number"),
        ("rollouts/step_000001.jsonl", "[1]\n", "step_000001.jsonl:1"),
        ("rollouts/step_000001.jsonl", "[" * 100000 + "\n", "step_000001.jsonl:1"),
        ("summary.json", "{", "summary.json"),
        ("provenance.jsonl", "{\n", "provenance.jsonl"),
        ("config.yaml", "a: [", "config.yaml"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, said):
    run = make_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(said)):
        report.write([run])


def test_what_is_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for runs, out, said in (
        ([tmp_path / "none"], None, "no such folder"),
        ([tmp_path / "empty"], None, "neither"),
        ([run, run], None, "twice"),
        ([run], tmp_path / "file", "cannot be written"),
    ):
        with pytest.raises(InputError, match=said):
            report.write(runs, out)
    for bounds in ({"steps": 0}, {"chars": -1}, {"mib": 0.0}):
        with pytest.raises(InputError, match="must be positive"):
            report.Bounds(**bounds)


def test_the_program_writes_the_page_or_says_in_one_line_what_is_wrong(tmp_path):
    run = make_run(tmp_path / "run", rollouts={1: [response()]})
    for args, code, said in (
        ([run, "--out", tmp_path / "out", "--steps", 1], 0, f"wrote {tmp_path / 'out/index.html'}"),
        ([tmp_path / "none"], 2, "error: RUN = "),
    ):
        done = program("launch/report.py", *args, cwd=tmp_path)
        assert done.returncode == code and said in done.stdout and len(done.stdout.splitlines()) == 1, done.stdout


def test_the_statuses_are_the_graders():
    assert tuple(status.value for status in OF_VERIFIERS) == curves.STATUSES


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_script_shows_filters_and_opens_rollouts_and_hostile_ones_as_text(tmp_path):
    rows = [
        response(
            i, reward=float(i % 2), status="correct" if i % 2 else "wrong", text=HOSTILE if i == 3 else f"text {i}"
        )
        for i in range(60)
    ]
    path = report.write([make_run(tmp_path / "run", rollouts={1: rows})])
    steps = """
    const say = text => document.body.append(element("p", "SAID " + text));
    say(byId("count").textContent + " / " + byId("list").tBodies[0].rows.length);
    form.status.value = "correct"; apply(); say(byId("count").textContent);
    form.words.value = "onError=ALERT"; apply(); say(byId("count").textContent);
    byId("list").querySelector("button").click();
    const chosen = byId("group").querySelector(".chosen pre");
    say(byId("group").querySelectorAll("article").length + " siblings, " +
        chosen.children.length + " elements in the text, " + chosen.textContent.includes("<img src=x onerror"));
    """
    text = path.read_text()
    start = text.rindex("</script>")  # the test's steps run at the end of the page's script, whose digest they change
    text = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", text[:start] + steps + text[start:])
    path.write_text(text)
    out = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--virtual-time-budget=2000",
            "--dump-dom",
            path.as_uri(),
        ],
        text=True,
        capture_output=True,
        timeout=120,
    ).stdout
    assert re.findall("SAID (.*?)</p>", out) == [
        "responses 1 to 50 of 60 / 50",
        "responses 1 to 30 of 30",
        "responses 1 to 1 of 1",
        "60 siblings, 0 elements in the text, true",
    ]
