"""Build `libnvidia-ml.so.1` for emulated GPUs from the C sources in this folder.

The state file's layout is said once, in `emulators.state`; the offsets that the C code uses are
generated from it, and so are the stubs of every public name that `shim.c` does not implement. The
result is kept in the user's cache under a name that changes with any of its sources.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np

from emulators import state
from emulators.compiled import cache_folder
from emulators.nvml import DRIVER_VERSION
from testbed.core.errors import DeviceError

STATE_VARIABLE = "TESTBED_NVML_STATE"
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden")


def public_names() -> list[str]:
    """Every public function name of NVML 13, superseded versions included."""
    return (resources.files(__name__) / "names.txt").read_text(encoding="ascii").split()


def implemented_names() -> list[str]:
    """Names that ``shim.c`` defines."""
    source = (resources.files(__name__) / "shim.c").read_text(encoding="utf-8")
    plain = re.findall(r"^EXPORT [\w ]+ \*?(nvml\w+)\(", source, re.MULTILINE)
    macros = re.findall(r"^(?:GETTER|IDLE_ENGINE|NO_PROCESSES)\((nvml\w+)", source, re.MULTILINE)
    return sorted(plain + macros)


def layout_header() -> str:
    """The state file's layout as C constants."""
    lines = ["/* Generated from emulators/state.py. */"]
    for name in ("HEADER", "MEASURED", "CONTROL", "PROCESS"):
        dtype: np.dtype[np.void] = getattr(state, name)
        lines.append(f"#define {name}_SIZE {dtype.itemsize}")
        assert dtype.fields is not None
        for field, (kind, offset, *_) in dtype.fields.items():
            lines.append(f"#define {name}_{field} {offset}")
            lines.append(f"#define {name}_{field}_SIZE {kind.itemsize}")
    magic = "".join(f"\\x{byte:02x}" for byte in state.MAGIC)
    lines += [
        f'#define LAYOUT_MAGIC "{magic}"',
        f"#define LAYOUT_MAGIC_SIZE {len(state.MAGIC)}",
        f"#define LAYOUT_VERSION {state.LAYOUT_VERSION}",
        f"#define LAYOUT_MAX_PROCESSES {state.MAX_PROCESSES}",
        f'#define LAYOUT_DRIVER "{DRIVER_VERSION}"',
    ]
    return "\n".join(lines) + "\n"


def stubs_source() -> str:
    """Functions that say NOT_SUPPORTED, for all public names that are not implemented."""
    missing = sorted(set(public_names()) - set(implemented_names()))
    lines = ["/* Generated: public names without an implementation. */"]
    lines += [
        f'__attribute__((visibility("default"))) int {name}(void) {{ return 3; }}'
        for name in missing
    ]
    return "\n".join(lines) + "\n"


def write_sources(folder: Path) -> list[Path]:
    """Put all C sources, generated ones included, into a folder; returns those to compile."""
    for name in ("shim.c", "api.h"):
        (folder / name).write_text(
            (resources.files(__name__) / name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    (folder / "layout.h").write_text(layout_header(), encoding="ascii")
    (folder / "stubs.c").write_text(stubs_source(), encoding="ascii")
    return [folder / "shim.c", folder / "stubs.c"]


def build_shim(*, cache: Path | None = None) -> Path:
    """Folder with ``libnvidia-ml.so.1`` and ``libnvidia-ml.so``, built if it is not there yet.

    Args:
        cache: where to keep it; ``$XDG_CACHE_HOME/serving-testbed`` by default.

    Raises:
        DeviceError: there is no C compiler, or it failed.
    """
    cache = cache or cache_folder()
    with tempfile.TemporaryDirectory() as scratch:
        sources = write_sources(Path(scratch))
        digest = hashlib.sha256(" ".join(_FLAGS).encode())
        for path in sorted(Path(scratch).iterdir()):
            digest.update(path.read_bytes())
        folder = cache / f"nvml-{digest.hexdigest()[:16]}"
        if (folder / "libnvidia-ml.so").exists():
            return folder
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise DeviceError(
                "no C compiler (gcc or cc) to build libnvidia-ml.so.1 with; emulated GPUs still "
                "work inside this process, but other programs cannot see them"
            )
        library = Path(scratch) / "libnvidia-ml.so.1"
        done = subprocess.run(
            [compiler, *_FLAGS, "-shared", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library),
             *map(str, sources), "-lpthread"],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            first = done.stderr.strip().splitlines() or ["no message"]
            raise DeviceError(f"{compiler} could not build libnvidia-ml.so.1: {first[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        # Into place under another name first: two builders must not see half a file.
        for name in ("libnvidia-ml.so.1", "libnvidia-ml.so"):
            temporary = folder / f".{name}.{os.getpid()}"
            shutil.copy(library, temporary)
            temporary.rename(folder / name)
    return folder
