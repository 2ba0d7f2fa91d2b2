"""Perf buffers, as the kernel fills them, on files in memory; and BPF maps."""

import contextlib
import ctypes
import errno
import io
import itertools
import mmap
import os
import re
import select
import struct
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
from conftest import TOP, load, parse
from hypothesis import given, settings
from hypothesis import strategies as st

PAGES = 2
BYTES = PAGES * mmap.PAGESIZE
SAMPLE, LOST = 9, 2
EVENT = struct.Struct("=QI48s")  # a record of 72 bytes, 4 of them padding


def sample(ts, name):
    event = EVENT.pack(ts, len(name), name)
    return struct.pack("=IHHI", SAMPLE, 2, 72, len(event)) + event


def lost(count):
    return struct.pack("=IHHQQ", LOST, 0, 24, 5251, count)


class Ring:
    """A CPU's perf buffer, as the kernel fills it."""

    def __init__(self, begin=0):
        self.fd = os.memfd_create("ring")
        os.truncate(self.fd, BYTES + mmap.PAGESIZE)
        self.map = mmap.mmap(self.fd, 0)
        weakref.finalize(self, os.close, self.fd)
        struct.pack_into("=QQ", self.map, 1024, begin, begin)

    def counters(self):
        return struct.unpack_from("=QQ", self.map, 1024)

    def write(self, records):
        head, tail = self.counters()
        for byte in records:
            self.map[mmap.PAGESIZE + head % BYTES] = byte
            head += 1
        assert head - tail <= BYTES
        struct.pack_into("=Q", self.map, 1024, head)


class Poll(set):
    """A fake of a poll object: the descriptors that are in it."""

    def register(self, descriptor, events):
        assert events == select.POLLIN
        self.add(descriptor)

    def unregister(self, descriptor):
        self.remove(descriptor)


@contextlib.contextmanager
def cpus(shared, *rings, opened=None):
    """CPUs that have these rings.

    opened: a list, which gets what each was opened and put into the map with.
    """
    opened = [] if opened is None else opened

    def syscall(which, attr, pid, cpu, group, flags):
        opened.append((which, bytes(attr), pid, cpu, group, flags))
        return rings[cpu].fd

    def map_update(*arguments):
        opened.append(arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "cpus", lambda state: range(len(rings)))
        patch.setattr(shared, "syscall", syscall)
        patch.setattr(shared, "map_update", map_update)
        yield


def open_buffers(shared, *rings, opened=None):
    """The Buffers of a map, 71, on CPUs that have these rings."""
    with cpus(shared, *rings, opened=opened):
        return shared.Buffers(71, EVENT, PAGES, Poll())


def shown(events):
    return [(ts, name[:length]) for ts, length, name in events]


def test_events_of_all_cpus_are_read_once(shared):
    first, second = Ring(), Ring()
    buffers = open_buffers(shared, first, second)
    assert buffers.poll == {first.fd, second.fd}
    assert buffers.read() == []
    first.write(sample(7, b"a") + sample(9, b"b"))
    second.write(sample(8, b"c"))
    assert shown(buffers.read()) == [(7, b"a"), (9, b"b"), (8, b"c")]
    assert buffers.read() == []
    for ring in (first, second):
        head, tail = ring.counters()
        assert head == tail > 0


def test_buffers_that_are_opened_anew(shared, monkeypatch):
    """What is on its way into the old ones is read, for 20 ms; and what is in them."""
    clock = [0]
    monkeypatch.setattr(shared.time, "monotonic_ns", lambda: clock[0])
    closed = []
    monkeypatch.setattr(shared.os, "close", closed.append)
    old, offline, new, other = (Ring() for _ in range(4))
    buffers = open_buffers(shared, old, offline)
    buffers.poll.unregister(offline.fd)  # as wait() does
    old.write(sample(1, b"a"))
    opened = []
    with cpus(shared, new, other, opened=opened):
        buffers.open()
    put = [(cpu[0], fd[0]) for _, cpu, fd in opened[1::2]]
    assert put == [(0, new.fd), (1, other.fd)]
    old.write(sample(2, b"b"))
    new.write(sample(3, b"c"))
    clock[0] = 20_000_000
    assert shown(buffers.read()) == [(1, b"a"), (2, b"b"), (3, b"c")]
    old.write(sample(4, b"d"))
    other.write(sample(5, b"e"))
    assert (buffers.poll, closed) == ({old.fd, new.fd, other.fd}, [])
    clock[0] = 20_000_001
    assert shown(buffers.read()) == [(4, b"d"), (5, b"e")]
    assert (buffers.poll, closed) == ({new.fd, other.fd}, [old.fd, offline.fd])
    old.write(sample(6, b"f"))
    assert buffers.read() == []


