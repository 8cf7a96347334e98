"""
A toy script: learns y = 2x.

    python toy.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

PRESETS = {"quick": {}, "paper": dict(model=["linear", "mlp"], width=[8], steps=50)}
LEARNING_RATE = {"linear": 0.1, "mlp": 0.01}
SWEEP = ["model", "width", "seed"]


def resolve(args):
    """Completes a run's flags: the learning rate is the model's, and a linear model has no width."""
    if args.lr is None:
        args.lr = LEARNING_RATE[args.model]
    if args.model == "linear":
        args.width = None
        args.depth = None


def build(args):
    """The task (none) and the model of a run."""
    if args.model == "linear":
        return None, nn.Linear(1, 1).to(args.device)
    if args.width % 2:
        raise ValueError(f"width {args.width} is odd")
    return None, nn.Sequential(nn.Linear(1, args.width), nn.Dropout(0.1), nn.Linear(args.width, 1)).to(args.device)


def load(folder, device="cpu"):
    """The task and the trained model of a run."""
    return common.load(folder, build, device)


def train(args, run):
    _, model = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    data = torch.Generator(args.device).manual_seed(args.seed)
    start = run.restore(model, optimizer, data)
    if args.compile:
        model.compile()
    for step in run.steps(start, args.steps):
        x = torch.randn(16, 1, generator=data)
        loss = F.mse_loss(model(x), 2 * x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            run.log(step + 1, loss=loss.item(), error=loss.item() ** 0.5)


def measure(args, run):
    _, model = run.trained(build)
    x = torch.linspace(-1, 1, args.n_eval)[:, None]
    return dict(error=F.mse_loss(model(x), 2 * x).item(), n_eval=args.n_eval)


def parse_args(argv=None):
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", choices=["linear", "mlp"], default=["linear"], help="models")
    add("--width", nargs="+", type=common.positive_int, default=[4], help="width of the mlp")
    add("--depth", type=common.positive_int, default=2, help="nothing")
    add("--steps", type=common.positive_int, default=20, help="steps")
    add("--lr", type=common.positive_float, help="learning rate (default: the model's own)")
    add("--n-eval", type=common.positive_int, default=64, help="points to measure at")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds")
    add("--text", help="a file")
    add("--eval-every", type=common.positive_int, default=5, help="steps between evaluations")
    add("--compile", action="store_true", help="torch.compile")
    return common.parse_args(parser, PRESETS, argv)


def show(runs):
    cells = []
    curves = []
    for run in runs:
        cells.append((run.args.model, "error", run.results["error"], ".4f"))
        steps = [line["step"] for line in run.metrics]
        curves.append((run.args.model, steps, [line["loss"] for line in run.metrics], {}))
    common.print_table("The error of y = 2x", cells)
    if runs[0].args.plot:
        common.plot(runs[0].folder.parent / "curve.png", {"loss": (dict(xlabel="step", ylabel="loss"), curves)})


def main(argv=None):
    args = parse_args(argv)
    runs = common.sweep(args, SWEEP, build, resolve, measured=["n_eval"])
    return common.complete(runs, train, measure, show)


if __name__ == "__main__":
    common.command(main)
