"""What `model` names becomes a whole folder: from a hub (a stand-in on this machine), its cache, a folder, a GGUF.

Each process that asks the hub is a new one: its library reads the environment as it is imported.

Not covered here: the real hub, its storage of large files (xet), a cache that several nodes share.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.policy import model_folder
from tests.dist import environment
from tests.hub import Hub

NAME = "owner/tiny"
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
ASK = """
import sys
from grpo_mcore.config.config import InputError
from grpo_mcore.policy import model_folder
try:
    print("folder", model_folder.local_folder(sys.argv[1], timeout_s=float(sys.argv[2])))
except InputError as e:
    sys.exit(f"error: {e}")
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    arithmetic.make_model(folder, seed=0)
    return folder


@pytest.fixture
def hub(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "hub/models" / NAME)
    (tmp_path / "hub/models" / NAME / "onnx").mkdir()
    for name in ("onnx/config.json", "README.md", "pytorch_model.bin"):
        (tmp_path / "hub/models" / NAME / name).write_text("{}")
    with Hub(tmp_path / "hub").serve() as served:
        yield served


def start(hub: Hub, home: Path, name: str = NAME, timeout_s: float = 60, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ASK, name, str(timeout_s)],
        env=environment(**{**hub.environment(home), **env}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[Path | None, str]:
    """(the folder, all that was printed)"""
    out, error = process.communicate(timeout=60)
    assert "Traceback" not in error, error
    found = [line.removeprefix("folder ") for line in out.splitlines() if line.startswith("folder ")]
    assert bool(found) == (process.returncode == 0)
    return Path(found[0]) if found else None, out + error


def refusal(hub: Hub, home: Path, **kwargs) -> str:
    folder, said = end(start(hub, home, **kwargs))
    assert folder is None, folder
    return said


def test_an_empty_cache_gets_the_whole_snapshot_once_and_the_hub_is_not_asked_again(hub, tmp_path, tiny):
    folder, _ = end(start(hub, tmp_path / "home"))
    assert sorted(os.listdir(folder)) == FILES  # not the other forms of the model
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in FILES)
    asked = hub.asked
    assert end(start(hub, tmp_path / "home"))[0] == folder == end(start(hub, tmp_path / "home", HF_HUB_OFFLINE="1"))[0]
    assert hub.asked == asked


def test_of_processes_that_start_at_once_one_fetches_and_the_others_wait(hub, tmp_path):
    asked = [start(hub, tmp_path / "home") for _ in range(3)]
    seen = [end(process) for process in asked]
    assert len({folder for folder, _ in seen}) == 1
    assert sum("it is fetched from the hub" in said for _, said in seen) == 1
    assert [hub.fetched[f"{NAME}/{name}"] for name in FILES] == [1] * len(FILES)


