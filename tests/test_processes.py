"""Several processes: on one output, under torchrun, killed, signalled, piped. One line, no loss."""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, SERVER, be_rank, end_of, free_port, log, run, start, stop_after,
                      weights, write_data, write_lines, write_model, write_tofu)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from data import make_mini_models as miniature
from data.support import evaluations

RUN = ("--model {0}/model --forget {0}/data/forget25 --retain {0}/data/retain75 --lr 1e-3 "
       "--batch-size 2 --save-every 1 --output run")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, data to train on, and TOFU files."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model", num_hidden_layers=1)
    write_data(folder / "data")
    for name in ("tofu", "other"):
        write_tofu(folder / name, n=3)
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words(text, world):
    return shlex.split(text.format(world))


def assert_one_line(result, status, *culprits):
    assert result[0] == status, result
    assert result[1].startswith("error: ") and result[1].count("\n") == 1, result[1]
    assert all(culprit in result[1] for culprit in culprits), result[1]


def names(folder):
    return {p.name for p in Path(folder).iterdir()}


# One owner at a time

def at_a_gate(name, step):
    """In its step number `step` the run makes a file `name`, and waits until that is gone."""
    update, steps = train.update, []

    def waiting(*args):
        steps.append(1)
        if len(steps) == step:
            Path(name).touch()
            wait_until(lambda: not Path(name).exists())
        return update(*args)
    train.update = waiting


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_two_trainings_into_one_folder(world):
    """The second is told so, whether it resumes or not, and the first loses nothing."""
    argv = words(f"{RUN} --epochs 2", world)
    assert run([*argv[:-4], "--output", "alone", *argv[-2:]])[0] == 0
    first = start(argv, at_a_gate, "gate", 2)
    wait_until(Path("gate").exists)
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    assert_one_line(run([*argv, "--resume"]), 2,
                    "run: another process is training into this folder")
    assert_one_line(run(argv), 2, "run: already holds a run")
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    Path("gate").unlink()
    assert end_of(*first) == (0, "")
    assert names("run") == names("alone")
    assert all(t.equal(weights(Path("alone"))[name]) for name, t in weights(Path("run")).items())


def wait_before(name, path):
    """Every call of this function of models.py is made only once `path` exists."""
    function = getattr(train.models, name)

    def waiting(*args):
        Path(path + ".wait").touch()
        wait_until(Path(path).exists)
        return function(*args)
    setattr(train.models, name, waiting)


def test_a_second_training_that_comes_when_the_first_is_done(world):
    """Between its check of the output and its own start, another run has begun and ended there."""
    argv = words(f"{RUN} --epochs 1", world)
    second = start(argv, wait_before, "fingerprint", "done")
    wait_until(Path("done.wait").exists)
    assert run(argv)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    Path("done").touch()
    assert_one_line(end_of(*second), 2, "run: already holds a run")
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before


def slow_reading():
    """Between reading an eval.json and writing it there is time for another process."""
    read_results = evaluations.read_results

    def slow(path):
        value = read_results(path)
        time.sleep(0.2)
        return value
    evaluations.read_results = slow


def test_two_evaluations_into_one_file(world):
    shutil.copytree(world / "model", "model")
    Path("model/eval.json").write_text('{"model": "model", "evaluations": {"tofu x": {}}}')
    commands = [f"model --forget {world}/{name}/forget05 --max-new-tokens 2"
                for name in ("tofu", "other")]
    both = [start(shlex.split(c), slow_reading, program="eval") for c in commands]
    assert [end_of(*each) for each in both] == [(0, ""), (0, "")]
    saved = json.loads(Path("model/eval.json").read_text())["evaluations"]
    assert len(saved) == 3 and [len(e["values"]["forget"]) for e in saved.values() if e] == [3, 3]
    assert names("model") == {*names(world / "model"), "eval.json"}


MAKER = """
import sys
from pathlib import Path
import train
from data import make_mini_models as miniature
miniature.DATA, miniature.TRAIN = Path({data!r}), __file__
miniature.BASE = miniature.FINETUNE = {{"lr": 1e-3, "epochs": 1}}
open("made", "a").write("once\\n")
sys.exit(train.main())
"""


