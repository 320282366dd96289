"""Random values as JSON and YAML have them: ordinary ones, and those that break programs; and the number of cases.

Without FUZZ_CASES in the environment there are few cases, the same ones each time.
"""

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mlprune.errors import UserError

CASES = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "60")),
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
NUMBERS = [0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf")]
TEXTS = ["", " ", "\0", "\x1b[31m", "\ud800", "\u202e", "a" * 300, "../x", "~", "~no-such-user", "/", "x" * 20_000]

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-10, 10_000),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
)


def values(*known: object) -> st.SearchStrategy[Any]:
    """Any value, often one of `known`, alone or in lists and sections."""
    leaves = st.one_of(scalars, st.sampled_from(known)) if known else scalars
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    )


def check_line(error: UserError) -> None:
    """Check that an error is one line of printable characters that a person can read."""
    line = str(error)
    assert line.isprintable()
    assert 0 < len(line) < 1500
