"""The optimizer's state in a checkpoint: its boxes, and Megatron's own reading and writing of the same.

Not covered here: that training goes on as if it had not stopped, in any layout (test_checkpoint.py).
"""

import math

import pytest
import torch
from megatron.core import dist_checkpointing

from grpo_mcore.checkpoint import checkpoint, optimizer_state
from grpo_mcore.checkpoint.optimizer_state import boxes_of
from grpo_mcore.parallel import topology
from tests.dist import spawn
from tests.policy.test_policy import batch_of, connect, make_policy, on_policy_update

GATHERED = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 3, 4), (2, 3, 2)], ids=str)
def test_the_boxes_of_any_run_of_a_flattened_tensor_are_its_elements_in_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel()):
        for end in range(start + 1, whole.numel() + 1):
            boxes = list(boxes_of(start, end, shape))
            parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in boxes]
            assert [part.shape for part in parts] == [size for _, size in boxes]
            assert torch.cat([part.flatten() for part in parts]).tolist() == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1


def shares(folder: str) -> tuple[int, int]:
    """Elements of this rank's boxes, and of all parameters."""
    topo = connect()
    policy = make_policy(folder, topo)
    on_policy_update(policy, batch_of(topo, max_tokens=100))
    held = sum(x.data.numel() for x in optimizer_state._boxes(policy, checkpoint._weights(policy)))
    topology.disconnect()
    return held, sum(p.numel() for p in policy.chunks[0].parameters())


def test_a_data_rank_writes_and_reads_its_own_share_and_no_more(model_folders):
    (first, num_parameters), (second, _) = spawn(shares, 2, model_folders["qwen2_tied"])
    assert first + second == 3 * num_parameters  # main weights and two moments
    assert abs(first - second) < 0.01 * num_parameters  # a buffer is padded at its end


def states(policy) -> list[torch.Tensor]:
    return [x.data.clone() for x in optimizer_state._boxes(policy, checkpoint._weights(policy))]


def test_megatron_reads_what_is_written_here_and_the_other_way_round(model_folders, tmp_path):
    topo = connect()
    folder = model_folders["qwen2_tied"]
    trained = make_policy(folder, topo, dtype="bfloat16")
    for seed in (1, 2):
        on_policy_update(trained, batch_of(topo, max_tokens=100, seed=seed))
    weights = checkpoint._weights(trained)

    (tmp_path / "ours").mkdir()
    dist_checkpointing.save({"optimizer": optimizer_state.sharded(trained, weights)}, tmp_path / "ours")
    theirs = make_policy(folder, topo, dtype="bfloat16")
    template = theirs.optimizer.sharded_state_dict(
        checkpoint._weights(theirs), is_loading=True, metadata=dict(GATHERED)
    )
    theirs.optimizer.load_state_dict(dist_checkpointing.load({"optimizer": template}, tmp_path / "ours")["optimizer"])
    assert all(map(torch.equal, states(theirs), states(trained)))

    (tmp_path / "theirs").mkdir()
    whole = trained.optimizer.sharded_state_dict(weights, metadata=dict(GATHERED))
    dist_checkpointing.save({"optimizer": whole}, tmp_path / "theirs")
    ours = make_policy(folder, topo, dtype="bfloat16")
    template = optimizer_state.to_fill(ours, checkpoint._weights(ours))
    loaded = dist_checkpointing.load({"optimizer": template}, tmp_path / "theirs")
    optimizer_state.finish_loading(ours, loaded["optimizer"])
    assert all(map(torch.equal, states(ours), states(trained)))
    assert ours.optimizer.param_groups[0]["step"] == theirs.optimizer.param_groups[0]["step"] == 2
    topology.disconnect()
