"""Installs a package's newest release into a folder if it lies outside this package's bounds: `beyond.py NAME FOLDER`.

What it asks for comes with it, but nothing in the environment changes: the folder is put in front of it by PYTHONPATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

PIP = [sys.executable, "-m", "pip"]


def newest(name: str) -> str:
    """The newest release that the index has, whatever this package's bounds are."""
    said = subprocess.check_output([*PIP, "index", "versions", name, "--json"], text=True)
    return json.loads(said)["latest"]


def main() -> None:
    name, folder = sys.argv[1:]
    found, here = newest(name), version(name)
    if found == here:
        print(f"{name} {here} is the newest release: nothing lies beyond the declared bounds")
        return
    print(f"{name} {found} lies beyond the declared bounds ({here} is the newest inside)")
    subprocess.check_call([*PIP, "install", "--quiet", "--target", folder, f"{name}=={found}"])


if __name__ == "__main__":
    main()
