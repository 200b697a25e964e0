"""With keys each payment is made once in any storm (contract: once); see storm.py.

What the storms come to is printed; ``pytest -rP`` shows it, and ``make storm`` has longer ones.
"""

from __future__ import annotations

import pytest
from storm import storm

pytestmark = pytest.mark.long

CLIENTS = 50


def test_each_payment_is_made_once(any_url: str) -> None:
    """Each key has one payment, and whoever asks again gets the same answer byte for byte."""
    toll = storm([any_url], seed=1, clients=CLIENTS, keys=2)
    print(toll)
    assert toll.kills
    assert toll.told["cut off"]
    assert toll.once, toll
    # Nothing but what the view itself refuses, and what a rival is still at.
    assert toll.told.keys() <= {"201", "409", "503", "cut off"}


def test_without_keys_payments_are_made_twice(any_url: str) -> None:
    """The same storm makes payments twice where keys mean nothing, or it would prove nothing."""
    toll = storm([any_url], seed=1, clients=CLIENTS, keys=1, keyed=False)
    print(toll)
    assert toll.duplicates
