"""The card of a published model, filled from the files of its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._version import __version__
from .bundling import read_json
from .usage_snippet import SAMPLE_NAME


# Cards with this line are written anew by the next push; others keep their text.
MARK = "<!-- Written by sgtr-hf push. Remove this line to keep your own changes. -->"
DRAWING_NAME = "sample_graph.png"
# What `scripts/evaluate_model.py --output` and a training run write.
REPORT_NAME, RECORD_NAME = "evaluation.json", "training.json"
# Folder of the best model of a run.
BEST_NAME = "best"
_FIGURES = {
    "R@20": "recall",
    "mR@20": "recall",
    "R@50": "recall",
    "mR@50": "recall",
    "R@100": "recall",
    "mR@100": "recall",
    "AP": "mean_average_precision",
    "AP50": "mean_average_precision",
}
_TASKS = {
    "SgtrForSceneGraphGeneration": "object-detection",
    "SgtrDetrForObjectDetection": "object-detection",
    "DinoVitForImageClassification": "image-classification",
}
_KINDS = {
    "sgtr": "scene graph model (Li et al. 2022)",
    "sgtr_detr": "detector (DETR, Carion et al. 2020)",
    "dino_vit": "vision transformer (Dosovitskiy et al. 2021; DINO, Caron et al. 2021)",
}
_CITATIONS = {
    "sgtr": """@inproceedings{li2022sgtr,
  title     = {SGTR: End-to-end Scene Graph Generation with Transformer},
  author    = {Li, Rongjie and Zhang, Songyang and He, Xuming},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}""",
    "sgtr_detr": """@inproceedings{carion2020detr,
  title     = {End-to-End Object Detection with Transformers},
  author    = {Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas
               and Kirillov, Alexander and Zagoruyko, Sergey},
  booktitle = {European Conference on Computer Vision},
  year      = {2020}
}""",
    "dino_vit": """@inproceedings{caron2021dino,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J\\'egou, Herv\\'e
               and Mairal, Julien and Bojanowski, Piotr and Joulin, Armand},
  booktitle = {International Conference on Computer Vision},
  year      = {2021}
}""",
}
_SHOWN_NAMES = 200
_REPORT_ENTRIES = ("data", "split", "mode", "images", "version", "figures")
_RECORD_ENTRIES = (
    "command",
    "recipe",
    "images_seen",
    "training_minutes",
    "processes",
    "threads",
    "seed",
    "processor",
    "versions",
)


class ModelFacts(NamedTuple):
    """What the files of a model's folder say about it."""

    config: Mapping[str, Any]
    """config.json."""
    trainings: Sequence[Mapping[str, Any]] = ()
    """training.json, the runs in their order."""
    report: Mapping[str, Any] | None = None
    """evaluation.json."""
    own_card: str | None = None
    """README.md, if somebody wrote it."""
    is_best: bool = False
    """Whether it is the best model of a run, not its last one."""

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return str((self.config.get("architectures") or ["?"])[0])


def read_facts(folder: Path) -> ModelFacts:
    """Read what a folder says of its model.

    A training run leaves its record above the folders of its models, where it is found too.

    Args:
        folder: Of the model.

    Raises:
        ValueError: If one of its files is broken.
    """
    trainings: list[Mapping[str, Any]] = []
    for place in (folder, folder.parent):
        if (place / RECORD_NAME).is_file():
            trainings = _read_records(place / RECORD_NAME)
            break
    report = read_json(folder / REPORT_NAME) if (folder / REPORT_NAME).is_file() else None
    if report is not None:
        _check_entries(folder / REPORT_NAME, report, _REPORT_ENTRIES)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else MARK
    return ModelFacts(
        read_json(folder / "config.json"),
        trainings,
        report,
        None if MARK in text else text,
        is_best=folder.resolve().name == BEST_NAME,
    )


