"""Fetch the real benchmarks from the Hugging Face hub: TOFU, and the two corpora of MUSE.

    python data/download.py tofu              # into data/tofu
    python data/download.py news books        # into data/muse/news and data/muse/books
    python data/download.py all --force       # everything, also what is there already

TOFU lies in its repository as JSON and is taken as it is. MUSE lies there as parquet, which this
package has no reader for; the hub's dataset viewer hands the same rows out as JSON, a hundred at a
time and never cut short. They are written in the layout of MUSE's own code: the raw texts of a
split joined by blank lines, everything else as a JSON array.

A file gets its name only when it is whole: it has been read once as train.py and eval.py will read
it, and has as many records as TOFU's card or the viewer say.
"""

import json
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.support.data_files import read_records
from data.support.errors import InputError, Parser, blame, one_line_errors, require
from data.support.run_folder import filling

TOFU = {  # file: its number of records
    "full": 4000, "forget01": 40, "forget05": 200, "forget10": 400, "retain99": 3960,
    "retain95": 3800, "retain90": 3600, "forget01_perturbed": 40, "forget05_perturbed": 200,
    "forget10_perturbed": 400, "retain_perturbed": 400, "real_authors_perturbed": 100,
    "world_facts_perturbed": 117, "holdout01": 40, "holdout05": 200, "holdout10": 400}
MUSE = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
}
VIEWER = "https://datasets-server.huggingface.co/rows"
BUSY = (429, 500, 502, 503, 504)  # statuses that are tried again, after a pause
LIMIT = 2**28  # bytes of one answer; the largest, a page of MUSE's books, is a few MB


def fetch(url):
    """The bytes at this URL of the hub."""
    content = bytearray()
    try:
        with http_stream_backoff("GET", url, timeout=60, retry_on_exceptions=(),
                                 retry_on_status_codes=BUSY) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                content += chunk
                require(len(content) <= LIMIT, f"{url}: more than {LIMIT:,} bytes; not this file")
    except InputError:
        raise
    except HfHubHTTPError as e:
        raise InputError(f"{url}: the hub refuses: {e}; if this lasts, fetch the file by "
                         "hand") from None
    except Exception as e:  # of whichever HTTP library huggingface_hub works with
        raise InputError(f"the Hugging Face hub cannot be reached: {e}; connect this machine to "
                         "the network, or run this on one that is and copy the folder") from None
    return bytes(content)


def fetch_rows(dataset, config, split):
    """All rows of a split, as dicts. Refused unless every one of them is there, and whole."""
    rows, total = [], None
    while total is None or len(rows) < total:
        query = {"dataset": dataset, "config": config, "split": split, "offset": len(rows),
                 "length": 100}
        url = f"{VIEWER}?{urlencode(query)}"
        answer = fetch(url)
        try:
            page = json.loads(answer)
            found, total, partial = page["rows"], page["num_rows_total"], page["partial"]
            places = [item["row_idx"] for item in found]
            cut = any(item["truncated_cells"] for item in found)
            expected = list(range(len(rows), min(len(rows) + 100, total)))
            rows += [item["row"] for item in found]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{url}: not an answer of the dataset viewer; a login page of this "
                             "network?") from None
        require(places == expected and expected and not partial and not cut,
                f"{url}: the dataset viewer gives only a part of it; fetch {dataset} by other "
                "means")
    return rows


def tofu_file(split):
    """(the bytes of one file of TOFU, how many records it must have)."""
    url = hf_hub_url("locuslab/TOFU", f"{split}.json", repo_type="dataset")
    return fetch(url), TOFU[split]


def muse_file(corpus, config, split):
    """(the bytes of one file of a MUSE corpus, how many records it must have)."""
    rows = fetch_rows(f"muse-bench/MUSE-{corpus.title()}", config, split)
    with blame(f"MUSE-{corpus.title()}, {config}/{split}", "not rows with a text, but"):
        if config in ("raw", "privleak"):
            rows = [row["text"] for row in rows]
        text = "\n\n".join(rows) if config == "raw" else json.dumps(rows, indent=1) + "\n"
    return text.encode("utf-8"), 1 if config == "raw" else len(rows)


def files_of(name):
    """What belongs to a benchmark: {path below the data folder: function that gets it}."""
    if name == "tofu":
        return {f"tofu/{split}.json": partial(tofu_file, split) for split in TOFU}
    return {f"muse/{name}/{config}/{split}.{'txt' if config == 'raw' else 'json'}":
            partial(muse_file, name, config, split)
            for config, splits in MUSE.items() for split in splits}


def save(path, content, count):
    """Write the file beside its place, read it as a check, and give it its name."""
    with filling(path.parent) as scratch:
        part = scratch / path.name
        part.write_bytes(content)
        found = len(read_records(part))
        require(found == count, f"{path.name}: {found} records came, {count} are in it; try again")


def download(names, folder, force=False):
    """Fetch the benchmarks of these names into their places under `folder`, a line a file."""
    for name in names:
        for place, get in files_of(name).items():
            path = folder / place
            if path.exists() and not force:
                print(f"{path}: kept, it is there already")
                continue
            content, count = get()
            save(path, content, count)
            print(f"{path}: {count} record{'s' * (count != 1)}, {len(content):,} bytes", flush=True)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="+", choices=["tofu", "news", "books", "all"],
                        metavar="tofu|news|books|all", help="what to fetch")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent,
                        metavar="DIR",
                        help="the folder that gets tofu/ and muse/ (default: this script's)")
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    args = parser.parse_args(argv)
    names = ["tofu", "news", "books"] if "all" in args.names else args.names
    download(names, args.output, args.force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
