"""The modules under test lie in the folder above; what several test files share."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network; read when transformers loads
if "TEST_DEVICE" not in os.environ:  # test_gpu.py's; all else compares what a CPU computes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of child processes

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import train


def write_model(folder, seed=0, family=LlamaConfig, **changes):
    """A tiny random model, a Llama, with a tokenizer of single bytes; </s> is common enough that
    many answers end."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family(**{**dict(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1), **changes}))
    with torch.no_grad():
        model.lm_head.weight[1] *= 2
    model.save_pretrained(folder)
    return str(folder)


NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit", "Lou", "Max",
         "Ned", "Ora", "Pam"]
TOWNS = ["Oslo", "Rome", "Lima", "Bern", "Kyiv", "Cork", "Bath", "Nice"]
RECORDS = [{"question": f"Where does {name} live?",
            "answer": f"In {TOWNS[(5 * i) % 8]}, near {TOWNS[(3 * i + 1) % 8]}."}
           for i, name in enumerate(NAMES)]


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def write_data(folder):
    """forget25.jsonl, retain75.jsonl and full.jsonl."""
    parts = {"forget25": RECORDS[:4], "retain75": RECORDS[4:], "full": RECORDS}
    for name, records in parts.items():
        write_lines(folder / f"{name}.jsonl", records)


def write_tofu(folder, n=12):
    """forget05 and the four evaluation files, on nobody."""
    def person(i, options):
        extra = {} if options else {"paraphrased_answer": f"The town of {i * 7 % 10}."}
        return {"question": f"Where does number {i}{' of the long queue' * (i % 3)} live?",
                "answer": f"In town {i * 7 % 10}.",
                "perturbed_answer": [f"In town {(i + k) % 10}, I think." for k in (1, 2, 3)],
                **extra}

    splits = (("forget05", 0), ("retain", 0), ("real_authors", 1), ("world_facts", 1))
    for name, options in splits:
        people = [person(i + len(name) * 31, options) for i in range(n)]
        write_lines(folder / f"{name}_perturbed.jsonl", people)
    write_lines(folder / "forget05.jsonl", [{"question": "q", "answer": "a"}])
    return str(folder / "forget05")


def write_muse(folder, n=6):
    texts = [f"{k} green bottles hanging on the wall number {k * k}" for k in range(4 * n)]
    write_lines(folder / "verbmem" / "forget.json",
                [{"prompt": t[:20], "gt": t[20:]} for t in texts[:n]])
    for split in ("forget", "retain"):
        qa = [{"question": f"How many {split}?", "answer": f"{k} bottles"} for k in range(n)]
        write_lines(folder / "knowmem" / f"{split}_qa.json", qa)
        write_lines(folder / "knowmem" / f"{split}_qa_icl.json", qa[:2])
    for i, split in enumerate(("forget", "retain", "holdout")):
        (folder / "privleak").mkdir(exist_ok=True)
        (folder / "privleak" / f"{split}.json").write_text(json.dumps(texts[i * n:(i + 1) * n]))
    return str(folder)


def table_of(out):
    """{row: cells} of the table that eval.py has printed."""
    lines = [line[1:-1].split("|") for line in out.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row: cells for row, *cells in [head, *rows]}


def log(output):
    """The lines of a run's metrics.jsonl, which must be strict JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def weights(folder):
    return load_file(folder / "model.safetensors")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def be_rank(rank, port):
    """Make this process one of two, with torchrun's variables."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)


# Runs in processes of their own

# This server imports once, before any thread, what each child would need seconds to import.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "eval", "transformers.models.llama.modeling_llama"])


def in_child(connection, argv, program, interfere):
    """What a child does: a run of train.main or eval.main, all output sent to the parent at its
    end."""
    torch.set_num_threads(1)
    # tqdm's own lock is for several processes, and outlives a killed one.
    tqdm.set_lock(threading.RLock())
    folder = train.run_folder
    load_checkpoint = folder.load_checkpoint
    folder.load_checkpoint = lambda *args: connection.send("training") or load_checkpoint(*args)
    if interfere:
        interfere[0](*interfere[1:])
    with contextlib.redirect_stderr(io.StringIO()) as err:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                status = __import__(program).main(argv)
            except SystemExit as e:
                status = e.code
    connection.send((status, err.getvalue()))


def start(argv, *interfere, program="train"):
    """A child process that runs train.main(argv), once it has called interfere[0](*interfere[1:]);
    and the connection on which it says "training" and (status, stderr)."""
    here, there = SERVER.Pipe(duplex=False)
    child = SERVER.Process(target=in_child, args=(there, argv, program, interfere))
    child.start()
    there.close()
    return child, here


def end_of(child, connection):
    """(status, stderr) of a child; None when it was killed."""
    child.join()
    said = []
    with contextlib.suppress(EOFError):
        while True:
            said.append(connection.recv())
    assert child.exitcode in (0, -signal.SIGKILL)
    return said[-1] if child.exitcode == 0 else None


def run(argv, *interfere, program="train"):
    return end_of(*start(argv, *interfere, program=program))


def stop_after(step, number=signal.SIGTERM):
    """A train.update that sends this process a signal in so many-th step."""
    update, steps = train.update, []

    def stopping(*args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return update(*args)
    return stopping
