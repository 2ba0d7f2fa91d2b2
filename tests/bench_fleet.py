"""Measure examples/fleet on generated rows: the map's time and memory, what rows take
on disk, and servicemap as a command.

USAGE: bench_fleet.py

Takes the Python of the venv that tests/install prints. A figure is a line of JSON.

A size is a day of 1,000 clients and 50 servers: half of the rows are connects, half
accepts; of either 2 % are missing and 2 % duplicated; a connection's addresses and
ports come again up to three times in the day; all accepts are inserted after all
connects. chdb is set as servicemap sets it. Each size has a process of its own, and so
a peak of its own: that is the most memory that the process has had, with Python, the
engine's library and the insert. A peak over 1 GB is an error. How many connections
there must be is counted from how the rows are made. MB are 10^6 bytes.
"""

import contextlib
import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from importlib.machinery import SourceFileLoader

SERVICEMAP = pathlib.Path(__file__).resolve().parents[1] / "examples/fleet/servicemap"
SIZES = [1_000_000, 10_000_000]  # rows
REPEATS = 3
MOST_MB = 1000  # for all that is measured here
INSERT_CONNECTIONS = 250_000  # per batch
LINES = 1_000_000  # for loading
EDGES = 1_200_000  # of a large map

# Accepts, each of a client of its own.
CLIENTS = """
SELECT
    fromUnixTimestamp64Micro(toInt64(1795392000000000 + number * 100), 'UTC') AS ts,
    'server' AS host, 'accept' AS event, 900 AS pid, 901 AS tid, 33 AS uid,
    'nginx' AS comm, toIPv6(
        concat('2001:db8::', hex(intDiv(number, 65536)), ':', hex(number % 65536))
    ) AS saddr,
    32768 + number % 28000 AS sport, toIPv6('10.2.0.1') AS daddr, 443 AS dport,
    4026531840 AS netns, 4000 AS cgroup
FROM numbers({edges})
"""

# The rows of one side of connections: {side} is 1 for connects, 2 for accepts.
# {connections} is how many there are in the day. Number n is of client n % 1000 and
# server n / 1000 % 50, which come again every 50,000 connections; the port then is
# another, out of 40. So neither data nor order is as a compressor would like it.
ROWS = """
WITH
    number AS n,
    n % 1000 AS client,
    intDiv(n, 1000) % 50 AS server,
    intHash32(intDiv(n, 50000) % 40 + 40 * (n % 50000)) AS port_hash,
    cityHash64(n, {side}) AS luck,
    {side} = 1 AS is_client,
    ['curl', 'python3', 'java', 'envoy', 'ruby', 'node', 'sshd', 'php-fpm'] AS clients,
    ['nginx', 'postgres', 'redis-server', 'haproxy'] AS servers
SELECT
    fromUnixTimestamp64Micro(
        toInt64(
            1795392000000000 + n * intDiv(86400000000, {connections})
            + cityHash64(n, 3) % 1000
            + if(is_client, 100 + cityHash64(n, 7) % 2000, 50 + cityHash64(n, 4) % 5000)
        ),
        'UTC'
    ) AS ts,
    concat(
        if(is_client, 'client', 'server'), toString(if(is_client, client, server))
    ) AS host,
    if(is_client, 'connected', 'accept') AS event,
    if(is_client, 100 + cityHash64(n, 7) % 2000, 0) AS latency_us,
    toUInt32(if(is_client, 1000 + cityHash64(n, 5) % 300, 900 + server)) AS pid,
    toUInt32(pid + cityHash64(n, 6) % 16) AS tid,
    toUInt32(if(is_client, 1000, 33)) AS uid,
    if(is_client, clients[1 + client % 8], servers[1 + server % 4]) AS comm,
    toIPv6(
        concat('10.1.', toString(intDiv(client, 250)), '.', toString(client % 250))
    ) AS saddr,
    toUInt16(32768 + port_hash % 28000) AS sport,
    toIPv6(concat('10.2.0.', toString(server))) AS daddr,
    toUInt16([80, 5432, 6379, 443][1 + server % 4]) AS dport,
    toUInt32(4026531840) AS netns,
    toUInt64(4000 + if(is_client, client % 40, server)) AS cgroup
FROM numbers({start}, {count})
ARRAY JOIN range(if(luck % 50 = 1, 2, 1))
WHERE luck % 50 != 0
"""
COLUMNS = (
    "ts, host, event, latency_us, pid, tid, uid, comm, saddr, sport, daddr, dport, "
    "netns, cgroup"
)

