import pytest

from sgtr_hf.command_arguments import model_folder


def test_models_that_are_not_there_or_none_are_told_from_ids(tmp_path):
    for model in (str(tmp_path / "gone"), "./gone", "runs/gone/final"):
        with pytest.raises(ValueError, match="is not there, and cannot be the id"):
            model_folder(model)
    with pytest.raises(ValueError, match=r"is not a checkpoint: the folder has no config\.json"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").touch()
    for model in (str(tmp_path), "someone/model", "model"):
        assert model_folder(model) == model
