"""The commands `sgtr-hf dino ...`: what a vision transformer learned without labels.

Libraries that only these need are imported when they run, so that other commands start quickly.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_arguments import (
    check_output_names,
    image_paths,
    model_folder,
    positive,
    positive_number,
)
from .dino_options import add_model_options, compute_features, load_model, write_report
from .dino_picture_commands import add_picture_commands
from .image_processing.picture_reading import IMAGE_SUFFIXES


if TYPE_CHECKING:
    from .self_supervision.feature_extraction import Features


_PICTURES_HELP = "folder of images (classes as sub-folders), Parquet file or folder, or Hub id"
_SOURCE_HELP = f"{_PICTURES_HELP}; or a .safetensors file of `sgtr-hf dino features`"


def features(options: argparse.Namespace) -> int:
    """Compute features of pictures, and write them."""
    from .self_supervision.feature_extraction import save_features

    check_output_names(None, options.output)
    found = _features(options, options.source, options.split)
    save_features(found, options.output)
    print(f"{options.output}: {len(found.vectors)} x {found.vectors.shape[1]} features.")
    return 0


def neighbours(options: argparse.Namespace) -> int:
    """Classify pictures by their nearest neighbours, and print the accuracy."""
    from .self_supervision.nearest_neighbours import neighbour_accuracy

    check_output_names(None, options.output)
    bank = _features(options, options.train, options.train_split)
    queries = _features(options, options.test, options.test_split)
    _check_classes(options.train, bank.label_names, options.test, queries.label_names)
    results = neighbour_accuracy(
        (queries.vectors, queries.labels),
        (bank.vectors, bank.labels),
        options.neighbours,
        options.temperature,
    )
    size = len(bank.vectors)
    print(f"{len(queries.vectors)} pictures by {size}, temperature {options.temperature}")
    for result in results:
        note = f" (all {size} there are)" if result.neighbours > size else ""
        print(f"{result.neighbours:>5} neighbours{note}: top-1 {result.top1:.4f}, "
              f"top-5 {result.top5:.4f}")  # fmt: skip
    write_report(options.output, {"neighbours": [result._asdict() for result in results]})
    return 0


def linear_probe(options: argparse.Namespace) -> int:
    """Train a linear classifier on frozen features, print each epoch, and save it."""
    from .self_supervision.linear_probe import ProbeSettings, make_probe, train_probe

    if options.output.exists():
        raise ValueError(f"`--output` {options.output} exists already; name a new folder.")
    model, image_processor = load_model(options)
    training = _labelled(options, options.train, options.train_split)
    validation = _labelled(options, options.test, options.test_split)
    names = training.label_names
    _check_classes(options.train, names, options.test, validation.label_names)
    # A class may have a name and no picture.
    num_labels = len(names or ()) or 1 + max([*training.labels, *validation.labels])
    probe = make_probe(
        model,
        max(num_labels, 1),
        options.layers,
        patch_mean=options.patch_mean,
        seed=options.seed,
    ).to(options.device)
    if names is not None:
        probe.config.id2label = dict(enumerate(names))
        probe.config.label2id = {name: label for label, name in probe.config.id2label.items()}
    settings = ProbeSettings(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        is_augmented=options.augmentation,
        num_workers=options.workers,
        seed=options.seed,
    )
    best = 0.0
    for epoch in train_probe(probe, image_processor, training, validation, settings):
        best = max(best, epoch.accuracy.top1)
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, top-1 {epoch.accuracy.top1:.4f}, "
              f"top-5 {epoch.accuracy.top5:.4f}, best {best:.4f}")  # fmt: skip
    probe.save_pretrained(options.output)
    image_processor.save_pretrained(options.output)
    print(f"{options.output}: the classifier of the best epoch; top-1 {best:.4f}.")
    return 0


def classifier_accuracy(options: argparse.Namespace) -> int:
    """Measure a classifier that is there already."""
    from transformers import AutoImageProcessor

    from .modeling.modeling_dino_vit import DinoVitForImageClassification
    from .self_supervision.linear_probe import ProbeSettings, evaluate_classifier

    check_output_names(None, options.output)
    folder = model_folder(options.model)
    model, report = DinoVitForImageClassification.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} has no trained classifier; `sgtr-hf dino linear-probe` makes one."
        )
    pictures = _labelled(options, options.test, options.test_split)
    own = [model.config.id2label[label] for label in range(model.config.num_labels)]
    # Names that transformers makes up say nothing.
    is_named = own != [f"LABEL_{label}" for label in range(len(own))]
    _check_classes(folder, own if is_named else None, options.test, pictures.label_names)
    settings = ProbeSettings(batch_size=options.batch_size, num_workers=options.workers)
    accuracy = evaluate_classifier(
        model.eval().to(options.device),
        AutoImageProcessor.from_pretrained(folder),
        pictures,
        settings,
    )
    print(f"{len(pictures)} pictures: top-1 {accuracy.top1:.4f}, top-5 {accuracy.top5:.4f}")
    write_report(options.output, accuracy._asdict())
    return 0


def copy_detection(options: argparse.Namespace) -> int:
    """Look for the originals of copies, and print the mean average precision of each kind."""
    import torch

    from .data.picture_source import PictureFiles, PictureFolder
    from .self_supervision.copy_detection import Whitening, copy_accuracy, originals_of
    from .self_supervision.feature_extraction import copy_descriptor
    from .self_supervision.image_preparation import Normalization, SquarePreparation

    check_output_names(None, options.output)
    blocks = _copy_blocks(options.folder, options.originals)
    model, image_processor = load_model(options)
    prepare = SquarePreparation(options.image_size, Normalization.of(image_processor))
    compute = partial(copy_descriptor, model, power=options.power)

    def describe(pictures: PictureFiles | PictureFolder) -> "Features":
        return compute_features(options, pictures, prepare, compute)

    def describe_block(name: str) -> "Features":
        return describe(PictureFiles(list(image_paths([str(options.folder / name)]))))

    database = describe_block(options.originals)
    vectors = [database.vectors]
    if options.distractors is not None:
        vectors.append(describe(PictureFolder(options.distractors)).vectors)
    whitening = None
    if options.whitening is not None:
        whitening = Whitening.fit(describe(PictureFolder(options.whitening)).vectors)
    figures = {}
    for name in blocks:
        copies = describe_block(name)
        right = originals_of(copies.names, database.names, options.prefix)
        accuracy = copy_accuracy(copies.vectors, torch.cat(vectors), right, whitening)
        figures[name] = accuracy._asdict()
        print(f"{name}: {accuracy.num_copies} copies, mAP {accuracy.mean_average_precision:.4f}")
    write_report(options.output, figures)
    return 0


def add_dino_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of the commands."""
    parent = commands.add_parser(
        "dino",
        help="see what a vision transformer learned without labels",
        description="Evaluations of vision transformers (DinoVit checkpoints), as of DINO. Each "
        "has its own --help.",
    )
    evaluations = parent.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    parser = evaluations.add_parser("features", help="compute features once, for `knn`")
    parser.set_defaults(run=features)
    parser.add_argument("source", help=_SOURCE_HELP)
    parser.add_argument("--split", help="of a data set; sub-folder of a folder of images")
    parser.add_argument("--output", type=Path, required=True, help=".safetensors file to write")
    _add_feature_options(parser, is_model_required=True)

    parser = evaluations.add_parser(
        "knn",
        help="classify pictures by their nearest neighbours",
        description="Classify test pictures by the training pictures they resemble; no training. "
        "Compare with --untrained and --raw-pixels to see what was learned.",
    )
    parser.set_defaults(run=neighbours)
    _add_train_and_test(parser, _SOURCE_HELP)
    parser.add_argument(
        "--neighbours", "-k", type=positive, nargs="+", default=[10, 20, 100, 200], metavar="K",
        help="how many vote; several are evaluated at once (default: 10 20 100 200)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=positive_number, default=0.07,
        help="a vote counts exp(similarity / temperature) (default: 0.07)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    _add_feature_options(parser, is_model_required=False)
    _add_probe(evaluations)
    _add_copy_detection(evaluations)
    add_picture_commands(evaluations)


def _add_train_and_test(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("train", metavar="TRAIN", help=help_text)
    parser.add_argument("test", metavar="TEST", help="likewise")
    parser.add_argument("--train-split", help="of a data set; sub-folder of a folder of images")
    parser.add_argument("--test-split", help="likewise")


def _add_feature_options(parser: argparse.ArgumentParser, *, is_model_required: bool) -> None:
    parser.add_argument(
        "--untrained", action="store_true", help="random weights: what training must beat"
    )
    parser.add_argument(
        "--raw-pixels", action="store_true", help="pixels instead of features: another baseline"
    )
    _add_columns(parser)
    parser.add_argument("--streaming", action="store_true", help="read a data set row by row")
    add_model_options(parser, is_required=is_model_required)


def _add_probe(evaluations: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = evaluations.add_parser(
        "linear-probe",
        help="train a linear classifier on frozen features",
        description="Train a linear classifier on frozen features by the recipe of DINO, and save "
        "it as a DinoVitForImageClassification.",
    )
    parser.set_defaults(run=linear_probe)
    _add_train_and_test(parser, _PICTURES_HELP)
    parser.add_argument("--output", type=Path, required=True, help="new folder of the classifier")
    parser.add_argument(
        "--layers", type=positive, default=4,
        help="last layers whose class tokens it reads; 4 for small models, 1 for base (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--patch-mean", action="store_true", help="also read the mean patch token (base models)"
    )
    parser.add_argument("--epochs", type=positive, default=100, help="(default: 100)")
    parser.add_argument(
        "--learning-rate", type=positive_number, default=0.001,
        help="for 256 pictures; scaled with the batch (default: 0.001)",
    )  # fmt: skip
    parser.add_argument(
        "--no-augmentation", dest="augmentation", action="store_false",
        help="no random crops and flips; features are then computed once, which is much faster",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops")
    _add_columns(parser)
    add_model_options(parser, batch_size=1024)

    parser = evaluations.add_parser(
        "classifier-accuracy", help="measure a classifier, as of linear-probe or a converted one"
    )
    parser.set_defaults(run=classifier_accuracy)
    parser.add_argument("test", metavar="TEST", help=_PICTURES_HELP)
    parser.add_argument("--test-split", help="of a data set; sub-folder of a folder of images")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    _add_columns(parser)
    add_model_options(parser)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-column", help="column of the images, if not found")
    parser.add_argument("--label-column", help="column of the classes, if not found")


def _add_copy_detection(
    evaluations: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = evaluations.add_parser(
        "copy-detection",
        help="find the originals of altered copies",
        description="Find the originals of altered copies. FOLDER holds the folder of originals "
        "and a folder (or folders of folders) a kind of copy, as Copydays does: original/, "
        "strong/, jpegqual/3/, crops/10/. A copy and its original begin with the same characters.",
    )
    parser.set_defaults(run=copy_detection)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of originals and copies")
    parser.add_argument("--originals", default="original", help="sub-folder (default: original)")
    parser.add_argument("--distractors", type=Path, help="folder of other pictures to search among")
    parser.add_argument("--whitening", type=Path, help="folder of other pictures to learn it from")
    parser.add_argument(
        "--prefix", type=positive, default=4, help="characters that names share (default: 4)"
    )
    parser.add_argument(
        "--image-size", type=positive, default=320, help="side in pixels (default: 320)"
    )
    parser.add_argument(
        "--power", type=positive_number, default=4.0, help="of the generalised mean (default: 4)"
    )
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    add_model_options(parser)


def _features(options: argparse.Namespace, source: str, split: str | None) -> "Features":
    """Read features from a file, or compute them."""
    from .data.picture_source import open_pictures
    from .self_supervision.feature_extraction import class_token, load_features, raw_pixels
    from .self_supervision.image_preparation import ProcessorPreparation

    if source.endswith(".safetensors"):
        return load_features(source)
    if options.model is None:
        raise ValueError(f"`--model` is needed to compute the features of {source}.")
    pictures = open_pictures(
        source,
        split,
        image_column=options.image_column,
        label_column=options.label_column,
        streaming=options.streaming,
    )
    model, image_processor = load_model(options, untrained=options.untrained)
    compute = raw_pixels if options.raw_pixels else partial(class_token, model)
    return compute_features(options, pictures, ProcessorPreparation(image_processor), compute)


def _check_classes(
    first: str, names: list[str] | None, second: str, other_names: list[str] | None
) -> None:
    """Refuse to compare numbers of classes that mean different classes."""
    if None not in (names, other_names) and names != other_names:
        raise ValueError(f"The classes of {first} and {second} differ: {names} and {other_names}.")


def _labelled(options: argparse.Namespace, source: str, split: str | None) -> Any:
    from .data.picture_source import open_pictures

    return open_pictures(
        source, split, image_column=options.image_column, label_column=options.label_column
    )


def _copy_blocks(folder: Path, originals: str) -> list[str]:
    """Folders with image files, named from the folder of all."""
    if not (folder / originals).is_dir():
        raise ValueError(
            f"{folder} has no folder {originals}; name that of the originals with --originals."
        )
    return sorted(
        {
            str(file.parent.relative_to(folder))
            for file in folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.parent != folder
        }
    )
