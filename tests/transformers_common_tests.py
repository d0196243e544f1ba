"""Runs the common model tests of transformers on the models of this package.

They come with the source distribution, whose `tests` folder TRANSFORMERS_TESTS names; they need
the package `parameterized`:

    pip download --no-deps --no-binary :all: transformers==5.23.0
    tar -xzf transformers-5.23.0.tar.gz
    TRANSFORMERS_TESTS=transformers-5.23.0/tests pytest -o addopts= -o filterwarnings=default \
        tests/transformers_common_tests.py

docs/compatibility.md says what passes, and what does not apply.
"""

import importlib
import os
import sys
import types
import unittest
from unittest import mock

import pytest
import torch
import transformers
from transformers import AutoModelForObjectDetection, ResNetConfig

import sgtr_hf
from conftest import random_labels, small_config, small_detector_config


# Their modules import each other relatively, and name folders that the distribution leaves out;
# what comes from there is for text models and for export, and stands empty here.
_PACKAGE = "transformers_tests"
_LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def _import(name):
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [os.environ["TRANSFORMERS_TESTS"]]
        sys.modules[_PACKAGE] = package
        for path, content in _LEFT_OUT.items():
            folder = path.partition(".")[0]
            sys.modules[f"{_PACKAGE}.{folder}"] = types.ModuleType(f"{_PACKAGE}.{folder}")
            module = types.ModuleType(f"{_PACKAGE}.{path}")
            vars(module).update(content)
            sys.modules[f"{_PACKAGE}.{path}"] = module
    # It would look for transformers beside the tests.
    place = "transformers.utils.direct_transformers_import"
    with mock.patch(place, return_value=transformers):
        return importlib.import_module(f"{_PACKAGE}.{name}")


if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS does not name a folder", allow_module_level=True)
_common = _import("test_modeling_common")
ModelTesterMixin = _common.ModelTesterMixin
# By these names the tests know which classes have no loss, and which labels the others take.
_common.MODEL_MAPPING_NAMES.update(
    sgtr="SgtrModel", sgtr_detr="SgtrDetrModel", dino_vit="DinoVitModel"
)
_common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["dino_vit"] = "DinoVitForImageClassification"
ConfigTester = _import("test_configuration_common").ConfigTester


def tiny_backbone():
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )


class ModelTester:
    """What the common tests ask of a model: a configuration and inputs."""

    batch_size = 2
    is_training = True
    num_attention_heads = 4
    num_hidden_layers = 2
    image_size = 64
    attention = None

    def pixel_values(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch_size, 3, 64, 64, generator=generator)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        config._attn_implementation = self.attention
        return config, {"pixel_values": self.pixel_values()}


class DetrTester(ModelTester):
    def get_config(self):
        return small_detector_config(backbone_config=tiny_backbone(), query_type="learned")


class AnchorDetrTester(ModelTester):
    def get_config(self):
        return small_detector_config(backbone_config=tiny_backbone(), select_queries=True)


class SgtrTester(ModelTester):
    def get_config(self):
        return small_config(detector={"backbone_config": tiny_backbone()})


class SgtrPlusTester(ModelTester):
    def get_config(self):
        return small_config(
            detector={"backbone_config": tiny_backbone()},
            predicate_node_generator="spatial_aware",
            graph_assembling="unified",
            pair_queries=True,
        )


class DinoVitTester(ModelTester):
    patch_size = 16
    hidden_size = 32
    seq_length = encoder_seq_length = 17

    def get_config(self):
        return sgtr_hf.DinoVitConfig(
            image_size=64,
            d_model=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            feed_forward_dim=48,
            num_labels=3,
        )


# Tests that mean nothing for a model, by the beginning of their names; docs/compatibility.md.
_NO_WORDS = {
    "test_model_get_set_embeddings": "sets an embedding of words; pictures have none",
}
# Weights are asked of a backend that has none, which is an error here, not a warning.
_NO_WEIGHTS = dict.fromkeys(
    (
        "test_eager_matches_sdpa_inference_24",
        "test_eager_matches_sdpa_inference_25",
    ),
    "asks for attention weights with sdpa",
)
_REENTRANT = {
    "test_training_gradient_checkpointing_use_reentrant_true": "needs tensors as arguments"
}
_OWN_RECORDING = _NO_WORDS | dict.fromkeys(
    (
        "test_attention_outputs",
        "test_hidden_states_output",
        "test_retain_grad_hidden_states_attentions",
        # Compares hidden states.
        "test_eager_matches_sdpa_inference",
    ),
    "weights and states of layers are collected by `record_attention` and `all_levels`",
)


class CommonTests(ModelTesterMixin):
    test_resize_embeddings = False
    has_attentions = True
    tester_class = None
    config_class = None
    not_applicable = types.MappingProxyType(_OWN_RECORDING)
    config_arguments = types.MappingProxyType({})

    def setUp(self):
        for name, reason in self.not_applicable.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        self.model_tester = self.tester_class()
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **self.config_arguments
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class in AutoModelForObjectDetection._model_mapping.values():
            inputs["labels"] = random_labels(self.model_tester.batch_size)
        return inputs

    def test_model_outputs_equivalence(self):
        # What base models return holds more than tensors.
        self.all_model_classes = self.all_model_classes[-1:]
        # It asks for attention weights, which exist with eager attention alone.
        self.model_tester.attention = "eager"
        super().test_model_outputs_equivalence()

    def test_config(self):
        self.config_tester.run_common_tests()


class DetrTest(CommonTests, unittest.TestCase):
    tester_class, config_class = DetrTester, sgtr_hf.SgtrDetrConfig
    config_arguments = types.MappingProxyType({"d_model": 32, "num_attention_heads": 4})
    all_model_classes = (sgtr_hf.SgtrDetrModel, sgtr_hf.SgtrDetrForObjectDetection)


class AnchorDetrTest(DetrTest):
    tester_class = AnchorDetrTester
    # Reentrant checkpoints see tensors among the arguments alone, not those in structures.
    not_applicable = types.MappingProxyType(_OWN_RECORDING | _REENTRANT)


class SgtrTest(CommonTests, unittest.TestCase):
    tester_class, config_class = SgtrTester, sgtr_hf.SgtrConfig
    not_applicable = types.MappingProxyType(_OWN_RECORDING | _REENTRANT)
    config_arguments = types.MappingProxyType(
        {"num_predicate_queries": 12, "num_attention_heads": 4}
    )
    all_model_classes = (sgtr_hf.SgtrModel, sgtr_hf.SgtrForSceneGraphGeneration)


class SgtrPlusTest(SgtrTest):
    tester_class = SgtrPlusTester


class DinoVitTest(CommonTests, unittest.TestCase):
    tester_class, config_class = DinoVitTester, sgtr_hf.DinoVitConfig
    not_applicable = types.MappingProxyType(_NO_WORDS | _NO_WEIGHTS)
    config_arguments = types.MappingProxyType({"d_model": 32, "num_attention_heads": 4})
    all_model_classes = (sgtr_hf.DinoVitModel, sgtr_hf.DinoVitForImageClassification)