def quick_builtin(data, program):
    """The built-in models are made by this program, in an epoch, of other data."""
    miniature.DATA, miniature.TRAIN = Path(data), program
    miniature.BASE = miniature.FINETUNE = miniature.UNLEARN = {"lr": 1e-3, "epochs": 1}


def test_the_first_command_makes_the_builtin_models(world, tmp_path):
    """runs/target, and runs/base for it, once; one process at a time."""
    data = tmp_path / "data"
    write_data(data)
    (data / "forget25.jsonl").rename(data / "forget01.jsonl")
    (data / "retain75.jsonl").rename(data / "retain99.jsonl")
    shutil.copy(data / "full.jsonl", data / "base.jsonl")
    maker = tmp_path / "maker.py"
    maker.write_text(MAKER.format(data=str(data)))
    argv = ["--forget", f"{data}/forget01", "--output"]
    assert run([*argv, "one"], quick_builtin, data, maker) == (0, "")
    assert run([*argv, "two"], quick_builtin, data, maker) == (0, "")
    assert Path("made").read_text() == "once\n" * 2
    assert names("runs") == {"base", "target"} and "config.json" in names("runs/target")
    one, two = weights(Path("one")), weights(Path("two"))
    assert all(one[name].equal(two[name]) for name in one)
    # Other data, under the same name: what was made from the old is not used in silence.
    other = (data / "full.jsonl").read_text().replace("Oslo", "Roma")
    (data / "full.jsonl").write_text(other)
    assert_one_line(run([*argv, "four", "--retain-loss", "none"], quick_builtin, data, maker), 2,
                    f"runs/target: made from other data than {data}/full holds now")
    assert not Path("four").exists()


# Ranks

def one_rank(connection, rank, port, argv, interfere):
    """What each rank does. Its folder is its own, as on a machine without a common disk."""
    be_rank(rank, port)
    Path(f"rank{rank}").mkdir(exist_ok=True)
    os.chdir(f"rank{rank}")
    if interfere:
        interfere[0](rank, *interfere[1:])
    with contextlib.redirect_stderr(io.StringIO()) as err:
        with contextlib.redirect_stdout(io.StringIO()):
            status = train.main(argv)
    connection.send((status, err.getvalue()))
    os._exit(0)  # as a process that has ended: the connections to the others are closed


def two_ranks(argvs, *interfere):
    """[(status, stderr)] of two ranks, each with its own arguments."""
    port, both = free_port(), []
    for rank, argv in enumerate(argvs):
        here, there = SERVER.Pipe(duplex=False)
        child = SERVER.Process(target=one_rank, args=(there, rank, port, argv, interfere))
        child.start()
        there.close()
        both.append((child, here))
    ended = []
    for child, connection in both:
        child.join(60)
        assert child.exitcode is not None, "hangs"
        ended.append(connection.recv())
    return ended


def test_the_first_rank_has_the_output(world):
    """Only its disk counts: what others hold in their folder of that name is never looked at."""
    argv = words(f"{RUN} --epochs 2", world)
    assert two_ranks([argv, argv]) == [(0, ""), (0, "")]
    assert names("rank1") == set()
    expected = weights(Path("rank0/run"))
    Path("rank0/run").rename("expected")
    assert two_ranks([argv, argv], stop_in_both, 3) == [(143, ""), (143, "")]
    # The other has a run of its own there, of another step and with other settings.
    shutil.copytree("rank0/run", "rank1/run")
    checkpoint = Path("rank1/run/checkpoint-00000003.safetensors")
    checkpoint.rename(checkpoint.with_name("checkpoint-00000002.safetensors"))
    Path("rank1/run/args.json").write_text('{"lr": 7}')
    before = {p: p.read_bytes() for p in Path("rank1/run").iterdir()}
    assert two_ranks([[*argv, "--resume"]] * 2) == [(0, ""), (0, "")]
    assert all(t.equal(expected[name]) for name, t in weights(Path("rank0/run")).items())
    assert {p: p.read_bytes() for p in Path("rank1/run").iterdir()} == before
    assert two_ranks([[*argv, "--resume"]] * 2) == [(0, ""), (0, "")]  # it is complete
    # Damaged, or in use: all end, and one says why.
    shutil.rmtree("rank0/run")
    assert two_ranks([argv, argv], stop_in_both, 3) == [(143, ""), (143, "")]
    os.truncate("rank0/run/checkpoint-00000003.safetensors", 1000)
    first, second = two_ranks([[*argv, "--resume"]] * 2)
    assert_one_line(first, 2, "not a whole checkpoint")
    assert second == (2, "")


