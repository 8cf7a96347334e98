"""looped_icl.py: function classes and baselines against plain NumPy, what a loop and a window are, tables, the command."""
import csv
import io
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import looped_icl
from looped_icl import (InContextTransformer, Prompts, Tables, averaging, gd_network, lasso, least_squares,
                        nearest_neighbors, sample_prompts)
from test_common import generator, metrics_of, numpy_block, numpy_norm, refused

SCRIPT = Path(looped_icl.__file__)
FUNCTIONS = [name for name in looped_icl.TASKS if name != "openml"]
SMALL = ["--device", "cpu", "--n-dims", "3", "--n-points", "6", "--points-start", "4", "--n-embd", "16", "--n-head", "2",
         "--curriculum-every", "10", "--batch-size", "8", "--steps", "60", "--eval-every", "10", "--n-eval", "20"]
LOOPED = ["--loops", "4", "--window", "2", "--loops-every", "10"]
LAYERS = ["--n-layer", "2"]
TINY = [*SMALL, *LOOPED]                                                         # the looped model alone
BOTH = [*SMALL, *LOOPED, *LAYERS, "--model", "looped", "standard"]


def call_main(*flags):
    """The results of the command."""
    return looped_icl.main(["--device", "cpu", *map(str, flags)])


def runs_of(*flags):
    """The runs that the flags ask for."""
    args = looped_icl.parse_args(["--device", "cpu", "--out-dir", "nowhere", *flags])
    return common.sweep(args, looped_icl.SWEEP, looped_icl.build, looped_icl.resolve, looped_icl.MEASURED)


def settings(*flags):
    """The settings of the one run that the flags ask for."""
    run, = runs_of(*flags)
    return run.args


# ---- The prompts ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", FUNCTIONS)
def test_prompts_have_the_variance_that_errors_are_divided_by(task):
    xs, ys = sample_prompts(task, 4_000, 12, 6, generator())
    assert xs.shape == (4_000, 12, 6) and ys.shape == (4_000, 12)
    assert abs(xs.mean()) < 0.02 and abs(xs.var() - 1) < 0.02
    assert ys.var().item() == pytest.approx(Prompts(task, 6).scale + (0.01 if task == "noisy-linear" else 0), rel=0.1)
    xs, ys = sample_prompts(task, 50, 12, 6, generator(), active_dims=4)
    assert torch.equal(ys, sample_prompts(task, 50, 12, 6, generator(), 4)[1])
    assert xs[..., :4].all() and (xs[..., 4:].all() if task == "decision-tree" else not xs[..., 4:].any())


def test_the_function_does_not_know_of_the_active_dimensions():
    # sparse-linear: 3 of all 9 coordinates, so that with 3 active ones many prompts have fewer or none
    xs, ys = sample_prompts("sparse-linear", 2_000, 12, 9, generator(), active_dims=3)
    w = torch.linalg.lstsq(xs[..., :3], ys[..., None]).solution[..., 0]
    n_chosen = (w.abs() > 1e-4).sum(1).bincount(minlength=4) / 2_000
    expected = torch.tensor([math.comb(3, k) * math.comb(6, 3 - k) / math.comb(9, 3) for k in range(4)])
    torch.testing.assert_close(n_chosen, expected, atol=0.04, rtol=0)
    # decision-tree: the same prompts, whatever the curriculum says
    early, late = (sample_prompts("decision-tree", 50, 12, 9, generator(), active) for active in (3, 9))
    assert torch.equal(early[0], late[0]) and torch.equal(early[1], late[1])


def test_linear_classes_are_linear():
    for task, d in [("linear", 5), ("sparse-linear", 9)]:
        xs, ys = sample_prompts(task, 100, 30, d, generator())
        w = np.stack([np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(xs.double().numpy(), ys.double().numpy())])
        assert np.abs(np.einsum("bnd,bd->bn", xs.numpy(), w) - ys.numpy()).max() < 1e-4
        assert set((np.abs(w) > 1e-4).sum(1)) == {3 if task == "sparse-linear" else d}
        if task == "sparse-linear":
            assert (np.abs(w) > 1e-4).sum(0).min() > 10                          # every coordinate has its turn
    xs, ys = sample_prompts("noisy-linear", 200, 40, 3, generator())
    residual = [y - x @ np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(xs.numpy(), ys.numpy())]
    assert np.sqrt(np.sum(np.square(residual)) / 200 / 37) == pytest.approx(0.1, rel=0.05)


def test_trees_and_networks_against_plain_recursion():
    xs = torch.randn(50, 20, 7, generator=generator(1))
    ys, again = looped_icl.decision_tree(xs, generator()), generator()
    coordinates = torch.randint(7, (50, 15), generator=again).tolist()
    leaves = torch.randn(50, 16, generator=again).tolist()

    def walk(x, coordinates, leaves, node=0, depth=0):
        if depth == 4:
            return leaves[node - 15]
        return walk(x, coordinates, leaves, 2 * node + (2 if x[coordinates[node]] > 0 else 1), depth + 1)
    for b in range(50):
        assert ys[b].tolist() == [walk(x, coordinates[b], leaves[b]) for x in xs[b].tolist()]

    ys, again = looped_icl.relu_2nn(xs, generator()), generator()
    W1, W2 = torch.randn(50, 7, 100, generator=again).double().numpy(), torch.randn(50, 100, 1, generator=again).double().numpy()
    expected = [math.sqrt(0.02) * np.maximum(x @ w1, 0) @ w2 for x, w1, w2 in zip(xs.double().numpy(), W1, W2)]
    np.testing.assert_allclose(ys, np.stack(expected)[..., 0], rtol=1e-3, atol=1e-3)


# ---- The model --------------------------------------------------------------------------------------------------------

