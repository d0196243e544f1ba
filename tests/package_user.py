"""Publishes a model to the server that HF_ENDPOINT names, and loads it with the package.

`python tests/package_user.py FOLDER PUBLISHED PICTURE SHARDS OUTPUT`; prints what it found as JSON.
Shards are published too, and annotated from there.
"""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    pipeline,
)

import sgtr_hf
from sgtr_hf.cli import main
from sgtr_hf.hub import publishing


REPO_ID, DATASET_ID = "somebody/tiny", "somebody/scenes"
AUTOS = (
    AutoConfig,
    AutoModel,
    AutoModelForObjectDetection,
    sgtr_hf.AutoModelForSceneGraphGeneration,
    AutoImageProcessor,
)
TRUSTED, REFUSED = {"trust_remote_code": True}, {"trust_remote_code": False}


def load(source, picture, pipelines):
    """Module of the class that each way of loading gives, and the graph of a picture."""
    found = {auto.__name__: type(auto.from_pretrained(source)).__module__ for auto in AUTOS}
    for arguments in pipelines:
        generate = pipeline(model=source, **arguments)
        found[f"pipeline {arguments}"] = type(generate).__module__
        found[f"model {arguments}"] = type(generate.model).__module__
    return found | {"graph": generate(picture, top_k=5).to_dict()}


def error_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return str(error)
    return None


if __name__ == "__main__":
    folder, published, picture, shards, output = sys.argv[1:]
    publishing._FIRST_WAIT_SECONDS = 0.01
    arguments = ["push", folder, REPO_ID, "--private", "--output", published]
    result = {"code": main([*arguments, "--picture", picture, "--license", "apache-2.0"])}
    result["revision"] = HfApi().model_info(REPO_ID).sha
    task = {"task": "scene-graph"}
    result[REPO_ID] = load(REPO_ID, picture, [task, {}])
    # Trust is not asked for, and changes nothing where it is given or refused.
    result["folder"] = load(published, picture, [task, {}, task | TRUSTED, TRUSTED, task | REFUSED])
    trusting = AutoModelForObjectDetection.from_pretrained(published, **TRUSTED)
    result["folder"]["trusted model"] = type(trusting).__module__
    result["card"] = ModelCard.load(REPO_ID).data.to_dict()

    # A second commit: of what did not change, nothing is sent.
    card = Path(published) / "README.md"
    card.write_text(card.read_text() + "\nA second version.\n")
    publishing.upload(Path(published), REPO_ID, "model", private=True)
    revisions = {"first": result["revision"], "second": "main"}
    for name, revision in revisions.items():
        file = hf_hub_download(REPO_ID, "README.md", revision=revision)
        result[name] = "A second version." in Path(file).read_text()
    first = AutoConfig.from_pretrained(REPO_ID, revision=result["revision"])
    result["first model"] = first.num_predicate_queries

    stranger = HfApi(token="hf_bad")
    result["refused upload"] = error_of(
        publishing.upload, Path(published), REPO_ID, "model", private=True, api=stranger
    )
    arguments = {"token": "hf_bad", "force_download": True}
    result["refused download"] = error_of(AutoConfig.from_pretrained, REPO_ID, **arguments)

    result["data set"] = main(["push", shards, DATASET_ID])
    command = ["annotate", DATASET_ID, output, "--model", REPO_ID, "--revision"]
    options = ["--workers", "0", "--threshold", "0", "--top-k", "5"]
    result["annotation"] = main([*command, result["revision"], *options])
    # On a line of its own, after whatever was asked.
    print("\n" + json.dumps(result))
