"""Hugging Face weights <-> Megatron shards: ONE table, read by load, export and refit.

Layouts of Megatron's sides (tp shards are equal):
    qkv      [groups, (heads/groups) q rows + k rows + v rows, head_dim] flattened; split by groups
    gate_up  each shard is its part of gate above its part of up
    vocab    rows padded to a multiple of tp; the padding is zero, never scored (logprob.py) and never exported
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from grpo_mcore.config.config import InputError, Parallel
from grpo_mcore.parallel.collectives import from_stage, start_gather
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy.model import Backbone, has_qk_norm, has_qkv_bias, head_dim, stage_of
from grpo_mcore.policy.model_folder import CHAT_TEMPLATES, INDEX, SIDE_FILES, WEIGHTS, refuse_pointer, weight_files

HEAD = "output_layer.weight"
BUFFER = "rotary_emb.inv_freq"  # old files hold it; nobody reads it, RoPE is the config's
MAX_FILE_BYTES = 5 << 30
# As the files name them.
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}

# (HF tensors, one tp rank's shard, hf_config, tp, tp_rank) -> (HF view, shard view) pairs: all the shard has of them.
Layout = Callable[..., Iterable[tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: str
    hf: dict[str, tuple[int, ...]]  # name -> shape
    layout: Layout
    stage: int  # pipeline rank that holds it


def same(hf, shard, hf_config, tp, rank):
    return [(hf[0], shard)]


def columns(hf, shard, hf_config, tp, rank):
    return [(hf[0].chunk(tp, 1)[rank], shard)]


def qkv(hf, shard, hf_config, tp, rank):
    heads, groups, size = hf_config.num_attention_heads, hf_config.num_key_value_heads, head_dim(hf_config)
    by_group = [t.view(groups, -1, *t.shape[1:]).chunk(tp)[rank] for t in hf]
    parts = shard.view(groups // tp, -1, *shard.shape[1:]).split([heads // groups * size, size, size], 1)
    return zip(by_group, parts, strict=True)


def gate_up(hf, shard, hf_config, tp, rank):
    return [(t.chunk(tp)[rank], part) for t, part in zip(hf, shard.chunk(2), strict=True)]


def vocab(hf, shard, hf_config, tp, rank):
    part = hf[0][rank * len(shard) : (rank + 1) * len(shard)]
    return [(part, shard[: len(part)])]


def table(hf_config, parallel: Parallel = Parallel(), *, transformer_engine: bool = False) -> list[Row]:
    """Every parameter of the model, in the order of its layers. Transformer Engine fuses each layer norm into the
    linear map behind it, and the parameter's name says so.

    The embedding comes behind the layers, since engines would wait for so large a tensor at the start of a refit; the
    head not right behind it, since who goes through the table holds two tensors for a moment."""
    attention_norm, mlp_norm = (
        ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if transformer_engine
        else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    )
    d, ffn, size = hf_config.hidden_size, hf_config.intermediate_size, head_dim(hf_config)
    kv_width = hf_config.num_key_value_heads * size
    heads = {"q": hf_config.num_attention_heads * size, "k": kv_width, "v": kv_width}
    vocabulary = (hf_config.vocab_size, d)

    def layer(i: int) -> Iterator[Row]:
        stage = stage_of(hf_config, i, parallel)

        def row(megatron: str, hf: dict[str, tuple[int, ...]], layout: Layout) -> Row:
            return Row(
                f"decoder.layers.{i}.{megatron}",
                {f"model.layers.{i}.{name}": shape for name, shape in hf.items()},
                layout,
                stage,
            )

        yield row(attention_norm, {"input_layernorm.weight": (d,)}, same)
        yield row(
            "self_attention.linear_qkv.weight", {f"self_attn.{x}_proj.weight": (n, d) for x, n in heads.items()}, qkv
        )
        if has_qkv_bias(hf_config):
            yield row(
                "self_attention.linear_qkv.bias", {f"self_attn.{x}_proj.bias": (n,) for x, n in heads.items()}, qkv
            )
        for x in "qk" if has_qk_norm(hf_config) else "":
            yield row(f"self_attention.{x}_layernorm.weight", {f"self_attn.{x}_norm.weight": (size,)}, same)
        yield row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (d, heads["q"])}, columns)
        yield row(mlp_norm, {"post_attention_layernorm.weight": (d,)}, same)
        yield row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": (ffn, d), "mlp.up_proj.weight": (ffn, d)}, gate_up)
        yield row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (d, ffn)}, columns)

    rows = [row for i in range(hf_config.num_hidden_layers) for row in layer(i)]
    rows.append(Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": vocabulary}, vocab, 0))
    rows.append(Row("decoder.final_layernorm.weight", {"model.norm.weight": (d,)}, same, parallel.pp - 1))
    if not hf_config.tie_word_embeddings:
        rows.append(Row(HEAD, {"lm_head.weight": vocabulary}, vocab, parallel.pp - 1))
    return rows


def _rows_of(
    chunks: Sequence[Backbone], hf_config, topology: Topology
) -> Iterator[tuple[Row, torch.nn.Parameter | None]]:
    """The table beside this rank's parameters (None: another stage's); a name that only one of them has is an error."""
    parameters = {chunk.global_name(name): p for chunk in chunks for name, p in chunk.named_parameters()}
    fused = any(name.endswith("linear_fc1.layer_norm_weight") for name in parameters)
    rows = table(hf_config, topology.parallel, transformer_engine=fused)
    # The last of several stages has a copy of a tied matrix.
    if hf_config.tie_word_embeddings and (copy := parameters.pop(HEAD, None)) is not None:
        yield Row(HEAD, next(row.hf for row in rows if row.layout is vocab), vocab, topology.pp_rank), copy
    mine = {row.megatron for row in rows if row.stage == topology.pp_rank}
    if mine != set(parameters):
        raise RuntimeError(f"the weight table and the Megatron model differ in {sorted(mine ^ set(parameters))}")
    for row in rows:
        yield row, parameters.get(row.megatron)


@torch.no_grad()
def load(chunks: Sequence[Backbone], hf_config, folder: str | Path, topology: Topology) -> None:
    """Fills the chunks with their shards of the folder's weights, one tensor at a time, converted to the parameters'
    dtype.

    Raises InputError naming every missing, extra or misshapen tensor.
    """
    with Reader(folder) as reader:
        reader.check_names({name for row in table(hf_config) for name in row.hf}, tied=hf_config.tie_word_embeddings)
        for row, parameter in _rows_of(chunks, hf_config, topology):
            if parameter is not None:
                whole = [reader.read(name, shape) for name, shape in row.hf.items()]
                if row.layout is vocab:
                    parameter.zero_()
                for hf, shard in row.layout(whole, parameter, hf_config, topology.tp, topology.tp_rank):
                    shard.copy_(hf)


@torch.no_grad()
def export(
    chunks: Sequence[Backbone],
    hf_config,
    topology: Topology,
    *,
    into: Callable[[str], torch.Tensor | None] = lambda name: None,
    dtype: torch.dtype | None = None,
    everywhere: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, whole tensor) one after the other, in layer order, on the driver; `everywhere`: on every rank.

    A tensor is written to into(name), contiguous and of `dtype` (None: the parameters'), or, where that is None, to
    memory of its own, which may be the parameter itself. The next parameter is gathered over tp meanwhile. Collective
    over the driver's replica (or all), whose ranks must all iterate; where nothing is delivered it is empty.
    """
    if not (everywhere or topology.in_driver_replica):
        return
    delivers = everywhere or topology.is_driver
    first = next(chunks[0].parameters())
    dtype = dtype or first.dtype
    rows = [
        (row, p)
        for row, p in _rows_of(chunks, hf_config, topology)
        if row.megatron != HEAD or not hf_config.tie_word_embeddings
    ]

    def gather(index: int) -> Callable[[], list[torch.Tensor]] | None:
        parameter = rows[index][1] if index < len(rows) else None
        return None if parameter is None else start_gather(parameter.detach(), topology)

    following = gather(0)
    for index, (row, _) in enumerate(rows):
        arrival, following = following, gather(index + 1)
        shards = arrival() if arrival else None
        if topology.tp_rank and not everywhere:
            continue
        given = [into(name) if delivers else None for name in row.hf]
        if shards and len(shards) == len(given) == 1 and given[0] is None and shards[0].dtype == dtype:
            tensors = shards
        else:
            tensors = [
                torch.empty(shape, dtype=dtype, device=first.device) if t is None else t
                for t, shape in zip(given, row.hf.values(), strict=True)
            ]
            for rank, shard in enumerate(shards or ()):
                for hf, part in row.layout(tensors, shard, hf_config, topology.tp, rank):
                    hf.copy_(part)
        for name, tensor in zip(row.hf, tensors, strict=True):
            from_stage(tensor, row.stage, topology)
            if delivers:
                yield name, tensor


