-- failures.sql  Failed connects, by destination and error, from `since` on and before
-- `until`: the rows of tcpconnect -x, and the failures of tcpconnect -l.
--
-- server_host: the host that has the address, found as in servicemap.sql.
SELECT
    failed.host AS client_host, unit AS client_unit, shown_name AS client_comm,
    multiIf(
        failed.is_loopback OR has(hosts, failed.host), failed.host,
        length(hosts) = 1, hosts[1],
        ''
    ) AS server_host,
    replaceRegexpOne(toString(daddr), '^::ffff:([0-9]+[.])', '\\1') AS server_address,
    dport AS port, error, sum(failed.failures) AS failures,
    min(failed.first_seen) AS first_seen, max(failed.last_seen) AS last_seen
FROM
(
    SELECT
        toStartOfHour(ts) AS hour, toString(host) AS host, unit,
        if(unit = '', tcp_events.name, '') AS process,
        any(tcp_events.name) AS shown_name, daddr, dport, error, is_loopback,
        count() AS failures, min(ts) AS first_seen, max(ts) AS last_seen
    FROM tcp_events FINAL
    WHERE
        event = 'connect_failed'
        AND ts >= {since:DateTime64(6, 'UTC')} AND ts < {until:DateTime64(6, 'UTC')}
        AND hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
        AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
    GROUP BY hour, tcp_events.host, unit, process, daddr, dport, error, is_loopback
) AS failed
LEFT JOIN tcp_hosts(
    since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
) AS whose ON whose.hour = failed.hour AND whose.address = daddr
GROUP BY client_host, client_unit, client_comm, server_host, daddr, port, error
ORDER BY failures DESC, client_host, client_unit, client_comm, daddr, port, error;
