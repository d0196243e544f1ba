"""The command `sgtr-hf push`: a model or a data set goes to the Hub.

Libraries that only it needs are imported when it runs, so that other commands start quickly.
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import validate_repo_id

from .command_arguments import positive_number


if TYPE_CHECKING:
    from .hub.publishing import RepoType

_GIGABYTE = 10**9


def push(options: argparse.Namespace) -> int:
    """Prepare a folder, and upload it unless it is a dry run."""
    try:
        from .hub import publishing
    except ImportError as error:
        raise ImportError(
            f'`push` needs {error.name}, which is not installed: `pip install "sgtr-hf[train]"`.'
        ) from error

    validate_repo_id(options.repo_id)
    if not options.folder.is_dir():
        raise ValueError(f"There is no folder {options.folder}.")
    repo_type = publishing.repo_type_of(options.folder)
    if repo_type == "dataset":
        publishing.prepare_dataset(options.folder)
        return _finish(options, options.folder, repo_type)
    if options.dry_run and options.output is None:
        name = f"{options.folder.resolve().name}-published"
        options.output = options.folder.resolve().with_name(name)
    with tempfile.TemporaryDirectory() as temporary:
        # The name of the folder is that of the modules which its code becomes.
        folder = options.output or Path(temporary) / options.repo_id.rpartition("/")[2]
        publishing.prepare_model(
            options.folder,
            folder,
            options.repo_id,
            picture=options.picture,
            licence=options.license,
            max_shard_bytes=int(options.max_shard_size * _GIGABYTE),
        )
        return _finish(options, folder, repo_type)


def _finish(options: argparse.Namespace, folder: Path, repo_type: "RepoType") -> int:
    from .hub.publishing import upload

    if options.dry_run:
        print(f"{folder}: ready, nothing was uploaded.")
    else:
        address = upload(folder, options.repo_id, repo_type, private=options.private)
        print(f"{options.repo_id}: published, {address}")
    return 0


def add_hub_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("push", help="publish a model or a data set on the Hub")
    parser.set_defaults(run=push)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model, or Parquet shards")
    parser.add_argument("repo_id", metavar="REPO_ID", help="as in name/model")
    parser.add_argument("--private", action="store_true", help="of a new repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="write the folder, and upload nothing"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write; FOLDER-published in a dry run by default"
    )
    parser.add_argument(
        "--picture", type=Path, help="for the card's example; sample.jpg of FOLDER by default"
    )
    parser.add_argument("--license", help="of the weights, as the Hub calls it: apache-2.0, ...")
    parser.add_argument(
        "--max-shard-size",
        type=positive_number,
        default=5.0,
        metavar="GB",
        help="weights are cut into files of this size",
    )
