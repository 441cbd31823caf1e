"""Models: opened from a folder or hub name, or refused with a reason, and saved. Only safetensors
are read; no remote code runs."""

import copy
import functools
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging
from transformers.utils.hub import get_session, hf_hub_url, snapshot_download

from . import distributed
from .data_files import POINTER, POINTER_SAYS
from .errors import blame, require
from .run_folder import digest, filling

logging.set_verbosity(logging.CRITICAL)  # what matters is said once, by InputError
if not sys.stderr.isatty():
    logging.disable_progress_bar()

SAFE = dict(trust_remote_code=False)
OWN_FILES = (".json", ".jinja", ".txt", ".model")  # configs, tokenizer, chat template
# Weights that a causal model may have in its file and does not need: buffers, heads of values.
SPARE = re.compile(r"rotary_emb|inv_freq|attn\.(masked_)?bias$|^(v_head|value_head|score)\.")


@functools.cache
def folder_of(path):
    """The folder of a model: `path`, or that of a hub name in the hub's cache, its files downloaded
    unless the hub does not answer within 10 s."""
    if Path(path).exists():
        return Path(path)
    try:
        get_session().head(hf_hub_url(path, "config.json"), timeout=10)
        offline = False
    except Exception:  # whatever a network can do, or HF_HUB_OFFLINE
        offline = True
    with blame(path, "no such folder, and no model that the Hugging Face hub or its cache has"):
        files = [*(f"*{suffix}" for suffix in OWN_FILES), "model*.safetensors"]
        return Path(snapshot_download(path, allow_patterns=files, ignore_patterns="*/*",
                                      local_files_only=offline))


def load_pretrained(path, dtype=torch.float32, seed=None):
    """The causal language model and tokenizer at a folder or hub name; with a seed, the weights are
    random. InputError unless the model is complete and causal, its tokenizer with an EOS."""
    skeleton, tokenizer = load_skeleton(path, weights=seed is None)
    if seed is None:
        with blame(path, "the model cannot be loaded"):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder_of(path), config=skeleton.config, dtype=dtype, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **SAFE)
        wrong = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"]),
                 *(name for name in info["unexpected_keys"] if not SPARE.search(name))}
        require(not wrong, f"{path}: {len(wrong)} weights are missing, of another shape or unknown "
                f"to config.json: {min(wrong, default='')} ...; they do not belong together")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # else it changes if its file is written over
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(skeleton.config, dtype=dtype, **SAFE).eval()
    check_causal(path, model)
    return model, tokenizer


def load_skeleton(path, weights=True):
    """The model at a folder or hub name without its weights (on the meta device), its tokenizer.
    Raises InputError for all that can be known before the weights, if needed, are read."""
    check_folder(path, weights)
    with blame(path, "config.json describes no model that can be built"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder_of(path), **SAFE)
        name = str((config.architectures or ["ForCausalLM"])[0])
        model = AutoModelForCausalLM.from_config(config, **SAFE)
    causal = name.endswith(("ForCausalLM", "LMHeadModel")) and not config.is_encoder_decoder
    require(causal and context_length(model) > 0, f"{path}: config.json: {name} is not a causal "
            "(left-to-right) model of text alone, or has no positions")
    tokenizer, size = load_tokenizer(path), vocabulary(model)
    require(tokenizer.eos_token_id < size, f"{path}: the EOS is token {tokenizer.eos_token_id}, "
            f"the model's embedding has only {size}; they do not belong together")
    return model, tokenizer


def load_tokenizer(path):
    with blame(path, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder_of(path), **SAFE)
        tokenizer("a b")
    require(len(tokenizer) > len(tokenizer.get_added_vocab()),
            f"{path}: no tokenizer in this folder")  # transformers makes up one without words
    require(tokenizer.eos_token_id is not None,
            f"{path}: the tokenizer has no EOS token, so an answer has no end; set eos_token")
    return tokenizer


