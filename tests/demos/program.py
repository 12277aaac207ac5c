"""Running the program, and summaries over seeds, for the demonstrations of this folder."""

import os
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def path(text):
    return Path(text).resolve()


def add_program(parser):
    """The option that names the program."""
    parser.add_argument("--program", default=ROOT / "target" / "release" / "lowrank", type=path)


def lowrank(program, *words, folder=None, threads=None):
    """Output of a command; a command that fails ends the demonstration with its message."""
    environment = os.environ | ({"RAYON_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr}")
    return done.stdout


def at_best_rate(train, rates, seeds):
    """The learning rate of the lowest loss with the first seed, and the results of all seeds at it.

    Of the ascending rates only those are tried that lead downhill from the middle one.
    """
    results = {}

    def result(at, seed=seeds[0]):
        if (at, seed) not in results:
            results[at, seed] = train(rates[at], seed)
        return results[at, seed]

    best = len(rates) // 2
    for direction in (1, -1):
        while 0 <= best + direction < len(rates) and result(best + direction)["loss"] < result(best)["loss"]:
            best += direction
    return rates[best], [result(best, seed) for seed in seeds]


def mean_and_deviation(values, digits=4):
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def row(*cells):
    """Prints a row of a table in Markdown."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
