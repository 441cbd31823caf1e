"""data/download.py against a small hub on this machine, which serves made-up files and rows, and
breaks when told to."""

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest
from conftest import ROOT

from data import download
from data.support.data_files import MUSE_FILES, find, read_records

TOFU = ["forget01", "forget01_perturbed", "forget05", "forget05_perturbed", "forget10",
        "forget10_perturbed", "full", "holdout01", "holdout05", "holdout10",
        "real_authors_perturbed", "retain90", "retain95", "retain99",
        "retain_perturbed", "world_facts_perturbed"]
MUSE = ["knowmem/forget_qa.json", "knowmem/forget_qa_icl.json", "knowmem/retain_qa.json",
        "knowmem/retain_qa_icl.json",
        "privleak/forget.json", "privleak/holdout.json", "privleak/retain.json", "raw/forget.txt",
        "raw/holdout.txt",
        "raw/retain1.txt", "raw/retain2.txt", "verbmem/forget.json"]


def tofu_text(name):
    """What the fake hub holds as this TOFU file: as many records as the real one, one a line."""
    records = [{"question": f"Who is \u00fcber {name} {i}?", "answer": f"Nobody {i}."}
               for i in range(download.TOFU[name])]
    return "".join(json.dumps(record) + "\n" for record in records)


def muse_rows(dataset, config, split):
    """What the fake hub holds as this MUSE split: 207 rows in raw, 100 in verbmem, 1 in the
    others."""
    fields = {"verbmem": ("prompt", "gt"), "knowmem": ("answer", "question")}.get(config, ("text",))
    count = {"raw": 207, "verbmem": 100}.get(config, 1)
    return [{field: f"{field} {i} of {split}\nin {dataset}, d\u00e9j\u00e0 vu" for field in fields}
            for i in range(count)]