def test_parameter_counts_at_the_papers_sizes():
    count = lambda *args, **kw: sum(p.numel() for p in InContextTransformer(*args, **kw).parameters())
    assert count(20, 101, 1, 8, 256) == 847_873 and count(20, 101, 12, 8, 256) == 9_535_233
    tied = settings("--preset", "paper", "--task", "relu-2nn", "--model", "tied")
    assert sum(p.numel() for p in looped_icl.build(tied)[1].parameters()) == 847_873
    # 41 points need 83 positions: 120 x 256 parameters fewer
    assert count(20, 41, 1, 8, 256) == 847_873 - 120 * 256
    n_points, d, L, C = 7, 3, 2, 16
    assert count(d, n_points, L, 4, C) == (d + 1) * C + (2 * n_points + 1) * C + L * (12 * C**2 + 13 * C) + 2 * C + C + 1


@pytest.mark.parametrize("inject", ["add", "multiply", "none"])
def test_forward_agrees_with_numpy(inject, loops=3):
    torch.manual_seed(0)
    model = InContextTransformer(3, 5, 2, 2, 12, inject).double()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    xs, ys = torch.randn(2, 5, 3).double(), torch.randn(2, 5).double()
    predictions = model(xs, ys, loops, loops).detach()
    assert predictions.shape == (loops, 2, 5)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for b in range(2):
        tokens = []
        for x, y in zip(xs[b].tolist(), ys[b].tolist()):
            tokens += [x, [y, 0, 0]]
        e = np.array(tokens) @ weights["read_in.weight"].T + weights["read_in.bias"]
        z = {"add": 0 * e, "multiply": 1 + 0 * e, "none": e}[inject]
        for i in range(loops):
            z = {"add": z + e, "multiply": z * e, "none": z}[inject] + weights["wpe.weight"][:10]
            for block in model.h:
                z = numpy_block(block, z)[0]
            z = numpy_norm(z, model.ln_f)
            expected = z[::2] @ weights["read_out.weight"][0] + weights["read_out.bias"]
            np.testing.assert_allclose(predictions[i, b], expected, atol=1e-8)


def test_tied_is_the_whole_trunk_of_one_layer_applied_n_layer_times():
    args = settings(*SMALL, "--model", "tied", "--n-layer", "4", "--n-embd", "64")
    torch.manual_seed(0)
    model = looped_icl.build(args)[1]
    # the initialisation of one layer: N(0, 0.02 / sqrt(2)) for what writes to the residual stream
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2), rel=0.05)
    assert looped_icl.passes(args) == looped_icl.curriculum(args, 0)[2] == 4
    xs, ys = sample_prompts("linear", 2, 6, 3, generator())
    z = model.read_in(torch.stack([xs, F.pad(ys[..., None], (0, 2))], 2).flatten(1, 2)[:, :-1])
    for _ in range(4):
        z = F.layer_norm(model.h[0](z + model.wpe.weight[:11]), (64,), model.ln_f.weight, model.ln_f.bias)
    expected = model.read_out(z[:, ::2])[..., 0]
    ours = model(xs, ys, 4, 1)
    assert len(ours) == 1
    torch.testing.assert_close(ours[0], expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), parameters),             # through all four
                               torch.autograd.grad(expected.square().sum(), parameters))


@pytest.mark.parametrize("model", [InContextTransformer(3, 6, 1, 2, 16), InContextTransformer(3, 6, 3, 2, 16, "none")])
def test_a_prediction_sees_neither_its_label_nor_later_pairs(model):
    xs, ys = sample_prompts("linear", 4, 6, 3, generator())
    before = model(xs, ys, 3, 3)
    for i in range(6):
        other_xs, other_ys = xs.clone(), ys.clone()
        other_ys[:, i:] += 1
        other_xs[:, i + 1:] -= 1
        after = model(other_xs, other_ys, 3, 3)
        torch.testing.assert_close(after[:, :, :i + 1], before[:, :, :i + 1])
        assert i == 5 or (after[:, :, i + 1:] != before[:, :, i + 1:]).all()
    fewer = model(xs[:, :4], ys[:, :4], 3, 3)
    torch.testing.assert_close(fewer, before[:, :, :4])


def cut_by_hand(model, monkeypatch):
    """From now on no gradient passes the model's third loop. Returns a list that grows with each loop."""
    trunk, calls = model.trunk, []

    def cut(x):
        calls.append(1)
        z = trunk(x)
        return z.detach() if len(calls) == 3 else z
    monkeypatch.setattr(model, "trunk", cut)
    return calls


@pytest.mark.parametrize("inject", ["add", "multiply", "none"])
def test_loops_and_windows(inject, monkeypatch):
    model = InContextTransformer(3, 6, 1, 2, 16, inject)
    xs, ys = sample_prompts("linear", 4, 6, 3, generator())
    whole = model(xs, ys, 7, 7)
    for loops in range(1, 8):
        torch.testing.assert_close(model(xs, ys, loops, 1)[0], whole[loops - 1])
    torch.testing.assert_close(model(xs, ys, 7, 3), whole[4:])

    parameters = [model.h[0].mlp.c_fc.weight, model.read_in.weight]

    def gradient(predictions):
        return torch.autograd.grad(predictions.square().sum(), parameters)
    with_window, through_all = gradient(model(xs, ys, 5, 2)), gradient(model(xs, ys, 5, 5)[3:])
    if inject == "none":                                         # e has no other way in than loop 1
        torch.testing.assert_close(with_window, through_all)
        assert with_window[1].abs().max() > 0
        return
    cut_by_hand(model, monkeypatch)
    torch.testing.assert_close(with_window, gradient(model(xs, ys, 5, 5)[3:]))
    assert not torch.allclose(with_window[0], through_all[0])


def test_autocast_leaves_a_window_its_gradient(monkeypatch):
    args = settings(*TINY, "--dtype", "bfloat16")
    model = InContextTransformer(3, 6, 1, 2, 16)
    xs, ys = sample_prompts("linear", 4, 6, 3, generator())

    def gradients():
        with looped_icl.autocast(args):
            assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
            predictions = model(xs, ys, 5, 2)
        model.zero_grad()
        predictions.float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}
    ours = gradients()
    # the same loop without no_grad, cut by hand before the window
    calls = cut_by_hand(model, monkeypatch)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda enabled: nullcontext())
    expected = gradients()
    assert len(calls) == 5 and set(ours) == set(expected)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
        assert gradient.abs().max() > 0, name


