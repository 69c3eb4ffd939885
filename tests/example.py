"""docs/example-plugin in this process: on the path, and gone again with everything that it declared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from paths import ROOT

from vtp_plugin.signals import declaration

EXAMPLE = ROOT / "docs" / "example-plugin"


@contextmanager
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its package can be imported while the block runs."""
    monkeypatch.setattr(declaration, "_DECLARED", {view: dict(own) for view, own in declaration._DECLARED.items()})
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    yield
    for name in [name for name in sys.modules if name.startswith("vtp_example")]:
        del sys.modules[name]
