"""Unlearn, fine-tune or relearn: one plain PyTorch loop.

    python train.py --forget data/forget05 --beta 2.5 --gamma 0           unlearn, with the retain set found beside it
    python train.py --retain data/full --output runs/target               fine-tune: no --forget
    torchrun --nproc-per-node 8 train.py --model ... --forget ...         the same on several GPUs or machines (FSDP2)

Reading order: arguments, data order, one step's gradient, precision and optimizer, checkpoints, the loop.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from data.load import (InputError, Parser, Prompt, check_causal, check_disjoint, check_writable, collate, find,
                       length_batches, load_examples, load_pretrained, load_skeleton)
from simnpo import answer_kl, answer_logps, check_head, grad_ascent_loss, npo_loss, simnpo_loss

DATA = Path(__file__).resolve().parent / "data"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What these flags are when not given: each loss as it was published, the official TOFU recipe for a real model, and what
# suits the million parameters of the built-in one (a learning rate 100 times larger) when --model is left out.
LOSSES = {"simnpo": {"beta": 2.5, "forget_weight": 0.1375}, "npo": {"beta": 0.1, "forget_weight": 1.0},
          "ga": {"forget_weight": 1.0}}
REAL = {"lr": 1e-5, "epochs": 10, "batch_size": 32}
MINI_UNLEARN = {"lr": 5e-4, "epochs": 20, "batch_size": 32, "forget_weight": 0.5}
MINI_FINETUNE = {"lr": 5e-4, "epochs": 16, "batch_size": 32}
MINI_BASE = {"lr": 2e-3, "epochs": 10, "batch_size": 32}

EPILOG = """
the paper's runs (gamma here stands outside beta, as in the paper; the official code's g is our gamma/beta):
  TOFU forget05   --forget data/tofu/forget05 --beta 2.5 --forget-weight 0.1375          Unlearn-Simple README and cards
  TOFU forget10   --forget data/tofu/forget10 --beta 4.5 --forget-weight 0.125           the same
  MUSE News       --forget data/muse/news/raw/forget --retain data/muse/news/raw/retain1 --beta 0.7 --gamma 2.1
                  --forget-weight 1 --retain-weight 0.1 --schedule constant              card: g = 3.0
  MUSE Books      --forget data/muse/books/raw/forget --retain data/muse/books/raw/retain1 --beta 0.75 --gamma 0
                  --forget-weight 1 --retain-weight 0.1 --schedule constant              card: g = 0.0
with --model open-unlearning/tofu_Llama-3.2-1B-Instruct_full, locuslab/tofu_ft_llama2-7b (--template llama2),
muse-bench/MUSE-News_target, muse-bench/MUSE-Books_target, or any causal model in a folder.
"""


# Arguments

def number(kind, low=-1e12, above=-math.inf):
    """An argparse type: an int or float (not NaN), at least `low`, more than `above`, and 1e12 at most."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= 1e12 and value > above):
            needed = f"more than {above}" if above > low else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: {needed} is needed, and 1e12 at most")
        return value
    convert.__name__ = kind.__name__  # argparse's messages say "invalid float value"
    return convert


def every(text):
    """An argparse type: '2epochs' -> (2, True), '100' -> (100, False); 0 never saves."""
    digits = text.removesuffix("epochs").removesuffix("epoch")
    if not digits.isascii() or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps (100) or epochs (1epoch)")
    return int(digits), digits != text


