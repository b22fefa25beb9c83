"""Hot modules as machine code: the same Python, compiled by mypyc.

The engine is a state machine on plain numbers, typed throughout, so mypyc makes it three times
faster without a line of it changing; so is what requests pass on their way to it. What it builds is
kept in the user's cache under a name that changes with the sources, the interpreter and the
compiler, and is imported in place of the ``.py`` files from then on: an edited source is never
shadowed by an old build, it runs interpreted until it is built again. ``SERVING_TESTBED_PURE=1``
leaves the compiled modules alone.

This module imports nothing of the project, since it decides what an import of it means.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import MutableSequence
from importlib import metadata, util
from pathlib import Path

MODULES = (
    "emulators/engine.py",
    "emulators/farm.py",
    "emulators/timing.py",
    "testbed/coordinator/dispatch.py",
    "testbed/core/transport/counting.py",
    "testbed/core/transport/intake.py",
    "testbed/shells/request_path.py",
)
"""From the folder that the packages are in."""
PURE_VARIABLE = "SERVING_TESTBED_PURE"
ONCE_VARIABLE = "SERVING_TESTBED_COMPILED"
"""Set for a command that has just been started over with a fresh build."""
_SHARED = "shared"
"""Folder of the library that the modules share: alone, since it comes to lie on ``sys.path``, where
a folder called like the package would be taken for it by processes that are spawned."""
_CORE = "testbed/core/messages.py"
_ROOT = Path(__file__).parents[2]
_OPTIONS = "opt_level=3, shared apart"

_SETUP = """
import sys
from setuptools import setup
from mypyc.build import mypycify

cache, target, *sources = sys.argv[1:]
sys.argv[1:] = ["-q", "build_ext", "--build-lib", target + "/lib", "--build-temp", target + "/temp"]
arguments = ["--cache-dir", cache, "--config-file=", "--follow-imports=silent", *sources]
modules = mypycify(arguments, opt_level="3", target_dir=target + "/c")
setup(name="compiled", ext_modules=modules, script_name="setup.py")
"""


def cache_folder() -> Path:
    """Where programs that we build are kept: ``$XDG_CACHE_HOME/serving-testbed``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "serving-testbed"


def build_folder(cache: Path | None = None) -> Path:
    """Where the build of the present sources is, or would be."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()} {_OPTIONS}".encode())
    # Neighbours too: compiled code has the types of what they declare built in.
    for folder in sorted({(_ROOT / name).parent for name in (*MODULES, _CORE)}):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return (cache or cache_folder()) / f"engine-{digest.hexdigest()[:16]}"


def use(package: str, path: MutableSequence[str]) -> None:
    """Have the ``__path__`` of a package find its compiled modules first, if they are there."""
    if os.environ.get(PURE_VARIABLE):
        return
    try:
        build = build_folder()
        folder = build.joinpath(*package.split("."))
        if folder.is_dir():
            path.insert(0, str(folder))
            if str(build / _SHARED) not in sys.path:
                sys.path.append(str(build / _SHARED))
    except (OSError, RuntimeError):  # no home, or one that cannot be read
        return


def set_aside(path: MutableSequence[str]) -> None:
    """Undo `use` before anything is imported: doctests are collected from the sources."""
    folder = str(build_folder())
    path[:] = [entry for entry in path if not entry.startswith(folder)]


def in_use() -> bool:
    """Whether this process runs the compiled engine."""
    found = util.find_spec("emulators.engine")
    return found is not None and not str(found.origin).endswith(".py")


def why_not() -> str:
    """What is missing to compile with; empty if nothing is."""
    if util.find_spec("mypyc") is None or util.find_spec("setuptools") is None:
        return "mypy and setuptools are not installed (pip install 'serving-testbed[fast]')"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")):
        return "there is no C compiler (gcc or cc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (Debian: python3-dev)"
    return ""


def build(*, cache: Path | None = None) -> Path:
    """Compile, if that has not been done for these sources: half a minute.

    Raises:
        RuntimeError: something to compile with is missing, or the compiler failed.
    """
    folder = build_folder(cache)
    if (folder / "emulators").is_dir():
        return folder
    missing = why_not()
    if missing:
        raise RuntimeError(missing)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".engine-") as scratch:
        done = subprocess.run(
            [sys.executable, "-c", _SETUP, f"{scratch}/mypy", scratch,
             *MODULES],
            cwd=_ROOT,  # so that mypy finds the packages by their names
            # Without contraction of a*b+c, so that the numbers are Python's on every processor.
            env={
                **os.environ,
                PURE_VARIABLE: "1",
                "MYPYPATH": "",
                "CFLAGS": f"{os.environ.get('CFLAGS', '')} -ffp-contract=off",
            },
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        built = Path(scratch) / "lib"
        if done.returncode or not built.is_dir():
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise RuntimeError(f"mypyc {metadata.version('mypy')} failed: {lines[-1]}")
        (built / _SHARED).mkdir()
        for library in built.glob("*.*"):
            library.rename(built / _SHARED / library.name)
        try:
            built.rename(folder)
        except OSError:
            if not (folder / "emulators").is_dir():  # somebody else was faster
                raise
    return folder