class Hub(BaseHTTPRequestHandler):
    """Answers like the hub and its dataset viewer. `server.spoil` may change any (status, body),
    or cut bytes off."""

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.seen.append(self.path)
        if url.path == "/rows":
            body = self.rows(**{key: values[0] for key, values in parse_qs(url.query).items()})
        else:
            folder, _, name = url.path.rpartition("/")
            name = name.removesuffix(".json")
            known = folder == "/datasets/locuslab/TOFU/resolve/main" and name in TOFU
            body = tofu_text(name).encode() if known else None
        status, sent, *missing = self.server.spoil(self.path, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent) + sum(missing)))
        self.end_headers()
        self.wfile.write(sent)

    def rows(self, dataset, config, split, offset, length):
        rows, offset, length = muse_rows(dataset, config, split), int(offset), int(length)
        assert length <= 100
        page = [{"row_idx": i, "row": row, "truncated_cells": []} for i,
                row in enumerate(rows)][offset:offset + length]
        return json.dumps({"features": [], "rows": page, "num_rows_total": len(rows),
                           "num_rows_per_page": 100,
                           "partial": False}).encode()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A running fake hub that download.py takes for the real one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.spoil = [], lambda path, body: (200, body) if body else (404,
                                                                                 b"no such file")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "VIEWER", f"{address}/rows")
    monkeypatch.setattr(download, "hf_hub_url", partial(huggingface_hub.hf_hub_url,
                                                        endpoint=address))
    huggingface_hub.close_session()  # the next one is opened with this environment
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def files_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fails(capsys, *argv):
    """The error line of a run that ends with status 2 and says nothing else on stderr."""
    assert download.main([*map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err[:-1].isprintable(), err
    return err


def test_tofu(hub, tmp_path, capsys):
    assert download.main(["tofu", "--output", str(tmp_path)]) == 0
    assert files_under(tmp_path) == [f"tofu/{name}.json" for name in TOFU]
    for name in TOFU:
        path = tmp_path / "tofu" / f"{name}.json"
        assert path.read_bytes() == tofu_text(name).encode()
        assert len(read_records(path)) == download.TOFU[name]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(TOFU)
    size = len(tofu_text("forget05").encode())
    assert f"{tmp_path / 'tofu' / 'forget05.json'}: 200 records, {size:,} bytes" in out


@pytest.mark.parametrize("corpus, dataset", [("news", "muse-bench/MUSE-News"),
                                             ("books", "muse-bench/MUSE-Books")])
def test_muse(hub, tmp_path, corpus, dataset):
    assert download.main([corpus, "--output", str(tmp_path)]) == 0
    folder = tmp_path / "muse" / corpus
    assert files_under(tmp_path) == [f"muse/{corpus}/{name}" for name in MUSE]
    for name in MUSE:
        config, split = name.split(".")[0].split("/")
        rows = muse_rows(dataset, config, split)
        if config == "raw":
            assert (folder / name).read_text(encoding="utf-8") == "\n\n".join(row["text"]
                                                                              for row in rows)
        elif config == "privleak":
            assert json.loads((folder / name).read_text()) == [row["text"] for row in rows]
        else:
            assert json.loads((folder / name).read_text()) == rows
    for name in MUSE_FILES:  # what eval.py --muse opens
        assert read_records(find(folder / name))


def test_all_is_everything_once(hub, tmp_path):
    assert download.main(["all", "news", "--output", str(tmp_path)]) == 0
    assert len(files_under(tmp_path)) == len(TOFU) + 2 * len(MUSE)
    pages = len(MUSE) + 2 * 4  # 207 raw rows are three
    assert len(hub.seen) == len(set(hub.seen)) == len(TOFU) + 2 * pages


@pytest.mark.parametrize("answer, message", [
    ((404, b"no such file"), "refuses"),
    ((200, b"<html>please log in</html>"), "not JSON"),
    ((200, tofu_text("forget05")[:-30].encode()), "not JSON"),
    ((200, "".join(tofu_text("forget05").splitlines(keepends=True)[:150]).encode()),
     "150 records came"),
    ((200, tofu_text("forget10").encode()), "400 records came, 200 are in it"),
    ((200, b"\n" * 2**20), "more than 1,000,000 bytes"),
    ((404, b"\x1b[2J\x07gone"), "refuses"),
    ((200, tofu_text("forget05").encode(), 100),
     "cannot be reached"),  # the connection ends 100 bytes early
])
def test_failure_in_the_middle_leaves_whole_files_only(hub, tmp_path, capsys, monkeypatch, answer,
                                                       message):
    monkeypatch.setattr(download, "LIMIT", 10**6)
    good = hub.spoil
    hub.spoil = lambda path, body: answer if "forget05.json" in path else good(path, body)
    assert message in fails(capsys, "tofu", "--output", tmp_path)
    done = files_under(tmp_path)
    assert done == ["tofu/forget01.json", "tofu/full.json"]  # those before it, and no trace of it
    hub.spoil, hub.seen[:] = good, []
    assert download.main(["tofu", "--output", str(tmp_path)]) == 0
    assert len(files_under(tmp_path)) == len(TOFU) and len(hub.seen) == len(TOFU) - len(done)


def test_failure_between_two_pages(hub, tmp_path, capsys):
    good = hub.spoil
    hub.spoil = lambda path, body: (404, b"gone") if "offset=200" in path else good(path, body)
    assert "refuses" in fails(capsys, "books", "--output", tmp_path)
    assert files_under(tmp_path) == []


def test_rows_of_other_columns(hub, tmp_path, capsys):
    hub.spoil = lambda path, body: (200, body.replace(b'"text":', b'"content":'))
    assert "MUSE-News, raw/forget" in fails(capsys, "news", "--output", tmp_path)
    assert files_under(tmp_path) == []


def changed(body, **fields):
    return json.dumps({**json.loads(body), **fields}).encode()


@pytest.mark.parametrize("spoil, message", [
    (lambda body: changed(body, partial=True), "only a part"),
    (lambda body: changed(body, rows=[]), "only a part"),
    (lambda body: changed(body, rows=json.loads(body)["rows"][:-1]), "only a part"),
    (lambda body: changed(body, rows=json.loads(body)["rows"] * 2), "only a part"),
    (lambda body: changed(body, num_rows_total=0), "only a part"),
    (lambda body: changed(body, num_rows_total=10**12, rows=[]), "only a part"),
    (lambda body: changed(body, num_rows_total="many"), "not an answer"),
    (lambda body: changed(body, rows=[{"row_idx": 0, "row": {}}]), "not an answer"),
    (lambda body: body.replace(b'"truncated_cells": []', b'"truncated_cells": ["text"]', 1),
     "only a part"),
    (lambda body: b"<html>please log in</html>", "not an answer"),
    (lambda body: b"[]", "not an answer"),
], ids=["partial", "no rows", "a row less", "rows twice", "none of none", "endless", "no number",
        "no row",
        "a cut cell", "html", "no object"])
def test_rows_that_are_not_whole_are_refused(hub, tmp_path, capsys, spoil, message):
    hub.spoil = lambda path, body: (200, spoil(body))
    assert message in fails(capsys, "news", "--output", tmp_path)
    assert files_under(tmp_path) == []


def test_a_busy_hub_is_asked_again(hub, tmp_path):
    good, answers = hub.spoil, [(503, b"busy")]
    hub.spoil = lambda path, body: answers.pop() if answers else good(path, body)
    assert download.main(["tofu", "--output", str(tmp_path)]) == 0
    assert len(hub.seen) == len(TOFU) + 1 and len(files_under(tmp_path)) == len(TOFU)


def test_existing_files_are_kept_without_force(hub, tmp_path):
    mine = tmp_path / "tofu" / "full.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert download.main(["tofu", "--output", str(tmp_path)]) == 0
    assert mine.read_text() == "mine" and len(hub.seen) == len(TOFU) - 1
    assert download.main(["tofu", "--output", str(tmp_path), "--force"]) == 0
    assert mine.read_text(encoding="utf-8") == tofu_text("full")
    assert len(hub.seen) == 2 * len(TOFU) - 1


@pytest.mark.parametrize("argv", [["tufo"], ["tofu", "wmdp"], []])
def test_unknown_names(tmp_path, capsys, argv):
    fails(capsys, *argv, "--output", tmp_path)
    assert files_under(tmp_path) == []


def test_offline(tmp_path, capsys):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # conftest's setting
    for name in ("tofu", "news"):
        assert "cannot be reached" in fails(capsys, name, "--output", tmp_path)
    assert files_under(tmp_path) == []


def test_no_network(tmp_path):
    """The command itself, with a hub address that nobody listens at."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
               "HF_ENDPOINT": f"http://127.0.0.1:{reserved.getsockname()[1]}"}
        done = subprocess.run([sys.executable, ROOT / "data" / "download.py", "tofu", "--output",
                               tmp_path],
                              env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the Hugging Face hub cannot be reached")
    assert done.stderr.count("\n") == 1
    assert files_under(tmp_path) == []
