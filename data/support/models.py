"""Model folders and hub names: opened safely or refused with a reason, saved as they were opened.

Only safetensors are read; no remote code runs.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging
from transformers.utils.hub import get_session, hf_hub_url, snapshot_download

from . import distributed
from .data_files import POINTER, POINTER_SAYS
from .errors import blame, require
from .run_folder import filling

logging.set_verbosity(logging.CRITICAL)  # what matters is said once, by InputError
if not sys.stderr.isatty():
    logging.disable_progress_bar()

SAFE = dict(trust_remote_code=False)
OWN_FILES = (".json", ".jinja", ".txt", ".model")  # of configs, tokenizer and chat template
# Weights that a causal model may have in its file and does not need: buffers, heads of values.
SPARE = re.compile(r"rotary_emb|inv_freq|attn\.(masked_)?bias$|^(v_head|value_head|score)\.")


# Opening

@functools.cache
def folder_of(path):
    """The folder of a model: `path`, or for a hub name the one into which its files are downloaded.

    If the hub does not answer within 10 s, what was downloaded before has to do. A program asks the
    hub once, so that all it reads is of one commit.
    """
    if Path(path).exists():
        return Path(path)
    offline = True
    with contextlib.suppress(Exception):  # whatever a network can do, or HF_HUB_OFFLINE
        get_session().head(hf_hub_url(path, "config.json"), timeout=10)
        offline = False
    with blame(path, "no such folder, and no model that the Hugging Face hub or its cache has"):
        files = [*(f"*{suffix}" for suffix in OWN_FILES), "model*.safetensors"]
        return Path(snapshot_download(path, allow_patterns=files, ignore_patterns="*/*",
                                      local_files_only=offline))


def load_pretrained(path, dtype=torch.float32):
    """The causal language model and tokenizer at a folder or hub name.

    Raises InputError for anything but a complete causal model with a tokenizer that has an EOS.
    """
    skeleton, tokenizer = load_skeleton(path)
    with blame(path, "the model cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder_of(path), config=skeleton.config, dtype=dtype, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True, **SAFE)
    wrong = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"]),
             *(name for name in info["unexpected_keys"] if not SPARE.search(name))}
    require(not wrong, f"{path}: config.json and weights do not belong together: {len(wrong)} "
            "weights are missing, of another shape or without a place in the model, "
            f"{min(wrong, default='')} first")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # else it changes if its file is written over in place
    check_causal(path, model)
    return model, tokenizer


def load_start(args, dtype):
    """The model that train.py starts from: --model, or --init's config with random weights."""
    if not args.init:
        return load_pretrained(args.model, dtype)[0]
    config = load_skeleton(args.init, weights=False)[0].config
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE).eval()
    check_causal(args.init, model)
    return model


def load_skeleton(path, weights=True):
    """The model at a folder or hub name without its weights (on the meta device), its tokenizer.

    Raises InputError for all that can be known before the weights are read. `weights`: whether
    there must be some.
    """
    check_folder(path, weights)
    config, tokenizer = load_config(path), load_tokenizer(path)
    with blame(path, "config.json describes no model that can be built"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **SAFE)
    size = vocabulary(model)
    require(tokenizer.eos_token_id < size, f"{path}: the EOS is token {tokenizer.eos_token_id}, "
            f"the model's embedding has only {size}; they do not belong together")
    return model, tokenizer


