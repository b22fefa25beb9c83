"""The compiled engine: the same answers as the Python it was made of, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from testbed.core import compiled
from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(bool(compiled.why_not()), reason=compiled.why_not())

CODE = """
import json
import numpy as np
from testbed.core import compiled
from emulators.engine import Engine
from emulators.models import load_model
from emulators.profiles import load_gpu
from emulators.timing import IterationCost
from testbed.core.messages import EngineConfig, Request

model, gpu = load_model("llava-onevision-7b"), load_gpu("h100-sxm")
draw = np.random.default_rng(3)
engine = Engine(IterationCost(model, gpu), EngineConfig(max_num_seqs=24), kv_blocks=900,
                tokens_per_tile=model.tokens_per_tile, preprocess_s=0.01, keep_segments=True)
t_s = 0.0
seen = []
for k in range(600):
    t_s += float(draw.exponential(0.04))
    if k % 7 == 3:
        engine.set_clock(float(draw.choice([0.4, 0.6, 0.83, 1.0])), t_s)
    images = int(draw.integers(0, 2))
    engine.submit(Request(k, t_s, int(draw.integers(1, 1500)), int(draw.integers(1, 300)),
                          image_tokens=images * 729, num_images=images), t_s)
    seen.append([t_s, engine.kv_used_blocks(t_s), *engine.activity(t_s)])
engine.advance_to(t_s + 1000.0)
print(json.dumps([compiled.in_use(), engine.preemptions_total, seen, engine.events,
                  [list(segment) for segment in engine.segments],
                  sorted(engine.itl.counts.items())]))
"""


def answers(pure: bool) -> list:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, compiled.PURE_VARIABLE: "1" if pure else ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_compiler
def test_compiled_and_interpreted_engines_give_the_same_bits():
    compiled.build()
    interpreted, machine_code = answers(True), answers(False)
    assert (interpreted[0], machine_code[0]) == (False, True)
    assert interpreted[1] > 0, "the trace must preempt"
    assert interpreted[1:] == machine_code[1:]


def test_a_build_belongs_to_its_sources(tmp_path, monkeypatch):
    before = compiled.build_folder(tmp_path)
    for package in ("emulators", "testbed"):
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr(compiled, "_ROOT", tmp_path)
    assert compiled.build_folder(tmp_path) == before
    with (tmp_path / "testbed" / "core" / "messages.py").open("a") as file:
        file.write("# edited\n")
    assert compiled.build_folder(tmp_path) != before


def test_what_was_not_built_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ["here"]
    compiled.use("emulators", path)
    assert path == ["here"]


@needs_compiler
def test_a_spawned_worker_imports_the_package_and_not_the_build(tmp_path):
    """As the installed command does it: from anywhere, without the project on the path."""
    compiled.build()
    script = tmp_path / "work.py"
    script.write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "import emulators.engine\n"
        "def where(_):\n"
        "    import emulators\n"
        "    from testbed.core import compiled\n"
        "    return [emulators.__file__, compiled.in_use()]\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:\n"
        "        print(*pool.submit(where, 0).result(), sep='\\n')\n"
    )
    site = tmp_path / "site"
    site.mkdir()
    # What an editable install leaves: a path that is added after those of the environment.
    (site / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(ROOT)!r})\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site), compiled.PURE_VARIABLE: ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "emulators" / "__init__.py"), "True"]
