-- unknown.sql  What crosses the boundary of the fleet: accepts whose client is no host
-- of it, and connects whose server is none.
--
-- A host is of the fleet if a row of its own has the address. So these are external
-- hosts, or hosts whose rows are missing.
WITH
    unmatched AS
    (
        SELECT
            if(is_client_known, 'connect', 'accept') AS event,
            if(is_client_known, client_host, server_host) AS host,
            if(is_client_known, client_comm, server_comm) AS comm,
            if(is_client_known, daddr, saddr) AS other,
            dport,
            count() AS connections, min(ts) AS first_seen, max(ts) AS last_seen
        FROM tcp_connections
        WHERE NOT (is_client_known AND is_server_known) AND NOT is_loopback
        GROUP BY ALL
    )
SELECT
    event, host, comm,
    replaceRegexpOne(toString(other), '^::ffff:([0-9]+[.])', '\\1') AS address,
    dport AS port,
    connections, first_seen, last_seen
FROM unmatched
LEFT ANTI JOIN tcp_addresses ON tcp_addresses.address = other
ORDER BY event, host, comm, other, port;
