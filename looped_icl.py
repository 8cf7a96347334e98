"""
Looped Transformers are Better at Learning Learning Algorithms
Yang, Lee, Nowak, Papailiopoulos. ICLR 2024, arXiv 2311.12424.

The paper's claim: one transformer block, looped b times with the prompt added anew at every loop,
matches a 12-layer transformer at in-context regression with less than a tenth of its parameters. It
keeps its answer when looped far past b: it has learned an iterative algorithm with a fixed point.
The quick preset shows the fixed point: the error with all examples falls towards that of least
squares, 0, and is about the same at b and at 10 b loops; the last lines of the output say so. It
does not show that the loop matches 12 layers, which have a lower error there; --preset medium is
for that.

    python looped_icl.py                                two dimensions, in minutes
    python looped_icl.py --inject none                  our own variant: lost past b loops
    python looped_icl.py --preset medium --plot         all models in five dimensions, in an hour
    python looped_icl.py --preset medium --model looped standard --inject add --seed 0 1 2

Fig. 2, error by loops, at its own b = 30, T = 15 (--loops, --window):
    python looped_icl.py --preset paper --loops 30 --plot
Fig. 3, error by examples of each task, with its own b and T. The looped model is shown where it has
converged, at 500 loops, on trees at 200 (--eval-loops), and of three tasks the paper's curves, too:
    python looped_icl.py --preset paper --model looped standard tied --plot
    python looped_icl.py --preset paper --task noisy-linear --model looped standard --plot
    python looped_icl.py --preset paper --task sparse-linear --model looped standard --plot
    python looped_icl.py --preset paper --task decision-tree --model looped standard --plot
    python looped_icl.py --preset paper --task relu-2nn --model looped standard --plot
Out-of-distribution inputs (App.), and what a probe finds in the hidden states (Sec. 6):
    python looped_icl.py --preset paper --model looped standard --ood --probe
Real tables of OpenML, downloaded by id (the paper's, as we read it: 720 725 737 803 807 816 819 847
871 42192), or CSV files of your own (--data-dir); each is held out in turn, b = 30, T = 15:
    python looped_icl.py --preset paper --task openml --fetch --held-out 0 1 2 3 4 5 6 7 8 9

What the paper preset leaves open (points, loops, window, steps, batch) depends on the task: see
SETTINGS.

To reuse: InContextTransformer needs common's Block, CausalSelfAttention, MLP and gpt2_init_;
sample_prompts needs all that is above it in its section; a baseline needs those of prefixes,
sum_before, best_split and value_tree that it calls.
"""
import ast
import csv
import io
import json
import math
import statistics
import urllib.request
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
    keys = torch.rand(B, d, generator=generator, device=xs.device)
    rank = keys.argsort(1).argsort(1)                   # keys .7 .1 .9 .4 -> ranks 2 0 3 1
    return (xs @ (w * (rank < 3)[..., None]))[..., 0]

def decision_tree(xs, generator):
    """A tree of depth 4: each node branches on the sign of a random coordinate, leaves are N(0, 1).
    Nodes are numbered level by level: 0, then 1 and 2, then 3 to 6."""
    B, n, d = xs.shape
    coordinate = torch.randint(d, (B, 15), generator=generator, device=xs.device)   # nodes 0-14
    leaves = randn(generator, B, 16)                                    # nodes 15-30
    node = torch.zeros(B, n, dtype=torch.long, device=xs.device)        # all begin at the root
    for _ in range(4):
        asked = coordinate.gather(1, node)              # (B, n): which coordinate its node looks at
        x = xs.gather(2, asked[..., None])[..., 0]      # (B, n): its value
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
    """A row of TASKS. To add a function class, write a function and a row here, for --preset paper
    also a row of SETTINGS."""
    f: Callable | None          # (xs, generator) -> ys; None: real tables
    variance: Callable          # d -> the variance of y without noise
    baselines: list             # names, see BASELINES
    all_dims: bool = False      # all dimensions are active from the start

SIMPLE = ["least squares", "averaging", "3-NN"]
TREES = ["tree on x", "tree on signs"]

TASKS = {
    "linear": FunctionClass(linear, lambda d: d, SIMPLE),
    "noisy-linear": FunctionClass(noisy_linear, lambda d: d, SIMPLE),
    "sparse-linear": FunctionClass(sparse_linear, lambda d: min(d, 3), SIMPLE + ["Lasso"]),
    "decision-tree": FunctionClass(decision_tree, lambda d: 1, SIMPLE + TREES, all_dims=True),
    "relu-2nn": FunctionClass(relu_2nn, lambda d: d, SIMPLE + ["2-layer network"]),
    "openml": FunctionClass(None, None, [], all_dims=True),
}

def sample_prompts(task, batch, n_points, n_dims, generator, active_dims=None, device="cpu"):
    """xs (B, n, d), ys (B, n): x ~ N(0, I) in the first active_dims coordinates, 0 in the others,
    and y = f(x), with a new f for each prompt. The generator has to be on `device`.

    f does not depend on active_dims: sparse-linear draws its coordinates among all n_dims. A tree
    would branch on zeros, so its x has all dimensions from the start.
    """
    xs = torch.randn(batch, n_points, n_dims, generator=generator, device=device)
    if active_dims is not None and not TASKS[task].all_dims:
        xs[..., active_dims:] = 0
    return xs, TASKS[task].f(xs, generator)

class Prompts:
    """The prompts of one function class. Squared errors are divided by `scale`, the variance of y
    without noise."""

    n_out = 1                                                           # the model predicts y

    def __init__(self, name, n_dims, device="cpu"):
        self.name = name
        self.n_dims = n_dims
        self.device = device
        self.scale = TASKS[name].variance(n_dims)

    def sample(self, batch, n_points, generator, active_dims=None, part="train"):
        """xs (B, n, d), ys (B, n). `part` is for Tables; here every prompt is new."""
        shape = batch, n_points, self.n_dims
        return sample_prompts(self.name, *shape, generator, active_dims, self.device)

# ---- The model (Sec. 4) -------------------------------------------------------------------------

