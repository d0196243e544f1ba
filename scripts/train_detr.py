"""Train a detector: `python scripts/train_detr.py RECIPE [section.entry=value ...]`.

The same under `accelerate launch` trains on many processes.
"""

from sgtr_hf.training.command import run_recipe


if __name__ == "__main__":
    run_recipe(__doc__, task="detection")
