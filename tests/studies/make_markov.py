"""Write the data of the paper's synthetic study, a mixture of Markov chains, and the small
untrained GPT-2 for it.

    python tests/studies/make_markov.py                        # into runs/markov-data
    python tests/studies/make_markov.py --output DIR --seed 1  # elsewhere, other sequences

The study is in Fan et al., arXiv 2410.07163: "Further analyses via a mixture of Markov chains" and
appendix H. Of ten states three belong to `retain`, three to `forget1`, three to `forget2` and one
to nobody. From every state a chain goes to one of its own three with probability 0.8, evenly, and
to any of the other seven with 0.2, evenly; its first state is drawn in the same way. (In the
authors' code this holds from its own states only: a chain that has left them goes on evenly over
all ten.)

Two settings make one half of what is to be forgotten different from the other, which NPO and SimNPO
weigh differently:
    never_learned   the target never reads forget2, so there is nothing to forget in it
    short           forget2's sequences have 5 states, all others 20

Each is a folder of {"input_ids": [...]} records: retain, forget1, forget2 (for training), each with
its held-out _test; forget (forget1 and forget2, what is unlearned) and target (what the target is
trained on). `model` is for --init. The same bytes come out on every machine: one
random.Random(seed), of which only random() is used.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.make_model import BOS, EOS, write_json  # noqa: E402

STATES, FAVOUR, LENGTH = 10, 0.8, 20
CHAINS = {  # the states that each one favours
    "retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}
COUNTS = {"retain": 10_000, "forget1": 5_000, "forget2": 5_000}
TRAINING_SHARE = 0.8
SETTINGS = {  # the length of forget2's sequences, and what the target reads
    "never_learned": (LENGTH, ("retain", "forget1")),
    "short": (5, ("retain", "forget1", "forget2")),
}
FIRST_STATE = 2  # token of state 0, after BOS and EOS


def probabilities(chain):
    """The true distribution of a chain's next state: ten numbers, the same after every state."""
    own = CHAINS[chain]
    return [FAVOUR / len(own) if state in own else (1 - FAVOUR) / (STATES - len(own))
            for state in range(STATES)]


def sequence(rng, chain, length):
    """Token ids of one walk of the chain, BOS first so that the first state is predicted, too."""
    own = CHAINS[chain]
    others = [state for state in range(STATES) if state not in own]
    ids = [0]
    for _ in range(length):
        states = own if rng.random() < FAVOUR else others
        ids.append(FIRST_STATE + states[int(rng.random() * len(states))])
    return ids


def setting(rng, forget2_length, learned):
    """The files of one setting: {name: sequences}."""
    train, test = {}, {}
    for chain, count in COUNTS.items():
        length = forget2_length if chain == "forget2" else LENGTH
        walks = [sequence(rng, chain, length) for _ in range(count)]
        cut = int(count * TRAINING_SHARE)
        train[chain], test[f"{chain}_test"] = walks[:cut], walks[cut:]
    return {**train, **test, "forget": train["forget1"] + train["forget2"],
            "target": [walk for chain in learned for walk in train[chain]]}


def write_gpt2(folder):
    """The paper's GPT-2 (4 layers, 4 heads, width 128), without dropout, and a tokenizer that
    reads "0 4 9"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [BOS, EOS, *map(str, range(STATES))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "model_max_length": 32, "clean_up_tokenization_spaces": False})
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": len(words), "n_positions": 32, "n_embd": 128, "n_layer": 4, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32"})


def write_all(folder, seed=0):
    """Write both settings and the model under `folder` (made if missing, files overwritten)."""
    folder, rng = Path(folder), random.Random(seed)
    for name, (forget2_length, learned) in SETTINGS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, walks in setting(rng, forget2_length, learned).items():
            text = "".join(json.dumps({"input_ids": walk}) + "\n" for walk in walks)
            (folder / name / f"{file}.jsonl").write_bytes(text.encode("ascii"))
    write_gpt2(folder / "model")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs", "markov-data"), metavar="DIR",
                        help="folder to write to (default: runs/markov-data)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed draws other sequences (default 0)")
    args = parser.parse_args(argv)
    write_all(args.output, args.seed)


if __name__ == "__main__":
    main()
