"""Build `libnvidia-ml.so.1` for emulated GPUs from the C sources in this folder.

The state file's layout is said once, in `emulators.state`; the offsets that the C code uses are
generated from it, and so are the stubs of every public name that `shim.c` does not implement. The
result is kept in the user's cache under a name that changes with any of its sources.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from emulators import native, state
from emulators.nvml import DRIVER_VERSION
from testbed.core.errors import DeviceError

STATE_VARIABLE = "TESTBED_NVML_STATE"


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
    magic = "".join(f"\\x{byte:02x}" for byte in state.MAGIC)
    lines = [
        f'#define LAYOUT_MAGIC "{magic}"',
        f"#define LAYOUT_MAGIC_SIZE {len(state.MAGIC)}",
        f"#define LAYOUT_VERSION {state.LAYOUT_VERSION}",
        f"#define LAYOUT_MAX_PROCESSES {state.MAX_PROCESSES}",
        f'#define LAYOUT_DRIVER "{DRIVER_VERSION}"',
    ]
    records = native.layout_header(
        HEADER=state.HEADER, MEASURED=state.MEASURED, CONTROL=state.CONTROL, PROCESS=state.PROCESS
    )
    return records + "\n".join(lines) + "\n"


def stubs_source() -> str:
    """Functions that say NOT_SUPPORTED, for all public names that are not implemented."""
    missing = sorted(set(public_names()) - set(implemented_names()))
    lines = ["/* Generated: public names without an implementation. */"]
    lines += [
        f'__attribute__((visibility("default"))) int {name}(void) {{ return 3; }}'
        for name in missing
    ]
    return "\n".join(lines) + "\n"


def source_files() -> dict[str, str]:
    """Texts of all C sources and headers by their names, generated ones included."""
    read = {
        name: (resources.files(__name__) / name).read_text(encoding="utf-8")
        for name in ("shim.c", "api.h")
    }
    return {**read, "layout.h": layout_header(), "stubs.c": stubs_source()}


def build_shim(*, cache: Path | None = None) -> Path:
    """Folder with ``libnvidia-ml.so.1`` and ``libnvidia-ml.so``, built if it is not there yet.

    Args:
        cache: where to keep it; ``$XDG_CACHE_HOME/serving-testbed`` by default.

    Raises:
        DeviceError: there is no C compiler, or it failed.
    """
    library = "libnvidia-ml.so.1"
    flags = ("-O2", f"-Wl,-soname,{library}", "-lpthread")
    try:
        return native.build_library(
            library, source_files(), flags, also=["libnvidia-ml.so"], cache=cache
        )
    except DeviceError as error:
        raise DeviceError(
            f"{error}; emulated GPUs still work inside this process, but other programs cannot "
            "see them"
        ) from None
