"""The documentation is run, and says what there is."""

from __future__ import annotations

import json
import re

from click.testing import CliRunner

from testbed.cli import main
from testbed.policies.load import shipped_policies
from tests.conftest import ROOT, cli


def test_the_policy_in_the_guide_is_the_file_beside_it():
    guide = (ROOT / "docs" / "write-a-policy.md").read_text()
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL).group(1)
    assert code == (ROOT / "docs" / "cool_down.py").read_text()
    assert len(code.splitlines()) <= 35


def test_the_policy_in_the_guide_works(small_spec, tmp_path):
    done = cli(
        "run", small_spec, "--mode", "virtual", "--policy", ROOT / "docs" / "cool_down.py",
        "--set", "cluster.inlet_c=38", "--set", "duration_s=60", "--set", "workload.rate_rps=40",
        "--out", tmp_path, "--json", "--no-report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commands"]["sent"] > 0


def test_every_command_has_help_and_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name, command in main.commands.items():
        assert command.help, name
        assert f"testbed {name}" in readme, f"README does not mention testbed {name}"
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0


def test_every_policy_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in shipped_policies():
        assert f"`{name}`" in readme, name


def test_links_in_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_decision_records_are_numbered_once():
    names = [path.name for path in (ROOT / "docs" / "decisions").glob("*.md")]
    numbers = [name[:4] for name in names]
    assert len(set(numbers)) == len(numbers)
    for name in names:
        text = (ROOT / "docs" / "decisions" / name).read_text()
        assert "**Decision.**" in text, name
        assert "**Cost.**" in text, name
