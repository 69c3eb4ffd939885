"""A real headless Chromium for the tests of the report's page; tests are left out where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def opened(page: Path) -> Iterator[Any]:
    """The browser with the page, through selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (vtp-plugin[dev])")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    with TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in [*ARGUMENTS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            prefer(session, "light")
            session.get(page.as_uri())
            yield session
        finally:
            session.quit()


def prefer(session: Any, scheme: str) -> None:
    """What the reader's system says about light and dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def width(session: Any, pixels: int) -> None:
    metrics = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600}
    session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def complaints(session: Any) -> list[str]:
    """What the page wrote to the console."""
    return [entry["message"] for entry in session.get_log("browser")]


def requests(session: Any) -> set[str]:
    """Addresses that were asked for, data of the page itself and the browser's own first page left out."""
    events = (json.loads(entry["message"])["message"] for entry in session.get_log("performance"))
    asked = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
    return {address for address in asked if not address.startswith(("data:", "chrome:", "chrome-untrusted:"))}
