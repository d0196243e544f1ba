"""Train without labels: `python scripts/train_dino.py RECIPE [section.entry=value ...]`.

The same under `accelerate launch` trains on many processes. Recipes: recipes/dino_*.yaml.
"""

from sgtr_hf.training.command import run_recipe


if __name__ == "__main__":
    run_recipe(__doc__, task="self_distillation")