def parse_args(argv=None):
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    a = parser.add_argument_group("model").add_argument
    a("--model", help="folder or hub name of a causal model (safetensors). Default: the built-in miniature target, "
      "made first if missing")
    a("--init", metavar="DIR", help="instead of --model: random weights for the config.json and tokenizer in this folder")
    a = parser.add_argument_group("data").add_argument
    a("--forget", help="what to forget; without it, plain fine-tuning on --retain")
    a("--retain", help="what to keep. Default: the retain set beside --forget (forget05 -> retain95)")
    a("--template", help="chat (the tokenizer's), llama2, plain, or a text with {question}. Default: chat if the "
      "tokenizer has one, else plain")
    a("--system", help="system message of the chat (OpenUnlearning's Llama 3: 'You are a helpful assistant.')")
    a("--date", help="date_string of the chat template (OpenUnlearning: '10 Apr 2025')")
    a("--max-length", type=number(int, low=2), help="longest sequence in tokens; texts are cut into chunks of it, a longer "
      "question and answer is an error. Default: 2048 (MUSE), or what the model can take")
    a = parser.add_argument_group("objective").add_argument
    a("--loss", choices=list(LOSSES), default="simnpo", help="default simnpo; ga with --retain-loss nll is GradDiff")
    a("--retain-loss", choices=["nll", "kl", "none"], default="nll", help="default nll, a token mean; kl keeps a frozen copy")
    a("--beta", type=number(float, above=0), help="default 2.5 (paper, TOFU forget05); 0.1 for NPO (its paper)")
    a("--gamma", type=number(float), default=0.0, help="reward margin, default 0 (paper, TOFU)")
    a("--forget-weight", type=number(float, low=0), help="default 0.1375 (official code, TOFU forget05); 1 for NPO and ga")
    a("--retain-weight", type=number(float, low=0), default=1.0, help="default 1")
    a = parser.add_argument_group("optimization (defaults: official TOFU recipe)").add_argument
    a("--epochs", type=number(int, low=1), help="passes over --forget (over --retain when fine-tuning). Default 10")
    a("--batch-size", type=number(int, low=1), help="forget sequences a step, and as many retain ones. Default 32")
    a("--lr", type=number(float, above=0), help="peak learning rate of AdamW. Default 1e-5")
    a("--weight-decay", type=number(float, low=0), default=0.01, help="default 0.01, on matrices only")
    a("--warmup-epochs", type=number(float, low=0), default=1.0, help="linear warm-up, default 1 epoch")
    a("--schedule", choices=["linear", "constant"], default="linear", help="after the warm-up: linear decay to 0 (TOFU, "
      "default), or constant without warm-up (MUSE)")
    a("--clip", type=number(float, above=0), default=1.0, help="largest gradient norm, default 1")
    a("--seed", type=number(int, low=0), default=0, help="of the data order (and of --init), default 0")
    a = parser.add_argument_group("speed and memory (none changes the result but for rounding)").add_argument
    a("--max-tokens", type=number(int, low=1), help="padded tokens in a micro-batch. Default: 16384 on a GPU, 1024 on a CPU")
    a("--dtype", choices=list(DTYPES), help="of matrix products; master weights stay fp32. Default: bf16 on GPUs that "
      "have it, else fp16; fp32 on a CPU")
    a("--bf16-weights", action="store_true", help="keep weights, gradients and moments in bf16, stochastically rounded: "
      "8 bytes a parameter instead of 16, a 7B model on one 80 GB GPU")
    a("--checkpointing", action="store_true", help="recompute activations layer by layer in backward: less memory")
    a("--compile", action="store_true", help="torch.compile the decoder")
    a = parser.add_argument_group("output").add_argument
    a("--output", type=Path, help="folder for the model, args.json and metrics.jsonl. Default: a name under runs/")
    a("--save-every", type=every, default=(1, True), metavar="N", help="steps (100) or epochs (2epochs) between checkpoints, "
      "of which the last is kept; default 1epoch, 0 for none")
    a("--snapshots", type=every, default=(0, False), metavar="N", help="steps or epochs between copies of the model that are "
      "kept, as OUTPUT/step-N; default 0, none")
    a("--resume", action="store_true", help="go on from the last checkpoint in --output, with the same arguments")
    args = parser.parse_args(argv)
    if args.model and args.init:
        raise InputError("--model and --init: give one of them")
    if not args.forget and not args.retain:
        raise InputError("give --forget to unlearn or --retain to fine-tune; for example --forget data/forget05")
    return args