class InContextTransformer(nn.Module):
    """A GPT-2 that reads x_1, y_1, x_2, y_2, ... and predicts each y at its x. If it is looped, its
    output is its next input. A token has n_dims numbers: x, or y followed by zeros. There are
    2 n_points + 1 positions, as the authors count them (203 for 101 points). inject: how the
    prompt enters a loop. n_out: 1 for the value of y, 2 for the logits of two labels."""

    def __init__(self, n_dims, n_points, n_layer, n_head, n_embd, inject="add", n_out=1):
        super().__init__()
        self.inject = inject
        self.read_in = nn.Linear(n_dims, n_embd)
        self.wpe = nn.Embedding(2 * n_points + 1, n_embd)
        self.h = nn.ModuleList([common.Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        common.gpt2_init_(self.h, n_layer)
        nn.init.normal_(self.wpe.weight, std=0.02)      # read_in, read_out: PyTorch's default
        self.read_out = nn.Linear(n_embd, n_out)

    def trunk(self, z):
        """f, one loop: positions, blocks, final norm; z (B, T, C) -> (B, T, C)."""
        z = z + self.wpe.weight[:z.shape[1]]
        for block in self.h:
            z = block(z)
        return self.ln_f(z)

    def forward(self, xs, ys, loops=1, window=1):
        """xs (B, n, d), ys (B, n) -> predictions (window, B, n) of the last `window` loops, or
        logits (window, B, n, 2); window <= loops. With e the prompt after the read-in:

            add         z_0 = 0     z_(i+1) = f(z_i + e)
            multiply    z_0 = 1     z_(i+1) = f(z_i e)      (from 0, e would never be seen)
            none        z_0 = e     z_(i+1) = f(z_i)        (our variant, not in the paper)

        The loops before the window run without gradient, except for none. With one loop it is a
        standard transformer.
        """
        d = xs.shape[2]
        ys = F.pad(ys[..., None], (0, d - 1))                           # (B, n, d)
        tokens = torch.stack([xs, ys], 2).flatten(1, 2)                 # x_1, y_1, ..: (B, 2n, d)
        e = self.read_in(tokens[:, :-1])                                # without the last y
        start = {"add": torch.zeros_like(e), "multiply": torch.ones_like(e), "none": e}
        z = start[self.inject]
        # none: e enters only before the first loop; read_in learns through all loops or not at all
        first_with_gradient = 0 if self.inject == "none" else loops - window
        predictions = []
        for i in range(loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first_with_gradient):
                if self.inject == "add":
                    z = z + e
                elif self.inject == "multiply":
                    z = z * e
                z = self.trunk(z)                                       # (B, 2n-1, C)
            if i >= loops - window:
                predictions.append(self.read_out(z[:, ::2]).squeeze(-1))        # at each x
        return torch.stack(predictions)

def passes(args):
    """How often a model applies its trunk. "tied" has one layer and applies it n_layer times, each
    time with positions and final norm."""
    return {"looped": args.loops, "standard": 1, "tied": args.n_layer}[args.model]

# ---- Training (Sec. 5) --------------------------------------------------------------------------

def numbers_in(text):
    """The rows of a table as dicts: {"linear": {"n_points": 41, ...}, "noisy-linear": ...}."""
    header, *rows = [line.split() for line in text.strip().splitlines()]
    found = {}
    for name, *numbers in rows:
        found[name] = dict(zip(header[1:], map(ast.literal_eval, numbers)))
    return found

# The paper's settings of each task. eval_loops: how far a loop runs for the error by examples
SETTINGS = numbers_in("""
task           n_points  points_start  points_step  loops  window  eval_loops   steps  batch_size
linear               41            11            2     20      15         500  500000          64
noisy-linear         41            11            2     20      15         500  500000          64
sparse-linear        41            11            2     20      10         500  500000          64
decision-tree       101            26            5     70      15         200  500000          64
relu-2nn            101            26            5     12       5         500  500000          64
openml               41            41            2     30      15          30  100000          40
""")

# The defaults of the flags, at the end of this file, are "quick"; here is what differs from them
MEDIUM = dict(
    model=["looped", "standard", "tied"], inject=["add", "none"],
    n_dims=5, dims_start=1, n_points=11, points_start=11,
    window=8, loops_every=200,
    steps=6_000, batch_size=64, lr=2e-3, beta2=0.999, warmup=200, eval_every=500,
)
PAPER = dict(
    dict.fromkeys(SETTINGS["linear"]),       # n_points=None, ...: resolve takes them from SETTINGS
    n_head=8, n_embd=256,
    n_dims=20, dims_start=5, curriculum_every=5_000, loops_every=500,
    lr=1e-4, beta2=0.999, warmup=0, schedule="constant", eval_every=2_500,
)
PRESETS = {"quick": {}, "medium": MEDIUM, "paper": PAPER}
SWEEP = ["task", "model", "inject", "held_out", "seed"]
MEASURED = ["n_eval", "eval_loops", "ood", "probe"]          # training does not depend on them

def resolve(args):
    """Completes a run's flags: the paper's settings of its task; unused flags become None."""
    if args.preset == "paper":
        for key, value in SETTINGS[args.task].items():
            if getattr(args, key) is None:
                setattr(args, key, value)
    args.eval_loops = args.eval_loops or args.loops
    if args.model == "looped":
        args.n_layer = None
    else:
        args.inject = args.loops = args.window = args.loops_every = args.eval_loops = None
    if args.task == "openml":
        args.ood = args.probe = None
    else:
        args.data_dir = args.fetch = args.held_out = None
    if TASKS[args.task].all_dims:
        args.dims_start = None

def build(args):
    """The task (its prompts) and the model of a run. OSError or ValueError if the flags or the
    tables are impossible."""
    if args.model == "looped" and args.window > args.loops:
        raise ValueError(f"--window {args.window} is more than --loops {args.loops}")
    if args.task == "openml":
        task = Tables(args.data_dir, args.held_out, args.n_dims, args.n_points, args.device)
    else:
        task = Prompts(args.task, args.n_dims, args.device)
    n_layer = args.n_layer if args.model == "standard" else 1
    shape = args.n_dims, args.n_points, n_layer, args.n_head, args.n_embd
    inject = args.inject or "none"                           # standard, tied: at the start alone
    model = InContextTransformer(*shape, inject, task.n_out)
    return task, model.to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run, the model in eval mode."""
    return common.load(folder, build, device)

def curriculum(args, step):
    """Active dimensions, points and loops at a step: each grows in stages to its full size."""
    stage = step // args.curriculum_every
    active_dims = min(args.n_dims, (args.dims_start or args.n_dims) + stage)
    n_points = min(args.n_points, args.points_start + args.points_step * stage)
    loops = passes(args)
    if args.model == "looped":
        loops = min(loops, args.window + 2 * (step // args.loops_every))
    return active_dims, n_points, loops

def learning_rate(step, args):
    """Linear warm-up, then constant; "cosine" multiplies this by half a cosine, from 1 to 0."""
    rate = args.lr * min(1, (step + 1) / max(1, args.warmup))
    if args.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * (step / args.steps))) / 2
    return float(np.float32(rate))                           # RESULTS.md was measured in float32

def autocast(args):
    """--dtype bfloat16. Autocast caches the weights that it casts: the loops with gradient would
    reuse those cast without, and the block would learn nothing (torch 2.9). So no cache."""
    device = torch.device(args.device).type
    bfloat16 = args.dtype == "bfloat16"
    return torch.autocast(device, torch.bfloat16, enabled=bfloat16, cache_enabled=False)

def loss_of(predictions, ys):
    """The mean over loops, prompts and points: of the squared error for predictions (T, B, n), of
    the cross-entropy for logits (T, B, n, 2)."""
    if predictions.dim() == 3:
        return (predictions - ys).square().mean()
    labels = ys.long().expand(predictions.shape[:-1])                   # (T, B, n)
    return F.cross_entropy(predictions.movedim(-1, 1), labels)          # wants (T, 2, B, n)

def train(args, run):
    """Trains one run, from its checkpoint if there is one."""
    task, model = build(args)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
    data = torch.Generator(args.device).manual_seed(args.seed)          # of training prompts
    start = run.restore(model, optimizer, data)
    if args.compile:                                         # one loop, as their number changes
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
            error = errors(model, task, xs, ys, passes(args))[0, :, -1].mean().item()
            run.log(step + 1, loss=loss.item(), error=error, dims=dims, points=points, loops=loops)

# ---- Measurement --------------------------------------------------------------------------------

@torch.no_grad()
def errors(model, task, xs, ys, loops=1, window=1):
    """The squared error over the variance of y, for each of the last `window` loops, each prompt
    and each point: (window, B, n). Of two logits: 1 if the more likely label is wrong, else 0."""
    parts = []
    for x, y in zip(xs.split(256), ys.split(256)):                    # less memory than all at once
        predictions = model(x, y, loops, window).float()
        if predictions.dim() == 4:
            parts.append((predictions.argmax(-1) != y).float())
        else:
            parts.append((predictions - y).square() / task.scale)
    return torch.cat(parts, 1)

def bootstrap(values, n=1_000):
    """values (N, n_points) -> three lists by point: the mean over N, and the lower and upper end of
    its 90% interval, from n resamplings of N rows with replacement."""
    values = values.double()
    N = len(values)
    draw = torch.Generator().manual_seed(0)
    samples = torch.randint(N, (n, N), generator=draw).to(values.device)
    means = torch.stack([values[rows].mean(0) for rows in samples])     # (n, n_points)
    low, high = means.quantile(0.05, 0), means.quantile(0.95, 0)
    return torch.stack([values.mean(0), low, high]).tolist()

def measure(args, run):
    """Error by examples and by loops, the baselines, and what --ood and --probe ask for."""
    task, model = run.trained(build)
    b = passes(args)
    loops = args.eval_loops or b
    fresh = torch.Generator(args.device).manual_seed(20_000)
    xs, ys = task.sample(args.n_eval, args.n_points, fresh, part="test")
    n_params = sum(p.numel() for p in model.parameters())
    n_block = sum(p.numel() for p in model.h[0].parameters())
    results = {
        "prompts": task.name,
        "n_params": n_params,
        "n_params_12": n_params + (12 - len(model.h)) * n_block,        # with 12 layers
        "curve": bootstrap(errors(model, task, xs, ys, loops)[0]),      # by number of examples
        "baselines": {},
    }
    for name in TASKS[args.task].baselines:
        squares = (BASELINES[name](xs, ys) - ys).square()               # (B, n)
        results["baselines"][name] = (squares / task.scale).double().mean(0).tolist()
    if b > 1:
        by_loops = errors(model, task, xs, ys, 10 * b, 10 * b)[..., -1]         # all examples
        results["by_loops"] = by_loops.mean(1).tolist()                 # (10 b, B) -> (10 b,)
    if args.ood:
        results["ood"] = {}
        for name, xs, ys, variance in shifted_prompts(task, args.n_eval, args.n_points, fresh):
            ours = errors(model, task, xs, ys, loops)[0, :, -1] * task.scale    # squared errors
            theirs = (least_squares(xs, ys) - ys)[:, -1].square()
            both = [ours.mean() / variance, theirs.mean() / variance]
            results["ood"][name] = torch.stack(both).tolist()
    if args.probe:
        results["probe"] = probe(model, task, args.n_points, b)
    return results

# ---- Probes (Sec. 6) ----------------------------------------------------------------------------

def hidden_states(model, xs, ys, loops):
    """The inputs of a probe, (layers, n - 1, B, 2C + 1), float64: after the read-in (layer 0) and
    after each pass through a block, for each prefix of i = 1 .. n - 1 pairs: the hidden state at
    y_i, the mean of the states so far, and a 1 for the bias."""
    found = []

    def keep(module, inputs, z):                                        # (B, 2n-1, C)
        z = z.double()
        n_tokens = torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
        mean = z.cumsum(1) / n_tokens
        read = torch.cat([z, mean], 2)[:, 1::2]                         # at y_1 .. y_(n-1)
        found.append(F.pad(read, (0, 1), value=1.0).transpose(0, 1))    # (n - 1, B, 2C + 1)

    hooks = [part.register_forward_hook(keep) for part in [model.read_in, *model.h]]
    model(xs, ys, loops)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)

def probe_targets(xs, ys):
    """X^T y / i and the minimum-norm least-squares w of each prefix of i = 1 .. n - 1 pairs, side
    by side: (n - 1, B, 2d), float64."""
    targets = []
    for i, X, y, _ in prefixes(xs.double(), ys.double()):
        w = torch.linalg.pinv(X) @ y                                    # (B, d, 1)
        targets.append(torch.cat([X.mT @ y / i, w], 1)[..., 0])
    return torch.stack(targets)

@torch.no_grad()
def probe(model, task, n_points, loops, n=1_000):
    """Sec. 6: how well a linear probe finds X^T y / i and the least-squares w of i pairs in the
    hidden states, at layer 0 and after each loop or layer -> {name: a list of errors by layer}.

    An error is the squared error over the target's mean square, on n prompts of "linear", averaged
    over prefixes: for X^T y of 1 to n_points - 1 pairs, for w of 1 to d. Each layer and prefix has
    its own probe, fitted by ridge regression on other prompts: 8 for each of its inputs, at least
    n. The control is fitted on prompts that all have w = (1, .., 1) and tested on the same n.

    The paper's probe pools all tokens by a learned softmax and has 64 hidden units, trained by
    gradient descent. Its standard model has 20 layers, its X^T y goes up to n_points pairs, and its
    errors are not divided.
    """
    d = task.n_dims
    n_fit = max(n, 8 * (2 * model.read_in.out_features + 1))

    def batches(count, seed, constant=False):
        """100 prompts at a time: inputs (layers, n - 1, 100, 2C + 1), targets (n - 1, 100, 2d)."""
        draw = torch.Generator(task.device).manual_seed(seed)
        xs, ys = sample_prompts("linear", count, n_points, d, draw, device=task.device)
        if constant:
            ys = xs.sum(2)
        for x, y in zip(xs.split(100), ys.split(100)):
            yield hidden_states(model, x, y, loops), probe_targets(x, y)

    found = {}
    for suffix, constant in [("", False), (" (control)", True)]:
        # ridge regression: W = (Z^T Z + I)^-1 Z^T Y, for all layers and prefixes at once
        gram = cross = error = power = 0
        for Z, Y in batches(n_fit, 40_001, constant):
            gram += Z.mT @ Z
            cross += Z.mT @ Y
        W = torch.linalg.solve(gram + torch.eye(gram.shape[-1]).to(gram), cross)
        for Z, Y in batches(n, 40_000):
            error += (Z @ W - Y).square().sum(2)                        # (layers, n - 1, 2 d)
            power += Y.square().sum(1)                                  # (n - 1, 2 d)
        for name, of, n_prefixes in ("X^T y", slice(d), n_points), ("w", slice(d, None), d):
            relative = error[..., of].sum(2) / power[..., of].sum(1)    # (layers, n - 1)
            found[name + suffix] = relative[:, :n_prefixes].mean(1).tolist()
    return found

# ---- Out-of-distribution inputs (App.) ----------------------------------------------------------

def shifted_prompts(task, n, n_points, generator):
    """Prompts as in training, then unlike them (App.): yields name, xs, ys, and the variance of the
    last y. A squared error is divided by it: always answering 0 scores 1."""
    d = task.n_dims
    f = TASKS[task.name].f
    degree = 0 if task.name == "decision-tree" else 2                   # y^2 grows as |x|^degree
    xs, _ = task.sample(n, n_points, generator)
    yield "as trained", xs, f(xs, generator), task.scale

    basis = torch.linalg.qr(randn(generator, n, d, d)).Q                # a random rotation each
    deviation = 1 / torch.arange(1, d + 1, device=task.device)          # variances 1 / i^2,
    deviation = deviation / deviation.square().mean().sqrt()            # scaled: their sum is d
    split = xs.clone()
    split[:, :-1, d // 2:] = 0                                          # the examples: one half
    split[:, -1, :d // 2] = 0                                           # the query: the other half
    # name: the inputs, and how long the query is in comparison to training
    inputs = {
        "skewed covariance": ((xs * deviation) @ basis.mT, 1),
        "query orthogonal to prompt": (split @ basis.mT, math.sqrt((d - d // 2) / d)),
    }
    for factor in (0.5, 2, 3):
        inputs[f"x times {factor}"] = factor * xs, factor
    for name, (x, size) in inputs.items():
        yield name, x, f(x, generator), task.scale * size**degree
    for factor in (0.5, 2, 3):
        yield f"y times {factor}", xs, factor * f(xs, generator), task.scale * factor**2

    ys = f(xs, generator)
    noise = randn(generator, *ys.shape)
    noise[:, -1] = 0                                                    # the label that is scored
    yield "label noise of variance 1", xs, ys + noise, task.scale

# ---- Baselines ----------------------------------------------------------------------------------

# Each predicts every y_i from x_i and the pairs before it: xs (B, n, d), ys (B, n) -> (B, n)

def prefixes(xs, ys):
    """For i = 1 .. n - 1: i, the first i pairs, X (B, i, d) and y (B, i, 1), and the next x, (B, 1,
    d)."""
    for i in range(1, ys.shape[1]):
        yield i, xs[:, :i], ys[:, :i, None], xs[:, i:i + 1]

def least_squares(xs, ys):
    """Minimum-norm least squares on the pairs before each x."""
    out = torch.zeros_like(ys)
    for i, X, y, x in prefixes(xs.double(), ys.double()):
        # inputs that lie in a subspace leave it by 1e-8 in rounding; rtol ignores that
        w = torch.linalg.pinv(X, rtol=1e-5) @ y                         # (B, d, 1)
        out[:, i] = (x @ w)[:, 0, 0]
    return out

def sum_before(terms):
    """Sums over the pairs before each x: terms (B, n, ...) -> the same shape. 1 2 5 -> 0 1 3."""
    total = terms.cumsum(1).roll(1, 1)
    total[:, 0] = 0
    return total

def averaging(xs, ys):
    """x_i . w with w the mean of x_j y_j over the pairs before, 0 where there are none."""
    before = sum_before(xs * ys[..., None])                             # (B, n, d)
    n_before = torch.arange(ys.shape[1], device=ys.device).clamp_min(1)
    return (xs * before).sum(2) / n_before

def nearest_neighbors(xs, ys, n=3):
    """The mean y of the n nearest x before each x (of all, if there are fewer), 0 for the first."""
    out = torch.zeros_like(ys)
    for i, X, y, x in prefixes(xs, ys):
        distance = (X - x).square().sum(2)                              # (B, i)
        nearest = distance.topk(min(n, i), largest=False).indices
        out[:, i] = ys.gather(1, nearest).mean(1)
    return out

def lasso(xs, ys, alpha=0.01, steps=1_000):
    """The Lasso on the pairs before each x: the w that minimises |y - X w|^2 / (2 i) + alpha |w|_1
    over the i pairs, by ADMM (Boyd et al. 2011, Sec. 6.4), for all prefixes and prompts at once."""
    x, y = xs.double(), ys.double()
    d = x.shape[2]
    # X^T X / i and X^T y / i, of the i pairs before each x
    i = torch.arange(x.shape[1], device=xs.device).clamp_min(1).view(-1, 1, 1)
    gram = sum_before(x[..., None] * x[..., None, :]) / i               # (B, n, d, d)
    target = sum_before(x * y[..., None])[..., None] / i                # (B, n, d, 1)
    rho = 2 * alpha
    inverse = torch.linalg.inv(gram + rho * torch.eye(d).to(gram))
    w = u = torch.zeros_like(target)
    for _ in range(steps):
        ridge = inverse @ (target + rho * (w - u))                      # minimises the squares
        u = u + 1.8 * ridge - 0.8 * w                                   # 1.8: over-relaxed, faster
        w = F.softshrink(u, alpha / rho)                                # minimises |w|_1
        u = u - w                                                       # how far the two differ
    return (x * w[..., 0]).sum(2).to(ys)

def best_split(x, y, member):
    """For each prompt, the split of the pairs in `member`, by a threshold on one coordinate, that
    lowers their squared error most. x (B, i, d), y (B, i), member (B, i) -> coordinate (B,) and
    threshold (B, 1), halfway between two values; infinite if no split is possible."""
    i = x.shape[1]
    # pairs in the order of each coordinate, (B, i, d); those that are not members come last
    value, order = x.masked_fill(~member[..., None], math.inf).sort(1)
    y = (y * member)[..., None].expand_as(x).gather(1, order)
    sums = y.cumsum(1)
    left, total = sums[:, :-1], sums[:, -1:]                            # (B, i-1, d), (B, 1, d)
    n_left = torch.arange(1, i, device=x.device)[:, None]
    n_right = member.sum(1)[:, None, None] - n_left
    # n values of y have the squared error sum y^2 - (sum y)^2 / n about their mean
    gain = left**2 / n_left + (total - left)**2 / n_right.clamp_min(1)
    threshold = (value[:, 1:] + value[:, :-1]) / 2
    impossible = (n_right < 1) | (value[:, 1:] == value[:, :-1])
    # (B, i-1, d) -> (B, d (i-1)): of equal gains, that of the first coordinate is taken
    gain = gain.masked_fill(impossible, -1).mT.flatten(1)
    threshold = threshold.masked_fill(impossible, math.inf).mT.flatten(1)
    best = gain.argmax(1)
    return best // (i - 1), threshold.gather(1, best[:, None])

def value_tree(xs, ys, depth=2):
    """A regression tree on the values of x, grown greedily on the pairs before each x. Only the
    branch that x_i takes is grown: the prediction is the mean y of the pairs that take it, too."""
    out = torch.zeros_like(ys)
    prompt = torch.arange(len(xs), device=xs.device)
    for i in range(1, ys.shape[1]):
        X, y = xs[:, :i], ys[:, :i]
        member = torch.ones_like(y, dtype=torch.bool)
        for level in range(depth if i > 1 else 0):                      # one pair cannot be split
            coordinate, threshold = best_split(X, y, member)
            right = xs[prompt, :i + 1, coordinate] > threshold          # (B, i + 1), x_i the last
            member = member & (right[:, :i] == right[:, i:])
        out[:, i] = (y * member).sum(1) / member.sum(1)
    return out

def sign_tree(xs, ys, depth=4):
    """The same on the signs of x. The paper's other two baselines, boosted trees on x and on its
    signs, are missing here: they need a library."""
    return value_tree((xs > 0).to(xs.dtype), ys, depth)

@torch.enable_grad()
def gd_network(xs, ys, hidden=100, steps=1_000, batch=10, lr=5e-3):
    """A two-layer ReLU network with biases for each prompt and x, trained by Adam on batches of the
    pairs before x."""
    B, n, d = xs.shape
    draw = torch.Generator(xs.device).manual_seed(0)

    def linear(n_in, n_out):
        """Weights (B, n_in, n_out) and biases (B, 1, n_out), initialised like nn.Linear."""
        parameters = []
        for rows in (n_in, 1):
            numbers = torch.rand(B, rows, n_out, generator=draw, device=xs.device)
            parameters.append(((2 * numbers - 1) / math.sqrt(n_in)).requires_grad_())
        return parameters

    out = torch.zeros_like(ys)
    for i, X, y, x in prefixes(xs, ys):                                 # all prompts at once
        W1, b1 = linear(d, hidden)
        W2, b2 = linear(hidden, 1)

        def f(x):                                                       # (B, b, d) -> (B, b, 1)
            return (x @ W1 + b1).relu() @ W2 + b2

        optimizer = torch.optim.Adam([W1, b1, W2, b2], lr=lr, fused=True)
        for _ in range(steps):
            rows = torch.randperm(i, generator=draw, device=xs.device)[:batch]
            loss = (f(X[:, rows]) - y[:, rows]).square().mean(1).sum()  # of independent networks
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out[:, i] = f(x)[:, 0, 0].detach()
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

def read_table(path, n_dims=20):
    """A CSV with a header and the label in the last column -> (rows, n_dims + 1): zeros in front if
    it has fewer than n_dims features, the features, standardised, and the label, 0 or 1.
    ValueError, with the reason, if it does not meet the paper's conditions."""
    try:
        cells = np.loadtxt(path, dtype=str, delimiter=",", quotechar='"', comments=None, ndmin=2)
        features = cells[1:, :-1].astype(float)
        classes, labels = np.unique(np.char.strip(cells[1:, -1]), return_inverse=True)
    except ValueError as error:                              # not a number, or too short a row
        raise ValueError(f"{path}: {error}") from None
    n_rows, n_features = features.shape
    conditions = {
        "1,000 to 10,000 rows": 1_000 <= n_rows <= 10_000,
        f"5 to --n-dims {n_dims} features": 5 <= n_features <= n_dims,
        "finite numbers in all columns but the last": np.isfinite(features).all(),
        "two classes": len(classes) == 2,
        "at least half as many rows of one class as of the other": 1 / 3 <= labels.mean() <= 2 / 3,
    }
    for condition, is_met in conditions.items():
        if not is_met:
            raise ValueError(f"{path}: it does not have {condition}")
    deviation = features.std(0)
    deviation[deviation == 0] = 1
    features = (features - features.mean(0)) / deviation
    features = np.pad(features, ((0, 0), (n_dims - n_features, 0)))
    return np.column_stack([features, labels]).astype(np.float32)

def download(url):
    """The text at an address. OSError if it cannot be had."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode("utf-8", "replace")

def fetch(number, folder):
    """Downloads the OpenML data set of that id as folder/<id>.csv, if it is not there: the numeric
    columns, except those that OpenML says to ignore, then the target. UsageError if that fails."""
    path = Path(folder, f"{number}.csv")
    if path.exists():
        return
    api = "https://www.openml.org/api/v1/json/data"
    try:
        about = json.loads(download(f"{api}/{number}"))["data_set_description"]
        features = json.loads(download(f"{api}/features/{number}"))["data_features"]["feature"]
        features.sort(key=lambda feature: int(feature["index"]))        # in the order of columns
        names = [feature["name"] for feature in features]
        target = names.index(about["default_target_attribute"])
        columns = []
        for i, feature in enumerate(features):
            ignored = "true" in (feature["is_ignore"], feature["is_row_identifier"])
            if feature["data_type"] == "numeric" and i != target and not ignored:
                columns.append(i)
        columns.append(target)
        # an ARFF file: CSV after lines with @, which say what the columns are; % is a comment
        lines = download(about["url"]).splitlines()
        lines = [line for line in lines if line.strip() and line[0] not in "%@"]
        rows = csv.reader(lines, quotechar="'", skipinitialspace=True)
        file = io.StringIO()
        for row in [names, *rows]:
            csv.writer(file).writerow([row[i] for i in columns])
    except (OSError, ValueError, LookupError) as error:
        raise common.UsageError(f"--fetch {number}: {error}") from error
    common.write(path, file.getvalue().encode())

class Tables:
    """Prompts from real tables: each is random rows of one table, without repetition. ValueError if
    a table does not meet the paper's conditions.

    The paper's protocol: each of ten tables is held out in turn; the model is trained on prompts
    from 95% of the rows of the others (5% are kept for validation) and tested on prompts from the
    one held out: there on 5% of its rows, here on all. held_out: its place in the folder, 0 the
    first; tables are in the order of their numbers (shorter names first).
    """

    n_out = 2                                                           # two logits

    def __init__(self, folder, held_out, n_dims=20, n_points=41, device="cpu"):
        paths = Path(folder).glob("*.csv")
        paths = sorted(paths, key=lambda path: (len(path.stem), path.stem))     # 720 before 1462
        if held_out >= len(paths) or len(paths) < 2:
            raise ValueError(f"{folder} has {len(paths)} tables (*.csv), too few for --held-out "
                             f"{held_out}: give --data-dir FOLDER, or --fetch")
        self.name = paths[held_out].stem
        self.device = device
        if n_points > 50:
            raise ValueError("--n-points is at most 50: 5% of the fewest rows of a table, 1,000")
        rng = np.random.default_rng(0)
        tables = {"train": [], "valid": [], "test": []}
        for number, path in enumerate(paths):
            table = torch.from_numpy(rng.permutation(read_table(path, n_dims)))
            if number == held_out:
                tables["test"].append(table)
            else:
                n_train = len(table) * 95 // 100
                tables["train"].append(table[:n_train])
                tables["valid"].append(table[n_train:])
        self.parts = {}
        for part, own in tables.items():                     # all rows, and each one's table
            lengths = torch.tensor([len(table) for table in own])
            owner = torch.arange(len(own)).repeat_interleave(lengths)
            self.parts[part] = torch.cat(own).to(device), owner.to(device), len(own)

    def sample(self, batch, n_points, generator, active_dims=None, part="train"):
        """xs (B, n, d), ys (B, n) of 0 or 1, from random tables of `part`: train, valid, or test
        (the table held out). active_dims is for Prompts."""
        rows, owner, n_tables = self.parts[part]                        # (N, d + 1), (N,)
        table = torch.randint(n_tables, (batch, 1), generator=generator, device=self.device)
        # the n_points rows with the largest of random keys; other tables' keys are the lowest
        keys = torch.rand(batch, len(rows), generator=generator, device=self.device)
        keys = keys.masked_fill(owner != table, -1.0)                   # (B, N)
        pairs = rows[keys.topk(n_points, dim=1).indices]                # (B, n, d + 1)
        return pairs[..., :-1], pairs[..., -1]

# ---- Tables and figures -------------------------------------------------------------------------

# The paper's accuracy on each table of OpenML, held out. The paper numbers the tables 0 .. 9; the
# ids are our reading: 42192, the last, is a guess from its number of rows, about 5,270.
ACCURACY = numbers_in("""
table     720  725  737  803  807  816  819  847  871 42192
standard .627 .511 .656 .395 .406 .463 .483 .668 .533 .650
looped   .662 .504 .721 .401 .416 .462 .568 .757 .510 .648
""")

# Fig. 3, as the authors' evaluation prints it: the squared error over the variance of y, d = 20, by
# number of examples; the looped model after 500 loops. The paper has more curves.
CURVES = {
    "linear": numbers_in("""
examples    1    5    8   10   12   15   16   18   19    20    21    22    25    30    40
looped   .921 .771 .616 .519 .428 .248 .212 .116 .060 .0242 .0110 .0057 .0023 .0011 .0008
standard .920 .769 .615 .519 .426 .247 .212 .112 .059 .0204 .0077 .0038 .0013 .0007 .0005
"""),
    "sparse-linear": numbers_in("""
examples    1    5    8    10    12    15    16    18    20    25    30    40
looped   .897 .599 .147 .0213 .0063 .0037 .0022 .0017 .0013 .0010 .0007 .0006
standard .887 .584 .221 .0848 .0390 .0153 .0099 .0064 .0048 .0026 .0021 .0017
"""),
    "relu-2nn": numbers_in("""
examples    1    5   10   20   30   40   60   80  100
looped   .880 .669 .523 .414 .326 .282 .216 .189 .180
standard .875 .672 .521 .411 .320 .280 .208 .183 .170
"""),
}

def is_papers(args):
    """Whether a run's prompts have the paper's size."""
    return (args.n_dims, args.n_points) == (20, SETTINGS[args.task]["n_points"])

def in_words(run):
    """A run's model, as legends and tables call it."""
    args = run.args
    layers = {"standard": f"{args.n_layer} layers", "tied": f"1 layer {args.n_layer} times"}
    words = layers.get(args.model, "looped")
    if args.inject in ("none", "multiply"):
        words += f", inject {args.inject}"
    return words

def show_summary(task, runs):
    """Errors with all examples, and numbers of parameters; on OpenML the paper's errors, too."""
    cells = []
    for run in runs:
        results = run.results
        name = in_words(run)
        if task == "openml":
            name += f", table {results['prompts']}"
        mean, low, high = [curve[-1] for curve in results["curve"]]
        cells += [(name, "error", mean), (name, "90% interval", f"{low:.3f} to {high:.3f}")]
        accuracy = ACCURACY.get(run.args.model, {}).get(results["prompts"])
        if accuracy and is_papers(run.args):
            cells.append((name, "paper", 1 - accuracy))
        cells.append((name, "parameters", results["n_params"], ",.0f"))
        cells.append((name, "of 12 layers'", results["n_params"] / results["n_params_12"], ".1%"))
    for name, ys in runs[0].results["baselines"].items():
        cells.append((name, "error", ys[-1]))
    common.print_table(f"""\
{task}: error with all {runs[0].args.n_points - 1} examples, looped models after --eval-loops loops.
In brackets, here and below: the range over seeds (and tables). 90% interval: of the first seed,
over test prompts.""", cells)

ERRORS = (3e-4, 5)                                           # the range of the axes
# baselines and thin lines, which are in the figure alone
IN_GRAY = dict(color="gray", linestyle="-", linewidth=1, markersize=3)

def by_examples(task, runs):
    """Fig. 3: the error by number of examples: of our models, the paper's, and baselines."""
    curves = []
    for run in runs:
        ys = run.results["curve"][0]
        curves.append((in_words(run), range(len(ys)), ys, {}))
    hollow = dict(marker="o", linestyle="none", fillstyle="none")
    if task in CURVES and is_papers(runs[0].args):
        for name, numbers in CURVES[task].items():
            xs = [int(x) for x in numbers]
            curves.append((f"paper, {name}", xs, list(numbers.values()), hollow))
    # least squares, the first of the baselines, has no marker
    for (name, ys), marker in zip(runs[0].results["baselines"].items(), " ov^s"):
        style = dict(IN_GRAY, marker=marker)
        if name == "least squares":
            style = dict(color="black", linestyle=":")
        curves.append((name, range(len(ys)), ys, style))
    return curves

def by_loops(runs):
    """Fig. 2: the error with all examples by number of loops. A model of one pass is a flat line; a
    vertical line stands at the b loops that another was trained with."""
    n_loops = 10 * max(passes(run.args) for run in runs)
    curves = []
    for run in runs:
        name, b = in_words(run), passes(run.args)
        ys = run.results.get("by_loops", run.results["curve"][0][-1:] * n_loops)
        curves.append((name, range(1, len(ys) + 1), ys, {}))
        if b > 1:
            curves.append((f"trained with {b} loops", [b, b], ERRORS, IN_GRAY))
    return curves

def figures(task, runs):
    """The panels of a task: {title: (settings of the axis, curves)}."""
    error = "fraction of wrong labels" if task == "openml" else "squared error / variance of y"
    axis = dict(xlabel="examples", ylabel=error, yscale="log", ylim=ERRORS)
    panels = {f"{task}, by examples": (axis, by_examples(task, runs))}
    if any(passes(run.args) > 1 for run in runs):
        axis = dict(axis, xlabel="loops", xscale="log")
        panels[f"{task}, all examples"] = axis, by_loops(runs)
    axis = dict(xlabel="loop or layer", ylabel="error of a probe / square of its target")
    for run in runs:
        for target, ys in run.results.get("probe", {}).items():
            _, curves = panels.setdefault(f"{task}, {in_words(run)}", (axis, []))
            curves.append((target, range(len(ys)), ys, {}))
    return panels

def print_curves(title, x_name, curves):
    """A table of about ten points of each curve: one of 200 loops at 1, 20, 40, .., 200.
    Grey curves are only drawn."""
    curves = [curve for curve in curves if curve[3].get("color") != IN_GRAY["color"]]
    shown = {1}
    for _, xs, _, _ in curves:
        step = max(1, len(xs) // 10)
        shown.update(xs[::-1][::step])                                  # from the last x back
    cells = []
    for x in sorted(shown):
        for label, xs, ys, _ in curves:
            if x in xs:
                cells.append((f"{x_name} {x}", label, ys[xs.index(x)]))
    common.print_table(title, cells)

def show_ood(task, runs):
    """App.: errors on out-of-distribution inputs."""
    cells = []
    for run in runs:
        for name, (ours, theirs) in run.results["ood"].items():
            cells += [(name, in_words(run), ours), (name, "least squares", theirs)]
    common.print_table(f"{task}: errors on out-of-distribution inputs", cells)

def verdict(task, runs):
    """Says of each model with several passes whether its answer stays past b of them, and whether
    its error is below 1.3 times that of the models of one pass, and of least squares. Medians over
    seeds, with all examples."""
    at_b, at_10b, others = {}, {}, {}                        # errors of all seeds, by model
    for run in runs:
        name, by_loops = in_words(run), run.results.get("by_loops")
        if by_loops:
            at_b.setdefault(name, []).append(by_loops[passes(run.args) - 1])
            at_10b.setdefault(name, []).append(by_loops[-1])
        else:
            others.setdefault(name, []).append(run.results["curve"][0][-1])
    baselines = runs[0].results["baselines"]
    if "least squares" in baselines:
        others["least squares"] = baselines["least squares"][-1:]
    guess = 0.5 if task == "openml" else 1                   # the error of a coin, or of always 0
    if not at_b:
        print(f"{task}: no looped model here to compare")
    for name in at_b:
        error = statistics.median(at_b[name])
        answer = "its answer stays past the b loops of training"
        if error > 0.9 * guess:
            answer = "it has learned nothing"
        elif statistics.median(at_10b[name]) > 1.3 * error:
            answer = "its answer is lost past the b loops of training"
        print(f"{task}, {name}: {answer}")
        print(f"    error after b: {common.spread(at_b[name])}, after 10 b: "
              f"{common.spread(at_10b[name])}")
        for other, theirs in others.items():
            how = "within" if error < 1.3 * statistics.median(theirs) else "more than"
            print(f"    {how} 1.3 times that of {other}: {common.spread(theirs)}")

def show(runs):
    """Prints the tables of each task and what they show, and draws the curves in one figure."""
    by_task, panels = {}, {}
    for run in runs:
        by_task.setdefault(run.args.task, []).append(run)
    for task, own in by_task.items():
        show_summary(task, own)
        of_task = figures(task, own)
        for title, (axis, curves) in of_task.items():
            print_curves(f"{title}: {axis['ylabel']}", axis["xlabel"], curves)
        if "ood" in own[0].results:
            show_ood(task, own)
        panels |= of_task
    if runs[0].args.plot:
        common.plot(runs[0].folder.parent / "errors.png", panels, columns=2)
    print()
    for task, own in by_task.items():
        verdict(task, own)

# ---- The command --------------------------------------------------------------------------------

COUNTS = {                                                   # flag: default, help
    "--n-layer": (12, "layers of standard and tied"),
    "--n-head": (4, "heads per layer"),
    "--n-embd": (64, "width"),
    "--n-dims": (2, "dimensions d of x"),
    "--dims-start": (2, "dimensions at first; one more every stage"),
    "--n-points": (6, "pairs in a prompt; each y is predicted from the pairs before it"),
    "--points-start": (6, "points at first"),
    "--points-step": (2, "points added at every stage"),
    "--curriculum-every": (700, "steps of a stage"),
    "--loops": (20, "looped: loops b, at the end of the curriculum"),
    "--window": (6, "looped: last loops T, on which the loss is taken"),
    "--loops-every": (60, "looped: two loops are added every so many steps, from T up to b"),
    "--eval-loops": (None, "looped: loops for errors by examples, --ood (default: b; paper: more)"),
    "--steps": (1_100, "training steps"),
    "--batch-size": (256, "prompts per step"),
    "--eval-every": (100, "steps between evaluations"),
    "--n-eval": (1_280, "prompts of each measurement"),
}

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("--task", nargs="+", choices=list(TASKS), default=["linear"], help="function classes")
    add("--model", nargs="+", choices=["looped", "standard", "tied"], default=["looped"],
        help="one layer, looped; n-layer layers; one layer, applied n-layer times")
    add("--inject", nargs="+", choices=["add", "multiply", "none"], default=["add"],
        help="looped: how the prompt enters every loop")
    for flag, (default, help) in COUNTS.items():
        add(flag, type=common.positive_int, default=default, help=help)
    add("--lr", type=common.positive_float, default=8e-3, help="peak learning rate of Adam")
    add("--beta2", type=common.number(float, 0, 0.99999), default=0.98,
        help="of Adam: how slowly it forgets squared gradients")
    add("--warmup", type=common.number(int, 0, 10**9), default=100, help="steps of linear warm-up")
    add("--schedule", choices=["constant", "cosine"], default="cosine",
        help="cosine: falls to 0 along half a cosine")
    add("--ood", action="store_true", help="measure on out-of-distribution inputs")
    add("--probe", action="store_true", help="probe the hidden states for X^T y and w")
    add("--data-dir", default="tables", help="openml: folder of CSVs, label (two classes) last")
    add("--fetch", nargs="*", type=common.positive_int,
        help="openml: ids to download to --data-dir first; without ids, the paper's")
    add("--held-out", nargs="+", type=common.number(int, 0, 10**6), default=[0],
        help="openml: the table to test on, 0 the first in the order of ids")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="of weights and prompts")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile")
    return common.parse_args(parser, PRESETS, argv)

def main(argv=None):
    """The command: trains what the flags ask for, prints the tables, returns the results."""
    args = parse_args(argv)
    if args.fetch is not None and "openml" in args.task:
        for number in args.fetch or ACCURACY["looped"]:
            fetch(number, args.data_dir)
        args.fetch = None                                    # done: no run depends on it
    runs = common.sweep(args, SWEEP, build, resolve, MEASURED)
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
