"""Reading perf buffers: what the kernel writes into them, on files in memory."""

import itertools
import mmap
import os
import struct
from types import SimpleNamespace

import pytest
from conftest import load
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


class Table:
    """A table of bcc's whose perf buffers are these rings."""

    def __init__(self, b, rings):
        self.b, self.rings = b, rings

    def open_perf_buffer(self, _callback, **options):
        assert options.pop("page_cnt") == PAGES
        self.options = options
        for cpu, ring in enumerate(self.rings):
            self.b.perf_buffers[(id(self), cpu)] = ring.fd


class Program(dict):
    """A BPF of bcc's (0.19 and later) with tables of such rings."""

    def __init__(self, **tables):
        self.perf_buffers = {}
        super().__init__((name, Table(self, rings)) for name, rings in tables.items())

    def perf_buffer_consume(self):
        raise AssertionError("reads for itself")


def open_buffers(tool, b, table="events"):
    tool.lib = SimpleNamespace(perf_reader_fd=lambda fd: fd)
    return tool.open_buffers(b, table, EVENT, PAGES)


def shown(events):
    return [(ts, name[:length]) for ts, length, name in events]


def test_events_of_all_cpus_are_taken_once(tool):
    first, second = Ring(), Ring()
    b = Program(events=[first, second])
    take = open_buffers(tool, b)
    assert take() == []
    first.write(sample(7, b"a") + sample(9, b"b"))
    second.write(sample(8, b"c"))
    assert shown(take()) == [(7, b"a"), (9, b"b"), (8, b"c")]
    assert take() == []
    for ring in (first, second):
        head, tail = ring.counters()
        assert head == tail > 0


def test_each_table_has_its_own_buffers(tool):
    events, answers = Ring(), Ring()
    b = Program(events=[events], answers=[answers])
    take_events = open_buffers(tool, b)
    take_answers = open_buffers(tool, b, "answers")
    events.write(sample(1, b"event"))
    answers.write(sample(2, b"answer"))
    assert shown(take_answers()) == [(2, b"answer")]
    assert shown(take_events()) == [(1, b"event")]


def test_wakes_when_a_quarter_is_full(tool):
    b = Program(events=[Ring()])
    open_buffers(tool, b)
    assert b["events"].options == {"wakeup_events": BYTES // 72 // 4}


@pytest.mark.parametrize("begin", range(BYTES - 80, BYTES + 8, 8))
def test_records_go_around_the_end_of_the_buffer(tool, begin):
    ring = Ring(begin)
    take = open_buffers(tool, Program(events=[ring]))
    ring.write(sample(1, b"one") + sample(2, b"two"))
    assert shown(take()) == [(1, b"one"), (2, b"two")]


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.binary(max_size=48), st.just(None)), max_size=100),
        max_size=10,
    )
)
def test_any_records(batches):
    """None stands for a record of lost events; all else must come out as it went in."""
    ring, ts = Ring(), itertools.count(1)
    take = open_buffers(load("tcpconnect"), Program(events=[ring]))
    for batch in batches:
        expected = [(next(ts), name) for name in batch if name is not None]
        times = iter(expected)
        ring.write(
            b"".join(
                lost(3) if name is None else sample(*next(times)) for name in batch
            )
        )
        assert shown(take()) == expected


def test_a_full_buffer(tool):
    ring = Ring()
    take = open_buffers(tool, Program(events=[ring]))
    most = BYTES // 72
    ring.write(b"".join(sample(ts, b"x") for ts in range(most)))
    assert shown(take()) == [(ts, b"x") for ts in range(most)]


def test_as_many_lost_records_as_fill_a_whole_event(tool):
    """Three of them have the size of an event."""
    ring = Ring()
    take = open_buffers(tool, Program(events=[ring]))
    ring.write(sample(1, b"a") + 3 * lost(1) + sample(2, b"b"))
    assert shown(take()) == [(1, b"a"), (2, b"b")]


def test_the_end_of_a_rest(tool, monkeypatch):
    """A signal asks for it, or the reader of stdout is gone; a buffer that fills up only ends the rest."""
    filling, fill = os.pipe()
    reader, stdout = os.pipe()
    kept = os.dup(1)
    tool.lib = SimpleNamespace(perf_reader_fd=lambda fd: fd)
    b = Program()
    b.perf_buffers[("events", 0)] = filling
    os.dup2(stdout, 1)
    os.close(stdout)
    try:
        poll = tool.poller(b)
        os.write(fill, b"x")
        assert not tool.rest(poll, 60_000)
        tool.stopping.append(15)
        assert tool.rest(poll, 0)
        tool.stopping.clear()
        os.close(reader)
        assert tool.rest(poll, 0)
    finally:
        os.dup2(kept, 1)
