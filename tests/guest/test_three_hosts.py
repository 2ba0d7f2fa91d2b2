"""Three hosts and an external one, joined by a bridge: network namespaces with host
names, cgroups and tools of their own.

What the tools print is left in the results directory, with a list of what was done;
tests/fleet/test_traced_hosts.py joins it. In one release only, for what differs between
kernels is tested elsewhere.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import select
import socket
import subprocess

import pytest
from conftest import Worker, only_on, read_byte
from traffic import LINGER_0

RESULTS = pathlib.Path("/mnt/rw/fleet")
HOSTS = ("web1", "app2", "db3", "external")
ADDRESSES = {
    host: (f"203.0.113.{n}", f"2001:db8:f::{n}") for n, host in enumerate(HOSTS, 1)
}
CLONE_NEWNET = 0x40000000

# A container on web1, which masquerades it. The port is kept except towards port 8001.
# No port that is chosen by chance is one of the host's, which are 32768 and above.
CONTAINER_PORTS = "net.ipv4.ip_local_port_range=20000 29999"
CONTAINER, CONTAINERS_GATEWAY = "10.88.0.2", "10.88.0.1"
MASQUERADE = f"""
table ip fleet {{
    chain postrouting {{
        type nat hook postrouting priority 100
        ip saddr {CONTAINER} tcp dport 8001 masquerade to :10000-19999 fully-random
        ip saddr {CONTAINER} masquerade
    }}
}}
"""

# A service address, which web1 translates into that of app2's gunicorn
SERVICE = "198.51.100.1"
DESTINATION_NAT = f"""
table ip service {{
    chain output {{
        type nat hook output priority -100
        ip daddr {SERVICE} tcp dport 80 dnat to {ADDRESSES["app2"][0]}:8000
    }}
}}
"""


@contextlib.contextmanager
def network():
    """The hosts, each behind a port of one bridge."""
    commands = ["link add fleet type bridge", "link set fleet up"]
    for host in HOSTS:
        commands += [
            f"netns add {host}",
            f"link add to_{host} type veth peer name eth0 netns {host}",
            f"link set to_{host} master fleet up",
            f"-netns {host} address add {ADDRESSES[host][0]}/24 dev eth0",
            f"-netns {host} address add {ADDRESSES[host][1]}/64 dev eth0 nodad",
            f"-netns {host} link set eth0 up",
            f"-netns {host} link set lo up",
        ]
    commands += [
        "netns add container",
        "link add eth0 netns container type veth peer name to_container netns web1",
        f"-netns container address add {CONTAINER}/24 dev eth0",
        "-netns container link set eth0 up",
        f"-netns container route add default via {CONTAINERS_GATEWAY}",
        f"-netns web1 address add {CONTAINERS_GATEWAY}/24 dev to_container",
        "-netns web1 link set to_container up",
        f"-netns web1 route add {SERVICE} dev eth0",
        "netns exec web1 sysctl --quiet net.ipv4.ip_forward=1",
        "netns exec web1 nft --file -",
    ]
    try:
        for command in commands:
            subprocess.run(
                ["ip", *command.split()],
                input=MASQUERADE + DESTINATION_NAT,
                text=True,
                check=True,
            )
        sysctl = ["ip", "netns", "exec", "container", "sysctl", "--quiet"]
        subprocess.run([*sysctl, CONTAINER_PORTS], check=True)
        yield
    finally:
        for command in [f"netns delete {host}" for host in (*HOSTS, "container")] + [
            "link delete fleet"
        ]:
            subprocess.run(["ip", *command.split()], check=False)


def enter(host, cgroup, container=None):
    """Make this process one of that host: in this cgroup of it, and in its network
    namespace or that of a container.
    """
    cgroup.mkdir(exist_ok=True)
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    with open(f"/run/netns/{container or host}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0


def serve(host, cgroup, listening, ready):
    """Accept on all these (address, port) until killed, and greet each client once it
    has been accepted.
    """
    enter(host, cgroup)
    servers = [
        socket.create_server(
            one,
            family=socket.AF_INET6 if ":" in one[0] else socket.AF_INET,
            dualstack_ipv6=one[0] == "::",
        )
        for one in listening
    ]
    os.write(ready, b".")
    while True:
        for server in select.select(servers, [], [])[0]:
            with server.accept()[0] as connection:
                connection.sendall(b".")
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(1)  # the client closes it


def connect(host, cgroup, container, family, to, count, ports):
    """Connect to an (address, port) `count` times, each accepted before the next, from
    these local ports if any.
    """
    enter(host, cgroup, container)
    for i in range(count):
        with socket.socket(family) as client:
            if ports:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Reset: the port is free immediately
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
                client.bind(("", ports[i % len(ports)]))
            client.connect(to)
            assert client.recv(1) == b"."


def connect_refused(host, cgroup, to, count):
    enter(host, cgroup)
    for _ in range(count):
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(to)


class Fleet:
    """The hosts at work. done: what was done, as tests/fleet/test_traced_hosts.py wants
    to know it.
    """

    def __init__(self, start, cgroups):
        self.start, self.cgroups, self.done, self.servers = start, cgroups, [], []
        for host in HOSTS:
            (cgroups / f"{host}.slice").mkdir()

    def cgroup(self, host, comm):
        """That of a process: a service of its name, as with systemd."""
        return self.cgroups / f"{host}.slice" / f"{comm}.service"

    def tools(self, host, *commands):
        """Start tools on a host, by its name; they see no other host's processes."""
        name = ("sh", "-c", 'hostname "$0" && exec "$@"', host)
        wrapper = ("nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", *name)
        held = f"--json --cgroup {self.cgroups / host}.slice"
        commands = [f"{command} {held}" for command in commands]
        return self.start(*commands, options={"wrapper": wrapper})

    def serve(self, host, comm, *listening):
        reader, writer = os.pipe()
        cgroup = self.cgroup(host, comm)
        worker = Worker(comm.encode(), serve, host, cgroup, listening, writer)
        read_byte(reader, f"{comm}'s sockets")
        self.servers.append(worker.pid)

    def connect(
        self,
        count,
        client,
        comm,
        server,
        server_comm,
        address,
        port,
        seen=(True, True),
        family=None,
        ports=(),
        container=None,
        nat="",
        at_server=None,
    ):
        """Have it done, and note it. seen: whether the client's and the server's tools
        were on; at_server: source, address and port there, where these differ; nat: how
        the two are matched then, or None if they cannot be.
        """
        family = family or (socket.AF_INET6 if ":" in address else socket.AF_INET)
        cgroup = self.cgroup(client, comm)
        args = (client, cgroup, container, family, (address, port), count, ports)
        Worker(comm.encode(), connect, *args).report()
        source = ADDRESSES[client][":" in address and not address.startswith("::ffff:")]
        source = CONTAINER if container else source
        address = address.replace("::ffff:", "")
        views = [(seen, at_server)]
        if nat is None:
            views = [((True, False), None), ((False, True), at_server)]
        for sides, other in views:
            self.note(
                "connections",
                sides,
                other,
                nat or "",
                count=count,
                client=client,
                client_comm=comm,
                source=source,
                server=server,
                server_comm=server_comm,
                address=address,
                port=port,
            )

    def refused(self, count, client, comm, server, port):
        address = ADDRESSES[server][0]
        args = (client, self.cgroup(client, comm), (address, port), count)
        Worker(comm.encode(), connect_refused, *args).report()
        self.note(
            "failures",
            (True, False),
            count=count,
            client=client,
            client_comm=comm,
            source=ADDRESSES[client][0],
            server=server,
            server_comm=None,
            address=address,
            port=port,
        )

    def note(self, what, seen, at_server=None, nat="", **known):
        """known: the fields that test_traced_hosts.py takes as they are."""
        ends = known["source"], known["address"], known["port"]
        sides = {"client_seen": seen[0], "server_seen": seen[1]}
        more = {"at_server": at_server or ends, "nat": nat}
        self.done.append({"what": what, **known, **sides, **more})

    def end(self):
        for pid in self.servers:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


