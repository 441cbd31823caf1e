"""The built-in miniature's models, made by train.py when they are first needed: runs/base,
runs/target, runs/retainNN."""

import json
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from ..load import load_examples
from .data_files import find
from .distributed import say
from .errors import require
from .models import load_tokenizer
from .run_folder import digest, is_finished

DATA = Path(__file__).resolve().parent.parent
TRAIN = DATA.parent / "train.py"
TOKENIZER = str(DATA / "mini_model")  # of all the miniature's models
BASE_MODEL, TARGET_MODEL = "runs/base", "runs/target"
# Defaults of flags for the built-in model of a million parameters.
UNLEARN = {"lr": 5e-4, "epochs": 20, "forget_weight": 0.5}
FINETUNE = {"lr": 5e-4, "epochs": 16}
BASE = {"lr": 2e-3, "epochs": 10}  # from random weights


def start_model(args):
    """The built-in start model of a command without --model, and the defaults that suit it."""
    path = find(args.forget or args.retain)
    require(is_builtin(path), f"--model is needed for {path}: the built-in model knows only the "
            "built-in data")
    model, defaults = (TARGET_MODEL, UNLEARN) if args.forget else (BASE_MODEL, FINETUNE)
    say(f"Built-in miniature benchmark: {model} (a real model: --model), defaults {defaults}")
    return model, defaults


def is_start_model(args):
    """Whether the start model is the miniature's, which is made when it is missing."""
    return args.model in (BASE_MODEL, TARGET_MODEL) and is_builtin(find(args.forget or args.retain))


def is_builtin(path):
    """Whether a data file is one of the miniature's."""
    return path.resolve().parent == DATA


def target_and_retrained(forget):
    """What to show beside a model that forgot a built-in set: runs/target and runs/retainNN."""
    percent = forget.stem.removeprefix("forget").removesuffix("_perturbed")
    require(percent.isdigit(), f"{forget}: not one of the built-in forget sets; pass --reference")
    return TARGET_MODEL, f"runs/retain{100 - int(percent)}"


def make(folder):
    """Train runs/base (general knowledge), runs/target or runs/retainNN (base, then the data),
    unless it is there. A failure ends this process, too, with the same status."""
    data, settings = DATA / {"target": "full"}.get(folder.name, folder.name), folder / "args.json"
    if is_finished(folder):
        if settings.is_file():
            examples = load_examples(find(data), load_tokenizer(TOKENIZER), 2048)
            same = json.loads(settings.read_text())["retain data"] == digest(examples)
            require(same, f"{folder}: made from other data than {data} holds now; delete it")
        return
    require(not dist.is_initialized(), f"{folder}: not made yet; run this once without torchrun")
    command = [sys.executable, TRAIN, "--retain", data, "--output", folder, "--resume"]
    if folder.name == "base":
        command += ["--init", TOKENIZER, *(f"--{name}={value}" for name, value in BASE.items())]
    say(f"Making {folder} first, once (data/{data.name})")
    status = subprocess.run([*map(str, command)]).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)
