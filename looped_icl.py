"""
Looped Transformers are Better at Learning Learning Algorithms
Yang, Lee, Nowak, Papailiopoulos. ICLR 2024, arXiv 2311.12424.

One transformer block, looped b times with the prompt injected anew at every loop, matches a
12-layer transformer at in-context regression with less than a tenth of its parameters. It keeps its
answer when looped far past b: it has learned an iterative algorithm with a fixed point. The quick
preset shows the fixed point: in the first table the loop's error with all examples comes near that
of least squares, 0, and in the last it stays flat from b loops on. It does not show that the loop
matches 12 layers: there it is the worst of the four models at b. --preset medium is for that.

    python looped_icl.py                                two dimensions, in minutes
    python looped_icl.py --inject none                  our own variant: lost past b loops
    python looped_icl.py --preset medium --plot         all models in five dimensions, in an hour
    python looped_icl.py --preset medium --model looped standard --inject add --seed 0 1 2

Fig. 2, error by loops, at its own b = 30, T = 15 (--loops, --window):
    python looped_icl.py --preset paper --loops 30 --plot
Fig. 3, error by examples of each task, with its own b and T. The looped model is shown where it has
converged, at 500 loops, on trees at 200 (--eval-loops), and beside it the paper's curves:
    python looped_icl.py --preset paper --model looped standard tied --plot
    python looped_icl.py --preset paper --task noisy-linear --model looped standard --plot
    python looped_icl.py --preset paper --task sparse-linear --model looped standard --plot
    python looped_icl.py --preset paper --task decision-tree --model looped standard --plot
    python looped_icl.py --preset paper --task relu-2nn --model looped standard --plot
Other inputs than trained on (App.), and what a probe finds in the hidden states (Sec. 6):
    python looped_icl.py --preset paper --model looped standard --ood --probe
Tables of OpenML, downloaded by id (the paper's, as we read it: 720 725 737 803 807 816 819 847 871
42192), or a folder of your own; one held out in turn, b = 30, T = 15:
    python looped_icl.py --preset paper --task openml --fetch --held-out 0 1 2 3 4 5 6 7 8 9

What the paper preset leaves open (points, loops, window, steps, batch) is the task's: see TASKS.

To reuse: InContextTransformer needs common's Block and gpt2_init_; sample_prompts needs all that is
above it in its section; a baseline needs torch, and from here sum_before or best_split.
"""
import csv
import http.client
import io
import json
import math
import re
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 3): prompts after Garg et al. 2022 ------------------------------------------

# Each function class is a function of xs (B, n, d) and a generator. It draws a new random f for
# every prompt, and returns ys = f(xs), (B, n).

