"""Weights straight into a model of vLLM's.

Not covered here: whole models, which real engines load (test_refit.py).
"""

import torch

from grpo_mcore.refit.weight_transfer import TensorInfo, free_port
from tests.dist import spawn


def rows_of_a_padded_embedding() -> list[list[float]]:
    """Those of 91 that stand in 128: before, when the live weights were made, and when an update begins."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from grpo_mcore.refit.live_weights import LiveWeights

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = VocabParallelEmbedding(91, 8, params_dtype=torch.float32)

        def load_weights(self, weights):
            for _, tensor in weights:
                self.embedding.weight.weight_loader(self.embedding.weight, tensor)

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port('127.0.0.1')}", 0, "gloo")
        initialize_model_parallel()
        model = Model()
    weight = model.embedding.weight.data.fill_(7.0)
    live = LiveWeights.of(model, [TensorInfo("embedding.weight", torch.float32, (91, 8))])
    seen = [weight.sum(1).tolist()]
    live.begin()
    return [*seen, weight.sum(1).tolist()]


def test_weights_that_a_sleeping_engine_does_not_have_are_not_touched_before_an_update_begins():
    ((made, begun),) = spawn(rows_of_a_padded_embedding, 1)
    assert made == [56.0] * 128
    assert begun == [56.0] * 91 + [0.0] * 37
