"""Unlearn or fine-tune a causal language model: one plain PyTorch loop.

    python train.py --forget data/forget05 --beta 2.5 --gamma 0      unlearn
    python train.py --retain data/full --output runs/full            fine-tune: no --forget
    torchrun --nproc-per-node 8 train.py --model ... --forget ...    on several GPUs or machines

Reading order: the losses to choose from, the flags with their defaults, the loop (main), the pieces
of a step, the model and its optimizer.
"""

import data.support  # first: it sets what OpenMP reads while torch loads

import copy
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from data.load import Prompt, collate, length_batches, load_examples
from data import make_mini_models as miniature
from data.support import distributed, models, run_folder
from data.support.data_files import check_disjoint, find, retain_beside
from data.support.errors import (Parser, blame, interval, nonempty, number, one_line_errors,
                                 require)
from data.support.optim import StochasticAdamW
from simnpo import (answer_hidden, answer_token_logps, check_head, chunked, grad_ascent_loss,
                    head_logits, npo_loss, simnpo_loss, sum_answers, token_logps)


# The losses to choose from. One entry is all that another one needs.

class Answers(NamedTuple):
    """What a loss is made of: B forget sequences, N answer tokens; log p, or Loss.per_token's."""
    logps: torch.Tensor  # (B,) log pi(y|x)
    lengths: torch.Tensor  # (B,) |y|
    token_logps: torch.Tensor  # (N,) the same of each token, sequence after sequence
    ref_logps: torch.Tensor | None  # (B,) logps before unlearning, where the loss needs them


def token_log_complements(logits, targets):
    """log(1 - p(target)), in fp32 at least: (N,V), (N,) -> (N,). Made of the other words' logits:
    from log p, which fp32 rounds to 0 at a margin of 16, no gradient would come."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    others = logits.scatter(-1, targets[:, None], -math.inf)
    return others.logsumexp(-1) - logits.logsumexp(-1)


class Loss(NamedTuple):
    function: Callable[[Answers, Any], torch.Tensor]  # answers, arguments -> (B,)
    defaults: dict  # of flags that are not given
    needs_reference: bool = False
    per_token: Callable = token_logps  # what Answers holds, of logits: (N,V), (N,) -> (N,)


LOSSES = {
    "simnpo": Loss(lambda y, args: simnpo_loss(y.logps, y.lengths, args.beta, args.gamma),
                   {"beta": 2.5, "forget_weight": 0.1375}),
    "npo": Loss(lambda y, args: npo_loss(y.logps, y.ref_logps, args.beta),
                {"beta": 0.1, "forget_weight": 1.0}, needs_reference=True),
    "ga": Loss(lambda y, args: grad_ascent_loss(y.logps, y.lengths), {"forget_weight": 1.0}),
    # Weighted gradient ascent (Wang et al., arXiv 2502.19301): mean over tokens of p^beta log p, no
    # gradient through p^beta
    "wga": Loss(lambda y, args: weighted_ascent(y, lambda p: p**args.beta),
                {"beta": 1.0, "forget_weight": 1.0}),
    # SatImp (Yang et al., arXiv 2505.11953): the same with p^beta (1 - p)^beta2
    "satimp": Loss(lambda y, args: weighted_ascent(y, lambda p: p**args.beta * (1-p)**args.beta2),
                   {"beta": 5.0, "forget_weight": 0.1}),
    # CE-U (Yang, arXiv 2503.01224) has the gradient of -log(1 - p); here of all answer tokens
    "ceu": Loss(lambda y, args: -y.logps / y.lengths, {"forget_weight": 1.0},
                per_token=token_log_complements),
}


def weighted_ascent(y, weight):
    """Mean over each answer's tokens of weight(p) log p, the weight without gradient: (B,)."""
    values = weight(y.token_logps.detach().exp()) * y.token_logps
    return torch.segment_reduce(values, "mean", lengths=y.lengths, unsafe=True)


