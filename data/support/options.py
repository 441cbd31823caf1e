"""The arguments of train.py and eval.py, and what they are when they are not given."""

import argparse
import math
import os
from pathlib import Path

import torch

from . import miniature
from ..load import Prompt
from .data_files import find, retain_beside
from .errors import InputError, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REAL = {"lr": 1e-5, "epochs": 10, "batch_size": 32}  # the official TOFU recipe
CUDA = "cuda" if torch.cuda.is_available() else "cpu"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors too."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def number(kind, low=-1e12, above=-math.inf):
    """An argparse type: an int or float (not NaN), from `low` and above `above` up to 1e12."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= 1e12 and value > above):
            needed = f"more than {above}" if above > low else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: {needed} is needed, and 1e12 at most")
        return value
    convert.__name__ = kind.__name__  # argparse's messages say "invalid float value"
    return convert


def name(text):
    """An argparse type: what names a file, folder or model; not empty, as an unset variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name; is a variable unset?")
    text.encode()  # raises for what is not UTF-8: safetensors would not open it
    return text


def every(text):
    """An argparse type: '2epochs' -> (2, True), '100' -> (100, False); 0 is never."""
    digits = text.removesuffix("epochs").removesuffix("epoch")
    if not digits.isascii() or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give steps (100) or epochs (1epoch)")
    return int(digits), digits != text


