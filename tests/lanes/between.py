"""Runs the short suite with every minor release of transformers between the floor and the pin: `between.py FOLDER`.

Each is put in front of this environment by PYTHONPATH, without what it asks for: what is here has to do for all.
Arguments behind the folder go to pytest. The records lie in the folder, `VERSION.json`; one that is not green fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip"]


def pinned(file: str) -> Version:
    lines = (ROOT / file).read_text().splitlines()
    return next(Version(line.partition("==")[2]) for line in lines if line.startswith("transformers=="))


def between(versions: Iterable[str], oldest: Version, newest: Version) -> list[str]:
    """The last patch of every minor release strictly between two, the oldest first."""
    found = sorted(version for version in map(Version, versions) if not version.is_prerelease)
    last = {version.release[:2]: version for version in found}
    return [str(version) for minor, version in last.items() if oldest.release[:2] < minor < newest.release[:2]]


def released() -> list[str]:
    said = subprocess.check_output([*PIP, "index", "versions", "transformers", "--json"], text=True)
    return json.loads(said)["versions"]


def main() -> int:
    folder, *more = sys.argv[1:]
    codes = []
    for version in between(released(), pinned("constraints-oldest.txt"), pinned("constraints.txt")):
        place = Path(folder).resolve() / version
        if not place.exists():
            wanted = f"transformers=={version}"
            subprocess.check_call([*PIP, "install", "--quiet", "--no-deps", "--target", str(place), wanted])
        command = [sys.executable, str(Path(__file__).with_name("lane.py")), f"transformers {version}"]
        environment = os.environ | {"PYTHONPATH": str(place)}
        codes.append(subprocess.call([*command, f"{place}.json", *more], env=environment))
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
