"""Publish a model or a data set: `python scripts/push_to_hub.py FOLDER REPO_ID [--dry-run]`.

The same as `sgtr-hf push`.
"""

import sys

from sgtr_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
