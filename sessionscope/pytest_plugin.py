"""The pytest fixture ``sessionscope_isolate``, available as soon as sessionscope is installed.

Call it in the fixture that creates the client::

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
    """Return a function that undoes, after the test, everything that a registry's sessions do.

    Call the function with a ``scoped_session``.  It returns and raises what
    `sessionscope.testing.isolated` does.
    """
    # Imported here, because pytest loads this module even if no test uses it.
    from sessionscope.testing import isolated

    with ExitStack() as blocks:
        yield lambda registry: blocks.enter_context(isolated(registry))
