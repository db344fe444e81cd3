"""The data plane of a refit by itself: buckets, streams, shared memory, who is near whom.

Not covered here: engines (test_refit.py).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_mcore import senders
from grpo_mcore.config import InputError
from grpo_mcore.senders import Place, SharedSender, Stream, choose
from grpo_mcore.weight_transfer import SharedMemory, TensorInfo, buckets, free_port, from_dict, open_gloo, open_shared, ranks, start_broadcast, to_dict, unpack
from tests.dist import ROOT, environment

BF16 = torch.bfloat16


def group(*sizes: int, at: int = 0) -> list[TensorInfo]:
    return [TensorInfo(f"{at}.{i}", BF16, (size,)) for i, size in enumerate(sizes)]


GROUPS = [group(30, at=0), group(4, 2, 2, at=1), group(4, at=2), group(20, 20, at=3), group(1, at=4)]  # bytes: 60, 16, 8, 80, 2


@pytest.mark.parametrize(("limit", "cuts"), [(1, [1, 3, 1, 2, 1]), (24, [1, 4, 2, 1]), (84, [5, 3]), (1000, [8])])
def test_buckets_hold_all_groups_in_order_uncut_and_only_a_larger_group_exceeds_the_limit(limit, cuts):
    cut = list(buckets(GROUPS, limit))
    assert [len(bucket) for bucket in cut] == cuts
    assert sum(cut, []) == sum(GROUPS, [])


def test_unpacked_tensors_are_views_one_behind_the_other():
    bucket = [TensorInfo("a", torch.float32, (2, 3)), TensorInfo("b", BF16, (5,)), TensorInfo("c", BF16, (2, 2))]
    buffer = torch.zeros(24 + 10 + 8, dtype=torch.uint8)
    views = dict(unpack(buffer, bucket))
    views["b"].fill_(1)  # 0x3f80
    assert buffer.nonzero().flatten().tolist() == [24 + i for i in range(10)]
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items()} == {i.name: (i.shape, i.dtype) for i in from_dict(to_dict(bucket))}


def test_a_transfer_group_counts_every_process_of_every_engine():
    # Rank 0 sends; engines of 2, 1 and 4 tensor-parallel processes.
    assert ranks([2, 1, 4]) == ([1, 3, 4], 8)
    assert ranks([1]) == ([1], 2)


def place(host: str = "a", gpu: str = "") -> Place:
    return Place(host, gpu)


@pytest.mark.parametrize(("transport", "engines", "trainers", "backend"), [
    ("auto", [[place()], [place()]], [place()], "shared_memory"),
    ("auto", [[place()], [place("b")]], [place()], "gloo"),
    ("auto", [[place("b")]], [place("a"), place("b")], "gloo"),  # the driver sends, from a
    ("broadcast", [[place()]], [place()], "gloo"),
    ("auto", [[place(gpu="0"), place(gpu="1")]], [place(gpu="0"), place(gpu="1")], "ipc"),
    ("auto", [[place(gpu="0")], [place(gpu="2")]], [place(gpu="0"), place(gpu="1")], "nccl"),
    ("shared", [[place(gpu="1")]], [place(gpu="0"), place(gpu="1")], "ipc"),
    ("broadcast", [[place(gpu="0")]], [place(gpu="0")], "nccl"),
])
def test_the_transport_follows_from_where_trainers_and_engines_are(transport, engines, trainers, backend):
    assert choose(transport, engines, trainers) == backend


def test_memory_cannot_be_shared_with_an_engine_elsewhere():
    with pytest.raises(InputError, match=r"refit.transport = 'shared': needs every engine on the machine of the trainer; one is on b "):
        choose("shared", [[place()], [place("b")]], [place()])


def source(groups, fail_at: str | None = None, seen: list | None = None):
    """An export of tensors that hold their running number."""
    def export(into):
        for number, info in enumerate(sum(groups, [])):
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
    for index, bucket, buffer in stream.fill(lambda i: memory):
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
    assert seen == [i.name for i in sum(GROUPS, [])]


def test_a_tensor_that_was_not_announced_is_refused():
    stream = Stream(GROUPS[:2], 1000, source(GROUPS[1:]))
    with pytest.raises(RuntimeError, match=r"1\.0 \(4,\) came where 0\.0 \(30,\) was announced"):
        list(stream.fill(lambda i: torch.zeros(stream.capacity_bytes, dtype=torch.uint8)))


def test_a_shared_bucket_is_written_over_only_after_the_engines_loaded_it():
    stream = Stream(GROUPS, 24, source(GROUPS))
    sender = SharedSender(stream)
    info = sender.init_info(1)
    theirs = open_shared(info["path"], info["num_bytes"])
    loaded, begun = [], []

    def update(update_info: dict, what: str):
        begun.append(what)
        index = len(begun) - 1

        def wait():
            if index == len(loaded):  # an engine that loads only when it must, as late as can be
                bucket = stream.infos[update_info["first"] :][: update_info["length"]]
                loaded.append([t.unique().tolist() for _, t in unpack(theirs[update_info["offset"] :][: sum(i.num_bytes for i in bucket)], bucket)])
        return wait

    sender.send(stream, update)
    sender.close()
    assert sum(loaded, []) == [[float(i)] for i in range(8)]
    assert begun == ["loading 0.0", "loading 1.0 to 2.0", "loading 3.0 to 3.1", "loading 4.0"]


def shared_bytes() -> int:
    """Memory that processes share, of the whole machine."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))


SIZE = 256 << 20
HOLDER = f"""
import time
from grpo_mcore.weight_transfer import SharedMemory
memory = SharedMemory({SIZE})
memory.bytes.fill_(7)
print(memory.path, flush=True)
time.sleep(60)
"""


def test_shared_memory_leaves_nothing_behind_when_its_process_is_killed():
    names, before = set(os.listdir("/dev/shm")), shared_bytes()
    process = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment())
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
from grpo_mcore.weight_transfer import open_gloo, start_broadcast
group = open_gloo("127.0.0.1", int(sys.argv[1]), 1, 2, 30.0)
start_broadcast(group, torch.empty(1 << 20, dtype=torch.uint8)).wait()
group.abort() if sys.argv[2] == "abort" else sys.stdin.read()
"""


@pytest.mark.parametrize(("end", "deadline_s"), [("abort", 15), ("hang", 15)])
def test_a_broadcast_to_a_member_that_is_gone_or_hangs_ends_by_its_deadline(end, deadline_s):
    port = free_port("127.0.0.1")
    member = subprocess.Popen([sys.executable, "-c", MEMBER, str(port), end], cwd=ROOT, stdin=subprocess.PIPE, env=environment())
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
