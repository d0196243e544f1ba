"""What keeps the package publishable and readable, checked over its own source."""

import ast
from pathlib import Path

import pytest

import sgtr_hf


PACKAGE = Path(sgtr_hf.__file__).parent
ROOT = PACKAGE.parent.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Files that are published beside a checkpoint as remote code.
INFERENCE_PATH = [
    *(PACKAGE / name for name in ("boxes.py", "scene_graph.py", "post_processing.py")),
    *(
        path
        for folder in ("configuration", "modeling", "losses", "image_processing", "pipelines")
        for path in sorted((PACKAGE / folder).glob("*.py"))
        if path.name != "__init__.py"
    ),
]
ALLOWED = {
    "torch",
    "torchvision",
    "transformers",
    "huggingface_hub",
    "numpy",
    "PIL",
    "safetensors",
    "scipy",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
    "io",
    "itertools",
    "json",
    "math",
    "operator",
    "os",
    "pathlib",
    "types",
    "typing",
    "warnings",
}
# Each part may use what stands before it.
LAYERS = ("configuration", "losses", "modeling", "image_processing", "pipelines")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def names(paths):
    return [str(path.relative_to(PACKAGE)) for path in paths]


@pytest.mark.parametrize("path", INFERENCE_PATH, ids=names(INFERENCE_PATH))
def test_the_inference_path_imports_little(path):
    for level, module in imports(path):
        assert module is not None, f"{path.name}: relative imports must name a module"
        if level == 0:
            assert module.split(".")[0] in ALLOWED, f"{path.name} imports {module}"


def test_file_names_are_unique():
    files = [path.name for path in SOURCES if path.name != "__init__.py"]
    assert len(files) == len(set(files))


@pytest.mark.parametrize("path", INFERENCE_PATH, ids=names(INFERENCE_PATH))
def test_imports_point_one_way(path):
    folder = path.parent.name
    if folder not in LAYERS:
        return
    later = LAYERS[LAYERS.index(folder) + 1 :]
    for level, module in imports(path):
        if level == 2:
            assert module.split(".")[0] not in later, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_files_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert text.isascii()


def test_assets_are_small():
    for path in (PACKAGE / "assets").rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 16 * 2**20, path
