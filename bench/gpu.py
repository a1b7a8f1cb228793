"""What gpu.sh asks of Python: ``python -m bench.gpu check`` and so on; exits with what is wrong.

Runs before secateur is built.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def expect(condition: object, expected: str, got: object) -> None:
    if not condition:
        sys.exit(f"expected {expected}, got {got}")


def check() -> None:
    """Print what this machine has, or exit where the kernels cannot be built or run here."""
    import torch

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    expect(numbers(torch.__version__) >= (2, 10), "torch 2.10 or newer", torch.__version__)
    expect(torch.version.cuda, "a torch with CUDA", torch.__version__)
    gpu()
    nvcc = shutil.which("nvcc")
    expect(nvcc, "nvcc 12.0 or newer", "none on PATH or under CUDA_HOME: set CUDA_HOME")
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", text)
    print(f"{nvcc}: {release[0] if release else text}")
    expect(release and numbers(release[1]) >= (12, 0), "nvcc 12.0 or newer", text)


def gpu() -> None:
    """Print the GPUs, or exit: without one, tests of it would pass by being skipped."""
    import torch

    expect(torch.cuda.is_available(), "a GPU", f"none that torch {torch.__version__} can use")
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_properties(i)}")
    capability = torch.cuda.get_device_capability()
    expect(capability >= (8, 0), "compute capability 8.0 or higher", capability)


def name() -> None:
    """Print what the folder of this GPU's results is called."""
    import torch

    print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))


def missing(requirements: list[str]) -> None:
    """Print those of ``name`` or ``name>=version`` that this Python does not meet, one a line."""
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        try:
            met = numbers(importlib.metadata.version(name)) >= numbers(least)
        except importlib.metadata.PackageNotFoundError:
            met = not least and shutil.which(name) is not None  # a program will do
        if not met:
            print(requirement)


def loaded() -> None:
    """Print what secateur was built with, or exit where its CUDA kernels are not loaded."""
    import secateur

    info = secateur.build_info()
    for key, value in info.items():
        print(f"{key}: {value}")
    expect(info["cuda_kernels"] == "loaded", "CUDA kernels", info["cuda_kernels"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    questions = {f.__name__: f for f in (check, gpu, name, loaded)}
    parser.add_argument("question", choices=(*questions, "missing"))
    parser.add_argument("requirements", nargs="*")
    args = parser.parse_args()
    if args.question == "missing":
        missing(args.requirements)
    else:
        questions[args.question]()


if __name__ == "__main__":
    main()
