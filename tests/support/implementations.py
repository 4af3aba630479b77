"""The implementations that tests of the operators run, each where it can."""

import pytest

IMPLEMENTATIONS = ("reference", "blocked", pytest.param("native", marks=pytest.mark.native))
