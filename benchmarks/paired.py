"""Compare two settings by seed, also where a report does not, because they were trained for different times.

    python -m benchmarks.paired results/photos kd vanilla

The command reads the result files FOLDER/NAME-seed*.json of two names, and prints the mean difference of the test
accuracy after the last epoch, with its 95 % interval.
"""

import argparse
from pathlib import Path

from src.analysis.report_tables import by_seed
from src.analysis.results import Finished
from src.analysis.statistics import Comparison, compare_paired
from src.runs.result import Result, read_record


def compare(folder: Path, one: str, other: str) -> Comparison:
    """Compare the accuracies of two names over their common seeds, in percentage points."""
    runs = [
        [Finished(file, read_record(Result, file)) for file in sorted(folder.glob(f"{name}-seed*.json"))]
        for name in (one, other)
    ]
    ones, others = (by_seed(each, "accuracy") for each in runs)
    if not ones.keys() & others.keys():
        raise SystemExit(f"{one} and {other} have no seed in common in {folder}.")
    return compare_paired(one, other, ones, others)


def main() -> None:
    """Read the command line, and print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("one")
    parser.add_argument("other")
    options = parser.parse_args()
    found = compare(options.folder, options.one, options.other)
    interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f}"
    print(f"{found.one} minus {found.other}: {found.difference:+.2f} points, {interval}, {len(found.seeds)} seeds")


if __name__ == "__main__":
    main()
