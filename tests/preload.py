"""What the process that the others are forked from imports: everything heavy, and nothing that starts a thread."""

import gc
import warnings

warnings.filterwarnings("ignore")

import pytest  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401

import tests.models  # noqa: E402, F401

gc.freeze()  # a collection in a child would copy every page