def test_how_a_buffer_is_opened(shared):
    """It wakes its reader when it is a quarter full.

    Source: struct perf_event_attr in linux/perf_event.h, perf_event_open(2).
    """
    opened = []
    open_buffers(shared, Ring(), ring := Ring(), opened=opened)
    _, _, call, update = opened
    which, attr, pid, cpu, group, flags = call
    assert (which, pid, cpu, group) == (1, -1, 1, -1)
    assert flags == 8  # PERF_FLAG_FD_CLOEXEC
    names = "type size config sample_period sample_type read_format flags wakeup"
    values = struct.unpack("=IIQQQQQI", attr[:52])
    assert dict(zip(names.split(), values)) == {
        "type": 1,  # PERF_TYPE_SOFTWARE
        "size": 64,  # PERF_ATTR_SIZE_VER0
        "config": 10,  # PERF_COUNT_SW_BPF_OUTPUT
        "sample_period": 1,
        "sample_type": 1 << 10,  # PERF_SAMPLE_RAW
        "read_format": 0,
        "flags": 1 << 14,  # watermark: the wakeup is by bytes
        "wakeup": BYTES // 4,
    }
    assert attr[52:] == bytes(12)
    assert update == (71, struct.pack("=I", 1), struct.pack("=I", ring.fd))


def test_the_pages_that_were_asked_for(shared, monkeypatch):
    lengths = []

    def mmap_of(descriptor, length):
        lengths.append(length)
        return mmap.mmap(-1, length)

    fakes = SimpleNamespace(mmap=mmap_of, PAGESIZE=mmap.PAGESIZE)
    monkeypatch.setattr(shared, "mmap", fakes)
    monkeypatch.setattr(shared, "cpus", lambda state: [0, 2])
    monkeypatch.setattr(shared, "syscall", lambda *_: 9)
    monkeypatch.setattr(shared, "map_update", lambda *_: None)
    shared.Buffers(71, EVENT, 64, Poll())
    assert lengths == [65 * mmap.PAGESIZE] * 2


def test_buffers_that_cannot_be_opened(shared, monkeypatch, capfd):
    def syscall(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(shared, "cpus", lambda state: [0])
    monkeypatch.setattr(shared, "syscall", syscall)
    why = "Operation not permitted (see tcptools(7), DIAGNOSTICS)"
    with pytest.raises(SystemExit) as end:
        shared.Buffers(71, EVENT, PAGES, Poll())
    assert (end.value.code, capfd.readouterr().err) == (
        1,
        f"tcpconnect: error: cannot open perf buffers: {why}\n",
    )


@pytest.mark.parametrize("begin", range(BYTES - 80, BYTES + 8, 8))
def test_records_go_around_the_end_of_the_buffer(shared, begin):
    buffers = open_buffers(shared, ring := Ring(begin))
    ring.write(sample(1, b"one") + sample(2, b"two"))
    assert shown(buffers.read()) == [(1, b"one"), (2, b"two")]


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.binary(max_size=48), st.just(None)), max_size=100),
        max_size=10,
    )
)
def test_any_records(shared, batches):
    """None is a record of lost events; all else must come out as it went in."""
    ring, ts = Ring(), itertools.count(1)
    buffers = open_buffers(shared, ring)
    for batch in batches:
        expected = [(next(ts), name) for name in batch if name is not None]
        times = iter(expected)
        ring.write(
            b"".join(
                lost(3) if name is None else sample(*next(times)) for name in batch
            )
        )
        assert shown(buffers.read()) == expected


