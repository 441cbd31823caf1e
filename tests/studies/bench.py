r"""Speed and memory of one unlearning step: this project beside plain re-statements of what
others do.

    python tests/studies/bench.py  # a 53M-parameter Llama, synthetic lengths
    python tests/studies/bench.py --data data/tofu/forget05 data/tofu/retain95  # the same on real sequences
    python tests/studies/bench.py --size 1B --device cuda --dtype bf16 \
        --variants a,b,c,d,c+checkpointing,c+compile
    python tests/studies/bench.py --size 7B --device cuda --bf16-weights --variants c --batch 32

Variants, all of them the same loss (SimNPO + retain nll), model and data, one round of each after
the other:
    a   every sequence padded to 500 tokens, attention mask, logits of all positions
        (Unlearn-Simple's way)
    b   padded to the longest of the batch, attention mask, logits of all positions
        (OpenUnlearning's way)
    c   this project: train.py's two loops over micro-batches
    d   b inside transformers.Trainer
a, b and d take forget and retain in separate forward passes, --micro sequences at a time.
`+checkpointing` and `+compile` after a name switch these on for that row.

Columns: time of forward and backward, and of the whole step with AdamW (median over the rounds);
peak memory above the model's own (weights, gradients, moments); non-padding tokens a second; useful
FLOPs / time as a share of the matrix-product peak measured in the same round (median over the
rounds: a shared machine's clock drifts); relative difference of loss and gradient from the first
row. Useful are

    3 * (2 * W * tokens + 2 * H * V * answer tokens
         + layers * sum over sequences of 2 * T^2 * heads * head size)

with W the weights of the decoder's matrices, and 3 for forward and backward: non-padding tokens
only, causal attention at half of its square, the head where an answer is predicted, nothing for
what is computed twice. The random weights are not trained (learning rate 0): every round starts
from the same model. On a CPU peak memory is the kernel's VmHWM in a fresh process per row (Linux
only); on a GPU it is torch.cuda.max_memory_allocated.
"""

import argparse
import contextlib
import gc
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data.load import Example, read_records  # noqa: E402
from train import DTYPES  # noqa: E402

SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "1M": (128, 384, 4, 4, 4, 1024, False),
    "50M": (512, 1536, 6, 8, 8, 32_000, False),
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2 1B
    "7B": (4096, 11_008, 32, 32, 32, 32_000, False),  # Llama 2 7B
}
BETA, FORGET_WEIGHT, PAD_TO = 2.5, 0.1375, 500


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--size", choices=SIZES, default="50M")
    a("--hidden", type=int, help="instead of the size's; the feed-forward width is 3 times it")
    a("--layers", type=int, help="instead of the size's")
    a("--vocab", type=int, help="instead of the size's, e.g. 32000 or 128256")
    a("--batch", type=int, default=8,
      help="forget sequences a step, and as many retain ones; default 8")
    a("--micro", type=int,
      help="sequences a forward pass of a, b and d; default all, as far as memory goes")
    a("--max-tokens", type=int, help="padded tokens a micro-batch of c; default train.py's")
    a("--data", nargs=2, metavar=("FORGET", "RETAIN"),
      help="question-answer files; default: lengths like TOFU's")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--dtype", choices=list(DTYPES), default="fp32",
      help="of matrix products (autocast); default fp32")
    a("--bf16-weights", action="store_true",
      help="weights, gradients and moments in bf16, stochastic rounding")
    a("--checkpointing", action="store_true", help="on in every row")
    a("--compile", action="store_true", help="on in every row")
    a("--steps", type=int, default=3, help="timed rounds after one of warm-up; default 3")
    a("--variants", default="a,b,c")
    a("--no-memory", action="store_true",
      help="skip the peak memory, which takes a process per row on a CPU")
    a("--memory-of", help=argparse.SUPPRESS)  # what that process is called with
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.max_tokens = args.max_tokens or (16384 if args.device.type == "cuda" else 1024)
    args.micro = args.micro or args.batch
    # what train.py's functions read
    vars(args).update(loss="simnpo", retain_loss="nll", forget=True, beta=BETA, gamma=0.0,
                      forget_weight=FORGET_WEIGHT, retain_weight=1.0, lr=0.0, weight_decay=0.0)
    return args


# Data and model

def make_data(args, vocab):
    """Forget and retain Examples with ids below vocab."""
    if not args.data:
        rng = random.Random(0)
        return [[synthetic(rng, vocab) for _ in range(n)] for n in (200, 400)]
    files = [read_records(path) for path in args.data]
    texts = [text for records in files for r in records for text in (r["question"], r["answer"])]
    encode = trained_bpe(texts, vocab)
    return [[example(encode, r) for r in records] for records in files]


