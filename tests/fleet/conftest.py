"""What the tests of examples/fleet share."""

import pytest

from . import clickhouse
from .events import Database, servicemap


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """One for all tests: each load() empties it first."""
    with servicemap.database(tmp_path_factory.mktemp("chdb")) as session:
        yield Database(session)


@pytest.fixture(scope="session")
def clickhouse_library():
    try:
        return clickhouse.library()
    except clickhouse.Unavailable as why:
        pytest.skip(f"NO CLICKHOUSE SERVER: {why}")
