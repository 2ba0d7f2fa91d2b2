-- cluster.sql  The distributed variant of schema.sql: many ClickHouse servers, queried
-- as one.
--
-- schema.sql has made its table and views on each server, in the database fleet_local.
-- This makes the same names in the database fleet, which cover all servers; insert
-- there, and query there. {cluster} is a macro of the servers' configuration.

CREATE DATABASE IF NOT EXISTS fleet ON CLUSTER '{cluster}';

-- The rows of a connection go to the same server, whichever host they come from: by the
-- source port, which most address translation keeps. Hashed, as Linux gives every other
-- port first.
CREATE TABLE IF NOT EXISTS fleet.tcp_events ON CLUSTER '{cluster}'
AS fleet_local.tcp_events
ENGINE = Distributed('{cluster}', fleet_local, tcp_events, cityHash64(sport));

-- So each server can join its own, with the offsets of clocks that its rows show. All
-- rows of the view travel.
CREATE OR REPLACE VIEW fleet.tcp_connections ON CLUSTER '{cluster}' AS
SELECT * FROM cluster('{cluster}', view(
    SELECT * FROM fleet_local.tcp_connections(
        since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
    )
));

-- Only counts travel. The query of schema.sql is here again: a server would look for
-- the view that its own tcp_counts names in the database of the connection, which is
-- not fleet_local.
CREATE OR REPLACE VIEW fleet.tcp_counts ON CLUSTER '{cluster}' AS
SELECT * FROM cluster('{cluster}', view(
    SELECT
        is_client_known, client_host, client_comm,
        is_server_known, server_host, server_comm,
        dport, is_loopback,
        is_client_known AND is_server_known AS is_matched,
        multiIf(is_matched, '', is_client_known, client_host, server_host) AS observer,
        multiIf(is_matched, toIPv6('::'), is_client_known, daddr, saddr) AS other,
        if(is_matched, toDateTime(0, 'UTC'), toStartOfHour(ts)) AS hour,
        nat, count() AS connections, min(ts) AS first_seen, max(ts) AS last_seen
    FROM fleet_local.tcp_connections(
        since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
    )
    GROUP BY ALL
));

-- A host's rows are on many servers.
CREATE OR REPLACE VIEW fleet.tcp_addresses ON CLUSTER '{cluster}' AS
SELECT DISTINCT * FROM cluster('{cluster}', view(
    SELECT * FROM fleet_local.tcp_addresses(
        since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
    )
));

-- The views that fleet_local.tcp_map names are looked up in the database of the
-- connection, too: these are fleet's, as long as that is the database. A time travels
-- as text, in seconds since 1970, which a server misreads if they are few.
CREATE OR REPLACE VIEW fleet.tcp_map ON CLUSTER '{cluster}' AS
WITH toDateTime64('2002-01-01 00:00:00', 6, 'UTC') AS least_time
SELECT * FROM fleet_local.tcp_map(
    since = greatest({since:DateTime64(6, 'UTC')}, least_time),
    until = greatest({until:DateTime64(6, 'UTC')}, least_time)
);

-- All rows of an hour go to the same server, where they replace those that are there.
CREATE TABLE IF NOT EXISTS fleet.tcp_edges ON CLUSTER '{cluster}'
AS fleet_local.tcp_edges
ENGINE = Distributed('{cluster}', fleet_local, tcp_edges, cityHash64(hour));
