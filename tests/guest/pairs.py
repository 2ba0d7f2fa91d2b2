"""Command lines in which each two options that make sense together are together at
least once.

tests/guest/test_pairs.py runs them on real traffic, tests/host/test_pairs.py looks
whether a pair is missing.
"""

SHORT = (
    "-p {pids} -P {ports} -u nobody "
    "--cgroup {cgroup} --cgroupmap {cgroups} --mntnsmap {namespaces}"
)
LONG = SHORT.replace("-p", "--pid", 1).replace("-P", "--port").replace("-u", "--uid")

# A column, --json and -c never go together, nor do -4 and -6: six lines are the fewest.
LINES = {
    "tcpconnect": [
        f"-t -T -U -L -d -x -l -m 0 -b 64 -4 {SHORT}",
        f"{LONG} --ipv6 --timestamp --time --print-uid --lport --dns --buffer-pages 32",
        f"--json -d -b 128 -6 --failed --latency --min-ms 0 {SHORT}",
        f"{LONG} --ipv4 --json --dns --buffer-pages 1024",
        f"-c -4 {SHORT}",
        f"{LONG} --ipv6 --count",
    ],
    "tcpaccept": [
        f"-t -T -U -R -q -b 64 -4 {SHORT}",
        (
            f"{LONG} --ipv6 --timestamp --time --print-uid --rport --queue"
            " --buffer-pages 32"
        ),
        f"--json -q -b 128 -6 {SHORT}",
        f"{LONG} --ipv4 --json --queue --buffer-pages 1024",
        f"-c -4 {SHORT}",
        f"{LONG} --ipv6 --count",
    ],
}
