-- failures.sql  What fails, towards where, and why: the rows of tcpconnect -x.
--
-- server_host: the host of the fleet that has the address, if one has.
WITH
    failed AS
    (
        SELECT
            host, comm, daddr, dport, error,
            count() AS failures, min(ts) AS first_seen, max(ts) AS last_seen
        FROM tcp_events FINAL
        WHERE event = 'connect_failed'
        GROUP BY ALL
    )
SELECT
    failed.host AS client_host,
    comm AS client_comm,
    tcp_addresses.host AS server_host,
    replaceRegexpOne(toString(daddr), '^::ffff:([0-9]+[.])', '\\1') AS server_address,
    dport AS port,
    error, failures, first_seen, last_seen
FROM failed
LEFT JOIN tcp_addresses ON tcp_addresses.address = daddr
ORDER BY failures DESC, client_host, client_comm, daddr, port, error;
