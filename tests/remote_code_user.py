"""Loads a published model where this package cannot be imported; prints what it found as JSON.

`python tests/remote_code_user.py PICTURE SOURCE...`, each source a folder or a Hub id.
"""

import json
import sys


# Wherever the package lies, importing it now raises ModuleNotFoundError.
sys.modules["sgtr_hf"] = None

from transformers import (  # noqa: E402 - after the line above
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    pipeline,
)


def load(source, picture):
    found = {
        auto.__name__: type(auto.from_pretrained(source, trust_remote_code=True)).__name__
        for auto in (AutoConfig, AutoModel, AutoModelForObjectDetection, AutoImageProcessor)
    }
    pil = AutoImageProcessor.from_pretrained(source, trust_remote_code=True, backend="pil")
    found["pil"] = type(pil).__name__
    for name, task in (("task", {"task": "scene-graph"}), ("no task", {})):
        generate = pipeline(**task, model=source, trust_remote_code=True)
        found[name] = {
            "class": type(generate).__name__,
            "module": type(generate.model).__module__,
            "graph": generate(picture, top_k=5).to_dict(),
        }
    return found


def refusals(source):
    attempts = {
        "AutoConfig": lambda **trust: AutoConfig.from_pretrained(source, **trust),
        "AutoModel": lambda **trust: AutoModel.from_pretrained(source, **trust),
        "task": lambda **trust: pipeline("scene-graph", model=source, **trust),
        "no task": lambda **trust: pipeline(model=source, **trust),
    }
    messages = {}
    for trust in ({}, {"trust_remote_code": False}):
        for name, attempt in attempts.items():
            try:
                attempt(**trust)
            except ValueError as error:
                messages[f"{name} {trust}"] = str(error)
    return messages


if __name__ == "__main__":
    sources = sys.argv[2:]
    result = {source: load(source, sys.argv[1]) for source in sources}
    result["refusals"] = refusals(sources[0])
    result["package"] = sorted(name for name, module in sys.modules.items() if "sgtr_hf" in name)
    # On a line of its own, after whatever was asked.
    print("\n" + json.dumps(result))
