"""Loads the vision transformer that is evaluated, whatever class its checkpoint was saved as."""

import torch
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..modeling.modeling_dino_vit import DinoVitModel


def load_vision_transformer(
    source: str, *, untrained: bool = False, seed: int = 0
) -> tuple[DinoVitModel, BaseImageProcessor]:
    """Load a vision transformer for evaluation, with its image processor.

    Args:
        source: Folder or Hub id of a `DinoVitModel` or of a class built on it; of
            `DinoVitForPreTraining` the teacher is loaded.
        untrained: Take the configuration alone, with random weights: what training must beat.
        seed: Of those weights.

    Returns:
        The model in evaluation mode, in float32, and the image processor.

    Raises:
        ValueError: If the checkpoint is of another kind of model.
    """
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, DinoVitConfig):
        raise ValueError(
            f"{source} is a {config.model_type} checkpoint; these evaluations need a "
            f"{DinoVitConfig.model_type} one, as `DinoVitModel` or `sgtr-hf convert-checkpoint "
            "--format dino` saves it."
        )
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DinoVitModel(config)
    else:
        model = DinoVitModel.from_pretrained(source, dtype=torch.float32)
    return model.eval(), AutoImageProcessor.from_pretrained(source)