def synthetic(rng, vocab):
    """A sequence as long as TOFU's are: 64 tokens on average, 105 at most, 36 of them answer."""
    length = max(25, min(105, round(rng.gauss(64, 14))))
    return Example([rng.randrange(vocab) for _ in range(length)], round(length * 28 / 64))


def trained_bpe(texts, vocab):
    """A byte-level BPE trained on the texts; 5,000 tokens give TOFU the lengths that Llama 2's
    tokenizer gives it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=min(vocab - 2, 5000), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(texts, trainer)
    spread = vocab // 5000 or 1  # use the whole embedding
    return lambda text: [2 + i * spread % (vocab - 2) for i in raw.encode(text).ids]


def example(encode, record):
    prompt = [0] + encode(f"Question: {record['question']}\nAnswer:")
    return Example(prompt + encode(" " + record["answer"]) + [1], len(prompt))


def make_model(args):
    from transformers import LlamaConfig, LlamaForCausalLM
    hidden, inner, layers, heads, kv_heads, vocab, tied = SIZES[args.size]
    if args.hidden:
        hidden, inner = args.hidden, 3 * args.hidden
        heads = kv_heads = args.hidden // 64 or 1
    config = LlamaConfig(vocab_size=args.vocab or vocab, hidden_size=hidden,
                         intermediate_size=inner, num_hidden_layers=args.layers or layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads,
                         tie_word_embeddings=tied, max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16 if args.bf16_weights else torch.float32)
    return model.train()


# The variants: each adds the gradient of a step's loss to the parameters and returns the loss.

def padded(examples, width, device):
    """input_ids, attention mask and labels, right-padded to width: three (B,T)."""
    ids, mask, labels = (torch.full((len(examples), width), fill, device=device)
                         for fill in (0, 0, -100))
    for row, e in enumerate(examples):
        n = len(e.input_ids)
        ids[row, :n], mask[row, :n] = torch.tensor(e.input_ids), 1
        labels[row, e.start:n] = torch.tensor(e.input_ids[e.start:])
    return ids, mask, labels


def full_logits_nll(model, ids, mask, labels):
    """nll summed over each answer, and its length, from logits at every position: (B,), (B,)."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:],
                                            ignore_index=-100, reduction="none")
    return nll.sum(1), (labels[:, 1:] != -100).sum(1)


def full_logits_losses(model, forget, retain, width, args, precision):
    """Yields the parts of the loss, --micro sequences at a time, forget first; they add up to the
    step's loss."""
    for examples, is_forget in ((forget, True), (retain, False)):
        for i in range(0, len(examples), args.micro):
            part = examples[i:i + args.micro]
            with precision():
                longest = max(len(e.input_ids) for e in part)
                inputs = padded(part, width or longest, args.device)
                nll, lengths = full_logits_nll(model, *inputs)
            if is_forget:
                losses = -2 / BETA * torch.nn.functional.logsigmoid(BETA * nll / lengths)
                yield FORGET_WEIGHT * losses.sum() / len(forget)
            else:
                yield (nll / lengths).sum() / len(retain)


def step_full_logits(model, forget, retain, width, args, precision):
    total = 0.0
    for loss in full_logits_losses(model, forget, retain, width, args, precision):
        loss.backward()
        total += loss.detach()
    return float(total)


def step_ours(model, forget, retain, args):
    """The two loops of train.main."""
    wrapped, total = train.AnswerModel(model, autocast=mixed_dtype(args)), 0.0
    for at, share in train.micro_batches(forget, range(len(forget)), args.max_tokens):
        losses = train.forget_losses(wrapped, forget, at, None, args)
        loss = args.forget_weight * share * losses.sum()
        loss.backward()
        total += loss.detach()
    for at, share in train.micro_batches(retain, range(len(retain)), args.max_tokens):
        loss = args.retain_weight * share * train.retain_losses(wrapped, retain, at, args).sum()
        loss.backward()
        total += loss.detach()
    return float(total)


def mixed_dtype(args):
    """What matrix products are computed in where that is not the weights' own type."""
    return DTYPES[args.dtype] if args.dtype != "fp32" and not args.bf16_weights else None


