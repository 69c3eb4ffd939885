"""What transformers says about weights that nobody asked for, where they are ours and nobody needs to hear it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

REPORTERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
REPORT, MISSING = "LOAD REPORT", ("MISSING", "MISMATCH", "CONVERSION")


@contextmanager
def without_report() -> Iterator[None]:
    """While open, a table of unexpected weights is not shown: a CLIP is read in halves, tower and text tower.

    One that says that something is missing or does not fit is shown.
    """
    loggers = [logging.getLogger(name) for name in REPORTERS]
    for logger in loggers:
        logger.addFilter(_worth_reading)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_worth_reading)


def _worth_reading(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return REPORT not in said or any(word in said for word in MISSING)