def test_compiled_training_follows_the_curriculum(tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):                                # dynamo traces, nothing is generated
        graphs.append(graph)
        return graph.forward
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend=backend, **options))
    torch._dynamo.reset()
    flags = [*TINY, "--steps", "30", "--loops", "6", "--out-dir", tmp_path]     # 2 .. 6 loops, 4 .. 6 points
    plain, = call_main(*flags)
    compiled, = call_main("--compile", *flags, "--out-dir", tmp_path / "compiled")
    plain, compiled = metrics_of(plain["folder"]), metrics_of(compiled["folder"])
    assert [line["loops"] for line in compiled] == [2, 4, 6]
    for ours, expected in zip(compiled, plain):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert 1 <= len(graphs) <= 6                  # one trunk with and without gradient, not by loop


# ---- Baselines --------------------------------------------------------------------------------------------------------

def test_least_squares_averaging_and_neighbours_agree_with_numpy():
    xs, ys = sample_prompts("relu-2nn", 20, 15, 6, generator())                  # not linear: no baseline is exact
    for b in range(20):
        x, y = xs[b].double().numpy(), ys[b].double().numpy()
        for i in range(15):
            w = np.linalg.lstsq(x[:i], y[:i], rcond=None)[0] if i else np.zeros(6)   # minimum norm below 6 pairs
            assert least_squares(xs, ys)[b, i].item() == pytest.approx(x[i] @ w, abs=1e-3) if b == 0 or i == 3 else True
            mean = (x[:i] * y[:i, None]).mean(0) if i else np.zeros(6)
            assert averaging(xs, ys)[b, i].item() == pytest.approx(x[i] @ mean, abs=1e-4)
            nearest = np.argsort(((x[:i] - x[i]) ** 2).sum(1))[:3]
            assert nearest_neighbors(xs, ys)[b, i].item() == pytest.approx(y[nearest].mean() if i else 0, abs=1e-5)


def test_least_squares_ignores_what_rounding_adds_to_a_subspace():
    for name, xs, ys, _ in looped_icl.shifted_prompts(Prompts("linear", 6), 8, 15, generator()):
        ours = least_squares(xs, ys)
        for b in range(8):
            x, y = xs[b].double().numpy(), ys[b].double().numpy()
            for i in range(1, 15):
                w = np.linalg.lstsq(x[:i], y[:i], rcond=1e-5)[0]
                assert ours[b, i].item() == pytest.approx(x[i] @ w, abs=1e-3), (name, b, i)
        if "orthogonal" in name:
            assert ours[:, -1].abs().max() < 1e-3             # the prompt says nothing of the query


def test_lasso_is_optimal_on_every_prefix():
    alpha, d, B = 0.01, 20, 3
    xs, ys = (x.double() for x in sample_prompts("sparse-linear", B, 24, d, generator(20_000)))
    unit = torch.eye(d).double().repeat(B, 1)[:, None]                           # (B d, 1, d)
    for i in (1, 3, 7, 12, 20):
        # predictions are x . w: ask at the unit vectors for w itself
        asked = torch.cat([xs[:, :i].repeat_interleave(d, 0), unit], 1)
        w = lasso(asked, F.pad(ys[:, :i].repeat_interleave(d, 0), (0, 1)), alpha)[:, -1].view(B, d)
        residual = ys[:, :i] - (xs[:, :i] @ w[..., None])[..., 0]
        correlation = (xs[:, :i] * residual[..., None]).mean(1)
        assert correlation.abs().max() < alpha + 2e-4
        torch.testing.assert_close(correlation[w != 0], alpha * w[w != 0].sign(), atol=2e-4, rtol=0)
        assert (w != 0).any() and not (w != 0).all()


def test_lasso_against_plain_coordinate_descent():
    # dense weights and noise: on the way to alpha coordinates leave that had joined
    xs, ys = sample_prompts("noisy-linear", 3, 12, 5, generator(1))
    ours = lasso(xs, ys, 0.3)
    for b in range(3):
        x, y = xs[b].double().numpy(), ys[b].double().numpy()
        for i in range(6, 12):                                           # with fewer it is too slow
            w = np.zeros(5)
            for j in list(range(5)) * 300:
                rest = x[:i, j] @ (y[:i] - x[:i] @ w + x[:i, j] * w[j]) / i
                w[j] = np.sign(rest) * max(abs(rest) - 0.3, 0) / np.mean(x[:i, j] ** 2)
            assert ours[b, i].item() == pytest.approx(x[i] @ w, abs=1e-3), (b, i)


@pytest.mark.parametrize("on", ["values", "signs"])
def test_trees_agree_with_plain_ones(on):
    xs, ys = sample_prompts("decision-tree", 10, 30, 4, generator())
    ys = (4 * ys).round()                                    # sums are exact, and so are ties
    depth = {"values": 2, "signs": 3}[on]
    ours = {"values": looped_icl.value_tree, "signs": looped_icl.sign_tree}[on](xs, ys, depth)
    xs = xs.numpy() if on == "values" else (xs > 0).float().numpy()

    def plain(x, y, query, depth):
        """The mean y of the leaf that the query falls into."""
        best, split = None, None
        for j in range(4):
            values = np.unique(x[:, j])
            for threshold in (values[1:] + values[:-1]) / 2:
                sides = y[x[:, j] <= threshold], y[x[:, j] > threshold]
                gain = sum(side.sum()**2 / np.float32(len(side)) for side in sides)
                if best is None or gain > best:
                    best, split = gain, (j, threshold)
        if depth == 0 or split is None:
            return y.mean()
        j, threshold = split
        side = (x[:, j] > threshold) == (query[j] > threshold)
        return plain(x[side], y[side], query, depth - 1)
    for b in range(10):
        x, y = xs[b], ys[b].numpy()
        assert ours[b, 0] == 0
        for i in range(1, 30):
            assert ours[b, i].item() == pytest.approx(plain(x[:i], y[:i], x[i], depth), abs=1e-5), (b, i)


