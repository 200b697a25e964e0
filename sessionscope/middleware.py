"""The top-level ``middleware.py``, when the package is used from a clone.

An installed package has the real file in this place.
"""

import sys

import middleware
from middleware import *  # noqa: F403

sys.modules[__name__] = middleware
