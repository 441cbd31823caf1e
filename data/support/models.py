"""Model folders and hub names: opened safely or refused with a reason, saved as they were opened.

Only safetensors are read; no remote code runs.
"""

import contextlib
import functools
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          LogitsProcessor)
from transformers.utils import cached_file, has_file, logging
from transformers.utils.hub import get_session, hf_hub_url

from . import distributed
from .data_files import POINTER, POINTER_SAYS
from .errors import InputError, blame, require
from .run_folder import filling

logging.set_verbosity(logging.CRITICAL)  # what matters is said once, by InputError
if not sys.stderr.isatty():
    logging.disable_progress_bar()

SAFE = dict(trust_remote_code=False)
# Weights that a causal model may have in its file and does not need: buffers, heads of values.
SPARE = re.compile(r"rotary_emb|inv_freq|attn\.(masked_)?bias$|^(v_head|value_head|score)\.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


# Opening

@functools.cache
def opening(path):
    """The options with which transformers opens a folder or hub name: no remote code; and only what
    its cache holds where the hub does not answer, for which it would wait minutes, file by file."""
    if not Path(path).exists():
        try:
            get_session().head(hf_hub_url(str(path), "config.json"), timeout=10)
            get_session().event_hooks["request"].append(bounded)
        except Exception:  # whatever a network can do, or HF_HUB_OFFLINE
            return SAFE | {"local_files_only": True}
    return SAFE


def bounded(request):
    """Let no request but a download wait for more than 10 s: huggingface_hub waits for a file's
    head a minute, several times, and for a commit for ever."""
    waits, head = request.extensions.get("timeout", {}), request.method == "HEAD"
    request.extensions["timeout"] = {what: 10 if head or seconds is None else seconds
                                     for what, seconds in waits.items()}


def load_pretrained(path, dtype=torch.float32):
    """The causal language model and tokenizer at a folder or hub name.

    Raises InputError for anything but a complete causal model with a tokenizer that has an EOS.
    """
    skeleton, tokenizer = load_skeleton(path)
    with blame(path, "the model cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=skeleton.config, dtype=dtype, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True, **opening(path))
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    require(not wrong, f"{path}: {len(wrong)} weights are missing from the checkpoint, or of "
            f"another shape than config.json says, {next(iter(wrong), '')} first")
    unused = sorted(name for name in info["unexpected_keys"] if not SPARE.search(name))
    require(not unused, f"{path}: config.json has no place for {len(unused)} of the checkpoint's "
            f"weights, {next(iter(unused), '')} first; they do not belong together")
    if not getattr(model, "hf_quantizer", None):
        check_stored(path)
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
    """The model at a folder or hub name without its weights (on the meta device), and its
    tokenizer.

    Raises InputError for all that can be known before the weights, which may be large, are read.
    `weights`: whether the folder must hold some.
    """
    check_model_folder(path, weights)
    config, tokenizer = load_config(path), load_tokenizer(path)
    with blame(path, "config.json describes no model that can be built"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **SAFE)
    size = vocabulary(model)
    require(tokenizer.eos_token_id < size, f"{path}: the EOS is token {tokenizer.eos_token_id}, "
            f"the model's embedding has only {size}; they do not belong together")
    return model, tokenizer


def load_config(path):
    with blame(path, "config.json cannot be used"):
        config = AutoConfig.from_pretrained(path, **opening(path))
        name = str((config.architectures or ["ForCausalLM"])[0])
        text = config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        room = limit is None or limit > 0
    require(name.endswith("ForCausalLM") or config.is_encoder_decoder or text is config,
            f"{path}: config.json: {name} holds a language model beside others (for images, "
            f"sound ...); save its {text.model_type} part as a model of its own")
    require(not config.is_encoder_decoder and name.endswith(("ForCausalLM", "LMHeadModel")),
            f"{path}: config.json: {name} is not a causal (left-to-right) language model")
    require(room, f"{path}: config.json: max_position_embeddings {limit} leaves no room for a text")
    return config


def load_tokenizer(path):
    folder = Path(path)
    there = not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)
    require(there, f"{path}: no tokenizer in this folder ({', '.join(TOKENIZER_FILES)})")
    with blame(path, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, **opening(path))
        tokenizer("a b")
    require(tokenizer.eos_token_id is not None,
            f"{path}: the tokenizer has no EOS token, so an answer has no end; set eos_token")
    require(not isinstance(tokenizer.chat_template, dict),
            f"{path}: the tokenizer has several chat templates; keep one, as a string")
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

ADAPTER = ("an adapter (adapter_config.json), which is not applied; save the model with it merged "
           "(peft's merge_and_unload) elsewhere, or move it away if that was done")


def check_model_folder(path, weights):
    """Raise InputError when a local folder is missing, or should hold safetensors and does not."""
    folder = Path(path)
    if not folder.exists():
        local = folder.is_absolute() or len(folder.parts) > 2
        require(not local and folder.parts[0] not in (".", "..", "runs", "data"),
                f"{path}: no such folder, and not a hub name such as meta-llama/Llama-3.2-1B")
        with blame(path):
            there = has_file(path, "config.json", **opening(path))
            require(there, f"{path}: no such folder, and the Hugging Face hub has no such model or "
                    "cannot be reached from here")
            adapter = has_file(path, "adapter_config.json", **opening(path))
            require(not adapter, f"{path}: holds {ADAPTER}")
        return
    require(folder.is_dir(), f"{path}: a file, where a model folder is meant")
    names = sorted(p.name for p in folder.iterdir())
    for file in folder.glob("*.*"):
        with blame(file, "cannot be read"):
            pointer = file.is_file() and POINTER.match(file.open("rb").read(1000))
        require(not pointer, f"{file}: {POINTER_SAYS}")
    # transformers would put an adapter on top of weights that may hold it already
    require("adapter_config.json" not in names, f"{path}: holds {ADAPTER}")
    require("config.json" in names or "args.json" not in names,
            f"{path}: a training run that is not finished; go on with its command and --resume")
    if weights and not any(name.endswith(".safetensors") for name in names):
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        require(not pickled, f"{path}: {next(iter(pickled), '')} is a pickle, which could run any "
                "code; only safetensors are read")
        raise InputError(f"{path}: no weights (*.safetensors) in this folder")
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        check_shards(index, names)


def check_shards(index, names):
    """Raise InputError unless all shards that an index names are safetensors in its own folder, or
    none is beside a model.safetensors, which is read instead.

    transformers alone would open a pickle that the index names, or a file elsewhere.
    """
    with blame(index, "cannot be read"):
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        wrong = [s for s in shards if s not in names or not s.endswith(".safetensors")]
    single = "model.safetensors" in names
    others = {*shards} & {*names} - {"model.safetensors"}
    require(not (single and others), f"{index}: its shards lie beside a model.safetensors; which "
            "of them are the model's weights? Move the others away")
    require(single or not wrong,
            f"{index}: {next(iter(wrong), '')!r} is no *.safetensors file in this folder")


def check_stored(path):
    """Raise InputError for weights that are stored in 8 bits: transformers has cast them without
    the scales that belong to them, as config.json has no quantization_config that it knows."""
    folder = Path(cached_file(str(path), "config.json", **opening(path))).parent
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            kinds = {name: held.get_slice(name).get_dtype() for name in held.keys()}
        odd = [f"{name} is {kind}" for name, kind in kinds.items()
               if kind not in ("F64", "F32", "F16", "BF16") and not name.endswith(("bias", "_ids"))]
        require(not odd, f"{file}: {next(iter(odd), '')}, quantized without a known "
                "quantization_config in config.json; save the model in bf16, fp16 or fp32")


@torch.no_grad()
def check_causal(path, model):
    """Raise InputError when a token changes what is predicted before it, as in BERT."""
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=model.device) % vocabulary(model)
    with blame(path, f"{type(model).__name__} does not turn tokens into logits"):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        change = (logits[0] - logits[1]).abs().amax(-1)
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    require(not change[:-1].max() > tolerance * change[-1], f"{path}: {type(model).__name__} looks "
            "at later tokens; not a causal (left-to-right) language model")