def stop_in_both(rank, step):
    train.update = stop_after(step)


def test_ranks_must_have_the_same_files(world, tmp_path):
    """A mistake on any one of them is said by the first alone, and ends all; before they are
    joined, each says its own."""
    argv = words(f"{RUN} --epochs 1", world)
    write_lines(tmp_path / "short.jsonl", [{"question": "Who?", "answer": "He."}] * 4)
    write_model(tmp_path / "twin", seed=1, num_hidden_layers=1)
    for more, culprit in ((f"--forget {tmp_path}/short", "rank 1 has another forget, forget data"),
                          (f"--model {tmp_path}/twin", "rank 1 has another model, start"),
                          ("--lr 1", "rank 1 has another lr"),
                          ("--save-every 3", "rank 1 has another save-every"),
                          ("--forget no", "no such data file")):
        first, second = two_ranks([argv, [*argv, *more.split()]])
        assert_one_line(first, 2, culprit)
        assert second == (2, "")
    first, second = two_ranks([[*argv, "--beta", "0"]] * 2)
    assert_one_line(first, 2, "--beta")
    assert second == first and names("rank0") == set()


@pytest.mark.parametrize("rank", ["0", "1", "", "x"])
def test_a_rank_that_is_not_torchruns(rank, world):
    """RANK is left in the environment by something else: the run is one of its own."""
    environment = {"RANK": rank, "WORLD_SIZE": "2"}
    argv = words(f"{RUN} --epochs 1", world)
    assert run(argv, set_environment, environment)[0] == 0
    assert (Path("run") / "model.safetensors").is_file()


def set_environment(variables):
    os.environ |= variables


def fail_in(rank, who, step, error):
    """In this step, one rank or both raise an error, or take a loss that is not finite."""
    forget_losses, steps = train.forget_losses, []

    def failing(*args):
        steps.append(1)
        if len(steps) != step or who not in (rank, "both"):
            return forget_losses(*args)
        if error == "NaN":
            return forget_losses(*args) * float("nan")
        if error == "memory":
            torch.empty(2**55, dtype=torch.uint8)
        raise {"disk": OSError(28, "No space left on device")}[error]
    train.forget_losses = failing


@pytest.mark.parametrize("who, error, culprits", [
    (0, "disk", ("run: stopped after step 2", "No space left on device")),
    (1, "memory", ("after step 2", "out of memory", "--max-tokens"))])
def test_one_rank_fails(who, error, culprits, world):
    """It says why; the other ends, too."""
    argv = words(f"{RUN} --epochs 2", world)
    ended = two_ranks([argv, argv], fail_in, who, 3, error)
    assert_one_line(ended[who], 1, *culprits)
    assert ended[1 - who][0] == 1
    assert Path("rank0/run/checkpoint-00000002.safetensors").exists()


def test_what_is_not_finite_is_said_once(world):
    argv = words(f"{RUN} --epochs 2", world)
    first, second = two_ranks([argv, argv], fail_in, 1, 3, "NaN")
    assert_one_line(first, 1, "stopped after step 2", "checkpoint-00000002", "not finite")
    assert second == (1, "")


# Under torchrun: its own agent, launcher and rendezvous, forked from a process that has torch.

KILLED = RUN + " --epochs 4"