def training_options(argv, losses, description):
    """train.py's arguments, defaults filled in; `losses` is its table of them."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="README.md has the flags of the paper's runs.")
    add_options(parser, losses)
    add_run_options(parser)
    args = parser.parse_args(argv)
    require(not (args.model and args.init), "--model and --init: give one of them")
    require(args.forget or args.retain, "give --forget to unlearn or --retain to fine-tune; "
            "for example --forget data/forget05")
    if args.forget and args.retain_loss == "none":
        args.retain = None
    elif args.forget and not args.retain:
        args.retain = str(retain_beside(find(args.forget)))
    if not args.output:
        stem = find(args.forget or args.retain).stem
        args.output = os.path.join("runs", f"{stem}-{args.loss}" if args.forget else stem)
    args.output = Path(args.output)
    # Flags that are not given: the official TOFU recipe, each loss as published, or what suits
    # the built-in model when --model is left out.
    args.mini = not (args.model or args.init)
    args.kl = bool(args.forget) and args.retain_loss == "kl"
    recipe = REAL | losses[args.loss].defaults | (miniature.prepare(args) if args.mini else {})
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.mini or args.init == miniature.TOKENIZER:  # so small that many threads mostly wait
        torch.set_num_threads(min(4, torch.get_num_threads()))
    cuda = args.device.startswith("cuda")
    best = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp16" if cuda else "fp32"
    args.dtype = args.dtype or best
    args.max_tokens = args.max_tokens or (16384 if cuda else 1024)
    require(not (args.bf16_weights and args.dtype == "fp16"),
            "--bf16-weights does not go with --dtype fp16")
    return args


def add_options(parser, losses):
    a = parser.add_argument_group("model and data").add_argument
    a("--model", type=name, help="folder or hub name (safetensors). Default: the built-in target, "
      "made first")
    a("--init", type=name, metavar="DIR", help="instead: random weights for DIR's config.json and "
      "tokenizer")
    a("--forget", type=name, help="what to forget; without it, plain fine-tuning on --retain")
    a("--retain", type=name, help="what to keep. Default: the set beside --forget (forget05 -> "
      "retain95)")
    a("--template", help="chat (the tokenizer's, default if it has one), llama2, plain (default "
      "if not), or a text with {question}")
    a("--system", help="system message of the chat")
    a("--date", help="today's date, for chat templates that print it")
    a("--max-length", type=number(int, low=2), help="tokens of the longest sequence; texts are cut "
      "into chunks of it, answers never. Default: 2048 (MUSE), or what the model takes")
    a = parser.add_argument_group("objective").add_argument
    a("--loss", choices=list(losses), default="simnpo", help="default simnpo; ga is gradient "
      "ascent, with --retain-loss nll GradDiff")
    a("--retain-loss", choices=["nll", "kl", "none"], default="nll", help="default nll; kl (to the "
      "start model) keeps a frozen copy")
    a("--beta", type=number(float, above=0), help="default 2.5 (paper, TOFU forget05); NPO 0.1")
    a("--gamma", type=number(float), default=0.0, help="reward margin, default 0 (paper, TOFU)")
    a("--beta2", type=number(float, low=0), default=1.0, help="satimp's exponent of 1 - p, default 1")
    a("--forget-weight", type=number(float, low=0), help="default 0.1375 (official code, TOFU "
      "forget05); NPO and ga 1")
    a("--retain-weight", type=number(float, low=0), default=1.0, help="default 1")
    a = parser.add_argument_group("optimization (defaults: official TOFU recipe)").add_argument
    a("--epochs", type=number(int, low=1), help="passes over --forget, else --retain. Default 10")
    a("--batch-size", type=number(int, low=1), help="forget and as many retain sequences a step. "
      "Default 32")
    a("--lr", type=number(float, above=0), help="peak learning rate of AdamW. Default 1e-5")
    a("--weight-decay", type=number(float, low=0), default=0.01, help="of matrices, default 0.01")
    a("--warmup-epochs", type=number(float, low=0), default=1.0, help="linear, default 1")
    a("--schedule", choices=["linear", "constant"], default="linear", help="linear decay to 0 "
      "(TOFU, default), or constant without warm-up (MUSE)")
    a("--clip", type=number(float, above=0), default=1.0, help="largest gradient norm, default 1")
    a("--seed", type=number(int, low=0), default=0, help="of data order and --init, default 0")


def add_run_options(parser):
    a = parser.add_argument_group("speed and memory (results stay, but for rounding)").add_argument
    a("--max-tokens", type=number(int, low=1), help="padded tokens in a micro-batch. Default: "
      "16384 on a GPU, 1024 on a CPU")
    a("--dtype", choices=list(DTYPES), help="of matrix products; master weights stay fp32. "
      "Default: bf16 on GPUs that have it, else fp16; fp32 on a CPU")
    a("--bf16-weights", action="store_true", help="weights, gradients and moments in bf16, rounded "
      "stochastically: 8 bytes a parameter instead of 16")
    a("--checkpointing", action="store_true", help="recompute activations in backward")
    a("--compile", action="store_true", help="torch.compile the decoder")
    a("--device", default=CUDA, help="default: a GPU if "
      "there is one, else cpu; others (mps) are untested")
    a = parser.add_argument_group("output").add_argument
    a("--output", type=name, help="folder for model and metrics.jsonl. Default: a name under "
      "runs/")
    a("--save-every", type=every, default=(1, True), metavar="N", help="steps (100) or epochs "
      "(2epochs) between checkpoints; the last is kept. Default 1epoch, 0 for none")
    a("--snapshots", type=every, default=(0, False), metavar="N", help="steps or epochs between "
      "copies of the model, kept as OUTPUT/step-N. Default 0, none")
    a("--resume", action="store_true", help="go on from the last checkpoint in --output")


def evaluation_options(argv, description):
    """eval.py's arguments, defaults filled in."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    a, positive = parser.add_argument, number(int, low=1)
    a("models", nargs="+", type=name, metavar="MODEL", help="folder, hub name, eval.json or "
      "official log")
    a("--forget", type=name, help="TOFU: the forget set; its _perturbed version, retain_perturbed, "
      "real_authors_perturbed and world_facts_perturbed lie beside it")
    a("--muse", type=name, metavar="FOLDER", help="MUSE: a folder with verbmem, knowmem and "
      "privleak")
    a("--kl", nargs="+", type=name, metavar="FILE", help="files on which to measure "
      "KL(reference || model)")
    a("--reference", type=name, help="the model trained without the forget set: a model, an "
      "eval.json or an official log; for --muse also its AUC as a number (default: the published "
      "one for a folder named news or books)")
    a("--template", help="chat, llama2, plain, or a text with {question}; as in training")
    a("--system", help="system message of the chat; as in training")
    a("--date", help="date of the chat template; as in training")
    a("--limit", type=positive, default=300, help="first records of each TOFU split or --kl file; "
      "default 300, as in official runs (OpenUnlearning: all)")
    a("--max-new-tokens", type=positive, default=200, help="longest TOFU continuation; default 200")
    a("--dtype", choices=list(DTYPES), help="of the weights. Default: fp32 on a CPU, bf16 "
      "(official) on a GPU; only fp32 results are independent of the batch size")
    a("--batch-size", type=positive, default=64, help="prompts continued at once; default 64")
    a("--max-tokens", type=positive, help="padded tokens scored at once. Default: 16384 on a GPU, "
      "4096 on a CPU")
    a("--device", default=CUDA, help="as in train.py")
    a("--markdown", action="store_true", help="print the table in Markdown")
    a("--force", action="store_true", help="evaluate again even if eval.json has the results")
    options = parser.parse_args(argv)
    require(sum(map(bool, (options.forget, options.muse, options.kl))) < 2,
            "--forget, --muse and --kl: give one of them")
    Prompt(options.template)  # refuses a bad one before any work
    options.models = list(dict.fromkeys(map(normal, options.models)))
    options.reference = options.reference and normal(options.reference)
    cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.max_tokens = options.max_tokens or (16384 if cuda else 4096)
    return options


def normal(path):
    """One spelling of each path that exists; other names, of models on the hub, as they are. Its
    .. stay: after a link they lead elsewhere."""
    return str(Path(path)) if os.path.exists(path) else path
