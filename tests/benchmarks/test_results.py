"""benchmarks/RESULTS.md: made of the results as they are, which say what they depend on."""

import json

import pytest

from benchmarks import results

OLD = {"kill_resume.json"}  # from before all programs recorded this


def test_no_page_is_stale():
    assert (results.HERE / "RESULTS.md").read_text() == results.page(), "run python benchmarks/results.py"
    written = results.GPU_PAGE.read_text()
    assert written == results.gpu_page(written), "run python benchmarks/results.py"


def test_what_was_seen_on_which_gpu_stands_in_one_row(tmp_path):
    assert results.seen_on_gpus(tmp_path) == "Nothing yet."
    steps = [{"name": "versions", "status": "ok"}, {"name": "refit", "status": "timed out", "reason": "x"}]
    gpu = {"gpu": "H100", "gpus": 1, "cuda": "13.0"}
    result = {"date": "2026-11-22", "git_commit": "0123456789abcdef", "hardware": gpu, "versions": {}, "steps": steps}
    (tmp_path / "gpu_acceptance.json").write_text(json.dumps(result))
    assert results.seen_on_gpus(tmp_path).splitlines()[-1] == (
        "| 2026-11-22 | `0123456789ab` | 1 x H100 (CUDA 13.0) | not recorded | versions | refit (timed out) |"
    )


@pytest.mark.parametrize("path", sorted((results.HERE / "results").glob("*.json")), ids=lambda path: path.name)
def test_a_result_says_what_it_depends_on(path):
    result = json.loads(path.read_text())
    assert "command" in result and ({"date", "git_commit", "hardware", "versions"} <= result.keys() or path.name in OLD)


def test_what_figures_depend_on_is_said_and_nothing_invented():
    gpus = {"gpu": "H100", "gpus": 2, "cuda": "13.0", "cpu": "Xeon", "cores": 16, "memory_gib": 128.0}
    clean = {"date": "2026-11-22", "git_commit": "0123456789abcdef", "hardware": gpus, "versions": {"torch": "2.13.0"}}
    hardware = "2 x H100 (CUDA 13.0), Xeon, 16 cores, 128.0 GiB"
    assert results.depends_on(clean)[1] == ["2026-11-22", "`0123456789ab`", hardware, "torch 2.13.0"]
    dirty = results.depends_on(clean | {"git_commit": "0123456789abcdef-dirty"})[1]
    assert dirty[1] == "`0123456789ab`, with uncommitted changes"
    assert results.depends_on({})[1] == ["not recorded"] * 4
    assert results.depends_on({"git_commit": "unknown", "num_cpus": 2})[1][1:3] == ["not recorded", "2 cores"]


def test_a_file_of_no_known_program_is_refused():
    with pytest.raises(ValueError, match=r"x\.json: command = 'python other\.py': must name one of end_to_end, "):
        results.section("x.json", {"command": "python other.py"})


def test_a_case_without_figures_is_shown_as_that():
    command = {"command": "python benchmarks/kernels.py"}
    skipped = {"implementation": "verl", "rows": 4096, "vocabulary": 75968, "status": "skipped", "reason": "x"}
    assert "| verl | 4,096 | 75,968 | skipped |" in results.section("k.json", command | {"results": [skipped]})
    command = {"command": "torchrun --nproc-per-node 2 benchmarks/train_step.py"}
    skipped = {"precision": "fp8-delayed", "sequence_tokens": 1024, "status": "skipped", "reason": "x"}
    assert "| fp8-delayed | 1,024 | skipped |" in results.section("t.json", command | {"results": [skipped]})
