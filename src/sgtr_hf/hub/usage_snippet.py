"""The example in a model's card, and what it truly prints for a user without this package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import constants


SAMPLE_NAME = "sample.jpg"
_SECONDS = 900
# An entry of None makes Python raise ModuleNotFoundError, wherever the package lies.
_WITHOUT_PACKAGE = 'import sys\nsys.modules["sgtr_hf"] = None\n'
_SCENE_GRAPH = """from transformers import pipeline

generate = pipeline("scene-graph", model="{repo_id}", trust_remote_code=True)
graph = generate("{sample_url}")
print(graph)
for found in graph.triplets()[:5]:
    print(f"{{found.score:.2f}}  {{found.subject}} - {{found.predicate}} - {{found.object}}")
"""
_DETECTION = """from transformers import pipeline

detect = pipeline("object-detection", model="{repo_id}", trust_remote_code=True)
for entity in detect("{sample_url}", threshold=0.0)[:5]:
    print(f"{{entity['score']:.2f}}  {{entity['label']}}", list(entity["box"].values()))
"""
_CLASSIFICATION = """from transformers import pipeline

classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)
for answer in classify("{sample_url}", top_k=5):
    print(f"{{answer['score']:.2f}}  {{answer['label']}}")
"""
_FEATURES = """from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
outputs = model(**processor(load_image("{sample_url}"), return_tensors="pt"))
print(outputs.last_hidden_state.shape)
"""
_BY_ARCHITECTURE = {
    "SgtrForSceneGraphGeneration": _SCENE_GRAPH,
    "SgtrDetrForObjectDetection": _DETECTION,
    "DinoVitForImageClassification": _CLASSIFICATION,
}


def make_snippet(architecture: str, repo_id: str) -> str:
    """Write the shortest program that uses a published model.

    Args:
        architecture: Class that the configuration names.
        repo_id: Where it is published, with its sample picture.
    """
    template = _BY_ARCHITECTURE.get(architecture, _FEATURES)
    return template.format(repo_id=repo_id, sample_url=_sample_url(repo_id))


def run_snippet(code: str, repo_id: str, folder: Path) -> str:
    """Run a snippet on a folder in a process that cannot import this package.

    Args:
        code: Of `make_snippet`.
        repo_id: That it names; the folder is read in its place.
        folder: Ready to be published.

    Returns:
        What it printed.

    Raises:
        ValueError: If it fails, with the last line of its error.
    """
    local = code.replace(_sample_url(repo_id), str(folder / SAMPLE_NAME))
    local = local.replace(f'"{repo_id}"', repr(str(folder.resolve())))
    with tempfile.TemporaryDirectory() as modules:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        finished = subprocess.run(
            [sys.executable, "-c", _WITHOUT_PACKAGE + local],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise ValueError(
            f"{folder} is not published: without the package it cannot be used: {lines[-1]}"
        )
    return finished.stdout.strip()


def _sample_url(repo_id: str) -> str:
    return f"{constants.ENDPOINT}/{repo_id}/resolve/main/{SAMPLE_NAME}"
