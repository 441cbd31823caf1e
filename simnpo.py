"""SimNPO and its relatives: log-probabilities of answers, and the losses on them.

    SimNPO(x, y) = -(2/beta) * log sigmoid( -(beta/|y|) * log pi(y|x) - gamma )

for a prompt x, an answer y of |y| tokens (the closing EOS counts) and the model's log pi(y|x). Fan et al., "Simplicity
Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", arXiv 2410.07163. Only torch is needed, so
this file can be copied into another project as it stands.

Shapes: B sequences of T tokens, N answer tokens in all of them together, H hidden units, V words in the vocabulary.
`labels` are `input_ids` with IGNORE wherever a token carries no loss (the prompt and the padding). Padding belongs on
the right: causal attention never looks right, so no attention mask is needed and the fastest kernel applies. The
log-probabilities can be differentiated once; a second time raises RuntimeError.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

IGNORE = -100


# The losses: pure functions of the log-probabilities of whole answers.

def simnpo_loss(logps, lengths, beta, gamma=0.0):
    """SimNPO, one value a sequence (arXiv 2410.07163, eq. 4): (B,), (B,) -> (B,). The caller takes the mean.

    d loss / d logps = (2/|y|) * sigmoid(gamma + (beta/|y|) * logps): already forgotten answers weigh less, and long
    answers are not favoured. As beta -> 0 at gamma = 0 it becomes gradient ascent on logps/|y|.
    """
    return -(2 / beta) * F.logsigmoid(-beta * logps / lengths - gamma)


def npo_loss(logps, ref_logps, beta):
    """NPO, one value a sequence (Zhang et al., arXiv 2404.05868, eq. 3): (B,), (B,) -> (B,).

    `ref_logps` come from the model before unlearning. Sums over tokens, not means: there is no |y| here.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (logps - ref_logps))


def grad_ascent_loss(logps, lengths):
    """Mean log-likelihood of each answer, to be minimised: (B,), (B,) -> (B,). With `retain_nll` this is GradDiff."""
    return logps / lengths


def retain_nll(logps, lengths):
    """Mean negative log-likelihood over all retain answer tokens: (B,), (B,) -> a number."""
    return -logps.sum() / lengths.sum()


# Log-probabilities, the plain way: from logits.

def sequence_logps(logits, labels):
    """log pi(y|x) and |y| of each sequence: (B,T,V), (B,T) -> logps (B,), lengths (B,).

    The shift is made here: logits at position t score the label at t+1. The log-softmax is taken in fp32 at least.
    Raises ValueError when a sequence has no answer token.
    """
    mask = _answer_mask(labels)
    return _sum_rows(_TokenLogps.apply(logits[:, :-1][mask], labels[:, 1:][mask]), mask)


# Log-probabilities, the fast way: the head sees answer positions only, a chunk at a time.

def answer_logps(model, input_ids, labels):
    """The values and gradients of sequence_logps(model(input_ids).logits, labels), without ever holding (B,T,V).

    `model` is a Hugging Face causal language model; (B,T), (B,T) -> logps (B,), lengths (B,). Call `check_head` once
    on a model of unknown kind. Raises ValueError when a sequence has no answer token.
    """
    mask = _answer_mask(labels)
    return _sum_rows(answer_token_logps(model, input_ids, labels), mask)


def answer_token_logps(model, input_ids, labels):
    """Log-probability of every answer token: (B,T), (B,T) -> (N,), sequence after sequence."""
    hidden, targets = answer_hidden(model, input_ids, labels)
    return _chunked(lambda head, h, t: _TokenLogps.apply(head_logits(model, h, head), t), model, hidden, targets)


def answer_kl(model, reference, input_ids, labels):
    """KL(reference || model) summed over the answer tokens of each sequence: (B,T), (B,T) -> kl (B,), lengths (B,).

    The reference gets no gradient. Like answer_logps, it never holds (B,T,V).
    """
    mask = _answer_mask(labels)
    hidden, _ = answer_hidden(model, input_ids, labels)
    with torch.no_grad():
        ref_hidden, _ = answer_hidden(reference, input_ids, labels)

    def token_kl(head, h, ref_h):
        with torch.no_grad():
            ref = _log_softmax(head_logits(reference, ref_h))
        logps = _log_softmax(head_logits(model, h, head))
        return F.kl_div(logps, ref, reduction="none", log_target=True).sum(-1)

    return _sum_rows(_chunked(token_kl, model, hidden, ref_hidden), mask)


def answer_hidden(model, input_ids, labels):
    """Last hidden states at the positions that predict answer tokens: (B,T), (B,T) -> hidden (N,H), targets (N,)."""
    mask = _answer_mask(labels)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][mask], labels[:, 1:][mask]