def load_config(path):
    with blame(path, "config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder_of(path), **SAFE)
        name = str((config.architectures or ["ForCausalLM"])[0])
    causal = name.endswith(("ForCausalLM", "LMHeadModel")) and not config.is_encoder_decoder
    require(causal, f"{path}: config.json: {name} is not a causal (left-to-right) language model, "
            "or holds one beside other parts; save that as a model of its own")
    return config


def load_tokenizer(path):
    with blame(path, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder_of(path), **SAFE)
        tokenizer("a b")
    require(len(tokenizer) > len(tokenizer.get_added_vocab()),  # transformers makes up an empty one
            f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model ...)")
    require(tokenizer.eos_token_id is not None,
            f"{path}: the tokenizer has no EOS token, so an answer has no end; set eos_token")
    return tokenizer


def vocabulary(model):
    return model.get_input_embeddings().weight.shape[0]  # an adapted one has it, too


def context_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def rope_borders(model):
    """The lengths beyond which the model turns all positions by another table (LongRoPE), which
    the longest text of a batch decides. Texts of both sides do not belong in one batch.

    "dynamic" tables change beyond the context only, where no text is taken.
    """
    tables = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    tables = [tables, *(table for table in tables.values() if isinstance(table, dict))]
    return [table["original_max_position_embeddings"] for table in tables
            if table.get("rope_type") == "longrope"]


# Refusing

def check_folder(path, weights):
    """Raise InputError unless a model's files are there themselves, as safetensors, and are all."""
    with blame(path):
        files = {file.name: file for file in folder_of(path).iterdir() if file.is_file()}
        pointer = [file for file in files.values() if POINTER.match(file.open("rb").read(1000))]
    require(not pointer, f"{pointer and pointer[0]}: {POINTER_SAYS}")
    # transformers would put an adapter on top of weights that may hold it already
    require("adapter_config.json" not in files, f"{path}: holds an adapter (adapter_config.json), "
            "which is not applied; save the model with it merged (peft's merge_and_unload) "
            "elsewhere, or move it away if that was done")
    held = {name for name in files if name.endswith(".safetensors")}
    require(held or not weights, f"{path}: no weights in this folder: only *.safetensors are read, "
            "no pickles (pytorch_model.bin ...), which could run any code")
    if "model.safetensors.index.json" in files:
        check_shards(files["model.safetensors.index.json"], held)


def check_shards(index, held):
    """Raise InputError unless all shards that an index names are among the safetensors that its
    folder holds, without a model.safetensors, which would be read instead.

    transformers alone would open a pickle that the index names, or a file elsewhere.
    """
    with blame(index, "cannot be read"):
        shards = {*json.loads(index.read_bytes())["weight_map"].values()}
    wrong = (shards - held) | ({"model.safetensors"} & (held - shards))
    require(not wrong, f"{index}: its shards must be the *.safetensors files in this folder; "
            f"{min(wrong, default='')!r} is only in one of the two")


def require_same(model, logits, expected, message):
    """Raise InputError with this message unless logits are alike to what rounding explains."""
    largest = expected.nan_to_num().abs().max().item()
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * largest
    require(torch.allclose(logits.float(), expected.float(), rtol=0, atol=tolerance,
                           equal_nan=True), message)


@torch.no_grad()
def check_causal(path, model):
    """Raise InputError when a token changes what is predicted before it, as in BERT."""
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=model.device) % vocabulary(model)
    with blame(path, f"{type(model).__name__} does not turn tokens into logits"):
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1]
    require_same(model, one, other, f"{path}: {type(model).__name__} looks at later tokens; not a "
                 "causal (left-to-right) language model")


@torch.no_grad()
def check_generation(path, model):
    """Raise InputError unless generate(), from its cache and beside padding, has the logits of a
    plain forward pass. (State-space models may go wrong: padding passes through their state.)"""
    ids = torch.arange(2, 13, device=model.device) % vocabulary(model)
    texts, padding = torch.stack([ids.roll(3), ids]), (3, 0)  # one batch, the first padded
    mask = torch.ones_like(texts)
    mask[0, :3] = 0
    with blame(path, f"{type(model).__name__} cannot generate"):
        new = model.generate(
            texts, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            num_beams=1, stop_strings=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True)
        plain = [model(input_ids=text[None, start:], use_cache=False).logits[0, -4:-1]
                 for text, start in zip(new.sequences, padding)]
    require_same(model, torch.stack(new.logits, 1), torch.stack(plain),
                 f"{path}: {type(model).__name__} gives other logits from its cache, or beside "
                 "padding, than without; what it generates cannot be trusted, so it is not "
                 "evaluated")


# Generating

