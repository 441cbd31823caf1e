"""Make the built-in miniature's models: runs/base (general knowledge), runs/target (base, then all
people) and runs/retainNN (base, then those whom forget(100-NN) leaves out).

    python data/make_mini_models.py target retain95

train.py and eval.py make one that they need and do not find.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.load import load_examples
from data.support.data_files import find
from data.support.distributed import say
from data.support.errors import blame, caught_signals, one_line_errors, require
from data.support.models import load_tokenizer
from data.support.run_folder import digest, is_finished

DATA = Path(__file__).resolve().parent
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
    flags = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in defaults.items())
    say(f"Built-in miniature: {model}; unless given: {flags} (a real model: --model)")
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
    """Train runs/base, runs/target or runs/retainNN unless it is there. Raises InputError if it was
    made from other data; a failure ends this process with the status of the one that trains."""
    data, settings = DATA / {"target": "full"}.get(folder.name, folder.name), folder / "args.json"
    if is_finished(folder):
        if settings.is_file():
            examples = load_examples(find(data), load_tokenizer(TOKENIZER), 2048)
            with blame(settings, f"cannot be compared with {data}"):
                same = json.loads(settings.read_text())["retain data"] == digest(examples)
            require(same, f"{folder}: made from other data than {data} holds now, or by another "
                    "version; delete it")
        return
    require(not dist.is_initialized(), f"{folder}: not made yet; run this once without torchrun")
    command = [sys.executable, TRAIN, "--retain", data, "--output", folder, "--resume"]
    if folder.name == "base":
        command += ["--init", TOKENIZER, *(f"--{name}={value}" for name, value in BASE.items())]
    say(f"Making {folder} first, once (data/{data.name})")
    with caught_signals(signal.SIGINT):  # Ctrl-C reaches the child, too, which saves
        status = subprocess.run([*map(str, command)]).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)


@one_line_errors
def main(argv=None):
    for name in argv or sys.argv[1:]:
        make(Path("runs", name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
