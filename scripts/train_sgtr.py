"""Train a scene graph model: `python scripts/train_sgtr.py RECIPE [section.entry=value ...]`.

The same under `accelerate launch` trains on many processes.
"""

from sgtr_hf.training.command import run_recipe


if __name__ == "__main__":
    run_recipe(__doc__, task="scene_graph")
