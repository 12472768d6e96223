"""Train a locally stable network by manifold regularization (Jin & Rinard 2020).

nanomr train                     # shapes10, offline: two minutes
nanomr train --data cifar10      # 100 epochs of the small network
nanomr train --data cifar10 --device gpu   # PreActResNet18
nanomr train --data mine.npz     # images and labels of your own
nanomr train --method standard   # another method: they are listed above
nanomr train --resume runs/small-shapes10-manifold-0
mpiexec -n 2 python -m mpi4py -m nanomr train   # on two ranks
"""

import argparse
import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import checkpoint, cli, metrics, models, optim, parallel, rng
from ..backend import to_device, use_device
from ..errors import UserError
from ..methods import METHODS, certified
from ..train import Config, Interrupted, Trainer
from . import common

# PreActResNet18's are the paper's. The paper's for the small network collapse: docs/reproduction.md has the sweep.
DEFAULTS = {
    "small": dict(gamma_i=10.0, gamma_h=300.0, lr=0.03, clip=1.0),
    "small on shapes10": dict(gamma_i=4.0, gamma_h=300.0, lr=0.05, clip=1.0),
    "preact_resnet18": dict(gamma_i=0.8, gamma_h=2400.0, lr=0.1, clip=0.0),
    "mlp": dict(gamma_i=0.4, gamma_h=600.0, lr=0.05, clip=1.0),
}
EPOCHS = {"cifar10": 100}  # of every other data set: 30
HOLD_OUT = {"cifar10": 5000, "shapes10": 2000}  # of one's own: a tenth, 5000 at most
PAPERS = "the paper's methods that have that term"
USES = {  # what a flag is for, and whether a run has a use for it
    **dict.fromkeys(("kernel", "batch_norm"), ("--model small", lambda run: run.architecture["name"] == "small_cnn")),
    **dict.fromkeys(("width", "jin_v1"), ("--model preact_resnet18", lambda run: "preact" in run.architecture["name"])),
    "gamma_i": (PAPERS, lambda run: run.method in ("manifold", "intrinsic")),
    "gamma_h": (PAPERS, lambda run: run.method in ("manifold", "hamming")),
    "gamma_factor": ("manifold, intrinsic and hamming", lambda run: bool(METHODS[run.method].corners)),
    "alpha": ("methods with a Hamming term", lambda run: _has_hamming(run.method)),
    "hamming_norm": ("methods with a Hamming term", lambda run: _has_hamming(run.method)),
    "eps_start": ("--recipe paper", lambda run: run.recipe == "paper"),
    "ramp_from": ("--recipe ramp", lambda run: run.recipe == "ramp"),
    "ramp_to": ("--recipe ramp", lambda run: run.recipe == "ramp"),
    "momentum": ("--optimizer sgd", lambda run: run.optimizer == "sgd"),
    "pad": ("random crops (--augment)", lambda run: run.augment),
}
WITH_RESUME = set("resume device no_graph kernels data_dir no_download test_images parallel parallel_timeout".split())


def parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    positive, natural = cli.number(int, low=1), cli.number(int, low=0)
    non_negative, share = cli.number(cli.fraction, low=0), cli.number(cli.fraction, low=0, high=1)
    auto = argparse.SUPPRESS

    g = p.add_argument_group("what to train")
    text = (
        "small: images of at least 4x4 pixels; preact_resnet18: square images; mlp: any images, two layers of 256 "
        "units. Default: small on a CPU, preact_resnet18 on a GPU"
    )
    g.add_argument("--model", choices=("small", "preact_resnet18", "mlp"), help=text)
    text = "small: 4 (the default) as Wong et al., 5 as Xiao et al."
    g.add_argument("--kernel", type=int, choices=(4, 5), default=None, help=text)
    folding = ", ".join(name for name, method in METHODS.items() if method.finish)
    text = f"small: one behind each hidden layer; {folding} fold it in what they save; default: theirs alone"
    g.add_argument("--batch-norm", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "preact_resnet18: channels of its first stage; 32 is a quarter of the arithmetic (default: 64)"
    g.add_argument("--width", type=positive, default=None, help=text)
    g.add_argument("--jin-v1", action="store_true", help="preact_resnet18: the network of the paper's first version")
    text = "what a step minimises, see below"
    g.add_argument("--method", choices=METHODS, default="manifold", metavar="NAME", help=text)
    text = "a constant of the method's own, may be given several times; default: see below"
    g.add_argument("--constant", type=_constant, action="append", metavar="NAME=VALUE", help=text)
    text = "begin with the weights of another run of the same network, as its last.safetensors has them"
    g.add_argument("--init", type=Path, metavar="RUN", help=text)
    text = "with --init: channels that no box around 1,000 training images turns on share the live ones' work; on a CPU"
    g.add_argument("--revive", action="store_true", help=text)
    seed = cli.number(int, low=0, high=2**63 - 1)
    g.add_argument("--seed", type=seed, default=0, help="of weights, shuffling, augmentation and corners")

    g = p.add_argument_group("data")
    common.add_data(g, "what to train on; shapes10 is drawn on the fly", "shapes10")
    text = (
        "last training images, kept for monitoring, 0 for none; default: 5000 (cifar10), 2000 (shapes10), a tenth of "
        "your own, up to 5000"
    )
    g.add_argument("--hold-out", type=natural, default=None, help=text)
    g.add_argument("--train-images", type=natural, default=0, help="use only the first so many; 0: all")
    text = "random crops (of --pad pixels of padding) and flips, of uint8 images; default: not for your own"
    g.add_argument("--augment", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "black pixels around an image that is cropped, 0: flips alone; default: 4, 2 by --recipe ramp"
    g.add_argument("--pad", type=natural, default=None, help=text)

    text = "what is not given is the recipe's, the recipe the method's, scaled to --epochs"
    g = p.add_argument_group("optimisation", text)
    text = "; ".join(f"{name}: {recipe.help}" for name, recipe in optim.RECIPES.items())
    g.add_argument("--recipe", choices=optim.RECIPES, default=None, help=text)
    text = "of --recipe ramp: the share of the run with which eps begins to grow"
    g.add_argument("--ramp-from", type=share, default=Config.ramp_from, help=text)
    text = "of --recipe ramp: the share of the run from which on eps is full"
    g.add_argument("--ramp-to", type=share, default=Config.ramp_to, help=text)
    text = "default: adamw with --recipe ramp, sgd with the others"
    g.add_argument("--optimizer", choices=("sgd", "adamw"), default=None, help=text)
    g.add_argument("--epochs", type=natural, default=None, help="default: 100 for cifar10, 30 for others")
    g.add_argument(
        "--batch-size", type=positive, default=128, help="clean images; the regularisers see three times as many"
    )
    g.add_argument("--lr", type=non_negative, default=None, help="peak; default: " + _defaults("lr"))
    g.add_argument("--momentum", type=share, default=0.9, help="of sgd")
    text = "gamma_K, on all parameters; default: 5e-4, 2e-4 (steps), 1e-5 (ramp)"
    g.add_argument("--weight-decay", type=non_negative, default=None, help=text)
    g.add_argument(
        "--clip", type=non_negative, default=None, help="gradient norm, 0 for none; default: " + _defaults("clip")
    )

    g = p.add_argument_group("regularisers", "eps is every method's, the others the paper's")
    g.add_argument(
        "--eps", type=cli.linf_radius, default="8/255", help="radius of the Linf ball at the end, pixels in [0, 1]"
    )
    g.add_argument("--eps-start", type=cli.linf_radius, default="2/255", help="at the beginning, by --recipe paper")
    g.add_argument("--gamma-i", type=non_negative, default=None, help="intrinsic; default: " + _defaults("gamma_i"))
    g.add_argument("--gamma-h", type=non_negative, default=None, help="Hamming; default: " + _defaults("gamma_h"))
    g.add_argument("--gamma-factor", type=non_negative, default=10.0, help="both grow by this factor")
    g.add_argument("--alpha", type=non_negative, default=8.0, help="of the tanh relaxation")
    g.add_argument(
        "--hamming-norm", choices=("batch", "sample"), default="batch", help="l2 norm over the batch or per sample"
    )

    g = p.add_argument_group("run")
    g.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="where to compute")
    text = (
        "of the activations; weights are float32. default: bf16 on a GPU for the paper's methods and standard, else "
        "fp32; of the other methods worst-corner may have bf16, none tf32, which is for a GPU"
    )
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default=None, help=text)
    text = "on a GPU: start every kernel of a step by itself instead of a CUDA graph of them all (bf16 alone has one)"
    g.add_argument("--no-graph", action="store_true", help=text)
    text = "on a GPU: auto tests ours on the first run, and replaces what fails there by plain CuPy, which is slower"
    g.add_argument("--kernels", choices=("auto", "own", "plain"), default="auto", help=text)
    g.add_argument("--out", type=Path, default=None, help="run folder; default: runs/MODEL-DATA-METHOD-SEED")
    g.add_argument(
        "--resume", type=Path, metavar="RUN", default=auto, help="go on with this run folder; its settings count"
    )
    text = "several ranks train as one (docs/distributed.md); auto: those that mpiexec started, by NCCL on a GPU each"
    g.add_argument("--parallel", choices=("auto", "none", "mpi", "nccl"), default="auto", help=text)
    text = "seconds that a rank waits for the others before all end; 0: for ever; not on NCCL"
    timeout = cli.number(float, low=0)
    g.add_argument("--parallel-timeout", type=timeout, default=parallel.TIMEOUT, metavar="SECONDS", help=text)
    text = f"the same bits on 1, 2, 3, 4, 6 or 12 ranks, which play {parallel.PARTS}: slower, on CPUs"
    g.add_argument("--exact", action="store_true", help=text)
    text = "batch norms use the statistics of each rank's rows: fewer sums, but another algorithm, with noisier ones"
    g.add_argument("--local-batchnorm", action="store_true", help=text)
    g.add_argument("--test-images", type=natural, default=1000, help="for the attack in the closing table; 0: no table")
    p.add_argument_group("methods", "\n".join(_methods()))
    return p