@only_on("bookworm")
def test_three_hosts(start, cgroups):
    with network():
        fleet = Fleet(start, cgroups)
        try:
            logs = work(fleet)
        finally:
            fleet.end()
    RESULTS.mkdir()
    for host, tools in logs.items():
        for tool in tools:
            assert tool.complaints() == []
            with (RESULTS / f"{host}.json").open("a") as log:
                log.write(tool.out.read_text())
    (RESULTS / "done").write_text(json.dumps(fleet.done))


WEB, APP, DB, EXTERNAL = (ADDRESSES[host][0] for host in HOSTS)
WEB6, APP6 = ADDRESSES["web1"][1], ADDRESSES["app2"][1]
LOCAL = "127.0.0.1"
TOOLS = "tcpconnect -l", "tcpaccept"


def work(fleet):
    """All that is done; returns {host: its tools}, which have exited."""
    fleet.serve("web1", "nginx", (WEB, 80), (WEB6, 80), (LOCAL, 8080))
    fleet.serve("app2", "gunicorn", (APP, 8000), (APP6, 8000), (APP, 8001))
    fleet.serve("db3", "postgres", ("::", 5432), (LOCAL, 8080))
    fleet.serve("external", "mail", (EXTERNAL, 25))

    web_tools = fleet.tools("web1", *TOOLS)
    app_tools = fleet.tools("app2", *TOOLS)
    # Before db3's tools are on
    fleet.connect(
        11, "app2", "migrate", "db3", "postgres", DB, 5432, seen=(True, False)
    )
    db_tools = fleet.tools("db3", *TOOLS)
    work_between_hosts(fleet)
    work_with_the_same_ports(fleet)
    work_with_translation(fleet)
    work_with_the_external_host(fleet)

    for tool in app_tools:
        tool.end()
    fleet.connect(
        41, "web1", "deploy", "app2", "gunicorn", APP, 8000, seen=(True, False)
    )
    fleet.connect(43, "app2", "deploy", "web1", "nginx", WEB6, 80, seen=(False, True))
    app_tools += fleet.tools("app2", *TOOLS)
    fleet.connect(47, "web1", "monitor", "app2", "gunicorn", APP, 8000)
    fleet.connect(53, "app2", "monitor", "web1", "nginx", WEB6, 80)

    logs = {"web1": web_tools, "app2": app_tools, "db3": db_tools}
    for tool in (*web_tools, *app_tools[2:], *db_tools):
        tool.end()
    return logs