def step_trainer(model, forget, retain, args, optimizer):
    """One step of transformers.Trainer, its own gradient accumulation unused: returns loss and its
    two times."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        times = {}

        def on_step_begin(self, *_, **__):
            self.times["begin"] = now(args)

        def on_pre_optimizer_step(self, *_, **__):
            self.times["backward"] = now(args)
            self.gradient = gradient_sample(model)
            self.times["sampled"] = now(args)

        def on_step_end(self, *_, **__):
            self.times["end"] = now(args)

    class SimNPOTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            (f_nll, f_len), (r_nll, r_len) = (full_logits_nll(model, *inputs[key])
                                              for key in ("forget", "retain"))
            loss = -2 / BETA * torch.nn.functional.logsigmoid(BETA * f_nll / f_len)
            self.loss = FORGET_WEIGHT * loss.mean() + (r_nll / r_len).mean()
            return self.loss

    def collate(pairs):
        columns = {"forget": [f for f, _ in pairs], "retain": [r for _, r in pairs]}
        return {key: padded(part, max(len(e.input_ids) for e in part), "cpu")
                for key, part in columns.items()}

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(forget), max_steps=1,
            max_grad_norm=0, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, remove_unused_columns=False,
            bf16=args.dtype == "bf16" and not args.bf16_weights, fp16=args.dtype == "fp16",
            use_cpu=args.device.type == "cpu", dataloader_pin_memory=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        clock = Clock()
        trainer = SimNPOTrainer(model, settings, train_dataset=list(zip(forget, retain)),
                                data_collator=collate, callbacks=[clock],
                                optimizers=(optimizer, schedule))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    t = clock.times
    return trainer.loss.item(), t["backward"] - t["begin"], t["end"] - t["sampled"], clock.gradient


# Measuring

def now(args):
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)
    return time.perf_counter()


def gradient_sample(model, most=100_000):
    """Up to 100,000 evenly spread numbers of each parameter's gradient, in one CPU vector."""
    grads = (p.grad.flatten() for p in model.parameters())
    return torch.cat([g[::max(1, g.numel() // most)].float().cpu() for g in grads])


def set_options(model, options):
    """Switch checkpointing and compilation on or off, whatever the row before had."""
    if "checkpointing" in options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.get_decoder()._compiled_call_impl = None
    if "compile" in options:
        model.get_decoder().compile(dynamic=True)


def run_step(name, model, forget, retain, args, optimizer):
    """(loss, seconds of forward and backward, seconds of the optimizer, gradient sample) of one
    step of a row."""
    variant, *options = name.split("+")
    options += ["checkpointing"] * args.checkpointing + ["compile"] * args.compile
    set_options(model, options)
    for p in model.parameters():  # gradients belong to the model's own memory
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    if variant == "d":
        return step_trainer(model, forget, retain, args, optimizer)

    def precision():
        mixed = mixed_dtype(args)
        return torch.autocast(args.device.type, mixed) if mixed else contextlib.nullcontext()

    began = now(args)
    if variant == "c":
        loss = step_ours(model, forget, retain, args)
    else:
        width = PAD_TO if variant == "a" else None
        loss = step_full_logits(model, forget, retain, width, args, precision)
    middle = now(args)
    gradient = gradient_sample(model)
    stepping = now(args)
    optimizer.step()
    return loss, middle - began, now(args) - stepping, gradient


def matmul_peak(args, seconds=0.5):
    """FLOP/s of a large square matrix product in the bench's dtype: the best of several."""
    n = 8192 if args.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if args.bf16_weights else DTYPES[args.dtype]
    x, y = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    best, began = float("inf"), now(args)
    while now(args) - began < seconds:
        start = now(args)
        for _ in range(3):
            x @ y
        best = min(best, (now(args) - start) / 3)
    return 2 * n ** 3 / best


def useful_flops(model, examples):
    """The formula above: FLOPs of forward and backward that any way of computing the loss needs."""
    config, decoder = model.config, model.get_decoder()
    weights = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    tokens = sum(len(e.input_ids) for e in examples)
    answers = sum(len(e.input_ids) - e.start for e in examples)
    squares = sum(len(e.input_ids) ** 2 for e in examples)
    width = config.num_attention_heads * config.head_dim
    return 3 * (2 * weights * tokens + 2 * config.hidden_size * config.vocab_size * answers
                + config.num_hidden_layers * 2 * squares * width)


def status_bytes(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_of_step(name, model, batch, args, optimizer):
    """Bytes above the model's own during forward, backward and optimizer step."""
    if args.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        run_step(name, model, *batch, args, optimizer)
        return torch.cuda.max_memory_allocated(args.device) - before
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run_step(name, model, *batch, args, optimizer)
    return status_bytes("VmHWM") - before


def peak_in_fresh_process(name):
    """The same, measured where no other row has left memory behind;
    None where the kernel does not tell."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"{name}: no peak memory: {reason}", file=sys.stderr)
        return None
    return int(result.stdout.split()[-1])


def batches(forget, retain, args):
    """The batch of each round."""
    def part(data, step, seed):
        return [data[i] for i in train.draw(len(data), step * args.batch, args.batch, seed)]

    return [(part(forget, step, 0), part(retain, step, 1)) for step in range(args.steps + 1)]


def measure(model, rounds, args, optimizer, names):
    """{name: [(loss, backward seconds, optimizer seconds)]}, {name: gradient}, [peak FLOP/s], names
    that ran out of memory."""
    times, gradients, peaks, failed = {name: [] for name in names}, {}, [], set()
    for number, batch in enumerate(rounds):
        peaks.append(matmul_peak(args))
        for name in names:
            if name in failed:
                continue
            try:
                *row, gradient = run_step(name, model, *batch, args, optimizer)
            except torch.OutOfMemoryError:
                failed.add(name)
                print(f"{name}: out of memory", file=sys.stderr)
                continue
            times[name].append(row)
            gradients.setdefault(name, gradient)
            print(f"round {number} {name}: loss {row[0]:.6f}, {row[1]:.3f} + {row[2]:.3f} s",
                  file=sys.stderr)
    return times, gradients, peaks, failed


def print_table(model, rounds, times, gradients, peaks, memory):
    examples = [forget + retain for forget, retain in rounds[1:]]
    tokens = statistics.median(sum(len(e.input_ids) for e in batch) for batch in examples)
    attainable = [useful_flops(model, batch) / peak  # seconds
                  for batch, peak in zip(examples, peaks[1:])]
    print("| variant | forward + backward, s | step, s | peak memory, MB | tokens/s "
          "| share of peak | loss | gradient |")
    print("|---|---|---|---|---|---|---|---|")
    first = next(name for name in times if times[name])
    for name, rows in times.items():
        if not rows:
            print(f"| {name} | out of memory |" + " |" * 6)
            continue
        timed = rows[1:]
        seconds = statistics.median(r[1] for r in timed)
        whole = statistics.median(r[1] + r[2] for r in timed)
        loss = max(abs(r[0] - s[0]) / abs(s[0]) for r, s in zip(rows, times[first]))
        gradient = ((gradients[name] - gradients[first]).norm() / gradients[first].norm()).item()
        share = statistics.median(ideal / r[1] for ideal, r in zip(attainable, timed))
        used = "-" if memory.get(name) is None else f"{memory[name] / 1e6:,.0f}"
        print(f"| {name} | {seconds:.3f} | {whole:.3f} | {used} | {tokens / seconds:,.0f} | "
              f"{share:.1%} | {loss:.0e} | {gradient:.0e} |")


def describe(args, model, rounds, peaks):
    """What was run, on what, in two lines."""
    everything = [e for batch in rounds for part in batch for e in part]
    lengths = [len(e.input_ids) for e in everything]
    answers = statistics.mean(len(e.input_ids) - e.start for e in everything)
    import transformers
    machine = f"CPU, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    dtype = "bf16 weights" if args.bf16_weights else args.dtype
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}; "
          f"matrix-product peak {max(peaks) / 1e9:,.0f} GFLOP/s "
          f"(lowest round {min(peaks) / 1e9:,.0f})")
    print(f"Llama of {parameters / 1e6:,.1f}M parameters, vocabulary {model.config.vocab_size}, "
          f"{dtype}; {args.batch}+{args.batch} sequences of {statistics.mean(lengths):.0f} tokens "
          f"(longest {max(lengths)}, {answers:.0f} answer); a, b: {args.micro} sequences a pass; "
          f"c: {args.max_tokens} tokens a pass\n")


def main():
    args = parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # names that transformers 6 will change
    model = make_model(args)
    forget, retain = make_data(args, model.config.vocab_size)
    optimizer = train.make_optimizer(model, args)
    rounds = batches(forget, retain, args)
    if args.memory_of:
        # warm up on two sequences: libraries and threads, and the optimizer's moments
        run_step(args.memory_of, model, forget[:1], retain[:1], args, optimizer)
        print(peak_of_step(args.memory_of, model, rounds[1], args, optimizer))
        return
    names = args.variants.split(",")
    times, gradients, peaks, failed = measure(model, rounds, args, optimizer, names)
    memory = {}
    if not args.no_memory:
        for name in names:
            if name in failed:
                continue
            if args.device.type == "cuda":
                memory[name] = peak_of_step(name, model, rounds[1], args, optimizer)
            else:
                memory[name] = peak_in_fresh_process(name)
    describe(args, model, rounds, peaks)
    print_table(model, rounds, times, gradients, peaks, memory)


if __name__ == "__main__":
    main()
