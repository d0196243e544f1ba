"""Makes a folder that anyone can load, and puts it on the Hub."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from ..data.dataset_card import write_dataset_card
from ..image_processing.picture_reading import read_image
from .bundling import bundle_code
from .publication_card import (
    DRAWING_NAME,
    RECORD_NAME,
    REPORT_NAME,
    make_card,
    read_facts,
)
from .usage_snippet import SAMPLE_NAME, make_snippet, run_snippet
from .weight_files import copy_weights


logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset"]
MAX_SHARD_BYTES = 5 * 10**9
_ATTEMPTS = 4
_FIRST_WAIT_SECONDS = 1.0
# Answers of a server that may be better the next time.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_COPIED = ("preprocessor_config.json", REPORT_NAME, "recipe.yaml", "curves.png")


def repo_type_of(folder: Path) -> RepoType:
    """Tell a model from a data set.

    Raises:
        ValueError: If the folder is neither.
    """
    if (folder / "config.json").is_file():
        return "model"
    if any(folder.glob("*.parquet")):
        return "dataset"
    raise ValueError(
        f"{folder} is neither a model (it has no config.json) nor a data set (no *.parquet)."
    )


def prepare_model(
    source: Path,
    target: Path,
    repo_id: str,
    *,
    picture: Path | None = None,
    licence: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder of a model that is to be published.

    It holds safetensors, configurations, flattened code and a card with an example that was run
    in a process without this package; nothing else of the source is taken.

    Args:
        source: Folder of a model, saved with its image processor.
        target: New or empty folder.
        repo_id: Where it is going to be, for the example.
        picture: For the example; `sample.jpg` of the source if None.
        licence: Of the weights; see `make_card`.
        max_shard_bytes: Weights are cut into files of this size.

    Raises:
        ValueError: If the source is incomplete, the target is not empty, or the example fails.
    """
    facts = read_facts(source)
    picture = picture or source / SAMPLE_NAME
    if not picture.is_file():
        raise ValueError(
            f"There is no picture for the example: {picture} is missing. Name one that shows what "
            "the model knows, `--picture` on the command line."
        )
    if not (source / "preprocessor_config.json").is_file():
        raise ValueError(f"{source} has no preprocessor_config.json; save the image processor too.")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"The folder {target} must be new or empty; name another one.")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if facts.trainings:
        record = source if (source / RECORD_NAME).is_file() else source.parent
        shutil.copyfile(record / RECORD_NAME, target / RECORD_NAME)
    copy_weights(source, target, max_shard_bytes)
    bundle_code(target)
    image = _save_sample(picture, target / SAMPLE_NAME)
    code = make_snippet(facts.architecture, repo_id)
    output = run_snippet(code, repo_id, target)
    if facts.config["model_type"] == "sgtr":
        _draw_graph(target, image)
    card = make_card(facts, repo_id, licence, (code, output))
    (target / "README.md").write_text(card, encoding="utf-8")


def prepare_dataset(source: Path) -> None:
    """Write the card of a folder of shards, unless it has one.

    Raises:
        ValueError: If its shards are not named as `datasets` names them.
    """
    if not (source / "README.md").is_file():
        write_dataset_card(source, "Parquet shards")
    if not (source / "README.md").is_file():
        raise ValueError(f"{source} needs shards named like train-00000-of-00001.parquet.")


def upload(
    folder: Path, repo_id: str, repo_type: RepoType, *, private: bool, api: HfApi | None = None
) -> str:
    """Create a repository if there is none, and put a folder into it in one commit.

    What was interrupted is tried again; large files that arrived before are not sent again.

    Args:
        folder: Ready to be published.
        repo_id: As in "name/model".
        repo_type: What it is.
        private: Whether a new repository is.
        api: Knows the server and the token; those of the environment if None.

    Returns:
        The address of the commit.

    Raises:
        OSError: If the server refuses, or was out of reach each time.
    """
    api = api or HfApi()
    patterns = None if repo_type == "model" else ["*.parquet", "README.md", "*.json"]

    def send() -> str:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message=f"Publish {repo_id} with sgtr-hf",
        )
        return str(commit.commit_url)

    attempt = 1
    while True:
        try:
            return send()
        except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
            if not _may_pass(error) or attempt == _ATTEMPTS:
                raise OSError(f"{repo_id} was not published: {error}") from error
            wait = _FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
            logger.warning("The upload was interrupted (%s); again in %g s.", error, wait)
        time.sleep(wait)
        attempt += 1


def _may_pass(error: BaseException | None) -> bool:
    if isinstance(error, RuntimeError):
        # What huggingface_hub makes of an error while it sends a large file.
        error = error.__cause__
    if not isinstance(error, (HfHubHTTPError, httpx2.TransportError)):
        return False
    response: Any = getattr(error, "response", None)
    return response is None or response.status_code in _PASSING


def _save_sample(picture: Path, target: Path) -> Image.Image:
    """Keep a JPEG as it is; make one of anything else."""
    with Image.open(picture) as opened:
        is_jpeg = opened.format == "JPEG"
    if is_jpeg:
        shutil.copyfile(picture, target)
    else:
        read_image(picture).save(target, quality=95)
    return read_image(target)


def _draw_graph(folder: Path, image: Image.Image) -> None:
    from transformers import pipeline

    from ..visualization.scene_graph_drawing import draw_scene_graph

    graph = pipeline("scene-graph", model=str(folder))(image)
    draw_scene_graph(image, graph, path=folder / DRAWING_NAME)