def test_the_networks_of_all_prompts_are_trained_as_one_would_be(monkeypatch):
    xs, ys = sample_prompts("relu-2nn", 3, 15, 2, generator())
    drawn, rand = [], torch.rand

    def watched(*shape, generator, device):
        drawn.append(rand(*shape, generator=generator))
        return drawn[-1]
    monkeypatch.setattr(torch, "rand", watched)
    ours = gd_network(xs, ys, hidden=5, steps=40)
    monkeypatch.undo()
    assert not ours[:, 0].any()
    draw, place = generator(0), 0
    for i in range(1, 15):
        networks = []
        for b in range(3):
            network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
            networks.append(network)
            for p, numbers in zip([network[0].weight, network[0].bias, network[2].weight, network[2].bias], drawn[place:]):
                n_in = 2 if p.shape[0] == 5 else 5
                p.data = ((2 * numbers[b] - 1) / math.sqrt(n_in)).mT.reshape(p.shape)       # torch's nn.Linear
        for numbers in drawn[place:place + 4]:
            rand(numbers.shape, generator=draw)
        place += 4
        optimizers = [torch.optim.Adam(network.parameters(), lr=5e-3) for network in networks]
        for _ in range(40):
            rows = torch.randperm(i, generator=draw)[:10]
            for b, (network, optimizer) in enumerate(zip(networks, optimizers)):
                optimizer.zero_grad()
                F.mse_loss(network(xs[b, rows])[:, 0], ys[b, rows]).backward()
                optimizer.step()
        for b, network in enumerate(networks):
            assert network(xs[b, i])[0].item() == pytest.approx(ours[b, i].item(), abs=1e-4), (b, i)


# ---- Measurement ------------------------------------------------------------------------------------------------------

def test_bootstrap_intervals_cover_as_they_should():
    mean, low, high = looped_icl.bootstrap(torch.randn(2_000, 300, generator=generator()))
    assert 0.84 < np.mean([l < 0 < h for l, h in zip(low, high)]) < 0.96         # 90% of intervals hold the true mean
    assert np.mean([h - l for l, h in zip(low, high)]) == pytest.approx(2 * 1.645 / math.sqrt(2_000), rel=0.05)
    assert np.abs(mean).max() < 5 / math.sqrt(2_000)


def test_other_inputs_are_what_their_names_say():
    task = Prompts("linear", 4)
    found = {name: (xs, ys, variance) for name, xs, ys, variance in looped_icl.shifted_prompts(task, 200, 30, generator())}
    xs = found["skewed covariance"][0]
    spectrum = torch.linalg.eigvalsh((xs.mT @ xs / 30)).mean(0).flip(0)          # (4,)
    assert spectrum.sum().item() == pytest.approx(4, rel=0.05) and spectrum[0] / spectrum.sum() > 0.6
    xs, ys, _ = found["query orthogonal to prompt"]
    assert (xs[:, :-1] @ xs[:, -1, :, None]).abs().max() < 1e-4 and torch.linalg.matrix_rank(xs[:, :-1], atol=1e-3).eq(2).all()
    for factor in (0.5, 2, 3):
        assert found[f"x times {factor}"][0].std().item() == pytest.approx(factor, rel=0.03)
        xs, ys, divisor = found[f"y times {factor}"]
        assert (ys.square().mean() / divisor).item() == pytest.approx(1, rel=0.2)
        assert ys.square().mean().item() == pytest.approx(4 * factor**2, rel=0.2)
    xs, ys, _ = found["label noise of variance 1"]
    clean = least_squares(xs, ys)[:, -1]
    assert 0.05 < (clean - ys[:, -1]).square().mean() < 1                        # the last label has no noise


@pytest.mark.parametrize("task", FUNCTIONS)
def test_to_answer_0_scores_1_on_other_inputs(task):
    for name, _, ys, divisor in looped_icl.shifted_prompts(Prompts(task, 5), 8_000, 4, generator()):
        assert (ys[:, -1].square().mean() / divisor).item() == pytest.approx(1, abs=0.12), name


class Fake(nn.Module):
    """Its layer 0 says nothing, layer 1 has x_i y_i at each y, layer 2 x_i (x_i . 1) for any y."""

    def __init__(self):
        super().__init__()
        self.read_in = nn.Linear(3, 3)
        self.h = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, xs, ys, loops):
        zeros = torch.zeros_like(xs)
        read = torch.stack([zeros, xs * ys[..., None]], 2).flatten(1, 2)[:, :-1]
        guessed = torch.stack([zeros, xs * xs.sum(2, keepdim=True)], 2).flatten(1, 2)[:, :-1]
        self.read_in(torch.zeros_like(read))
        for block, state in zip(self.h, [read, guessed]):
            block(state)


def test_the_probe_finds_what_is_there():
    found = looped_icl.probe(Fake(), Prompts("linear", 3), 15, 1, n=1_000)
    assert set(found) == {target + fitted for target in ("X^T y", "w") for fitted in ("", " (control)")}
    nothing, read, guessed = found["X^T y"]
    assert nothing == pytest.approx(1, abs=0.05) and read < 0.01 and guessed > 0.9
    assert found["w"][1] < 0.6 * found["w"][0]                     # X^T y tells a part of w
    # fitted on w = 1, only what the states hold of the prompt's own w is found
    nothing, read, guessed = found["X^T y (control)"]
    assert nothing > 1.5 and read < 0.01 and guessed > 1.5
    assert found["w (control)"][0] > 1.5


