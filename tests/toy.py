"""
A toy script: learns y = 2x.

    python toy.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

PRESETS = {
    "quick": dict(model=["linear"], width=[4], depth=2, steps=20, lr=None, eval_every=5, n_eval=64),
    "paper": dict(model=["linear", "mlp"], width=[8], depth=2, steps=50, lr=None, eval_every=5, n_eval=64),
}
LEARNING_RATE = {"linear": 0.1, "mlp": 0.01}
SWEEP = ["model", "width", "seed"]


def resolve(args):
    """Completes a run's settings: the learning rate is the model's, and a linear model has no width."""
    if args.lr is None:
        args.lr = LEARNING_RATE[args.model]
    if args.model == "linear":
        args.width = None
        args.depth = None


def build(args):
    """The task (none) and the model of a run."""
    if args.model == "linear":
        return None, nn.Linear(1, 1).to(args.device)
    return None, nn.Sequential(nn.Linear(1, args.width), nn.Dropout(0.1), nn.Linear(args.width, 1)).to(args.device)


def load(folder, device="cpu"):
    """The task and the trained model of a run."""
    return common.load(folder, build, device)


def train(args, run):
    _, model = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    data = torch.Generator(args.device).manual_seed(args.seed)
    start = run.restore(model=model, optimizer=optimizer, data=data)
    for step in run.steps(start, args.steps):
        x = torch.randn(16, 1, generator=data)
        loss = F.mse_loss(model(x), 2 * x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            run.log(step + 1, loss=loss.item(), error=loss.item() ** 0.5)
            run.save(step + 1)


def measure(args, run):
    _, model = load(run.folder, args.device)
    x = torch.linspace(-1, 1, args.n_eval)[:, None]
    return dict(error=F.mse_loss(model(x), 2 * x).item(), n_eval=args.n_eval)


def parse_args(argv=None):
    parser = common.make_parser(main)
    add = parser.add_argument
    add("--model", nargs="+", choices=["linear", "mlp"], help="models")
    add("--width", nargs="+", type=common.positive_int, help="width of the mlp")
    add("--depth", type=common.positive_int, help="nothing")
    add("--steps", type=common.positive_int, help="steps")
    add("--lr", type=common.positive_float, help="learning rate (default: the model's own)")
    add("--n-eval", type=common.positive_int, help="points to measure at")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds")
    add("--text", type=common.data_path, help="a file")
    args = common.parse_args(parser, PRESETS, argv, without=["--compile", "--dtype"])
    return args


def show(runs, results):
    rows = [[args.model, common.spread([r["error"] for r in group], ".4f")] for args, group in common.by_setting(runs, results)]
    common.print_table(["model", "error"], rows)
    if runs[0].args.plot:
        figure, axes = common.new_figure()
        axes[0, 0].plot([1, 2])
        common.save_figure(figure, runs, "curve")


def main(argv=None):
    args = parse_args(argv)
    runs = common.sweep(args, SWEEP, resolve, measured=["n_eval"])
    return common.complete(runs, train, measure, show)


if __name__ == "__main__":
    common.command(main)