def test_a_full_buffer(shared):
    buffers = open_buffers(shared, ring := Ring())
    most = BYTES // 72
    ring.write(b"".join(sample(ts, b"x") for ts in range(most)))
    assert shown(buffers.read()) == [(ts, b"x") for ts in range(most)]


def test_as_many_lost_records_as_fill_a_whole_event(shared):
    """Three of them have the size of an event."""
    buffers = open_buffers(shared, ring := Ring())
    ring.write(sample(1, b"a") + 3 * lost(1) + sample(2, b"b"))
    assert shown(buffers.read()) == [(1, b"a"), (2, b"b")]


def test_responses_of_all_lengths(shared):
    """Each has its message, of as many bytes as it has, up to the most that is read;
    records of losses are between them. The buffer wakes its reader as any other.
    """

    def record(number, message):
        fields = number, 181, len(message), 0, 1, bytes([number]) * 40
        raw = struct.pack("=QIHBB40s", *fields) + message
        raw += bytes(-(12 + len(raw)) % 8)
        return struct.pack("=IHHI", SAMPLE, 2, 12 + len(raw), len(raw)) + raw

    args = parse(shared)
    traced = SimpleNamespace(maps={"responses": 71})
    with cpus(shared, ring := Ring(), opened=(opened := [])):
        buffers = shared.Names(args, traced, PAGES, Poll()).responses
    assert struct.unpack_from("=QI", opened[0][1], 40) == (1 << 14, BYTES // 4)
    for lengths in ((0, 1, 2, 4095), (12, 29, 71), (257,), (4095,)):
        messages = [bytes([SAMPLE]) * length for length in lengths]
        ring.write(b"".join(lost(1) + record(n, m) for n, m in enumerate(messages)))
        responses = buffers.read()
        assert [response[-1] for response in responses] == messages
        assert [response[2] for response in responses] == list(lengths)
        assert [response[0] for response in responses] == list(range(len(lengths)))


def test_records_of_the_tools_events(tool):
    """The kernel pads a record to 8 bytes; a sample's size of 4 bytes is in it."""
    for options in ([], ["--json"]):
        event = tool.event_struct(parse(tool, *options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool, "cpus", lambda state: ())
            record = tool.Buffers(71, event, PAGES, Poll()).record
        assert record.size == -(-(8 + 4 + event.size) // 8) * 8
        packed = (bytes(range(256)) * 9)[: event.size]
        padding = bytes(record.size - 12 - event.size)
        assert record.unpack(bytes(12) + packed + padding) == event.unpack(packed)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0\n", [0]),
        ("0-3\n", [0, 1, 2, 3]),
        ("0-3,6\n", [0, 1, 2, 3, 6]),
        ("1,4-5,127-128\n", [1, 4, 5, 127, 128]),
    ],
)
def test_cpus(shared, monkeypatch, text, cpus):
    files = {"/sys/devices/system/cpu/online": text}
    opened = lambda path: io.StringIO(files[path])
    monkeypatch.setattr(shared, "open", opened, raising=False)
    assert list(shared.cpus("online")) == cpus


def test_cpus_of_this_machine(shared):
    for state, name in ("online", "ONLN"), ("possible", "CONF"):
        assert len(list(shared.cpus(state))) == os.sysconf(f"SC_NPROCESSORS_{name}")


@pytest.mark.parametrize(
    ("method", "option", "name"),
    [("fexit", "-t", "seen"), ("kprobe", "-q", "listening")],
)
def test_threads_that_are_tracked(monkeypatch, method, option, name):
    """4,096, and 256 for each CPU that there may be."""
    tool, possible = load("tcpaccept"), "0-31\n"
    monkeypatch.setattr(tool, "open", lambda _: io.StringIO(possible), raising=False)
    program = tool.c_program(parse(tool, option), method, None)
    maps = re.findall(r'"lru_hash", .*, (\w+), (\w+)\);', program)
    assert maps == [(name, "LRU_ENTRIES")]
    assert "#define LRU_ENTRIES 12288\n" in program


@pytest.mark.parametrize("page_bytes", [4096, 65536])
@pytest.mark.parametrize("cpus", [1, 2, 4, 31, 32, 33, 128, 4096])
def test_buffers_stay_under_32_mb(shared, monkeypatch, cpus, page_bytes):
    monkeypatch.setattr(shared.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(shared, "mmap", SimpleNamespace(PAGESIZE=page_bytes))
    (pages,) = shared.buffer_pages(parse(shared))
    bound = (32 << 20) // page_bytes // cpus
    assert pages == max(1, min(256, 1 << max(0, bound.bit_length() - 1)))
    assert shared.buffer_pages(parse(shared, "-b", "16384")) == [16384]


@pytest.mark.parametrize(
    ("cpus", "pages"),
    [
        (1, [256, 64]),
        (25, [256, 64]),
        (26, [128, 64]),
        (42, [128, 64]),
        (43, [64, 64]),
        (512, [8, 8]),
        (8192, [1, 1]),
    ],
)
def test_two_buffers_per_cpu_stay_under_32_mb(shared, monkeypatch, cpus, pages):
    """Together, with -d; -b means the events' only."""
    monkeypatch.setattr(shared.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(shared, "mmap", SimpleNamespace(PAGESIZE=4096))
    assert shared.buffer_pages(parse(shared), 64) == pages
    assert sum(pages) * cpus * 4096 <= 32 << 20 or pages == [1, 1]
    args = parse(shared, "-b", "16384")
    assert shared.buffer_pages(args, 64) == [16384, pages[1]]


ROOM = 4096  # of a batch
BATCH = struct.Struct("=QQQQIIQQ")  # of union bpf_attr: struct used by BPF_MAP_*_BATCH


class Kernel:
    """A hash map, read in batches by a fake bpf()."""

    def __init__(self, items):
        self.items, self.position, self.calls = items, 0, 0

    def bpf(self, command, attr):
        assert command == 24  # BPF_MAP_LOOKUP_BATCH
        in_batch, out_batch, keys, values, count, map_fd, *flags = BATCH.unpack(attr)
        assert (count, map_fd, flags) == (ROOM, 71, [0, 0])
        position = ctypes.string_at(in_batch, 4) if in_batch else bytes(4)
        assert position == struct.pack("=I", self.position)
        assert bool(in_batch) == bool(self.calls)
        self.calls += 1
        batch = self.items[self.position : self.position + ROOM]
        self.position += len(batch)
        for address, part in ((keys, 0), (values, 1)):
            data = b"".join(item[part] for item in batch)
            ctypes.memmove(address, data, len(data))
        ctypes.memmove(out_batch, struct.pack("=I", self.position), 4)
        struct.pack_into("=I", attr, 32, len(batch))
        if self.position == len(self.items):
            raise OSError(errno.ENOENT, "")


@pytest.mark.parametrize(("count", "calls"), [(2 * ROOM + 17, 3), (ROOM, 1), (0, 1)])
def test_map_items(shared, monkeypatch, count, calls):
    items = [(struct.pack("=QI", i, 7), struct.pack("=Q", 3 * i)) for i in range(count)]
    kernel = Kernel(items)
    monkeypatch.setattr(shared, "bpf", kernel.bpf)
    monkeypatch.setattr(shared, "info_of", lambda *_: (1, 12, 8))
    assert list(shared.map_items(71)) == items
    assert kernel.calls == calls


def test_map_items_that_the_kernel_refuses(shared, monkeypatch):
    def bpf(*_):
        raise OSError(errno.EPERM, "")

    monkeypatch.setattr(shared, "bpf", bpf)
    monkeypatch.setattr(shared, "info_of", lambda *_: (1, 4, 4))
    with pytest.raises(PermissionError):
        list(shared.map_items(71))


def test_map_update(shared, monkeypatch):
    """Source: union bpf_attr in linux/bpf.h, BPF_MAP_*_ELEM commands."""
    updates = []

    def bpf(command, attr):
        map_fd, key, value, flags = struct.unpack("=I4xQQQ", attr)
        texts = ctypes.string_at(key, 4), ctypes.string_at(value, 8)
        updates.append((command, map_fd, *texts, flags))

    monkeypatch.setattr(shared, "bpf", bpf)
    shared.map_update(71, b"key\0", b"\0value\0\0")
    assert updates == [(2, 71, b"key\0", b"\0value\0\0", 0)]


def test_a_map_of_this_kernel(shared):
    """Made, filled and read by bpf(2), with no library in between."""
    attr = shared.packed("=IIIII28x", 1, 8, 4, 9001, 0)  # BPF_MAP_CREATE: a hash
    try:
        map_fd = shared.bpf(0, attr)
    except OSError as error:
        pytest.skip(f"this kernel makes no BPF map for this user: {error}")
    items = {struct.pack("=Q", i): struct.pack("=I", i * i) for i in range(5003)}
    for key, value in items.items():
        shared.map_update(map_fd, key, value)
    assert shared.info_of(map_fd, shared.MAP_INFO) == (1, 8, 4)
    assert sorted(shared.map_items(map_fd)) == sorted(items.items())
    os.close(map_fd)
    with pytest.raises(OSError) as raised:
        shared.map_update(map_fd, bytes(8), bytes(4))
    assert raised.value.errno == errno.EBADF


def test_nothing_pinned_to_a_path(shared, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError):
            shared.open_pinned(str(path))


def test_the_end_of_a_wait(shared, monkeypatch):
    """A signal asks for it, or stdout's reader is gone.

    A buffer that fills up ends the wait only, and so does one that is dead, once.
    """
    filling, fill = os.pipe()
    dead, end_of_dead = os.pipe()
    reader, stdout = os.pipe()
    kept = os.dup(1)
    os.dup2(stdout, 1)
    os.close(stdout)
    monkeypatch.setattr(shared, "stopping", {})
    monkeypatch.setattr(shared, "POLL_MS", 0)
    try:
        poll = shared.poller()
        poll.register(filling, select.POLLIN)
        poll.register(dead, select.POLLIN)
        assert not shared.wait(poll)
        os.write(fill, b"x")
        monkeypatch.setattr(shared, "POLL_MS", 60_000)
        assert not shared.wait(poll)
        os.close(end_of_dead)
        assert not shared.wait(poll)
        with pytest.raises(KeyError):
            poll.unregister(dead)
        shared.stopping[15] = 7.0
        assert shared.wait(poll)
        shared.stopping.clear()
        os.read(filling, 1)
        os.close(reader)
        assert shared.wait(poll)
    finally:
        os.dup2(kept, 1)
        for descriptor in (kept, filling, fill, dead):
            os.close(descriptor)


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_asks_for_the_end_and_a_later_one_ends_the_process(number):
    """Those within a second are the same Ctrl-C, also while Python ends."""
    code = (
        "import sys; from importlib.machinery import SourceFileLoader as Loader\n"
        "import importlib.util as util, os, signal\n"
        "loader = Loader('tool', sys.argv[1])\n"
        "tool = util.module_from_spec(util.spec_from_loader('tool', loader))\n"
        "loader.exec_module(tool)\n"
        "def main():\n"
        "    tool.catch_signals()\n"
        "    for ms in sys.argv[3:]:\n"
        "        tool.time.monotonic = lambda: int(ms) / 1000\n"
        "        os.kill(os.getpid(), int(sys.argv[2]))\n"
        "tool.run(main)\n"
        "print(tool.stopping, signal.getsignal(int(sys.argv[2])) == signal.SIG_IGN)\n"
    )
    command = [sys.executable, "-c", code, TOP / "tcpconnect", str(number)]
    for times, said in (
        ([7000], f"{{{number}: 7.0}} True\n"),
        ([7000, 7030, 7500, 8000], f"{{{number}: 7.0}} True\n"),
        ([7000, 7030, 8001], None),
        ([7000, 9000], None),
    ):
        words = [*command, *map(str, times)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        status, text = (0, said) if said else (-number, "")
        assert (done.returncode, done.stdout) == (status, text), times
