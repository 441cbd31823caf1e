"""SimNPO and its relatives: the losses, and the log-probabilities of answers that they are made of.

    SimNPO(x, y) = -(2/beta) * log sigmoid( -(beta/|y|) * log pi(y|x) - gamma )

for a prompt x, an answer y of |y| tokens (the closing EOS counts) and the model's log pi(y|x). Fan
et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
arXiv 2410.07163. Only torch is needed: copy the file, or the part down to the marked line.

Shapes: B sequences of T tokens, N answer tokens in all, H hidden units, V words of vocabulary.
`labels` are `input_ids` with IGNORE wherever a token carries no loss (prompt, padding). Padding is
on the right: causal attention never looks right, so no attention mask is needed.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

IGNORE = -100


# The losses: pure functions of the log-probabilities of whole answers. In other codes' terms: the
# official g and OpenUnlearning's delta are gamma/beta; its gamma is the weight of the forget term.

def simnpo_loss(logps, lengths, beta, gamma=0.0):
    """SimNPO, one value a sequence (arXiv 2410.07163, eq. 4): (B,), (B,) -> (B,); take the mean.

    d loss / d logps = (2/|y|) * sigmoid(gamma + (beta/|y|) * logps): an answer weighs less once it
    is forgotten. As beta -> 0 at gamma = 0 the gradient becomes that of grad_ascent_loss.
    """
    return -(2 / beta) * F.logsigmoid(-beta * logps / lengths - gamma)


def npo_loss(logps, ref_logps, beta):
    """NPO, one value a sequence (Zhang et al., arXiv 2404.05868, eq. 3): (B,), (B,) -> (B,).

    `ref_logps` come from the model before unlearning. Both are sums over tokens, not means.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (logps - ref_logps))


def grad_ascent_loss(logps, lengths):
    """Mean log-likelihood of each answer; with retain_nll, GradDiff: (B,), (B,) -> (B,)."""
    return logps / lengths


def retain_nll(logps, lengths):
    """Mean over retain sequences of the mean nll of their answer tokens: (B,), (B,) -> a number."""
    return -(logps / lengths).mean()


# Log-probabilities, the plain way: from logits.

def sequence_logps(logits, labels):
    """log pi(y|x) and |y| of each sequence: (B,T,V), (B,T) -> logps (B,), lengths (B,).

    The shift is made here: logits at position t score the label at t+1. ValueError when a sequence
    has no answer token.
    """
    targets = labels[:, 1:]
    logps = token_logps(logits[:, :-1].flatten(0, 1), targets.flatten()).view_as(targets)
    return logps.sum(1), answer_mask(labels).sum(1)


def token_logps(logits, targets):
    """log pi(target), in fp32 at least, 0 where the target is IGNORE: (N,V), (N,) -> (N,)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


def answer_mask(labels):
    """Which positions predict an answer token: (B,T) -> (B,T-1). ValueError when a row has none."""
    mask = labels[:, 1:] != IGNORE
    if not mask.any(1).all():
        raise ValueError("a sequence has no answer token")
    return mask


# ---- Copy down to here for the losses and the plain log-probabilities. ----
#
# Log-probabilities, the fast way: the head sees answer positions only, a chunk at a time.

def answer_logps(model, input_ids, labels):
    """Values and gradients of sequence_logps(model(input_ids).logits, labels), without (B,T,V).

    `model` is a Hugging Face causal language model; (B,T), (B,T) -> logps (B,), lengths (B,). Call
    `check_head` once on a model of unknown kind.
    """
    return sum_answers(answer_token_logps(model, input_ids, labels), labels)


def sum_answers(values, labels):
    """Sum and number of each answer's token values: (N,), (B,T) -> sums (B,), lengths (B,)."""
    mask = answer_mask(labels)
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1), mask.sum(1)


def answer_token_logps(model, input_ids, labels, per_token=token_logps):
    """Log-probability of every answer token, or what else `per_token` makes of logits (N,V) and
    targets (N,): (B,T), (B,T) -> (N,), sequence after sequence."""
    def chunk_values(head, hidden, targets):
        return per_token(head_logits(model, hidden, head), targets)

    return chunked(chunk_values, model, *answer_hidden(model, input_ids, labels))


def answer_hidden(model, input_ids, labels):
    """Last hidden states where answer tokens are predicted: (B,T), (B,T) -> (N,H), targets (N,)."""
    mask = answer_mask(labels)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][mask], labels[:, 1:][mask]


def head_logits(model, hidden, head=None):
    """The model's own logits of hidden states, scaling and soft-capping included: (N,H) -> (N,V).

    `head` is called in place of the model's output embeddings, by `chunked`.
    """
    own, config = model.get_output_embeddings(), model.config.get_text_config()
    if not torch.is_autocast_enabled(hidden.device.type):  # which would cast: a head may be fp32
        hidden = hidden.to(own.weight.dtype)
    logits = (own if head is None else head)(hidden)
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def check_head(model):
    """Raise ValueError unless head_logits(answer_hidden(...)) are the model's own logits, tried on
    a few tokens. Call it in eval mode: with dropout no two forward passes agree."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(2, 18, device=embedding.weight.device).view(2, 8) % len(embedding.weight)
    expected = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    got = head_logits(model, answer_hidden(model, ids, ids)[0])
    largest = expected.nan_to_num(0, 0, 0).abs().max()
    tolerance = float(max(1e-4, 2 * torch.finfo(expected.dtype).eps) * largest)
    if not torch.allclose(got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(f"head_logits does not know how {type(model).__name__} makes logits of "
                         "hidden states: add it there, or use sequence_logps on its logits")


def chunk_rows(model):
    """How many hidden states go through the head at once: 64 MB of fp32 logits; 0.5 GB on a GPU,
    where passing over the head's whole gradient for each chunk would take most of the time."""
    weight = model.get_output_embeddings().weight
    return max(1, (2**27 if weight.is_cuda else 2**24) // weight.shape[0])


def chunked(function, model, hidden, other):
    """function(head, hidden, other), computed for chunk_rows(model) rows at a time.

    One chunk of logits is alive at a time. Backward computes each again but the last, whose logits
    are kept: that is a full one, since the remainder goes first.
    """
    rows, n = chunk_rows(model), len(hidden)
    sizes = [size for size in (n % rows, *[rows] * (n // rows)) if size]
    head, hidden = summing_head(model.get_output_embeddings(), hidden)
    *early, last = zip(hidden.split(sizes), other.split(sizes))
    values = [checkpoint(function, head, *chunk, use_reentrant=False, preserve_rng_state=False)
              for chunk in early]
    return torch.cat([*values, function(head, *last)])


def summing_head(head, hidden):
    """A head that adds its weight's gradient up in place, and the hidden states to call it with.

    Autograd would hold three (V,H) gradients, a third of a step's memory at 128,256 words
    (tests/BENCH.md). Here a hook on each chunk's logits adds to `total`; WithGradient, which
    backward reaches last, hands it to the weight. Heads like LoRA's are left to autograd.
    """
    plain = type(head) is nn.Linear and head.weight.requires_grad
    if not (torch.is_grad_enabled() and plain):
        return head, hidden
    weight, total = head.weight.detach(), []
    if torch.is_autocast_enabled(hidden.device.type):  # cast once, not once a chunk
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))

    def chunk_head(h):
        def add(grad):
            if total:
                total[0].addmm_(grad.T, h.to(grad.dtype))
            else:
                total.append(grad.T @ h.to(grad.dtype))

        logits = functional_call(head, {"weight": weight}, (h,))
        logits.register_hook(add)
        return logits

    return chunk_head, WithGradient.apply(hidden, head.weight, total)


class WithGradient(torch.autograd.Function):
    """The hidden states, unchanged; backward gives `weight` the sum that is in `total` by then."""

    @staticmethod
    def forward(ctx, hidden, weight, total):
        ctx.total = total
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: what `add` did has no graph
            raise RuntimeError("these log-probabilities can be differentiated only once")
        return grad, ctx.total.pop(), None
