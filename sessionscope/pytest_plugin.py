"""The fixture of `sessionscope.testing` for pytest, which finds it by itself.

The fixture that gives tests their client is a good place to call it::

    import pytest
    import webtest
    from myapp import Session, application

    @pytest.fixture
    def client(sessionscope_isolate):
        sessionscope_isolate(Session)  # until the end of the test
        return webtest.TestApp(application)

    def test_an_item_is_made(client):
        client.post("/items")
        assert client.get("/items").text == "1"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sessionscope.testing import Isolate


@pytest.fixture
def sessionscope_isolate() -> Iterator[Isolate]:
    """Call it with a ``scoped_session``: all that its sessions do is undone after the test.

    What it returns and raises is that of `sessionscope.testing.isolated`.
    """
    # Imported here: pytest loads this module also where no test uses it.
    from sessionscope.testing import isolated

    with ExitStack() as blocks:
        yield lambda registry: blocks.enter_context(isolated(registry))