def randn(generator, *shape):
    """Normal random numbers, on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device)

def linear(xs, generator):
    """w . x, w ~ N(0, I)."""
    B, n, d = xs.shape
    return (xs @ randn(generator, B, d, 1))[..., 0]

def noisy_linear(xs, generator):
    """w . x with noise of variance 0.1^2."""
    ys = linear(xs, generator)
    return ys + 0.1 * randn(generator, *ys.shape)

def sparse_linear(xs, generator):
    """w . x, but only 3 random coordinates of w are not 0."""
    B, n, d = xs.shape
    w = randn(generator, B, d, 1)
    order = torch.rand(B, d, generator=generator, device=xs.device).argsort(1)
    mask = torch.zeros_like(w).scatter(1, order[:, :3, None], 1.0)      # (B, d, 1)
    return (xs @ (w * mask))[..., 0]

def decision_tree(xs, generator):
    """A tree of depth 4: each node branches on the sign of a random coordinate, leaves are N(0, 1).
    Nodes are numbered by level."""
    B, n, d = xs.shape
    coordinate = torch.randint(d, (B, 15), generator=generator, device=xs.device)       # nodes 0-14
    leaves = randn(generator, B, 16)                                                    # 15-30
    node = torch.zeros(B, n, dtype=torch.long, device=xs.device)        # all begin at the root
    for _ in range(4):
        asked = coordinate.gather(1, node)                              # (B, n)
        x = xs.gather(2, asked[..., None])[..., 0]                      # (B, n)
        node = 2 * node + 1 + (x > 0)                   # children of k: 2 k + 1, 2 k + 2
    return leaves.gather(1, node - 15)

def relu_2nn(xs, generator):
    """W2 ReLU(W1 x) sqrt(2/100), with 100 hidden units and N(0, 1) weights."""
    B, n, d = xs.shape
    W1, W2 = randn(generator, B, d, 100), randn(generator, B, 100, 1)
    hidden = (xs @ W1).relu()                                           # (B, n, 100)
    return (math.sqrt(2 / 100) * hidden @ W2)[..., 0]

@dataclass
class FunctionClass:
    """A row of TASKS. A new function class is a function and a row."""
    f: Callable | None          # (xs, generator) -> ys; None: real tables
    variance: Callable          # of y, without noise, by d
    baselines: list             # names, see BASELINES
    settings: dict              # the paper's, of --preset paper
    signs_only: bool = False    # f looks at the signs of x alone: y does not grow as x does

DEFAULTS = ["least squares", "averaging", "3-NN"]
SHORT = dict(
    n_points=41, points_start=11, points_step=2, steps=500_000, batch_size=64, eval_loops=500,
)
LONG = dict(SHORT, n_points=101, points_start=26, points_step=5)

TASKS = {
    "linear": FunctionClass(
        linear, lambda d: d, DEFAULTS, dict(SHORT, loops=20, window=15)),
    "noisy-linear": FunctionClass(
        noisy_linear, lambda d: d, DEFAULTS, dict(SHORT, loops=20, window=15)),
    "sparse-linear": FunctionClass(
        sparse_linear, lambda d: min(d, 3), DEFAULTS + ["Lasso"],
        dict(SHORT, loops=20, window=10)),
    "decision-tree": FunctionClass(
        decision_tree, lambda d: 1, DEFAULTS + ["tree on x", "tree on signs"],
        dict(LONG, loops=70, window=15, eval_loops=200), signs_only=True),
    "relu-2nn": FunctionClass(
        relu_2nn, lambda d: d, DEFAULTS + ["2-layer network"],
        dict(LONG, loops=12, window=5)),
    "openml": FunctionClass(
        None, lambda d: 1, [],
        dict(SHORT, points_start=41, steps=100_000, batch_size=40,
             loops=30, window=15, eval_loops=None), signs_only=True),
}

def sample_prompts(task, batch, n_points, n_dims, generator, active_dims=None, device="cpu"):
    """xs (B, n, d), ys (B, n): x ~ N(0, I) in the first active_dims coordinates, 0 in the others,
    and y = f(x), f a new one of the task's class for each prompt. The generator is one of `device`.

    f never knows of active_dims: sparse-linear draws its coordinates among all n_dims. A decision
    tree would branch on zeros, so its x has all dimensions from the start.
    """
    xs = torch.randn(batch, n_points, n_dims, generator=generator, device=device)
    if active_dims is not None and not TASKS[task].signs_only:
        xs[..., active_dims:] = 0
    return xs, TASKS[task].f(xs, generator)

class Prompts:
    """The prompts of one function class. `scale`: the variance of y, without noise, by which
    squared errors are divided."""

    n_out = 1                                                           # the model says y itself

    def __init__(self, name, n_dims, device="cpu"):
        self.name = name
        self.n_dims = n_dims
        self.device = device
        self.scale = TASKS[name].variance(n_dims)
        self.baselines = {key: BASELINES[key] for key in TASKS[name].baselines}

    def sample(self, batch, n_points, generator, active_dims=None, part="train"):
        """xs (B, n, d), ys (B, n). `part` has no meaning here: every prompt is a new one."""
        shape = batch, n_points, self.n_dims
        return sample_prompts(self.name, *shape, generator, active_dims, self.device)

# ---- The model (Sec. 4) -------------------------------------------------------------------------

class InContextTransformer(nn.Module):
    """A GPT-2 that reads x_1, y_1, x_2, y_2, ... and predicts each y at its x. Looped, its output
    goes in again. Tokens have n_dims numbers, y in the first; positions are 2 n_points + 1, as the
    authors count them (203 for 101 points). inject: how the prompt enters a loop; n_out 2: two
    logits."""

    def __init__(self, n_dims, n_points, n_layer, n_head, n_embd, inject="add", n_out=1):
        super().__init__()
        self.inject = inject
        self.read_in = nn.Linear(n_dims, n_embd)
        self.wpe = nn.Embedding(2 * n_points + 1, n_embd)
        self.h = nn.ModuleList([common.Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        common.gpt2_init_(self.h, n_layer)
        nn.init.normal_(self.wpe.weight, std=0.02)                      # read_in, read_out: torch's
        self.read_out = nn.Linear(n_embd, n_out)

    def trunk(self, x, return_attn=False):
        """f: positions, blocks, final norm; x (B, T, C) -> the same, or also attention by layer."""
        x = x + self.wpe.weight[:x.shape[1]]
        attns = []
        for block in self.h:
            x = block(x, return_attn)
            if return_attn:
                x, attn = x
                attns.append(attn)
        x = self.ln_f(x)
        return (x, attns) if return_attn else x

    def forward(self, xs, ys, loops=1, window=1, return_attn=False):
        """xs (B, n, d), ys (B, n) -> predictions (window, B, n) of the last `window` loops, or
        logits (window, B, n, 2), window <= loops; with return_attn also a list by loop and layer
        (B, H, T, T).

        add: z_0 = 0, z_(i+1) = f(z_i + e), e the prompt. multiply: z_0 = 1 (0 would hide e),
        z_(i+1) = f(z_i e). With both, the loops before the window run without gradient. none: z_0 =
        e, z_(i+1) = f(z_i), the gradient goes through all loops: our variant, without a number in
        the paper. One loop: a usual transformer.
        """
        d = xs.shape[2]
        ys = F.pad(ys[..., None], (0, d - 1))                           # (B, n, d)
        tokens = torch.stack([xs, ys], 2).flatten(1, 2)                 # (B, 2n, d)
        e = self.read_in(tokens[:, :-1])                                # without the last y
        start = {"add": torch.zeros_like(e), "multiply": torch.ones_like(e), "none": e}
        z = start[self.inject]
        # none: the prompt enters at the start alone; a read-in cut off from the loss learns nothing
        first_with_gradient = 0 if self.inject == "none" else loops - window
        predictions = []
        attns = []
        for i in range(loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first_with_gradient):
                if self.inject == "add":
                    z = z + e
                elif self.inject == "multiply":
                    z = z * e
                z = self.trunk(z, return_attn)                          # (B, 2n-1, C)
                if return_attn:
                    z, attn = z
                    attns += attn
            if i >= loops - window:
                predictions.append(self.read_out(z[:, ::2]).squeeze(-1))
        predictions = torch.stack(predictions)
        return (predictions, attns) if return_attn else predictions

# For each model of the paper: layers with weights of their own, passes through them, and how the
# prompt enters a pass. "tied" passes 12 times through the trunk of a one-layer transformer: the
# positions and the final norm, too, come in every pass.
MODELS = {
    "looped": lambda args: (1, args.loops, args.inject),
    "standard": lambda args: (args.n_layer, 1, "none"),
    "tied": lambda args: (1, args.n_layer, "none"),
}

# ---- Training (Sec. 5) --------------------------------------------------------------------------

# What differs from the defaults of the flags, which are those of "quick". None: the task's own
MEDIUM = dict(
    model=["looped", "standard", "tied"], inject=["add", "none"],
    n_dims=5, dims_start=1, n_points=11, points_start=11,
    window=8, loops_every=200,
    steps=6_000, batch_size=64, lr=2e-3, beta2=0.999, warmup=200, eval_every=500,
)
PAPER = dict(
    n_head=8, n_embd=256,
    n_dims=20, dims_start=5, n_points=None, points_start=None, points_step=None,
    curriculum_every=5_000, loops=None, window=None, loops_every=500,
    steps=None, batch_size=None, lr=1e-4, beta2=0.999, warmup=0, schedule="constant",
    eval_every=2_500,
)
PRESETS = {"quick": {}, "medium": MEDIUM, "paper": PAPER}
SWEEP = ["task", "model", "inject", "held_out", "seed"]
MEASURED = ["n_eval", "eval_loops", "ood", "probe"]             # training does not depend on them

def resolve(args):
    """Completes a run's flags: the task's own settings; unused ones become None."""
    if args.preset == "paper":
        for key, value in TASKS[args.task].settings.items():
            if getattr(args, key) is None:
                setattr(args, key, value)
    if args.eval_loops is None:
        args.eval_loops = args.loops
    if args.model == "looped":
        args.n_layer = None
    else:
        args.inject = args.loops = args.window = args.loops_every = args.eval_loops = None
    if args.task == "openml":
        args.ood = args.probe = None
    else:
        args.data_dir = args.fetch = args.held_out = None
    if TASKS[args.task].signs_only:
        args.dims_start = None                               # all of them, from the start
    if args.points_start >= args.n_points:
        args.points_step = None
        if (args.dims_start or args.n_dims) >= args.n_dims:
            args.curriculum_every = None

def build(args):
    """The task (its prompts) and the model of a run."""
    if args.task == "openml":
        task = Tables(args.data_dir, args.held_out, args.n_dims, args.n_points, args.device)
    else:
        task = Prompts(args.task, args.n_dims, args.device)
    n_layer, _, inject = MODELS[args.model](args)
    shape = args.n_dims, args.n_points, n_layer, args.n_head, args.n_embd
    return task, InContextTransformer(*shape, inject, task.n_out).to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run, the model in eval mode."""
    return common.load(folder, build, device)

