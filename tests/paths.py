"""Where things lie in the checkout and outside of it."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def resolve_in(folder: str, layout: str) -> str:
    """Where the embedded checkpoint is, with this cache: for processes of their own."""
    from vtp_plugin.tiny.checkpoint import resolve

    os.environ["VTP_CACHE"] = folder
    return str(resolve(layout=layout))
