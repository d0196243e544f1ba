"""The `sgtr-hf` command: pictures to scene graphs, training data, original checkpoints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image, UnidentifiedImageError

from ._version import __version__
from .annotation_commands import add_annotation_commands
from .auto import DEFAULT_CHECKPOINT, TASK
from .command_arguments import (
    add_labels_per_entity,
    check_output_names,
    drawing_names,
    image_paths,
    model_folder,
    positive,
    probability,
)
from .configuration.configuration_sgtr import SgtrConfig
from .data.reading_processes import reason_of
from .data_commands import add_data_commands
from .dino_commands import add_dino_commands
from .evaluation_commands import add_evaluation_commands
from .graph_output import GraphOutput
from .hub_commands import add_hub_commands
from .image_processing.picture_reading import read_image
from .scene_graph import SceneGraph


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 after a mistake of the caller."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (
        OSError,
        ValueError,
        TypeError,
        ArithmeticError,
        ImportError,
        StrictDataclassError,
    ) as error:
        print(f"sgtr-hf {options.command}: {reason_of(error)}{_remedy(error)}", file=sys.stderr)
        return 2


def _remedy(error: BaseException) -> str:
    """How to get a package that is missing, where the command itself does not say it."""
    if isinstance(error, ModuleNotFoundError):
        return '; install what training and data need: `pip install "sgtr-hf[train,metrics]"`'
    return ""


def predict(options: argparse.Namespace) -> int:
    """Find the scene graphs of pictures, print them, and write what was asked for."""
    paths = list(image_paths(options.images))
    check_output_names(options.draw, options.output)
    drawings = drawing_names(options.draw, paths)
    generate = _load_pipeline(options.model)
    config, broken = generate.model.config, 0
    with GraphOutput(options.output, paths, config.id2label, config.id2predicate) as output:
        for path, drawing in zip(paths, drawings, strict=True):
            # One broken file must not lose the graphs of the others.
            try:
                picture = read_image(path)
                graph = generate(
                    picture,
                    threshold=options.threshold,
                    top_k=options.top_k,
                    graph_constraint=options.graph_constraint,
                    labels_per_entity=options.labels_per_entity,
                )
            except (OSError, ValueError, UnidentifiedImageError) as error:
                print(f"{path}: {error}", file=sys.stderr)
                broken += 1
                continue
            output.add(path, graph)
            _print_graph(path, graph)
            if drawing is not None:
                _draw(picture, graph, drawing)
    return 2 if broken else 0


def _load_pipeline(model: str) -> Any:
    """Open a scene graph model; another one would end in a long text of transformers."""
    from transformers import AutoConfig, pipeline

    folder = model_folder(model)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, SgtrConfig):
        raise ValueError(
            f"`--model` {model} is a model of type {config.model_type}; scene graphs need one of "
            f"type {SgtrConfig.model_type}."
        )
    return pipeline(TASK, model=folder)


def make_tabletop(options: argparse.Namespace) -> int:
    """Render a tabletop data set."""
    try:
        from .data.tabletop_writer import make_tabletop as write_tabletop
    except ImportError as error:
        raise ImportError(
            f"Rendering needs {error.name}, which is not installed: `pip install "
            '"sgtr-hf[render]"` (pybullet has wheels for Python 3.10 and 3.11).'
        ) from error

    write_tabletop(
        options.folder,
        images=options.images,
        validation_images=options.validation_images,
        test_images=options.test_images,
        seed=options.seed,
        workers=options.workers,
        image_size=options.image_size,
    )
    return 0


def convert_checkpoint(options: argparse.Namespace) -> int:
    """Bring a checkpoint of an original implementation into this package's layout."""
    import torch

    from .hub.checkpoint_conversion import convert_file

    report = convert_file(
        options.checkpoint,
        options.output,
        options.format,
        dtype=getattr(torch, options.dtype),
        vocabulary=options.vocabulary,
        network=options.network,
        backbone=options.backbone,
        dilated=options.dc5,
    )
    print(f"{options.output}: {report}.")
    for name in report.new:
        print(f"  new: {name}")
    return 0


def query_slots(options: argparse.Namespace) -> int:
    """Draw what each query of a model looks for, over a set of images."""
    from tqdm import tqdm

    from .visualization.query_slots import (
        collect_query_slots,
        draw_query_slots,
        write_slot_statistics,
    )

    paths = list(image_paths(options.images))
    check_output_names(options.output, options.statistics)
    model, image_processor = _load_model(options.model)
    slots = collect_query_slots(model, image_processor, tqdm(paths, desc="images"))
    draw_query_slots(slots, options.slots, options.small_area).save(options.output)
    if options.statistics:
        write_slot_statistics(options.statistics, slots, options.small_area)
    return 0