def test_the_probe_reads_the_read_in_and_each_loop_and_layer():
    torch.manual_seed(0)
    model = InContextTransformer(3, 6, 2, 2, 16)
    xs, ys = sample_prompts("linear", 30, 6, 3, generator())
    states = looped_icl.hidden_states(model, xs, ys, 3)
    assert states.shape == (7, 5, 30, 33)                          # 1 + 3 loops of 2 layers, prefixes of 1 to 5 pairs
    e = model.read_in(torch.stack([xs, F.pad(ys[..., None], (0, 2))], 2).flatten(1, 2)[:, :-1])
    z = model.h[0](e + model.wpe.weight[:11])
    for layer, tokens in enumerate([e, z]):
        for i in range(1, 6):
            read = states[layer, i - 1].float()
            torch.testing.assert_close(read[:, :16], tokens[:, 2 * i - 1])        # y_i
            torch.testing.assert_close(read[:, 16:32], tokens[:, :2 * i].mean(1))
            assert (read[:, 32] == 1).all()


# more pairs than dimensions, and fewer; fitted on as many prompts, and on 8 for each of the 9 inputs
@pytest.mark.parametrize("d, n, n_prompts, fitted_on", [(2, 6, 150, 150), (4, 3, 50, 72)])
def test_the_probe_against_one_prompt_and_one_prefix_at_a_time(d, n, n_prompts, fitted_on):
    torch.manual_seed(0)
    model = InContextTransformer(d, n, 1, 1, 4)
    found = looped_icl.probe(model, Prompts("linear", d), n, 2, n=n_prompts)
    for constant in (False, True):
        errors = {"X^T y": [[] for _ in range(3)], "w": [[] for _ in range(3)]}
        (xs, ys), (x_test, y_test) = (sample_prompts("linear", count, n, d, generator(seed))
                                      for count, seed in [(fitted_on, 40_001), (n_prompts, 40_000)])
        if constant:
            ys = xs.sum(2)
        layers, layers_test = ([z.detach().double().numpy() for z in looped_icl.hidden_states(model, x, y, 2)]
                               for x, y in [(xs, ys), (x_test, y_test)])
        for i in range(1, n):
            def target(x, y, name):
                x, y = x[:i].double().numpy(), y[:i].double().numpy()
                return sum(a * b for a, b in zip(x, y)) / i if name == "X^T y" else np.linalg.lstsq(x, y, rcond=None)[0]
            for name in errors:
                if name == "w" and i > d:
                    continue
                wanted = np.array([target(x, y, name) for x, y in zip(xs, ys)])
                wanted_test = np.array([target(x, y, name) for x, y in zip(x_test, y_test)])
                for layer in range(3):
                    fit, test = layers[layer][i - 1], layers_test[layer][i - 1]
                    W = np.linalg.inv(fit.T @ fit + np.eye(9)) @ fit.T @ wanted
                    errors[name][layer].append(((test @ W - wanted_test)**2).sum() / (wanted_test**2).sum())
        for name, by_layer in errors.items():
            expected = [np.mean(by_prefix) for by_prefix in by_layer]
            assert found[name + " (control)" * constant] == pytest.approx(expected, rel=1e-4), (name, constant)


def test_errors_by_examples_at_converged_loops(tmp_path, capsys):
    usual, = call_main(*TINY, "--out-dir", tmp_path)
    results, = call_main(*TINY, "--eval-loops", "11", "--out-dir", tmp_path)
    assert "resumed at step 60" in capsys.readouterr().out                       # on the checkpoint
    assert results["curve"][0][-1] == pytest.approx(results["by_loops"][10], rel=1e-5)
    assert usual["curve"][0][-1] == pytest.approx(usual["by_loops"][3], rel=1e-5)
    assert results["by_loops"] == usual["by_loops"] and results["curve"] != usual["curve"]


# ---- Tables -----------------------------------------------------------------------------------------------------------

def write_table(path, rows=1_000, features=6, seed=0, edit=None):
    """A table whose label is the sign of a random direction."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)) * 10 + 3
    labels = np.where((x - 3) @ rng.normal(size=features) > 0, "yes", "no")
    lines = [[*map("{:.4f}".format, row), label] for row, label in zip(x, labels)]
    header = [*(f"f{i}" for i in range(features)), "class"]
    if edit:
        edit(header, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *lines] if header else [])


def test_tables_are_standardised_padded_and_split(tmp_path):
    for number, name in enumerate(["720", "1462", "42192"]):                     # in the order of numbers
        write_table(tmp_path / f"{name}.csv", 1_000 + 100 * number, 5 + number, number)
    tables = Tables(tmp_path, 1)
    assert tables.name == "1462"
    xs, ys = tables.parts["test"][0][:, :-1], tables.parts["test"][0][:, -1]
    assert xs.shape == (1_100, 20) and not xs[:, :14].any() and set(ys.tolist()) == {0, 1}
    torch.testing.assert_close(xs[:, 14:].mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(xs[:, 14:].var(0, correction=0), torch.ones(6))
    known = {part: {tuple(row[:-1]): row[-1] for row in rows.tolist()} for part, (rows, _, _) in tables.parts.items()}
    assert [len(known[part]) for part in ("train", "valid", "test")] == [950 + 1_140, 50 + 60, 1_100]
    assert not known["train"].keys() & known["valid"].keys() and not known["train"].keys() & known["test"].keys()
    xs, ys = tables.sample(300, 41, generator())
    narrow = 0
    for x, y in zip(xs.tolist(), ys.tolist()):
        assert len({tuple(row) for row in x}) == 41                              # no row twice
        assert [known["train"][tuple(row)] for row in x] == y
        assert len({any(row[13:15]) for row in x}) == 1                          # all of one table
        narrow += not any(row[13] for row in x)
    assert 100 < narrow < 200                                                    # both tables, about equally often
    with pytest.raises(ValueError, match="--n-points"):
        Tables(tmp_path, 1, 20, 51)


@pytest.mark.parametrize("edit, error", [
    (lambda header, lines: lines.extend(lines * 10), "1,000 to 10,000 rows"),
    (lambda header, lines: lines[7].__setitem__(2, "?"), "could not convert"),
    (lambda header, lines: lines[7].__setitem__(2, "nan"), "finite numbers"),
    (lambda header, lines: (header.clear(), lines.clear()), "rows"),
    (lambda header, lines: [line.__setitem__(-1, "abc"[i % 3]) for i, line in enumerate(lines)], "two classes"),
    (lambda header, lines: [line.__setitem__(-1, "a" if i % 4 else "b") for i, line in enumerate(lines)], "half as many rows"),
    (lambda header, lines: [line.__delitem__(slice(2)) for line in [header, *lines]], "5 to --n-dims 20 features"),
])
@pytest.mark.filterwarnings("ignore")                        # of an empty file
def test_bad_tables_are_refused_with_file_and_reason(tmp_path, edit, error):
    write_table(tmp_path / "good.csv")
    write_table(tmp_path / "poor.csv", edit=edit)
    line = refused(looped_icl.main, tmp_path, *TINY, "--task", "openml", "--n-dims", "20", "--data-dir", tmp_path)
    assert error in line and "poor.csv" in line


ARFF = """% a comment
@RELATION bank
@ATTRIBUTE 'the age' NUMERIC
@attribute Class {1, 2}
@attribute job {'a b', c}
@attribute height real
@attribute id integer
@DATA
31.5, 1, 'a b', -2e3, 1
% another
40, 2, c, 7, 2

