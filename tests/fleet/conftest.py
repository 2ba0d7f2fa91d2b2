"""What the tests of examples/fleet share."""

import pytest

from . import clickhouse


@pytest.fixture(scope="session")
def clickhouse_library():
    try:
        return clickhouse.library()
    except clickhouse.Unavailable as why:
        pytest.skip(f"NO CLICKHOUSE SERVER: {why}")
