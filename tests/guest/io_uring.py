"""Connect and accept by io_uring, one request at a time, by system calls: there is no
io_uring in Python, nor liburing in the guests.
"""

import ctypes
import mmap
import socket
import struct

from conftest import IPV4

# Numbers of x86-64, and linux/io_uring.h.
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426
IORING_OFF_SQ_RING, IORING_OFF_SQES = 0, 0x10000000
IORING_ENTER_GETEVENTS = 1
IORING_OP_ACCEPT, IORING_OP_CONNECT = 13, 16

libc = ctypes.CDLL(None, use_errno=True)


def sockaddr_in(address, port):
    """An IPv4 address for Ring.run()."""
    packed = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port)
    return ctypes.create_string_buffer(
        packed + socket.inet_aton(address) + bytes(8), 16
    )


class Ring:
    def __init__(self):
        params = ctypes.create_string_buffer(120)
        self.fd = libc.syscall(SYS_IO_URING_SETUP, 4, params)
        assert self.fd >= 0, ctypes.get_errno()
        sq_entries, cq_entries = struct.unpack_from("=II", params)
        _, self.sq_tail, _, _, _, _, self.sq_array = struct.unpack_from(
            "=7I", params, 40
        )
        self.cq_head, _, self.cq_mask, _, _, self.cqes = struct.unpack_from(
            "=6I", params, 80
        )
        size = max(self.sq_array + 4 * sq_entries, self.cqes + 16 * cq_entries)
        self.rings = mmap.mmap(self.fd, size, offset=IORING_OFF_SQ_RING)
        self.sqes = mmap.mmap(self.fd, 64 * sq_entries, offset=IORING_OFF_SQES)
        self.mask = sq_entries - 1

    def number(self, at):
        return struct.unpack_from("=I", self.rings, at)[0]

    def run(self, opcode, fd, address=None):
        """Submit one request, wait, and return its result: 0 or more, or -errno.
        address: a ctypes sockaddr.
        """
        at, length = (ctypes.addressof(address), len(address)) if address else (0, 0)
        sqe = struct.pack("=BBHiQQIIQ24x", opcode, 0, 0, fd, length, at, 0, 0, 0)
        self.sqes[:64] = sqe
        tail = self.number(self.sq_tail)
        struct.pack_into("=I", self.rings, self.sq_array + 4 * (tail & self.mask), 0)
        struct.pack_into("=I", self.rings, self.sq_tail, tail + 1)
        done = libc.syscall(
            SYS_IO_URING_ENTER, self.fd, 1, 1, IORING_ENTER_GETEVENTS, None, 0
        )
        assert done == 1, ctypes.get_errno()
        head = self.number(self.cq_head)
        cqe = self.cqes + 16 * (head & self.number(self.cq_mask))
        _, result, _ = struct.unpack_from("=QiI", self.rings, cqe)
        struct.pack_into("=I", self.rings, self.cq_head, head + 1)
        return result


def connect_by_io_uring(ports):
    """Connect to each port, and be greeted where that works; their results."""
    ring, results = Ring(), []
    for port in ports:
        with socket.socket() as client:
            address = sockaddr_in(IPV4, port)
            results.append(ring.run(IORING_OP_CONNECT, client.fileno(), address))
            if results[-1] == 0:
                client.recv(1)
    return results


def accept_by_io_uring(server, count):
    ring = Ring()
    for _ in range(count):
        with socket.socket(fileno=ring.run(IORING_OP_ACCEPT, server.fileno())) as peer:
            peer.send(b".")
