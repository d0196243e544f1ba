"""The command `sgtr-hf annotate`: scene graphs of a whole corpus, on any number of processes.

Libraries that only it needs are imported when it runs, so that other commands start quickly.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download

from .auto import DEFAULT_CHECKPOINT
from .command_arguments import (
    add_labels_per_entity,
    model_folder,
    not_negative,
    positive,
    probability,
)
from .configuration.configuration_sgtr import SgtrConfig


if TYPE_CHECKING:
    from .data.annotation import AnnotationSettings
    from .data.corpus import Corpus

_HASHED = ("config.json", "preprocessor_config.json", "*.safetensors")


def annotate(options: argparse.Namespace) -> int:
    """Annotate this process's share of a corpus."""
    try:
        from accelerate import Accelerator

        from .data.corpus import open_corpus
    except ImportError as error:
        raise ImportError(
            f'`annotate` needs {error.name}, which is missing: `pip install "sgtr-hf[train]"`.'
        ) from error

    source, output = Path(options.dataset), options.output.resolve()
    if source.is_dir() and source.resolve() in (output, *output.parents):
        raise ValueError(
            f"`OUTPUT` {options.output} lies within {source}, and would be taken for a part of it; "
            "name another folder."
        )
    corpus = open_corpus(
        options.dataset,
        options.split,
        options.chunk_images,
        image_column=options.image_column,
        id_column=options.id_column,
    )
    accelerator = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # Each would annotate everything, into the same files.
        raise ValueError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}; "
            "set ACCELERATE_USE_CPU=1 on a machine without GPUs."
        )
    try:
        return _annotate(options, corpus, accelerator)
    finally:
        accelerator.end_training()


def _annotate(options: argparse.Namespace, corpus: "Corpus", accelerator: Any) -> int:
    import torch
    from tqdm import tqdm
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from .data.annotation import Annotator

    folder = model_folder(options.model)
    is_local = Path(folder).is_dir()
    # Of the Hub, one commit is loaded, even if another one arrives meanwhile.
    revision = _content_hash(Path(folder)) if is_local else _commit(folder, options.revision)
    source = {} if is_local else {"revision": revision}
    model = AutoModelForObjectDetection.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), **source
    )
    if model.config.model_type != SgtrConfig.model_type:
        raise ValueError(f"`--model` {options.model} is no scene graph model.")
    image_processor = AutoImageProcessor.from_pretrained(folder, **source)
    settings = _settings(options, revision)
    model = model.to(accelerator.device).eval()
    annotator = Annotator(model, image_processor, settings, options.output, options.workers)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    counts = [shard.num_images for shard in corpus.shards[rank::num_processes]]
    total = None if None in counts else sum(count or 0 for count in counts)
    with tqdm(total=total, unit="image", disable=not accelerator.is_main_process) as bar:
        report = annotator.run(corpus, rank, num_processes, bar)
    print(
        f"{options.output}: process {rank} of {num_processes} annotated {report.annotated} images; "
        f"{report.present} files were there; {report.broken} images could not be read"
        + (" (_broken-*.jsonl)." if report.broken else ".")
    )
    return 0


def _settings(options: argparse.Namespace, revision: str) -> "AnnotationSettings":
    from .data.annotation import AnnotationSettings

    # The path of a folder says nothing outside this machine.
    folder = Path(options.model)
    name = folder.resolve().name if folder.is_dir() else options.model
    return AnnotationSettings(
        model=name,
        revision=revision,
        batch_size=options.batch_size,
        chunk_images=options.chunk_images,
        threshold=options.threshold,
        top_k=options.top_k,
        graph_constraint=options.graph_constraint,
        labels_per_entity=options.labels_per_entity,
        distributions=options.distributions,
        dtype=options.dtype,
    )


def _commit(repo_id: str, revision: str) -> str:
    """Look up which commit a revision of a model is; the cache names folders after it."""
    return Path(hf_hub_download(repo_id, "config.json", revision=revision)).parent.name


def _content_hash(folder: Path) -> str:
    """Hash what a local model consists of."""
    total = hashlib.sha256()
    for pattern in _HASHED:
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                while block := file.read(2**20):
                    total.update(block)
    return f"sha256:{total.hexdigest()}"


def add_annotation_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("annotate", help="find the scene graphs of a whole corpus")
    parser.set_defaults(run=annotate)
    parser.add_argument(
        "dataset", metavar="DATASET", help="folder of images, Parquet file or folder, or Hub id"
    )
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder of Parquet files; continued if begun"
    )
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id")
    parser.add_argument("--revision", default="main", help="of a model on the Hub")
    parser.add_argument("--split", default="train", help="of a data set")
    parser.add_argument("--image-column", metavar="NAME", help="the one of images by default")
    parser.add_argument("--id-column", metavar="NAME", help="found by default")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument(
        "--chunk-images", type=positive, default=1000, help="pictures of a file that is written"
    )
    parser.add_argument(
        "--workers",
        type=not_negative,
        default=2,
        help="processes that read pictures, for each of ours",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--top-k", type=positive, default=100, help="most relations a picture")
    parser.add_argument("--threshold", type=probability, default=0.1, help="least relation score")
    parser.add_argument(
        "--graph-constraint", action="store_true", help="one predicate for each pair of entities"
    )
    add_labels_per_entity(parser)
    parser.add_argument(
        "--distributions", action="store_true", help="also write the score of every predicate"
    )
