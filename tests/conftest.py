import os


# Before transformers is imported: no test may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import TimmBackboneConfig

import sgtr_hf


# pytest-xdist runs one worker a core.
torch.set_num_threads(1)


def small_backbone():
    return TimmBackboneConfig(
        backbone="tf_efficientnet_lite0", out_indices=(3, 4), use_pretrained_backbone=False
    )


def small_detector_config(**fields):
    defaults = {
        "backbone_config": small_backbone(),
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feed_forward_dim": 48,
        "num_attention_heads": 4,
        "num_queries": 10,
        "query_type": "anchors",
        "classification": "focal",
        "normalize_input_projection": True,
        "dropout": 0.0,
        "id2label": {0: "cup", 1: "table", 2: "box"},
    }
    return sgtr_hf.SgtrDetrConfig(**(defaults | fields))


def small_config(detector=None, **fields):
    defaults = {
        "id2predicate": {0: "on", 1: "inside"},
        "num_predicate_queries": 12,
        "num_attention_heads": 4,
        "predicate_encoder_layers": 1,
        "predicate_decoder_layers": 2,
        "feed_forward_dim": 48,
        "dropout": 0.0,
        "training_assembling_top_k": 4,
    }
    detector_config = small_detector_config(**(detector or {}))
    return sgtr_hf.SgtrConfig(detector_config=detector_config, **(defaults | fields))


def random_labels(num_images=2, num_classes=3, num_predicates=2, counts=(4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for image in range(num_images):
        count = counts[image % len(counts)]
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        predicates = torch.randint(0, num_predicates, (count - 1,), generator=generator)
        subjects = torch.arange(count - 1)
        labels.append(
            {
                "class_labels": torch.randint(0, num_classes, (count,), generator=generator),
                "boxes": boxes,
                "relations": torch.stack((subjects, subjects + 1, predicates), dim=1),
            }
        )
    return labels


@pytest.fixture(scope="module")
def without_drawing():
    """No curves, which take longer than a tiny training; test_training.py looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgtr_hf.training.loop.draw_training_curves", lambda *_: None)
        yield


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A small untrained scene graph model with its image processor, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    sgtr_hf.SgtrForSceneGraphGeneration(small_config()).save_pretrained(folder)
    processor = sgtr_hf.SgtrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(folder)
    return folder
