"""The rival of SGTR+: a dense pair head on the same detector, trained in the same way.

It reads all predicates off every ordered pair of entities, from both vectors, both classes and how
the boxes lie. As `scripts/train_sgtr.py`:

    torchrun --nproc_per_node 2 benchmarks/dense_pair_head.py RECIPE [section.entry=value ...]

`benchmarks/scene_graph_table.py` sets it beside other models.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgtr_hf import SgtrConfig, SgtrForSceneGraphGeneration
from sgtr_hf.boxes import PAIR_GEOMETRY_SIZE, pair_geometry
from sgtr_hf.losses.detection_loss import counts_of, focal_loss
from sgtr_hf.losses.hungarian_matching import LossCounts, PaddedAnnotations, assign_all
from sgtr_hf.modeling.graph_outputs import SgtrSceneGraphOutput
from sgtr_hf.modeling.modeling_sgtr_detr import entity_probabilities
from sgtr_hf.modeling.prediction_heads import ClassHead, triplet_class_probabilities
from sgtr_hf.training.command import run_recipe
from sgtr_hf.training.tasks.scene_tasks import SceneGraphTask


WIDTH = 128
# Triplets that leave the head; more never count in a recall at 100.
NUM_TRIPLETS = 100
# A link that is certain, and one that is ruled out.
LINKED, UNLINKED = 0.0, -100.0


class DensePairHead(SgtrForSceneGraphGeneration):
    """A detector and a head on all pairs of its entities."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__(config)
        for name, _ in list(self.named_children()):
            if name != "model":
                delattr(self, name)
        del self.model.predicate_node_generator
        width = config.d_model
        self.subject_projection = nn.Linear(width, WIDTH)
        self.object_projection = nn.Linear(width, WIDTH)
        self.subject_class_projection = nn.Linear(config.num_labels, WIDTH, bias=False)
        self.object_class_projection = nn.Linear(config.num_labels, WIDTH, bias=False)
        self.geometry_projection = nn.Linear(PAIR_GEOMETRY_SIZE, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.predicate_head = ClassHead(WIDTH, config.num_predicates, is_focal=True)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        detector_features: Mapping[str, Tensor] | None = None,
        loss_counts: LossCounts | None = None,
        **kwargs: Any,
    ) -> SgtrSceneGraphOutput:
        """As `SgtrForSceneGraphGeneration`, without given entities."""
        annotations = None
        if labels is not None:
            counts = self.loss_counts(labels) if loss_counts is None else loss_counts
            annotations = self._pad(labels)._replace(counts=counts)
        if detector_features is not None:
            nodes = self._read_features(detector_features)
        else:
            nodes = self.model._detect(pixel_values, pixel_mask, annotations, None, **kwargs)
        detector = self.model.detector
        levels = detector.read_levels(nodes)
        probabilities = entity_probabilities(levels.logits[-1], self.config.detector.classification)
        logits = self.pair_logits(nodes.last_hidden_state, probabilities, levels.boxes[-1])
        output = self._summarize_pairs(levels, probabilities, logits)
        if annotations is not None:
            problems = detector.matching_problems(nodes, levels, annotations)
            matches = assign_all(*problems)
            output.loss_dict = {
                "loss_predicate": self._pair_loss(logits, annotations, matches[0][-1])
            }
            if not self.config.freeze_detector:
                found = detector.losses(nodes, levels, annotations, matches)
                output.loss_dict |= {f"{name}_of_entities": loss for name, loss in found.items()}
            output.loss = torch.stack(list(output.loss_dict.values())).sum()
        return output

    def pair_logits(self, states: Tensor, probabilities: Tensor, boxes: Tensor) -> Tensor:
        """Predicate logits (B, N, N, P) of all pairs, subjects in rows."""
        boxes, probabilities = boxes.detach(), probabilities.detach()
        subject = self.subject_projection(states) + self.subject_class_projection(probabilities)
        object_ = self.object_projection(states) + self.object_class_projection(probabilities)
        geometry = self.geometry_projection(pair_geometry(boxes[:, :, None], boxes[:, None]))
        hidden = (subject[:, :, None] + object_[:, None] + geometry).relu()
        return self.predicate_head(self.hidden(hidden).relu())

    def _pair_loss(
        self, logits: Tensor, annotations: PaddedAnnotations, entity_matches: Tensor
    ) -> Tensor:
        batch_size, num_entities, _, num_predicates = logits.shape
        subjects, objects, predicates = annotations.relations.unbind(-1)
        pairs = entity_matches.gather(1, subjects) * num_entities
        cells = (pairs + entity_matches.gather(1, objects)) * num_predicates + predicates
        cells = torch.where(annotations.relation_valid, cells, num_entities**2 * num_predicates)
        targets = logits.new_zeros((batch_size, num_entities**2 * num_predicates + 1))
        targets = targets.scatter_(1, cells, 1.0)[:, :-1]
        loss = focal_loss(
            logits.flatten(1), targets, self.config.focal_alpha, self.config.focal_gamma
        )
        counts = counts_of(annotations, self.config.num_predicates)
        return loss.sum() / counts.at_least_one(counts.predicates.sum())

    def _summarize_pairs(
        self, levels: Any, probabilities: Tensor, logits: Tensor
    ) -> SgtrSceneGraphOutput:
        """Give the likeliest triplets a query each, whose links are certain."""
        calibrated = triplet_class_probabilities(self.config, probabilities)
        scores = calibrated.amax(-1)
        num_entities, num_predicates = logits.shape[1], logits.shape[-1]
        likelihood = logits.sigmoid() * scores[:, :, None, None] * scores[:, None, :, None]
        same = torch.eye(num_entities, dtype=torch.bool, device=logits.device)
        likelihood = likelihood.masked_fill(same[None, :, :, None], -1).flatten(1)
        cells = likelihood.topk(min(NUM_TRIPLETS, likelihood.shape[1]), dim=1).indices
        pairs, predicates = cells // num_predicates, cells % num_predicates
        chosen = logits.flatten(1).gather(1, cells)
        single = torch.full((*cells.shape, num_predicates), UNLINKED, device=logits.device)
        single = single.scatter(2, predicates[..., None], chosen[..., None])
        links = []
        for entities in (pairs // num_entities, pairs % num_entities):
            link = torch.full((*cells.shape, num_entities), UNLINKED, device=logits.device)
            links.append(link.scatter(2, entities[..., None], LINKED))
        return SgtrSceneGraphOutput(
            logits=levels.logits[-1],
            pred_boxes=levels.boxes[-1],
            entity_probabilities=probabilities,
            triplet_class_probabilities=calibrated,
            predicate_logits=single,
            predicate_probabilities=single.sigmoid(),
            subject_scores=links[0].exp(),
            object_scores=links[1].exp(),
            subject_log_correspondence=links[0],
            object_log_correspondence=links[1],
        )


if __name__ == "__main__":
    run_recipe(__doc__, "scene_graph", partial(SceneGraphTask, model_class=DensePairHead))
