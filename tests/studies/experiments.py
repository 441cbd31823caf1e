"""The studies of RESULTS.md; the prediction of each stands at the head of its file.

    python tests/studies/experiments.py null      six retrained models: what no difference is
    python tests/studies/experiments.py methods   seven losses at equal pull
    python tests/studies/experiments.py strata    facts told 1, 4, 16 times; short and long answers
    python tests/studies/experiments.py relearn   how much comes back (starts from strata)
    python tests/studies/experiments.py bias      half of the forget set was never learned
    python tests/studies/experiments.py muse      MUSE in miniature: texts instead of questions
    python tests/studies/experiments.py markov    the paper's synthetic study
    python tests/studies/experiments.py weights   no run: what weight each loss gives a token
    python tests/studies/experiments.py comeback  the default command; rounded weights, samples
    python tests/studies/experiments.py all       all of them, in the order that they need

Everything is done by train.py and eval.py and kept under runs/studies; a command that was cut off
goes on where it stopped. What is complete is not made again: delete it if you change how it is
made. `--pictures` also draws tests/figures/STUDY.png (needs matplotlib). One process a core, of one
thread each (PROCESSES=1: fewer). What was measured goes to tests/figures/*.csv.
"""

import argparse
import importlib
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies import common  # noqa: E402

STUDIES = ("null", "methods", "comeback", "strata", "relearn", "bias", "muse", "markov", "weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=(*STUDIES, "all"), metavar="STUDY")
    parser.add_argument("--pictures", action="store_true", help="also draw them")
    options = parser.parse_args()
    if options.pictures:
        common.pyplot()  # says at once that it is missing
    for name in STUDIES if "all" in options.studies else options.studies:
        began, used = time.time(), processor_time()
        options.picture = common.FIGURES / f"{name}.png" if options.pictures else None
        importlib.import_module(f"studies.{name}").study(options)
        common.pool().shutdown()  # what processes have used is known when they have ended
        common.pool.cache_clear()
        print(f"\n{name}: {(time.time() - began) / 60:.1f} minutes, "
              f"{(processor_time() - used) / 60:.1f} of a CPU", flush=True)


def processor_time():
    return sum(used.ru_utime + used.ru_stime for used in map(
        resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


if __name__ == "__main__":
    main()
