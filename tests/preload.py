"""What the process that the others are forked from imports: everything heavy, and nothing that starts a thread."""

# ruff: noqa: E402, F401
import gc
import warnings

warnings.filterwarnings("ignore")

import pytest
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3

import tests.models

gc.freeze()  # a collection in a child would copy every page