def vocabulary(model):
    return model.get_input_embeddings().weight.shape[0]  # an adapted one has it, too


def context_length(model):
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return 2**31 if positions is None else positions


def rope_borders(model):
    """The lengths beyond which LongRoPE turns a whole batch by another table, if its longest text
    is longer: a batch has texts of one side only."""
    tables = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [table["original_max_position_embeddings"] for table in (tables, *tables.values())
            if isinstance(table, dict) and table.get("rope_type") == "longrope"]


def check_folder(path, weights):
    """Raise InputError unless all files of a model are in its folder themselves, the weights as
    safetensors: transformers would open a pickle that an index names, or a file elsewhere."""
    with blame(path):
        files = {file.name: file for file in folder_of(path).iterdir() if file.is_file()}
        for file in files.values():
            require(not POINTER.match(file.open("rb").read(1000)), f"{file}: {POINTER_SAYS}")
        held = {name for name in files if name.endswith(".safetensors")}
        index = files.get("model.safetensors.index.json")
        shards = {*json.loads(index.read_bytes())["weight_map"].values()} if index else held
    require("config.json" in files, f"{path}: no config.json: no model, or one that is half made")
    # transformers would put an adapter on top of weights that may hold it already
    require("adapter_config.json" not in files, f"{path}: holds an adapter (adapter_config.json); "
            "save the model with it merged elsewhere, or move it away if that was done")
    require(held or not weights, f"{path}: no weights in *.safetensors in this folder; pickles "
            "(pytorch_model.bin ...), which could run any code, are not read")
    wrong = (shards - held) | ({"model.safetensors"} & (held - shards))  # it would be read instead
    require(not wrong, f"{index}: its shards must be the *.safetensors files in this folder; "
            f"{min(wrong, default='')!r} is only in one of the two")


@torch.no_grad()
def check_causal(path, model):
    """Raise InputError when a token changes what is predicted before it, as in BERT."""
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=model.device) % vocabulary(model)
    with blame(path, f"{type(model).__name__} is not a causal (left-to-right) language model"):
        require_same(model, *model(input_ids=ids, use_cache=False).logits[:, :-1])


@torch.no_grad()
def check_generation(path, model):
    """Raise InputError unless generate(), from its cache and beside padding, has the logits of a
    plain forward pass. (State-space models may go wrong: padding passes through their state.)"""
    ids = torch.arange(2, 13, device=model.device) % vocabulary(model)
    texts = torch.stack([ids.roll(3), ids])
    mask = torch.ones_like(texts)
    mask[0, :3] = 0  # the padding of the first
    with blame(path, f"what {type(model).__name__} generates cannot be trusted"):
        ends = torch.tensor(model.generation_config.eos_token_id or 0)  # one token id, or a list
        require(ends.ndim < 2, f"{path}: eos_token_id of its generation config holds lists")
        new = model.generate(
            texts, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            num_beams=1, stop_strings=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True)
        plain = [model(input_ids=text[None], use_cache=False).logits[0, -4:-1]
                 for text in (new.sequences[0, 3:], new.sequences[1])]
        require_same(model, torch.stack(new.logits, 1), torch.stack(plain))


def require_same(model, logits, expected):
    """Raise AssertionError unless logits of a model are equal up to rounding."""
    largest = expected.nan_to_num().abs().max().item()
    torch.testing.assert_close(
        logits.float(), expected.float(), rtol=0, equal_nan=True,
        atol=max(1e-4, 4 * torch.finfo(model.dtype).eps) * largest)