def generation_batches(model, prompts, room, batch_size):
    """Index lists of prompts of equal room and like length (all wait while the longest is read).

    Of equal length where the generation_config looks back, which would take the padding for text,
    and where one may cross a border of its rotary tables, which a shorter one would reach later.
    """
    looks_back = any(getattr(model.generation_config, name, None) not in (None, 0, 1)
                     for name in ("repetition_penalty", "no_repeat_ngram_size", "min_length",
                                  "bad_words_ids", "sequence_bias"))
    border = min(rope_borders(model), default=2**31)

    def alike(i):
        length = len(prompts[i])
        exact = looks_back or length + room[i] > border
        return room[i], length if exact else length // 32 * 32

    order = sorted((i for i in range(len(prompts)) if room[i] > 0),
                   key=lambda i: (room[i], len(prompts[i])), reverse=True)
    batches = []  # the longest first, so that memory runs out at once or never
    for _, group in itertools.groupby(order, alike):
        group = list(group)
        batches += [group[i:i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def decode(tokenizer, sequences, **options):
    return [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True, **options)
            for ids in sequences]


class Finite(LogitsProcessor):
    """Changes nothing; notes for each step in which rows all logits were numbers."""

    def __init__(self):
        self.finite = []

    def __call__(self, input_ids, scores):
        self.finite.append(scores.amax(-1).isfinite())
        return scores


# Saving

def own_files(folder):
    """What a model folder holds besides weights: configs, tokenizer, chat template."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in OWN_FILES
            and file.is_file() and not file.name.startswith(".")
            and not file.name.endswith(("args.json", "eval.json", ".index.json"))]


def check_savable(path, model):
    """{name: content} of the files that unlearning does not change: configs and tokenizer."""
    require(not getattr(model.config, "quantization_config", None), f"{path}: its weights are "
            "quantized, and would be saved as they are trained; remove quantization_config and "
            "dequantize it first")
    return {file.name: file.read_bytes() for file in own_files(folder_of(path))}


def fingerprint(path):
    """What decides a model's answers, wherever it lies: a hash of a folder's configs, tokenizer
    and weights, or the commit that a hub name leads to."""
    folder, digest = folder_of(path), hashlib.sha256()
    if not Path(path).exists():
        return folder.name
    for file in [*own_files(folder), *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def save_model(state, files, folder):
    """Write a folder that from_pretrained opens: the weights, and the start model's own files."""
    weights = distributed.gathered(savable_tensors(state.model.lm))
    if distributed.first():
        plain = merged(state.empty, weights)
        weights = {name: tensor.detach() for name, tensor in savable_tensors(plain)}
        with filling(folder) as scratch:
            save_file(revert_weight_conversion(plain, weights), scratch / "model.safetensors",
                      {"format": "pt"})
            for name, content in files.items():
                (scratch / name).write_bytes(content)
    distributed.barrier()


def savable_tensors(model):
    """[(name, tensor)] of what a model's file holds, tied weights once."""
    persistent = model.state_dict().keys()
    return [(name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if name in persistent]


def empty_copy(model, expected):
    """A copy of an adapted model without its weights, which FSDP will have; save_model needs it.

    Raises InputError unless it merges into a plain model with the `expected` {name: shape}, and no
    adapter changes a weight that is used in two places.
    """
    empty = filled(model, {name: tensor.to("meta") for name, tensor in savable_tensors(model)})
    with blame("train.adapt", "the adapters cannot be merged"):
        plain = merged(empty, dict(savable_tensors(empty)))
    got = {name: tensor.shape for name, tensor in savable_tensors(plain)}
    wrong = [name for name, _ in got.items() ^ expected.items()]
    named = [*model.named_parameters(remove_duplicate=False)]
    uses = Counter(id(p) for _, p in named)
    wrong += [name for name, p in named
              if uses[id(p)] > 1 and re.search("base_layer|original_module", name)]
    require(not wrong, f"train.adapt: {min(wrong, default='')} could not be saved in a plain "
            "model; train its own weights, or adapters that merge into weights that are not tied")
    return empty


def merged(empty, weights):
    """The plain model of an empty copy and the weights {name: tensor} that belong to it."""
    if not hasattr(empty, "merge_and_unload"):
        return filled(empty, weights)
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # merging changes them
    return filled(empty, weights).merge_and_unload()


def filled(model, weights):
    """A copy of a model that has these weights {name: tensor} in place of its own."""
    copies = {}
    for name, own in savable_tensors(model):
        is_buffer = not isinstance(own, nn.Parameter)
        other = weights[name].detach()
        copies[id(own)] = other if is_buffer else nn.Parameter(other, own.requires_grad)
    return copy.deepcopy(model, copies)