def curriculum(args, step):
    """Active dimensions, points and loops at a step: each grows at intervals to its full size."""
    stage = step // (args.curriculum_every or args.steps)
    active_dims = min(args.n_dims, (args.dims_start or args.n_dims) + stage)
    n_points = min(args.n_points, args.points_start + (args.points_step or 0) * stage)
    _, loops, _ = MODELS[args.model](args)
    if args.model == "looped":
        loops = min(loops, args.window + 2 * (step // args.loops_every))
    return active_dims, n_points, loops

def learning_rate(step, args):
    """Linear warm-up, then constant; or both times half a cosine, from 1 at the start to 0."""
    rate = args.lr * min(1, (step + 1) / max(1, args.warmup))
    if args.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * (step / args.steps))) / 2
    return float(np.float32(rate))                           # as RESULTS.md was measured

def autocast(args):
    """--dtype. Without the cache of weights: a cast made in a loop without gradient would be used
    again by those with one (torch 2.9), and the block would get no gradient."""
    device = torch.device(args.device).type
    bfloat16 = args.dtype == "bfloat16"
    return torch.autocast(device, torch.bfloat16, enabled=bfloat16, cache_enabled=False)

def loss_of(predictions, ys):
    """The mean over loops, prompts and points of the squared error of predictions (T, B, n), or of
    the cross-entropy of logits (T, B, n, 2)."""
    if predictions.dim() == 3:
        return (predictions - ys).square().mean()
    labels = ys.long().expand(predictions.shape[:-1])                   # (T, B, n)
    log_p = predictions.log_softmax(-1)
    return -log_p.gather(-1, labels[..., None]).mean()