def work_between_hosts(fleet):
    fleet.connect(23, "web1", "nginx-worker", "app2", "gunicorn", APP, 8000)
    fleet.connect(19, "web1", "nginx-worker", "app2", "gunicorn", APP6, 8000)
    fleet.connect(
        7,
        "app2",
        "gunicorn",
        "db3",
        "postgres",
        f"::ffff:{DB}",
        5432,
        family=socket.AF_INET6,
    )
    fleet.connect(5, "app2", "gunicorn", "web1", "nginx", WEB, 80)
    fleet.connect(2, "web1", "healthcheck", "web1", "nginx", WEB, 80)


def work_with_the_same_ports(fleet):
    """The same four addresses and ports: on two hosts; over and over, by two
    processes.
    """
    ports = [31001, 31002, 31003]  # none that the kernel chooses by itself
    fleet.connect(3, "web1", "statsd", "web1", "nginx", LOCAL, 8080, ports=ports)
    fleet.connect(3, "db3", "statsd", "db3", "postgres", LOCAL, 8080, ports=ports)
    fleet.connect(31, "web1", "celery", "app2", "gunicorn", APP, 8001, ports=[31500])
    fleet.connect(29, "web1", "flower", "app2", "gunicorn", APP, 8001, ports=[31500])


def work_with_translation(fleet):
    """A service address, masquerading, and masquerading that changes the port."""
    fleet.connect(
        *(59, "web1", "cart", "app2", "gunicorn", SERVICE, 80),
        ports=range(31600, 31659),
        nat="dnat",
        at_server=(WEB, APP, 8000),
    )
    fleet.connect(
        *(61, "web1", "worker", "app2", "gunicorn", APP, 8000),
        container="container",
        nat="snat",
        at_server=(WEB, APP, 8000),
    )
    fleet.connect(
        *(67, "web1", "mailer", "app2", "gunicorn", APP, 8001),
        container="container",
        nat=None,
        at_server=(WEB, APP, 8001),
    )


def work_with_the_external_host(fleet):
    """A port where nobody listens, and a host that is not traced."""
    fleet.refused(13, "web1", "nginx-worker", "app2", 81)
    fleet.connect(
        17, "external", "scanner", "web1", "nginx", WEB, 80, seen=(False, True)
    )
    fleet.connect(
        37, "db3", "backup", "external", "mail", EXTERNAL, 25, seen=(True, False)
    )