# The flags, each with its default; one that depends on others is filled in by `arguments`.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFICIAL = {"lr": 1e-5, "epochs": 10, "batch_size": 32}  # of real models: the official TOFU code
COUNT, POSITIVE, NONNEGATIVE = number(int, 1), number(float, 1e-12), number(float, 0)


def flags():
    parser = Parser(__doc__)
    a = parser.add_argument_group("model and data").add_argument
    a("--model", type=nonempty, help="folder or hub name; default: the built-in target, made first")
    a("--init", type=nonempty, metavar="DIR", help="random weights for DIR's config and tokenizer")
    a("--forget", type=nonempty, help="what to forget; without it, fine-tuning on --retain")
    a("--retain", type=nonempty, help="what to keep; default: beside --forget (forget05: retain95)")
    a("--template", help="chat, llama2, plain or a text with {question}; default chat, else plain")
    a("--system", help="system message of the chat")
    a("--date", help="today's date, for chat templates that print it")
    a("--max-length", type=number(int, low=2), help="longest sequence in tokens: longer texts are "
      "split, longer answers refused; default 2048 (MUSE), or what the model takes")
    a = parser.add_argument_group("objective").add_argument
    a("--loss", choices=list(LOSSES), default="simnpo", help="default simnpo; GradDiff is ga + nll")
    a("--retain-loss", choices=["nll", "kl", "none"], default="nll", help="default nll; kl: to the "
      "start model, of which a frozen copy is kept")
    a("--beta", type=POSITIVE, help="default 2.5 (paper, TOFU forget05); npo 0.1, wga 1, satimp 5; "
      "ga and ceu have none")
    a("--gamma", type=number(float), default=0.0, help="simnpo's margin; default 0 (paper, TOFU)")
    a("--beta2", type=NONNEGATIVE, default=1.0, help="satimp's exponent of 1 - p; default 1")
    a("--forget-weight", type=NONNEGATIVE, help="default 0.1375 (official code, TOFU forget05); "
      "satimp 0.1, others 1")
    a("--retain-weight", type=NONNEGATIVE, default=1.0, help="default 1 (official code)")
    a = parser.add_argument_group("optimization (defaults: the official TOFU code's)").add_argument
    a("--epochs", type=COUNT, help="passes over --forget, else --retain; default 10")
    a("--batch-size", type=COUNT, help="forget and as many retain sequences a step; default 32")
    a("--lr", type=POSITIVE, help="peak learning rate of AdamW; default 1e-5")
    a("--weight-decay", type=NONNEGATIVE, default=0.01, help="of matrices; default 0.01")
    a("--warmup-epochs", type=NONNEGATIVE, default=1.0, help="linear warm-up; default 1")
    a("--schedule", choices=["linear", "constant"], default="linear", help="linear decay to 0 "
      "(TOFU, default), or constant without warm-up (MUSE)")
    a("--clip", type=POSITIVE, default=1.0, help="gradient norm; default 1 (official: none)")
    a("--seed", type=number(int, low=0), default=0, help="random seed; default 0")
    a = parser.add_argument_group("speed and memory (the same results up to rounding)").add_argument
    a("--max-tokens", type=COUNT, help="padded tokens a micro-batch; default 16384, CPU 1024")
    a("--dtype", choices=list(DTYPES), help="of matrix products, master weights stay fp32; "
      "default: bf16 on GPUs that have it, else fp16; fp32 on a CPU")
    a("--bf16-weights", action="store_true", help="weights and moments in bf16: half the memory")
    a("--checkpointing", action="store_true", help="recompute activations in backward")
    a("--compile", action="store_true", help="torch.compile the decoder")
    a("--device", default=distributed.DEVICE, help="default: a GPU if there is one, else cpu")
    a = parser.add_argument_group("output").add_argument
    a("--output", type=nonempty, help="folder of model and metrics.jsonl; default: a name in runs/")
    a("--save-every", type=interval, default=(1, True), metavar="N", help="steps (100) or epochs "
      "(2epochs) between checkpoints, of which the last is kept; default 1epoch, 0: none")
    a("--snapshots", type=interval, default=(0, False), metavar="N", help="steps or epochs between "
      "copies of the model, kept as OUTPUT/step-N; default 0: none")
    a("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    return parser


def arguments(argv):
    """Parse and check the flags; return them with every default filled in."""
    args = flags().parse_args(argv)
    require(not (args.model and args.init), "--model and --init: give one of them")
    require(args.forget or args.retain, "give --forget to unlearn or --retain to fine-tune")
    require(args.forget or args.retain_loss == "nll", "--retain-loss needs --forget")
    require(not args.bf16_weights or args.dtype != "fp16", "--bf16-weights with --dtype fp16")
    if args.forget and args.retain_loss == "none":
        args.retain = None
    elif args.forget and not args.retain:
        args.retain = str(retain_beside(find(args.forget)))
    name = f"{Path(args.forget).stem}-{args.loss}" if args.forget else Path(args.retain).stem
    args.output = Path(args.output or f"runs/{name}")
    cuda = args.device.startswith("cuda")
    bf16 = args.bf16_weights or cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    best = ("bf16" if bf16 else "fp16") if cuda else "fp32"
    defaults = {"dtype": best, "max_tokens": 16384 if cuda else 1024}
    defaults |= OFFICIAL | LOSSES[args.loss].defaults
    if not (args.model or args.init):
        args.model, suited = miniature.start_model(args)
        defaults |= suited
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# The run

class State(NamedTuple):
    """What a step changes and a checkpoint holds."""
    model: nn.Module  # an AnswerModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but for fp16


@one_line_errors
def main(argv=None):
    """One run, from arguments to the finished folder. Returns the exit status."""
    args = arguments(argv)
    distributed.start(args.device)
    with distributed.together():  # mistakes in the input surface here, before weights are read
        forget, retain, files = load_data(args)
        settings = vars(args) | {"forget data": run_folder.digest(forget),
                                 "retain data": run_folder.digest(retain)}
        run_folder.start_step(args.output, settings, args.resume)  # refuses before long work
        if miniature.is_start_model(args):
            miniature.make(Path(args.model))
        settings["start"] = models.fingerprint(args.init or args.model)
        start = run_folder.start_step(args.output, settings, args.resume)
    distributed.agree(args.output, settings)
    start = distributed.from_first(start)
    if start is None:
        distributed.say(f"{args.output}: this run is complete")
        return 0
    state, empty = build(args)
    borders = models.rope_borders(state.model.lm)  # lengths that LongRoPE sets apart in a batch
    # NPO's reference is the start model, so it is scored before a checkpoint is loaded.
    ref_logps = score(state.model, forget, args) if LOSSES[args.loss].needs_reference else None

    n = len(forget or retain)
    batch = min(args.batch_size, n)  # every batch is full, passes follow each other without a gap
    epochs = {epoch * n // batch: epoch for epoch in range(args.epochs + 1)}  # {step: epochs done}
    total = max(epochs)

    with run_folder.session(args, settings, start, total) as (log, caught):
        run_folder.load_checkpoint(state, args.output, start)
        step = start
        while True:  # here `step` steps are done
            if step in epochs and (step > start or step == 0):  # a resumed run's log has `start`
                log(step=step, epoch=epochs[step], **probe(state.model, forget, retain, args))
            if step > start and is_due(args.snapshots, step, epochs):
                models.save_model(state.model.lm, empty, files, args.output / f"step-{step:06d}")
            stop = distributed.any_rank(caught, args.device)
            due = step < total and is_due(args.save_every, step, epochs)
            if step > start and (stop or due):
                run_folder.save_checkpoint(state, args.output, step)
            if stop:
                distributed.say(f"Stopped after step {step} of {total}; --resume goes on with it")
                return 128 + (caught[0] if caught else signal.SIGTERM)  # as shells report it
            if step >= total:
                break

            began, losses = time.time(), torch.zeros(2, device=args.device)
            # Dropout, stochastic rounding and the batch are functions of (seed, step), so that a
            # resumed run needs no random state. Forget and retain sets have streams of their own.
            torch.manual_seed(args.seed * 1_000_003 + step)
            forget_indices = draw(len(forget), step * batch, batch, 2 * args.seed)
            retain_indices = draw(len(retain), step * batch, batch, 2 * args.seed + 1)

            # Each micro-batch divides by the whole step's count, so that the gradient does not
            # depend on how the step is split.
            for indices, scale in micro_batches(forget, forget_indices, args.max_tokens, borders):
                loss = forget_losses(state.model, forget, indices, ref_logps, args)
                loss = loss.sum() * scale
                state.scaler.scale(args.forget_weight * loss).backward()
                losses[0] += loss.detach()
            for indices, scale in micro_batches(retain, retain_indices, args.max_tokens, borders):
                loss = retain_losses(state.model, retain, indices, args)
                loss = loss.sum() * scale
                state.scaler.scale(args.retain_weight * loss).backward()
                losses[1] += loss.detach()

            record = update(state, losses, learning_rate(args, step, total, n / batch), args)
            step += 1
            tokens = sum(len(forget[i].input_ids) for i in forget_indices)
            tokens += sum(len(retain[i].input_ids) for i in retain_indices)
            log(step=step, **record, tokens_per_s=round(tokens / (time.time() - began), 1))
        if not any(moments["step"] for moments in state.optimizer.state.values()):
            raise FloatingPointError("fp16 gradients overflowed in every step; begin anew in fp32")
        models.save_model(state.model.lm, empty, files, args.output)
        run_folder.finish(args.output, args.forget)
    return 0


def load_data(args):
    """The forget and retain Examples, checked; {name: content} of what is saved unchanged."""
    mini = miniature.is_start_model(args)  # which may not be made yet
    source = miniature.TOKENIZER if mini else args.init or args.model
    skeleton, tokenizer = models.load_skeleton(source, weights=bool(args.model and not mini))
    limit = min(models.context_length(skeleton), 2**20)
    length = args.max_length or min(limit, 2048)
    require(length <= limit, f"--max-length {length}: the model takes {limit} tokens at most")
    prompt = Prompt(args.template, args.system, args.date)
    forget, retain = (load_examples(path, tokenizer, length, prompt, models.vocabulary(skeleton))
                      if path else [] for path in (args.forget, args.retain))
    check_disjoint(forget, retain)
    return forget, retain, models.check_savable(source, skeleton)


def is_due(every, step, epochs):
    """Whether something done every so many steps, or epochs, is done after this step."""
    count, in_epochs = every
    done = epochs.get(step) if in_epochs else step
    return bool(count and done) and done % count == 0


# The pieces of a step. Data order is a function of (seed, step): a resumed run needs no more.

def draw(n, start, count, seed):
    """`count` indices from place `start` of the endless stream of shuffled passes over range(n)."""
    if n == 0:
        return []
    stream = []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        stream += torch.randperm(n, generator=generator).tolist()
    return stream[start % n:][:count]


def micro_batches(data, indices, max_tokens, borders=()):
    """This rank's share of data[indices] as [(indices, scale)]: micro-batches of like length, at
    most max_tokens with padding, none across a border (models.rope_borders).

    The sum of losses times scale over a rank's micro-batches, averaged over the ranks as FSDP
    averages gradients, is the mean over `indices`. FSDP needs equally many passes on each rank:
    one with fewer repeats the shortest Example with scale 0.
    """
    rank, world = distributed.rank(), distributed.world()
    order = sorted(indices, key=lambda i: len(data[i].input_ids), reverse=True)
    plans = []
    for part in (order[r::world] for r in range(world)):
        batches = length_batches([len(data[i].input_ids) for i in part], max_tokens, borders)
        plans.append([([part[i] for i in batch], world / len(indices)) for batch in batches])
    fillers = max(map(len, plans)) - len(plans[rank])
    return plans[rank] + [(order[-1:], 0.0)] * fillers


def forget_losses(model, forget, indices, ref_logps, args):
    """The loss of each forget sequence: (B,)."""
    loss = LOSSES[args.loss]
    ids, labels = on_device(forget, indices, args)
    tokens = model(ids, labels, loss.per_token)
    logps, lengths = sum_answers(tokens, labels)
    ref = ref_logps[indices] if ref_logps is not None else None
    return loss.function(Answers(logps, lengths, tokens, ref), args)


def retain_losses(model, retain, indices, args):
    """Mean nll of each answer's tokens, or mean KL(start model || model) at them: (B,)."""
    ids, labels = on_device(retain, indices, args)
    kl = model.reference is not None
    sums, lengths = sum_answers(model(ids, labels, kl=kl), labels)
    return (sums if kl else -sums) / lengths


def on_device(data, indices, args):
    """input_ids and labels of some Examples, as one batch: (B,T), (B,T)."""
    return [x.to(args.device) for x in collate([data[i] for i in indices])]


def learning_rate(args, step, total, per_epoch):
    """Linear warm-up, then linear decay to 0 one step after the last; or constant throughout."""
    if args.schedule == "constant":
        return args.lr
    warm = int(args.warmup_epochs * per_epoch)
    return args.lr * min((step + 1) / (warm + 1), (total - step) / max(1, total - warm))


def update(state, losses, lr, args):
    """Clip the gradient and take an optimizer step; returns what is logged of it.

    Raises FloatingPointError, and changes no weight, where loss or gradient are not finite. In fp16
    a gradient may overflow: that step is skipped and the loss scale halved, down to 1.
    """
    model, optimizer, scaler = state
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), args.clip)).item()
    losses = (distributed.summed(losses) / distributed.world()).tolist()
    if not all(map(math.isfinite, losses)) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise FloatingPointError(f"not finite: loss {losses}, gradient norm {norm}")
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    skipped = scaler.get_scale() < scale
    if skipped and scale <= 1:
        raise FloatingPointError("fp16 gradients overflow at every scale; begin anew in fp32")
    record = {"lr": lr, "grad_norm": norm if math.isfinite(norm) else None}  # JSON has no NaN
    if args.forget:
        record["forget_loss"] = losses[0]
    if args.retain:
        record["retain_loss"] = losses[1]
    return {**record, "skipped": True} if skipped else record


