-- servicemap.sql  Who talks to whom: a row for each process name and port that a
-- process name connects to.
--
-- known: "both"; "client" where the accept is missing, "server" where the connect is.
-- Of an end that is not known there is the address, and the host if a host of the fleet
-- has that address.
WITH
    edges AS
    (
        SELECT
            is_client_known, client_host, client_comm,
            if(is_client_known, toIPv6('::'), saddr) AS client,
            is_server_known, server_host, server_comm,
            if(is_server_known, toIPv6('::'), daddr) AS server,
            dport, is_loopback,
            count() AS connections, min(ts) AS first_seen, max(ts) AS last_seen
        FROM tcp_connections
        GROUP BY ALL
    )
SELECT
    multiIf(
        is_client_known, edges.client_host,
        is_loopback, edges.server_host,
        clients.host
    ) AS client_host,
    edges.client_comm AS client_comm,
    if(
        is_client_known,
        '',
        replaceRegexpOne(toString(client), '^::ffff:([0-9]+[.])', '\\1')
    ) AS client_address,
    multiIf(
        is_server_known, edges.server_host,
        is_loopback, edges.client_host,
        servers.host
    ) AS server_host,
    edges.server_comm AS server_comm,
    if(
        is_server_known,
        '',
        replaceRegexpOne(toString(server), '^::ffff:([0-9]+[.])', '\\1')
    ) AS server_address,
    dport AS port,
    multiIf(
        is_client_known AND is_server_known, 'both',
        is_client_known, 'client',
        'server'
    ) AS known,
    connections, first_seen, last_seen
FROM edges
LEFT JOIN tcp_addresses AS clients ON clients.address = client
LEFT JOIN tcp_addresses AS servers ON servers.address = server
ORDER BY
    client_host, client_comm, client_address,
    server_host, server_comm, server_address, port;
