"""The C library: every public name, struct sizes, and clients that are killed or lied to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from importlib import util
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from emulators.gpu import GpuBank
from emulators.nvml import EmulatedNvml
from emulators.nvml_shim import (
    build_shim,
    implemented_names,
    public_names,
    source_files,
)
from emulators.profiles import load_gpu
from emulators.state import HEADER, GpuState
from testbed.core.errors import DeviceError
from testbed.emulate import EmulatedNode, client_environment, parse_load

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


def header() -> Path:
    """NVIDIA's nvml.h, from the package nvidia-nvml-dev."""
    found = util.find_spec("nvidia")
    for root in found.submodule_search_locations if found else ():
        for path in Path(root).rglob("nvml.h"):
            return path
    pytest.skip("nvidia-nvml-dev is not installed")


@pytest.fixture
def node(tmp_path):
    with EmulatedNode(tmp_path / "gpus.state", 2, "h100-sxm", parse_load("decode")) as running:
        running.hold_memory(os.getpid())
        yield running


def client(node, code: str, *prefix: str, timeout=30) -> subprocess.CompletedProcess[str]:
    """Plain pynvml code in a process of its own, on the library."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", "import pynvml as n\n" + code],
        env=client_environment(node.state.path),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer(node, code: str):
    done = client(node, "import json\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n" + code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error_of(node, code: str, *prefix: str) -> int:
    """The NVML error code that a line of code ends in."""
    done = client(
        node,
        f"n.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        f"try:\n    {code}\n    print(0)\nexcept n.NVMLError as e:\n    print(e.value)\n",
        *prefix,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_every_public_name_is_exported():
    library = build_shim() / "libnvidia-ml.so.1"
    shown = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True)
    exported = set(re.findall(r" T (nvml\w+)", shown.stdout))
    assert exported == set(public_names())
    assert set(implemented_names()) <= set(public_names())


def test_names_are_those_of_the_public_header():
    text = subprocess.run(
        ["gcc", "-E", "-DNVML_NO_UNVERSIONED_FUNC_DEFS", header()], capture_output=True, text=True
    ).stdout
    names = set(re.findall(r"\b(nvml[A-Z]\w*)\s*\(", text))
    assert names == set(public_names())


def test_every_name_that_pynvml_looks_up_is_there():
    import inspect

    import pynvml

    wanted = set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', inspect.getsource(pynvml)))
    assert wanted <= set(public_names())


def test_structs_have_nvidias_sizes_and_offsets(tmp_path):
    ours = Path(build_shim.__globals__["__file__"]).parent / "api.h"
    structs = {
        "nvmlPciInfo_t": ["busId", "pciSubSystemId"],
        "nvmlMemory_t": ["used"],
        "nvmlMemory_v2_t": ["reserved", "used"],
        "nvmlBAR1Memory_t": ["bar1Used"],
        "nvmlUtilization_t": ["memory"],
        "nvmlProcessInfo_v1_t": ["usedGpuMemory"],
        "nvmlProcessInfo_v2_t": ["usedGpuMemory", "computeInstanceId"],
        "nvmlProcessUtilizationSample_t": ["timeStamp", "decUtil"],
        "nvmlViolationTime_t": ["violationTime"],
        "nvmlTemperature_v1_t": ["temperature"],
        "nvmlMarginTemperature_v1_t": ["marginTemperature"],
        "nvmlPowerValue_v2_t": ["powerValueMw"],
        "nvmlFieldValue_t": ["valueType", "nvmlReturn", "value"],
    }
    outputs = []
    for place, include in enumerate((ours, header())):
        lines = ["#include <stdio.h>", "#include <stddef.h>", f'#include "{include}"']
        lines.append("int main(void) {")
        for name, fields in structs.items():
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            lines += [
                f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for field in fields
            ]
        source = tmp_path / f"sizes{place}.c"
        source.write_text("\n".join([*lines, "return 0; }"]))
        program = source.with_suffix("")
        subprocess.run(["gcc", "-o", program, source], check=True, capture_output=True)
        outputs.append(subprocess.run([program], capture_output=True, text=True).stdout)
    assert outputs[0] == outputs[1]


def test_both_sides_of_the_library_agree(node):
    """What C answers is what the in-process emulation answers, at rest."""
    node._ended.set()
    node._thread.join()
    nvml = EmulatedNvml(node.state)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    calls = [
        "nvmlDeviceGetName(h)",
        "nvmlDeviceGetUUID(h)",
        "nvmlDeviceGetPowerUsage(h)",
        "nvmlDeviceGetTotalEnergyConsumption(h)",
        "nvmlDeviceGetPowerManagementLimit(h)",
        "nvmlDeviceGetEnforcedPowerLimit(h)",
        "nvmlDeviceGetPowerManagementLimitConstraints(h)",
        "nvmlDeviceGetPowerManagementDefaultLimit(h)",
        "nvmlDeviceGetClockInfo(h, 1)",
        "nvmlDeviceGetMaxClockInfo(h, 1)",
        "nvmlDeviceGetMaxClockInfo(h, 2)",
        "nvmlDeviceGetTemperature(h, 0)",
        "nvmlDeviceGetTemperatureV(h, 0)",
        "nvmlDeviceGetTemperatureThreshold(h, 0)",
        "nvmlDeviceGetTemperatureThreshold(h, 1)",
        "nvmlDeviceGetMemoryInfo(h).used",
        "nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2).used",
        "nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2).reserved",
        "nvmlDeviceGetUtilizationRates(h).gpu",
        "nvmlDeviceGetCurrentClocksEventReasons(h)",
        "nvmlDeviceGetComputeRunningProcesses(h)[0].pid",
        "nvmlDeviceGetComputeRunningProcesses(h)[0].usedGpuMemory",
        "nvmlDeviceGetSupportedGraphicsClocks(h, n.nvmlDeviceGetMaxClockInfo(h, 2))",
        "nvmlDeviceGetCudaComputeCapability(h)",
        "nvmlDeviceGetArchitecture(h)",
        "nvmlDeviceGetPersistenceMode(h)",
        "nvmlSystemGetDriverVersion()",
        "nvmlSystemGetCudaDriverVersion()",
        "nvmlDeviceGetViolationStatus(h, 0).violationTime",
    ]
    theirs = answer(node, "print(json.dumps([" + ", ".join(f"n.{call}" for call in calls) + "]))")
    for call, other in zip(calls, theirs, strict=True):
        ours = eval(f"n.{call}", {"n": nvml, "h": handle})
        assert json.loads(json.dumps(ours)) == other, call


def test_fields_carry_their_own_codes(node):
    values = answer(
        node,
        "v=n.nvmlDeviceGetFieldValues(h,[185,186,190,83,9999,(186,0)])\n"
        "print(json.dumps([[x.nvmlReturn, x.valueType, x.value.uiVal] for x in v]))",
    )
    assert [value[0] for value in values] == [0, 0, 0, 0, 3, 0]
    assert values[3][1] == 3
    assert values[0][2] > 300_000


def test_a_limit_set_in_one_process_acts_and_is_read_in_another(node):
    assert error_of(node, "n.nvmlDeviceSetPowerManagementLimit(h, 300000)") == 0
    assert answer(node, "print(n.nvmlDeviceGetEnforcedPowerLimit(h))") == 300_000
    time.sleep(0.3)
    assert node.state.measured["power_instant_mw"][0] < 300_000
    assert node.state.measured["power_instant_mw"][1] > 330_000, "the other GPU is left alone"
    assert error_of(node, "n.nvmlDeviceSetGpuLockedClocks(h, 210, 900)") == 0
    time.sleep(0.2)
    assert node.state.measured["sm_clock_mhz"][0] <= 900


@pytest.mark.parametrize("load", ["decode", "prefill"])
@pytest.mark.parametrize("limit_w", [300, 400])
def test_instant_power_is_under_a_fresh_limit_within_two_ticks(tmp_path, load, limit_w):
    """Set by another process; ticks as long as a node's. The first still shows what was drawn."""
    state = GpuState.create(1, path=tmp_path / "gpus.state")
    bank, does = GpuBank(load_gpu("h100-sxm"), state), parse_load(load)
    for _ in range(50):
        bank.advance(0.1, *does(0.0, bank.clock_frac, bank.profile))
    assert state.measured["power_instant_mw"][0] > 440_000
    subprocess.run(
        [sys.executable, "-c", "import pynvml as n\nn.nvmlInit()\n"
         "h=n.nvmlDeviceGetHandleByIndex(0)\n"
         f"n.nvmlDeviceSetPowerManagementLimit(h, {limit_w}000)"],
        env=client_environment(state.path), check=True,
    )  # fmt: skip
    for _ in range(2):
        bank.advance(0.1, *does(0.0, bank.clock_frac, bank.profile))
    assert state.measured["power_instant_mw"][0] <= limit_w * 1000


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("n.nvmlDeviceSetPowerManagementLimit(h, 50000)", 2),
        ("n.nvmlDeviceSetPowerManagementLimit(h, 900000)", 2),
        ("n.nvmlDeviceSetGpuLockedClocks(h, 900, 210)", 2),
        ("n.nvmlDeviceGetHandleByIndex(7)", 2),
        ("n.nvmlDeviceGetHandleByUUID('GPU-none')", 6),
        ("n.nvmlDeviceGetNvLinkState(h, 0)", 3),
        ("n.nvmlDeviceGetSupportedGraphicsClocks(h, 1)", 6),
        ("n.nvmlShutdown(); n.nvmlDeviceGetCount()", 1),
    ],
)
def test_errors_are_the_drivers(node, code, error):
    assert error_of(node, code) == error


