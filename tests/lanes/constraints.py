"""Writes name==version of an environment that passed: `PYTHON tests/lanes/constraints.py > constraints.txt`.

Run by the environment's own interpreter. No addresses and no local versions. Left out is what cannot be told to another
machine: this package, tools that build packages, and what torch's own wheel pins for its accelerator.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

FLOOR = (3, 11)  # the oldest Python of transformers 5.24: what is pinned has to run there and on newer ones
OWN = {"vtp-plugin", "setuptools", "wheel"}
OF_TORCH = ("nvidia-", "cuda-", "triton")


def pins() -> dict[str, str]:
    """Version by name; SystemExit if one does not run on the oldest Python."""
    found = {}
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"])
        if name in OWN or name.startswith(OF_TORCH):
            continue
        if not SpecifierSet(one.metadata["Requires-Python"] or "").contains("{}.{}.0".format(*FLOOR)):
            sys.exit(f"{name} {one.version} does not run on Python {FLOOR[0]}.{FLOOR[1]}: pin an older release of it")
        found[name] = Version(one.version).public
    return found


def main() -> None:
    if sys.version_info[:2] != FLOOR:
        sys.exit(f"constraints are written with Python {FLOOR[0]}.{FLOOR[1]}, so that newer ones have them, too")
    for name, version in sorted(pins().items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
