# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What does regularization do for the training of networks? Five experiments, which can be interrupted.

Networks have one hidden layer of ReLUs, on MNIST (`--data mnist.npz`, with the arrays x_train, y_train, x_test
and y_test) or scikit-learn's digits. Every result is appended to `--store`, a line of JSON for each method,
setting and seed, with versions and machine; what is there is not run again. Ctrl-C makes tables of what there is.
Change a setting in these files and its units are other units. Use one process per store.

a. The experiment of García Trillos, Kaplan & Sanz-Alonso (2019) on networks, in our settings: we do not know
   theirs. 500 updates from the same random start, test accuracy after every hundred. The rate tau / T is 0.5, as
   SGD's, at three taus, so that they differ in how far around they look. An update of SGD sees 255 rows, and so
   does one of SGLD or heat, by five gradients of 51 rows each; one of importance sampling a batch of 256; one of
   Entropy-SGD, with its defaults, 20 batches of 256. Importance sampling has 32 draws, whose weights set T. HMC,
   which takes hundreds of gradients for each of its two draws, has batches of 64, the smaller network, one tau and
   one seed.
   Time is in turn with SGD's.
b. What further training changes: 2,000 updates of SGD, then 200 more of SGD, heat, local entropy or Entropy-SGD
   at tau = 1e-4, with the settings of a. Accuracy, negative log-likelihood (NLL), expected calibration error (ECE,
   15 equal bins) of the test images; flatness is the rise of heat over the training loss when each weight moves
   by a tenth of the root mean square of its filter, with the error of that estimate.
c. Equal numbers of gradients, with none, 20 or 40 % of the training labels replaced by wrong ones; 10,000 images
   of MNIST for training (1,100 of the digits), constant rates, no momentum but Entropy-SGD's own. Each method has
   the best of six settings by accuracy on other images with right labels, mean of two other seeds, at each noise.
   A step of SAM takes two gradients; "fSGLD, half" has half the gradients of all others.
d. No gradient at all: clouds of importance sampling and Adam, whose rate falls to zero, on 784-128-10 with batches
   of 512, for ReLUs, for weights that are integers of 8 bits, and for activations that are staircases. Seconds are
   those of the steps. A run that was killed goes on from its last fortieth.
e. Eight taus of heat side by side by `vmap` over the optimizer, whose tau is a leaf: programs that XLA compiled,
   time over that of one run, test accuracy by tau.

± is the standard deviation over seeds.
"""

from pathlib import Path

import harness
from training_budgets import at_equal_gradients
from training_figures import draw
from training_free import NUM_SAMPLES, RATE, WIDTH, without_gradients
from training_page import write
from training_store import Runner, Store
from training_tasks import Task
from training_updates import after_sgd, from_start, sweep

# Seeds of each; `--seeds` is for all of them.
EXPERIMENTS = {
    "a": (from_start, 3),
    "b": (after_sgd, 5),
    "c": (at_equal_gradients, 10),
    "d": (without_gradients, 3),
    "e": (sweep, 5),
}


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--data", help="an npz file of images; default: scikit-learn's digits")
    parser.add_argument("--only", default="a,b,c,d,e", help="experiments, such as a,c")
    parser.add_argument("--seeds", type=int, help="of each method and setting")
    parser.add_argument("--evaluations", type=int, default=400_000, help="of each run of d")
    parser.add_argument(
        "--free",
        type=float,
        nargs=3,
        default=(WIDTH, NUM_SAMPLES, RATE),
        metavar=("WIDTH", "DRAWS", "RATE"),
        help="of d: width of the clouds, draws, and first rate in widths per step",
    )
    parser.add_argument(
        "--store", type=Path, help="results; default: training.jsonl, or none with --smoke"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: tables of the store")
    parser.add_argument("--page", type=Path, help="a folder for figures and tables as Markdown")
    parser.add_argument("--suffix", default="", help="of the names of these files")
    options = parser.parse_args()
    smoke = options.smoke
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(EXPERIMENTS):
        parser.error(
            f"expected --only of {', '.join(EXPERIMENTS)}, got {', '.join(sorted(unknown))}"
        )
    path = options.store
    if path is None and not smoke:
        path = Path("training.jsonl")
    print(harness.environment())
    run = Runner(Store(path), report_only=options.report)
    task, tables = Task(options.data, smoke=smoke), {}
    for name in chosen:
        experiment, seeds = EXPERIMENTS[name]
        seeds = 2 if smoke else options.seeds or seeds
        settings = (
            {"evaluations": options.evaluations, "point": options.free} if name == "d" else {}
        )
        for title, rows in experiment(task, run, seeds, smoke=smoke, **settings).items():
            if rows:
                tables[title] = rows
                harness.show(title, rows)
    harness.save(options.out, tables)
    if options.page is not None:
        figures = draw(options.page, tables, options.suffix)
        pages = write(options.page, tables, figures, options.suffix)
        print(*figures.values(), *pages, sep="\n")


if __name__ == "__main__":
    main()