@torch.no_grad()
def score(model, data, args):
    """Log-probability of each Example's answer, (n,) on every rank."""
    logps = torch.zeros(len(data), device=args.device)
    model.eval()
    borders = models.rope_borders(model.lm)
    for indices, scale in micro_batches(data, range(len(data)), args.max_tokens, borders):
        ids, labels = on_device(data, indices, args)
        values, _ = sum_answers(model(ids, labels), labels)
        logps[indices] += values * (scale > 0)  # scale 0: a filler, which another rank scores
    model.train()
    if distributed.world() > 1:
        model.reshard()  # without a backward, FSDP leaves the root's parameters gathered
    return distributed.summed(logps)


def probe(model, forget, retain, args):
    """{"forget_prob", "retain_prob"}: the mean of p(answer)^(1/|answer|) over at most 100 evenly
    spread Examples of either set."""
    record = {}
    for name, data in (("forget_prob", forget), ("retain_prob", retain)):
        if data:
            data = data[::math.ceil(len(data) / 100)]
            lengths = torch.tensor([len(e.input_ids) - e.start for e in data], device=args.device)
            record[name] = (score(model, data, args) / lengths).exp().mean().item()
            if not math.isfinite(record[name]):
                raise FloatingPointError(f"{name} is not finite")
    return record


