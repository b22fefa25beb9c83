"""The README of an experiment from one of its runs: ``testbed publish RUN``.

An experiment that has a ``readme.py`` beside it says there what stands between which marks of its
README (``parts(results)``) and what its pictures show (``pictures(results)``, by file name), so
that no number of the answer is typed. See `docs/decisions/0053-readmes-are-filled-from-runs.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from testbed.analysis import pictures
from testbed.analysis.drawing import Figure
from testbed.analysis.markdown import fill
from testbed.core.errors import SpecError
from testbed.experiment import Results, find_experiment, load_beside, read_results


def publish(folder: Path, *, into: Path | None = None) -> dict[str, str]:
    """Fill the marks of the README and draw its pictures; returns what was filled in.

    Args:
        folder: of a finished experiment.
        into: folder with the README; that of the experiment itself by default.

    Raises:
        TestbedError: it is no result, its experiment has no ``readme.py``, or a mark is missing.
    """
    results = read_results(folder)
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    home = find_experiment(told["experiment"]).folder
    if not (home / "readme.py").is_file():
        raise SpecError(f"experiment {told['experiment']!r} has no readme.py to publish with")
    module = load_beside(str(home / "readme.py"), "readme")
    make_parts: Callable[[Results], dict[str, str]] = module.parts
    make_pictures: Callable[[Results], dict[str, list[Figure]]] = module.pictures
    into = into or home
    parts = make_parts(results)
    readme = into / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), parts), encoding="utf-8")
    for name, figures in make_pictures(results).items():
        if figures:
            pictures.save(figures, into / name, across=getattr(module, "ACROSS", 2))
    return parts
