"""Every offset and size that the C programs read is what bpftool finds in the BTF."""

import json
import os
import re
import subprocess

from conftest import BTF, TOP

# Together they read all that the tools ever do.
LINES = (
    "tcpconnect -x -d --json --mntnsmap /",
    "tcpaccept -q --json --mntnsmap /",
    "tcpaccept -x --json",
)


def read_by(line, method):
    """{(struct, member): [offset, size]} in the C program of a tool."""
    name, *options = line.split()
    done = subprocess.run(
        [TOP / name, "--ebpf", *options],
        env={**os.environ, "TCPTOOLS_METHOD": method},
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = re.findall(
        r"^#define OFFSET_(\w+) (\d+)\n#define SIZE_\1 (\d+)$",
        done.stdout,
        re.MULTILINE,
    )
    return {member: [int(offset), int(size)] for member, offset, size in pairs}


class Types:
    """The types in this kernel's BTF, as bpftool prints them."""

    def __init__(self):
        command = ["bpftool", "-j", "btf", "dump", "file", str(BTF)]
        dump = subprocess.run(command, capture_output=True, check=True).stdout
        self.types = {entry["id"]: entry for entry in json.loads(dump)["types"]}
        self.structs = {
            entry["name"]: entry
            for entry in self.types.values()
            if entry["kind"] == "STRUCT"
        }

    def size(self, type_id):
        entry = self.types[type_id]
        if entry["kind"] == "PTR":
            return 8
        if entry["kind"] == "ARRAY":
            return entry["nr_elems"] * self.size(entry["type_id"])
        return entry["size"] if "size" in entry else self.size(entry["type_id"])

    def members(self, entry, base=0):
        """Yield (name, [offset, size]) of a struct's members, but bitfields."""
        for member in entry["members"]:
            type_id, offset = member["type_id"], base + member["bits_offset"]
            if member["name"] == "(anon)":
                yield from self.members(self.types[type_id], offset)
            elif not member.get("bitfield_size"):
                yield member["name"], [offset // 8, self.size(type_id)]


def test_offsets_and_sizes():
    read = {}
    for line in LINES:
        for method in ("fexit", "kprobe"):
            read.update(read_by(line, method))
    assert len(read) > 35 and "sock_common_skc_v6_daddr" in read
    types = Types()
    said = {
        f"{name}_{member}": where
        for name, entry in types.structs.items()
        if any(key.startswith(f"{name}_") for key in read)
        for member, where in types.members(entry)
    }
    assert read == {key: said[key] for key in read}