def generation_batches(model, prompts, room, batch_size):
    """Index lists of prompts of equal room and like length, the longest first. Of equal length if
    the generation_config looks back, which would take the padding for text, or where one may cross
    a border of the rotary tables, which a shorter one would reach later."""
    looks_back = any(getattr(model.generation_config, name, None) not in (None, 0, 1)
                     for name in ("repetition_penalty", "no_repeat_ngram_size", "min_length",
                                  "bad_words_ids", "sequence_bias"))
    border = min(rope_borders(model), default=2**31)

    def alike(i):
        exact = looks_back or len(prompts[i]) + room[i] > border
        return room[i], len(prompts[i]) // (1 if exact else 32)

    order = sorted((i for i in range(len(prompts)) if room[i] > 0),
                   key=lambda i: (room[i], len(prompts[i])), reverse=True)
    groups = [list(group) for _, group in itertools.groupby(order, alike)]
    return [group[i:i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def decode(tokenizer, sequences, **options):
    return [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True, **options)
            for ids in sequences]


class Finite(list):
    """A logits processor that only lists, for each step, in which rows all logits are numbers."""

    def __call__(self, input_ids, scores):
        self.append(scores.amax(-1).isfinite())
        return scores


def own_files(path):
    """What a model folder holds besides weights: configs, tokenizer, chat template."""
    return [file for file in sorted(folder_of(path).iterdir()) if file.suffix in OWN_FILES
            and file.is_file() and not file.name.startswith(".")
            and not file.name.endswith(("args.json", "eval.json", "EVAL.json",
                                        "eval_log_aggregated.json", ".index.json"))]


def check_savable(path, model):
    """{name: content} of the files that unlearning does not change: configs and tokenizer."""
    require(not getattr(model.config, "quantization_config", None), f"{path}: its weights are "
            "quantized, which training and saving would undo; start from a model that is not")
    return {file.name: file.read_bytes() for file in own_files(path)}


def fingerprint(path):
    """A hash of what decides a model's answers, wherever it lies: configs, tokenizer, weights."""
    files = [*own_files(path), *sorted(folder_of(path).glob("*.safetensors"))]
    return digest([(f.name, hashlib.file_digest(f.open("rb"), "sha256").digest()) for f in files])


def save_model(model, empty, files, folder):
    """Write a folder that from_pretrained opens: the weights, merged in the model's `empty` copy,
    and the start model's own files."""
    weights = distributed.gathered(savable_tensors(model))
    if distributed.first():
        plain = merged(filled(empty, weights))
        plain.generation_config = GenerationConfig()  # some of them are refused
        with filling(folder) as scratch:
            plain.save_pretrained(scratch)
            for written in scratch.glob("*config.json"):  # as they were they come from `files`
                written.unlink()
            for name, content in files.items():
                (scratch / name).write_bytes(content)


def savable_tensors(model):
    """[(name, tensor)] of what a model's file holds, tied weights once."""
    persistent = model.state_dict().keys()
    return [(name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if name in persistent]


def empty_copy(model, expected):
    """A copy of an adapted model on the meta device, which save_model fills (none can be made of an
    FSDP model). Raises InputError unless it merges into a plain model with the `expected` {name:
    shape}, and no adapter changes a weight that is used in two places."""
    empty = filled(model, {name: tensor.to("meta") for name, tensor in savable_tensors(model)})
    with blame("train.adapt", "the adapters cannot be merged"):
        plain = {name: t.shape for name, t in savable_tensors(merged(copy.deepcopy(empty)))}
    wrong = [name for name, _ in plain.items() ^ expected.items()]
    named = [*model.named_parameters(remove_duplicate=False)]
    places = [id(p) for _, p in named]
    wrong += [name for name, p in named
              if places.count(id(p)) > 1 and re.search("base_layer|original_module", name)]
    require(not wrong, f"train.adapt: {min(wrong, default='')} could not be saved in a plain "
            "model; train its own weights, or adapters that merge into weights that are not tied")
    return empty


def filled(model, weights):
    """A copy of a model with weights that are taken out of {name: tensor}, one at a time."""
    copies = {id(own): nn.Parameter(weights.pop(name).clone(), requires_grad=False)
              for name, own in savable_tensors(model)}
    return copy.deepcopy(model, copies)


def merged(model):
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
