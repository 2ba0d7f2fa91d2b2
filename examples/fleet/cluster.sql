-- cluster.sql  The distributed variant of schema.sql: many ClickHouse servers, queried
-- as one.
--
-- schema.sql has made tcp_events and tcp_connections on each server, in the database
-- fleet_local. This makes tables of the same names in the database fleet, which stand
-- for all of them; insert there, and ask there. {cluster} is a macro of the servers'
-- configuration.

CREATE DATABASE IF NOT EXISTS fleet ON CLUSTER '{cluster}';

-- The rows of a connection go to the same server, whichever host they come from.
CREATE TABLE IF NOT EXISTS fleet.tcp_events ON CLUSTER '{cluster}'
AS fleet_local.tcp_events
ENGINE = Distributed(
    '{cluster}', fleet_local, tcp_events, cityHash64(saddr, sport, daddr, dport)
);

-- So each server can join its own, and only counts travel.
CREATE TABLE IF NOT EXISTS fleet.tcp_connections ON CLUSTER '{cluster}'
AS fleet_local.tcp_connections
ENGINE = Distributed('{cluster}', fleet_local, tcp_connections);

CREATE VIEW IF NOT EXISTS fleet.tcp_addresses ON CLUSTER '{cluster}' AS
SELECT if(event = 'accept', daddr, saddr) AS address, argMax(host, ts) AS host
FROM fleet.tcp_events
WHERE event IN ('connect', 'accept')
GROUP BY address;