# {known: connections}: each connect is an edge; an accept is one only if its client
# made no connect to the server in that hour, or within a minute of it.
EXPECTED = """
WITH
    connects AS ({connects}),
    accepts AS ({accepts}),
    (client, server, hour) -> cityHash64(client, server, hour) AS pair
SELECT 'both' AS known, count() AS connections
FROM (SELECT DISTINCT * FROM connects)
UNION ALL
SELECT 'server', count()
FROM (SELECT DISTINCT * FROM accepts)
WHERE pair(saddr, daddr, toStartOfHour(ts)) NOT IN (
    SELECT pair(saddr, daddr, arrayJoin([
        toStartOfHour(ts - INTERVAL latency_us MICROSECOND - INTERVAL 1 MINUTE),
        toStartOfHour(ts - INTERVAL latency_us MICROSECOND + INTERVAL 1 MINUTE)
    ]))
    FROM connects
)
"""

STORED = """
SELECT sum(rows) AS rows, sum(bytes_on_disk) AS bytes
FROM system.parts
WHERE active AND table = 'tcp_events'
"""


def load_servicemap():
    loader = SourceFileLoader("servicemap", str(SERVICEMAP))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("servicemap", loader)
    )
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def database():
    """servicemap as a module, and its database, empty."""
    servicemap = load_servicemap()
    with (
        tempfile.TemporaryDirectory() as directory,
        servicemap.database(directory) as session,
    ):
        yield servicemap, session


def insert(session, connections):
    for side in (1, 2):
        for start in range(0, connections, INSERT_CONNECTIONS):
            count = min(INSERT_CONNECTIONS, connections - start)
            rows = ROWS.format(
                side=side, connections=connections, start=start, count=count
            )
            session.query(f"INSERT INTO tcp_events ({COLUMNS}) {rows}")


def peak_mb():
    """The most memory that this process has had, in MB."""
    return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def megabytes(usage):
    return usage.ru_maxrss * 1024 / 1e6


def repeated(run):
    """What run() takes each time: times and CPU times (s), and the process's peaks
    until then (MB).
    """
    found = {"seconds": [], "cpu_seconds": [], "peaks": []}
    for _ in range(REPEATS):
        began, cpu_began = time.monotonic(), time.process_time()
        run()
        found["seconds"].append(time.monotonic() - began)
        found["cpu_seconds"].append(time.process_time() - cpu_began)
        found["peaks"].append(peak_mb())
    return check_peaks(found)


def check_peaks(found):
    if max(found["peaks"]) > MOST_MB:
        peaks = ", ".join(f"{peak:.0f}" for peak in found["peaks"])
        sys.exit(f"bench_fleet: error: peaks of {peaks} MB, where {MOST_MB} may be")
    return found


def join(rows):
    """What servicemap.sql takes over so many rows, and the bytes of a row on disk."""
    connections = rows // 2
    with database() as (servicemap, session):
        insert(session, connections)
        expected = count_expected(servicemap, session, connections)
        query = servicemap.sql_file("servicemap")
        session.query(
            "OPTIMIZE TABLE tcp_events FINAL"
        )  # merges would be measured, too
        found = repeated(lambda: agree(expected, servicemap.ask(session, query)))
        [stored] = servicemap.ask(session, STORED)
    return {**found, "disk": stored["bytes"] / stored["rows"]}


def count_expected(servicemap, session, connections):
    """{known: connections} as they have to be."""
    connects, accepts = (
        ROWS.format(side=side, connections=connections, start=0, count=connections)
        for side in (1, 2)
    )
    rows = servicemap.ask(session, EXPECTED.format(connects=connects, accepts=accepts))
    return {row["known"]: row["connections"] for row in rows}


def agree(expected, answer):
    found = dict.fromkeys(expected, 0)
    for row in answer:
        found[row["known"]] += row["connections"]
    if found != expected:
        sys.exit(f"bench_fleet: error: the map says {found}, where {expected} is right")