def test_wrong_struct_versions_are_error_25(node):
    done = client(
        node,
        "import ctypes\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "m=n.c_nvmlMemory_v2_t(); m.version=0x01000028\n"
        "f=ctypes.CDLL('libnvidia-ml.so.1').nvmlDeviceGetMemoryInfo_v2\n"
        "print(f(h, ctypes.byref(m)))",
    )
    assert done.stdout.strip() == "25", done.stderr


def test_the_two_call_protocol(node):
    done = client(
        node,
        "import ctypes\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "f=ctypes.CDLL('libnvidia-ml.so.1').nvmlDeviceGetComputeRunningProcesses_v3\n"
        "c=ctypes.c_uint(0)\nprint(f(h, ctypes.byref(c), None), c.value)\n"
        "a=(n.c_nvmlProcessInfo_v2_t*4)(); c.value=4\nprint(f(h, ctypes.byref(c), a), a[0].pid)\n",
    )
    assert done.stdout.split() == ["7", "1", "0", str(os.getpid())], done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_another_user_may_look_but_not_set(node, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if os.access(folder, os.W_OK) and str(folder).startswith("/tmp/pytest"):
            folder.chmod(0o755)
    library = tmp_path / "library"
    shutil.copytree(build_shim(), library)
    driver = tmp_path / "driver"
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(
        ["gcc", "-o", driver, source, f"-L{library}", "-l:libnvidia-ml.so.1",
         f"-Wl,-rpath,{library}"], check=True,
    )  # fmt: skip
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", driver, "1"],
        env={"TESTBED_NVML_STATE": str(node.state.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "set 4" in done.stdout
    assert "power 0" in done.stdout


def test_a_lost_gpu_is_15_and_says_who_it_is(node):
    uuid = answer(node, "print(json.dumps(n.nvmlDeviceGetUUID(h)))")
    node.state.measured["lost"][0] = 1
    code = f"n.nvmlDeviceGetPowerUsage(n.nvmlDeviceGetHandleByUUID('{uuid}'))"
    done = client(node, f"n.nvmlInit()\ntry:\n    {code}\nexcept n.NVMLError as e: print(e.value)")
    assert done.stdout.strip() == "15", done.stderr
    done = client(
        node, "n.nvmlInit()\nprint(n.nvmlDeviceGetPowerUsage(n.nvmlDeviceGetHandleByIndex(1)))"
    )
    assert int(done.stdout) > 300_000


@pytest.mark.parametrize("harm", ["missing", "magic", "layout", "short", "stale", "empty"])
def test_init_fails_cleanly_on_a_state_that_is_not_right(tmp_path, harm):
    path = tmp_path / "gpus.state"
    state = GpuState.create(2, path=path)
    GpuBank(load_gpu("h100-sxm"), state)
    if harm == "missing":
        path.unlink()
    elif harm == "magic":
        state.header["magic"] = b"NOTOURS"
    elif harm == "layout":
        state.header["layout_version"] = 99
    elif harm == "short":
        os.truncate(path, 700)
    elif harm == "stale":
        state.header["heartbeat_ns"] = time.monotonic_ns() - 60_000_000_000
    else:
        path.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", "import pynvml as n\ntry:\n    n.nvmlInit()\n"
         "except n.NVMLError as e: print(e.value)"],
        env=client_environment(path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9"


def test_a_file_cut_short_under_a_running_client_is_an_error_not_a_crash(node):
    done = client(
        node,
        "import os, time\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(1)\n"
        "n.nvmlDeviceGetPowerUsage(h)\n"
        "p=os.environ['TESTBED_NVML_STATE']\nos.system('cp '+p+' '+p+'.x')\n"
        "s=os.path.getsize(p)\nos.rename(p+'.x', p+'.y')\n"
        "open(p,'r+b').truncate(300)\n"
        "try:\n    n.nvmlDeviceGetPowerUsage(h)\nexcept n.NVMLError as e: print(e.value)\n"
        "open(p,'r+b').truncate(s)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "999"


def test_limits_outlive_their_setter_and_the_daemon(tmp_path):
    path = tmp_path / "gpus.state"
    with EmulatedNode(path, 1, "h100-sxm", parse_load("idle")) as first:
        assert error_of(first, "n.nvmlDeviceSetPowerManagementLimit(h, 333000)") == 0
        before_mj = int(first.state.measured["energy_mj"][0])
    with EmulatedNode(path, 1, "h100-sxm", parse_load("idle")) as second:
        assert second.state.control["power_limit_mw"][0] == 333_000
        time.sleep(0.1)
        assert second.state.measured["energy_mj"][0] >= before_mj


def test_a_writer_killed_within_a_write_is_given_up_once_and_replaced(tmp_path):
    path = tmp_path / "gpus.state"
    with EmulatedNode(path, 1, "h100-sxm", parse_load("decode")):
        time.sleep(0.1)
    writer = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom emulators.state import GpuState\n"
        "with GpuState.create(1, path=Path(sys.argv[1])).writing():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", writer, str(path)], check=False)
    assert done.returncode == -9
    reader = (
        "import pynvml as n, sys, time\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "def timed():\n"
        "    begun=time.monotonic(); n.nvmlDeviceGetPowerUsage(h); return time.monotonic()-begun\n"
        "print(*(timed() for _ in range(3)), flush=True)\n"
        "sys.stdin.readline()\nprint(*(timed() for _ in range(50)))\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", reader], env=client_environment(path), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    spent_s = [float(word) for word in client.stdout.readline().split()]
    # Finding the GPU waited for the writer; from then on nobody does.
    assert max(spent_s) < 0.3
    with EmulatedNode(path, 1, "h100-sxm", parse_load("decode")) as successor:
        time.sleep(0.1)
        spent_s = [float(word) for word in client.communicate("go\n", timeout=30)[0].split()]
    assert client.returncode == 0
    assert np.median(spent_s) < 0.01
    assert successor.state.header["sequence"] % 2 == 0


def test_a_daemon_killed_and_restarted_under_a_running_client(tmp_path):
    """The client sees neither an error nor a value that no tick had, and energy never falls."""
    path = tmp_path / "gpus.state"
    daemon = (
        "import sys, time\nfrom pathlib import Path\n"
        "from testbed.emulate import EmulatedNode, parse_load\n"
        "with EmulatedNode(Path(sys.argv[1]), 1, 'h100-sxm', parse_load('decode')):\n"
        "    print('up', flush=True)\n    time.sleep(60)\n"
    )
    watcher = (
        "import pynvml as n, time\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "last=reads=changes=0\nend=time.monotonic()+4\nprint('up', flush=True)\n"
        "while time.monotonic() < end:\n"
        "    e=n.nvmlDeviceGetTotalEnergyConsumption(h)\n    assert e >= last, (e, last)\n"
        "    assert 60_000 < n.nvmlDeviceGetFieldValues(h,[186])[0].value.uiVal < 720_000\n"
        "    reads += 1; changes += e > last; last=e\n"
        "print(reads, changes, last)\n"
    )

    def start(code, *arguments, env=None):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=env, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "up"
        return process

    lives = [start(daemon, str(path))]
    watching = start(watcher, env=client_environment(path))
    try:
        for _ in range(3):
            time.sleep(0.7)
            lives[-1].kill()
            lives[-1].communicate()
            lives.append(start(daemon, str(path)))
        reads, changes, last_mj = map(int, watching.communicate(timeout=30)[0].split())
    finally:
        ended = watching.poll()
        for process in (*lives, watching):
            process.kill()
            process.wait()
            process.stdout.close()
    assert ended == 0
    assert reads > 1000
    assert changes > 50
    assert last_mj > 300_000


def test_a_state_of_another_size_is_refused(tmp_path):
    path = tmp_path / "gpus.state"
    GpuBank(load_gpu("h100-sxm"), GpuState.create(2, path=path))
    with pytest.raises(DeviceError, match="2 GPUs, expected 4"):
        GpuState.create(4, path=path)


DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
typedef struct nvmlDevice_st *nvmlDevice_t;
int nvmlInit_v2(void); int nvmlShutdown(void);
int nvmlDeviceGetHandleByIndex_v2(unsigned, nvmlDevice_t *);
int nvmlDeviceGetPowerUsage(nvmlDevice_t, unsigned *);
int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t, unsigned *);
int nvmlDeviceSetPowerManagementLimit(nvmlDevice_t, unsigned);
int nvmlDeviceGetUUID(nvmlDevice_t, char *, unsigned);
int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t, unsigned *, void *);
int nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t, unsigned, unsigned *, unsigned *);
int main(int argc, char **argv) {
    nvmlDevice_t device; unsigned power = 0, count, clocks[256]; char text[96], room[8 * 24];
    int rounds = argc > 1 ? atoi(argv[1]) : 1, set = 0, got = 0;
    if (nvmlInit_v2()) return 1;
    for (int i = 0; i < rounds; i++) {
        if (nvmlDeviceGetHandleByIndex_v2(i % 2, &device)) return 2;
        got = nvmlDeviceGetPowerUsage(device, &power);
        set = nvmlDeviceSetPowerManagementLimit(device, 300000 + 1000 * (i % 300));
        if (!set && i % 7 == 0 && nvmlDeviceGetEnforcedPowerLimit(device, &count)) return 3;
        if (nvmlDeviceGetUUID(device, text, sizeof text)) return 4;
        if (nvmlDeviceGetUUID(device, text, 3) != 7) return 5;
        count = 8;
        if (nvmlDeviceGetComputeRunningProcesses_v3(device, &count, room)) return 6;
        count = 256; nvmlDeviceGetSupportedGraphicsClocks(device, 2619, &count, clocks);
        if (nvmlDeviceGetPowerUsage(0, &power) != 2) return 7;
        if (nvmlDeviceGetPowerUsage(device, 0) != 2) return 8;
    }
    printf("power %d set %d\n", got, set);
    return nvmlShutdown();
}
"""


def test_clean_under_the_sanitizers(node, tmp_path):
    for name, text in source_files().items():
        (tmp_path / name).write_text(text)
    sources = sorted(tmp_path.glob("*.c"))
    driver = tmp_path / "driver.c"
    driver.write_text(DRIVER)
    program = tmp_path / "driver"
    built = subprocess.run(
        ["gcc", "-g", "-O1", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover",
         "-Wno-builtin-declaration-mismatch", "-o", program, *sources, driver, "-lpthread"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [program, "300"],
        env={"TESTBED_NVML_STATE": str(node.state.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr


def test_many_writers_and_killed_clients_tear_nothing(tmp_path):
    """Two setters, readers of several fields at once, and clients killed at any moment."""
    path = tmp_path / "gpus.state"
    state = GpuState.create(2, path=path)
    bank = GpuBank(load_gpu("h100-sxm"), state)
    environment = client_environment(path)
    setter = (
        "import pynvml as n, itertools\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "for i in itertools.count():\n"
        "    n.nvmlDeviceSetPowerManagementLimit(h, (300000, 555555)[i % 2])\n"
    )
    # The emulator writes pairs that belong together: energy and average power of one tick.
    reader = (
        "import pynvml as n, sys, time\nn.nvmlInit()\nh=n.nvmlDeviceGetHandleByIndex(0)\n"
        "end=time.monotonic()+2.0\nbad=reads=0\n"
        "while time.monotonic() < end:\n"
        "    a,i=n.nvmlDeviceGetFieldValues(h,[185,186])\n"
        "    bad += a.value.uiVal != i.value.uiVal\n    reads += 1\n"
        "    bad += n.nvmlDeviceGetPowerManagementLimit(h) not in (300000, 555555, 700000)\n"
        "print(bad, reads)\n"
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for code in (setter, setter, reader, reader)
    ]
    killed = 0
    begun = time.monotonic()
    value = 100_000
    while any(process.poll() is None for process in clients[2:]):
        with state.writing():
            value = 100_000 + (value + 7) % 500_000
            state.measured["power_average_mw"][0] = value
            state.measured["power_instant_mw"][0] = value
        if killed < 1 and time.monotonic() - begun > 1.5:
            clients[0].kill()
            killed += 1
        assert time.monotonic() - begun < 30
    for process in clients[:2]:
        process.kill()
    results = [process.communicate()[0].decode().split() for process in clients[2:]]
    for process in clients[:2]:
        process.communicate()
    for bad, reads in results:
        assert int(bad) == 0
        assert int(reads) > 500
    assert state.control["power_limit_mw"][0] in (300_000, 555_555)
    assert bank.count == 2
    assert np.fromfile(path, HEADER, 1)["num_gpus"][0] == 2


@pytest.mark.parametrize("program", ["gpustat", "nvitop"])
def test_unmodified_clients(node, program):
    if util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    command = {"gpustat": ["gpustat", "--json"], "nvitop": ["nvitop", "--once", "--ascii"]}
    done = subprocess.run(
        [sys.executable, "-m", *command[program]],
        env={**client_environment(node.state.path), "TERM": "xterm"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if program == "gpustat":
        gpus = json.loads(done.stdout)["gpus"]
        assert len(gpus) == 2
        assert gpus[0]["power.draw"] == pytest.approx(
            node.state.measured["power_average_mw"][0] / 1000, abs=30
        )
        assert gpus[0]["processes"][0]["pid"] == os.getpid()
        assert gpus[0]["enforced.power.limit"] == 700
    else:
        assert "H100 80GB HBM3" in done.stdout
        assert str(os.getpid()) in done.stdout


def run_client(node, *command: str, timeout=60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**client_environment(node.state.path), "TERM": "xterm"},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


ZEUS = """
import json, time
from zeus.device import get_gpus
from zeus.monitor import ZeusMonitor
monitor = ZeusMonitor(gpu_indices=[0, 1])
monitor.begin_window("w", sync_execution=False)
time.sleep(1.5)
window = monitor.end_window("w", sync_execution=False)
get_gpus().setPowerManagementLimit(0, 300_000)
time.sleep(1.0)
monitor.begin_window("capped", sync_execution=False)
time.sleep(1.5)
capped = monitor.end_window("capped", sync_execution=False)
print(json.dumps([window.time, window.gpu_energy, capped.time, capped.gpu_energy]))
"""


def test_zeus_measures_and_caps(node):
    if util.find_spec("zeus") is None:
        pytest.skip("zeus is not installed")
    before = node.state.measured["energy_mj"].sum()
    done = run_client(node, "-c", ZEUS)
    assert done.returncode == 0, done.stderr
    time_s, energy_j, capped_s, capped_j = json.loads(done.stdout.splitlines()[-1])
    assert node.state.control["power_limit_mw"][0] == 300_000
    power_w = energy_j["0"] / time_s
    assert power_w == pytest.approx(energy_j["1"] / time_s, rel=0.05)
    assert 300 < power_w < 700
    assert capped_j["0"] / capped_s == pytest.approx(300, rel=0.05)
    total_j = (node.state.measured["energy_mj"].sum() - before) / 1000
    assert sum(energy_j.values()) + sum(capped_j.values()) < total_j


def test_nvitop_exporter_serves_what_we_show_and_survives_a_lost_gpu(node):
    if util.find_spec("nvitop_exporter") is None:
        pytest.skip("nvitop-exporter is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "nvitop_exporter", "--bind-address", "127.0.0.1",
         "--port", str(port), "--interval", "0.5"],
        env={**client_environment(node.state.path), "TERM": "xterm"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip

    def watts(count: int) -> list[float]:
        """What it serves, once that is of so many GPUs."""
        shown: list[float] = []
        deadline = time.monotonic() + 40
        while len(shown) != count and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
                shown = [
                    float(line.split()[-1])
                    for line in text.splitlines()
                    if line.startswith("gpu_power_usage_W{") and not line.endswith("NaN")
                ]
        return shown

    try:
        assert watts(2) == pytest.approx(node.state.measured["power_average_mw"] / 1000, abs=30)
        node.bank.lose(1)
        time.sleep(1.0)
        assert process.poll() is None
        assert watts(1) == pytest.approx(node.state.measured["power_average_mw"][:1] / 1000, abs=30)
    finally:
        process.kill()
        process.communicate()


class Screen:
    """A full-screen program in a terminal of its own; what it drew, without the escapes."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**environment, "TERM": "xterm", "LANG": "C"})
        size = struct.pack("HHHH", 50, 160, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)
        self._drawn = b""

    def watch(self, seconds: float) -> str:
        """All that it has drawn, after some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self._terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    self._drawn += os.read(self._terminal, 1 << 16)
        plain = re.sub(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()].|[=>])|[\r\n\x0f]", b" ", self._drawn)
        return b" ".join(plain.split()).decode(errors="replace")

    def press(self, key: bytes) -> int:
        """Its exit status after a key that ends it."""
        os.write(self._terminal, key)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            self.watch(0.1)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._terminal)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("does not end")


def test_nvtop_shows_the_same_and_survives_a_lost_gpu(node):
    if shutil.which("nvtop") is None:
        pytest.skip("nvtop is not installed (Debian has it in contrib)")
    time.sleep(1.2)  # the mean of a second is full
    screen = Screen(["nvtop", "--no-color"], client_environment(node.state.path))
    drawn = screen.watch(3.0)
    assert drawn.count("[NVIDIA H100 80GB HBM3]") == 2
    state = node.state.measured[0]
    watts = [int(word) for word in re.findall(r"POW (\d+) / 700 W", drawn)]
    assert watts[:2] == pytest.approx([state["power_average_mw"] / 1000] * 2, abs=2)
    assert f"GPU {state['sm_clock_mhz']}MHz" in drawn
    assert f"MEM {state['mem_clock_mhz']}MHz" in drawn
    assert re.search(rf"\b{os.getpid()} \S+ [01] Compute", drawn)
    node.bank.lose(1)
    screen.watch(2.5)
    assert screen.press(b"q") == 0, "it went on, and left when told to"


def test_clients_survive_a_lost_gpu(node):
    node.bank.lose(1)
    names = {
        program: run_client(node, "-m", *arguments)
        for program, *arguments in (
            ("gpustat", "gpustat", "--json"),
            ("nvitop", "nvitop", "--once", "--ascii"),
        )
        if util.find_spec(program)
    }
    for program, done in names.items():
        assert done.returncode == 0, (program, done.stderr)
        assert "H100 80GB HBM3" in done.stdout
        assert "lost" in done.stdout.lower()


def test_a_client_that_runs_survives_the_loss_of_another_gpu(node):
    if util.find_spec("zeus") is None:
        pytest.skip("zeus is not installed")
    code = (
        "import time\nfrom zeus.monitor import ZeusMonitor\n"
        "m = ZeusMonitor(gpu_indices=[0])\nprint('ready', flush=True)\ninput()\n"
        "m.begin_window('w', sync_execution=False)\ntime.sleep(0.5)\n"
        "print(m.end_window('w', sync_execution=False).gpu_energy[0])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=client_environment(node.state.path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    node.bank.lose(1)
    shown = process.communicate("go\n", timeout=30)[0]
    assert process.returncode == 0
    assert float(shown.splitlines()[-1]) > 100