def fill_defaults(args):
    """Set what depends on other arguments: model, output, retain set, recipe. True if the model is the built-in one."""
    mini = not args.model and not args.init
    if args.output is None:
        stem = find(args.forget or args.retain).stem
        args.output = Path("runs", f"{stem}-{args.loss}" if args.forget else stem)
    check_output(args.output, args.resume)
    if args.forget and not args.retain and args.retain_loss != "none":
        args.retain = retain_beside(find(args.forget))
    if mini and find(args.forget or args.retain).resolve().parent != DATA:
        raise InputError(f"--model is needed for {args.forget or args.retain}: the built-in model knows only the built-in "
                         "data; try --model open-unlearning/tofu_Llama-3.2-1B-Instruct_full, or locuslab/tofu_ft_llama2-7b "
                         "with --template llama2")
    recipe = REAL if not mini else MINI_UNLEARN if args.forget else MINI_FINETUNE
    for name, value in {**REAL, **LOSSES[args.loss], **recipe}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if mini:
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name):g}" for name in recipe)
        say(f"Built-in miniature benchmark: {flags} (a real model: --model FOLDER_OR_HUB_NAME)")
        args.model = str(Path("runs", "target" if args.forget else "base"))
        if args.output.resolve() == Path(args.model).resolve():
            raise InputError(f"{args.output}: the built-in model itself is kept there; pass another --output")
    return mini


def retain_beside(forget):
    """forget05 -> retain95, the TOFU convention."""
    digits = forget.stem.removeprefix("forget")
    if forget.stem == digits or not digits.isascii() or not digits.isdigit() or not 0 < int(digits) < 100:
        raise InputError(f"--retain is needed: {forget.name} has no retain set by TOFU's naming (forget05 -> retain95); "
                         "or pass --retain-loss none")
    return str(find(forget.with_name(f"retain{100 - int(digits):02d}")))


def make_builtin(output):
    """Train runs/base (general knowledge) or runs/target (base, then the full miniature set) unless it exists."""
    if (output / "config.json").exists():
        return
    argv = ["--output", str(output), "--seed", "0"] + ["--resume"] * output.exists()
    if output.name == "base":
        argv += ["--init", str(DATA / "mini_model"), "--retain", str(DATA / "base")]
        argv += [f"--{key.replace('_', '-')}={value}" for key, value in MINI_BASE.items()]
    else:
        argv += ["--retain", str(DATA / "full")]
    say(f"Making {output} first, once ({'general knowledge' if output.name == 'base' else 'base, then data/full'})")
    if status := main(argv):
        sys.exit(status)