def one_killable_rank(connection, argv):
    """Says its id when it begins to train, and "step" in every step."""
    torch.set_num_threads(1)
    folder = train.run_folder
    load_checkpoint, update = folder.load_checkpoint, train.update
    folder.load_checkpoint = lambda *a: connection.send(os.getpid()) or load_checkpoint(*a)
    train.update = lambda *a: connection.send("step") or update(*a)
    with open("stderr", "a") as err, contextlib.redirect_stderr(err):
        with contextlib.redirect_stdout(io.StringIO()):
            status = train.main(argv)
    if status:
        sys.exit(status)


def torchrun(connection, argv):
    os.setpgid(0, 0)
    config = LaunchConfig(1, 1, 2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
                          monitor_interval=0.05)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)  # its own report of what has failed
    elastic_launch(config, one_killable_rank)(connection, argv)


def start_torchrun(argv):
    """The agent's process, the ranks' ids once they begin to train, and where they say "step"."""
    here, there = SERVER.Pipe(duplex=False)
    agent = SERVER.Process(target=torchrun, args=(there, argv))
    agent.start()
    there.close()
    pids = []
    with contextlib.suppress(EOFError):  # it was complete
        while len(pids) < 2:
            pids.append(here.recv())
    return agent, [pid for pid in pids if pid != "step"], here


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_kills_under_torchrun(world):
    """SIGKILL of all or of one rank, at any time of training, saving and finishing; each time all
    ranks end, and the run goes on to the weights of one that nothing happened to."""
    rng, kills, number = random.Random(0), [], 0
    undisturbed = [*words(KILLED, world), "--output", "undisturbed"]
    agent, _, said = start_torchrun(undisturbed)
    agent.join()
    while len(kills) < 6 or Path(f"run{number}").exists():
        output = Path(f"run{number}")
        argv = [*words(KILLED, world), "--output", str(output)]
        agent, pids, said = start_torchrun([*argv, *["--resume"] * output.exists()])
        whom = ("all", "one")[len(kills) % 2]
        if len(kills) < 6 and pids:
            with contextlib.suppress(EOFError):
                for _ in range(2 * rng.randrange(6)):  # two ranks say it
                    said.recv()
            time.sleep(rng.uniform(0, 0.1))
            for pid in {"all": [agent.pid, *pids], "one": rng.sample(pids, 1)}[whom]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        agent.join(60)
        wait_until(lambda: not any(map(alive, pids)))
        if agent.exitcode:
            kills.append(whom)
        else:
            assert_same(output, Path("undisturbed"))
            number += 1
    assert "Traceback" not in Path("stderr").read_text()


def assert_same(output, expected):
    assert names(output) == names(expected)
    assert all(t.equal(weights(expected)[name]) for name, t in weights(output).items())
    logs = [[{**line, "tokens_per_s": 0} for line in log(x)] for x in (output, expected)]
    assert logs[0] == logs[1]


# Signals and pipes, with the programs as they are started

def program(name, *argv, **options):
    command = [sys.executable, str(ROOT / name), *map(str, argv)]
    return subprocess.Popen(command, text=True, env=ENV, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def test_torchrun_is_stopped(world):
    """Ctrl-C reaches the ranks twice, by the terminal and by torchrun: they save, and one process
    may go on."""
    argv = [*words(RUN, world), "--epochs", "1000", "--save-every", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / "train.py"), *argv]
    with open("err", "w") as err:
        agent = subprocess.Popen(command, env=ENV, stdout=err, stderr=err)
        wait_until(lambda: Path("run/metrics.jsonl").exists() and len(log(Path("run"))) > 3)
        ranks_of_it = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (*ranks_of_it, agent.pid):
            os.kill(int(pid), signal.SIGINT)
        agent.wait(60)
    wait_until(lambda: not any(map(alive, ranks_of_it)) and list(Path("run").glob("checkpoint-*")))
    assert "train.py\", line" not in Path("err").read_text()
    assert run([*argv, "--resume"], stop_in_step, 1) == (143, "")
    steps = [line["step"] for line in log(Path("run")) if "lr" in line]
    assert steps == list(range(1, steps[-1] + 1))


def stop_in_step(step):
    train.update = stop_after(step)