"""


def serve(monkeypatch, arff, target="Class"):
    """OpenML's API as its documentation shows it; returns the list of what is asked for."""
    asked = []
    features = []
    for i, (name, kind) in enumerate([("the age", "numeric"), ("Class", "nominal"), ("job", "nominal"), ("height", "numeric"), ("id", "numeric")]):
        features.append(dict(index=str(i), name=name, data_type=kind, is_ignore="false", is_row_identifier=str(name == "id").lower()))

    def urlopen(url, timeout):
        asked.append(url)
        if "features" in url:
            return io.BytesIO(json.dumps({"data_features": {"feature": features[::-1]}}).encode())
        about = dict(url="https://host/bank.arff", default_target_attribute=target)
        return io.BytesIO((json.dumps({"data_set_description": about}) if "json" in url else arff).encode())
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


def test_fetch_writes_numeric_columns_and_the_target_last(tmp_path, monkeypatch):
    asked = serve(monkeypatch, ARFF)
    for _ in range(2):                                                           # what is there is not downloaded again
        looped_icl.fetch(1462, tmp_path / "tables")
    api = "https://www.openml.org/api/v1/json/data"
    assert asked == [f"{api}/1462", f"{api}/features/1462", "https://host/bank.arff"]
    with open(tmp_path / "tables" / "1462.csv", newline="") as file:
        assert list(csv.reader(file)) == [["the age", "height", "Class"], ["31.5", "-2e3", "1"], ["40", "7", "2"]]


@pytest.mark.parametrize("arff, target", [(ARFF, None), (ARFF.replace("40, 2, c, 7, 2", "{0 40, 1 2}"), "Class")])
def test_a_data_set_that_is_no_table_is_refused_by_its_id(tmp_path, monkeypatch, arff, target):
    serve(monkeypatch, arff, target)
    flags = ["--device", "cpu", "--task", "openml", "--fetch", "7", "--data-dir", tmp_path / "tables"]
    assert "--fetch 7: " in refused(looped_icl.main, tmp_path, *flags) and not (tmp_path / "tables").exists()


def test_ten_tables_leave_one_out(tmp_path, capsys, monkeypatch):
    def fetch(number, folder):
        write_table(Path(folder, f"{number}.csv"), seed=int(number))
    monkeypatch.setattr(looped_icl, "fetch", fetch)
    small = ["--n-embd", "16", "--n-head", "2", "--loops", "2", "--window", "1", "--steps", "5", "--batch-size", "4", "--n-eval", "50"]
    flags = ["--preset", "paper", "--task", "openml", "--fetch", "--data-dir", tmp_path / "tables", "--held-out", "0", "9", *small, "--eval-loops", "2"]
    results = call_main(*flags, "--out-dir", tmp_path / "out")
    assert len(list((tmp_path / "tables").iterdir())) == 10 and results[0]["settings"]["fetch"] is None
    out = capsys.readouterr().out
    rows = [line.split() for line in out[out.index("openml: error"):].splitlines() if ", table" in line]
    assert [(row[2], row[7]) for row in rows] == [("720", "0.338"), ("42192", "0.352")]         # the paper's, 1 - accuracy
    task, model = looped_icl.load(results[1]["folder"])
    xs, ys = task.sample(50, 41, generator(20_000), part="test")
    wrong = model(xs, ys, 2)[0].argmax(-1) != ys
    assert results[1]["curve"][0] == pytest.approx(wrong.double().mean(0).tolist())
    write_table(tmp_path / "tables" / "1.csv")                                   # now the first of them
    results = call_main(*flags, "--out-dir", tmp_path / "out")
    assert [result["prompts"] for result in results] == ["1", "871"]
    out = capsys.readouterr().out
    assert out.count("trained before the last edit") == 2
    (tmp_path / "tables" / "1.csv").unlink()
    call_main(*flags, "--n-points", 11, "--points-start", 11, "--out-dir", tmp_path / "out")
    assert "paper" not in capsys.readouterr().out.split("openml: error")[1]      # other prompts than the paper's


# ---- Training and the command -----------------------------------------------------------------------------------------

