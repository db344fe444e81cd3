"""What a refit makes of ranks and engines that fail in it: real gloo ranks, a real policy, and engines of which only
the ends of the wire are here.

Not covered here: CUDA's part of a wire (a buffer's handle, NCCL itself), and real engines (test_refit.py).
"""

import base64
import functools
import os
import pickle
import re
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.parallel import topology
from grpo_mcore.policy.policy import Policy
from grpo_mcore.refit import refit as refit_module
from grpo_mcore.refit.refit import Refit, Transfer
from grpo_mcore.refit.senders import IpcSender, NcclSender, Place, Stream, made_on
from grpo_mcore.refit.weight_transfer import (
    Lifeline,
    TensorInfo,
    await_turn,
    cut,
    from_dict,
    in_thread,
    join,
    open_shared,
    pass_turn,
    positions,
    unpack,
)
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


class Engine:
    """An engine of one process, and its slot: keeps what it loads, or fails in what is `failing`."""

    def __init__(self, index: int = 0):
        self.index, self.weights, self.num_loads = index, {}, 0

    def last_words(self):
        return "its last words"

    def places(self):
        return [["host", ""]]

    def init_transfer(self, init_info):
        check(f"join {self.index}")
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


class Engines:
    address = "127.0.0.1"

    def __init__(self, *engines: Engine):
        self.engines, self.pool, self.calls = engines, ThreadPoolExecutor(), []

    def assemble(self, phase):
        return list(self.engines)

    def call(self, engines, method, args=()):
        each = args if isinstance(args, list) else [args] * len(engines)
        refs = {e: self.pool.submit(getattr(e, method), *a) for e, a in zip(engines, each, strict=True)}
        for ref in refs.values():
            ref.future = functools.partial(lambda ref: ref, ref)  # as a reference of Ray's
        self.calls += refs.values()
        return refs

    def collect(self, refs, timeout_s):
        results, failed = {}, {}
        for engine, ref in refs.items():
            try:
                results[engine] = ref.result(timeout_s)
            except Exception as e:
                failed[engine] = str(e)
        return results, failed


