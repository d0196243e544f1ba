"""How a model came about: what is needed to make it again."""

import dataclasses
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .recipe import Recipe


PACKAGES = ("sgtr-hf", "torch", "transformers", "timm", "accelerate", "datasets", "numpy")


def describe_run(recipe: Recipe, num_processes: int) -> dict[str, Any]:
    """Return command, recipe with its defaults, git commit, versions and hardware."""
    return {
        "command": " ".join(sys.argv),
        "recipe": dataclasses.asdict(recipe),
        "commit": find_commit(),
        "seed": recipe.training.seed,
        "processes": num_processes,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def find_commit() -> str | None:
    """Return the commit of the checkout that the package runs from; None if it is installed.

    "-dirty" follows it if tracked files have been changed.
    """
    here = Path(__file__)
    try:
        # An environment may lie within the checkout of something else.
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
        return _git(
            "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*", folder=here.parent
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    found = subprocess.run(
        ("git", *arguments), cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