def _methods():
    """A line for each method, and one for each constant of its own."""
    for name, method in METHODS.items():
        yield f"{name:12} {method.help}"
        yield from (f"{'':14}{key}={c.default:g}: {c.help}" for key, c in method.constants.items())


def _constant(text: str) -> tuple[str, float]:
    """An argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as kappa=0.2")
    return name, cli.fraction(value)


def _defaults(name: str) -> str:
    values = [f"{values[name]:g} ({model})" for model, values in DEFAULTS.items()]
    values += [
        f"{recipe.defaults[name]:g} ({key})" for key, recipe in optim.RECIPES.items() if recipe.defaults.get(name)
    ]
    return ", ".join(values)


def configure(args, device: str, dataset) -> Config:
    """The run's Config, with every default filled in. Raises UserError for flags that do not fit each other."""
    model = args.model or ("preact_resnet18" if device == "gpu" else "small")
    own = args.data.endswith(".npz")
    shape, classes = dataset.train_images.shape[1:], len(dataset.classes)
    options = dict(
        zip(("mean", "std"), _statistics(dataset) if own else (models.CIFAR_MEAN, models.CIFAR_STD), strict=True)
    )
    options["input_shape"] = shape
    try:
        architecture = {
            "small": lambda: models.small_cnn(
                kernel=args.kernel or 4,
                classes=classes,
                batchnorm=METHODS[args.method].finish is not None if args.batch_norm is None else args.batch_norm,
                **options,
            ),
            "preact_resnet18": lambda: models.preact_resnet18(
                jin_v1=args.jin_v1, width=args.width or 64, classes=classes, **options
            ),
            "mlp": lambda: models.mlp((math.prod(shape), 256, 256, classes), **options),
        }[model]().architecture
    except ValueError as error:
        raise UserError(f"--model {model} does not fit {dataset.name}: {error}") from None
    of_model = DEFAULTS.get(f"{model} on {'shapes10' if own else args.data}", DEFAULTS[model])
    hold_out = min(len(dataset.train_images) // 10, 5000) if own else HOLD_OUT[args.data]
    method, recipe = METHODS[args.method], args.recipe or METHODS[args.method].recipe
    if recipe == "ramp" and args.ramp_from > args.ramp_to:
        raise UserError(f"--ramp-from {args.ramp_from:g} is behind --ramp-to {args.ramp_to:g}: swap the two")
    defaults = {k: v for k, v in optim.RECIPES[recipe].defaults.items() if v is not None}
    chosen = {k: v if getattr(args, k, None) is None else getattr(args, k) for k, v in (of_model | defaults).items()}
    try:
        constants = method.filled(dict(args.constant or []))
    except ValueError as error:
        raise UserError(f"--constant, with --method {args.method}: {error}") from None
    if "gamma_i" in constants and (args.gamma_i, args.gamma_h) != (None, None):
        name = "gamma_h" if args.gamma_i is None else "gamma_i"
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} is for the paper's methods: with --method {args.method} it is --constant {name}=X")
    paired = method.corners is not None
    if args.precision not in (None, *method.precisions):
        able = " or ".join(method.precisions)
        raise UserError(f"--method {args.method} is trained in {able}: leave out --precision {args.precision}")
    digest, weights = "", args.init and args.init / "last.safetensors"
    if args.revive and not (weights and device == "cpu"):
        raise UserError("--revive is for the weights that --init names, on a CPU: give --init, and --device cpu")
    if weights:
        if not weights.is_file():
            raise UserError(f"--init {args.init} is not a run: there is no {weights.name} in it")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return Config(
        architecture=architecture, method=args.method, data=dataset.source["file"] if own else args.data,
        epochs=EPOCHS.get(args.data, 30) if args.epochs is None else args.epochs,
        hold_out=hold_out if args.hold_out is None else args.hold_out,
        batch_size=args.batch_size, train_images=args.train_images, seed=args.seed, momentum=args.momentum,
        eps=args.eps, eps_start=args.eps_start, gamma_factor=args.gamma_factor, constants=constants, recipe=recipe,
        ramp_from=args.ramp_from, ramp_to=args.ramp_to, alpha=args.alpha, hamming_norm=args.hamming_norm,
        augment=not own if args.augment is None else args.augment,
        precision=args.precision or ("bf16" if device == "gpu" and paired else "fp32"),
        local_batchnorm=args.local_batchnorm, exact=args.exact, init=digest, revive=args.revive,
        **chosen,
    )  # fmt: skip


