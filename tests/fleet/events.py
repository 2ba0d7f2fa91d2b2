"""Events as the tools print them, and a database in this process that is asked about
them, with the queries of examples/fleet.
"""

import datetime
import functools
import importlib.util
import json
import pathlib
from importlib.machinery import SourceFileLoader

import pytest

FLEET = pathlib.Path(__file__).parents[2] / "examples/fleet"
SERVICEMAP = FLEET / "servicemap"
BEGIN = datetime.datetime(2026, 11, 24, 10, 0, 0)
WEB1, DB2, EXTERNAL = "10.0.0.1", "10.0.0.2", "198.51.100.7"
SECOND, HOUR = 1_000_000, 3_600_000_000  # µs


def load(path):
    """A script as a module."""
    loader = SourceFileLoader(path.name, str(path))
    spec = importlib.util.spec_from_loader(path.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


servicemap = load(SERVICEMAP)

# ---- events; at: µs since BEGIN


def moment(at):
    """A time as the queries take it."""
    return str(BEGIN + datetime.timedelta(microseconds=at))


def timestamp(at):
    """A time as the tools print it."""
    ts = BEGIN + datetime.timedelta(microseconds=at)
    return ts.isoformat(timespec="microseconds") + "Z"


def event(kind, at, host, comm, saddr=WEB1, sport=40000, daddr=DB2, dport=80, **more):
    row = {
        "ts": timestamp(at),
        "host": host,
        "event": kind,
        "pid": 181,
        "tid": 182,
        "uid": 0,
        "comm": comm,
        "ip": 6 if ":" in saddr else 4,
        "saddr": saddr,
        "sport": sport,
        "daddr": daddr,
        "dport": dport,
        "netns": 4026531840,
        "cgroup": 5251,
    }
    return row | more


def connect(at, comm="curl", host="web1", **more):
    return event("connect", at, host, comm, **more)


def accept(at, comm="nginx", host="db2", **more):
    return event("accept", at, host, comm, **more)


def failed(at, comm="curl", host="web1", error="ECONNREFUSED", **more):
    return event("connect_failed", at, host, comm, error=error, **more)


def pair(at, comm="curl", server="nginx", sport=40000, **more):
    """A connect and its accept."""
    return [
        connect(at, comm, sport=sport, **more),
        accept(at + 300, server, sport=sport, **more),
    ]


def connected(at, comm="curl", host="web1", latency_us=100, **more):
    """A connect at that time, which took so long: tcpconnect -l."""
    return event(
        "connected", at + latency_us, host, comm, latency_us=latency_us, **more
    )


def counted(kind, at, count, host, process, interval_s=60, **more):
    """A row of -c -i: of the interval from that time on."""
    row = event(kind, at + interval_s * SECOND, host, process, **more)
    for name in ("pid", "tid", "uid", "comm", "sport"):
        del row[name]
    return {**row, "process": process, "count": count, "interval_s": interval_s}


def lost(host, count, at=500_000, reason="buffer_full"):
    return {
        "ts": timestamp(at),
        "host": host,
        "event": "lost",
        "count": count,
        "reason": reason,
    }


def text(events):
    return "".join(json.dumps(one) + "\n" for one in events).encode()


# ---- answers

TABLES = ("events", "nodes", "listeners", "destinations", "addresses", "edges")


class Database:
    """The database of servicemap, with what load() was last given."""

    def __init__(self, session):
        self.session, self.events = session, None

    def load(self, events, edges=()):
        """edges: rows of tcp_edges. All is inserted twice, as by a shipper that tries
        again: rows are one only after that, by FINAL.
        """
        self.events = events
        for table in TABLES:
            self.session.query(f"TRUNCATE TABLE tcp_{table}")
        for _ in range(2):
            self.insert("lines", events)
            self.insert("tcp_edges", edges)

    def insert(self, table, rows):
        if rows:
            rows = text(rows).decode()
            self.session.query(f"INSERT INTO {table} FORMAT JSONEachRow {rows}")

    def ask(self, query="servicemap", since=servicemap.BEGIN, until=servicemap.END):
        """The rows that a query gives; without a time, of all events."""
        sql = servicemap.sql_file(query)
        return servicemap.ask(self.session, sql, since, until)

    def answer(self, events, query="servicemap"):
        self.load(events)
        return self.ask(query)


END = ("host", "comm", "address")
ENDS = [f"{side}_{name}" for side in ("client", "server") for name in END]


def edges_of(rows):
    """{(client host, name, address, server host, name, address, port): connections}"""
    return {
        (*(row[name] for name in ENDS), row["port"]): row["connections"] for row in rows
    }


def edge(client="web1 curl", server="db2 nginx", port=80):
    """An edge whose ends are "host name", "host ? address" or "? address"."""

    def end(words):
        *host, last = words.split()
        if "?" in host:
            return (host[0] if host[0] != "?" else "", "", last)
        return (host[0], last, "")

    return (*end(client), *end(server), port)


# ---- many cases in one table


def moved(events, number):
    """The events as of hosts of their own, which have addresses of their own: those of
    another number share only ports with them. Loopback addresses stay.
    """
    for one in events:
        ends = {end: one[end] for end in ("saddr", "daddr") if end in one}
        new = {end: moved_address(address, number) for end, address in ends.items()}
        yield {**one, "host": f"{one['host']}~{number}", **new}


def moved_address(address, number):
    """10.0.NUMBER.1 for 10.0.0.1, 2001:db8:NUMBER::1 for 2001:db8::1."""
    if address in ("::1", "0.0.0.0") or address.startswith("127."):
        return address
    if address.startswith("2001:db8::"):
        return address.replace("::", f":{number:x}::")
    *first, _, last = address.split(".")
    return ".".join([*first, str(number), last])


def number_of(row):
    """The number of the events that a row is of."""
    hosts = [row.get(name) for name in ("client_host", "server_host", "host")]
    [number] = {int(host.rpartition("~")[2]) for host in hosts if host}
    return number


def moved_back(row, events):
    """A row of moved events, as if they had stayed what they were."""
    number, back = number_of(row), {}
    for one in events:
        back[f"{one['host']}~{number}"] = one["host"]
        for address in {one[end] for end in ("saddr", "daddr") if end in one}:
            shown = address.replace("::ffff:", "")
            back[moved_address(shown, number)] = shown
    return {name: back.get(value, value) for name, value in row.items()}


class Cases:
    """Tests that share a table and the queries on it, which take most of the time.

    A test is a generator. It yields its events, and gets ask(), which is that of a
    database with no others.
    """

    def __init__(self):
        self.tests, self.answers = {}, {}

    def __call__(self, *arguments):
        """Decorates a test; it is one for each argument, if any."""

        def add(test):
            for one in arguments:
                name = f"{test.__name__}[{one}]"
                self.tests[name] = functools.partial(test, one)
            if not arguments:
                self.tests[test.__name__] = test
            return test

        return add

    @functools.cached_property
    def events(self):
        """Those of all tests."""
        tests = enumerate(self.tests.values())
        return [one for number, test in tests for one in moved(next(test()), number)]

    def rows(self, database, number, *question):
        """Those of one test, of what the database answers to all."""
        if question not in self.answers:
            if database.events is not self.events:
                database.load(self.events)
            self.answers[question] = database.ask(*question)
        return [row for row in self.answers[question] if number_of(row) == number]

    def check(self, name, database):
        test, number = self.tests[name](), list(self.tests).index(name)
        events = list(next(test))

        def ask(*question):
            rows = self.rows(database, number, *question)
            return [moved_back(row, events) for row in rows]

        with pytest.raises(StopIteration):
            test.send(ask)
