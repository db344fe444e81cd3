"""The data plane of a refit by itself: buckets, streams, shared memory, who is near whom.

Not covered here: engines (test_refit.py).
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from grpo_mcore.config.config import InputError
from grpo_mcore.refit import senders
from grpo_mcore.refit.senders import BrokenWire, Place, SharedSender, Stream, choose
from grpo_mcore.refit.weight_transfer import (
    RING_BUCKETS,
    SharedMemory,
    TensorInfo,
    await_turn,
    buckets,
    cut,
    free_port,
    from_dict,
    join,
    open_gloo,
    open_shared,
    pass_turn,
    positions,
    ranks,
    start_broadcast,
    to_dict,
    unpack,
)
from tests.dist import ROOT, environment

BF16 = torch.bfloat16


def group(*sizes: int, at: int = 0) -> list[TensorInfo]:
    return [TensorInfo(f"{at}.{i}", BF16, (size,)) for i, size in enumerate(sizes)]


# Bytes: 60, 16, 8, 80, 2.
GROUPS = [group(30, at=0), group(4, 2, 2, at=1), group(4, at=2), group(20, 20, at=3), group(1, at=4)]
IN_A_ROW = [info for infos in GROUPS for info in infos]


@pytest.mark.parametrize(("limit", "cuts"), [(1, [1, 3, 1, 2, 1]), (24, [1, 4, 2, 1]), (84, [5, 3]), (1000, [8])])
def test_buckets_hold_all_groups_in_order_uncut_and_only_a_larger_group_exceeds_the_limit(limit, cuts):
    made = list(buckets(GROUPS, limit))
    assert [len(bucket) for bucket in made] == cuts
    assert [info for bucket in made for info in bucket] == IN_A_ROW and cut(IN_A_ROW, cuts) == made


def test_unpacked_tensors_are_views_one_behind_the_other():
    bucket = [TensorInfo("a", torch.float32, (2, 3)), TensorInfo("b", BF16, (5,)), TensorInfo("c", BF16, (2, 2))]
    buffer = torch.zeros(24 + 10 + 8, dtype=torch.uint8)
    views = dict(unpack(buffer, bucket))
    views["b"].fill_(1)  # 0x3f80
    assert buffer.nonzero().flatten().tolist() == [24 + i for i in range(10)]
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items()} == {
        i.name: (i.shape, i.dtype) for i in from_dict(to_dict(bucket))
    }


def test_a_transfer_group_counts_every_process_of_every_engine():
    # Rank 0 sends; engines of 2, 1 and 4 tensor-parallel processes.
    assert ranks([2, 1, 4]) == ([1, 3, 4], 8)
    assert ranks([1]) == ([1], 2)


def place(host: str = "a", gpu: str = "") -> Place:
    return Place(host, gpu)


@pytest.mark.parametrize(
    ("transport", "engines", "trainers", "backend"),
    [
        ("auto", [[place()], [place()]], [place()], "shared_memory"),
        ("auto", [[place()], [place("b")]], [place()], "gloo"),
        ("auto", [[place("b")]], [place("a"), place("b")], "gloo"),  # the driver sends, from a
        ("broadcast", [[place()]], [place()], "gloo"),
        ("auto", [[place(gpu="0"), place(gpu="1")]], [place(gpu="0"), place(gpu="1")], "ipc"),
        ("auto", [[place(gpu="1")], [place(gpu="2")]], [place(gpu="0"), place(gpu="1")], "nccl"),
        ("shared", [[place(gpu="1")]], [place(gpu="0"), place(gpu="1")], "ipc"),
        ("broadcast", [[place("b", gpu="0")]], [place(gpu="0")], "nccl"),
    ],
)
def test_the_transport_follows_from_where_trainers_and_engines_are(transport, engines, trainers, backend):
    assert choose(transport, engines, trainers) == backend


def test_memory_cannot_be_shared_with_an_engine_elsewhere():
    with pytest.raises(
        InputError, match=r"refit.transport = 'shared': needs every engine on the machine of the trainer; one is on b "
    ):
        choose("shared", [[place()], [place("b")]], [place()])


@pytest.mark.parametrize(
    ("transport", "engines"), [("broadcast", [["0"]]), ("auto", [["0"], ["2"]]), ("auto", [["2", "0"]])]
)
def test_nccl_is_refused_where_an_engine_has_the_drivers_own_gpu(transport, engines):
    places = [[place(gpu=gpu) for gpu in engine] for engine in engines]
    with pytest.raises(
        InputError, match=f"refit.transport = '{transport}': is NCCL's .* one is on the driver's, a 0\\."
    ):
        choose(transport, places, [place(gpu="0"), place(gpu="1")])


def source(groups, fail_at: str | None = None, seen: list | None = None):
    """An export of tensors that hold their running number."""

    def export(into):
        for number, info in enumerate(info for infos in groups for info in infos):
            if info.name == fail_at:
                raise RuntimeError("lost")
            out = into(info.name)
            out = torch.empty(info.shape, dtype=info.dtype) if out is None else out
            if seen is not None:
                seen.append(info.name)
            yield info.name, out.fill_(number)

    return export


def test_a_stream_fills_buckets_in_place_and_knows_where_it_is():
    stream = Stream(GROUPS, 24, source(GROUPS))
    memory = torch.zeros(stream.capacity_bytes, dtype=torch.uint8)
    numbers = []
    for _, bucket, buffer in stream.fill(lambda i: memory):
        assert buffer.data_ptr() == memory.data_ptr() and stream.at.startswith(bucket[0].name)
        numbers += [tensor.unique().tolist() for _, tensor in unpack(memory[: buffer.numel()], bucket)]
    assert numbers == [[float(i)] for i in range(8)]


def test_what_is_left_of_a_stream_is_drained_after_a_failure():
    seen = []
    stream = Stream(GROUPS, 24, source(GROUPS, seen=seen))

    def memory(index):
        if index == 2:
            raise OSError("no memory")
        return torch.zeros(stream.capacity_bytes, dtype=torch.uint8)

    with pytest.raises(OSError):
        list(stream.fill(memory))
    assert stream.at == "3.0 to 3.1"
    stream.drain()
    assert seen == [info.name for info in IN_A_ROW]


def test_a_tensor_that_was_not_announced_is_refused():
    stream = Stream(GROUPS[:2], 1000, source(GROUPS[1:]))
    with pytest.raises(RuntimeError, match=r"1\.0 \(4,\) came where 0\.0 \(30,\) was announced"):
        list(stream.fill(lambda i: torch.zeros(stream.capacity_bytes, dtype=torch.uint8)))


@pytest.mark.parametrize(("limit", "num_groups"), [(24, 5), (4096, 40), (5 * 4096, 40)])
def test_no_bucket_is_written_where_another_may_not_have_been_loaded(limit, num_groups):
    groups = (
        GROUPS
        if num_groups == 5
        else [group(random.Random(i).choice([1, 700, 2048, 5000, 9000]), at=i) for i in range(num_groups)]
    )
    made = list(buckets(groups, limit))
    where, size = positions(made, limit)
    spans = [(p.offset, p.offset + sum(i.num_bytes for i in bucket)) for p, bucket in zip(where, made, strict=True)]
    assert max(end for _, end in spans) <= size and all(p.offset % 4096 == 0 for p in where)
    for index, position in enumerate(where):
        assert position.lasting == (sum(i.num_bytes for i in made[index]) > limit) and position.after <= index
        for other in range(len(where)):
            apart = spans[index][1] <= spans[other][0] or spans[other][1] <= spans[index][0]
            assert (
                apart
                or other == index
                or (
                    not position.lasting
                    and not where[other].lasting
                    and (other < position.after or index < where[other].after)
                )
            )
    assert not where[-1].after or max(p.after for p in where) > len(where) // 2  # it goes round


class Engine(threading.Thread):
    """Loads bucket by bucket, `slowly` or not, up to `until`; then it does what `end` says."""

    def __init__(
        self, info: dict, stream: Stream, *, slowly: bool = False, until: int | None = None, end: str = "load all"
    ):
        super().__init__(daemon=True)
        self.info, self.stream, self.slowly, self.until, self.end, self.loaded = info, stream, slowly, until, end, []
        self.finished = threading.Event()
        self.start()

    def run(self) -> None:
        sender = join(self.info["socket"], 30.0)
        cut_again = cut(self.stream.infos, self.info["lengths"])
        where, size = positions(cut_again, self.info["bucket_bytes"])
        memory = open_shared(self.info["path"], size)
        for index, (bucket, position) in enumerate(zip(cut_again, where, strict=True)):
            await_turn(sender)
            if index == self.until:
                if self.end == "go":
                    sender.close()
                return self.finished.wait()
            time.sleep(0.05 * self.slowly)
            self.loaded += [
                t.unique().tolist()
                for _, t in unpack(memory[position.offset :][: sum(i.num_bytes for i in bucket)], bucket)
            ]
            pass_turn(sender)


# buckets of a page, three times round the ring; one in a place of its own
MANY = [group(2048, at=i) for i in range(12)] + [group(5000, at=12)]


def test_engines_find_every_tensor_where_the_sender_wrote_it_however_slow_one_is():
    stream = Stream(MANY, 4096, source(MANY))
    sender = SharedSender(stream, 3, 30.0)
    engines = [Engine(sender.init_info(1), stream, slowly=slowly) for slowly in (False, True)]
    began = []
    sender.send(stream, lambda info, what: began.append(what) or (lambda: [engine.join(30) for engine in engines]))
    sender.close()
    assert [engine.loaded for engine in engines] == [[[float(i)] for i in range(13)]] * 2
    assert began == ["loading"]


def test_what_engines_compute_with_is_written_only_after_they_paused():
    big_first = [group(5000, at=0), *MANY[1:]]
    seen = []
    stream = Stream(big_first, 4096, source(big_first, seen=seen))
    sender = SharedSender(stream, 2, 30.0)
    engine = Engine(sender.init_info(1), stream)
    written_before = []
    sender.send(stream, lambda info, what: written_before.extend(seen) or (lambda: engine.join(30)))
    sender.close()
    assert written_before == [] and len(engine.loaded) == 13


@pytest.mark.parametrize(("end", "timeout_s", "deadline_s"), [("go", 60.0, 15), ("hang", 1.0, 15)])
def test_an_engine_that_goes_or_hangs_in_mid_refit_ends_it_by_its_deadline(end, timeout_s, deadline_s):
    stream = Stream(MANY, 4096, source(MANY))
    sender = SharedSender(stream, 2, timeout_s)
    engine = Engine(sender.init_info(1), stream, until=5, end=end)
    start = time.monotonic()
    with pytest.raises(BrokenWire):
        sender.send(stream, lambda info, what: lambda: None)
    assert time.monotonic() - start < deadline_s
    # The engine stands at bucket 5; turns that it gave back and that were not read yet are gone with its socket.
    assert 5 - RING_BUCKETS < float(stream.at) <= 5
    sender.close()
    engine.finished.set()


def test_an_engine_learns_that_the_sender_is_gone():
    sender = SharedSender(Stream(MANY, 4096, source(MANY, fail_at="3.0")), 2, 30.0)
    engine = join(sender.init_info(1)["socket"], 30.0)
    with pytest.raises(RuntimeError, match="lost"):
        # what comes before it fits into the ring
        sender.send(Stream(MANY, 4096, source(MANY, fail_at="3.0")), lambda info, what: lambda: None)
    sender.close()
    with pytest.raises(ConnectionError, match="the other end is gone"):
        for _ in range(4):
            await_turn(engine)


def shared_bytes() -> int:
    """Memory that processes share, of the whole machine."""
    return next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("Shmem:")
    )


SIZE = 256 << 20
HOLDER = f"""
import time
from grpo_mcore.refit.weight_transfer import SharedMemory
memory = SharedMemory({SIZE})
memory.bytes.fill_(7)
print(memory.path, flush=True)
time.sleep(60)
"""


def test_shared_memory_leaves_nothing_behind_when_its_process_is_killed():
    names, before = set(os.listdir("/dev/shm")), shared_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        path = process.stdout.readline().strip()
        view = open_shared(path, SIZE)
        assert view[:: 1 << 20].eq(7).all() and shared_bytes() - before > SIZE // 2
        assert set(os.listdir("/dev/shm")) <= names  # nothing with a name, even now
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert view[-1] == 7  # an engine's view outlives the sender
        with pytest.raises(OSError):
            open_shared(path, SIZE)
        del view
        assert shared_bytes() - before < SIZE // 2
    finally:
        process.kill()
        process.wait()


def test_closed_shared_memory_is_given_back():
    before = shared_bytes()
    memory = SharedMemory(SIZE)
    path = memory.path
    assert shared_bytes() - before > SIZE // 2
    memory.close()
    memory.close()
    assert shared_bytes() - before < SIZE // 2
    with pytest.raises(OSError):
        open_shared(path, SIZE)


MEMBER = """
import sys, torch
from grpo_mcore.refit.weight_transfer import open_gloo, start_broadcast
group = open_gloo("127.0.0.1", int(sys.argv[1]), 1, 2, 30.0)
start_broadcast(group, torch.empty(1 << 20, dtype=torch.uint8)).wait()
group.abort() if sys.argv[2] == "abort" else sys.stdin.read()
"""


@pytest.mark.parametrize(("end", "deadline_s"), [("abort", 15), ("hang", 15)])
def test_a_broadcast_to_a_member_that_is_gone_or_hangs_ends_by_its_deadline(end, deadline_s):
    port = free_port("127.0.0.1")
    member = subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(port), end], cwd=ROOT, stdin=subprocess.PIPE, env=environment()
    )
    try:
        group = open_gloo("127.0.0.1", port, 0, 2, 10.0)  # seconds
        buffer = torch.zeros(1 << 20, dtype=torch.uint8)
        start_broadcast(group, buffer).wait()
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            for _ in range(100):  # what the sockets take in goes through
                start_broadcast(group, buffer).wait()
        assert time.monotonic() - start < deadline_s
    finally:
        member.kill()
        member.wait()


@pytest.mark.gpu
def test_an_exported_buffer_is_read_by_another_process():
    buffer = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    read = torch.multiprocessing.get_context("spawn").Pool(1)
    with read:
        assert read.apply(_first_of, (senders._handle(buffer),)) == 7


def _first_of(handle: tuple) -> int:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return int(rebuild_cuda_tensor(*handle)[0])