# Model and optimizer

class AnswerModel(nn.Module):
    """A language model whose forward returns the answers' log-probabilities, not logits: FSDP wraps
    this, so that the head runs within the sharded root. `autocast` is a dtype, or None for none."""

    def __init__(self, lm, reference=None, autocast=None):
        super().__init__()
        self.lm, self.reference, self.autocast = lm, reference, autocast

    def train(self, mode=True):
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()  # no dropout in what the KL term is measured against
        return self

    def forward(self, input_ids, labels, per_token=token_logps, kl=False):
        """Log-probability of each answer token (or what else per_token makes of logits), or
        KL(reference || model) there: (B,T) -> (N,)."""
        with torch.autocast(input_ids.device.type, self.autocast, self.autocast is not None):
            if kl:
                return answer_token_kl(self.lm, self.reference, input_ids, labels)
            return answer_token_logps(self.lm, input_ids, labels, per_token)


def answer_token_kl(model, reference, input_ids, labels):
    """KL(reference || model) at every answer token: (B,T), (B,T) -> (N,). Like
    answer_token_logps it never holds (B,T,V); no gradient reaches the reference."""
    def log_softmax(logits):
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def chunk_kl(head, hidden, ref_hidden):
        ref = log_softmax(head_logits(reference, ref_hidden)).detach()
        logps = log_softmax(head_logits(model, hidden, head))
        return F.kl_div(logps, ref, reduction="none", log_target=True).sum(-1)

    hidden, _ = answer_hidden(model, input_ids, labels)
    with torch.no_grad():
        ref_hidden, _ = answer_hidden(reference, input_ids, labels)
    return chunked(chunk_kl, model, hidden, ref_hidden)


