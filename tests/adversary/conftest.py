"""What the tests share that fork one process for every command."""

from collections.abc import Iterator

import pytest
from adversary_process import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()