def check_output(output, resume):
    """An output folder is new or empty, or holds the run to resume; and it can be written to."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: a file, where --output needs a folder")
    if resume and not output.exists():
        raise InputError(f"{output}: no run to resume in this folder; leave out --resume")
    names = [p.name for p in output.iterdir() if p.suffix != ".tmp"] if output.exists() else []
    if resume and names and "args.json" not in names:
        raise InputError(f"{output}: no run to resume in this folder (there is no args.json); pass another --output")
    if not resume and names:
        raise InputError(f"{output}: already holds a run or other files; pass another --output, --resume, or delete it")
    check_writable(output)


# Data order: a pure function of (seed, step), so that resuming needs no generator's state.

def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def draw(n, start, count, seed):
    """`count` indices from place `start` of the endless stream of shuffled passes over range(n)."""
    places = range(start, start + count)
    passes = {epoch: shuffled(n, seed, epoch) for epoch in {place // n for place in places}}
    return [passes[place // n][place % n] for place in places]


def step_indices(step, n_forget, n_retain, batch_size, seed):
    """Which forget and retain examples make up a step; the last batch of an epoch may be smaller."""
    n = n_forget or n_retain
    per_epoch = math.ceil(n / batch_size)
    start = step // per_epoch * n + step % per_epoch * batch_size
    count = min(batch_size, n - step % per_epoch * batch_size)
    forget = draw(n_forget, start, count, 2 * seed) if n_forget else []
    retain = draw(n_retain, start, count, 2 * seed + 1) if n_retain else []
    return forget, retain


def learning_rate(args, step, per_epoch):
    """Linear warm-up, then linear decay that reaches 0 after the last step; no step is wasted at 0."""
    if args.schedule == "constant":
        return args.lr
    total, warm = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    return args.lr * min((step + 1) / (warm + 1), (total - step) / max(1, total - warm))


# One step's gradient. It does not depend on how the step is split: every micro-batch divides by the whole step's counts.

class Objective(nn.Module):
    """What FSDP wraps: the forward returns log-probabilities, so that the head runs inside the sharded root."""

    def __init__(self, model, reference=None):
        super().__init__()
        self.model, self.reference = model, reference

    def train(self, mode=True):
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()  # no dropout in what the KL term is measured against
        return self

    def forward(self, input_ids, labels, kl=False):
        if kl:
            return answer_kl(self.model, self.reference, input_ids, labels)
        return answer_logps(self.model, input_ids, labels)


def ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def micro_batches(examples, max_tokens):
    """This rank's [(indices, weight)], by length. All ranks get equally many: fillers have weight 0."""
    rank, world = ranks()
    lengths = [len(e.input_ids) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    plans = []
    for share in (order[r::world] for r in range(world)):
        batches = length_batches([lengths[i] for i in share], max_tokens)
        plans.append([([share[i] for i in batch], 1.0) for batch in batches])
    return plans[rank] + [([order[-1]], 0.0)] * (max(map(len, plans)) - len(plans[rank]))


def tensors(examples, device):
    return (x.to(device, non_blocking=True) for x in collate(examples))


def forget_losses(args, logps, lengths, ref_logps):
    """One loss a forget sequence: (B,), (B,), (B,) -> (B,)."""
    if args.loss == "simnpo":
        return simnpo_loss(logps, lengths, args.beta, args.gamma)
    if args.loss == "npo":
        return npo_loss(logps, ref_logps, args.beta)
    return grad_ascent_loss(logps, lengths)


def step_gradient(objective, forget, retain, ref_logps, args, precision, scaler=None):
    """Add the gradient of a step's loss to the parameters; return its forget and retain loss, a tensor (2,).

        loss = forget_weight * mean over forget sequences + retain_weight * mean over retain answer tokens

    `forget` and `retain` are lists of Examples (either may be empty), `ref_logps` the forget answers' log-probabilities
    before unlearning (NPO), `precision` a function that gives the autocast context.
    """
    n_tokens = sum(len(e.input_ids) - e.start for e in retain)
    kl = args.retain_loss == "kl" and bool(forget)
    groups = [(forget, len(forget), False), (retain, 0, True)] if kl else [(forget + retain, len(forget), False)]
    losses = torch.zeros(2, device=args.device)
    for examples, n_forget, kl in groups:
        for indices, weight in micro_batches(examples, args.max_tokens) if examples else []:
            is_forget = torch.tensor([i < n_forget for i in indices], device=args.device)
            with precision():
                values, lengths = objective(*tensors([examples[i] for i in indices], args.device), kl=kl)
            forget_loss = values.new_zeros(())
            if n_forget:
                ref = ref_logps[[i for i in indices if i < n_forget]] if args.loss == "npo" else None
                forget_loss = forget_losses(args, values[is_forget], lengths[is_forget], ref).sum() / n_forget
            retain_loss = (values if kl else -values[~is_forget]).sum() / max(1, n_tokens)
            loss = weight * (args.forget_weight * forget_loss + args.retain_weight * retain_loss)
            loss = loss * ranks()[1]  # FSDP averages over ranks, where a sum is meant
            (scaler.scale(loss) if scaler else loss).backward()
            losses += weight * torch.stack([forget_loss.detach(), retain_loss.detach()])
    if dist.is_initialized():
        dist.all_reduce(losses)
    return losses


@torch.no_grad()
def score(objective, examples, args, precision):
    """Log-probability of each example's answer, (n,) on every rank."""
    logps = torch.zeros(len(examples), device=args.device)
    objective.eval()
    for indices, weight in micro_batches(examples, args.max_tokens):
        with precision():
            values, _ = objective(*tensors([examples[i] for i in indices], args.device))
        logps[indices] += weight * values
    objective.train()
    if dist.is_initialized():
        objective.reshard()  # without a backward, FSDP leaves the root's parameters gathered
        dist.all_reduce(logps)
    return logps


def answer_probability(objective, examples, args, precision, most=200):
    """Mean of p(answer)^(1/|answer|) over at most 200 examples, evenly spread."""
    examples = examples[::math.ceil(len(examples) / most)]
    lengths = torch.tensor([len(e.input_ids) - e.start for e in examples], device=args.device)
    return (score(objective, examples, args, precision) / lengths).exp().mean().item()


# Precision, sharding, optimizer

class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights with bf16 moments: fp32 arithmetic, stochastic rounding when the result is stored.

    Rounding to nearest would lose every update smaller than 1/256 of a weight, and freeze the second moment (it moves
    by 1/1000 a step); rounded up or down at random in proportion, both are right on average.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                parts = [local(t).view(-1).split(2**24) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for chunk in zip(*parts):  # bounds the fp32 copies
                    self.update(*chunk, state["step"].item(), **group)

    def update(self, weight, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, **_):
        w, g, m, v = weight.float(), grad.float(), exp_avg.float(), exp_avg_sq.float()
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        scale = (v / (1 - betas[1] ** step)).sqrt_().add_(eps)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, scale, value=-lr / (1 - betas[0] ** step))
        for stored, value in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
            stored.copy_(stochastic_round(value))


def stochastic_round(x):
    """fp32 values rounded at random to a bf16 neighbour, so that the mean is right: add 16 random bits, cut 16."""
    bits = x.view(torch.int32) + torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    return (bits & -(2**16)).view(torch.float32)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_start(args):
    """The model to start from, with its weights."""
    dtype = torch.bfloat16 if args.bf16_weights else torch.float32
    if not args.init:
        return load_pretrained(args.model, dtype)[0]
    config = load_skeleton(args.init, weights=False)[0].config
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    check_causal(args.init, model)
    return model


def prepare(model, args):
    """Move, shard and compile: returns the Objective and the function that gives its autocast context."""
    kl = args.forget and args.retain_loss == "kl"
    reference = load_start(args).eval().requires_grad_(False) if kl else None
    objective = Objective(model, reference).to(args.device).train()
    try:
        check_head(model)
    except ValueError as e:
        raise InputError(f"{args.model or args.init}: {e}") from None
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compile:
        model.get_decoder().compile(dynamic=True)
    mixed = DTYPES[args.dtype] if args.dtype != "fp32" and not args.bf16_weights else None
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32)
        for part in filter(None, (model, reference)):
            layers = next(m for m in part.modules() if isinstance(m, nn.ModuleList))
            for layer in layers:
                fully_shard(layer, mp_policy=policy)
        fully_shard(objective, mp_policy=policy)
        mixed = None  # FSDP casts; no autocast on top
    return objective, lambda: torch.autocast(args.device.type, mixed) if mixed else contextlib.nullcontext()


