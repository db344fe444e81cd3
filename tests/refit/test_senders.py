"""What a refit makes of ranks and engines that fail in it: real gloo ranks, a real policy, and engines of which only the
ends of the wire are here.

Not covered here: CUDA's part of a wire (a buffer's handle, NCCL itself), and real engines (test_refit.py).
"""

import base64
import pickle
from concurrent.futures import ThreadPoolExecutor

import torch

from grpo_mcore.config import config
from grpo_mcore.parallel import topology
from grpo_mcore.policy.policy import Policy
from grpo_mcore.refit import refit as refit_module
from grpo_mcore.refit.refit import Refit
from grpo_mcore.refit.senders import IpcSender
from grpo_mcore.refit.weight_transfer import await_turn, cut, from_dict, join, open_shared, pass_turn, positions, unpack
from tests.dist import spawn
from tests.refit.test_refit import CANARY, configuration

failing: set[str] = set()  # what is to fail, once


def check(what: str) -> None:
    if what in failing:
        failing.remove(what)
        raise RuntimeError(f"{what}: no memory")


class Ends(IpcSender):
    """Hands over the bytes of a buffer where IPC hands over a handle to them."""

    def _allocate(self, num_bytes):
        check(f"allocate {self._topology.rank}")
        return super()._allocate(num_bytes)

    def _export(self, buffer):
        check(f"export {self._topology.rank}")
        return f"gpu {self._topology.rank}", buffer.numpy().tobytes()

    def _give_back(self):
        check(f"give back {self._topology.rank}")


class Slot:
    index = 0

    def last_words(self):
        return "its last words"


class Engines:
    """One engine of one process, which keeps what it loads, or fails in `failing`'s."""

    address = "127.0.0.1"

    def __init__(self):
        self.slot = Slot()
        self.pool, self.weights, self.num_loads = ThreadPoolExecutor(1), {}, 0

    def assemble(self, phase):
        return [self.slot]

    def call(self, slots, method, args=()):
        (arguments,) = args if isinstance(args, list) else [args]
        return {self.slot: self.pool.submit(getattr(self, method), *arguments)}

    def collect(self, refs, timeout_s):
        results, failed = {}, {}
        for slot, ref in refs.items():
            try:
                results[slot] = ref.result(timeout_s)
            except Exception as e:
                failed[slot] = str(e)
        return results, failed

    def places(self):
        return [["host", ""]]

    def init_transfer(self, init_info):
        check("join")
        self.infos, info = from_dict(init_info["weights"]), init_info["info"]
        if init_info["transport"] == "shared_memory":
            self.buckets = cut(self.infos, info["lengths"])
            self.positions, size = positions(self.buckets, info["bucket_bytes"])
            self.memory, self.sender = open_shared(info["path"], size), join(info["socket"], 10.0)

    def begin_refit(self, discard):
        self.weights, self.num_loads = {}, 0
        check("begin")

    def load(self, update_info):
        try:
            check(f"load {self.num_loads}")
        except RuntimeError:
            if "ipc_handles" not in update_info:
                self.sender.close()  # the wire's abort
            raise
        self.num_loads += 1
        if "ipc_handles" in update_info:
            handles, bucket = pickle.loads(base64.b64decode(update_info["ipc_handles"])), from_dict(update_info)
            (one,) = {handle[: sum(i.num_bytes for i in bucket)] for handle in handles.values()}  # on every GPU
            self._keep(torch.frombuffer(bytearray(one), dtype=torch.uint8), bucket)
            return
        for bucket, position in zip(self.buckets, self.positions, strict=True):
            await_turn(self.sender)
            self._keep(self.memory[position.offset :], bucket)
            pass_turn(self.sender)

    def _keep(self, buffer, bucket):
        self.weights |= {n: t.clone() for n, t in unpack(buffer[: sum(i.num_bytes for i in bucket)], bucket)}

    def end_refit(self, version, keep_cache):
        check("end")
        assert set(self.weights) == {i.name for i in self.infos}


FAILURES = {
    "shared_memory": ["join", "begin", "load 0", "end"],
    "ipc": [
        "join",
        "begin",
        "load 0",
        "load 2",
        "end",
        *(f"{what} {rank}" for what in ("allocate", "export", "give back") for rank in (0, 1)),
    ],
}


def deliveries(folder: str, run_dir: str, transport: str) -> list[tuple[bool, bool, str]]:
    """(whether the refit in which it fails was delivered, and the next one, what was said) of each failure."""
    cfg = configuration(folder, run_dir)
    topo = topology.connect(config.Parallel(tp=2), device=torch.device("cpu"), timeout_s=30, seed=1)
    policy = Policy(folder, topo, precision=cfg.precision, temperature=1.0, optimizer=config.Optimizer())
    engines = Engines() if topo.is_driver else None
    refit_module.choose = lambda *_: transport
    refit_module.IpcSender = Ends
    refit = Refit(policy, engines, cfg, topo, CANARY)
    expected = dict(policy.export(everywhere=True))
    seen = []
    for failure in FAILURES[transport]:
        failing.add(failure)
        delivered = [refit._deliver(1, again=False)]
        failing.clear()
        delivered.append(refit._deliver(1, again=True))
        said = ""
        if engines:
            said = refit.transfer.problem
            for name, tensor in engines.weights.items():
                assert torch.equal(tensor, expected[name]), name
        seen.append((*delivered, said))
    topology.disconnect()
    return seen


def check_deliveries(folder: str, run_dir: str, transport: str) -> None:
    driver, other = spawn(deliveries, 2, folder, run_dir, transport, timeout_s=120)
    for failure, (first, second, said), of_other in zip(FAILURES[transport], driver, other, strict=True):
        assert (first, second) == of_other[:2] == (False, True), (failure, said)
        assert f"{failure}: no memory" in said, (failure, said)


def test_all_ranks_give_up_together_wherever_one_fails_and_the_next_refit_works(model_folders, tmp_path):
    check_deliveries(model_folders["qwen2_untied"], str(tmp_path), "ipc")


def test_a_refit_that_the_driver_alone_sends_leaves_the_other_ranks_in_step(model_folders, tmp_path):
    check_deliveries(model_folders["qwen2_untied"], str(tmp_path), "shared_memory")
