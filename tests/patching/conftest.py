import pytest
from upstream_on_disk import write_upstream


@pytest.fixture
def upstream(tmp_path):
    return write_upstream(tmp_path)
