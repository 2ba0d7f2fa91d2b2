-- servicemap.sql  Service map: a row for each client, server and port, from `since` on
-- and before `until`. A client or server is a process name on a host: client_comm and
-- server_comm are names of processes, not of their threads.
--
-- known: "both"; "client" where the accept is missing, "server" where the connect is.
-- nat: "dnat" or "snat" where both ends were matched across address translation, as
-- schema.sql says; else empty. The port is the one that the client connected to.
--
-- Of an end that is not known there is the address. Its host is named if exactly one
-- host had the address in that hour, else the observer if it had it. A loopback address
-- is the observer's.
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
    edges AS
    (
        SELECT
            *,
            multiIf(
                is_matched, '',
                is_loopback, observer,
                single_hosts.host != '', single_hosts.host,
                (hour, other, observer) IN (
                    SELECT hour, address, host
                    FROM tcp_addresses(
                        since = {since:DateTime64(6, 'UTC')},
                        until = {until:DateTime64(6, 'UTC')}
                    )
                ), observer,
                ''
            ) AS other_host,
            replaceRegexpOne(toString(other), '^::ffff:([0-9]+[.])', '\\1')
                AS other_address
        FROM tcp_edges(
            since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
        ) AS edges
        LEFT JOIN single_hosts
            ON single_hosts.hour = edges.hour AND single_hosts.address = edges.other
    )
SELECT
    if(is_client_known, edges.client_host, other_host) AS client_host,
    edges.client_comm AS client_comm,
    if(is_client_known, '', other_address) AS client_address,
    if(is_server_known, edges.server_host, other_host) AS server_host,
    edges.server_comm AS server_comm,
    if(is_server_known, '', other_address) AS server_address,
    dport AS port,
    multiIf(is_matched, 'both', is_client_known, 'client', 'server') AS known,
    sum(edges.connections) AS connections,
    min(edges.first_seen) AS first_seen,
    max(edges.last_seen) AS last_seen,
    edges.nat AS nat
FROM edges
GROUP BY ALL
ORDER BY
    client_host, client_comm, client_address,
    server_host, server_comm, server_address, port, nat;
