"""Train a classifier: `python scripts/train_classifier.py RECIPE [section.entry=value ...]`.

With `pretrained_model` in the recipe, it starts from a vision transformer that was trained before,
with labels or without. The same under `accelerate launch` trains on many processes.
"""

from sgtr_hf.training.command import run_recipe


if __name__ == "__main__":
    run_recipe(__doc__, task="classification")