def test_a_process_that_ends_while_it_fetches_leaves_the_fetching_to_the_others(hub, tmp_path):
    hub.silent.set()
    first = start(hub, tmp_path / "home")
    while "fetched from the hub" not in first.stdout.readline():
        assert first.poll() is None
    first.kill()
    first.wait()
    hub.silent.clear()
    assert end(start(hub, tmp_path / "home"))[0] is not None


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_cache_that_lacks_a_file_is_completed_and_offline_it_is_refused(hub, tmp_path, lost):
    folder, _ = end(start(hub, tmp_path / "home"))
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    said = refusal(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert f"model = '{NAME}': is neither a folder nor a hub name that can be reached" in said
    assert "offline mode is enabled" in said
    assert sorted(os.listdir(end(start(hub, tmp_path / "home"))[0])) == FILES
    assert hub.fetched[f"{NAME}/{lost}"] == 2 and sum(hub.fetched.values()) == len(FILES) + 1


def test_a_file_that_is_broken_in_the_cache_is_named_without_asking_the_hub(hub, tmp_path):
    folder, _ = end(start(hub, tmp_path / "home"))
    asked = hub.asked
    (folder / "tokenizer.json").resolve().write_text("{")
    for offline in ("0", "1"):
        said = refusal(hub, tmp_path / "home", HF_HUB_OFFLINE=offline)
        assert f"model = '{folder / 'tokenizer.json'}': is not valid JSON" in said
    assert hub.asked == asked


def test_a_cache_that_another_program_filled_in_part_is_completed(hub, tmp_path, tiny):
    """As `hf_hub_download(NAME, "config.json")` leaves it: without a list of what there is."""
    get = f"import huggingface_hub; huggingface_hub.hf_hub_download({NAME!r}, 'config.json')"
    env = environment(**hub.environment(tmp_path / "home"))
    subprocess.run([sys.executable, "-c", get], env=env, check=True, timeout=60)
    assert "that can be reached (Offline" in refusal(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert sorted(os.listdir(end(start(hub, tmp_path / "home"))[0])) == FILES


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("tokenizer.json", "has no tokenizer (tokenizer.json, or vocab.json and merges.txt, or tokenizer.model)"),
        ("model.safetensors", "has no model.safetensors"),
        ("config.json", "has no config.json"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_what_it_lacks_on_the_hub_and_on_disk(hub, tmp_path, lost, words):
    served = tmp_path / "hub/models" / NAME
    (served / lost).unlink()
    assert f"error: model = '{NAME}': {words}. Remedy: " in refusal(hub, tmp_path / "home")
    with pytest.raises(InputError) as e:
        model_folder.local_folder(str(served))
    assert str(e.value).startswith(f"model = '{served}': {words}. Remedy: ")


def test_a_part_of_the_weights_that_their_index_names_is_missed(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {f"tensor_{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (folder / model_folder.INDEX).write_text(f'{{"weight_map": {parts}}}'.replace("'", '"'))
    with pytest.raises(InputError, match="has no model-00002-of-00002.safetensors"):
        model_folder.local_folder(str(folder))


def test_a_hub_that_does_not_know_the_name_is_gone_or_is_silent_is_said_in_one_line(hub, tmp_path):
    home = tmp_path / "home"
    assert "model = 'owner/other': is neither a folder nor a hub name that can be reached (Repo" in refusal(
        hub, home, name="owner/other"
    )
    hub.silent.set()
    assert f"model = '{NAME}': did not come from the hub within 1 s. Remedy: look at the network" in refusal(
        hub, home, timeout_s=1
    )
    gone = Hub(tmp_path / "hub")
    with gone.serve():
        pass
    said = refusal(gone, home)
    assert f"model = '{NAME}': is neither a folder nor a hub name that can be reached (ConnectError" in said


def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(tmp_path):
    for name in (str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(InputError, match="is neither a folder nor a hub name"):
            model_folder.local_folder(name)
        with pytest.raises(InputError, match="is neither a folder nor a hub name"):
            model_folder.config_folder(name)


def test_planning_needs_the_config_alone(hub, tmp_path):
    ask = ASK.replace("local_folder(sys.argv[1], timeout_s=float(sys.argv[2]))", "config_folder(sys.argv[1])")
    assert ask != ASK
    env = environment(**hub.environment(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", ask, NAME], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {name for name, n in hub.fetched.items() if n} == {f"{NAME}/config.json"}


BROKEN = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n",
        "is Git LFS's pointer to a file",
    ),
    "nothing": (b"", "is empty"),
    "cut": (b'{"a": ', "is not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    "list": (b"[]", "is no JSON object"),
    "deep": (b"[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", model_folder.READ)
def test_a_file_that_decides_on_tokens_or_the_model_and_is_broken_is_named(tmp_path, tiny, name, case):
    contents, words = BROKEN[case]
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / name).write_bytes(contents)
    if case in ("pointer", "nothing") or name.endswith(".json"):
        with pytest.raises(InputError, match=f"model = '{folder / name}': {words}"):
            model_folder.local_folder(str(folder))
    else:
        model_folder.local_folder(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "m.gguf"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, tiny, name):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")  # which nobody reads from its start, root neither
    with pytest.raises(InputError, match=f"model = '{folder / name}': cannot be read"):
        model_folder.local_folder(str(folder / name if name == "m.gguf" else folder), tmp_path / "cache")


@pytest.mark.parametrize("contents", ["{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'])
def test_a_tokenizer_that_is_another_json_is_one_line_with_its_files(tmp_path, tiny, contents):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "tokenizer.json").write_text(contents)
    with pytest.raises(InputError, match=r"cannot be read.*Remedy: copy .*: tokenizer.json, tokenizer_config.json"):
        prompts.Tokenizer(str(folder))


@pytest.mark.parametrize(
    ("index", "other", "words"),
    [
        (True, "model.safetensors", "has model.safetensors beside model.safetensors.index.json"),
        (True, "consolidated.safetensors", None),  # nobody reads what the index does not name
        (False, "model-00001-of-00002.safetensors", "has model-00001-of-00002.safetensors beside model.safetensors"),
        (False, "adapter_config.json", "has adapter_config.json: an adapter is not applied"),
        (False, "hf_quant_config.json", "has hf_quant_config.json: quantised weights are not trained"),
    ],
)
def test_weights_that_another_reader_would_take_instead_are_refused(tmp_path, tiny, index, other, words):
    folder = shutil.copytree(tiny, tmp_path / "m")
    if index:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / model_folder.INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}')
    model_folder.local_folder(str(folder))
    (folder / other).write_text("{}")
    if words is None:
        model_folder.local_folder(str(folder))
        return
    with pytest.raises(InputError, match=words):
        model_folder.local_folder(str(folder))


def test_chat_templates_in_their_folder_are_fetched_with_the_model(hub, tmp_path):
    template = tmp_path / "hub/models" / NAME / "additional_chat_templates/tool.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    folder, _ = end(start(hub, tmp_path / "home"))
    assert (folder / "additional_chat_templates/tool.jinja").read_text() == "{{ messages }}"
    assert not (folder / "onnx").exists()