def refuse_unused(given: set[str], run: Config):
    """UserError for a flag among the ``given`` ones, by their destinations, that would change nothing in this run."""
    for flag in sorted(given & USES.keys()):
        use, used = USES[flag]
        if not used(run):
            raise UserError(f"--{flag.replace('_', '-')} is for {use}, and would change nothing here: leave it out")


def _has_hamming(method: str) -> bool:
    """Is the term in the log? ``intrinsic`` has it there, with the weight 0."""
    return bool(METHODS[method].corners) or "gamma_h" in METHODS[method].constants


def _statistics(dataset) -> tuple[tuple, tuple]:
    """Mean and standard deviation of each channel, 1 for one that is constant: of the first 10,000 training images."""
    images = metrics.as_float(dataset.train_images[:10_000])
    mean, std = images.mean((0, 1, 2), dtype=float), images.std((0, 1, 2), dtype=float)
    return tuple(mean.round(4).tolist()), tuple(np.where(std < 1e-3, 1, std.round(4)).tolist())


def read_config(path: Path) -> tuple[Config, dict]:
    """The Config in a run's config.json, and what it says of the data. Raises UserError for anything else."""
    saved = checkpoint.read_json(path)
    try:
        return Config(**saved["config"]).checked(), {"name": saved["config"]["data"], "source": saved.get("source")}
    except (TypeError, KeyError, ValueError) as error:
        why = str(error).partition("() ")[2] or error
        raise UserError(f"{path} is not the configuration of a run of this version ({why}): restore it") from None


def closing_table(model, dataset, config: Config, n: int, device: str) -> dict:
    """Accuracy on the test set, which nothing before has looked at: clean on all of it, PGD on its first ``n``."""
    images, labels = to_device(dataset.test_images, device), to_device(dataset.test_labels, device)
    n = min(n, len(images))
    with common.progress(n, "PGD-20 x 10 on test images") as advance:
        robust = metrics.robust_accuracy(
            model, images[:n], labels[:n], config.eps, steps=20, restarts=10, seed=config.seed, progress=advance
        )
    result = {
        "test_images": len(images), "clean": metrics.accuracy(model, images, labels),
        "attacked_images": n, "clean_attacked": metrics.accuracy(model, images[:n], labels[:n]), "pgd20x10": robust,
        "eps": config.eps, "seed": config.seed, "source": dataset.source,
    }  # fmt: skip
    print(f"\n{dataset.name}, test images         clean   PGD-20 x 10, eps {config.eps * 255:g}/255")
    print(f"  all {len(images):6d}                {result['clean']:7.2%}")
    print(f"  first {n:6d}              {result['clean_attacked']:7.2%}   {robust:7.2%}")
    return result


