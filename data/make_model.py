r"""Write a small untrained Llama: its `config.json` and a byte-level BPE tokenizer, no weights.

The built-in miniature benchmark gets its model from here (`data/make_mini.py`), and so can any
other data:

    python data/make_model.py data/tofu/full.json --vocab 4096 --hidden 256 --layers 4 --heads 4 \
        --output runs/tofu_init
    python train.py --init runs/tofu_init --retain data/tofu/full.json ...

The files are the same bytes on every run: BPE counts words and breaks ties by token id, whatever
the threads.
"""

import argparse
import json
import sys
from pathlib import Path

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE tokenizer on `texts` (strings); returns a `tokenizers.Tokenizer`.

    Ids 0, 1, 2 are <s>, </s>, <pad>; then the 256 bytes, so any text can be encoded; then the
    merges, up to `vocab_size` entries in all (fewer if the texts have fewer pairs to merge).
    Encoding puts <s> in front; the closing </s> is for the caller, because only a finished answer
    ends. Raises ValueError if vocab_size < 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BOS, EOS, PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size} is too small: {len(special)} special tokens and "
                         "256 bytes come first")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special,
                                  show_progress=False, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    return tokenizer


def llama_config(vocab_size, hidden, layers, heads, max_positions=2048):
    """The `config.json` of a small Llama, as a dict: tied embeddings, full attention heads, MLP
    width 8/3 of hidden.

    `hidden` must be divisible by `heads`, and the quotient even (rotary embeddings turn pairs):
    ValueError if not.
    """
    if min(hidden, layers, heads) < 1:
        raise ValueError(f"hidden {hidden}, layers {layers} and heads {heads} must be at least 1")
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
    """Write `value` as indented ASCII JSON and a newline, the same bytes on every platform."""
    Path(path).write_bytes((json.dumps(value, indent=2) + "\n").encode("ascii"))


def write_model(folder, tokenizer, config):
    """Write config.json, tokenizer.json and tokenizer_config.json: what `train.py --init` and
    transformers need."""
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


def texts_of(path):
    """Every text of a .txt, .jsonl or .json file (also one object a line): the string values of its
    records."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".txt":
            return [content]
        records = json.loads(content) if content.lstrip().startswith("[") else [
            json.loads(line) for line in content.split("\n") if line.strip()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: neither JSON in UTF-8, an array or an object a line, "
                         f"nor .txt: {e}") from None
    return [text for record in records for text in _strings(record)]


def _strings(value):
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in _strings(item)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+",
                        help=".json, .jsonl or .txt files to train the tokenizer on")
    parser.add_argument("--vocab", type=int, default=4096,
                        help="tokens in the vocabulary, at most (default 4096)")
    parser.add_argument("--hidden", type=int, default=256, help="width (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default 4)")
    parser.add_argument("--max-positions", type=int, default=2048,
                        help="longest sequence (default 2048)")
    parser.add_argument("--init-std", type=float, default=0.02,
                        help="of the random weights (default 0.02)")
    parser.add_argument("--output", required=True,
                        help="folder for config.json and the tokenizer's files")
    args = parser.parse_args(argv)
    try:
        # refuses before the long part
        llama_config(args.vocab, args.hidden, args.layers, args.heads)
        texts = [text for path in args.data for text in texts_of(path)]
        tokenizer = train_tokenizer(texts, args.vocab)
        config = llama_config(tokenizer.get_vocab_size(), args.hidden, args.layers, args.heads,
                              args.max_positions)
        write_model(args.output, tokenizer, {**config, "initializer_range": args.init_std})
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