def _read_records(path: Path) -> list[Mapping[str, Any]]:
    """Records of one run, or of several behind each other."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records = content if isinstance(content, list) else [content]
    for record in records:
        _check_entries(path, record, _RECORD_ENTRIES)
    return records


def _check_entries(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it is not what this package writes. Rename it to "
            "leave it out of the card."
        )


def make_card(
    facts: ModelFacts, repo_id: str, licence: str | None, example: tuple[str, str]
) -> str:
    """Write the card.

    Args:
        facts: Of the folder.
        repo_id: Where the model is published.
        licence: Of the weights, as the Hub calls it; that of an own card, or "unknown", if None.
        example: The snippet, and what it printed.

    Returns:
        Markdown with metadata. The text of an own card stays, and the example follows it.
    """
    own = ModelCard(facts.own_card) if facts.own_card is not None else None
    known = {} if own is None else own.data.to_dict()
    metadata = _metadata(facts, repo_id)
    metadata["tags"] = list(dict.fromkeys([*(known.get("tags") or ()), *metadata["tags"]]))
    # Figures of other weights, perhaps.
    known.pop("model-index", None)
    known |= metadata
    known["license"] = licence or known.get("license") or "unknown"
    data = ModelCardData(**known, ignore_metadata_errors=True)
    usage = _usage(facts, *example)
    if own is not None:
        return f"---\n{data.to_yaml()}\n---\n{own.text.strip()}\n\n{usage}"
    sections = (
        MARK,
        f"# {repo_id.rpartition('/')[2]}\n\n{_description(facts)}",
        usage.rstrip(),
        f"## Training data and recipe\n\n{_training(facts.trainings)}",
        f"## Figures\n\n{_figures(facts)}",
        f"## Limitations\n\n{_limitations(facts)}",
        f"## Citation\n\n```bibtex\n{_CITATIONS[facts.config['model_type']]}\n```",
        f"## Licence\n\nWeights: {known['license']}. Code: Apache-2.0, sgtr_hf {__version__}.",
    )
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(sections) + "\n"


def _metadata(facts: ModelFacts, repo_id: str) -> dict[str, Any]:
    is_scene_graph = facts.config["model_type"] == "sgtr"
    tags = ["sgtr_hf", facts.config["model_type"], "custom_code"]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _TASKS.get(facts.architecture, "image-feature-extraction"),
        "tags": ["scene-graph-generation", *tags] if is_scene_graph else tags,
        "model_name": repo_id.rpartition("/")[2],
    }
    results = _results(facts.report)
    return metadata | ({"eval_results": results} if results else {})


def _results(report: Mapping[str, Any] | None) -> list[EvalResult]:
    """The figures as `model-index`."""
    if report is None:
        return []
    name = Path(report["data"]).name
    return [
        EvalResult(
            task_type="object-detection",
            task_name="Scene graph generation" if "R" in metric else "Object detection",
            dataset_type=name,
            dataset_name=name,
            dataset_split=report["split"],
            metric_type=kind,
            metric_name=metric,
            metric_value=round(report["figures"][metric], 4),
        )
        for metric, kind in _FIGURES.items()
        if report["figures"].get(metric) is not None
    ]


def _description(facts: ModelFacts) -> str:
    config, kind = facts.config, _KINDS[facts.config["model_type"]]
    name = {"sgtr": "SGTR", "sgtr_detr": "DETR", "dino_vit": "ViT"}[config["model_type"]]
    if config.get("predicate_node_generator") == "spatial_aware":
        name = "SGTR+ (a reimplementation)"
    text = f"{name}, a {kind}, as implemented by sgtr_hf {__version__}."
    for field, words in (("id2label", "classes"), ("id2predicate", "predicates")):
        names = [str(one) for one in (config.get(field) or {}).values()]
        if names:
            shown = ", ".join(names[:_SHOWN_NAMES])
            more = f", and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            text += f"\n\n{len(names)} {words}: {shown}{more}."
    return text


def _usage(facts: ModelFacts, code: str, output: str) -> str:
    text = f"""## Use it

```python
{code.strip()}
```

prints

```
{output}
```

With `pip install sgtr-hf` and `import sgtr_hf` the code of the package is used, and
`trust_remote_code` is not needed. The picture is [{SAMPLE_NAME}]({SAMPLE_NAME}):

![The sample picture]({SAMPLE_NAME})
"""
    if facts.config["model_type"] == "sgtr":
        text += f"\n![The same with the scene graph that was found]({DRAWING_NAME})\n"
    return text


def _training(trainings: Sequence[Mapping[str, Any]]) -> str:
    if not trainings:
        return "The folder of the model says nothing of its training."
    rows = "\n".join(
        f"| `{run['recipe']['data']['path']}` | `{run['command']}` | {run['images_seen']} | "
        f"{run['training_minutes']} | {run['processes']} x {run['threads']} | {run['seed']} | "
        f"{str(run.get('commit'))[:7]} |"
        for run in trainings
    )
    last = trainings[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items())
    recipe = json.dumps(last["recipe"], indent=2)
    return f"""| data | command | images seen | minutes | processes x threads | seed | commit |
|---|---|---|---|---|---|---|
{rows}

On {last["processor"]}, with {versions}. The last recipe with all its defaults:

```json
{recipe}
```"""


def _figures(facts: ModelFacts) -> str:
    report = facts.report
    if report is not None:
        return f"""{report["images"]} images of `{report["data"]}`, split {report["split"]}, mode
{report["mode"]}, by `scripts/evaluate_model.py` of sgtr_hf {report["version"]}:

{_table(report["figures"])}"""
    last = facts.trainings[-1] if facts.trainings else {}
    best = last.get("best")
    if facts.is_best:
        # The last figures are of other weights.
        if best:
            return (
                f"On the validation split, after update {best['updates']} of {last['updates']}:\n\n"
                f"{_table(best['figures'])}"
            )
    elif last.get("figures"):
        return f"On the validation split, at the end of training:\n\n{_table(last['figures'])}"
    return "None were measured."


def _table(figures: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {value:.4f} |"
        for name, value in figures.items()
        if isinstance(value, (int, float))
    ]
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def _limitations(facts: ModelFacts) -> str:
    config = facts.config
    lines = [
        "- It knows the classes above and no others, and pictures like those it was trained on.",
        "- Batches of pictures of different sizes are padded, which changes scores a little.",
    ]
    if len(facts.trainings):
        lines.append(f"- One seed ({facts.trainings[-1]['seed']}).")
    if config["model_type"] == "sgtr":
        is_calibrated = (config.get("score_temperature"), config.get("score_offset")) != (1.0, 0.0)
        lines.append(
            f"- Scores were calibrated: temperature {config.get('score_temperature')}, offset "
            f"{config.get('score_offset')}."
            if is_calibrated
            else "- Scores are not calibrated: they rank, and are no probabilities of being right."
        )
    if config.get("predicate_node_generator") == "spatial_aware":
        lines.append("- SGTR+ has no published code; this is a reading of its paper.")
    return "\n".join(lines)