def main() -> int:
    args = common.arguments(parser(), "--parallel", lambda value: value != "none")
    ranks = parallel.start(args.parallel, args.device, args.parallel_timeout or math.inf)
    with ranks.together():
        return _main(args, ranks)


def _main(args, ranks: parallel.Ranks) -> int:
    if ranks.rank == 0:
        common.announce_compilation()
    resume = getattr(args, "resume", None)
    with ranks.first():
        device = use_device(args.device, args.kernels)
        if not resume:
            dataset = common.load_data(args, args.data)
            config = configure(args, device, dataset)
            refuse_unused(cli.given(parser()), config)
            network = config.architecture["name"].removesuffix("_cnn")
            folder = args.out or Path("runs") / f"{network}-{Path(config.data).stem}-{config.method}-{config.seed}"
        elif ignored := sorted(cli.given(parser()) - WITH_RESUME):
            flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in ignored)
            raise UserError(f"--resume goes on with the run's own settings: leave out {flags}, or begin another run")
        else:
            args.data = None  # the run's own
            folder = resume
            config, recorded = read_config(folder / "config.json")
            dataset = common.load_data(args, recorded)

    if config.exact and device == "gpu":
        raise UserError("--exact is for CPUs: use --device cpu")

    def work(ranks):
        trainer = Trainer(config, dataset, folder, device, graph=not args.no_graph, ranks=ranks)
        with trainer.own_folder():
            if resume:
                trainer.resume()
            elif trainer.writes and (folder / "last.safetensors").exists():
                raise UserError(
                    f"{folder} holds a run already: --resume {folder} goes on with it, --out chooses another folder"
                )
            elif trainer.writes:
                trainer.save_config()
            if args.init and not resume:
                begin_with(trainer, args.init)
            return train(trainer, args.test_images)

    return parallel.play(work, ranks) if config.exact else work(ranks)


def begin_with(trainer: Trainer, run: Path):
    """Give the trainer's network the weights of another run's last.safetensors, its dead channels revived where the
    configuration says so. UserError where they do not fit."""
    tensors, _ = checkpoint.load_tensors(run / "last.safetensors")
    trainer.model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    if trainer.config.revive:
        draw = rng.generator(trainer.config.seed, rng.INIT, 3)
        try:
            certified.revive(trainer.model, trainer.images[:1000], trainer.config.eps, draw)
        except ValueError as error:
            raise UserError(f"--revive: {error}") from None


def train(trainer: Trainer, test_images: int) -> int:
    """Say what the run is, train, and end with pictures and a table: rank 0 does, the others train with it."""
    if not trainer.writes:
        with suppress(Interrupted):
            trainer.run()
        return 0
    folder, config = trainer.folder, trainer.config
    network = f"{trainer.model.name}, {trainer.model.weights.size} weights"
    print(
        json.dumps({"run": str(folder), "device": trainer.device, **asdict(config), "architecture": network}, indent=1),
        flush=True,
    )
    if trainer.ranks.size > 1:
        print(f"{trainer.ranks.size} ranks, {trainer.share.rows.stop} of {config.batch_size} images here", flush=True)
    try:
        model = trainer.run()
    except Interrupted as stopped:
        trainer.plot()
        print(f"\n{stopped}")
        return 130
    picture = trainer.plot()
    if test_images:
        result = closing_table(model, trainer.dataset, config, test_images, trainer.device)
        checkpoint.write_json(folder / "test.json", result)
    files = ["model.safetensors", "log.jsonl", *["test.json"] * bool(test_images), *["curves.png"] * bool(picture)]
    print("\n" + cli.fold([f"{folder}: {', '.join(files)}"]))
    return 0
