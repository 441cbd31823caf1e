"""AdamW for weights, gradients and moments that are all kept in bf16 (--bf16-weights)."""

import torch
from torch.distributed.tensor import DTensor


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights with bf16 moments: fp32 arithmetic, stochastic rounding when stored.

    Rounding to nearest would lose every update smaller than 1/256 of a weight, and freeze the
    second moment (it moves by 1/1000 a step); rounded up or down at random in proportion, both are
    right on average.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:  # the names that torch's AdamW uses
                    state["step"] = torch.zeros((), device=p.device)
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                step = state["step"].item()
                stored = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                own = [t.to_local() if isinstance(t, DTensor) else t for t in stored]
                parts = [t.view(-1).split(2**24) for t in own]
                for chunk in zip(*parts):  # bounds the fp32 copies
                    self.update(*chunk, step, **group)

    def update(self, weight, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, **_):
        w, g, m, v = weight.float(), grad.float(), exp_avg.float(), exp_avg_sq.float()
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        scale = (v / (1 - betas[1] ** step)).sqrt_().add_(eps)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, scale, value=-lr / (1 - betas[0] ** step))
        for stored, value in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
            stored.copy_(stochastic_round(value))


def stochastic_round(x):
    """fp32 values rounded at random to a bf16 neighbour: add 16 random bits, cut 16."""
    bits = x.view(torch.int32)
    bits = bits + torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    return (bits & -(2**16)).view(torch.float32)
