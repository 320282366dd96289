"""A context in which the harness's code runs with its own seeds and without output."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED


@contextlib.contextmanager
def seeded_and_silent() -> Iterator[None]:
    """Seed as the harness seeds itself, and silence it: it prints, logs, warns and draws progress bars.

    The states of the random generators and of logging are restored at the end.
    """
    states = random.getstate(), np.random.get_state()
    disabled = logging.root.manager.disable
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])