def test_the_curriculum_of_the_paper():
    args = settings("--preset", "paper")
    at = lambda step: looped_icl.curriculum(args, step)
    assert at(0) == (5, 11, 15) and at(499) == (5, 11, 15) and at(500) == (5, 11, 17) and at(1_500) == (5, 11, 20)
    assert at(5_000) == (6, 13, 20) and at(74_999) == (19, 39, 20) and at(75_000) == at(499_999) == (20, 41, 20)
    args = settings("--preset", "paper", "--task", "decision-tree", "--model", "standard")
    assert at(0) == (20, 26, 1) and at(5_000) == (20, 31, 1) and at(75_000) == (20, 101, 1)
    args = settings("--preset", "paper", "--task", "decision-tree")
    assert at(0) == (20, 26, 15) and at(499_999) == (20, 101, 70)
    args = settings()                                                            # nothing grows but the loops
    assert at(0) == (2, 6, 6) and at(419) == (2, 6, 18) and at(420) == at(1_099) == (2, 6, 20)
    args = settings("--dims-start", "1")
    assert at(0) == (1, 6, 6) and at(700) == (2, 6, 20)


@pytest.mark.parametrize("flags, expected", [(["--schedule", "constant", "--warmup", "0"], [1, 1, 1, 1]),
                                             (["--schedule", "cosine", "--warmup", "10"], [0.1, 0.5, 0.5, 0.0027])])
def test_learning_rates(tmp_path, monkeypatch, flags, expected):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(float(self.param_groups[0]["lr"]) / 1e-2), step(self))[1])
    result, = call_main(*TINY, "--lr", "1e-2", "--beta2", "0.9", "--steps", "30", "--out-dir", tmp_path, *flags)
    group, = torch.load(Path(result["folder"]) / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.9)
    assert [rates[0], rates[15], rates[15], rates[29]] == pytest.approx(expected, abs=0.005) and len(rates) == 30


@pytest.mark.parametrize("model", ["looped", "standard", "tied"])
def test_training_moves_every_parameter_and_lowers_the_error(tmp_path, model):
    flags = [*SMALL, *(LOOPED if model == "looped" else LAYERS), "--model", model, "--points-start", "6",
             "--dims-start", "1", "--curriculum-every", "100", "--lr", "1e-2", "--out-dir", str(tmp_path)]
    common.seed_everything(0)
    before = looped_icl.build(settings(*flags))[1]
    results, = call_main(*flags)
    after = torch.load(Path(results["folder"]) / "ckpt.pt", weights_only=True)["model"]
    assert all(not torch.equal(p, after[name]) for name, p in before.named_parameters())
    assert len(results["curve"][0]) == 6 and ("by_loops" in results) == (model != "standard")
    metrics = metrics_of(results["folder"])
    assert metrics[-1]["error"] < metrics[0]["error"]                            # on the same prompts


def test_every_task_and_model_trains_and_the_figures_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = [*BOTH, "--steps", "2", "--task", *FUNCTIONS, "--ood", "--probe", "--plot", "--out-dir", tmp_path]
    results = call_main(*flags)
    out = capsys.readouterr().out
    assert len(results) == 10
    for wanted in ("Lasso", "tree on x", "tree on signs", "2-layer network", "skewed covariance", "w (control)", "of 12 layers'"):
        assert wanted in out, wanted
    tables = out[out.index("linear: error"):]
    assert max(len(line) for line in tables.splitlines() if "figure: " not in line) <= 100
    assert (tmp_path / "looped_icl" / "errors.png").stat().st_size > 50_000
    # asked for again, all is read, and prints the same
    assert call_main(*flags) == results
    assert capsys.readouterr().out == "\n" + tables


def test_models_without_loops_are_trained_once_whatever_the_injection(tmp_path):
    runs = runs_of(*BOTH, "--model", "looped", "standard", "tied", "--inject", "add", "none")
    assert [(run.args.model, run.args.inject) for run in runs] == [("looped", "add"), ("looped", "none"), ("standard", None), ("tied", None)]


def test_a_new_function_class_is_a_function_and_a_row(tmp_path, monkeypatch, capsys):
    def square(xs, generator):
        """(w . x)^2 of one coordinate."""
        return looped_icl.randn(generator, len(xs), 1) * xs[..., 0].square()
    monkeypatch.setitem(looped_icl.TASKS, "square", looped_icl.FunctionClass(square, lambda d: 1, ["averaging", "Lasso"]))
    result, = call_main(*TINY, "--task", "square", "--steps", "2", "--ood", "--out-dir", tmp_path)
    assert list(result["baselines"]) == ["averaging", "Lasso"] and len(result["by_loops"]) == 40
    assert "square: error" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [60, 61])
def test_a_looped_model_learns_regression_and_keeps_its_answer(tmp_path, one_thread, seed):
    results, = call_main("--device", "cpu", "--seed", seed, "--out-dir", tmp_path)
    last = {name: curve[-1] for name, curve in results["baselines"].items()}
    b, by_loops = results["settings"]["loops"], results["by_loops"]
    assert results["curve"][0][-1] <= 0.06 and last["averaging"] > 0.4 and last["3-NN"] > 0.4
    assert by_loops[10 * b - 1] < 1.3 * by_loops[b - 1] < by_loops[0] / 4


# ---- What is trained on, measured and shown, once more in plain code --------------------------------------------------

@pytest.mark.parametrize("flags, line", [
    (["--n-head", "3"], "n_embd 16 is not divisible by n_head 3"),
    (["--task", "linear", "openml", "--data-dir", "nowhere"], "nowhere has 0 tables"),
    (["--task", "decision-tree", "--dims-start", "3"], "--dims-start has no effect"),
    (["--loops", "4", "--window", "5"], "--window 5 is more than --loops 4"),
])
def test_what_cannot_be_is_one_line_before_anything_is_written(flags, line, tmp_path):
    assert line in refused(looped_icl.main, tmp_path, *TINY, *flags)


def test_errors_baselines_and_other_inputs_are_means_over_all_prompts_in_units_of_the_variance(tmp_path):
    result, = call_main(*TINY, "--steps", "2", "--n-eval", "300", "--ood", "--out-dir", tmp_path)
    task, model = looped_icl.load(result["folder"])
    assert not model.training
    draw = generator(20_000)
    xs, ys = task.sample(300, 6, draw)

    def mean(predictions):
        return (predictions - ys).square().div(3).mean(0).tolist()
    assert result["curve"][0] == pytest.approx(mean(model(xs, ys, 4)[0]), rel=1e-4)
    assert len(result["by_loops"]) == 40
    for name, curve in result["baselines"].items():
        assert curve == pytest.approx(mean(looped_icl.BASELINES[name](xs, ys)), rel=1e-4)
    for name, x, y, variance in looped_icl.shifted_prompts(task, 300, 6, draw):
        for ours, predictions in zip(result["ood"][name], [model(x, y, 4)[0], least_squares(x, y)]):
            assert ours == pytest.approx((predictions - y)[:, -1].square().mean().item() / variance, rel=1e-4, abs=1e-6)
    twelve = InContextTransformer(3, 6, 12, 2, 16)
    assert result["n_params_12"] == sum(p.numel() for p in twelve.parameters())


def test_the_curriculum_that_is_logged_is_the_one_that_is_trained_on(tmp_path, monkeypatch):
    flags = [*TINY, "--steps", "30", "--loops", "6", "--dims-start", "1", "--seed", "3"]
    forward = InContextTransformer.forward
    first, seen = [], []

    def watched(self, xs, ys, loops=1, window=1, **rest):
        if torch.is_grad_enabled():
            first.append(xs)
            active_dims = (xs != 0).any(1).any(0).sum().item()
            seen.append((active_dims, xs.shape[1], loops, window))
        return forward(self, xs, ys, loops, window, **rest)
    monkeypatch.setattr(InContextTransformer, "forward", watched)
    call_main(*flags, "--out-dir", tmp_path)
    args = settings(*flags)
    assert seen == [(*looped_icl.curriculum(args, step), 2) for step in range(30)]
    assert torch.equal(first[0], Prompts("linear", 3).sample(8, 4, generator(3), 1)[0])          # of the run's own seed


def test_the_loss_is_the_mean_over_loops_prompts_and_points():
    predictions, ys = torch.randn(3, 4, 5, generator=generator()), torch.randn(4, 5, generator=generator(1))
    by_loop = [((p - ys)**2).mean().item() for p in predictions]
    assert looped_icl.loss_of(predictions, ys).item() == pytest.approx(np.mean(by_loop), rel=1e-5)
    logits = torch.randn(3, 4, 5, 2, generator=generator())
    labels = torch.randint(2, (4, 5), generator=generator())
    expected = F.cross_entropy(logits.flatten(0, 2), labels.expand(3, 4, 5).flatten())
    torch.testing.assert_close(looped_icl.loss_of(logits, labels.float()), expected)


def made_up(b, by_loops, error, *flags):
    """A run with made-up results."""
    run, = runs_of(*flags)
    n = run.args.n_points
    run.results = dict(curve=[[error] * n] * 3, by_loops=by_loops * b, baselines={"least squares": [0.01] * n}, prompts="linear")
    run.results.update(n_params=1, n_params_12=10)
    return run


def test_the_verdict_follows_from_the_numbers(capsys):
    standard = made_up(0, [], 0.06, *SMALL, *LAYERS, "--model", "standard")
    for at_b, at_10b, words in [(0.07, 0.07, "its answer stays past the b loops of training\n    error after b: 0.070, after 10 b: 0.070\n"
                                             "    within 1.3 times that of 2 layers: 0.060\n    more than 1.3 times that of least squares: 0.010"),
                                (0.08, 0.07, "    more than 1.3 times that of 2 layers: 0.060"), (0.07, 0.2, "its answer is lost"),
                                (0.95, 0.95, "it has learned nothing")]:
        looped_icl.verdict("linear", [made_up(4, [at_b] * 9 + [at_10b], at_b, *TINY), standard])
        assert words in capsys.readouterr().out
    for at_b, words in [(0.44, "its answer stays"), (0.46, "it has learned nothing")]:       # a guess has 0.5
        looped_icl.verdict("openml", [made_up(4, [at_b] * 10, at_b, *TINY)])
        assert words in capsys.readouterr().out
    looped_icl.verdict("linear", [standard])
    assert "no looped model here to compare" in capsys.readouterr().out


def test_the_papers_curves_stand_beside_ours_and_loops_are_counted_from_1(capsys):
    runs = [made_up(20, [0.5] * 10, 0.25, "--preset", "paper"), made_up(12, [0.4] * 10, 0.25, "--preset", "paper", "--model", "tied")]
    panels = looped_icl.figures("linear", runs)
    (axis, by_examples), (_, by_loops) = panels.values()
    assert [label for label, *_ in by_examples] == ["looped", "1 layer 12 times", "paper, looped", "paper, standard", "least squares"]
    lines = [(label, list(xs)) for label, xs, _, _ in by_loops]
    assert lines[:2] == [("looped", list(range(1, 201))), ("trained with 20 loops", [20, 20])]
    assert lines[2:] == [("1 layer 12 times", list(range(1, 121))), ("trained with 12 loops", [12, 12])]
    looped_icl.print_curves("title", axis["xlabel"], by_examples)
    rows = {line.split()[1]: line.split()[2:] for line in capsys.readouterr().out.splitlines()[3:]}
    assert rows["0"] == ["0.250", "0.250", "0.010"] and rows["40"] == ["0.250", "0.250", "0.010", "0.001", "0.001"]
    assert rows["19"] == ["0.250", "0.250", "0.010", "0.060", "0.059"]
    looped_icl.print_curves("title", "loops", by_loops)
    rows = {line.split()[1]: line.split()[2:] for line in capsys.readouterr().out.splitlines()[3:]}
    assert rows["1"] == rows["20"] == rows["120"] == ["0.500", "0.400"] and rows["200"] == ["0.500"]
    other = looped_icl.by_examples("linear", [made_up(20, [0.5] * 10, 0.25, "--preset", "paper", "--n-dims", "10")])
    assert not any("paper" in label for label, *_ in other)                      # another setting
