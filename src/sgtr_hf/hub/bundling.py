"""Flattens the inference path into one folder, for users without this package.

transformers loads the code of a published model from files that lie beside each other and import
each other as `from .module import name`; it knows no sub-packages (5.23,
`dynamic_module_utils.py`). So the files that a model needs are copied into one folder, their
relative imports shortened to the name of the file, and the configurations told which classes are
where.
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


_PACKAGE = Path(__file__).parent.parent


class _Published(NamedTuple):
    """What is published of a model type: files and classes."""

    configuration: str
    """As "module.Class", like all below; modules are named as files in the bundle."""
    models: Mapping[str, str]
    """By the Auto class of transformers that loads it."""
    image_processors: tuple[str, str]
    """On PIL, and on torchvision; transformers takes them in this order."""
    pipelines: Mapping[str, Mapping[str, Any]]
    """`custom_pipelines` of the configuration."""


_SGTR_PROCESSORS = (
    "image_processing_sgtr.SgtrImageProcessorPil",
    "image_processing_sgtr.SgtrImageProcessor",
)
_PUBLISHED = {
    "sgtr": _Published(
        "configuration_sgtr.SgtrConfig",
        {
            "AutoModel": "modeling_sgtr.SgtrModel",
            # Only Auto classes of transformers itself can be named here.
            "AutoModelForObjectDetection": "modeling_sgtr.SgtrForSceneGraphGeneration",
        },
        _SGTR_PROCESSORS,
        {
            "scene-graph": {
                "impl": "scene_graph_pipeline.SceneGraphPipeline",
                "pt": ["AutoModelForObjectDetection"],
                "type": "image",
            }
        },
    ),
    "sgtr_detr": _Published(
        "configuration_sgtr_detr.SgtrDetrConfig",
        {
            "AutoModel": "modeling_sgtr_detr.SgtrDetrModel",
            "AutoModelForObjectDetection": "modeling_sgtr_detr.SgtrDetrForObjectDetection",
        },
        _SGTR_PROCESSORS,
        {},
    ),
    "dino_vit": _Published(
        "configuration_dino_vit.DinoVitConfig",
        {
            "AutoModel": "modeling_dino_vit.DinoVitModel",
            "AutoModelForImageClassification": "modeling_dino_vit.DinoVitForImageClassification",
            "AutoModelForPreTraining": "modeling_dino_pretraining.DinoVitForPreTraining",
            "AutoBackbone": "modeling_dino_vit.DinoVitBackbone",
        },
        (
            "image_processing_dino_vit.DinoVitImageProcessorPil",
            "image_processing_dino_vit.DinoVitImageProcessor",
        ),
        {},
    ),
}
MODEL_TYPES = tuple(_PUBLISHED)


def bundle_code(folder: Path) -> list[Path]:
    """Put the code of a saved model beside it, so that `trust_remote_code=True` finds it.

    Writes the modules, and names their classes in config.json (`auto_map`, `custom_pipelines`) and
    preprocessor_config.json (`auto_map`).

    Args:
        folder: Of a model saved by `save_pretrained`, with its image processor.

    Returns:
        The modules written.

    Raises:
        ValueError: If config.json is missing, broken, or of another model type.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    model_type = config.get("model_type")
    if model_type not in _PUBLISHED:
        raise ValueError(
            f"{config_file}: `model_type` must be one of {', '.join(MODEL_TYPES)}, got "
            f"{model_type!r}."
        )
    published = _PUBLISHED[model_type]
    processors = list(published.image_processors)
    config["auto_map"] = {
        "AutoConfig": published.configuration,
        **published.models,
        "AutoImageProcessor": processors,
    }
    # A model that was published before and trained again may still name classes of its origin.
    config.pop("custom_pipelines", None)
    if published.pipelines:
        config["custom_pipelines"] = published.pipelines
    processor_file = folder / "preprocessor_config.json"
    processor = read_json(processor_file) if processor_file.is_file() else None
    files = _write_modules(folder, published)
    _write_json(config_file, config)
    if processor is not None:
        processor["auto_map"] = {"AutoImageProcessor": processors}
        _write_json(processor_file, processor)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_modules(folder: Path, published: _Published) -> list[Path]:
    """Copy the modules of the published classes, and all that they import."""
    references = [published.configuration, *published.models.values(), *published.image_processors]
    references += [pipeline["impl"] for pipeline in published.pipelines.values()]
    entry_modules = {reference.partition(".")[0] for reference in references}
    waiting = [path for path in _PACKAGE.rglob("*.py") if path.stem in entry_modules]
    sources: dict[Path, str] = {}
    while waiting:
        path = waiting.pop()
        if path not in sources:
            sources[path], imported = _flatten(path)
            waiting += imported
    files = []
    for path in sorted(sources, key=lambda one: one.name):
        files.append(folder / path.name)
        files[-1].write_text(sources[path], encoding="utf-8")
    return files


def _flatten(path: Path) -> tuple[str, list[Path]]:
    """Return a module's source with short relative imports, and the modules they name."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        # tests/test_structure.py sees to it that every relative import names a module.
        parts = (node.module or "").split(".")
        base = path.parents[node.level - 1]
        imported.append(base.joinpath(*parts).with_suffix(".py"))
        written = f"from {'.' * node.level}{node.module} import"
        row = node.lineno - 1
        lines[row] = lines[row].replace(written, f"from .{parts[-1]} import", 1)
    return "".join(lines), imported
