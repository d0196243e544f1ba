"""The commands of `sgtr-hf dino` that draw, search and follow: pictures in, pictures out."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_arguments import (
    check_output_names,
    image_paths,
    not_negative,
    positive,
    positive_number,
    probability,
)
from .dino_options import add_model_options, compute_features, load_model, write_report
from .image_processing.picture_reading import read_image


if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from .self_supervision.feature_extraction import Features


def retrieve(options: argparse.Namespace) -> int:
    """Find the pictures of a folder that resemble each query, and draw them."""
    from .self_supervision.nearest_neighbours import find_neighbours
    from .visualization.retrieval_sheet import FoundPicture, draw_retrieval_sheet

    check_output_names(options.output, options.json)
    queries = list(image_paths(options.queries))
    asked = {Path(query).resolve() for query in queries}
    database = [path for path in _files(options.folder) if Path(path).resolve() not in asked]
    if not database:
        raise ValueError(f"the folder {options.folder} has no image to find but the queries.")
    describe = _retrieval_features(options)
    found = find_neighbours(describe(queries).vectors, describe(database).vectors, options.top_k)
    rows, report = [], []
    for query, scores, indices in zip(
        queries, found.similarities.tolist(), found.indices.tolist(), strict=True
    ):
        results = [
            {"image": database[index], "similarity": score}
            for index, score in zip(indices, scores, strict=True)
        ]
        report.append({"query": query, "results": results})
        print(query)
        row = [FoundPicture(read_image(query), Path(query).name)]
        for result in results:
            print(f"  {result['similarity']:.3f}  {result['image']}")
            caption = f"{result['similarity']:.3f} {Path(str(result['image'])).name}"
            row.append(FoundPicture(read_image(result["image"]), caption))
        rows.append(row)
    draw_retrieval_sheet(rows).save(options.output)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def retrieval_benchmark(options: argparse.Namespace) -> int:
    """Rank a database for each query of a benchmark, and print the mean average precision."""
    from .self_supervision.image_retrieval import read_benchmark, retrieval_accuracy

    check_output_names(None, options.output)
    benchmark = read_benchmark(options.answers)
    files = {Path(path).stem: path for path in _files(options.folder)}
    missing = [name for name in (*benchmark.database, *benchmark.queries) if name not in files]
    if missing:
        raise ValueError(
            f"{options.folder} lacks {len(missing)} images of {options.answers}, the first is "
            f"{missing[0]}."
        )
    describe = _retrieval_features(options)
    queries = describe([files[name] for name in benchmark.queries])
    database = describe([files[name] for name in benchmark.database])
    from torch.nn.functional import normalize

    similarities = normalize(queries.vectors, dim=1) @ normalize(database.vectors, dim=1).T
    results = retrieval_accuracy(similarities, benchmark.relevant)
    for difficulty, accuracy in results.items():
        if accuracy.mean_precision is None:
            print(f"{difficulty}: no query has anything to find")
            continue
        precision = ", ".join(f"@{k} {value:.4f}" for k, value in accuracy.mean_precision.items())
        print(
            f"{difficulty}: mAP {accuracy.mean_average_precision:.4f}, mean precision {precision}"
        )
    write_report(options.output, {name: found._asdict() for name, found in results.items()})
    return 0


def attention(options: argparse.Namespace) -> int:
    """Draw where the class token of each head looks."""
    from .visualization.class_attention_drawing import draw_class_attention

    check_output_names(options.output)
    image = read_image(options.image)
    seen, maps, marked = _Viewer(options).look(image)
    draw_class_attention(
        seen, maps.numpy(), None if marked is None else marked.numpy(), options.columns
    ).save(options.output)
    return 0


def attention_video(options: argparse.Namespace) -> int:
    """Draw where the class token looks in each frame of a video, heads averaged."""
    from .visualization.class_attention_drawing import overlay_heat
    from .visualization.video_files import check_video_name, read_frames, write_video

    check_output_names(None, options.output)
    check_video_name(options.output)
    viewer = _Viewer(options)

    def frames() -> Iterator[Any]:
        from tqdm import tqdm

        for frame in tqdm(read_frames(options.video), desc="frames"):
            seen, maps, marked = viewer.look(frame)
            # With a mass, each head shows only what holds most of its attention.
            heat = (maps if marked is None else maps * marked).mean(0)
            yield overlay_heat(seen, heat.numpy())

    count = write_video(options.output, frames(), options.frames_per_second)
    print(f"{options.output}: {count} frames.")
    return 0


def jaccard(options: argparse.Namespace) -> int:
    """Compare where the class token looks with masks of objects."""
    import torch

    from .self_supervision.annotated_videos import object_masks, read_mask
    from .self_supervision.class_attention import attention_jaccard, enlarge, most_attended

    check_output_names(None, options.output)
    images = {Path(path).stem: path for path in _files(options.images)}
    masks = {path.stem: path for path in sorted(options.masks.glob("*.png"))}
    pairs = sorted(images.keys() & masks.keys())
    if not pairs:
        raise ValueError(
            f"no image of {options.images} has a mask of its name, as in NAME.png, in "
            f"{options.masks}."
        )
    viewer, figures = _Viewer(options), {}
    for name in pairs:
        image = read_image(images[name])
        numbers = read_mask(masks[name])
        if numbers.shape != (image.height, image.width):
            raise ValueError(
                f"{masks[name]} is {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                f"{image.width} x {image.height}; they must be alike."
            )
        marked = most_attended(viewer.look(image)[1], options.mass)
        objects, valid = (torch.from_numpy(values) for values in object_masks(numbers))
        overlap = attention_jaccard(enlarge(marked, numbers.shape), objects, valid)
        if overlap is not None:
            figures[name] = float(overlap)
    if not figures:
        raise ValueError(
            f"no mask of {options.masks} has an object: a number from 1 to 254 (255 is unknown)."
        )
    mean = sum(figures.values()) / len(figures)
    print(f"{len(figures)} images: Jaccard {mean:.4f} at {options.mass:.0%} of the attention")
    write_report(options.output, {"jaccard": mean, "mass": options.mass, "images": figures})
    return 0


def video_segmentation(options: argparse.Namespace) -> int:
    """Follow the objects of the first frame through videos; print J and F where masks are known."""
    import numpy as np

    from .self_supervision.annotated_videos import VOID, find_videos, read_mask, write_masks
    from .self_supervision.region_similarity import summarize_videos, video_accuracy
    from .self_supervision.video_segmentation import (
        PropagationSettings,
        segment_video,
        video_normalization,
    )
    from .visualization.video_files import read_frames

    check_output_names(None, options.report)
    videos = find_videos(options.frames, options.masks, options.videos)
    model, image_processor = load_model(options)
    settings = PropagationSettings(
        options.image_size,
        options.memory,
        options.radius,
        options.neighbours,
        options.temperature,
    )
    figures, report = [], {}
    for video in videos:
        first = read_mask(video.masks[0])
        first = np.where(first == VOID, 0, first)
        names = [Path(path).stem for path in _files(video.frames)] if video.frames.is_dir() else []
        masks = segment_video(
            model, read_frames(video.frames), first, video_normalization(image_processor), settings
        )
        predicted = list(write_masks(options.output / video.name, names, masks, video.masks[0]))
        print(f"{video.name}: {len(predicted)} frames")
        objects = [int(number) for number in np.unique(first) if number]
        if len(predicted) < 2 or len(video.masks) != len(predicted) or not objects:  # noqa: PLR2004
            # One mask is for a video to follow only; more are to be measured with.
            if len(video.masks) > 1:
                print(f"  not measured: {len(objects)} objects, {len(video.masks)} masks")
            continue
        annotated = np.stack([read_mask(path) for path in video.masks])
        found = video_accuracy(np.stack(predicted), annotated, objects)
        figures.append(found)
        report[video.name] = {"objects": objects, "j_and_f": found.tolist()}
        print(f"  J {found[:, 0].mean():.4f}, F {found[:, 1].mean():.4f} of {len(objects)} objects")
    if figures:
        total = summarize_videos(figures)
        report["mean"] = {**total._asdict(), "j_and_f_mean": total.mean}
        print(
            f"{total.num_objects} objects: J&F {total.mean:.4f}, J {total.region_similarity:.4f}, "
            f"F {total.boundary_accuracy:.4f}"
        )
    write_report(options.report, report)
    return 0


def add_picture_commands(
    evaluations: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the parsers of the commands."""
    parser = evaluations.add_parser("retrieve", help="find similar pictures, and draw a sheet")
    parser.set_defaults(run=retrieve)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the pictures to search")
    parser.add_argument("--queries", nargs="+", required=True, help="image files or folders")
    parser.add_argument("--output", type=Path, required=True, help="image file of the sheet")
    parser.add_argument("--json", type=Path, help="also write what was found")
    parser.add_argument("--top-k", type=positive, default=5, help="results a query (default: 5)")
    _add_retrieval_options(parser)

    parser = evaluations.add_parser(
        "retrieval-benchmark",
        help="mean average precision, as on revisited Oxford and Paris",
        description="Mean average precision of retrieval at the difficulties easy, medium and hard "
        "of the revisited Oxford and Paris benchmarks.",
    )
    parser.set_defaults(run=retrieval_benchmark)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the images")
    parser.add_argument(
        "--answers", type=Path, required=True,
        help="gnd_roxford5k.pkl, or JSON of imlist, qimlist and gnd with easy, hard and junk rows",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    _add_retrieval_options(parser)

    parser = evaluations.add_parser("attention", help="draw where each head looks in a picture")
    parser.set_defaults(run=attention)
    parser.add_argument("image", metavar="IMAGE", help="image file or URL")
    parser.add_argument("--output", type=Path, required=True, help="image file to draw")
    parser.add_argument("--columns", type=positive, default=4, help="panels a row (default: 4)")
    _add_attention_options(parser, mass=None)

    parser = evaluations.add_parser(
        "attention-video", help="draw where the model looks in a video, heads averaged"
    )
    parser.set_defaults(run=attention_video)
    parser.add_argument(
        "video", metavar="VIDEO", help="folder of frames, animated GIF or WebP, or video file"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help=".gif or .webp, or .mp4 with sgtr-hf[video]"
    )
    parser.add_argument(
        "--frames-per-second", type=positive_number, default=10.0, help="(default: 10)"
    )
    _add_attention_options(parser, mass=None)

    parser = evaluations.add_parser(
        "jaccard",
        help="compare attention with masks of objects",
        description="Overlap of the patches that hold most of the attention with masks of objects: "
        "the best head of each object, averaged over objects, then over images.",
    )
    parser.set_defaults(run=jaccard)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument(
        "masks", type=Path, metavar="MASKS",
        help="folder of PNG masks of the same names: 0 background, 1, 2, ... objects, 255 unknown",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    _add_attention_options(parser, mass=0.6)
    _add_video_segmentation(evaluations)


def _add_video_segmentation(
    evaluations: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = evaluations.add_parser(
        "video-segmentation",
        help="follow objects through videos",
        description="Follow the objects of a mask of the first frame through a video, or through "
        "all videos of a set like DAVIS (JPEGImages/480p and Annotations/480p). J and F are "
        "printed for videos with a mask for each frame.",
    )
    parser.set_defaults(run=video_segmentation)
    parser.add_argument(
        "frames", type=Path, metavar="FRAMES",
        help="video file, folder of frames, or folder with such a folder for each video",
    )  # fmt: skip
    parser.add_argument(
        "masks", type=Path, metavar="MASKS",
        help="PNG mask of the first frame, folder of masks, or such a folder for each video; "
        "0 background, 1, 2, ... objects",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder of the found masks")
    parser.add_argument("--report", type=Path, help="also write the figures as JSON")
    parser.add_argument("--videos", nargs="+", metavar="NAME", help="take these only")
    parser.add_argument(
        "--image-size", type=positive, default=480, help="short side in pixels (default: 480)"
    )
    parser.add_argument(
        "--memory", type=positive, default=7, help="last frames to look at (default: 7)"
    )
    parser.add_argument(
        "--radius",
        type=not_negative,
        default=12,
        help="patches to look around, 0 for all (default: 12)",
    )
    parser.add_argument(
        "--neighbours", type=positive, default=5, help="patches a label comes from (default: 5)"
    )
    parser.add_argument("--temperature", type=positive_number, default=0.1, help="(default: 0.1)")
    add_model_options(parser)


def _add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size", type=positive, default=224,
        help="longest side in pixels; 224 on Oxford, 512 on Paris (default: 224)",
    )  # fmt: skip
    parser.add_argument(
        "--multi-scale", action="store_true", help="average over three sizes, as on Paris"
    )
    add_model_options(parser)


def _add_attention_options(parser: argparse.ArgumentParser, mass: float | None) -> None:
    parser.add_argument(
        "--mass", type=probability, default=mass,
        help="show only the patches that hold this share of a head's attention"
        + ("" if mass is None else f" (default: {mass})"),
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=positive, default=480, help="short side in pixels (default: 480)"
    )
    add_model_options(parser)


class _Viewer:
    """Shows pictures to the model of the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        from .self_supervision.image_preparation import Normalization, PatchPreparation

        self.model, image_processor = load_model(options)
        self.device, self.mass = options.device, options.mass
        self.prepare = PatchPreparation(
            options.image_size,
            self.model.config.patch_size,
            Normalization.of(image_processor),
        )

    def look(self, image: "Image.Image") -> "tuple[Image.Image, Tensor, Tensor | None]":
        """Return the picture as it is seen, its attention (heads, h, w), and what holds most."""
        from .self_supervision.class_attention import class_attention, most_attended

        [pixels] = self.prepare([image])
        maps = class_attention(self.model, pixels[None].to(self.device))[0].cpu()
        marked = None if self.mass is None else most_attended(maps, self.mass)
        return self.prepare.resize(image), maps, marked


def _retrieval_features(options: argparse.Namespace) -> "Callable[[Sequence[str]], Features]":
    """What computes the features of files, each in its own aspect ratio."""
    from .data.picture_source import PictureFiles
    from .self_supervision.feature_extraction import class_token, multi_scale
    from .self_supervision.image_preparation import Normalization, ThumbnailPreparation

    model, image_processor = load_model(options)
    compute = partial(class_token, model)
    # The smallest of the three sizes must still hold a patch.
    least_side = model.config.patch_size * (2 if options.multi_scale else 1)
    prepare = ThumbnailPreparation(
        options.image_size, Normalization.of(image_processor), least_side
    )
    if options.multi_scale:
        compute = partial(multi_scale, compute)
    return lambda files: compute_features(options, PictureFiles(files), prepare, compute)


def _files(folder: Path) -> list[str]:
    return list(image_paths([str(folder)]))
