"""Write a small untrained Llama: its `config.json` and a byte-level BPE tokenizer, no weights.

The built-in miniature benchmark gets its model from here (`data/make_mini.py`), and so can any other data:

    python data/make_model.py data/tofu/full.json --vocab 4096 --hidden 256 --layers 4 --heads 4 --output runs/tofu_init
    python train.py --init runs/tofu_init --retain data/tofu/full.json ...

The files are the same bytes on every run: BPE counts words and breaks ties by token id, whatever the threads.
"""

import argparse
import json
import os
import sys
from pathlib import Path

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE tokenizer on `texts` (strings); returns a `tokenizers.Tokenizer`.

    Ids 0, 1, 2 are <s>, </s>, <pad>; then the 256 bytes, so any text can be encoded; then the merges, up to
    `vocab_size` entries in all (fewer if the texts have fewer pairs to merge). Encoding puts <s> in front; the closing
    </s> is for the caller, because only a finished answer ends. Raises ValueError if vocab_size < 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BOS, EOS, PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size} is too small: {len(special)} special tokens and 256 bytes come first")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    return tokenizer


def llama_config(vocab_size, hidden, layers, heads, max_positions=2048):
    """The `config.json` of a small Llama, as a dict: tied embeddings, full attention heads, MLP width 8/3 of hidden.

    `hidden` must be divisible by `heads`, and the quotient even (rotary embeddings turn pairs): ValueError if not.
    """
    if hidden % heads or hidden // heads % 2:
        raise ValueError(f"hidden {hidden} must be an even multiple of heads {heads}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": (8 * hidden // 3 + 31) // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-05,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float32",
    }


def write_json(path, value):
    """Write `value` as indented ASCII JSON with a closing newline, the same bytes on every platform."""
    Path(path).write_bytes((json.dumps(value, indent=2) + "\n").encode("ascii"))


def write_model(folder, tokenizer, config):
    """Write config.json, tokenizer.json and tokenizer_config.json: what `train.py --init` and transformers need."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    })