@torch.no_grad()
def check_generation(path, model):
    """Raise InputError unless generate(), from its cache and beside padding, has the logits of a
    plain forward pass. (State-space models may go wrong: padding passes through their state.)"""
    ids = torch.arange(2, 13, device=model.device) % vocabulary(model)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    require(all(end is None or type(end) is int for end in ends), f"{path}: eos_token_id {ends} of "
            "its generation config is neither a token id nor a list of them")
    texts = [ids[:8], ids]  # one batch, the first padded on the left
    padded = torch.stack([torch.cat([ids[8:], ids[:8]]), ids])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    with blame(path, f"{type(model).__name__} cannot generate"):
        new = model.generate(
            padded, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            num_beams=1, stop_strings=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True)
        cached = torch.stack(new.logits, 1).float()
        written = new.sequences[:, len(ids):]
        plain = [model(input_ids=torch.cat([text, more])[None], use_cache=False).logits[0, -4:-1]
                 for text, more in zip(texts, written)]
        plain = torch.stack(plain).float()
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * plain.nan_to_num().abs().max().item()
    require(torch.allclose(cached, plain, rtol=0, atol=tolerance, equal_nan=True),
            f"{path}: {type(model).__name__} gives other logits from its cache, or beside padding, "
            "than without; what it generates cannot be trusted, so it is not evaluated")


# Generating

def generation_batches(model, prompts, room, batch_size):
    """Index lists of prompts of equal room and like length (all wait while the longest is read).

    Of equal length where the generation_config looks back, which would take the padding for text,
    and where one may cross a border of its rotary tables, which a shorter one would reach later.
    """
    looks_back = any(getattr(model.generation_config, name, None) not in (None, 0, 1)
                     for name in ("repetition_penalty", "no_repeat_ngram_size", "min_length",
                                  "bad_words_ids", "sequence_bias"))
    borders, batches = rope_borders(model), []
    for i in sorted(range(len(prompts)), key=lambda i: (room[i], len(prompts[i]))):
        first = batches[-1][0] if batches else i
        length = len(prompts[i])
        alike = looks_back or any(length + room[i] > border for border in borders)
        apart = room[i] != room[first] or length - len(prompts[first]) > (0 if alike else 32)
        if room[i] > 0 and (not batches or apart or len(batches[-1]) == batch_size):
            batches.append([])
        if room[i] > 0:
            batches[-1].append(i)
    return batches[::-1]  # the longest first, so that memory runs out at once or never


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

