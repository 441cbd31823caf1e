"""The built-in miniature's models, made by train.py when they are first needed: runs/base,
runs/target, runs/retainNN."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from ..load import load_examples
from .data_files import find
from .distributed import say
from .errors import blame, caught_signals, require
from .models import load_tokenizer
from .run_folder import digest, is_finished, owned

DATA = Path(__file__).resolve().parent.parent
TRAIN = DATA.parent / "train.py"
TOKENIZER = str(DATA / "mini_model")  # of all the miniature's models
BASE_MODEL, TARGET_MODEL = str(Path("runs", "base")), str(Path("runs", "target"))
# Defaults of flags for the built-in model of a million parameters.
UNLEARN = {"lr": 5e-4, "epochs": 20, "forget_weight": 0.5}
FINETUNE = {"lr": 5e-4, "epochs": 16}
BASE = {"lr": 2e-3, "epochs": 10}  # from random weights


def start_model(args):
    """The built-in start model of a command without --model, and the flags that suit it."""
    path = find(args.forget or args.retain)
    require(is_builtin(path), f"--model is needed for {path}: the built-in model knows only the "
            "built-in data; try --model open-unlearning/tofu_Llama-3.2-1B-Instruct_full, or "
            "locuslab/tofu_ft_llama2-7b with --template llama2")
    model, suited = (TARGET_MODEL, UNLEARN) if args.forget else (BASE_MODEL, FINETUNE)
    require(args.output.resolve() != Path(model).resolve(),
            f"{args.output}: the built-in model itself is kept there; pass another --output")
    given = {name: getattr(args, name) for name in suited if getattr(args, name) is not None}
    flags = " ".join(f"--{name.replace('_', '-')} {value:g}"
                     for name, value in (suited | given).items())
    say(f"Built-in miniature benchmark: {flags} (a real model: --model FOLDER_OR_HUB_NAME)")
    return model, suited


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
    return TARGET_MODEL, str(Path("runs", f"retain{100 - int(percent)}"))


def is_made(folder, data):
    """Whether there is a finished model, or the results of one that was deleted. Raises InputError
    if it learned other data than what is in this file now."""
    if not (is_finished(folder) or (folder / "eval.json").is_file()):
        return False
    if (path := folder / "args.json").is_file():
        with blame(path, f"cannot be compared with {data}"):
            examples = load_examples(find(data), load_tokenizer(TOKENIZER), 2048)
            same = json.loads(path.read_text())["retain data"] == digest(examples)
        require(same, f"{folder}: made from other data than {data} holds now; delete it, to have "
                "it made again, or move it away")
    return True


def make(folder):
    """Train runs/base (general knowledge), runs/target or runs/retainNN (base, then the data),
    unless it is there. A process that comes while another makes it waits. A failure ends this
    process with the status of the one that trains."""
    data = DATA / {"target": "full"}.get(folder.name, folder.name)
    if is_made(folder, data):
        return
    require(not dist.is_initialized(), f"{folder}: not made yet; run this once without torchrun")
    command = [sys.executable, str(TRAIN), "--retain", str(data), "--output", str(folder)]
    if folder.name == "base":
        command += ["--init", TOKENIZER, *(f"--{name}={value}" for name, value in BASE.items())]
    with owned(folder.with_name(f".{folder.name}.lock")):
        if not is_made(folder, data):  # another process may have made it while this one waited
            say(f"Making {folder} first, once (data/{data.name})")
            command += ["--resume"] * folder.exists()
            with caught_signals(signal.SIGINT):  # Ctrl-C reaches the child, too, which saves
                status = subprocess.run(command).returncode
            if status:
                say(f"{folder} is half made; the same command as now goes on with it")
                sys.exit(status if status > 0 else 128 - status)