def make_optimizer(model, args):
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # norms and biases
    if args.bf16_weights:
        return StochasticAdamW(groups, args.lr)
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


@dataclass
class Run:
    """What a run consists of once everything is checked and built."""
    args: argparse.Namespace
    settings: dict  # the arguments and data that determine the result
    tokenizer: object
    objective: Objective
    precision: object  # () -> autocast context
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None


# Checkpoints: a folder is filled under another name, fsynced and renamed, so that it is there complete or not at all.

@contextlib.contextmanager
def durable_folder(final):
    filling = final.with_name(final.name + ".tmp")
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    try:
        yield filling
        for path in [*filling.rglob("*"), filling]:
            fsync(path)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise
    os.rename(filling, final)
    fsync(final.parent)


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def whole(tensor):
    """A parameter or its moment, gathered from all ranks, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()


def placed(tensor, like):
    """The reverse of `whole`: laid out as `like` is."""
    if tensor.shape != like.shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} for one of {tuple(like.shape)}")
    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def checkpoints(output):
    return sorted(p for p in output.glob("checkpoint-*") if p.suffix != ".tmp")


def save_checkpoint(run, step):
    """Write OUTPUT/checkpoint-STEP, then remove the one before."""
    state = {"step": step, "scaler": run.scaler and run.scaler.state_dict(), "adam_step": 0}
    tensors = {}
    for name, p in run.objective.model.named_parameters():
        tensors[f"weight.{name}"] = whole(p)
        if moments := run.optimizer.state.get(p):
            state["adam_step"] = int(moments["step"])
            tensors |= {f"{key}.{name}": whole(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
    check_finite(tensors, step)
    final = run.args.output / f"checkpoint-{step:08d}"
    if ranks()[0] == 0 and not final.exists():
        with durable_folder(final) as folder:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(state))
        for old in checkpoints(run.args.output)[:-1]:  # half of one does no harm: the last one counts
            shutil.rmtree(old)
    barrier()


def load_checkpoint(run, folder):
    """Put a checkpoint's state back; return its step."""
    try:
        state, saved = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
        on_cpu = isinstance(run.optimizer, StochasticAdamW)
        for name, p in run.objective.model.named_parameters():
            with torch.no_grad():
                local(p).copy_(local(placed(saved[f"weight.{name}"], p)))
            if f"exp_avg.{name}" in saved:
                run.optimizer.state[p] = {key: placed(saved[f"{key}.{name}"], p) for key in ("exp_avg", "exp_avg_sq")}
                adam_step = torch.tensor(float(state["adam_step"]), device="cpu" if on_cpu else p.device)
                run.optimizer.state[p]["step"] = adam_step
        if run.scaler:
            run.scaler.load_state_dict(state["scaler"])
        return int(state["step"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{folder}: not a whole checkpoint of this run: {type(e).__name__} {e}") from None


def check_finite(tensors, step):
    """What is not finite is never saved."""
    if not all(t.isfinite().all() for t in tensors.values()):
        raise FloatingPointError(f"step {step}: a weight")


def save_model(run, folder, step):
    """Write a folder that from_pretrained opens, unless it is there."""
    model = run.objective.model
    state = {name: whole(p) for name, p in model.named_parameters()}
    check_finite(state, step)
    state |= {name: whole(b) for name, b in model.named_buffers() if name in model.state_dict()}
    if ranks()[0] == 0 and not folder.exists():
        with durable_folder(folder) as filling:
            model.save_pretrained(filling, state_dict=state)
            run.tokenizer.save_pretrained(filling)
    barrier()


def finish(run, step):
    """Put the finished model in place: config.json comes last, so a folder that has it is complete."""
    output = run.args.output
    if ranks()[0] == 0:
        shutil.rmtree(output / "final", ignore_errors=True)
    barrier()
    save_model(run, output / "final", step)
    if ranks()[0] == 0:
        for path in sorted((output / "final").iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, output / path.name)
        fsync(output)
        tidy(output)
    barrier()


def tidy(output):
    """Remove what only an unfinished run needs."""
    for folder in (output / "final", *checkpoints(output), *output.glob("*.tmp")):
        shutil.rmtree(folder, ignore_errors=True)


def open_log(output, step, settings):
    """metrics.jsonl, cut back to the step that the run starts from; args.json beside it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "metrics.jsonl"
    if ranks()[0]:
        return open(os.devnull, "w")
    write(output / "args.json", json.dumps(settings, indent=1) + "\n")
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() and step else []
    write(path, "".join(line for line in lines if is_logged(line, step)))
    return path.open("a", buffering=1)


def is_logged(line, step):
    """Whether a line of metrics.jsonl is whole and of no later step."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return line.endswith("\n") and json.loads(line)["step"] <= step
    return False


def write(path, text):
    """Replace a file's text: whatever happens, it is the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    fsync(beside)
    os.replace(beside, path)


# The loop

RESULT_FREE = {"output", "resume", "save_every", "snapshots", "max_tokens", "checkpointing", "compile", "device"}


def check(args, mini):
    """Find all mistakes in the input that can be found without the weights: returns tokenizer, settings and Examples."""
    start_device(args)
    source = DATA / "mini_model" if mini else args.init or args.model
    skeleton, tokenizer = load_skeleton(source, weights=bool(args.model and not mini))
    forget, retain = load_data(args, skeleton, tokenizer)
    settings = {key: value for key, value in vars(args).items() if key not in RESULT_FREE}
    for name, examples in (("forget data", forget), ("retain data", retain)):
        settings[name] = hashlib.sha256(repr([(e.input_ids, e.start) for e in examples]).encode()).hexdigest()[:16]
    check_settings(args.output / "args.json", settings)
    check_disk(args, skeleton)
    return tokenizer, settings, forget, retain


def build(args, tokenizer, settings):
    """Load, shard and compile."""
    model = load_start(args)
    objective, precision = prepare(model, args)
    scaler = torch.amp.GradScaler(args.device.type) if args.dtype == "fp16" else None
    return Run(args, settings, tokenizer, objective, precision, make_optimizer(model, args), scaler)


def check_settings(path, settings):
    """Raise InputError if the run that this args.json began had other arguments or data."""
    try:
        before = json.loads(path.read_text()) if path.exists() else settings
        changed = [f"{key.replace('_', '-')} was {value}, is {settings.get(key)}" for key, value in before.items()
                   if settings.get(key) != value]
    except (OSError, ValueError, RecursionError, AttributeError) as e:
        raise InputError(f"{path}: cannot be read, so the run cannot be resumed: {e}") from None
    if changed:
        raise InputError(f"{path}: cannot resume with other settings: {'; '.join(changed)}")


def start_device(args):
    """The device of this process, the defaults that depend on it, and the process group under torchrun."""
    cuda = torch.cuda.is_available()
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    args.dtype = args.dtype or ("fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    args.max_tokens = args.max_tokens or (16384 if cuda else 1024)
    if args.bf16_weights and args.dtype == "fp16":
        raise InputError("--bf16-weights does not go with --dtype fp16")
    if cuda:
        torch.cuda.set_device(args.device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")


def load_data(args, model, tokenizer):
    """The forget and retain Examples, checked."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if args.max_length and args.max_length > limit:
        raise InputError(f"--max-length {args.max_length}: the model takes {limit} tokens at most")
    args.max_length = args.max_length or min(limit, 2048)
    prompt = Prompt(args.template, args.system, args.date)
    forget = load_examples(args.forget, tokenizer, args.max_length, prompt) if args.forget else []
    keep = args.retain and (args.retain_loss != "none" or not args.forget)
    retain = load_examples(args.retain, tokenizer, args.max_length, prompt) if keep else []
    check_disjoint(forget, retain)
    return forget, retain


def check_disk(args, model):
    """Raise InputError unless two checkpoints (weights and two moments) and the final model fit on the disk."""
    needed = sum(p.numel() for p in model.parameters()) * (2 if args.bf16_weights else 4) * 7
    if (free := shutil.disk_usage(check_writable(args.output)).free) < needed:
        raise InputError(f"{args.output}: {free / 2**30:.1f} GiB free on that disk, two checkpoints and the model need "
                         f"{needed / 2**30:.1f} GiB; pass another --output")


def train(run, forget, retain):
    """Take all steps from the last checkpoint on and finish the output folder; return the exit status."""
    args, output = run.args, run.args.output
    per_epoch = math.ceil((len(forget) or len(retain)) / args.batch_size)
    total = args.epochs * per_epoch
    save_steps, snapshot_steps = (n * (per_epoch if epochs else 1) for n, epochs in (args.save_every, args.snapshots))
    ref_logps = score(run.objective, forget, args, run.precision) if args.loss == "npo" and forget else None
    step = load_checkpoint(run, checkpoints(output)[-1]) if args.resume and checkpoints(output) else 0
    started = time.time()
    with caught_signals() as caught, open_log(output, step, run.settings) as log, tqdm(
            total=total, initial=step, desc=str(output), unit="step", disable=ranks()[0] > 0 or None) as bar:
        if step == 0:
            probe(run, log, 0, 0, forget, retain)
        while step < total:
            record = {"step": step + 1, **take_step(run, forget, retain, ref_logps, step, per_epoch)}
            step += 1
            log.write(json.dumps(record) + "\n")
            bar.set_postfix({name: f"{record[name]:.3g}" for name in ("forget_loss", "retain_loss") if name in record})
            bar.update()
            if step % per_epoch == 0:
                probe(run, log, step, step // per_epoch, forget, retain)
            if snapshot_steps and step % snapshot_steps == 0:
                save_model(run, output / f"step-{step:06d}", step)
            stopping = any_rank(bool(caught), args.device)
            if stopping or (save_steps and step % save_steps == 0 and step < total):
                save_checkpoint(run, step)
            if stopping:
                say(f"Stopped after step {step} of {total}; go on with the same command and --resume")
                return 128 + (caught or [signal.SIGTERM])[0]
        finish(run, total)
    report(args, time.time() - started)
    return 0


def take_step(run, forget, retain, ref_logps, step, per_epoch):
    """One optimizer step; returns its line for metrics.jsonl. Raises FloatingPointError before a bad update is made."""
    args, began = run.args, time.time()
    torch.manual_seed(args.seed * 1_000_003 + step)  # dropout and stochastic rounding: functions of (seed, step) too
    forget_at, retain_at = step_indices(step, len(forget), len(retain), args.batch_size, args.seed)
    chosen, kept = [forget[i] for i in forget_at], [retain[i] for i in retain_at]
    ref = ref_logps[forget_at] if ref_logps is not None else None
    losses = step_gradient(run.objective, chosen, kept, ref, args, run.precision, run.scaler).tolist()

    lr = learning_rate(args, step, per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.objective.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not all(map(math.isfinite, losses)) or not (math.isfinite(norm) or run.scaler):
        raise FloatingPointError(f"step {step + 1}: loss {losses}, gradient norm {norm}")
    if run.scaler:  # skips the step when a gradient overflowed, and scales less from then on
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        run.optimizer.step()
    run.optimizer.zero_grad()

    named = {"forget_loss": losses[0]} if chosen else {}
    named |= {"retain_loss": losses[1]} if kept else {}
    tokens = sum(len(e.input_ids) for e in chosen + kept)
    return {**named, "lr": lr, "grad_norm": norm, "tokens_per_s": round(tokens / (time.time() - began), 1)}


def probe(run, log, step, epoch, forget, retain):
    """Log the mean answer probability of both sets: {"step", "epoch", "forget_prob", "retain_prob"}."""
    record = {"step": step, "epoch": epoch}
    for name, examples in (("forget_prob", forget), ("retain_prob", retain)):
        if examples:
            record[name] = answer_probability(run.objective, examples, run.args, run.precision)
            if not math.isfinite(record[name]):
                raise FloatingPointError(f"step {step}: {name} {record[name]}")
    log.write(json.dumps(record) + "\n")


def report(args, seconds):
    """What came of it, and what to do next."""
    if ranks()[0]:
        return
    records = [json.loads(line) for line in (args.output / "metrics.jsonl").open()]
    probes = [r for r in records if "epoch" in r]
    changes = [f"{name.removesuffix('_prob')} {probes[0][name]:.3f} -> {probes[-1][name]:.3f}"
               for name in ("forget_prob", "retain_prob") if probes and name in probes[0]]
    say(f"{args.output}: answer probability {', '.join(changes)} in {seconds:.0f} s")
    if args.forget and (data := evaluation_flags(args, find(args.forget))):
        say("Next: " + shlex.join(["python", "eval.py", str(args.output), *data]))


def evaluation_flags(args, forget):
    """How eval.py is told of this data; none for data that has no evaluation files beside it."""
    if forget.parent.name == "raw":  # MUSE
        return ["--muse", str(forget.parent.parent)]
    if not forget.with_name(f"{forget.stem}_perturbed{forget.suffix}").exists():
        return []
    prompt = {f"--{name}": getattr(args, name) for name in ("template", "system", "date")}
    return ["--forget", args.forget, *(word for flag, value in prompt.items() if value for word in (flag, value))]


@contextlib.contextmanager
def caught_signals():
    """SIGINT and SIGTERM are only noted, in the list given; a second one ends the process at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag, device):
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(text):
    if ranks()[0] == 0 and os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def run_once(args):
    """Check, build, train; 0 if the run is complete, else the status that main() exits with."""
    try:
        mini = fill_defaults(args)
        tokenizer, settings, forget, retain = check(args, mini)
    except OSError as e:  # a name too long, a folder that may not be read
        raise InputError(e) from None
    if (args.output / "config.json").exists():
        tidy(args.output)
        say(f"{args.output}: this run is complete")
        return 0
    if mini:
        make_builtin(Path(args.model))
    return train(build(args, tokenizer, settings), forget, retain)


def main(argv=None):
    args = None
    try:
        args = parse_args(argv)
        return run_once(args)
    except InputError as e:
        status, message = 2, e
    except FloatingPointError as e:
        status, message = 1, f"{args.output}: not finite: {e}; {last_checkpoint(args)}; a lower --lr may help"
    except (OSError, SafetensorError) as e:  # a full disk, above all
        status, message = 1, f"{args.output}: cannot write: {e}; {last_checkpoint(args)}"
    except KeyboardInterrupt:  # outside of the loop, where there is nothing to save
        status, message = 128 + signal.SIGINT, "interrupted"
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return status


def last_checkpoint(args):
    found = checkpoints(args.output)
    return f"{found[-1].name} is whole, go on from it with --resume" if found else "there is no checkpoint yet"


if __name__ == "__main__":
    sys.exit(main())