def write_lines(session, rows, path):
    """Put rows (their SQL) into a file, as the lines that the tools print."""
    lines = f"SELECT *, 4 AS ip FROM ({rows})"
    session.query(f"{lines} INTO OUTFILE '{path}' FORMAT JSONEachRow")


def load(lines):
    """What it takes to put so many lines into chdb, as servicemap does."""
    rows = ROWS.format(side=1, connections=2 * lines, start=0, count=2 * lines)
    with database() as (servicemap, session), tempfile.TemporaryDirectory() as top:
        path = f"{top}/lines"
        write_lines(session, f"SELECT * FROM ({rows}) LIMIT {lines}", path)
        return repeated(lambda: servicemap.load(session, path, path))


def script(lines, *args):
    """What servicemap takes for so many lines, with loading them, as a command."""
    connections = lines // 2
    with tempfile.TemporaryDirectory() as directory:
        with database() as (servicemap, session):
            expected = count_expected(servicemap, session, connections)
            for side in (1, 2):
                rows = ROWS.format(
                    side=side, connections=connections, start=0, count=connections
                )
                write_lines(session, rows, f"{directory}/{side}.json")
        began = time.monotonic()
        command = [sys.executable, SERVICEMAP, "--json", *args]
        command += [f"{directory}/1.json", f"{directory}/2.json"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        seconds = time.monotonic() - began
    agree(expected, map(json.loads, answer.splitlines()))
    return children(seconds)


def large_map(edges):
    """What servicemap takes for a map of so many edges, as a command."""
    with tempfile.TemporaryDirectory() as directory:
        with database() as (_, session):
            write_lines(session, CLIENTS.format(edges=edges), f"{directory}/lines")
        began = time.monotonic()
        command = [sys.executable, SERVICEMAP, f"{directory}/lines"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            lines = sum(1 for _ in process.stdout)
        seconds = time.monotonic() - began
    if (lines, process.returncode) != (1 + edges, 0):
        sys.exit(f"bench_fleet: error: servicemap printed {lines} lines for {edges}")
    return children(seconds)


def children(seconds):
    """The figures of the one child process, which took so long."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return check_peaks(
        {
            "seconds": [seconds],
            "cpu_seconds": [usage.ru_utime + usage.ru_stime],
            "peaks": [megabytes(usage)],
        }
    )


def measure(what, number):
    """What a process of its own has measured: one of those in main()."""
    command = [sys.executable, __file__, what, str(number)]
    return json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    )


def figures():
    """Yields a dict for each figure: tool, figure, values (one for each repeat)."""
    for rows in SIZES:
        found = measure("join", rows)
        map_of = f"map of {rows:,} rows"
        yield figure("servicemap.sql", f"{map_of}, s", found["seconds"])
        yield figure("servicemap.sql", f"{map_of}, CPU s", found["cpu_seconds"])
        for number in (1, REPEATS):  # servicemap does one
            peak = f"{map_of}, peak of the process after {number}, MB"
            yield figure("servicemap.sql", peak, [found["peaks"][number - 1]])
        disk = [found["disk"]]
        yield figure("tcp_events", f"a row of {rows:,} on disk, bytes", disk)
    found = measure("load", LINES)
    yield figure("servicemap", f"load {LINES:,} lines, s", found["seconds"])
    yield figure("servicemap", f"load {LINES:,} lines, CPU s", found["cpu_seconds"])
    peak = f"load {LINES:,} lines, peak of the process after {REPEATS}, MB"
    yield figure("servicemap", peak, found["peaks"][-1:])
    for what, number, whole in (
        ("script", SIZES[-1], f"{SIZES[-1]:,} lines as a command"),
        ("large_map", EDGES, f"a map of {EDGES:,} edges as a command"),
    ):
        found = measure(what, number)
        yield figure("servicemap", f"{whole}, s", found["seconds"])
        yield figure("servicemap", f"{whole}, CPU s", found["cpu_seconds"])
        yield figure("servicemap", f"{whole}, peak of the process, MB", found["peaks"])


def figure(tool, what, values):
    return {"tool": tool, "figure": what, "values": values}


def main():
    if sys.argv[1:]:
        parts = join, load, script, large_map
        part = {part.__name__: part for part in parts}[sys.argv[1]]
        print(json.dumps(part(int(sys.argv[2]))))
        return
    for figure in figures():
        print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