def check_savable(path, model):
    """Try before training what saving needs: that transformers writes this config again. Returns
    {name: content} of the files that unlearning does not change: configs and tokenizer."""
    require(not getattr(model.config, "quantization_config", None), f"{path}: its weights are "
            "quantized, and would be saved as they are trained, not as config.json says; train a "
            "model that is not quantized, or remove quantization_config and dequantize it")
    with blame(path, "a model with this config.json could not be saved"):
        with tempfile.TemporaryDirectory() as scratch:
            model.config.save_pretrained(scratch)
        folder = Path(cached_file(str(path), "config.json", **opening(path))).parent
        return {file.name: file.read_bytes() for file in own_files(folder)}


def own_files(folder):
    """What a model folder holds besides weights: configs, tokenizer, chat template."""
    return [p for p in sorted(Path(folder).iterdir()) if p.is_file()
            and p.suffix in (".json", ".jinja", ".txt", ".model") and not p.name.startswith(".")
            and p.name not in ("args.json", "eval.json", "adapter_config.json")
            and not p.name.endswith(".index.json")]


def fingerprint(path):
    """What decides a model's answers, wherever it lies: a hash of a folder's configs, tokenizer
    and weights, or the commit that a hub name leads to."""
    if not Path(path).exists():
        with blame(path, "its commit is unknown, as the Hugging Face hub cannot be reached"):
            return Path(cached_file(str(path), "config.json", **opening(path))).parent.name
    digest = hashlib.sha256()
    for file in [*own_files(path), *sorted(Path(path).glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def save_model(model, files, folder):
    """Write a folder that from_pretrained opens: the weights, and the start model's own files."""
    with merged(model):  # until the file is written: on a CPU `weights` share the model's memory
        weights = distributed.gathered(savable_tensors(model))
        if distributed.first():
            with filling(folder) as scratch:
                # Of what transformers writes only weights are kept; all else is as it was.
                plain = model.get_base_model() if hasattr(model, "get_base_model") else model
                plain.generation_config = GenerationConfig()  # it refuses to save some of them
                plain.save_pretrained(scratch, state_dict=weights)
                for written in scratch.glob("*config.json"):
                    written.unlink()
                for name, content in files.items():
                    (scratch / name).write_bytes(content)
    distributed.barrier()


def savable_tensors(model):
    """[(name, tensor)] of what a model's file holds, tied weights once; of a PEFT model the names
    of the plain one, whose weights have the adapters in them only within `merged`."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    persistent = plain.state_dict().keys()
    named = [*plain.named_parameters(), *(x for x in plain.named_buffers() if x[0] in persistent)]
    return [(re.sub(r"(\.base_layer)+\.", ".", name), tensor) for name, tensor in named
            if not is_adapter(model, name)]


def is_adapter(model, name):
    """Whether a PEFT model's parameter is one that merges into others: lora_A, ia3_l ..."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    return bool(prefix) and f".{prefix}" in name


@contextlib.contextmanager
def merged(model):
    """The adapters of a PEFT model are merged into its weights meanwhile."""
    if not hasattr(model, "merge_adapter"):
        yield
        return
    layers = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    before = [(p, p.detach().clone()) for layer in layers for p in layer.parameters()]
    model.merge_adapter()
    yield
    model.unmerge_adapter()
    with torch.no_grad():  # a difference of sums is not the same to the last bit
        for p, value in before:
            p.copy_(value)


def check_mergeable(model, expected):
    """Raise InputError unless an adapted model can be saved as a plain one: its merge has the
    `expected` {name: shape}, all that is trained goes into it, and no adapter changes a weight that
    is used in two places."""
    with blame("train.adapt", "the adapters cannot be merged"), merged(model):
        saved = savable_tensors(model)
    got, known = {name: tensor.shape for name, tensor in saved}, {id(tensor) for _, tensor in saved}
    other = sorted(dict(got.items() ^ expected.items()))
    other += [name for name, p in model.named_parameters()
              if p.requires_grad and id(p) not in known and not is_adapter(model, name)]
    require(not other, f"train.adapt: {next(iter(other), '')} has no place in the plain model that "
            "is saved; train its own weights, or adapters that merge into them (LoRA without "
            "modules_to_save, IA3, LoHa ...)")
    uses = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(p), []).append(name)
    for names in uses.values():
        require(len(names) == 1 or "base_layer" not in "".join(names), "train.adapt: "
                f"{' and '.join(names)} are one weight, so that an adapter on one of them cannot "
                "be merged; leave it out of target_modules")
