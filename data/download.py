"""Fetch the real benchmarks from the Hugging Face hub: TOFU, and the two corpora of MUSE.

    python data/download.py tofu              # into data/tofu
    python data/download.py news books        # into data/muse/news and data/muse/books
    python data/download.py all --force       # everything, also what is there already

TOFU lies in its repository as JSON and is taken as it is. MUSE lies there as parquet, which this package has no reader
for; the hub's dataset viewer hands the same rows out as JSON, a hundred at a time and never cut short. They are written
in the layout of MUSE's own code: the raw texts of a split joined by blank lines, everything else as a JSON array.

A file gets its name only when it is whole and has been read once as train.py and eval.py will read it.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, http_backoff

if __package__:
    from .load import InputError, Parser, read_records
else:
    from load import InputError, Parser, read_records

TOFU = ("full", "forget01", "forget05", "forget10", "retain99", "retain95", "retain90", "forget01_perturbed",
        "forget05_perturbed", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
MUSE = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
}
VIEWER = "https://datasets-server.huggingface.co/rows"
BUSY = (429, 500, 502, 503, 504)  # statuses that are tried again, after a pause


def fetch(url):
    """The bytes at this URL of the hub."""
    try:
        response = http_backoff("GET", url, timeout=60, retry_on_exceptions=(), retry_on_status_codes=BUSY)
        hf_raise_for_status(response)
    except HfHubHTTPError as e:
        raise InputError(f"{url}: the hub refuses: {e}; if this lasts, fetch the file by hand") from None
    except Exception as e:  # of whichever HTTP library huggingface_hub works with
        raise InputError(f"the Hugging Face hub cannot be reached: {e}; connect this machine to the network, or run "
                         "this on one that is and copy the folder") from None
    return response.content


def fetch_rows(dataset, config, split):
    """All rows of a split, as dicts. Refused unless every one of them is there, and whole."""
    rows, total = [], None
    while total is None or len(rows) < total:
        query = {"dataset": dataset, "config": config, "split": split, "offset": len(rows), "length": 100}
        url = f"{VIEWER}?{urlencode(query)}"
        answer = fetch(url)
        try:
            page = json.loads(answer)
            found, total = page["rows"], page["num_rows_total"]
            rows += [item["row"] for item in found]
            lacking = not found or page["partial"] or any(item["truncated_cells"] for item in found)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{url}: not an answer of the dataset viewer; a login page of this network?") from None
        if lacking:
            raise InputError(f"{url}: the dataset viewer gives only a part of it; fetch {dataset} by other means")
    return rows


def muse_file(corpus, config, split):
    """The bytes of one file of a MUSE corpus."""
    rows = fetch_rows(f"muse-bench/MUSE-{corpus.title()}", config, split)
    if config in ("raw", "privleak"):
        rows = [row["text"] for row in rows]
    text = "\n\n".join(rows) if config == "raw" else json.dumps(rows, indent=1) + "\n"
    return text.encode("utf-8")


def files_of(name):
    """What belongs to a benchmark: {path below the data folder: function that gets its bytes}."""
    if name == "tofu":
        urls = {split: hf_hub_url("locuslab/TOFU", f"{split}.json", repo_type="dataset") for split in TOFU}
        return {f"tofu/{split}.json": partial(fetch, url) for split, url in urls.items()}
    return {f"muse/{name}/{config}/{split}.{'txt' if config == 'raw' else 'json'}": partial(muse_file, name, config, split)
            for config, splits in MUSE.items() for split in splits}


def save(path, content):
    """Write the file beside its place, read it as a check, and give it its name. Returns its number of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(content)
        records = read_records(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return len(records)


def download(names, folder, force=False):
    """Fetch the benchmarks of these names into their places under `folder`, a line printed for each file."""
    for name in names:
        for place, get in files_of(name).items():
            path = folder / place
            if path.exists() and not force:
                print(f"{path}: kept, it is there already")
                continue
            content = get()
            count = save(path, content)
            print(f"{path}: {count} record{'s' * (count != 1)}, {len(content):,} bytes", flush=True)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["tofu", "news", "books", "all"], metavar="tofu|news|books|all",
                        help="what to fetch")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="the folder that gets tofu/ and muse/ (default: this script's)")
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    try:
        args = parser.parse_args(argv)
        download(["tofu", "news", "books"] if "all" in args.names else args.names, args.output, args.force)
    except (InputError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
