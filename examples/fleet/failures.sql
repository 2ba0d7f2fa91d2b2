-- failures.sql  Failed connects, by destination and error, from `since` on and before
-- `until`: the rows of tcpconnect -x, and the failures of tcpconnect -l.
--
-- server_host: the host that has the address, found as in servicemap.sql.
WITH
    single_hosts AS
    (
        SELECT hour, address, any(host) AS host
        FROM tcp_addresses(
            since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
        )
        GROUP BY hour, address
        HAVING count() = 1
    ),
    failed AS
    (
        SELECT
            toStartOfHour(ts) AS hour,
            host, process_or_comm AS comm, daddr, dport, error, is_loopback,
            count() AS failures, min(ts) AS first_seen, max(ts) AS last_seen
        FROM tcp_events FINAL
        WHERE
            event = 'connect_failed'
            AND ts >= {since:DateTime64(6, 'UTC')} AND ts < {until:DateTime64(6, 'UTC')}
            AND hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
            AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
        GROUP BY ALL
    )
SELECT
    failed.host AS client_host,
    comm AS client_comm,
    multiIf(
        is_loopback, failed.host,
        single_hosts.host != '', single_hosts.host,
        (failed.hour, daddr, failed.host) IN (
            SELECT hour, address, host
            FROM tcp_addresses(
                since = {since:DateTime64(6, 'UTC')},
                until = {until:DateTime64(6, 'UTC')}
            )
        ), failed.host,
        ''
    ) AS server_host,
    replaceRegexpOne(toString(daddr), '^::ffff:([0-9]+[.])', '\\1') AS server_address,
    dport AS port,
    error,
    sum(failed.failures) AS failures,
    min(failed.first_seen) AS first_seen,
    max(failed.last_seen) AS last_seen
FROM failed
LEFT JOIN single_hosts
    ON single_hosts.hour = failed.hour AND single_hosts.address = daddr
GROUP BY client_host, client_comm, server_host, daddr, port, error
ORDER BY failures DESC, client_host, client_comm, daddr, port, error;
