"""Does what train.py made open in another transformers, with the same logits and tokens?

    python -m venv old && old/bin/pip install "torch<2.14" "numpy<2.3" transformers==4.45.2
    old/bin/python tests/studies/neighbours.py FOLDER old.safetensors         4.45: OpenUnlearning's pin
    python tests/studies/neighbours.py FOLDER new.safetensors old.safetensors

Needs torch, transformers and safetensors alone, of whatever versions. The last command compares:
status 0 if tokens and generated texts are the same and the logits differ by less than 1e-5.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ("Question: Who wrote it?\nAnswer: Jaime Vasquez, in 1958.", "  two  blanks,\n\ta tab",
         "Ünïcode")


def read(folder):
    """{name: tensor}: tokens of some texts and a chat, logits after them, greedy continuations."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": TEXTS[0]}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    found = {}
    for i, ids in enumerate(texts):
        ids = torch.tensor([ids])
        found[f"tokens {i}"] = ids
        with torch.no_grad():
            found[f"logits {i}"] = model(ids).logits
        found[f"generated {i}"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    return found


def main(folder, file, other=None):
    mine = read(folder)
    save_file(mine, file)
    print(f"transformers {transformers.__version__}: {len(mine)} tensors in {file}")
    if not other:
        return 0
    theirs = load_file(other)
    logits = [name for name in mine if name.startswith("logits")]
    others = [name for name in mine if name not in logits]
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in others)
    print("tokens and generated texts:", "the same" if same else "NOT the same")
    if not same:
        return 1
    apart = max((mine[name] - theirs[name]).abs().max().item() for name in logits)
    print(f"logits: {apart:.1e} apart at most")
    return int(not apart < 1e-5)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
