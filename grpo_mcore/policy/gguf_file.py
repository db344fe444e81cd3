"""A GGUF file becomes a Hugging Face folder, or is refused: transformers, which reads it, leaves out without a word
fields and tensors that it does not know, and draws at random the weights that are not there.
"""

import shutil
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, modeling_gguf_pytorch_utils

from grpo_mcore.config.config import InputError
from grpo_mcore.policy.families import FAMILIES

# Fields of the model that say what its tensors say, or nothing of what is computed.
WITHOUT_EFFECT = {"attention.key_length", "attention.value_length", "tensor_data_layout"}
ROPE_FREQUENCIES = "rope_freqs.weight"
REMEDY = "name the Hugging Face folder that the file was made of"


def dequantise(gguf: Path, folder: Path) -> None:
    """Raises InputError for what cannot be read, and for what would not be."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader = _checked(gguf)
            hf, loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
            _check_tensors(gguf, reader, hf, loaded["missing_keys"])
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except InputError:
            raise
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


def _checked(gguf: Path):
    """Its reader, if its fields are those that transformers reads. Raises InputError."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    values = {name: field.contents() for name, field in reader.fields.items()}
    family = str(values["general.architecture"])
    if family not in FAMILIES:
        raise InputError(
            "model", str(gguf), f"is of a {family}; this trains {', '.join(FAMILIES)}", "choose a model of these"
        )
    read = {f"{family}.{name}" for name in modeling_gguf_pytorch_utils.GGUF_CONFIG_MAPPING[family]}
    read |= {f"{family}.{name}" for name in WITHOUT_EFFECT}
    for name, value in values.items():
        is_unread = name.startswith(f"{family}.") and name not in read and value not in (0, "none")
        if is_unread or (name == "split.count" and value > 1):
            raise InputError("model", str(gguf), f"has {name} = {value!r}, which is not read", REMEDY)
    return reader


def _check_tensors(gguf: Path, reader, hf, missing: set[str]) -> None:
    read = modeling_gguf_pytorch_utils
    processor = read.TENSOR_PROCESSORS.get(hf.config.model_type, read.TensorProcessor)(config=hf.config.to_dict())
    known = read.get_gguf_hf_weights_map(hf, processor)
    for tensor in reader.tensors:
        # Of Llama 3's RoPE; all 1, it is the plain one.
        if tensor.name not in known and not (tensor.name == ROPE_FREQUENCIES and (tensor.data == 1).all()):
            raise InputError("model", str(gguf), f"has a tensor {tensor.name}, which is not read", REMEDY)
    if missing := missing - set(hf.all_tied_weights_keys):
        raise InputError("model", str(gguf), f"lacks {', '.join(sorted(missing)[:5])}", "copy the file again")
