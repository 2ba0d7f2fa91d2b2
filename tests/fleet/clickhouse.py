"""ClickHouse servers on this machine.

An npm package for Node.js has all of ClickHouse as a library. Its chdb_query_cmdline is
the command clickhouse-local, which is a server for HTTP and TCP after SYSTEM START
LISTEN. It has users and clusters, but no ON CLUSTER, no replicas that work, and no
queue of async inserts. PyPI's chdb has no such function.

As a command, this file is one server:
    clickhouse.py LIBRARY --OPTION=VALUE...     (options of clickhouse-local)
"""

import base64
import contextlib
import ctypes
import fcntl
import hashlib
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

PACKAGE = "@chdb/lib-linux-x64-gnu@26.7.3-stable.1"  # 167 MB
SHA256 = "c0d32b129e988f2b9a9a31c9141aecf5e1e2453f9a079efc4d36ab8e3f92b2ad"
LIBRARY = "libchdb.so"
DEADLINE = 300  # seconds until a server that does not answer is held to be stuck

# The second query keeps the process there.
SERVE = """
SYSTEM START LISTEN QUERIES DEFAULT;
SELECT sleepEachRow(1) FROM numbers(1000000000) FORMAT Null
SETTINGS max_block_size = 1, function_sleep_max_microseconds_per_block = 0
"""


# The users have the rights that examples/fleet/README.md names, and no others.
CONFIG = """
<clickhouse>
    <users_config>config.xml</users_config>
    <listen_reuse_port>1</listen_reuse_port>
    <macros><cluster>fleet</cluster></macros>
    <remote_servers><fleet>{shards}</fleet></remote_servers>
    <profiles><default/></profiles>
    <quotas><default/></quotas>
    <users>
        <default>{user}<no_password/></default>
        <tcptools>{user}
            <password>secret</password>
            <grants>
                <query>GRANT INSERT ON fleet.tcp_events</query>
                <query>GRANT INSERT ON fleet_local.tcp_events</query>
            </grants>
        </tcptools>
        <reader>{user}
            <no_password/>
            <grants>
                <query>GRANT SELECT ON fleet.*</query>
                <query>GRANT SELECT ON fleet_local.*</query>
            </grants>
        </reader>
    </users>
</clickhouse>
"""
USER = """
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile><quota>default</quota>"""
SHARD = "<shard><replica><host>127.0.0.1</host><port>{}</port></replica></shard>"


class Unavailable(Exception):
    """Why there is no ClickHouse here."""


def library():
    """The path of the library, which is downloaded once per machine."""
    if (platform.machine(), platform.libc_ver()[0]) != ("x86_64", "glibc"):
        raise Unavailable(f"{PACKAGE} is for x86_64 and glibc")
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cache = pathlib.Path(home) / "tcptools"
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"clickhouse-{SHA256[:12]}"
    with open(cache / "clickhouse.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for old in cache.glob("clickhouse-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache) as work:
                extract(download(pathlib.Path(work))).rename(directory)
    return directory / LIBRARY


def download(work):
    """The path of the package, in a directory."""
    command = ["npm", "pack", "--loglevel=error", f"--cache={work}/cache", PACKAGE]
    try:
        subprocess.run(command, cwd=work, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable(f"there is no npm to download {PACKAGE} with") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.partition("\n")[0]
        raise Unavailable(f"cannot download {PACKAGE}: {why}") from None
    [archive] = work.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256, PACKAGE
    return archive


def extract(archive):
    """A directory beside the package that has the library."""
    directory = archive.parent / "library"
    directory.mkdir()
    with tarfile.open(archive) as tar, open(directory / LIBRARY, "wb") as file:
        shutil.copyfileobj(tar.extractfile(f"package/{LIBRARY}"), file)
    return directory


def serve(path, *options):
    """Be a server, until killed, or until the process that started this is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    library.chdb_query_cmdline.restype = ctypes.c_void_p
    library.chdb_result_error.restype = ctypes.c_char_p
    library.chdb_result_error.argtypes = [ctypes.c_void_p]
    command = ["clickhouse", *options, f"--query={SERVE}"]
    argv = (ctypes.c_char_p * len(command))(*[word.encode() for word in command])
    result = library.chdb_query_cmdline(len(command), argv)
    sys.exit((library.chdb_result_error(result) or b"the server ended").decode())


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status


@contextlib.contextmanager
def servers(library, top, count=1):
    """A cluster of so many servers, which answer. Their data is below top."""
    with contextlib.ExitStack() as stack:
        http, tcp = ([stack.enter_context(port()) for _ in range(count)] for _ in "12")
        made = [
            Server(library, top / f"server{n}", http[n], tcp[n], tcp)
            for n in range(count)
        ]
        for server in made:
            stack.callback(server.kill)
            server.start()
        for server in made:
            server.wait()
        yield made


@contextlib.contextmanager
def port():
    """A port of 127.0.0.1 for a server that sets SO_REUSEPORT, as this socket does: it
    is nobody else's, even while the server is down.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class Server:
    """A server whose data is in a directory. It can be killed and started again.

    The TCP ports of all servers of its cluster are shards.
    """

    def __init__(self, library, directory, http, tcp, shards):
        self.directory, self.log, self.process = directory, directory / "log", None
        self.url = f"http://127.0.0.1:{http}"
        directory.mkdir()
        places = "".join(SHARD.format(port) for port in shards)
        (directory / "config.xml").write_text(CONFIG.format(shards=places, user=USER))
        self.command = [
            sys.executable,
            __file__,
            library,
            f"--path={directory}/data",
            f"--config-file={directory}/config.xml",
            "--listen_host=127.0.0.1",
            f"--http_port={http}",
            f"--tcp_port={tcp}",
        ]

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.directory
            )

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                return self.query("SELECT 1")
            except urllib.error.URLError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, f"{self.url} does not answer"
                time.sleep(0.05)

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def query(self, sql, user="default", password="", **settings):
        """The text that it answers. Raises Refused."""
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/?{urllib.parse.urlencode(settings)}",
            data=sql.encode() if isinstance(sql, str) else sql,
            headers={"Authorization": f"Basic {login}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from None

    def run(self, script, **settings):
        """The statements of a file, as clickhouse-client would send them."""
        for statement in re.sub(r"--.*", "", script).split(";"):
            if statement.strip():
                self.query(statement, **settings)


if __name__ == "__main__":
    serve(*sys.argv[1:])