def build(args):
    """The State: the model loaded, adapted and sharded, its optimizer and scaler; and the model
    without weights, for saving it."""
    source, seed = (args.init, args.seed) if args.init else (args.model, None)
    with distributed.together(), blame(source):
        dtype = torch.bfloat16 if args.bf16_weights else torch.float32
        lm, _ = models.load_pretrained(source, dtype, seed)
        check_head(lm)
        with_kl = args.forget and args.retain_loss == "kl"
        reference = copy.deepcopy(lm).requires_grad_(False) if with_kl else None
    autocast = DTYPES[args.dtype] if args.dtype != "fp32" and not args.bf16_weights else None
    shapes = {name: tensor.shape for name, tensor in models.savable_tensors(lm)}
    torch.manual_seed(args.seed)  # what `adapt` draws is the same on all ranks
    lm = adapt(lm, args)
    empty = models.empty_copy(lm, shapes)
    model = AnswerModel(lm, reference, autocast).train()
    if distributed.world() > 1:
        shard(model)  # layer by layer onto the card: no card holds the whole
    model.to(args.device)
    ids = torch.zeros(1, 4, dtype=torch.long, device=args.device)
    with distributed.together(), blame(source, "it cannot be trained"):
        model(ids, ids).sum().backward()  # a bad dropout, a missing compiler ... show here
    model.zero_grad()
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "fp16")
    return State(model, make_optimizer(lm, args), scaler), empty


def adapt(model, args):
    """The model that is trained: change it here, after the flags. Adapters (PEFT) are saved merged,
    frozen parameters stay as they are."""
    if args.checkpointing:
        with blame("--checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.get_decoder().compile(dynamic=True)
    return model


def shard(model):
    """FSDP2: each rank keeps a part of every parameter and gathers a layer when it computes it."""
    policy = MixedPrecisionPolicy(param_dtype=model.autocast, reduce_dtype=torch.float32)
    model.autocast = None  # FSDP casts
    for lm in filter(None, (model.lm, model.reference)):
        # The first list of modules is the decoder's stack of layers.
        for layer in next(m for m in lm.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def make_optimizer(lm, args):
    """AdamW, whose weight decay is for matrices only (not for norms and biases)."""
    parameters = [p for p in lm.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    if args.bf16_weights:
        return StochasticAdamW(groups, args.lr)
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


if __name__ == "__main__":
    sys.exit(main())
