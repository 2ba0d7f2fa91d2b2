-- cluster.sql  Many ClickHouse servers, queried as one.
--
-- schema.sql has made its tables on each server, in the database fleet_local. This
-- makes the same names in the database fleet, which cover all servers; then schema.sql
-- makes its views there, on each server: it leaves the tables that are there. Insert
-- there, and query there. {cluster} is a macro of the servers' configuration.

CREATE DATABASE IF NOT EXISTS fleet ON CLUSTER '{cluster}';

-- The rows of a host go to the same server, so that a row that is sent twice is one.
CREATE TABLE IF NOT EXISTS fleet.tcp_events ON CLUSTER '{cluster}'
AS fleet_local.tcp_events
ENGINE = Distributed('{cluster}', fleet_local, tcp_events, cityHash64(host));

CREATE TABLE IF NOT EXISTS fleet.tcp_nodes ON CLUSTER '{cluster}'
AS fleet_local.tcp_nodes
ENGINE = Distributed('{cluster}', fleet_local, tcp_nodes);

CREATE TABLE IF NOT EXISTS fleet.tcp_listeners ON CLUSTER '{cluster}'
AS fleet_local.tcp_listeners
ENGINE = Distributed('{cluster}', fleet_local, tcp_listeners);

CREATE TABLE IF NOT EXISTS fleet.tcp_destinations ON CLUSTER '{cluster}'
AS fleet_local.tcp_destinations
ENGINE = Distributed('{cluster}', fleet_local, tcp_destinations);

CREATE TABLE IF NOT EXISTS fleet.tcp_addresses ON CLUSTER '{cluster}'
AS fleet_local.tcp_addresses
ENGINE = Distributed('{cluster}', fleet_local, tcp_addresses);

-- All rows of an hour go to the same server, where they replace those that are there.
CREATE TABLE IF NOT EXISTS fleet.tcp_edges ON CLUSTER '{cluster}'
AS fleet_local.tcp_edges
ENGINE = Distributed('{cluster}', fleet_local, tcp_edges, cityHash64(hour));
