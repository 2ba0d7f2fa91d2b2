"""Command lines in which each two options that make sense together are together at
least once.

tests/guest/test_combined_options.py runs them on real traffic; a host test looks
whether a pair is missing.
"""

SHORT = (
    "-p {pids} -P {ports} -u nobody -n it "
    "--cgroup {cgroup} --cgroupmap {cgroups} --mntnsmap {namespaces}"
)
LONG = SHORT.replace("-p", "--pid", 1).replace("-P", "--port").replace("-u", "--uid")
LONG = LONG.replace("-n", "--name", 1)

# -4 and -6 never go together. --json and -c leave columns out.
FOUR, SIX = "-4 -a {four}", "-a {six} -6"
COLUMNS = "-t -T -U --unit"
COUNT = f"-c -i 86400 --per-process {COLUMNS}"
LONG_COUNT = "--count --interval 86400 --per-process --time --json"
LONG_COLUMNS = "--timestamp --time --print-uid --unit --buffer-pages 32"
LINES = {
    "tcpconnect": [
        f"{COLUMNS} -L -d -x -l -m 0 -b 64 {FOUR} {SHORT}",
        f"{LONG} --addr {{six}} --ipv6 {LONG_COLUMNS} --lport --dns",
        f"--json {COLUMNS} -L -d -b 128 {SIX} --failed --latency --min-ms 0 {SHORT}",
        f"{LONG} --addr {{four}} --ipv4 --json --dns --buffer-pages 1024",
        f"{COUNT} -L {FOUR} {SHORT}",
        f"{LONG} --addr {{six}} --ipv6 {LONG_COUNT}",
    ],
    "tcpaccept": [
        f"{COLUMNS} -R -q -b 64 {FOUR} {SHORT}",
        f"{LONG} --addr {{six}} --ipv6 {LONG_COLUMNS} --rport --queue",
        f"--json {COLUMNS} -R -q -b 128 {SIX} {SHORT}",
        f"{LONG} --addr {{four}} --ipv4 --json --queue --buffer-pages 1024",
        f"{COUNT} -R {FOUR} {SHORT}",
        f"{LONG} --addr {{six}} --ipv6 {LONG_COUNT}",
    ],
    # test_dropped.py runs these
    "tcpaccept -x": [
        f"-x -t -T -R -q -b 64 {FOUR} -P {{ports}}",
        f"--failed --json {SIX} -P {{ports}}",
    ],
}
