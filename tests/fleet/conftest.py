"""What the tests of examples/fleet share."""

import pytest

from . import clickhouse
from .events import Database, servicemap


@pytest.fixture(scope="session")
def database():
    """One for all tests: each load() empties it first."""
    servicemap.import_chdb()
    with servicemap.database() as session:
        session.query("ALTER TABLE tcp_edges REMOVE TTL")  # the hours here grow old
        yield Database(session)


@pytest.fixture(scope="session")
def clickhouse_library():
    try:
        return clickhouse.library()
    except clickhouse.Unavailable as why:
        pytest.skip(f"NO CLICKHOUSE SERVER: {why}")