def groups(hf_config) -> list[dict[str, tuple[int, ...]]]:
    """HF name -> shape of what `export` yields, in its order: those of one parameter after those of another."""
    return [row.hf for row in table(hf_config)]


def shapes(hf_config) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of what `export` yields, in its order."""
    return {name: shape for group in groups(hf_config) for name, shape in group.items()}


def check(folder: str | Path, hf_config) -> None:
    """Names, shapes and dtypes of a folder's weights, without reading a tensor but a head that may be tied. Raises
    InputError."""
    expected = shapes(hf_config)
    with Reader(folder) as reader:
        reader.check_names(set(expected), tied=hf_config.tie_word_embeddings)
        for name, shape in expected.items():
            part = reader.where[name].get_slice(name)
            reader.check_shape(name, tuple(part.get_shape()), shape)
            if part.get_dtype() not in SAFETENSORS_DTYPES.values():
                raise InputError(
                    "model",
                    str(folder),
                    f"{name} is of {part.get_dtype()}, and weights are of {', '.join(SAFETENSORS_DTYPES.values())}",
                    "name the model that it was quantised from, or convert it",
                )


def _opened(file: Path):
    try:
        refuse_pointer(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise InputError(
            "model",
            str(file),
            f"is no safetensors file ({' '.join(str(e).split())})",
            "copy it again from where the model came from: it is cut, or another file",
        ) from None


class Reader:
    """The tensors of a folder's safetensors files, by name, without loading the files whole."""

    def __init__(self, folder: str | Path):
        """Raises InputError for a file that is none, or not the one that the index means; and for a tensor that stands
        in two."""
        self.folder = Path(folder)
        self.where: dict[str, Any] = {}
        for path, placed in weight_files(folder, str(folder)).items():
            file = _opened(path)
            names = set(file.keys())
            if lacking := placed - names:
                raise InputError(
                    "model", str(path), f"lacks {min(lacking)}, which {INDEX} places there", "copy the folder again"
                )
            names = {name for name in names if not name.endswith(BUFFER)}
            if twice := names & set(self.where):
                raise InputError(
                    "model", str(path), f"has {min(twice)}, and so has another file", "copy the folder again"
                )
            self.where |= dict.fromkeys(names, file)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc) -> None:
        self.where.clear()

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Raises InputError if the tensor has not the shape given."""
        tensor = self.where[name].get_tensor(name)
        if shape is not None:
            self.check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def check_shape(self, name: str, seen: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if seen != wanted:
            raise InputError(
                f"tensor {name}",
                seen,
                f"must have shape {wanted}",
                f"mend {self.folder}: its config.json and its weights disagree",
            )

    def dtype(self) -> torch.dtype:
        """The one dtype of all tensors. Raises InputError if they differ."""
        kinds = {file.get_slice(name).get_dtype() for name, file in self.where.items()}
        found = [dtype for dtype, kind in SAFETENSORS_DTYPES.items() if {kind} == kinds]
        if not found:
            raise InputError(
                "model",
                str(self.folder),
                f"its tensors are of {', '.join(sorted(kinds))}",
                f"save it in one of {', '.join(SAFETENSORS_DTYPES.values())}",
            )
        return found[0]

    def check_names(self, expected: set[str], *, tied: bool) -> None:
        have, head, embedding = set(self.where), "lm_head.weight", "model.embed_tokens.weight"
        if tied and head in have and torch.equal(self.read(head), self.read(embedding)):
            have.remove(head)  # some savers write the tied matrix twice
        for names, word in ((expected - have, "is missing"), (have - expected, "is one too many")):
            if names:
                shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise InputError(
                    "model",
                    str(self.folder),
                    f"{shown} {word}",
                    "give the folder whose config.json belongs to these weights",
                )


def save_folder(
    folder: str | Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    side_files_from: str | Path,
    *,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    """Writes a Hugging Face folder: the tensors, in files of at most MAX_FILE_BYTES, and the side files of another
    folder.

    `shapes` foretells the tensors, in their order, all of `dtype`: each goes to its place in its file as it comes, and
    no two are held. The folder appears whole or not at all.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = {name: dtype.itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    parts: list[list[str]] = [[]]
    for name in shapes:
        if parts[-1] and sum(size[n] for n in parts[-1]) + size[name] > MAX_FILE_BYTES:
            parts.append([])
        parts[-1].append(name)
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [WEIGHTS]
    for part, file in zip(parts, files, strict=True):
        with (partial / file).open("wb") as f:
            place = _write_header(f, {name: shapes[name] for name in part}, size, dtype)
            for expected, (name, tensor) in zip(part, tensors, strict=False):  # the rest is for the next file
                if (name, tuple(tensor.shape), tensor.dtype) != (expected, shapes[expected], dtype):
                    raise RuntimeError(
                        f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {expected} {shapes[expected]} "
                        f"{dtype} was foretold"
                    )
                f.seek(place.pop(name))
                f.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            if place:
                raise RuntimeError(f"{next(iter(place))} was foretold and did not come")
    if len(parts) > 1:
        weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=1))
    copy_side_files(side_files_from, partial)
    _say_dtype(partial / "config.json", dtype)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _write_header(f, shapes: dict[str, tuple[int, ...]], size: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """The head of a safetensors file (https://huggingface.co/docs/safetensors, "Format"), and each tensor's place in
    it, sorted by name."""
    kind, starts, end = SAFETENSORS_DTYPES[dtype], {}, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for name in sorted(shapes):
        starts[name], end = end, end + size[name]
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Config, tokenizer and chat templates of a model folder. Of its other folders nothing: no reader looks there, and
    a run may have its own in it."""
    for pattern in (*SIDE_FILES, CHAT_TEMPLATES):
        for f in Path(source).glob(pattern):
            if not f.name.endswith(".index.json") and f.is_file():
                place = Path(target) / f.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(f, place)


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """In config.json, by the key that it has: who follows it would round the tensors."""
    written = json.loads(path.read_text())
    for key in [key for key in ("dtype", "torch_dtype") if key in written] or ["dtype"]:
        written[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(written, indent=2) + "\n")