def train(args, run):
    """Trains one run, or what is left of it, and leaves its checkpoint."""
    task, model = build(args)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
    data = torch.Generator(args.device).manual_seed(args.seed)          # training prompts alone
    start = run.restore(model, optimizer, data)
    _, passes, _ = MODELS[args.model](args)
    dims, points, _ = curriculum(args, args.steps - 1)
    if (dims, points) != (args.n_dims, args.n_points):
        common.say(f"{run.folder.name} ends its curriculum at {dims} of {args.n_dims} dimensions "
                   f"and {points} of {args.n_points} points; it is scored on all")
    if args.compile:                                         # one pass: the number of loops changes
        model.trunk = torch.compile(model.trunk)
    for step in run.steps(start, args.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        dims, points, loops = curriculum(args, step)
        xs, ys = task.sample(args.batch_size, points, data, dims)       # (B, n, d), (B, n)
        with autocast(args):
            predictions = model(xs, ys, loops, args.window or 1)        # (T, B, n)
        loss = loss_of(predictions.float(), ys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            fresh = torch.Generator(args.device).manual_seed(10_000)
            xs, ys = task.sample(256, args.n_points, fresh, part="valid")
            error = errors(model, task, xs, ys, passes)[0, :, -1].mean().item()
            run.log(step + 1, loss=loss.item(), error=error, dims=dims, points=points, loops=loops)

# ---- Measurement --------------------------------------------------------------------------------

@torch.no_grad()
def errors(model, task, xs, ys, loops=1, window=1):
    """For each of the last `window` loops, each prompt and each point, (window, B, n): the squared
    error over the variance of y; with two logits 1 where the more likely label is wrong, else 0."""
    parts = []
    for x, y in zip(xs.split(256), ys.split(256)):                      # what fits into memory
        predictions = model(x, y, loops, window).float()
        if predictions.dim() == 4:
            parts.append((predictions.argmax(-1) != y).float())
        else:
            parts.append((predictions - y).square() / task.scale)
    return torch.cat(parts, 1)

def bootstrap(values, n=1_000, level=0.9):
    """Of values (N, n_points) the mean over N and its bootstrap interval's ends: three lists."""
    values = values.double()
    N = len(values)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(N, (n, N), generator=draw)
    times_drawn = torch.zeros_like(rows).scatter_add(1, rows, torch.ones_like(rows))
    means = times_drawn.to(values) @ values / N                         # (n, n_points)
    low = means.quantile((1 - level) / 2, 0)
    high = means.quantile((1 + level) / 2, 0)
    return torch.stack([values.mean(0), low, high]).tolist()

def shifted_prompts(task, n, n_points, generator):
    """Prompts unlike those of training (App.): yields name, xs, ys, and the variance of y, by which
    squared errors are divided: to answer 0 scores 1 on each."""
    d = task.n_dims
    function_class = TASKS[task.name]
    f = function_class.f
    degree = 0 if function_class.signs_only else 2                      # E y^2 ~ |x|^degree

    def prompts(name, xs, growth=1, factor=1):
        """growth: of E y^2, through x; factor: of y itself."""
        return name, xs, factor * f(xs, generator), task.scale * growth * factor**2

    xs, _ = task.sample(n, n_points, generator)
    yield prompts("as trained", xs)

    basis = torch.linalg.qr(randn(generator, n, d, d)).Q                # (B, d, d)
    deviation = 1 / torch.arange(1, d + 1, device=task.device)          # eigenvalues 1 / i^2
    deviation = deviation / deviation.square().mean().sqrt()            # of trace d
    yield prompts("skewed covariance", (xs * deviation) @ basis.mT)

    split = xs.clone()
    split[:, :-1, d // 2:] = 0                                          # half of the space
    split[:, -1, :d // 2] = 0                                           # the query: the other half
    size = math.sqrt((d - d // 2) / d)                                  # of the query's |x|
    yield prompts("query orthogonal to prompt", split @ basis.mT, size**degree)

    for factor in (0.5, 2, 3):
        yield prompts(f"x times {factor}", factor * xs, factor**degree)
    for factor in (0.5, 2, 3):
        yield prompts(f"y times {factor}", xs, factor=factor)

    name, xs, ys, variance = prompts("label noise of variance 1", xs)
    noise = randn(generator, *ys.shape)
    noise[:, -1] = 0                                                    # scored without noise
    yield name, xs, ys + noise, variance

def hidden_states(model, xs, ys, loops):
    """What a probe reads of each prefix of i = 1 .. n - 1 pairs, after the read-in (layer 0) and
    after each pass through a block: the state at y_i, the mean over the prefix's tokens, and a 1
    for its bias. (layers, n - 1, B, 2C + 1), float64, on the CPU."""
    found = []

    def keep(module, inputs, z):                                        # (B, 2n-1, C)
        z = z.double()
        n_tokens = torch.arange(1, z.shape[1] + 1)[:, None]
        mean = z.cumsum(1) / n_tokens                                   # over tokens up to each
        read = torch.cat([z, mean], 2)[:, 1::2]                         # at y_1 .. y_(n-1)
        found.append(F.pad(read, (0, 1), value=1.0).transpose(0, 1))

    hooks = [part.register_forward_hook(keep) for part in [model.read_in, *model.h]]
    model(xs, ys, loops)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)

def probe_targets(xs, ys):
    """Of each prefix of i = 1 .. n - 1 pairs: X^T y / i and the least-squares w (of minimum norm),
    side by side, (n - 1, B, 2 d), float64, on the CPU."""
    x, y = xs.double(), ys.double()
    targets = []
    for i in range(1, ys.shape[1]):
        X, Y = x[:, :i], y[:, :i, None]
        w = torch.linalg.pinv(X) @ Y                                    # (B, d, 1)
        targets.append(torch.cat([X.mT @ Y / i, w], 1)[..., 0])
    return torch.stack(targets)

@torch.no_grad()
def probe(model, task, n_points, loops, n=1_000):
    """Sec. 6: what a linear probe reads off the hidden states, at layer 0 and after each loop or
    layer, of a prefix of i pairs: X^T y / i and the least-squares w. {name: a list by layer}: the
    squared error over the target's mean square, on n prompts of "linear", averaged over prefixes,
    for X^T y of 1 to n_points - 1 pairs, for w of 1 to d. Each prefix has a probe of its own,
    fitted in closed form (ridge) on 8 other prompts for each of its numbers, and on n at least.

    The paper's probe pools all tokens by a learned softmax, and has 64 hidden units, trained by
    gradient descent. There the standard model has 20 layers, X^T y goes up to n_points pairs, and
    errors are not relative to the target.

    The control is fitted on prompts that all have w = (1, .., 1), and tested on the same n."""
    d = task.n_dims
    n_fit = max(n, 8 * (2 * model.read_in.out_features + 1))

    def batches(n, seed, constant=False):
        """Of n prompts, some at a time: states and targets."""
        draw = torch.Generator(task.device).manual_seed(seed)
        xs, ys = sample_prompts("linear", n, n_points, d, draw, device=task.device)
        if constant:
            ys = xs.sum(2)
        for x, y in zip(xs.split(100), ys.split(100)):
            yield hidden_states(model, x, y, loops), probe_targets(x, y)

    found = {}
    for suffix, constant in [("", False), (" (control)", True)]:
        squares = products = missed = wanted = 0
        for states, targets in batches(n_fit, 40_001, constant):
            squares = squares + states.mT @ states
            products = products + states.mT @ targets
        W = torch.linalg.solve(squares + torch.eye(squares.shape[-1]).to(squares), products)
        for states, targets in batches(n, 40_000):
            missed = missed + (states @ W - targets).square().sum(2)    # (layers, n - 1, 2 d)
            wanted = wanted + targets.square().sum(1)
        for name, of, prefixes in ("X^T y", slice(d), n_points), ("w", slice(d, None), d):
            relative = missed[..., of].sum(2) / wanted[..., of].sum(1)  # (layers, n - 1)
            found[name + suffix] = relative[:, :prefixes].mean(1).tolist()
    return found

def measure(args, run):
    """Error by examples and by loops, the baselines, and what --ood and --probe ask for."""
    task, model = load(run.folder, args.device)
    _, passes, _ = MODELS[args.model](args)
    loops = args.eval_loops or passes
    fresh = torch.Generator(args.device).manual_seed(20_000)
    xs, ys = task.sample(args.n_eval, args.n_points, fresh, part="test")
    n_params = sum(p.numel() for p in model.parameters())
    n_block = sum(p.numel() for p in model.h[0].parameters())
    results = {
        "n_params": n_params,
        "n_params_12": n_params + (12 - len(model.h)) * n_block,        # with 12 layers
        "curve": bootstrap(errors(model, task, xs, ys, loops)[0]),      # mean, low, high
        "curve_loops": loops,
        "baselines": {},
    }
    for name, baseline in task.baselines.items():
        squares = (baseline(xs, ys) - ys).square()                      # (B, n)
        results["baselines"][name] = bootstrap(squares / task.scale)
    if passes > 1:
        by_loops = errors(model, task, xs, ys, 10 * passes, 10 * passes)
        results["by_loops"] = by_loops[..., -1].mean(1).tolist()
    if args.task == "openml":
        results["table"] = task.name
    if args.ood:
        results |= {"ood": {}, "ood of least squares": {}}
        for name, xs, ys, variance in shifted_prompts(task, args.n_eval, args.n_points, fresh):
            ours = errors(model, task, xs, ys, loops)[0, :, -1] * task.scale
            theirs = (least_squares(xs, ys) - ys)[:, -1].square()
            results["ood"][name] = (ours.mean() / variance).item()
            results["ood of least squares"][name] = (theirs.mean() / variance).item()
    if args.probe:
        results["probe"] = probe(model, task, args.n_points, passes)
    return results

# ---- Baselines ----------------------------------------------------------------------------------

# Each says what the examples before x_i tell of y_i, for all i: xs (B, n, d), ys (B, n) -> (B, n)

def least_squares(xs, ys):
    """Minimum-norm least squares on the pairs before each x."""
    x, y = xs.double(), ys.double()
    out = torch.zeros_like(y)
    for i in range(1, ys.shape[1]):
        # rtol: rotated in float32, inputs of a subspace leave it by 1e-8, which is not to be fitted
        inverse = torch.linalg.pinv(x[:, :i], rtol=1e-5)                # (B, d, i)
        w = inverse @ y[:, :i, None]                                    # (B, d, 1)
        out[:, i] = (x[:, i, None] @ w)[:, 0, 0]
    return out.to(ys)

def sum_before(terms):
    """Sums over the pairs before each x, terms (B, n, ...) -> the same shape."""
    total = terms.cumsum(1).roll(1, 1)
    total[:, 0] = 0
    return total

def averaging(xs, ys):
    """x_i . w with w the mean of x_j y_j over the pairs before, 0 where there are none."""
    before = sum_before(xs * ys[..., None])                             # (B, n, d)
    n_before = torch.arange(ys.shape[1], device=ys.device).clamp_min(1)
    return (xs * before).sum(2) / n_before

def nearest_neighbors(xs, ys, n=3):
    """Mean y of the n nearest x's before each x (of all, where they are fewer), 0 for the first."""
    distances = torch.cdist(xs, xs)                                     # (B, i, j)
    distances = distances + torch.full_like(distances[0], math.inf).triu()     # j >= i: not before
    nearest = distances.topk(min(n, xs.shape[1]), largest=False)
    known = nearest.values.isfinite()                                   # (B, i, n)
    near = ys[:, None].expand_as(distances).gather(2, nearest.indices)
    return (near * known).sum(2) / known.sum(2).clamp_min(1)

def lasso(xs, ys, alpha=0.01):
    """The Lasso on the pairs before each x. Warns where the weights that it found are not optimal.

    Minimises |y - X w|^2 / (2 i) + alpha |w|_1 over the i pairs, exactly and for all prefixes of
    all prompts at once: the minimum is piecewise linear in alpha, and is followed from w = 0 down
    to alpha (LARS, Efron et al. 2004; 2,000 sweeps of coordinate descent end far from it). All
    coordinates in use correlate with the residual as much as `level` says; one joins them where its
    correlation reaches it, and leaves where its weight passes 0.
    """
    x, y = xs.double(), ys.double()
    B, n, d = x.shape
    # means over the i pairs before each of the N x's: X^T X / i and X^T y / i
    i = torch.arange(n, device=xs.device).clamp_min(1).view(-1, 1, 1)
    gram = sum_before(x[..., None] * x[..., None, :]) / i
    target = sum_before(x * y[..., None])[..., None] / i
    gram, target = gram.flatten(0, 1), target.flatten(0, 1)             # (N, d, d), (N, d, 1)
    w = torch.zeros_like(target)
    level, first = target.abs().max(1, keepdim=True)                    # (N, 1, 1)
    in_use = torch.zeros_like(target, dtype=torch.bool).scatter(1, first, level > 0)
    for _ in range(10 * d):
        if (level <= alpha).all():
            break
        correlation = target - gram @ w                                 # +-level where in use
        # lowering the level by s adds s * slope to w: the slope of what is not in use is 0
        both = in_use & in_use.mT                                       # (N, d, d)
        system = torch.where(both, gram, torch.eye(d).to(gram))
        slope, _ = torch.linalg.solve_ex(system, correlation.sign() * in_use)
        fall = gram @ slope                                             # of correlation, per s
        # the s at which a coordinate joins, |correlation - s fall| = level - s with either sign, or
        # leaves, w + s slope = 0; one that just left is at s = 0, which does not count
        joins = (level - correlation) / (1 - fall)
        joins_below = (level + correlation) / (1 + fall)
        s = torch.cat([joins, joins_below, -w / slope], 1)              # (N, 3 d, 1)
        counts = torch.cat([~in_use, ~in_use, in_use], 1) & (s > 1e-10 * level)
        s, event = torch.where(counts, s, math.inf).min(1, keepdim=True)
        rest = (level - alpha).clamp_min(0)
        # event: 0 .. d-1 joins, d .. 2d-1 joins below, 2d .. 3d-1 leaves; % d is its coordinate
        coordinate = F.one_hot(event[:, :, 0] % d, d).mT                # (N, d, 1)
        changes = coordinate.bool() & (s < rest)
        s = torch.minimum(s, rest)
        w = w + s * slope
        level = level - s
        in_use = in_use ^ changes
        w = w * in_use
    unfinished = (level > alpha).sum()
    if unfinished:
        warnings.warn(f"Lasso: no minimum found for {unfinished} of {len(w)} prefixes")
    return (x * w.view(B, n, d)).sum(2).to(ys)

def best_split(x, y, member):
    """The split of the pairs of each prompt with `member`, at a value of one coordinate, that
    lowers their squared error most: x (B, i, d), y (B, i), member (B, i) -> coordinate (B,) and
    threshold (B, 1), halfway between two values; infinite where they cannot be split."""
    i = x.shape[1]
    value, order = x.masked_fill(~member[..., None], math.inf).sort(1)  # (B, i, d), others last
    y = (y * member)[..., None].expand_as(x).gather(1, order)
    left = y.cumsum(1)
    left, total = left[:, :-1], left[:, -1:]                            # (B, i-1, d), (B, 1, d)
    n_left = torch.arange(1, i, device=x.device)[:, None]
    n_right = member.sum(1)[:, None, None] - n_left
    # about their means, the y of n pairs have the squared error sum y^2 - (sum y)^2 / n
    gain = left**2 / n_left + (total - left)**2 / n_right.clamp_min(1)
    threshold = (value[:, 1:] + value[:, :-1]) / 2
    splits_nothing = (n_right < 1) | (value[:, 1:] == value[:, :-1])
    gain = gain.masked_fill(splits_nothing, -1).mT.flatten(1)           # (B, d (i-1))
    threshold = threshold.masked_fill(splits_nothing, math.inf).mT.flatten(1)
    best = gain.argmax(1)
    return best // (i - 1), threshold.gather(1, best[:, None])

def value_tree(xs, ys, depth=2):
    """A regression tree on the values of x, grown greedily on the pairs before each x. Only the
    branch that x_i takes is grown: its answer is the mean y of the pairs that take it, too."""
    out = torch.zeros_like(ys)
    out[:, 1:2] = ys[:, :1]                                             # one pair: nothing to split
    for i in range(2, ys.shape[1]):
        x, y = xs[:, :i + 1], ys[:, :i]                                 # x_i is the last
        member = torch.ones_like(y, dtype=torch.bool)
        for level in range(depth):
            coordinate, threshold = best_split(x[:, :i], y, member)
            asked = x.gather(2, coordinate[:, None, None].expand(-1, i + 1, 1))[..., 0]
            right = asked > threshold                                   # (B, i + 1)
            member = member & (right[:, :i] == right[:, i:])
        out[:, i] = (y * member).sum(1) / member.sum(1)
    return out

def sign_tree(xs, ys, depth=4):
    """The same on the signs of x. The paper's other two baselines, boosted trees on x and on its
    signs, are missing here: they need a library."""
    return value_tree((xs > 0).to(xs.dtype), ys, depth)

@torch.enable_grad()
def gd_network(xs, ys, hidden=100, steps=1_000, batch=10, lr=5e-3):
    """A two-layer ReLU network with biases, trained by Adam on the pairs before each x, in batches
    drawn from them: one a prompt and x, begun as torch begins nn.Linear."""
    B, n, d = xs.shape
    draw = torch.Generator(xs.device).manual_seed(0)

    def uniform(n_in, *shape):
        numbers = torch.rand(B, *shape, generator=draw, device=xs.device)
        return ((2 * numbers - 1) / math.sqrt(n_in)).requires_grad_()

    out = torch.zeros_like(ys)
    for i in range(1, n):                                               # no loop over prompts
        W1, b1 = uniform(d, d, hidden), uniform(d, 1, hidden)
        W2, b2 = uniform(hidden, hidden, 1), uniform(hidden, 1, 1)

        def f(x):                                                       # (B, batch, d)
            return (((x @ W1 + b1).relu() @ W2) + b2)[..., 0]

        optimizer = torch.optim.Adam([W1, b1, W2, b2], lr=lr, fused=True)
        for _ in range(steps):
            rows = torch.randperm(i, generator=draw, device=xs.device)[:batch]
            loss = (f(xs[:, rows]) - ys[:, rows]).square().mean(1).sum()        # each on its own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out[:, i] = f(xs[:, i:i + 1])[:, 0].detach()
    return out

BASELINES = {
    "least squares": least_squares,
    "averaging": averaging,
    "3-NN": nearest_neighbors,
    "Lasso": lasso,
    "tree on x": value_tree,
    "tree on signs": sign_tree,
    "2-layer network": gd_network,
}

# ---- The same on real tables (OpenML, App.) -----------------------------------------------------

def is_number(cell):
    """Whether a cell of a table is a finite number."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False

def read_table(path, n_dims=20):
    """A CSV with a header, the label in the last column -> features (n, n_dims), standardised and
    padded with zeros in front, labels (n,) in 0, 1. ValueError, with the reason, if it is not such
    a table (OpenML's conditions of the paper)."""
    try:
        with open(path, newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None
    n_features = len(header) - 1
    if all(map(is_number, header[:-1])):
        raise ValueError(f"{path}, row 1: a header with the columns' names is missing")
    if not 5 <= n_features <= n_dims:
        raise ValueError(f"{path}: {n_features} features, not 5 to --n-dims {n_dims} (paper: 20)")
    if not 1_000 <= len(rows) <= 10_000:
        raise ValueError(f"{path}: {len(rows)} rows are not in 1000 .. 10000")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header) or not all(map(is_number, row[:-1])):
            raise ValueError(f"{path}, row {number}: not {n_features} numbers and a label")
    *columns, labels = zip(*rows)
    classes, labels = np.unique(np.char.strip(labels), return_inverse=True)
    if len(classes) != 2 or not 1 / 3 <= labels.mean() <= 2 / 3:
        raise ValueError(f"{path}, column {header[-1]}: not two classes of which one has at least "
                         "half of the other's rows")
    features = np.array(columns, dtype=float).T                         # (n, features)
    deviation = features.std(0)
    deviation[deviation == 0] = 1
    features = (features - features.mean(0)) / deviation
    features = np.pad(features, ((0, 0), (n_dims - n_features, 0)))
    return features.astype(np.float32), labels

def download(url):
    """The text at an address. OSError."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode("utf-8", "replace")

def fetch(number, folder):
    """Downloads the OpenML data set of that id as folder/<id>.csv: its numeric columns, without the
    row's number and what OpenML says to ignore, then its target. OSError if that fails,
    ValueError if it is no dense table with a target."""
    answer = json.loads(download(f"https://www.openml.org/api/v1/json/data/{number}"))
    about = answer.get("data_set_description")
    if about is None:
        raise ValueError(f"OpenML {number}: no such data set")
    # ARFF: a line "@attribute name type" for each column, then the rows; % begins a comment
    text = download(about["url"])
    attributes = re.findall(r"(?im)^@attribute\s+('[^']*'|\"[^\"]*\"|\S+)\s+(\S.*)", text)
    names = [name.strip("'\"") for name, kind in attributes]
    lines = [line for line in text.splitlines() if line.strip() and line[0] not in "%@"]
    rows = list(csv.reader(lines, quotechar="'", skipinitialspace=True))
    target = about.get("default_target_attribute")
    if target not in names or {len(row) for row in rows} != {len(names)}:
        raise ValueError(f"OpenML {number}: not a dense table with one target")
    ignored = about.get("ignore_attribute") or []                       # one name, or a list
    left_out = [target, about.get("row_id_attribute"), *np.ravel(ignored)]
    kinds = [kind.split()[0].lower() for name, kind in attributes]
    keep = []
    for i, name in enumerate(names):
        if kinds[i] in ("numeric", "real", "integer") and name not in left_out:
            keep.append(i)
    keep.append(names.index(target))
    classes = attributes[keep[-1]][1].strip(" {}\r")                    # {a, b}, or a word: numeric
    classes, = csv.reader([classes], quotechar="'", skipinitialspace=True)
    classes = [name.strip() for name in classes]
    if len(classes) > 1:                                                # label 0 is the first
        for row in rows:
            row[keep[-1]] = classes.index(row[keep[-1]].strip())
    file = io.StringIO()
    for row in [names, *rows]:
        csv.writer(file).writerow([row[i] for i in keep])
    common.write(Path(folder, f"{number}.csv"), file.getvalue().encode())

def fetch_missing(numbers, folder):
    """Downloads the tables that are not there. UsageError if that fails."""
    for number in numbers:
        if not Path(folder, f"{number}.csv").exists():
            try:
                fetch(number, folder)
            except (OSError, ValueError, csv.Error, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
                raise common.UsageError(f"--fetch {number}: {reason}") from error

class Tables:
    """Prompts from real tables, all but the one held out: rows of one table, in random order,
    without repetition. ValueError where the tables do not serve.

    The paper's protocol: each of ten tables is held out in turn; the model is trained on prompts
    from 95% of the rows of the others (5% are kept for validation) and tested on prompts from it.
    `held_out` counts the folder's tables in the order of their numbers (shorter names first). The
    paper tests on 5% of the rows of that table, and we on all.
    """

    scale = 1
    n_out = 2                                                           # two logits

    def __init__(self, folder, held_out, n_dims=20, n_points=41, device="cpu"):
        paths = list(Path(folder).glob("*.csv"))
        paths.sort(key=lambda path: (len(path.stem), path.stem))        # 720 before 1462
        if held_out >= len(paths) or len(paths) < 2:
            raise ValueError(f"{folder} has {len(paths)} tables (*.csv), too few for --held-out "
                             f"{held_out}: give --data-dir FOLDER, or --fetch")
        self.name = paths[held_out].stem
        self.device = device
        self.baselines = {}
        rng = np.random.default_rng(0)
        tables = {"train": [], "valid": [], "test": []}
        for number, path in enumerate(paths):
            xs, ys = map(torch.from_numpy, read_table(path, n_dims))
            rows = rng.permutation(len(ys))
            train, valid = np.split(rows, [len(rows) * 95 // 100])
            if len(valid) < n_points:
                raise ValueError(f"{path}: {len(valid)} rows to validate on (5%) are fewer than "
                                 f"--n-points {n_points}")
            own = {"test": rows} if number == held_out else {"train": train, "valid": valid}
            for part, rows in own.items():
                tables[part].append((xs[rows], ys[rows]))
        # tables of different lengths as one: xs (tables, rows, d), ys (tables, rows), lengths
        self.parts = {}
        for part, pairs in tables.items():
            xs, ys = zip(*pairs)
            lengths = torch.tensor([len(y) for y in ys], device=device)
            xs = nn.utils.rnn.pad_sequence(xs, batch_first=True).to(device)
            ys = nn.utils.rnn.pad_sequence(ys, batch_first=True).to(device)
            self.parts[part] = xs, ys, lengths

    def sample(self, batch, n_points, generator, active_dims=None, part="train"):
        """xs (B, n, d), ys (B, n) in 0, 1, from random tables of `part`: train, valid, or test
        (the table held out). All dimensions are active."""
        xs, ys, lengths = self.parts[part]
        n_rows = xs.shape[1]                                            # of the longest table
        table = torch.randint(len(xs), (batch, 1), generator=generator, device=self.device)
        keys = torch.rand(batch, n_rows, generator=generator, device=self.device)
        is_row = torch.arange(n_rows, device=self.device) < lengths[table]
        rows = keys.masked_fill(~is_row, -1.0).topk(n_points, dim=1).indices            # distinct
        return xs[table, rows], ys[table, rows].float()

# ---- Tables and figures -------------------------------------------------------------------------

# The paper's accuracy on each table of OpenML, held out. It numbers them 0 .. 9: the ids in their
# order are our reading, and that the last is 42192 a guess from its about 5,270 rows.
ACCURACY = """
table     720  725  737  803  807  816  819  847  871 42192
standard .627 .511 .656 .395 .406 .463 .483 .668 .533 .650
looped   .662 .504 .721 .401 .416 .462 .568 .757 .510 .648
"""

# Fig. 3, read off the curves that the authors' evaluation prints: the squared error at d = 20 over
# the variance of y, by number of examples; the loop after 500 loops. The paper has more curves.
CURVES = {
    "linear": """
examples    1    5    8   10   12   15   16   18   19    20    21    22    25    30    40
looped   .921 .771 .616 .519 .428 .248 .212 .116 .060 .0242 .0110 .0057 .0023 .0011 .0008
standard .920 .769 .615 .519 .426 .247 .212 .112 .059 .0204 .0077 .0038 .0013 .0007 .0005
""",
    "sparse-linear": """
examples    1    5    8    10    12    15    16    18    20    25    30    40
looped   .897 .599 .147 .0213 .0063 .0037 .0022 .0017 .0013 .0010 .0007 .0006
standard .887 .584 .221 .0848 .0390 .0153 .0099 .0064 .0048 .0026 .0021 .0017
""",
    "relu-2nn": """
examples    1    5   10   20   30   40   60   80  100
looped   .880 .669 .523 .414 .326 .282 .216 .189 .180
standard .875 .672 .521 .411 .320 .280 .208 .183 .170
""",
}

def published(text):
    """The numbers in such a text: {"standard": {"720": .627, ...}, "looped": ...}."""
    header, *rows = [line.split() for line in text.strip().splitlines()]
    found = {}
    for name, *numbers in rows:
        found[name] = dict(zip(header[1:], map(float, numbers)))
    return found

def error_of(task):
    """What an error is, in words."""
    return "fraction of wrong labels" if task == "openml" else "squared error / variance of y"

def is_papers(args):
    """Whether a run's prompts are the paper's."""
    return args.n_dims == 20 and args.n_points == TASKS[args.task].settings["n_points"]

def in_words(run):
    """A run's model, as legends and tables call it."""
    args = run.args
    words = "looped" if args.model == "looped" else f"{args.n_layer} layers"
    if args.model == "tied":
        words += ", tied"
    words += {"none": ", no injection", "multiply": ", multiplied"}.get(args.inject, "")
    if args.task == "openml":
        words += f", table {run.results['table']}"
    return words

def at_loops(run):
    """The same, with the loops at which errors by examples are measured."""
    loops = run.args.eval_loops
    return in_words(run) + (f", {loops} loops" if loops else "")

def print_curves(title, x_name, curves):
    """A table of curves, of about 20 rows and all of the paper's."""
    if not curves:
        return
    longest = max([x for _, x, _, _ in curves], key=len)
    step = max(1, len(longest) // 20)
    rows = {longest[0], longest[-1]}
    rows.update(x for x in longest if x % step == 0)
    for label, xs, _, _ in curves:
        if "paper" in label:
            rows.update(xs)
    cells = []
    for row in sorted(rows):
        for label, xs, ys, _ in curves:
            if row in xs:
                cells.append((f"{x_name} {row}", label, ys[xs.index(row)]))
    common.print_table(title, cells)

def error_cells(row, curves):
    """The mean error with all examples and its interval, as cells. curves: see bootstrap."""
    mean, low, high = [curve[-1] for curve in curves]
    return [(row, "error", mean), (row, "90% interval", f"{low:.3f} to {high:.3f}")]

def show_summary(task, runs):
    """Errors with all examples and sizes; on OpenML accuracies beside the paper's."""
    cells = []
    for run in runs:
        row, results = at_loops(run), run.results
        cells += error_cells(row, results["curve"])
        if task == "openml":
            cells.append((row, "accuracy", 1 - results["curve"][0][-1]))
            theirs = published(ACCURACY).get(run.args.model, {})
            if is_papers(run.args) and results["table"] in theirs:
                cells.append((row, "paper", theirs[results["table"]]))
        cells.append((row, "parameters", results["n_params"], ",.0f"))
        cells.append((row, "of 12 layers'", results["n_params"] / results["n_params_12"], ".1%"))
    for name, curves in runs[0].results["baselines"].items():
        cells += error_cells(name, curves)
    common.print_table(f"""\
{task}: the {error_of(task)} with all {runs[0].args.n_points - 1} examples.
In brackets: the range over seeds; 90% interval: over test prompts, of the first seed.""", cells)

def show_curves(task, runs):
    """Prints errors by examples (Fig. 3) and by loops (Fig. 2), and what probes find (Sec. 6).
    Returns the same as panels of the figure, {title: (axis, curves)}."""
    error = error_of(task)
    models, loops, probes = [], [], {}
    for run in runs:
        name, results = in_words(run), run.results
        curve = results["curve"][0]
        models.append((at_loops(run), range(len(curve)), curve, {}))
        if "by_loops" in results:
            ys = results["by_loops"]
            b = len(ys) // 10
            style = dict(marker="o", markevery=[b - 1])
            loops.append((f"{name}, b = {b}", range(1, len(ys) + 1), ys, style))
        for target, ys in results.get("probe", {}).items():
            curves = probes.setdefault(f"{task}, {name}", [])
            curves.append((target, range(len(ys)), ys, {}))
    if is_papers(runs[0].args) and task in CURVES:
        hollow = dict(marker="o", linestyle="none", fillstyle="none")
        for name, numbers in published(CURVES[task]).items():
            xs = [int(x) for x in numbers]
            models.append((f"paper, {name}", xs, list(numbers.values()), hollow))
    baselines = []
    for name, (curve, _, _) in runs[0].results["baselines"].items():
        marker = "ov^s*"[len(baselines)]
        style = dict(color="gray", linewidth=1, marker=marker, markersize=3)
        baselines.append((name, range(len(curve)), curve, style))
    print_curves(f"{task}: {error} by examples", "examples", models)
    print_curves(f"{task}: the same, baselines", "examples", baselines)
    axis = dict(xlabel="examples", ylabel=error, ylim=(0, 2))           # some begin above
    panels = {f"{task}, by examples": (axis, models + baselines)}
    if loops:
        print_curves(f"{task}: {error} with all examples, by loops", "loops", loops)
        axis = dict(xlabel="loops (mark: b, as trained)", ylabel=error, yscale="log")
        panels[f"{task}, all examples"] = axis, loops
    for title, curves in probes.items():
        print_curves(f"{title}: relative error of the probe", "loop or layer", curves)
        panels[title] = dict(xlabel="loop or layer", ylabel="relative error of the probe"), curves
    return panels

def show_ood(task, runs):
    """App.: errors on out-of-distribution inputs."""
    cells = []
    for run in runs:
        for name, error in run.results["ood"].items():
            cells.append((name, at_loops(run), error))
    for name, error in runs[0].results["ood of least squares"].items():
        cells.append((name, "least squares", error))
    common.print_table(f"{task}: {error_of(task)} with all examples, on other inputs", cells)

def show(runs):
    """Prints the tables of each task, and draws the panels of all in one figure."""
    panels = {}
    for task in dict.fromkeys(run.args.task for run in runs):
        of_task = [run for run in runs if run.args.task == task]
        show_summary(task, of_task)
        panels |= show_curves(task, of_task)
        if "ood" in of_task[0].results:
            show_ood(task, of_task)
    if runs[0].args.plot:
        common.plot(runs[0].folder.parent / "errors.png", panels)

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    count = common.positive_int
    add("--task", nargs="+", choices=list(TASKS), default=["linear"], help="function classes")
    add("--model", nargs="+", choices=list(MODELS), default=["looped"],
        help="one layer looped; layers; one shared")
    add("--inject", nargs="+", choices=["add", "multiply", "none"], default=["add"],
        help="looped: the prompt, at every loop")
    add("--n-layer", type=count, default=12, help="layers of standard and tied")
    add("--n-head", type=count, default=4, help="heads a layer")
    add("--n-embd", type=count, default=64, help="width")
    add("--n-dims", type=count, default=2, help="dimensions d of x")
    add("--dims-start", type=count, default=2, help="dimensions at first; one more every stage")
    add("--n-points", type=common.number(int, 2, 10_000), default=6,
        help="pairs in a prompt; the last is predicted from the others")
    add("--points-start", type=count, default=6, help="points at first")
    add("--points-step", type=count, default=2, help="points added at every stage")
    add("--curriculum-every", type=count, default=700, help="steps of a stage")
    add("--loops", type=count, default=20, help="looped: loops b, at the end of the curriculum")
    add("--window", type=count, default=6, help="looped: last loops T, on which the loss is taken")
    add("--loops-every", type=count, default=60,
        help="looped: steps until two loops are added, from T up to b")
    add("--steps", type=count, default=1_100, help="training steps")
    add("--batch-size", type=count, default=256, help="prompts a step")
    add("--lr", type=common.positive_float, default=8e-3, help="peak learning rate of Adam")
    add("--beta2", type=common.number(float, 0, 0.99999), default=0.98,
        help="of Adam: how slowly it forgets squared gradients")
    add("--warmup", type=common.number(int, 0, 10**9), default=100, help="steps of linear warm-up")
    add("--schedule", choices=["constant", "cosine"], default="cosine",
        help="cosine: times half a cosine, to 0")
    add("--eval-every", type=count, default=100, help="steps between evaluations")
    add("--n-eval", type=count, default=1_280, help="prompts of each measurement")
    add("--eval-loops", type=count,
        help="looped: loops of errors by examples and of --ood (default: b; paper: 500, trees 200)")
    add("--ood", action="store_true", help="measure on other inputs than trained on")
    add("--probe", action="store_true", help="probe the hidden states for X^T y and w")
    add("--data-dir", default="tables", help="openml: folder of CSVs, label (two classes) last")
    add("--fetch", nargs="*", type=count, help="openml: ids to download there first (the paper's)")
    add("--held-out", nargs="+", type=common.number(int, 0, 10**6), default=[0],
        help="openml: the table to test on, 0 the first of the folder in the order of ids")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="of weights and prompts")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile")
    return common.parse_args(parser, PRESETS, argv)

def main(argv=None):
    """The command: trains what the flags ask for, prints the tables, returns the results."""
    args = parse_args(argv)
    if args.fetch is not None and "openml" in args.task:
        fetch_missing(args.fetch or published(ACCURACY)["looped"], args.data_dir)
        args.fetch = None                                    # no run depends on it
    runs = common.sweep(args, SWEEP, build, resolve, MEASURED)
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