def head_logits(model, hidden, head=None):
    """The model's own logits of hidden states, its scaling and soft-capping included: (N,H) -> (N,V).

    `head` stands for the model's output embeddings, if given.
    """
    config = model.config.get_text_config()
    logits = (head or model.get_output_embeddings())(hidden)
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def check_head(model):
    """Raise ValueError unless head_logits(answer_hidden(...)) are the model's own logits, tried on a few tokens."""
    ids = torch.arange(2, 18, device=model.get_input_embeddings().weight.device).view(2, 8)
    ids = ids % model.get_input_embeddings().num_embeddings
    training = model.training
    model.eval()  # dropout would make any two forwards differ
    expected = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    got = head_logits(model, answer_hidden(model, ids, ids)[0]).float()
    model.train(training)
    tolerance = 1e-2 * expected.nan_to_num().abs().max().item()
    if not torch.allclose(got, expected, rtol=1e-2, atol=tolerance, equal_nan=True):
        raise ValueError(f"{type(model).__name__} turns hidden states into logits in a way that simnpo.head_logits "
                         "does not know; add its scaling there, or use sequence_logps on model(...).logits")


def _answer_mask(labels):
    """Which positions predict an answer token: (B,T) -> (B,T-1). Raises ValueError when a row has none."""
    mask = labels[:, 1:] != IGNORE
    if not mask.any(1).all():
        raise ValueError("a sequence without any answer token has no length-normalized loss")
    return mask


def _log_softmax(logits):
    """In fp32 at least: (N,V) -> (N,V)."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _TokenLogps(torch.autograd.Function):
    """log pi(target) of each row: (N,V), (N,) -> (N,). As F.cross_entropy, with one tensor of (N,V) less in backward."""

    @staticmethod
    def forward(ctx, logits, targets):
        logps = _log_softmax(logits)
        ctx.save_for_backward(logps, targets)
        return logps.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logps, targets = ctx.saved_tensors
        slope = logps.exp().mul_(-grad[:, None])  # d logps[i] / d logits[i] = one-hot(target) - softmax
        return slope.scatter_add_(1, targets[:, None], grad[:, None]), None


def _sum_rows(values, mask):
    """Sum the values that stand at the True places of mask: (N,), (B,T) -> sums (B,), counts (B,)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1), mask.sum(1)


def chunk_rows(model, elements=None):
    """How many hidden states go through the head at once: their logits hold `elements` numbers.

    Backward reads and writes the head's whole gradient for every chunk; a GPU, where that would be most of the time, gets
    chunks of 0.5 GB (fp32) instead of 64 MB.
    """
    weight = model.get_output_embeddings().weight
    return max(1, (elements or (2**27 if weight.is_cuda else 2**24)) // weight.shape[0])


def _chunked(function, model, hidden, other, elements=None):
    """function(head, hidden, other), computed for chunk_rows(model, elements) rows at a time.

    One chunk of logits is alive at a time, whatever N and V are: the last one's are kept for backward, which begins with
    it, and those of the others are computed again. So the last chunk is a full one, and the remainder comes first.
    """
    rows, n = chunk_rows(model, elements), len(hidden)
    sizes = [n % rows] * (n % rows > 0) + [rows] * (n // rows)
    head, hidden = _summing_head(model.get_output_embeddings(), hidden)
    *early, last = zip(hidden.split(sizes), other.split(sizes))
    again = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.cat([*(checkpoint(function, head, *chunk, **again) for chunk in early), function(head, *last)])


def _summing_head(head, hidden):
    """A head that adds its weight's gradient up in place, chunk after chunk, and the hidden states to call it with.

    Autograd by itself has three copies of that gradient while it adds the chunks', and they are the largest tensors of
    all where the vocabulary is large. Heads that are no plain nn.Linear (LoRA) are left to it.
    """
    if not torch.is_grad_enabled() or type(head) is not nn.Linear or not head.weight.requires_grad:
        return head, hidden
    weight, device, total = head.weight.detach(), head.weight.device.type, []
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))  # once, not once a chunk

    def summing_head(h):
        def add(grad):
            if total:
                total[0].addmm_(grad.T, h.to(grad.dtype))
            else:
                total.append(grad.T @ h.to(grad.dtype))

        logits = functional_call(head, {"weight": weight}, (h,))
        logits.register_hook(add)
        return logits

    return summing_head, _WithGradient.apply(hidden, head.weight, total)


class _WithGradient(torch.autograd.Function):
    """The hidden states as they are. Backward comes here after all chunks, and gives `weight` what is in `total` by then."""

    @staticmethod
    def forward(ctx, hidden, weight, total):
        ctx.total = total
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, ctx.total.pop(), None
