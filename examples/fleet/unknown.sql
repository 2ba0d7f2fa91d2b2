-- unknown.sql  Connections with peers outside the fleet, from `since` on and before
-- `until`: accepts whose client is no host of it, and connects whose server is none.
--
-- An address is of the fleet if a row of a host has it as its own, in any of the hours.
-- So these are external hosts, or hosts whose rows are missing.
WITH
    unmatched AS
    (
        SELECT
            if(is_client_known, 'connect', 'accept') AS event,
            observer AS host,
            if(is_client_known, client_comm, server_comm) AS comm,
            other,
            dport AS port,
            sum(edges.connections) AS connections,
            min(edges.first_seen) AS first_seen,
            max(edges.last_seen) AS last_seen
        FROM tcp_counts(
            since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
        ) AS edges
        WHERE NOT is_matched AND NOT is_loopback
        GROUP BY event, host, comm, other, port
    )
SELECT
    event, unmatched.host AS host, comm,
    replaceRegexpOne(toString(other), '^::ffff:([0-9]+[.])', '\\1') AS address,
    port, connections, first_seen, last_seen
FROM unmatched
LEFT ANTI JOIN tcp_addresses(
    since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
) AS addresses ON addresses.address = other
ORDER BY event, host, comm, other, port;
