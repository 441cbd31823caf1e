"""Talking to the other processes under torchrun; without torchrun there is one, of rank 0."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from .errors import InputError, blame, first, require

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(name):
    """Check the device, make it this process's (its own card where there are several), and join the
    other processes, if torchrun has started them."""
    with blame(f"--device {name}"):
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.init()  # says why, where there is no GPU
            own = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device
            torch.cuda.set_device(own)  # what "cuda" means from here on
        torch.ones(1, device=device).item()
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextlib.contextmanager
def together():
    """An InputError inside, on whichever rank, is raised on all of them, the lowest rank's."""
    message = None
    try:
        yield
    except InputError as e:
        message = str(e)
    for told in on_all_ranks(message):
        require(not told, told)


def on_all_ranks(value):
    """Every rank's value, on every rank."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_first(value):
    """Rank 0's value, on every rank."""
    return on_all_ranks(value)[0]


def agree(place, settings):
    """Raise InputError, on all ranks, unless each has the settings that rank 0 has."""
    expected = from_first(settings)
    other = [key.replace("_", "-") for key in expected if settings.get(key) != expected[key]]
    with together():
        require(not other, f"{place}: rank {rank()} has another {', '.join(other)} than rank 0; "
                "all need the same arguments and files")


def summed(tensor):
    """The sum of the ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag, device):
    return summed(torch.tensor(float(bool(flag)), device=device)).item() > 0


def spread(function, model, items, *args):
    """function(model, items, *args), each rank doing its share; every rank gets all results, in
    the order of items."""
    results = on_all_ranks(function(model, items[rank()::world()], *args))
    return [results[i % world()][i // world()] for i in range(len(items))]


def say(text):
    """Print on rank 0 only, with ? for what stdout cannot show; stdout may be closed."""
    if first():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            print(text.encode(encoding, "replace").decode(encoding), flush=True)
        except BrokenPipeError:  # as in `python eval.py ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(batches, what):
    """A bar for what takes over a second; none when stderr is no terminal."""
    return tqdm(batches, desc=what, delay=1, leave=False, disable=not first() or None)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors):
    """{name: whole tensor on the CPU} on rank 0, one at a time; {} on the others. Raises
    FloatingPointError on all ranks when a number is not finite: that is never saved."""
    kept = {}
    for name, tensor in tensors:
        tensor = whole(tensor).detach()
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
        if first():
            kept[name] = tensor.cpu().contiguous()
    return kept


def placed(tensor, like):
    """Rank 0's whole tensor, laid out over the ranks as `like` is."""
    tensor = torch.empty(like.shape) if tensor is None else tensor
    tensor = tensor.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor
