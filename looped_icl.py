"""
Looped Transformers are Better at Learning Learning Algorithms. Yang, Lee, Nowak, Papailiopoulos. ICLR 2024, arXiv 2311.12424

One transformer block, looped b times with the prompt injected anew at every loop, matches a 12-layer transformer at
regression in context with less than a tenth of its parameters, and it keeps its answer when it is looped far past b: it has
learned an iterative algorithm with a fixed point. Look in the first table for the looped model beside least squares, and in
the second for an error that stays flat from b loops on.

    python looped_icl.py                                                 three dimensions, in minutes
    python looped_icl.py --model looped standard                         beside 12 layers of the same width
    python looped_icl.py --inject none --lr 1e-3                         without it: the answer is lost past b loops

    Fig. 2, error by loops, at its own b:
    python looped_icl.py --preset paper --task linear --loops 30 --plot           b = 30, T = 15
    Fig. 3, error by examples of each task, with the paper's b and T (--loops, --window). The paper
    draws the looped model at 200 to 500 loops, where it has converged: add --eval-loops 200;
    without it, what is shown is b loops.
    python looped_icl.py --preset paper --task linear --model looped standard tied --plot              b = 20, T = 15
    python looped_icl.py --preset paper --task noisy-linear --model looped standard --plot             b = 20, T = 15
    python looped_icl.py --preset paper --task sparse-linear --model looped standard --plot            b = 20, T = 10
    python looped_icl.py --preset paper --task decision-tree --model looped standard --plot            b = 70, T = 15
    python looped_icl.py --preset paper --task relu-2nn --model looped standard --plot                 b = 12, T = 5
    Other inputs than trained on (App.), and what a probe finds in the hidden states by loop or layer (Sec. 6):
    python looped_icl.py --preset paper --task linear --model looped standard --ood --probe
    Tables of OpenML, downloaded by id or a folder of your own, one held out in turn, b = 30, T = 15:
    python looped_icl.py --preset paper --task openml --model looped standard
        --held-out 0 1 2 3 4 5 6 7 8 9 --data-dir tables
        --fetch 720 725 737 803 807 816 819 847 871 42192
"""
import argparse
import csv
import json
import math
import re
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The prompts (after Garg et al. 2022) ---------------------------------------------------------------------------
def label(task, xs, generator):
    """y = f(x) for inputs xs (B, n, d), with a new random f of the task's class for each prompt -> (B, n)."""
    (B, n, d), draw = xs.shape, dict(generator=generator, device=xs.device)
    if task == "decision-tree":                                                  # depth 4: 15 nodes, 16 leaves
        coordinates, leaves = torch.randint(d, (B, 15), **draw), torch.randn(B, 16, **draw)
        node = torch.zeros(B, n, dtype=torch.long, device=xs.device)
        for _ in range(4):
            x = xs.gather(2, coordinates.gather(1, node)[..., None])[..., 0]     # (B, n)
            node = 2 * node + 1 + (x > 0)
        return leaves.gather(1, node - 15)
    if task == "relu-2nn":
        W1, W2 = torch.randn(B, d, 100, **draw), torch.randn(B, 100, 1, **draw)
        return (math.sqrt(2 / 100) * (xs @ W1).relu() @ W2)[..., 0]
    w = torch.randn(B, d, 1, **draw)
    if task == "sparse-linear":                                             # 3 of all d coordinates
        chosen = torch.rand(B, d, **draw).argsort(1)[:, :3]
        w = w * torch.zeros(B, d, device=xs.device).scatter(1, chosen, 1.0)[..., None]
    ys = (xs @ w)[..., 0]
    return ys + 0.1 * torch.randn(B, n, **draw) if task == "noisy-linear" else ys

def sample_prompts(task, batch, n_points, n_dims, generator, active_dims=None, device="cpu"):
    """xs (B, n, d), ys (B, n): x ~ N(0, I) in the first active_dims coordinates, 0 in the others,
    and y = f(x).

    f never knows of active_dims: sparse-linear draws its coordinates among all n_dims. A decision
    tree would branch on zeros, so its x has all dimensions from the start.
    """
    xs = torch.randn(batch, n_points, n_dims, generator=generator, device=device)
    if active_dims is not None and task != "decision-tree":
        xs[..., active_dims:] = 0
    return xs, label(task, xs, generator)

TASKS = ["linear", "noisy-linear", "sparse-linear", "decision-tree", "relu-2nn", "openml"]

def scale(task, n_dims):
    """What squared errors are divided by: the variance of y, for noisy-linear without the noise."""
    return {"decision-tree": 1, "sparse-linear": min(3, n_dims)}.get(task, n_dims)

def read_table(path, n_dims=20, least_rows=1_000, most_rows=10_000):
    """A CSV with a header, the label in the last column -> features (n, n_dims) standardised and padded with zeros in front,
    labels (n,) in 0, 1. ValueError, with row or column, where it is not such a table (OpenML's conditions of the paper)."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header) or "" in (cell.strip() for cell in row) or "?" in row:
            raise ValueError(f"{path}, row {number}: a value is missing")
    if len(rows) < least_rows:
        raise ValueError(f"{path}: {len(rows)} rows are fewer than {least_rows}")
    if len(rows) > most_rows:
        raise ValueError(f"{path}: {len(rows)} rows are more than {most_rows}")
    columns = list(zip(*rows))
    for name, column in zip(header[:-1], columns):
        for number, cell in enumerate(column, 2):
            if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", cell):
                raise ValueError(f"{path}, column {name}, row {number}: {cell!r} is not a number")
    if not 5 <= len(header) - 1 <= n_dims:
        raise ValueError(f"{path}: {len(header) - 1} features are not in 5 .. {n_dims}")
    classes = sorted(set(columns[-1]))
    labels = np.array([classes.index(cell) for cell in columns[-1]])
    if len(classes) != 2 or min(labels.mean(), 1 - labels.mean()) < 1 / 3:
        raise ValueError(f"{path}, column {header[-1]}: not two classes of which one has at least half of the other's rows")
    features = np.array(columns[:-1], dtype=float).T
    features = (features - features.mean(0)) / np.where(features.std(0) > 0, features.std(0), 1)
    return np.pad(features, ((0, 0), (n_dims - features.shape[1], 0))).astype(np.float32), labels

def fetch(number, folder):
    """Downloads the OpenML data set of that id as folder/<id>.csv: its numeric columns, without the
    row's number and what OpenML says to ignore, then its target. OSError where that fails,
    ValueError where it is no dense table with a target."""
    def get(url):
        return urllib.request.urlopen(url, timeout=60).read().decode("utf-8", "replace")
    about = json.loads(get(f"https://www.openml.org/api/v1/json/data/{number}"))["data_set_description"]
    head, data = re.split(r"(?im)^@data.*$", get(about["url"]) + "\n@data", maxsplit=1)
    attributes = re.findall(r"(?im)^@attribute\s+('[^']*'|\"[^\"]*\"|\S+)\s+(\S+)", head)
    names = [name.strip("'\"") for name, _ in attributes]
    lines = [line for line in data.splitlines() if line.strip() and not line.startswith(("%", "@"))]
    rows = list(csv.reader(lines, quotechar="'", skipinitialspace=True))
    if about.get("default_target_attribute") not in names or {len(row) for row in rows} != {len(names)}:
        raise ValueError(f"OpenML {number}: not a dense table with one target")
    target = names.index(about["default_target_attribute"])
    numeric = [i for i, (_, kind) in enumerate(attributes) if kind.lower() in ("numeric", "real", "integer")]
    left_out = {about["default_target_attribute"], about.get("row_id_attribute")}
    ignored = about.get("ignore_attribute") or []                     # one name, or a list of names
    left_out.update([ignored] if isinstance(ignored, str) else ignored)
    keep = [i for i in numeric if names[i] not in left_out] + [target]
    Path(folder).mkdir(parents=True, exist_ok=True)
    part = Path(folder) / f"{number}.part"
    with open(part, "w", newline="") as file:
        csv.writer(file).writerows([row[i] for i in keep] for row in [names, *rows])
    part.rename(part.with_suffix(".csv"))

def table_number(path):
    """What tables are ordered by: 720.csv before 1462.csv, both before names without number."""
    name = path.stem
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)

class Tables:
    """Prompts from real tables, all but the one held out: 41 rows of one table, in random order,
    without repetition.

    The paper's protocol: ten tables of OpenML with two classes, the smaller of at least half the
    larger one's rows, 1,000 to 10,000 rows, at most 20 features, 5 or more of them numeric, nothing
    missing. Numeric features only, standardised by table, zeros in front up to 20. Each table is
    held out in turn: the model is trained on prompts from 95% of the rows of the nine others (5%
    are kept for validation), 100,000 steps of 40 prompts, cross-entropy of two logits, and tested
    on prompts from the tenth. `held_out` counts the folder's tables in the order of their numbers.
    """
    def __init__(self, folder, held_out, device="cpu", **limits):
        self.paths = sorted(Path(folder).glob("*.csv"), key=table_number)
        if not 0 <= held_out < len(self.paths) or len(self.paths) < 2:
            raise ValueError(f"{folder} has {len(self.paths)} tables (*.csv): --held-out {held_out} is none, or leaves none")
        self.name = self.paths[held_out].stem
        order, self.device, self.splits = np.random.default_rng(0), device, dict(train=[], valid=[], test=[])
        for number, path in enumerate(self.paths):
            features, labels = read_table(path, **limits)
            rows = order.permutation(len(labels))
            cut = len(rows) * 95 // 100                                          # 95% to train on, 5% of the same tables
            parts = dict(test=rows) if number == held_out else dict(train=rows[:cut], valid=rows[cut:])
            for part, own in parts.items():
                self.splits[part].append((torch.from_numpy(features[own]).to(device), torch.from_numpy(labels[own]).to(device)))
        self.packed = {}
        for part, tables in self.splits.items():                                 # (tables, rows, ..), short ones padded
            longest = max(len(labels) for _, labels in tables)
            counts = torch.tensor([len(labels) for _, labels in tables], device=device)
            xs = torch.stack([F.pad(features, (0, 0, 0, longest - len(features))) for features, _ in tables])
            self.packed[part] = xs, torch.stack([F.pad(labels, (0, longest - len(labels))) for _, labels in tables]), counts
    def sample(self, batch, n_points, generator, part="train"):
        """xs (B, n, d), ys (B, n) in 0, 1, from random tables of `part`: train, valid, or test (the table held out)."""
        xs, ys, counts = self.packed[part]
        table = torch.randint(len(xs), (batch, 1), generator=generator, device=self.device)              # (B, 1)
        keys = torch.rand(batch, xs.shape[1], generator=generator, device=self.device)
        keys = keys.masked_fill(torch.arange(xs.shape[1], device=self.device) >= counts[table], -1.0)
        rows = keys.topk(n_points, dim=1).indices                                # (B, n), distinct
        return xs[table, rows], ys[table, rows].float()

# ---- The models -----------------------------------------------------------------------------------------------------
class InContextTransformer(nn.Module):
    """A GPT-2 that reads x_1, y_1, x_2, y_2, ... and predicts each y at its x. Looped, its output goes in again.

    Tokens have n_dims numbers, y in the first; positions are 2 n_points + 1, as the authors count
    them (203). inject: how the prompt enters a loop; n_out 2: two logits.
    """
    def __init__(self, n_dims, n_points, n_layer, n_head, n_embd, inject="add", n_out=1):
        super().__init__()
        self.inject = inject
        self.read_in = nn.Linear(n_dims, n_embd)
        self.wpe = nn.Embedding(2 * n_points + 1, n_embd)
        self.h = nn.ModuleList([common.Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        common.gpt2_init_(self.h, n_layer)
        nn.init.normal_(self.wpe.weight, std=0.02)
        self.read_out = nn.Linear(n_embd, n_out)

    def compile(self, **options):
        """torch.compile for one pass through the trunk. The loop stays in Python: its length
        changes in training, and its first passes run without gradient."""
        trunk = type(self).trunk.__get__(self)
        self.trunk = torch.compile(trunk, **options)

    def trunk(self, x, states=None):
        """f: positions, blocks, final norm; (B, T, C) -> (B, T, C). Appends to states what leaves each block."""
        x = x + self.wpe.weight[:x.shape[1]]
        for block in self.h:
            x = block(x)
            if states is not None:
                states.append(x)
        return self.ln_f(x)

    def forward(self, xs, ys, loops=1, window=1, return_states=False):
        """xs (B, n, d), ys (B, n) -> predictions (window, B, n) of the last `window` loops, or logits (window, B, n, 2);
        with return_states also the hidden states after each block, a list of (B, 2n-1, C).

        add: z_0 = 0, z_(i+1) = f(z_i + e), e the prompt. multiply: z_0 = 1, z_(i+1) = f(z_i e).
        With both, the loops before the window run without gradient. none: z_0 = e, z_(i+1) =
        f(z_i), with the gradient through all loops. One loop is an ordinary transformer.
        """
        ys = F.pad(ys[..., None], (0, xs.shape[2] - 1))                          # (B, n, d)
        tokens = torch.stack([xs, ys], 2).flatten(1, 2)                          # (B, 2n, d)
        e = self.read_in(tokens[:, :-1])                             # the last y is never looked at
        if self.inject == "add":
            z = torch.zeros_like(e)
        elif self.inject == "multiply":
            z = torch.ones_like(e)                             # 0 would hide the prompt from loop 1
        else:
            z = e
        # none: the prompt enters at the start alone; a read-in cut off from the loss learns nothing
        first_with_gradient = 0 if self.inject == "none" else loops - window
        predictions, states = [], [] if return_states else None
        for i in range(loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first_with_gradient):
                if self.inject == "add":
                    z = z + e
                elif self.inject == "multiply":
                    z = z * e
                z = self.trunk(z, states)                                        # (B, 2n-1, C)
            if i >= loops - window:
                predictions.append(self.read_out(z[:, ::2]).squeeze(-1))
        predictions = torch.stack(predictions)
        return (predictions, states) if return_states else predictions

# ---- Baselines: what the examples before x_i say of y_i, for all i at once or one i after the other -----------------
def least_squares(xs, ys):
    """Minimum-norm least squares on the pairs before each x: xs (B, n, d), ys (B, n) -> predictions (B, n)."""
    x, y = xs.cpu().double(), ys.cpu().double()                       # not every device has float64
    out = torch.zeros_like(y)
    for i in range(1, ys.shape[1]):
        # rtol: rotated in float32, inputs of a subspace leave it by 1e-8, which is not to be fitted
        w = torch.linalg.pinv(x[:, :i], rtol=1e-5) @ y[:, :i, None]              # (B, d, 1)
        out[:, i] = (x[:, i, None] @ w)[:, 0, 0]
    return out.to(ys)

def averaging(xs, ys):
    """x_i . w with w the mean of x_j y_j over the pairs before, 0 where there are none: (B, n, d), (B, n) -> (B, n)."""
    total = F.pad((xs * ys[..., None]).cumsum(1)[:, :-1], (0, 0, 1, 0))          # (B, n, d)
    return (xs * total).sum(2) / torch.arange(ys.shape[1], device=ys.device).clamp_min(1)

def nearest_neighbors(xs, ys, n=3):
    """Mean y of the n nearest x's before each x (of all, where they are fewer), 0 for the first: -> (B, n_points)."""
    distances = torch.cdist(xs, xs)                                              # (B, i, j)
    later = torch.ones_like(distances[0], dtype=torch.bool).triu()
    nearest = distances.masked_fill(later, math.inf).topk(min(n, xs.shape[1]), largest=False)
    known = nearest.values.isfinite()                                            # (B, i, n)
    near = ys[:, None].expand_as(distances).gather(2, nearest.indices)
    return (near * known).sum(2) / known.sum(2).clamp_min(1)

def lasso(xs, ys, alpha=0.01):
    """The Lasso on the i pairs before each x, all prefixes of all prompts at once: xs (B, n, d),
    ys (B, n) -> predictions (B, n). Warns where the weights that it found are not optimal.

    Minimises |y - X w|^2 / (2 i) + alpha |w|_1, exactly: the minimum is piecewise linear in alpha,
    and is followed from w = 0 down to alpha (LARS, Efron et al. 2004). All coordinates in use
    correlate with the residual as much as `level` says; one joins them where its correlation
    reaches it, and leaves where its weight passes 0. (Coordinate descent is far from the minimum
    after 2,000 sweeps on some prompts with i < d.)
    """
    x, y = xs.cpu().double(), ys.cpu().double()                       # not every device has float64
    B, n, d = x.shape
    # means over the i pairs before each x: X^T X / i and X^T y / i
    i = torch.arange(n).clamp_min(1).view(1, -1, 1)
    gram = (x[..., None] * x[..., None, :]).cumsum(1)[:, :-1]
    gram = F.pad(gram, (0, 0, 0, 0, 1, 0)) / i[..., None]                    # (B, n, d, d)
    target = F.pad((x * y[..., None]).cumsum(1)[:, :-1], (0, 0, 1, 0)) / i   # (B, n, d)
    gram, target = gram.flatten(0, 1), target.flatten(0, 1)                     # (N, d, d), (N, d)

    w = torch.zeros_like(target)
    level, first = target.abs().max(1, keepdim=True)                             # (N, 1)
    in_use = torch.zeros_like(target, dtype=torch.bool).scatter(1, first, level > 0)
    for _ in range(10 * d):
        if (level <= alpha).all():
            break
        correlation = target - (gram @ w[..., None])[..., 0]          # (N, d), +-level where in use
        # lowering the level by s adds s * slope to w; what is not in use keeps its weight of 0
        both = in_use[:, :, None] & in_use[:, None]
        system = torch.where(both, gram, torch.eye(d, dtype=gram.dtype))
        slope, _ = torch.linalg.solve_ex(system, correlation.sign() * in_use)
        fall = (gram @ slope[..., None])[..., 0]                        # of the correlations, per s
        # how far until |correlation - s fall| = level - s, with either sign; until w + s slope = 0
        above = (level - correlation) / (1 - fall)
        below = (level + correlation) / (1 + fall)
        leaves = -w / slope
        # one that just left still has the level's correlation: a distance of 0 does not count
        near = 1e-10 * level
        above = above.masked_fill(in_use | ~(above > near), math.inf)
        below = below.masked_fill(in_use | ~(below > near), math.inf)
        leaves = leaves.masked_fill(~in_use | ~(leaves > near), math.inf)
        s, event = torch.cat([above, below, leaves], 1).min(1, keepdim=True)
        rest = (level - alpha).clamp_min(0)
        w = w + torch.minimum(s, rest) * slope
        level = level - torch.minimum(s, rest)
        changed = F.one_hot(event[:, 0] % d, d).bool() & (s < rest)              # joins or leaves
        in_use = in_use ^ changed
        w = w * in_use

    # optimal: every correlation is alpha sign(w) where w is not 0, and at most alpha elsewhere
    correlation = target - (gram @ w[..., None])[..., 0]
    wrong = (correlation - alpha * w.sign()).abs()
    wrong = torch.where(w != 0, wrong, (correlation.abs() - alpha).clamp_min(0))
    unfinished = ~(wrong.amax(1) < 1e-6 * target.abs().amax().clamp_min(1))
    if unfinished.any():
        warnings.warn(f"Lasso: no minimum found for {unfinished.sum()} of {len(w)} prefixes")
    return (x * w.view(B, n, d)).sum(2).to(ys)

def greedy_tree(xs, ys, depth=4):
    """A regression tree on the signs of x, grown greedily on the pairs before each x: each node splits at the coordinate
    that lowers its squared error most; an empty leaf answers as its parent. -> predictions (B, n)."""
    out, sign = torch.zeros_like(ys), (xs > 0).to(ys.dtype)
    for i in range(1, ys.shape[1]):
        seen, y, query = sign[:, :i], ys[:, :i], sign[:, i]                      # (B, i, d), (B, i), (B, d)
        node, here = torch.zeros_like(y, dtype=torch.long), torch.zeros_like(ys[:, :1], dtype=torch.long)
        out[:, i] = y.mean(1)
        for level in range(depth):
            member = F.one_hot(node, 2**level).to(y.dtype)                       # (B, i, nodes)
            n, s = member.sum(1)[..., None], (member * y[..., None]).sum(1)[..., None]                   # (B, nodes, 1)
            n1, s1 = member.mT @ seen, (member * y[..., None]).mT @ seen         # those right of a split: (B, nodes, d)
            gain = s1**2 / n1.clamp_min(1) + (s - s1)**2 / (n - n1).clamp_min(1)
            split = gain.masked_fill((n1 == 0) | (n1 == n), -1).argmax(2)        # (B, nodes)
            node = 2 * node + seen.gather(2, split.gather(1, node)[..., None])[..., 0].long()
            here = 2 * here + query.gather(1, split.gather(1, here)).long()      # (B, 1)
            mine = (node == here).to(y.dtype)
            out[:, i] = torch.where(mine.sum(1) > 0, (mine * y).sum(1) / mine.sum(1).clamp_min(1), out[:, i])
    return out

@torch.enable_grad()
def gd_network(xs, ys, hidden=100, steps=200, lr=5e-3):
    """A two-layer ReLU network, trained by Adam from scratch on the pairs before each x, one for each prompt. -> (B, n)."""
    out, (B, n, d) = torch.zeros_like(ys), xs.shape
    draw = dict(generator=torch.Generator(xs.device).manual_seed(0), device=xs.device)
    for i in range(1, n):
        W1 = (torch.randn(B, d, hidden, **draw) / math.sqrt(d)).requires_grad_()
        W2 = (torch.randn(B, hidden, 1, **draw) / math.sqrt(hidden)).requires_grad_()
        optimizer = torch.optim.Adam([W1, W2], lr=lr)
        for _ in range(steps):
            loss = ((xs[:, :i] @ W1).relu() @ W2)[..., 0].sub(ys[:, :i]).square().mean(1).sum()
            W1.grad, W2.grad = torch.autograd.grad(loss, [W1, W2])
            optimizer.step()
        out[:, i] = ((xs[:, i:i + 1] @ W1).relu() @ W2)[:, 0, 0].detach()
    return out

BASELINES = {"least squares": (least_squares, TASKS[:5]), "averaging": (averaging, TASKS[:5]),
             "3-NN": (nearest_neighbors, TASKS[:5]), "Lasso": (lasso, ["sparse-linear"]), "greedy tree": (greedy_tree, ["decision-tree"]),
             "2-layer network": (gd_network, ["decision-tree", "relu-2nn"])}

# ---- Training -------------------------------------------------------------------------------------------------------
def build(args):
    """The tables of a run (None but for openml), and its model."""
    tables = Tables(args.data_dir, args.held_out, args.device, n_dims=args.n_dims) if args.task == "openml" else None
    n_layer = args.n_layer if args.model == "standard" else 1
    inject = args.inject if args.model == "looped" else "none"
    n_out = 2 if tables else 1
    shape = args.n_dims, args.n_points, n_layer, args.n_head, args.n_embd
    model = InContextTransformer(*shape, inject, n_out)
    return tables, model.to(args.device)

def final_loops(args):
    """How often the trained model runs through its trunk: tied is its one layer n_layer times."""
    return {"looped": args.loops, "tied": args.n_layer, "standard": 1}[args.model]

def curriculum(args, step):
    """Active dimensions, points and loops at a step: each grows at intervals to its full size."""
    stage = step // args.curriculum_every
    active_dims = min(args.n_dims, args.dims_start + stage)
    if args.task == "decision-tree":
        active_dims = args.n_dims                             # trees use all of them from the start
    n_points = min(args.n_points, args.points_start + args.points_step * stage)
    loops = final_loops(args)
    if args.model == "looped":
        loops = min(loops, args.window + 2 * (step // args.loops_every))
    return active_dims, n_points, loops

def prompts(args, tables, batch, n_points, active_dims, generator, part="train"):
    """A batch of prompts, of tables from `part`: xs (B, n, d), ys (B, n)."""
    if tables:
        return tables.sample(batch, n_points, generator, part)
    return sample_prompts(args.task, batch, n_points, args.n_dims, generator, active_dims, args.device)

def losses(predictions, ys):
    """Squared errors (T, B, n) of predictions (T, B, n), or of logits (T, B, n, 2) the cross-entropies."""
    if predictions.dim() == 3:
        return (predictions - ys).square()
    return -predictions.log_softmax(-1).gather(-1, ys.long().expand(predictions.shape[:-1])[..., None])[..., 0]

def autocast(args):
    """--dtype. Without the cache of weights: a cast made in a loop without gradient would be used
    again by those with one (torch 2.9), and the block would get no gradient."""
    bfloat16 = args.dtype == "bfloat16"
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=bfloat16, cache_enabled=False)

def train(args, run):
    """One run of the sweep; continues from its checkpoint where there is one. Returns its results."""
    tables, model = build(args)
    lr = torch.tensor(0.0, device=args.device)                                   # a tensor: a CUDA graph sees it change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)
    data = torch.Generator(args.device).manual_seed(args.seed)                   # training prompts alone
    start, stage = run.restore(model=model, optimizer=optimizer, data=data), None
    optimizer.param_groups[0]["lr"] = lr
    window = args.window if args.model == "looped" else 1
    def training_step():
        active_dims, n_points, loops = stage
        xs, ys = prompts(args, tables, args.batch_size, n_points, active_dims, data)                     # (B, n, d), (B, n)
        with autocast(args):
            predictions = model(xs, ys, loops, window)                           # (T, B, n)
        loss = losses(predictions.float(), ys).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    for step in run.steps(start, args.steps):
        if stage != curriculum(args, step):
            stage = curriculum(args, step)                                       # new shapes: a new graph
            step_once = common.compile_step(training_step, model, data) if args.compile else training_step
        warm, done = min(1, (step + 1) / max(1, args.warmup)), step / args.steps
        lr.fill_(args.lr * warm * ((1 + math.cos(math.pi * done)) / 2 if args.schedule == "cosine" else 1))
        loss = step_once()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            draw = torch.Generator(args.device).manual_seed(10_000)
            xs, ys = prompts(args, tables, 256, args.n_points, args.n_dims, draw, "valid")
            error = errors(model, args, xs, ys, final_loops(args))[0, :, -1].mean()
            run.log(step + 1, loss=loss.item(), error=error.item(), dims=stage[0], points=stage[1], loops=stage[2])
            run.save(step + 1)
    return measure(model, args, tables)

# ---- Measurement ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def errors(model, args, xs, ys, loops=1, window=1):
    """Of each prompt and point, (window, B, n): the squared error over the task's scale; of tables, 1 where the label is
    wrong, else 0."""
    parts = [model(x, y, loops, window).float() for x, y in zip(xs.split(256), ys.split(256))]
    if args.task == "openml":
        return torch.cat([(part.argmax(-1) != y).float() for part, y in zip(parts, ys.split(256))], 1)
    return torch.cat([(part - y).square() for part, y in zip(parts, ys.split(256))], 1) / scale(args.task, args.n_dims)

def bootstrap(values, n=1_000, level=0.9):
    """Mean over rows of values (N, n_points), and the ends of its bootstrap interval: three lists of n_points."""
    draw = torch.Generator().manual_seed(0)
    values = values.cpu().double()
    picks = torch.stack([torch.randint(len(values), (len(values),), generator=draw).bincount(minlength=len(values))
                         for _ in range(n)])                                     # how often each row is drawn, (n, N)
    means = picks.to(values) @ values / len(values)                              # (n, n_points)
    return [x.tolist() for x in (values.mean(0), means.quantile((1 - level) / 2, 0), means.quantile((1 + level) / 2, 0))]

def shifted_prompts(args, n, generator):
    """Prompts unlike those of training (App.): yields name, xs, ys, and the variance of y, by which
    squared errors are divided: to answer 0 scores 1 on each."""
    d = args.n_dims
    draw = dict(generator=generator, device=args.device)
    usual = scale(args.task, d)
    xs, _ = sample_prompts(args.task, n, args.n_points, d, generator, device=args.device)
    ys = label(args.task, xs, generator)
    yield "as trained", xs, ys, usual

    basis = torch.linalg.qr(torch.randn(n, d, d, **draw)).Q                      # (B, d, d)
    deviation = 1 / torch.arange(1, d + 1, device=args.device)                 # eigenvalues 1 / i^2
    deviation = deviation / deviation.square().mean().sqrt()                     # of trace d
    skewed = xs * deviation @ basis.mT
    yield "skewed covariance", skewed, label(args.task, skewed, generator), usual

    in_prompt = torch.arange(d, device=args.device) < d // 2            # a random half of the space
    split = xs * in_prompt
    split[:, -1] = xs[:, -1] * ~in_prompt                                # the query: the other half
    split = split @ basis.mT
    power = 1 if args.task == "decision-tree" else (d - d // 2) / d        # E|x|^2 / d of the query
    yield "query orthogonal to the prompt", split, label(args.task, split, generator), usual * power

    for factor in (0.5, 2, 3):
        power = 1 if args.task == "decision-tree" else factor**2     # trees see only the signs of x
        ys = label(args.task, factor * xs, generator)
        yield f"x times {factor}", factor * xs, ys, usual * power
    for factor in (0.5, 2, 3):
        ys = factor * label(args.task, xs, generator)
        yield f"y times {factor}", xs, ys, usual * factor**2

    ys = label(args.task, xs, generator)
    noise = torch.randn(ys.shape, **draw)
    noise[:, -1] = 0                                                             # what is scored is the function itself
    yield "label noise of variance 1", xs, ys + noise, usual

@torch.no_grad()
def probe(model, args, loops, n=1_000, ridge=1.0):
    """Sec. 6: what a linear probe reads off the hidden states (at the last x, and their mean) after
    each loop or layer: X^T y / k, and the least-squares w. Relative squared errors on n prompts,
    {name: a list by loop}.

    The probe is fitted in closed form (ridge) on n other prompts; as a control on n prompts that
    all have w = (1, .., 1): another w is then found only if the states hold it.
    """
    draw = torch.Generator(args.device).manual_seed(40_000)
    def states_and_targets(constant):
        xs, ys = sample_prompts("linear", n, args.n_points, args.n_dims, draw, device=args.device)
        if constant:
            ys = xs.sum(2)
        read = []                                           # for each batch, of each loop (250, 2C)
        for x, y in zip(xs.split(250), ys.split(250)):
            _, states = model(x, y, loops, 1, return_states=True)
            read.append([torch.cat([z[:, -1], z.mean(1)], 1).cpu().double() for z in states])
        X, y = xs[:, :-1].cpu().double(), ys[:, :-1, None].cpu().double()
        targets = {"X^T y": (X.mT @ y)[..., 0] / X.shape[1],                     # (N, d)
                   "least squares w": (torch.linalg.pinv(X) @ y)[..., 0]}
        # a last 1, for the probe's bias: (N, 2C + 1) for each loop
        return [F.pad(torch.cat(layer), (0, 1), value=1.0) for layer in zip(*read)], targets
    test_states, test_targets = states_and_targets(constant=False)
    found = {}
    for name, constant in [("", False), (", probe fitted on w = 1", True)]:
        states, targets = states_and_targets(constant)
        for target in targets:
            found[target + name] = []
            for fit, test in zip(states, test_states):
                penalty = ridge * torch.eye(fit.shape[1]).to(fit)
                W = torch.linalg.solve(fit.mT @ fit + penalty, fit.mT @ targets[target])
                missed = (test @ W - test_targets[target]).square().sum()
                found[target + name].append((missed / test_targets[target].square().sum()).item())
    return found

def measure(model, args, tables):
    """Error by number of examples and by loops, baselines, and with --ood and --probe the rest; all as plain numbers."""
    model.eval()
    draw = torch.Generator(args.device).manual_seed(20_000)
    xs, ys = prompts(args, tables, args.n_eval, args.n_points, args.n_dims, draw, "test")
    loops = final_loops(args)
    shown = args.eval_loops if args.model == "looped" and args.eval_loops else loops
    results = {"n_params": sum(p.numel() for p in model.parameters())}
    results["curve"] = bootstrap(errors(model, args, xs, ys, shown)[0])
    results["curve_loops"] = shown
    results["baselines"] = {}
    for name, (function, tasks) in BASELINES.items():
        if args.task in tasks:
            squares = (function(xs, ys) - ys).square()                           # (B, n)
            results["baselines"][name] = bootstrap(squares / scale(args.task, args.n_dims))
    if args.model == "looped":
        by_loops = errors(model, args, xs, ys, 10 * loops, 10 * loops)           # (10 b, B, n)
        results["by_loops"] = by_loops[..., -1].mean(1).tolist()
    if tables:
        results["table"] = tables.name
    if args.ood and not tables:
        results["ood"] = {}
        for name, xs, ys, divisor in shifted_prompts(args, args.n_eval, draw):
            ours = errors(model, args, xs, ys, shown)[0, :, -1] * scale(args.task, args.n_dims)
            theirs = (least_squares(xs, ys) - ys)[:, -1].square()
            results["ood"][name] = [(x.mean() / divisor).item() for x in (ours, theirs)]
    if args.probe and not tables:
        results["probe"] = probe(model, args, loops)
    return results

# ---- The command, its tables and its figures ------------------------------------------------------------------------
by_task = lambda *values: dict(zip(TASKS, values))       # linear, noisy-linear, sparse-linear, decision-tree, relu-2nn, openml
PRESETS = {
    "quick": dict(task=["linear"], model=["looped"], inject=["add"], held_out=[0], n_dims=3, n_points=8, n_embd=64, n_head=4,
                  loops=8, window=6, steps=2_500, batch_size=64, lr=3e-3, warmup=200, schedule="cosine", dims_start=1,
                  points_start=8, points_step=2, curriculum_every=400, loops_every=100, eval_every=250),
    "paper": dict(task=["linear"], model=["looped"], inject=["add"], held_out=[0], n_dims=20, n_embd=256, n_head=8,
                  n_points=by_task(41, 41, 41, 101, 101, 41), loops=by_task(20, 20, 20, 70, 12, 30),
                  window=by_task(15, 15, 10, 15, 5, 15), steps=by_task(*[500_000] * 5, 100_000), lr=1e-4, warmup=0,
                  schedule="constant", batch_size=by_task(*[64] * 5, 40), dims_start=by_task(*[5] * 5, 20),
                  points_start=by_task(11, 11, 11, 26, 26, 41), points_step=by_task(2, 2, 2, 5, 5, 2),
                  curriculum_every=5_000, loops_every=500, eval_every=2_500),
}
SWEEP = ["task", "model", "inject", "held_out", "seed"]
# The paper's accuracy on each table of OpenML, held out. It numbers them 0 .. 9: the ids in their
# order are our reading, and that the last is 42192 a guess from its about 5,270 rows.
PUBLISHED = {
    "720": dict(standard=.627, looped=.662),
    "725": dict(standard=.511, looped=.504),
    "737": dict(standard=.656, looped=.721),
    "803": dict(standard=.395, looped=.401),
    "807": dict(standard=.406, looped=.416),
    "816": dict(standard=.463, looped=.462),
    "819": dict(standard=.483, looped=.568),
    "847": dict(standard=.668, looped=.757),
    "871": dict(standard=.533, looped=.510),
    "42192": dict(standard=.650, looped=.648),
}

def parse_args(argv=None):
    """The command line. What cannot be run ends here, before anything is written."""
    parser = argparse.ArgumentParser(
        description="Looped Transformers are Better at Learning Learning Algorithms, Yang et al., ICLR 2024",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, count = parser.add_argument, common.positive_int
    add("--task", nargs="+", choices=TASKS, help="function classes")
    add("--model", nargs="+", choices=["looped", "standard", "tied"], help="one layer looped; layers; layers of one block")
    add("--inject", nargs="+", choices=["add", "multiply", "none"], help="how the prompt enters each loop")
    add("--n-layer", type=count, default=12, help="layers of standard and tied")
    add("--n-head", type=count, help="heads a layer")
    add("--n-embd", type=count, help="width")
    add("--n-dims", type=count, help="dimensions d of x")
    add("--n-points", type=count, help="pairs in a prompt; the last is predicted from the others")
    add("--loops", type=count, help="b: loops, at the end of the curriculum")
    add("--window", type=count, help="T: last loops, on which the loss is taken")
    add("--loops-every", type=count, help="steps until two loops are added, from T up to b")
    add("--dims-start", type=count, help="dimensions at first; one more at every stage")
    add("--points-start", type=count, help="points at first")
    add("--points-step", type=count, help="points added at every stage")
    add("--curriculum-every", type=count, help="steps of a stage")
    add("--steps", type=count, help="training steps")
    add("--batch-size", type=count, help="prompts a step")
    add("--lr", type=float, help="peak learning rate of Adam")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--schedule", choices=["constant", "cosine"], help="the learning rate afterwards; cosine ends at 0")
    add("--n-eval", type=count, default=1_280, help="prompts of each measurement")
    add("--eval-loops", type=count, help="looped: loops of errors by examples and of --ood, else b")
    add("--ood", action="store_true", help="measure on other inputs than trained on")
    add("--probe", action="store_true", help="probe the hidden states for X^T y and w")
    add("--data-dir", default="tables", help="openml: a folder of tables, CSVs with the label (two classes) in the last column")
    add("--fetch", nargs="+", type=count, default=[], help="openml: ids of data sets to download there first")
    add("--held-out", nargs="+", type=int, help="openml: number of the table to test on, by file name")
    add("--seed", nargs="+", type=int, default=[0], help="seeds of weights and prompts")
    args = common.parse_args(parser, PRESETS, argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}")
    if args.eval_loops and "looped" not in args.model:
        parser.error("--eval-loops is for --model looped")
    for task in args.task:
        own = {key: value[task] if isinstance(value, dict) else value for key, value in vars(args).items()}
        if own["window"] > own["loops"]:
            parser.error(f"--window {own['window']} is larger than --loops {own['loops']}")
        if own["dims_start"] > own["n_dims"] or own["points_start"] > own["n_points"]:
            parser.error(f"the curriculum starts with {own['dims_start']} dimensions and {own['points_start']} points, above "
                         f"--n-dims {own['n_dims']} or --n-points {own['n_points']}: lower --dims-start or --points-start")
        if task == "openml":
            try:
                for number in args.fetch:
                    if not (Path(args.data_dir) / f"{number}.csv").exists():
                        fetch(number, args.data_dir)
                for held_out in args.held_out:
                    Tables(args.data_dir, held_out, n_dims=own["n_dims"])
            except (OSError, ValueError) as error:
                parser.error(f"{error}")
    return args

def print_results(runs, results):
    """Error by number of examples and by loops, median [range] over seeds, with the baselines; what --ood and --probe found."""
    def table(title, corner, columns, rows):                                     # columns: a list of numbers for each seed
        print(f"\n{title}")
        common.print_table([corner, *columns], [[str(name), *(common.spread([numbers[i] for numbers in column])
                                                              for column in columns.values())] for name, i in rows.items()])
    for task in dict.fromkeys(run.args.task for run in runs):
        own, seeds = [(run, result) for run, result in zip(runs, results) if run.args.task == task], {}
        for run, result in own:
            a = run.args
            name = a.model + f" {a.inject}" * (a.inject != "add") + f" {a.held_out}" * (task == "openml")
            seeds.setdefault(name, []).append(result)
        curves = {name: [result["curve"] for result in group] for name, group in seeds.items()}
        curves |= {name: [curve] for name, curve in own[0][1]["baselines"].items()}
        curves = {name: [[*mean, low[-1], high[-1]] for mean, low, high in column] for name, column in curves.items()}
        shown = {i: i for i in [*range(0, a.n_points - 1, max(1, a.n_points // 10)), a.n_points - 1]}
        what = "share of wrong labels in the table held out" if task == "openml" else "squared error, normalised,"
        title = f"{task}: {what} by number of examples"
        for run, result in own:
            looped = f" (looped: {result['curve_loops']} loops)"
            if run.args.model == "looped" and looped not in title:
                title += looped
        table(title, "examples", curves, shown | {"90% from": -2, "to": -1})
        print("90%: over test prompts alone, of the last line; training seeds vary more")
        if task == "openml":
            print("\nAccuracy with all examples on the table held out; the paper's on that table")
            rows = []
            for run, result in own:
                accuracy = 1 - result["curve"][0][-1]
                published = PUBLISHED.get(result["table"], {}).get(run.args.model, "-")
                rows.append([run.name, result["table"], f"{accuracy:.3f}", str(published)])
            common.print_table(["run", "table", "ours", "paper"], rows)
        looped = {name: [result["by_loops"] for result in group] for name, group in seeds.items() if "by_loops" in group[0]}
        if looped:
            b = a.loops
            counts = {1, max(1, b // 4), max(1, b // 2), b, *(k * b for k in (2, 3, 5, 7, 10))}
            table(f"{task}: after the last example, by number of loops; trained with {b}", "loops", looped,
                  {n: n - 1 for n in sorted(counts)})
        for key, title in [("ood", "normalised error on other inputs, and that of least squares"),
                           ("probe", "relative error of the probe, by loop or layer")]:
            for run, result in ((run, result) for run, result in own if key in result):
                print(f"\n{run.name}: {title}")
                for name, values in result[key].items():
                    print(f"{name:>38}  " + " ".join(f"{x:.3f}" for x in values))
    print("\nParameters:")
    for (task, model), (a, result) in {(run.args.task, run.args.model): (run.args, result) for run, result in zip(runs, results)}.items():
        with torch.device("meta"):
            deep = InContextTransformer(a.n_dims, a.n_points, 12, a.n_head, a.n_embd, n_out=2 if task == "openml" else 1)
        deep = sum(p.numel() for p in deep.parameters())
        print(f"{task}, {model}: {result['n_params']:,}, {result['n_params'] / deep:.1%} of the {deep:,} of 12 layers")

def plot(runs, results, folder):
    """Fig. 3, error by examples, and Fig. 2, error by loops, with 90% intervals; probes by loop."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    probed = any("probe" in result for result in results)
    figure, axes = plt.subplots(1, 2 + probed, figsize=(9 + 5 * probed, 4))
    lines = {}
    for run, result in zip(runs, results):
        looped = f", {result['curve_loops']} loops" if run.args.model == "looped" else ""
        lines[run.name + looped] = result["curve"]
    lines |= results[0]["baselines"]
    for name, (mean, low, high) in lines.items():
        axes[0].plot(range(len(mean)), mean, label=name)
        axes[0].fill_between(range(len(mean)), low, high, alpha=0.2)
    axes[0].set(title=runs[0].args.task, xlabel="examples", ylabel="error", ylim=(0, 1.5))
    for run, result in zip(runs, results):
        if "by_loops" in result:
            axes[1].semilogy(range(1, len(result["by_loops"]) + 1), result["by_loops"], label=run.name)
            axes[1].axvline(run.args.loops, color="gray", linestyle=":")
        for name, values in result.get("probe", {}).items():
            axes[2].plot(range(1, len(values) + 1), values, label=f"{run.args.model}: {name}")
    axes[1].set(title="dotted: the loops trained with", xlabel="loops", ylabel="error with all examples")
    if probed:
        axes[2].set(title="probes", xlabel="loop or layer", ylabel="relative error", ylim=(0, 1.2))
    for axis in axes:
        axis.legend(fontsize=6) if axis.get_legend_handles_labels()[0] else None
    figure.tight_layout()
    figure.savefig(folder / f"{runs[0].args.task}.png", dpi=130)
    print(f"figure: {folder / runs[0].args.task}.png")

def main():
    """Trains what the flags ask for, prints the tables."""
    args = parse_args()
    runs = common.sweep(args, PRESETS, SWEEP)
    results = common.complete(runs, train)
    print_results(runs, results)
    for task in args.task if args.plot else []:
        own = [(run, result) for run, result in zip(runs, results) if run.args.task == task]
        plot(*zip(*own), Path(args.out_dir) / "looped_icl")

if __name__ == "__main__":
    main()
