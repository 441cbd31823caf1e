"""The studies of RESULTS.md, each by one command; the prediction stands at the head of its file.

    python tests/studies/experiments.py null      six retrained models: what no difference is
    python tests/studies/experiments.py methods   seven losses at equal pull
    python tests/studies/experiments.py strata    facts told 1, 4, 16 times; short and long answers
    python tests/studies/experiments.py relearn   how much comes back (starts from strata)
    python tests/studies/experiments.py bias      half of the forget set was never learned
    python tests/studies/experiments.py muse      MUSE in miniature: texts instead of questions
    python tests/studies/experiments.py markov    the paper's synthetic study
    python tests/studies/experiments.py weights   no run: what weight each loss gives a token

Everything is done by train.py and eval.py and kept under runs/studies; a command that was cut off
goes on where it stopped. What is complete is not made again: delete it if you change how it is
made. `--picture FILE` also draws what comes out (needs matplotlib). One process a core, of one
thread each (PROCESSES=1: fewer). Grids go to tests/figures/*.csv.
"""

import argparse
import importlib
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies import common  # noqa: E402

STUDIES = ("null", "methods", "strata", "relearn", "bias", "muse", "markov", "weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--picture", metavar="FILE", help="also draw it")
    options = parser.parse_args()
    if options.picture:
        common.pyplot()  # says at once that it is missing
    began = time.time()
    importlib.import_module(f"studies.{options.study}").study(options)
    common.pool().shutdown()
    cpu = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
              for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\n{options.study}: {(time.time() - began) / 60:.1f} minutes, {cpu / 60:.1f} of a CPU")


if __name__ == "__main__":
    main()