def attention(options: argparse.Namespace) -> int:
    """Draw where the queries of a model look in a picture."""
    from .image_processing.picture_reading import read_image
    from .visualization.attention_maps import (
        detector_attention,
        draw_attention,
        triplet_attention,
    )

    check_output_names(options.output)
    image = read_image(options.image)
    model, image_processor = _load_model(options.model, attn_implementation="eager")
    if options.triplets:
        if model.config.model_type != SgtrConfig.model_type:
            raise ValueError(f"`--triplets` needs a scene graph model, {options.model} is none.")
        panels = triplet_attention(model, image_processor, image, options.queries)
    else:
        panels = detector_attention(
            model, image_processor, image, options.queries, options.points or ()
        )
    draw_attention(image, panels).save(options.output)
    return 0


def _load_model(model: str, **arguments: Any) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    folder = model_folder(model)
    return (
        AutoModelForObjectDetection.from_pretrained(folder, **arguments),
        AutoImageProcessor.from_pretrained(folder),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sgtr-hf", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_predict(commands.add_parser("predict", help="find the scene graphs of pictures"))
    _add_make_tabletop(commands.add_parser("make-tabletop", help="render a tabletop data set"))
    _add_convert_checkpoint(
        commands.add_parser("convert-checkpoint", help="read the weights of an original")
    )
    add_data_commands(commands)
    add_evaluation_commands(commands)
    add_annotation_commands(commands)
    add_hub_commands(commands)
    add_dino_commands(commands)
    _add_query_slots(commands.add_parser("query-slots", help="draw what each query looks for"))
    _add_attention(commands.add_parser("attention", help="draw where queries look in a picture"))
    return parser


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=predict)
    parser.add_argument("images", nargs="+", help="image files, URLs or folders of images")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id; the shipped one by default"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write the graphs to this file, as JSON, or Parquet if it ends so",
    )
    parser.add_argument("--draw", type=Path, help="draw each graph into this image file")
    parser.add_argument("--top-k", type=positive, default=20, help="most relations a picture")
    parser.add_argument("--threshold", type=probability, default=0.1, help="least relation score")
    parser.add_argument(
        "--graph-constraint",
        action="store_true",
        help="keep one predicate for each ordered pair of entities",
    )
    add_labels_per_entity(parser)


def _add_make_tabletop(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=make_tabletop)
    parser.add_argument("folder", type=Path, metavar="OUTPUT", help="empty or new folder")
    parser.add_argument("--images", type=positive, default=10000, help="training images")
    parser.add_argument("--validation-images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="decides every scene")
    parser.add_argument("--workers", type=positive, help="processes; one a core by default")
    parser.add_argument("--image-size", type=positive, default=256, help="pixels a side")


def _add_convert_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=convert_checkpoint)
    parser.add_argument("checkpoint", type=Path, help=".pth or .safetensors file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make")
    parser.add_argument(
        "--format",
        required=True,
        choices=("detr", "dino", "sgtr-vg150", "sgtr-openimages"),
        help="what wrote the file",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help='JSON with "labels" and "predicates", or the categories_dict.json of Open Images',
    )
    parser.add_argument(
        "--network",
        default="teacher",
        choices=("teacher", "student", "both"),
        help="of a full DINO file; both, with their heads, go on training",
    )
    parser.add_argument("--backbone", type=Path, help="file of a DINO classifier's backbone")
    parser.add_argument(
        "--dc5",
        action=argparse.BooleanOptionalAction,
        help="the DETR has a dilated backbone, which its tensors do not show",
    )


def _add_query_slots(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=query_slots)
    parser.add_argument("images", nargs="+", help="image files or folders of images")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="image file to draw")
    parser.add_argument("--statistics", type=Path, help="JSON file of shares, centres, occupancy")
    parser.add_argument("--slots", type=positive, default=20, help="queries to draw")
    parser.add_argument(
        "--small-area",
        type=probability,
        default=0.1,
        help="share of the image below which a box is small",
    )


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=attention)
    parser.add_argument("image", help="image file or URL")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="image file to draw")
    parser.add_argument("--queries", type=int, nargs="+", help="the likeliest by default")
    parser.add_argument(
        "--points",
        type=_point,
        nargs="+",
        help="places of encoder self-attention, each x,y in [0, 1]",
    )
    parser.add_argument(
        "--triplets",
        action="store_true",
        help="subject, predicate and object queries side by side instead of entity queries",
    )


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must look like 0.3,0.5, got {text}") from error
    return x, y


def _print_graph(path: str, graph: SceneGraph) -> None:
    print(f"{path}: {graph.num_entities} entities, {graph.num_relations} relations")
    for triplet in graph.triplets():
        print(f"  {triplet.score:.2f}  {triplet.subject} - {triplet.predicate} - {triplet.object}")


def _draw(picture: Image.Image, graph: SceneGraph, output: Path) -> None:
    from .visualization.scene_graph_drawing import draw_scene_graph

    draw_scene_graph(picture, graph).save(output)
