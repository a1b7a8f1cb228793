"""SECATEUR_CUDA, which says whether the build makes the CUDA kernels: configured, and not built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


class Build:
    """A build tree, as pip would configure it.

    Args:
        tree: where it goes.
        setting: SECATEUR_CUDA; none leaves the default.
        nvcc: the compiler that CUDACXX names, so that CMake looks for no other: neither on PATH nor
            where toolkits lie. None lets it look.
        architectures: CMAKE_CUDA_ARCHITECTURES; none leaves the default.
    """

    def __init__(
        self, tree: Path, setting: str | None, nvcc: Path | None, architectures: str | None = None
    ) -> None:
        pybind11 = pytest.importorskip("pybind11")
        self._tree, self._cmake = tree, program("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "SKBUILD_PROJECT_VERSION": "0.0.0",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if setting is not None:
            options["SECATEUR_CUDA"] = setting
        if architectures is not None:
            options["CMAKE_CUDA_ARCHITECTURES"] = architectures
        environment = {**os.environ, "PATH": PATH}
        environment |= {"CUDACXX": str(nvcc)} if nvcc else {}
        done = subprocess.run(
            [self._cmake, "-G", "Ninja", "-S", ROOT, "-B", tree]
            + [f"-D{name}={value}" for name, value in options.items()],
            env=environment,
            capture_output=True,
            text=True,
        )
        self.succeeded = done.returncode == 0
        self.output = " ".join((done.stdout + done.stderr).split())  # CMake breaks its lines

    def architectures(self) -> set[str]:
        rules = (self._tree / "build.ninja").read_text("utf-8")
        return set(re.findall(r"\b(?:sm|compute)_\w+", rules))

    def targets(self) -> set[str]:
        listing = subprocess.run(
            [self._cmake, "--build", self._tree, "--target", "help"],
            check=True,
            capture_output=True,
            text=True,
        )
        return set(re.findall(r"^(\w+): phony", listing.stdout, re.MULTILINE))


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    """An nvcc that is not there."""
    return tmp_path / "missing" / "nvcc"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """One that works, and says that it is of a release which does not know sm_90a."""
    script = tmp_path / "nvcc"
    release = "Cuda compilation tools, release 11.8, V11.8.89"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{release}" || exec {program("nvcc")} "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_auto_is_the_default_and_builds_kernels_where_nvcc_is(tmp_path: Path) -> None:
    program("nvcc")
    build = Build(tmp_path / "build", None, None)
    assert build.succeeded, build.output
    assert build.targets() >= {"_C", "secateur_cuda"}


def test_off_builds_none_though_nvcc_is_there(tmp_path: Path) -> None:
    program("nvcc")
    build = Build(tmp_path / "build", "OFF", None)
    assert build.succeeded, build.output
    assert "CUDA compiler" not in build.output  # nobody looked
    assert "_C" in build.targets()
    assert "secateur_cuda" not in build.targets()


def test_auto_goes_on_without_nvcc(tmp_path: Path, missing: Path) -> None:
    build = Build(tmp_path / "build", "AUTO", missing)
    assert build.succeeded, build.output
    assert "no nvcc 12.0 or newer: building without CUDA kernels" in build.output
    assert "_C" in build.targets()
    assert "secateur_cuda" not in build.targets()


def test_on_insists_on_nvcc(tmp_path: Path, missing: Path) -> None:
    build = Build(tmp_path / "build", "ON", missing)
    assert not build.succeeded
    assert "expected nvcc 12.0 or newer for SECATEUR_CUDA=ON, got: none" in build.output


def test_on_insists_on_an_nvcc_that_is_new_enough(tmp_path: Path, old: Path) -> None:
    build = Build(tmp_path / "build", "ON", old)
    assert not build.succeeded
    assert "expected nvcc 12.0 or newer for SECATEUR_CUDA=ON, got: Cuda compil" in build.output


def test_any_other_setting_is_refused(tmp_path: Path, missing: Path) -> None:
    build = Build(tmp_path / "build", "on", missing)
    assert not build.succeeded
    assert "expected SECATEUR_CUDA to be AUTO, ON or OFF, got 'on'" in build.output


def test_other_architectures_may_be_asked_for(tmp_path: Path) -> None:
    program("nvcc")
    build = Build(tmp_path / "default", "ON", None)
    assert build.architectures() == {"sm_80", "sm_90a", "compute_80", "compute_90a"}
    build = Build(tmp_path / "build", "ON", None, "89-real")
    assert build.succeeded, build.output
    assert build.architectures() == {"sm_89", "compute_89"}
