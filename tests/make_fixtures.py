"""Makes tests/fixtures anew from the recorded figures of the originals.

    python tests/make_fixtures.py FOLDER [--output tests/fixtures]

The folder is the one that `make fidelity` takes. What is kept is what the default suite needs:
slices of outputs, the whole inputs of losses, matches and post-processing, under 2.1 MB in all.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


FIXTURES = Path(__file__).parent / "fixtures"
# Columns of the class logits that the forward pass of SGTR is compared in.
COLUMNS = 12
# Entities kept a role and query: in the matching for Visual Genome, and in post-processing.
MATCHING_LINKS, GRAPH_LINKS = 25, 3
LEVELS = ("output", "aux.0")
HEADS = ("pred_rel_logits", "pred_rel_vec", "pred_rel_sub_box", "pred_rel_obj_box")


def main():
    """Write the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recorded", type=Path, help="folder of recorded figures")
    parser.add_argument("--output", type=Path, default=FIXTURES)
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    for name, tensors in make_tensors(options.recorded).items():
        path = options.output / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        path.chmod(0o644)
    for name, content in make_figures(options.recorded).items():
        # Names and shapes are many.
        layout = {"separators": (",", ":")} if name.endswith(".keys") else {"indent": 1}
        (options.output / f"{name}.json").write_text(json.dumps(content, **layout) + "\n")


def make_tensors(recorded):
    """Name of each file of tensors, and what it holds."""
    graphs = {name: load_file(recorded / f"sgtr_{name}.safetensors") for name in ("vg", "oiv6")}
    return {
        "detr": detr(load_file(recorded / "detr_resnet50.safetensors")),
        "forward_sgtr": forward_sgtr(graphs["vg"]),
        "losses_sgtr_vg": losses_sgtr(graphs["vg"]) | matching_of_visual_genome(graphs["vg"]),
        "losses_sgtr_oiv6": losses_sgtr(graphs["oiv6"]),
        "triplets_vg": triplets(load_file(recorded / "postprocess_vg.safetensors")),
        "triplets_oiv6": triplets(load_file(recorded / "postprocess_oiv6.safetensors")),
        "recall": recall(load_file(recorded / "metrics.safetensors")),
        "self_distillation": chosen(
            load_file(recorded / "dino_step.safetensors"),
            "student_output", "teacher_output", "center_", "loss",
        ),
    }  # fmt: skip


def make_figures(recorded):
    """Name of each JSON file, and what it holds."""
    detr_losses = read(recorded / "detr_resnet50.losses.json")["losses"]
    metrics = read(recorded / "metrics.json")
    recalls = metrics["scene_graph_benchmark"]
    return {
        "detr_resnet50.keys": read(recorded / "detr_resnet50.keys.json"),
        "dino_schedules": read(recorded / "dino_schedules.json"),
        "sgtr_vg.keys": read(recorded / "sgtr_vg.keys.json"),
        "losses": {
            "detr": {
                name: loss
                for name, loss in detr_losses.items()
                if name in {f"loss_{kind}{level}" for kind in ("ce", "bbox", "giou")
                            for level in ("", "_0")}
            },
            **{name: losses_of_last_level(recorded / f"{name}.losses.json")
               for name in ("sgtr_vg", "sgtr_oiv6")},
        },
        "recall": {
            **{f"R@{k}": recalls[f"sgdet_recall@{k}"] for k in (20, 50, 100)},
            **{f"mR@{k}": recalls[f"sgdet_mean_recall@{k}"] for k in (20, 50, 100)},
            "R@100 per predicate": metrics["scene_graph_benchmark_recall_per_predicate@100"],
        },
    }  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def losses_of_last_level(path):
    """Without those of the indicators' classes, whose logits are too large for a fixture."""
    return {
        name: loss
        for name, loss in read(path)["losses"].items()
        if name.startswith("loss_") and not name.endswith("labels_ce") and name[-1] not in "01234"
    }


def chosen(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def detr(tensors):
    """Images, targets, matches, and the outputs of two levels."""
    return chosen(tensors, "image.", "target.", "match.", *LEVELS)


def forward_sgtr(tensors):
    """Images, and the first columns of all heads and of assembling."""
    names = (*HEADS, "pred_rel_sub_logits", "pred_rel_obj_logits", "pred_logits", "pred_boxes",
             "sub_ent_indexing_rule", "obj_ent_indexing_rule")  # fmt: skip
    outputs = {f"output.{name}": tensors[f"output.{name}"][..., :COLUMNS] for name in names}
    return chosen(tensors, "image.") | outputs


def losses_sgtr(tensors):
    """What the losses of the last level start from."""
    sizes = [tensors[f"image.{image}"].shape[:2] for image in (0, 1)]
    outputs = {f"output.{name}": tensors[f"output.{name}"] for name in HEADS}
    return {"image_sizes": torch.tensor(sizes)} | outputs | chosen(tensors, "target.", "match.0.")


def matching_of_visual_genome(tensors):
    """What the matching needs besides: entities, and which of them are linked."""
    found = {f"output.{name}": tensors[f"output.{name}"] for name in ("pred_logits", "pred_boxes")}
    for role in ("sub", "obj"):
        top = tensors[f"output.{role}_ent_indexing_rule"].topk(MATCHING_LINKS)
        found[f"top.{role}.indices"] = top.indices.to(torch.uint8)
        found[f"top.{role}.scores"] = top.values
    return found


def triplets(tensors):
    """What post-processing starts from, and the triplets that it keeps."""
    found = {
        "entities.scores": tensors["entities.scores"],
        "entities.labels": tensors["entities.labels"].to(torch.int16),
        "prediction.pred_boxes": tensors["prediction.pred_boxes"],
        "prediction.pred_rel_logits": tensors["prediction.pred_rel_logits"],
        "target_sizes": tensors["target_sizes"],
        "kept.triplets": tensors["triplets.rel_trp"].to(torch.uint8),
        "kept.predicates": tensors["triplets.rel_pred_label"].to(torch.uint8),
        "kept.scores": tensors["triplets.rel_trp_score"],
    }
    for role in ("subject", "object"):
        links = tensors[f"assembling.{role}_score"].topk(GRAPH_LINKS).indices
        found[f"links.{role}"] = links.to(torch.uint8)
    return found


def recall(tensors):
    """Predictions and annotations of 150 images, each prediction with its best predicate."""
    best = tensors["prediction.predicate_scores"][:, 1:].argmax(-1, keepdim=True) + 1
    found = {
        "prediction.relations": torch.cat((tensors["prediction.pairs"], best), dim=1),
        "prediction.num_relations": tensors["prediction.num_pairs"],
        "truth.relations": tensors["truth.relations"],
        "truth.num_relations": tensors["truth.num_relations"],
    }
    for side in ("prediction", "truth"):
        for name in ("labels", "num_entities"):
            found[f"{side}.{name}"] = tensors[f"{side}.{name}"]
    found = {name: tensor.to(torch.uint8) for name, tensor in found.items()}
    boxes = ("prediction.boxes_xyxy", "truth.boxes_xyxy")
    return found | {name: tensors[name].float() for name in boxes}


if __name__ == "__main__":
    main()
