"""`python -m sgtr_hf` is `sgtr-hf`, for launchers that start a module on many processes."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
