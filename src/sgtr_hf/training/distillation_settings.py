"""What a recipe says of the larger model that a run learns from."""

from dataclasses import dataclass

from ..losses.knowledge_distillation_loss import check_distillation
from .unused_settings import reject_idle


@dataclass
class DistillationSettings:
    """Knowledge distillation (Hinton et al. 2015).

    Args:
        teacher: Folder or Hub id of a larger model of the recipe's task and the same classes, whose
            image processor serves unless the recipe has one; null trains without a teacher.
        temperature: Of the distributions that are compared.
        soft_weight: Weight of what the teacher says, from 0 (annotations alone) to 1 (teacher
            alone); that of the annotations is 1 less this.
        entity_confidence: Of scene graphs: least probability of an entity of the teacher that is
            learnt from, box included.
        predicate_confidence: Of scene graphs: least probability, before calibration, of a
            predicate of the teacher that is learnt from.
    """

    teacher: str | None = None
    temperature: float = 2.0
    soft_weight: float = 0.5
    entity_confidence: float = 0.5
    predicate_confidence: float = 0.2

    def __post_init__(self) -> None:
        try:
            check_distillation(self.temperature, self.soft_weight)
        except ValueError as error:
            raise ValueError(f"`distillation` of the recipe: {error}") from error
        for name in ("entity_confidence", "predicate_confidence"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`distillation.{name}` must be between 0 and 1, got {value}.")
        reject_idle("distillation", self, {
            "teacher": ("temperature", "soft_weight", "entity_confidence", "predicate_confidence"),
        })  # fmt: skip
