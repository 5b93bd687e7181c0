"""The documentation says what the code does: generated pages are current, the README's commands run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

# Commands of the README that are cheap enough to run here.
RUN = {"./scripts/bootstrap.sh nwor doctor": " --quick"}  # and what is added to keep it cheap
# The others, and the file that runs them (or the same thing on a smaller scale).
RUN_ELSEWHERE = {
    "./run_all_experiments.sh": "tests/shell/test_run_all.py",
    "./scripts/test.sh": "scripts/test.sh",  # this gate: it would run itself
    "pip install .": "tests/test_package.py",
    "vllm serve": "tests/plugin",
}


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(markdown: str) -> list[str]:
    """The commands of a page's bash blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", ["docs/settings.md", "docs/cli.md"])
def test_generated_pages_are_current(make_docs: ModuleType, page: str) -> None:
    expected = make_docs.PAGES[page]()
    now = (ROOT / page).read_text()
    assert now == expected, f"{page} is stale: run ./scripts/bootstrap.sh python scripts/make_docs.py"


def test_every_setting_says_what_it_does(make_docs: ModuleType) -> None:
    trees = [make_docs.NworConfig, *(kind.params for kind in make_docs.POLICIES.values())]
    rows = [row for tree in trees for row in make_docs.settings(tree)]
    assert len(rows) > 10
    assert [name for name, _, _, text in rows if not text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_does(make_docs: ModuleType, name: str) -> None:
    silent = [
        f"{prog} {flag}"
        for prog, parser in make_docs.parsers(name)
        for flag, text in make_docs.flags(parser)
        if not text
    ]
    assert silent == []


def test_every_variable_is_documented(make_docs: ModuleType) -> None:
    assert set(make_docs.VARIABLES) == set(make_docs.OTHER_VARIABLES)


@pytest.mark.parametrize("command", commands((ROOT / "README.md").read_text()))
def test_readme_commands_run(command: str) -> None:
    if command in RUN:
        if not (ROOT / ".venv" / ".nwor-ready").exists():
            pytest.skip("would set an environment up: run ./scripts/test.sh")
        done = subprocess.run(
            ["bash", "-c", command + RUN[command]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    else:
        where = next((place for start, place in RUN_ELSEWHERE.items() if command.startswith(start)), None)
        assert where, f"nothing runs {command!r}: add it to RUN, or to RUN_ELSEWHERE with the test that does"
        assert (ROOT / where).exists(), f"{where}, which should run {command!r}, does not exist"


def test_the_readme_is_seen_to_have_commands() -> None:
    assert "./scripts/test.sh" in commands((ROOT / "README.md").read_text())
    assert commands("```bash\n# only\na b  # said\n\nc\n```\n```\nnot this\n```\n") == ["a b", "c"]


def test_the_readme_tree_lists_every_top_level_entry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tree = re.search(r"## Tree\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    entries = {
        name.rstrip("/") for line in tree[1].splitlines() if line[0] != " " for name in line.split("  ")[0].split()
    }
    there = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert there - entries == set(), "in the repository, not in the README's tree"
    assert entries - there == set(), "in the README's tree, not in the repository"


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    dead = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http://", "https://")) and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []
