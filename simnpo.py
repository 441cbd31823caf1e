"""SimNPO and its relatives: log-probabilities of answers, and the losses on them.

    SimNPO(x, y) = -(2/beta) * log sigmoid( -(beta/|y|) * log pi(y|x) - gamma )

for a prompt x, an answer y of |y| tokens (the closing EOS counts) and the model's log pi(y|x). Fan
et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
arXiv 2410.07163. Only torch is needed: copy the file, or the part down to the marked line.

Shapes: B sequences of T tokens, N answer tokens in all of them together, H hidden units, V words of
vocabulary. `labels` are `input_ids` with IGNORE wherever a token carries no loss (prompt, padding).
Padding belongs on the right: causal attention never looks right, so no attention mask is needed.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

IGNORE = -100


# The losses: pure functions of the log-probabilities of whole answers. Coming from other code: the
# official g and OpenUnlearning's delta are gamma/beta here; OpenUnlearning's gamma weighs forget.

def simnpo_loss(logps, lengths, beta, gamma=0.0):
    """SimNPO, one value a sequence (arXiv 2410.07163, eq. 4): (B,), (B,) -> (B,); take the mean.

    d loss / d logps = (2/|y|) * sigmoid(gamma + (beta/|y|) * logps): what is forgotten already
    weighs less, and so does a token of a long answer. As beta -> 0 at gamma = 0 the gradient
    becomes that of grad_ascent_loss.
    """
    return -(2 / beta) * F.logsigmoid(-beta * logps / lengths - gamma)


def npo_loss(logps, ref_logps, beta):
    """NPO, one value a sequence (Zhang et al., arXiv 2404.05868, eq. 3): (B,), (B,) -> (B,).

    `ref_logps` come from the model before unlearning. Sums over tokens, not means: there is no |y|.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (logps - ref_logps))


def grad_ascent_loss(logps, lengths):
    """Mean log-likelihood of each answer, to be minimised (with retain_nll: GradDiff): -> (B,)."""
    return logps / lengths


def retain_nll(logps, lengths):
    """Mean over retain sequences of the mean nll of their answer tokens: (B,), (B,) -> a number.

    The paper's runs had one sequence a device, where Hugging Face's mean over tokens is the same.
    """
    return -(logps / lengths).mean()


# Log-probabilities, the plain way: from logits.

def sequence_logps(logits, labels):
    """log pi(y|x) and |y| of each sequence: (B,T,V), (B,T) -> logps (B,), lengths (B,).

    The shift is made here: logits at position t score the label at t+1. The log-softmax is taken in
    fp32 at least. Raises ValueError when a sequence has no answer token.
    """
    mask = answer_mask(labels)
    return sum_answers(token_logps(logits[:, :-1][mask], labels[:, 1:][mask]), labels)


def answer_mask(labels):
    """Which positions predict an answer token: (B,T) -> (B,T-1). ValueError when a row has none."""
    mask = labels[:, 1:] != IGNORE
    if not mask.any(1).all():
        raise ValueError("a sequence without any answer token has no length-normalized loss")
    return mask


def sum_answers(values, labels):
    """Sum and number of each answer's token values: (N,), (B,T) -> sums (B,), lengths (B,)."""
    mask = answer_mask(labels)
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1), mask.sum(1)


def token_logps(logits, targets):
    """log pi(target) of each row, in fp32 at least: (N,V), (N,) -> (N,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


# ---- Copy down to here for the losses and the plain log-probabilities. ----
#
# Log-probabilities, the fast way: the head sees answer positions only, a chunk at a time.

def answer_logps(model, input_ids, labels):
    """Values and gradients of sequence_logps(model(input_ids).logits, labels), without (B,T,V).

    `model` is a Hugging Face causal language model; (B,T), (B,T) -> logps (B,), lengths (B,). Call
    `check_head` once on a model of unknown kind. ValueError when a sequence has no answer token.
    """
    return sum_answers(answer_token_logps(model, input_ids, labels), labels)


def answer_token_logps(model, input_ids, labels):
    """Log-probability of every answer token: (B,T), (B,T) -> (N,), sequence after sequence."""
    def chunk_logps(head, h, targets):
        return token_logps(head_logits(model, h, head), targets)

    return chunked(chunk_logps, model, *answer_hidden(model, input_ids, labels))


def answer_kl(model, reference, input_ids, labels):
    """KL(reference || model) summed over each answer: (B,T), (B,T) -> kl (B,), lengths (B,).

    The reference gets no gradient. Like answer_logps, it never holds (B,T,V).
    """
    return sum_answers(answer_token_kl(model, reference, input_ids, labels), labels)


def log_softmax(logits):
    """In fp32 at least: (N,V) -> (N,V)."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def answer_token_kl(model, reference, input_ids, labels):
    """KL(reference || model) at every answer token: (B,T), (B,T) -> (N,)."""
    def token_kl(head, h, ref_h):
        with torch.no_grad():
            ref = log_softmax(head_logits(reference, ref_h))
        logps = log_softmax(head_logits(model, h, head))
        return F.kl_div(logps, ref, reduction="none", log_target=True).sum(-1)

    hidden, _ = answer_hidden(model, input_ids, labels)
    with torch.no_grad():
        ref_hidden, _ = answer_hidden(reference, input_ids, labels)
    return chunked(token_kl, model, hidden, ref_hidden)


def answer_hidden(model, input_ids, labels):
    """Last hidden states where answer tokens are predicted: (B,T), (B,T) -> (N,H), targets (N,)."""
    mask = answer_mask(labels)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][mask], labels[:, 1:][mask]


def head_logits(model, hidden, head=None):
    """The model's own logits of hidden states, scaling and soft-capping included: (N,H) -> (N,V).

    `head` stands for the model's output embeddings, if given.
    """
    own, config = model.get_output_embeddings(), model.config.get_text_config()
    if not torch.is_autocast_enabled(hidden.device.type):  # a head may be kept in fp32
        hidden = hidden.to(own.weight.dtype)
    logits = (head or own)(hidden)
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def check_head(model):
    """ValueError unless head_logits(answer_hidden(...)) are the model's own logits, tried on a few
    tokens. Its modules stay in training mode or not, as they are."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(2, 18, device=embedding.weight.device).view(2, 8) % embedding.num_embeddings
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make any two forwards differ
    try:
        expected = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        got = head_logits(model, answer_hidden(model, ids, ids)[0])
    finally:
        for module in training:
            module.training = True
    largest = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else 0
    tolerance = float(max(1e-4, 2 * torch.finfo(expected.dtype).eps) * largest)
    if not torch.allclose(got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(f"{type(model).__name__} turns hidden states into logits in a way that "
                         "simnpo.head_logits does not know; add its scaling there, or use "
                         "sequence_logps on model(...).logits")


def chunk_rows(model, elements=None):
    """How many hidden states go through the head at once: their logits hold `elements` numbers.

    Backward passes over the head's whole gradient for every chunk; a GPU, where that would be most
    of the time, gets chunks of 0.5 GB (fp32) instead of 64 MB.
    """
    weight = model.get_output_embeddings().weight
    return max(1, (elements or (2**27 if weight.is_cuda else 2**24)) // weight.shape[0])


def chunked(function, model, hidden, other, elements=None):
    """function(head, hidden, other), computed for chunk_rows(model, elements) rows at a time.

    One chunk of logits is alive at a time, whatever N and V are: backward begins with the last one,
    which is simply kept, and computes the others again. So the remainder comes first.
    """
    rows, n = chunk_rows(model, elements), len(hidden)
    sizes = [n % rows] * (n % rows > 0) + [rows] * (n // rows)
    head, hidden = summing_head(model.get_output_embeddings(), hidden)
    *early, last = zip(hidden.split(sizes), other.split(sizes))
    again = dict(use_reentrant=False, preserve_rng_state=False)
    values = [checkpoint(function, head, *chunk, **again) for chunk in early]
    return torch.cat([*values, function(head, *last)])


def summing_head(head, hidden):
    """A head that adds its weight's gradient up in place, and the hidden states to call it with.

    Its weight is detached: a hook on each chunk's logits adds the chunk's part to `total`, in the
    logits' type as autograd would, and WithGradient, which backward reaches after all chunks,
    hands `total` to the weight.

    Autograd by itself has three copies of that gradient while it adds them up, and with a large
    vocabulary no tensor is larger. Heads that are no plain nn.Linear (LoRA) are left to it.
    """
    plain = type(head) is nn.Linear and head.weight.requires_grad
    if not (torch.is_grad_enabled() and plain):
        return head, hidden
    weight, device, total = head.weight.detach(), head.weight.device.type, []
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))  # once, not once a chunk

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
    """The hidden states as they are; in backward `weight` gets what is in `total` by then."""

    @staticmethod
    def forward(ctx, hidden, weight, total):
        ctx.total = total
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: what `add` did has no graph
            raise RuntimeError("these log-probabilities can be differentiated only once")
        return grad, ctx.total.pop(), None
