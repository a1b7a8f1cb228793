"""The laws of the house that no other test would notice."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).parent.parent

# A module may import those that stand before it.
ORDER = [
    "_C",
    "ops",
    "ranks",
    "shards",
    "sparse",
    "costs",
    "surgery",
    "granularity",
    "criteria",
    "schedules",
    "scope",
    "curvature",
    "layers",
    "masks",
    "plan",
    "selection",
    "state",
    "nn",
    "pruner",
    "checkpoint",
    "report",
]


def imports_of(path: Path) -> set[str]:
    """The modules of secateur that a file imports when it runs."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING"):
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "secateur":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secateur."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("secateur.")}
    return found


def test_imports_point_down_only() -> None:
    package = ROOT / "python" / "secateur"
    for path in package.rglob("*.py"):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        assert name in ORDER, f"{path}: give {name} its place in ORDER"
        allowed = set(ORDER[: ORDER.index(name)]) | ({name} if path.parent != package else set())
        assert imports_of(path) <= allowed, f"{path} imports {imports_of(path) - allowed}"


def test_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (written,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert written == secateur.__version__ == importlib.metadata.version("secateur")


def test_no_file_names_a_path_of_this_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout, to tell the project's files from others")
    command = [git, "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    home = re.compile(rf"(?<![\w.])/(?:home|root|work|Users)/\w|{re.escape(str(ROOT))}\b")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        text = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
        assert not (found := home.search(text)), f"{name} names {found and found[0]}"


def test_kernel_objects_share_no_symbol_across_instruction_sets() -> None:
    """A weak symbol compiled for AVX-512 could replace the baseline's copy at link time."""
    nm = shutil.which("nm")
    objects = [*ROOT.glob("build/*/CMakeFiles/_C.dir/isa/*.o")]
    if nm is None or not objects:
        pytest.skip("needs nm and the objects under build/, which `make test` leaves there")
    for path in objects:
        isa = path.name.split(".")[1]
        listed = subprocess.run([nm, path], check=True, capture_output=True, text=True).stdout
        weak = re.findall(r"^\S*\s+[VWu] (\S+)$", listed, re.MULTILINE)
        assert [name for name in weak if isa not in name] == [], path
