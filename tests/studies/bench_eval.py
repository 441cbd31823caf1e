"""Speed of the TOFU evaluation: eval.py beside a straightforward version, on 1,000 questions like
the built-in benchmark's.

    python tests/studies/bench_eval.py                 runs/target, made by train.py if missing
    python tests/studies/bench_eval.py --model DIR --questions 200

Every question has its answer, a paraphrase and four false answers to score, and a continuation to
generate. The straightforward version takes one example at a time: the logits of all positions,
then transformers' generate(). Both run in this process, one after the other; their tables are
compared, too.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
from data import make_mini  # noqa: E402
from data import make_mini_models as miniature  # noqa: E402
from data.support import distributed, evaluations  # noqa: E402
from data.support.data_files import read_records  # noqa: E402


@torch.inference_mode()
def straightforward(model, tokenizer, records, max_new_tokens):
    """[(mean nll of every answer), generated text] of each record."""
    results = []
    for r in tqdm(records, desc="one at a time"):
        nlls = []
        for answer in (r["answer"], r["paraphrased_answer"], *r["perturbed_answer"]):
            prompt = tokenizer(f"Question: {r['question']}\nAnswer:").input_ids
            ids = tokenizer(f"Question: {r['question']}\nAnswer: {answer}").input_ids
            ids = torch.tensor([ids + [tokenizer.eos_token_id]])
            logps = model(ids).logits[0, :-1].float().log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1:]
            nlls.append(-logps.mean().item())
        prompt = tokenizer(f"Question: {r['question']}\nAnswer:", return_tensors="pt")
        new = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False,
                             pad_token_id=tokenizer.pad_token_id)
        new = new[0, prompt.input_ids.shape[1]:]
        results.append((nlls, tokenizer.decode(new, skip_special_tokens=True)))
    return results


def timed(function, *args):
    began = time.perf_counter()
    return function(*args), time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: runs/target")
    parser.add_argument("--questions", type=int, default=1000, help="default 1000")
    args = parser.parse_args()
    if not args.model:
        miniature.make(Path("runs", "target"))
    argument = args.model or "runs/target"
    options = evaluation.arguments([argument, "--limit", str(args.questions)])
    distributed.start(options.device)
    inventor = make_mini.Inventor(seed=1)
    people = math.ceil(args.questions / len(make_mini.FACTS))
    facts = make_mini.flat(inventor.person() for _ in range(people))
    records = make_mini.fields(facts[:args.questions], *make_mini.QA,
                               "paraphrased_answer", "perturbed_answer")
    model, tokenizer = evaluation.load(argument, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "full_perturbed.jsonl")
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        asked = {"forget": read_records(path, "question")}
        evaluation.evaluate_tofu(model, tokenizer, {"forget": asked["forget"][:8]}, options)
        values, fast = timed(lambda: evaluation.evaluate_tofu(
            model, tokenizer, asked, options)["forget"])
    _, table = timed(lambda: evaluations.format_table(
        {"model": evaluation.tofu_metrics({"forget": values}, None)}))
    plain, slow = timed(straightforward, model, tokenizer, records, options.max_new_tokens)
    worst = max(abs(a - b) for r, (nlls, _) in zip(values, plain)
                for a, b in zip((r["nll"], r["paraphrased_nll"], *r["perturbed_nll"]), nlls))
    alike = sum(r["generated"] == text for r, (_, text) in zip(values, plain))
    print(f"{len(records)} questions, {torch.get_num_threads()} threads: eval.py {fast:.1f} s, "
          f"its table {table:.2f} s, one at a time {slow:.1f} s: {slow / fast:.1f} times as long; "
          f"largest difference of a mean nll {worst:.1e}, "
          f"the same text for {alike} of {len(records)}")


if __name__ == "__main__":
    main()
