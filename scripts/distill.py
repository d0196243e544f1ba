"""Train a student of a larger model: `python scripts/distill.py RECIPE [section.entry=value ...]`.

The recipe names the teacher, as in recipes/distill_sgtr_tabletop.yaml; with
`distillation.soft_weight=0` the same student trains without it. The same under `accelerate launch`
trains on many processes.
"""

from sgtr_hf.training.command import run_recipe
from sgtr_hf.training.tasks.task_choice import make_distillation_task


if __name__ == "__main__":
    run_recipe(__doc__, task=None, open_task=make_distillation_task)
