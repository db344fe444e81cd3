"""Proof of an export: a Hugging Face folder holds what the policy of a checkpoint was, and Hugging Face's model
computes with it what the trainer's does.

1. Each part of the weights, as a rank held it when the checkpoint was saved, has the digest that attest.json keeps: of
   the same part cut from the folder's tensors. This goes from the folder to the live weights, past the checkpoint's own
   tensors.
2. Log-probs of a few fixed sequences by transformers and by the trainer's model (its log-prob pass, as in training)
   agree. Both are in float32 on a CPU, one after the other: what is compared is the model, not the rounding of a
   precision.
"""

import gc
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from grpo_mcore.checkpoint import convert
from grpo_mcore.checkpoint.stored import digest, file_digest
from grpo_mcore.config import config
from grpo_mcore.loss import batch
from grpo_mcore.parallel import topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.policy import FrozenPolicy
from grpo_mcore.types import Prompt, Response

NUM_SEQUENCES, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 16, 48
TOLERANCE = 1e-3  # of a log-prob: float32 sums in another order differ by 1e-5 or so, a wrong weight by far more


class ParityError(config.RunError):
    """An exported folder is not the policy of its checkpoint."""


def prove(checkpoint: str | Path, hf_folder: str | Path, out: str | Path | None = None) -> dict:
    """The proof's numbers, also to the JSON file `out`. On one rank; holds one model at a time. Raises InputError,
    ParityError."""
    num_parts = compare_weights(checkpoint, hf_folder)
    sequences = fixed_sequences(model.load_hf_config(str(hf_folder)).vocab_size)
    theirs = hf_logprobs(hf_folder, sequences)
    gc.collect()
    ours = policy_logprobs(hf_folder, sequences)
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise ParityError(
            f"{hf_folder}: log-probs of the same tokens by transformers and by the trainer differ by {error:.3g}, "
            f"where {TOLERANCE:g} is allowed"
        )
    proof = {
        "checkpoint": str(checkpoint),
        "hf": str(hf_folder),
        "equal_parts": num_parts,
        "tokens": len(ours),
        "logprob_abs_max_error": error,
        "mean_logprob": theirs.mean().item(),
        "digest": folder_digest(hf_folder),
    }
    print(
        f"{hf_folder} is the policy of {checkpoint}: {num_parts} parts of the weights have its digests, and the "
        f"log-probs of {len(ours)} tokens agree to {error:.1g}",
        flush=True,
    )
    if out:
        Path(out).write_text(json.dumps(proof, indent=1) + "\n")
    return proof


def compare_weights(checkpoint: str | Path, hf_folder: str | Path) -> int:
    """How many parts of the weights the checkpoint attests; all are compared, and all of the folder's weights are
    compared with one. Holds one Megatron parameter. Raises InputError, ParityError."""
    parts = convert.attested(checkpoint)
    num_parts = sum(map(len, parts.values()))
    hf_config = model.load_hf_config(str(hf_folder))
    hf_weights.check(hf_folder, hf_config)
    with hf_weights.Reader(hf_folder) as reader:
        said, dtype = getattr(hf_config, "dtype", None), reader.dtype()
        if said not in (None, dtype):
            raise ParityError(
                f"{hf_folder}: its config.json says {said}, and its tensors are {dtype}: a reader that follows it "
                f"rounds them"
            )
        rows = hf_weights.table(hf_config, transformer_engine=True)
        for row in rows:
            key, layer = convert.key_of(row)
            whole = convert.merged(row, [reader.read(name, shape) for name, shape in row.hf.items()], hf_config)
            covered = 0
            of_row = parts.pop((key, layer), ())
            if (offset := convert.differing(whole, of_row)) is not None:
                raise ParityError(
                    f"{hf_folder}: {', '.join(row.hf)} is not what the policy held when {checkpoint} was saved "
                    f"(its part at {offset})"
                )
            for offset, shape, _ in of_row:
                covered += max(min(len(whole) - offset[0], shape[0]), 0) * torch.Size(shape[1:]).numel()
            if covered != whole.numel():
                raise ParityError(
                    f"{checkpoint} attests {covered} of the {whole.numel()} elements of {', '.join(row.hf)}"
                )
    if parts:
        raise ParityError(f"{hf_folder} lacks what {checkpoint} holds: {', '.join(sorted(key for key, _ in parts))}")
    return num_parts


def fixed_sequences(vocab_size: int) -> list[tuple[int, ...]]:
    """Random tokens, the same for the same vocabulary."""
    rng = random.Random("parity")
    return [
        tuple(rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS + RESPONSE_TOKENS)) for _ in range(NUM_SEQUENCES)
    ]


@torch.no_grad()
def hf_logprobs(folder: str | Path, sequences: list[tuple[int, ...]]) -> torch.Tensor:
    """float32 [sequences * RESPONSE_TOKENS], each sequence alone."""
    # config.json may name an attention that no CPU has.
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out = []
    for tokens in sequences:
        logits = hf(torch.tensor([tokens]), logits_to_keep=RESPONSE_TOKENS + 1).logits[0, :-1]
        out.append(logits.float().log_softmax(-1).gather(1, torch.tensor(tokens[PROMPT_TOKENS:])[:, None])[:, 0])
    return torch.cat(out)


def policy_logprobs(folder: str | Path, sequences: list[tuple[int, ...]]) -> torch.Tensor:
    """float32 [sequences * RESPONSE_TOKENS], packed."""
    topo = topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=600, seed=0)
    policy = FrozenPolicy(str(folder), topo, precision=config.Precision(params="float32"), temperature=1.0)
    samples = [
        batch.Sample(
            Prompt(i, "", "", s[:PROMPT_TOKENS]),
            Response(s[PROMPT_TOKENS:], (0.0,) * RESPONSE_TOKENS, truncated=False),
            0.0,
        )
        for i, s in enumerate(sequences)
    ]
    logprobs_R = policy.logprobs_everywhere(batch.microbatch(samples, [1.0] * len(samples)), temperature=1.0)
    topology.disconnect()
    return logprobs_R


def folder_digest(folder: str | Path) -> str:
    """Of a Hugging Face folder's weights and config.json, file by file."""
    files = sorted([*Path(folder).glob("*.safetensors"), Path(folder) / "config.json"])
    listing = "".join(f"{f.name} {file_digest(f)}\n" for f in files)
    return digest(torch.frombuffer(bytearray(listing.encode()), dtype=torch.uint8))