FAILURES = {
    "shared_memory": ["join 0", "begin", "load 0", "end"],
    "ipc": [
        "join 0",
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
    engine = Engine()
    engines = Engines(engine) if topo.is_driver else None
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
            for name, tensor in engine.weights.items():
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


def torn_exports(folder: str, run_dir: str) -> str:
    """What ends each rank when the driver's export fails midway."""
    cfg = configuration(folder, run_dir)
    topo = topology.connect(config.Parallel(tp=2), device=torch.device("cpu"), timeout_s=30, seed=1)
    policy = Policy(folder, topo, precision=cfg.precision, temperature=1.0, optimizer=config.Optimizer())
    refit_module.choose = lambda *_: "ipc"
    refit_module.IpcSender = Ends
    refit = Refit(policy, Engines(Engine()) if topo.is_driver else None, cfg, topo, CANARY)
    honest = policy.export

    def export(**how):
        for number, named in enumerate(honest(**how)):
            if topo.is_driver and number == 3:
                raise RuntimeError("gather: no memory")
            yield named

    policy.export = export
    try:
        refit._deliver(1, again=False)
    except RuntimeError as e:
        return f"{type(e).__name__}: {e}"
    return ""


def test_an_export_that_fails_within_its_collectives_ends_the_run_and_does_not_hang(model_folders, tmp_path):
    driver, other = spawn(torn_exports, 2, model_folders["qwen2_untied"], str(tmp_path), timeout_s=60)
    assert re.fullmatch(r"RefitError: refit to version 1: sending model\.layers\.0\.\S+: gather: no memory", driver)
    assert "gloo" in other and "127.0.0.1" in other, other  # its connection was lost as the driver ended


@pytest.mark.gpu
def test_what_is_read_on_another_stream_is_what_was_made_before():
    made = torch.zeros(1 << 20, device="cuda")

    def tensors():
        for _ in range(3):
            torch.cuda._sleep(100_000_000)
            yield "made", made.add_(1).clone()

    current, seen = torch.cuda.current_stream(), []
    torch.cuda._sleep(100_000_000)
    made.fill_(10)  # the optimizer's step
    reading = made_on(current, tensors())
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            seen.append(next(reading)[1].unique().tolist())
    assert seen == [[11], [12], [13]]


class Wire:
    """Where members wait for each other, without a deadline, as NCCL's do."""

    def __init__(self, num_members: int):
        self.num_members, self.members, self.changed = num_members, [], threading.Condition()
        self.sent = None

    def join(self) -> "Member":
        with self.changed:
            self.members.append(member := Member(self))
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(self.members) == self.num_members)
        return member


class Member:
    def __init__(self, wire: Wire):
        self.wire, self.met, self.aborted = wire, 0, False

    def meet(self) -> None:
        with self.wire.changed:
            self.met += 1
            self.wire.changed.notify_all()
            self.wire.changed.wait_for(lambda: self.aborted or all(m.met >= self.met for m in self.wire.members))

    def destroy(self) -> None:
        with self.wire.changed:
            self.aborted = True
            self.wire.changed.notify_all()


class Sending(NcclSender):
    def __init__(self, *args):
        super().__init__(*args)
        Sending.wire = Wire(self._info["world_size"])

    def _join(self):
        return self.wire.join()

    def _producer(self, tensors):
        def produce():
            for self.wire.sent in tensors:
                self._joined.result().meet()  # it can be read
                self._joined.result().meet()  # it has been

        return produce


class Receiving(Engine):
    def init_transfer(self, init_info):
        self.infos, info = from_dict(init_info["weights"]), init_info["info"]
        self.lifeline = Lifeline(info["lifeline"], 10.0)
        check(f"join {self.index}")
        joined = in_thread(Sending.wire.join)
        self.lifeline.unless_gone(joined)
        self.member = joined.result()
        self.lifeline.when_gone(self.member.destroy)

    def load(self, update_info):
        check(f"load {self.index}")
        if f"signal {self.index}" in failing:
            os.kill(os.getpid(), signal.SIGUSR1)
        if failing & {f"hang {self.index}", f"signal {self.index}"}:
            self.lifeline.unless_gone(Future())
        for info in self.infos:
            self.member.meet()
            name, tensor = Sending.wire.sent
            assert name == info.name or self.lifeline.is_gone
            self.weights[name] = tensor.clone()
            self.member.meet()
            if self.lifeline.is_gone:
                raise ConnectionError("the sender gave up")


@pytest.mark.parametrize(
    ("failure", "timeout_s", "said"),
    [
        ("join 1", 60.0, r"joining: engine 1 failed: join 1: no memory\. its last words"),
        ("load 1", 60.0, r"receiving the broadcast: engine 1 failed: load 1: no memory\. its last words"),
        ("hang 1", 1.0, r"receiving the broadcast: not done within 1 s: engine 0, 1\. its last words"),
        ("gather", 60.0, "gather: no memory"),
        ("signal 1", 60.0, "a signal"),
    ],
)
def test_who_waits_in_nccl_is_freed_when_another_fails_or_is_late_and_the_next_refit_works(
    monkeypatch, tmp_path, failure, timeout_s, said
):
    monkeypatch.setattr(refit_module, "choose", lambda *_: "nccl")
    monkeypatch.setattr(refit_module, "NcclSender", Sending)
    monkeypatch.setattr(refit_module, "FAILED_ENGINE_S", 0.1)
    cfg = configuration("unused", str(tmp_path), f"refit.timeout_s={timeout_s}")
    one = TensorInfo("a", torch.float32, (4,)), TensorInfo("b", torch.float32, (2, 2))
    groups = [[info] for info in one]

    def export(into):
        yield "a", torch.arange(4.0)
        check("gather")
        yield "b", torch.ones(2, 2)

    def stop(*_):
        raise RuntimeError("a signal")

    before = signal.signal(signal.SIGUSR1, stop)
    engines = Engines(Receiving(0), Receiving(1))
    cpu = SimpleNamespace(device=torch.device("cpu"))
    transfer = Transfer(engines, cfg, cpu, [Place("host", "")], Stream(groups, 1000, export))

    def deliver() -> None:
        stream = Stream(groups, 1000, export)
        if transfer.join(1) is None:
            raise RuntimeError(transfer.problem)
        try:
            transfer.send(stream, 1, discard=False)
        except RuntimeError as e:
            transfer.fail(1, str(e))
            stream.drain()
            raise

    failing.add(failure)
    with pytest.raises(RuntimeError, match=said):
        deliver()
    assert not wait(engines.calls, 20).not_done
    failing.clear()
    deliver()
    assert all(e.weights["a"].tolist() == [0, 1, 2, 3] and e.weights["b"].sum() == 4 for e in engines.engines)
    transfer.fail(1, "closes the wire")
    signal.signal(signal.SIGUSR1, before)
