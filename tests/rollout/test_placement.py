"""Where engines come to stand, by Ray's own resources: two nodes of 2 GPUs that only Ray believes in.

Not covered here: GPUs; and the engines that then stand there.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.rollout import placement
from grpo_mcore.rollout.placement import engine_gpus
from tests.dist import environment, spawn

SLURMS = "6,7"  # what SLURM gives a job that has a part of a node


@pytest.fixture(scope="module")
def two_nodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the tests' own, which hides all
        yield from nodes()


def nodes():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    cluster.add_node(num_cpus=2, num_gpus=2, env_vars={"CUDA_VISIBLE_DEVICES": SLURMS})
    ray.init(cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield
    ray.shutdown()
    cluster.shutdown()


class Probe:
    """In an engine's place."""

    async def stands(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]


def reserved(start_timeout_s: float = 600, **keys):
    return placement.reserve(config.Engine(start_timeout_s=start_timeout_s, **keys), cuda=True)


def stand(**keys) -> list[list[str]]:
    """The GPUs of each engine, node by node."""
    group = reserved(**keys)
    probes = [placement.in_bundle(Probe, group, i, {}).remote() for i in range(group.bundle_count)]
    nodes: dict[str, list[str]] = {}
    for node, gpus in ray.get([probe.stands.remote() for probe in probes], timeout=120):
        nodes.setdefault(node, []).append(",".join(sorted(gpus.split(","))))
    for probe in probes:
        ray.kill(probe)
    remove_placement_group(group)
    return sorted(nodes.values())


def test_each_engine_has_gpus_of_its_own_on_one_node_in_order_and_those_that_slurm_gave(two_nodes):
    assert stand(num_engines=4) == [["0", "1"], ["6", "7"]]
    assert stand(num_engines=2, tp=2) == [["0,1"], ["6,7"]]


def test_engines_that_fit_on_one_node_stand_on_one(two_nodes):
    group = reserved(num_engines=2)
    assert len(set(placement_group_table(group)["bundles_to_node_id"].values())) == 1
    remove_placement_group(group)


@pytest.mark.parametrize(("num_engines", "tp", "room"), [(5, 1, 4), (3, 2, 2), (1, 3, 0)])
def test_more_engines_than_gpus_are_refused_at_once_with_the_number_that_has_room(two_nodes, num_engines, tp, room):
    words = rf"^engine.num_engines = {num_engines}: needs .*'GPU': {tp}.* the Ray cluster has room for {room}\."
    with pytest.raises(InputError, match=words):
        reserved(num_engines=num_engines, tp=tp)


def test_gpus_that_others_hold_are_waited_for_and_then_refused(two_nodes):
    held = reserved(num_engines=2, tp=2)
    with pytest.raises(InputError, match="others did not leave that much of the Ray cluster within 1 s"):
        reserved(num_engines=1, start_timeout_s=1)
    remove_placement_group(held)


COLOCATED = config.Engine(num_engines=2, tp=1)
APART = config.Engine(num_engines=1, tp=2, placement="disaggregated")


def test_on_one_machine_engines_get_the_trainers_gpus_or_those_behind_them():
    assert engine_gpus("4,5,6,7", 2, COLOCATED) == ["4", "5"]
    assert engine_gpus("0,1,2,3,6,7", 4, APART) == ["6", "7"]
    for cfg in (COLOCATED, APART):
        assert engine_gpus("4,5,6,7", 0, cfg) == ["4", "5", "6", "7"]  # without a trainer


def test_too_few_gpus_on_one_machine_are_refused_by_where_they_would_have_to_be():
    with pytest.raises(InputError, match="engine.tp = 2 needs 2 GPUs beside the 3 of the trainers, and .* shows 4"):
        engine_gpus("4,5,6,7", 3, APART)
    with pytest.raises(InputError, match="engine.tp = 1 needs 2 GPUs among the 1 of the trainers, and .* shows 4"):
        engine_gpus("4,5,6,7", 1, COLOCATED)
    with pytest.raises(InputError, match="engine.tp = 2 needs 2 GPUs, and this machine shows 1"):
        engine_gpus("3", 0, APART)


JOIN = """
import faulthandler, os
faulthandler.dump_traceback_later(50, exit=True)
from grpo_mcore.config import config
from grpo_mcore.rollout import placement
try:
    placement.start_ray(config.Engine(start_timeout_s=2), cuda=False, alone=False)
except config.InputError as e:
    print(e, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("names", "chars", "said"),
    [
        (("TMPDIR",), 50, "TMPDIR"),  # Ray's session has no room in it
        (("RAY_TMPDIR",), 90, "RAY_TMPDIR"),
        (("TMPDIR", "RAY_TMPDIR"), 90, "TMPDIR"),
    ],
)
def test_a_temporary_folder_too_long_for_sockets_is_one_line(names, chars, said):
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        folder = scratch + "/" + "x" * (chars - len(scratch) - 1)
        os.mkdir(folder)
        env = environment(**dict.fromkeys(names, folder))
        done = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, env=env, timeout=60)
    assert f"{said} = '{folder}': is too long a path" in done.stdout and "error" not in done.stderr, done.stderr


def test_a_cluster_whose_head_is_gone_is_waited_for_no_longer_than_engines_are():
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # takes what comes, and says nothing
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        env = environment(RAY_ADDRESS=address)
        done = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, env=env, timeout=60)
    assert f"RAY_ADDRESS = '{address}': cannot be joined: it did not answer within 2 s" in done.stdout, done.stderr


def ray_after_a_signal_to_the_group() -> str:
    os.environ["HOME"] = "/proc/nowhere"  # Ray needs none
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    placement.start_ray(config.Engine(num_engines=1), cuda=False, alone=False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has put its own in place
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(2)  # what hears it has ended by then
    group = placement.reserve(config.Engine(num_engines=1), cuda=False)
    return ray.get(placement.in_bundle(Echo, group, 0, {}).remote().say.remote("here"), timeout=60)


class Echo:
    async def say(self, word: str) -> str:
        return word


def test_ray_does_not_hear_the_sigterm_that_torchrun_sends_to_all_of_a_ranks_group():
    assert spawn(ray_after_a_signal_to_the_group, 1) == ["here"]
