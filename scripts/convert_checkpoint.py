"""Convert an original checkpoint: `python scripts/convert_checkpoint.py FILE FOLDER --format F`.

The same as `sgtr-hf convert-checkpoint`.
"""

import sys

from sgtr_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["convert-checkpoint", *sys.argv[1:]]))