@pytest.mark.parametrize("ignored", [False, True])
def test_the_terminal_is_closed(ignored, world):
    """SIGHUP saves; under nohup, where it is ignored, the run goes on."""
    argv = words(f"{RUN} --epochs 2 --save-every 0", world)
    if not ignored:
        assert run(argv, hang_up, False) == (129, "")
        assert [p.name for p in Path("run").glob("checkpoint-*")] == [
            "checkpoint-00000002.safetensors"]
    else:
        assert run(argv, hang_up, True) == (0, "")


def hang_up(ignored):
    """Twice: the shell and the kernel both say so when a terminal closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    train.update = stop_after(2, signal.SIGHUP)
    train.update = stop_after(2, signal.SIGHUP)


def test_a_second_ctrl_c_ends_a_run_at_once(world):
    child, _ = start(words(f"{RUN} --epochs 2 --save-every 0", world), interrupt_twice)
    child.join()
    assert child.exitcode == -signal.SIGINT and not list(Path("run").glob("checkpoint-*"))


def interrupt_twice():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.update = stop_after(2, signal.SIGINT)
    train.update = stop_after(2, signal.SIGINT)


def test_outside_the_main_thread(world):
    """As in a web service: the run goes its way, and catches no signals."""
    argv = words(f"{RUN} --epochs 1", world)
    assert run(argv, in_a_thread) == (0, "") and "config.json" in names("run")


def in_a_thread():
    main, ended = train.main, []

    def threaded(argv):
        thread = threading.Thread(target=lambda: ended.append(main(argv)))
        thread.start()
        thread.join()
        return ended[0]
    train.main = threaded


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_a_system_without_file_locks(name):
    code = ("import runpy, signal, sys; sys.modules['fcntl'] = None; del signal.SIGHUP; "
            f"sys.argv = ['{name}', '--help']; runpy.run_path({str(ROOT / name)!r}, "
            "run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], env=ENV, text=True, capture_output=True)
    assert_one_line((done.returncode, done.stderr), 2, "use Linux, macOS, or Windows by WSL")


def test_a_reader_that_goes_away(world):
    """As `| head -1` does: no traceback, and the work is done."""
    shutil.copytree(world / "model", "model")
    commands = [("eval.py", "model", "--forget", world / "tofu" / "forget05", "--limit", 2,
                 "--max-new-tokens", 2), ("train.py", *words(f"{RUN} --epochs 1", world))]
    children = [program(*command) for command in commands]
    for child in children:
        child.stdout.close()
    for child in children:
        child.wait(120)
        assert child.stderr.read() == "" and child.returncode == 0, child.args
    assert Path("model/eval.json").exists() and Path("run/config.json").exists()


def test_an_unreachable_hub():
    """Without a network a hub name is refused in one line; nothing tries for minutes."""
    env = {**ENV, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://localhost:{free_port()}"}
    code = ("import eval, train; statuses = [train.main('--forget data/forget01 --model no/one'"
            ".split()), eval.main('no/one --forget data/forget01'.split())]; print(statuses)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=60)
    assert done.stdout == "[2, 2]\n", done.stdout
    for line in done.stderr.splitlines(keepends=True):
        assert_one_line((2, line), 2, "error: no/one: ")
    assert done.stderr.count("\n") == 2


def test_a_hub_that_never_answers(world, tmp_path):
    """What is not cached ends in one line, what is cached is used: at --max-length it was read."""
    snapshot = tmp_path / "hub/models--tiny--mine/snapshots/1"
    shutil.copytree(world / "model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1")
    commit = ("from data.support import errors, models\n"
              "raise SystemExit(errors.one_line_errors(models.fingerprint)('tiny/none'))")
    train_it = [ROOT / "train.py", *words(f"{RUN} --max-length 999 --model tiny/mine", world)]
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        silent.listen()
        env = {**ENV, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
               "HF_ENDPOINT": f"http://localhost:{silent.getsockname()[1]}"}
        started = [subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE,
                                    text=True) for command in (["-c", commit], train_it)]
        try:
            said = [process.communicate(timeout=240)[1] for process in started]
        finally:
            for process in started:
                process.kill()
    for process, line, place in zip(started, said, ("tiny/none: no such", "--max-length 999: ")):
        assert_one_line((process.returncode, line), 2, place)
