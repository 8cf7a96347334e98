"""ntp_convergence.py: the data against their definition, gradients against autograd, max-margin solutions against KKT and
exhaustive search, Algorithm 1 step by step, the command from end to end."""
import itertools
import json
import math
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import ntp_convergence as ntp
from test_common import call_main, cut_and_continued

SCRIPT = Path(ntp.__file__)
JOINT = ["--device", "cpu", "--vocab-size", "6", "--n-sentences", "15", "--seq-len", "3", "--steps", "1500"]
TINY = [*JOINT, "--steps-ov", "300"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """The runs in this process do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


# ---- The data ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ntp.ORDERS)
def test_datasets_are_realizable_by_their_definition(kind):
    for seed in range(5):
        (sentences, next_tokens, collocation, optimal), orders = ntp.draw_dataset(12, 60, 4, seed, kind)
        assert sorted(collocation) == list(range(12)) and sentences.shape == (60, 4)
        for q in range(12):
            for a, b in itertools.product(range(12), repeat=2):
                assert not (orders[q, a, b] and orders[q, b, a])                 # strict
                assert kind != "total" or a == b or orders[q, a, b] or orders[q, b, a]
                assert all(orders[q, a, c] for c in range(12) if orders[q, a, b] and orders[q, b, c])
        for x, best, following in zip(sentences.tolist(), optimal, next_tokens):
            assert best in x and all(orders[x[-1], best, other] for other in x if other != best)
            assert following == collocation[best]
        assert np.array_equal(ntp.check_realizable(sentences, next_tokens, collocation), optimal)
    again = ntp.make_dataset(12, 60, 4, 4, kind)
    assert np.array_equal(again[0], sentences) and not np.array_equal(ntp.make_dataset(12, 60, 4, 5, kind)[0], sentences)


def test_closure_and_what_the_data_decide():
    rng = np.random.default_rng(0)
    relation = np.triu(rng.random((3, 9, 9)) < 0.2, 1)
    expected = relation.copy()
    for r in expected:
        for k, i, j in itertools.product(range(9), repeat=3):                    # Floyd and Warshall
            r[i, j] |= r[i, k] & r[k, j]
    assert np.array_equal(ntp.closure(relation), expected)
    sentences, optimal = np.array([[0, 1, 3], [1, 2, 3], [0, 2, 1]]), np.array([0, 1, 2])
    implied = ntp.closure(ntp.said_orders(sentences, optimal, 4))
    assert {tuple(map(int, t)) for t in np.argwhere(implied)} == {
        (3, 0, 1), (3, 0, 3), (3, 1, 2), (3, 1, 3), (3, 0, 2), (1, 2, 0), (1, 2, 1)}
    assert ntp.optimal_token(np.array([[2, 0, 3], [2, 2, 3], [3, 2, 3], [0, 2, 1], [1, 0, 1]]), implied).tolist() == [0, -1, -1, 2, -1]


@pytest.mark.parametrize("order", ntp.ORDERS)
@pytest.mark.parametrize("embedding", ["orthonormal", "gaussian"])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_data_that_a_run_trains_on_are_realizable(order, embedding, seed):
    args = ntp.parse_args(["--device", "cpu", "--order", order, "--embedding", embedding, "--seed", seed])
    run, = common.sweep(args, ntp.SWEEP, ntp.resolve)
    task, model = ntp.build(run.args)
    assert task.sentences.shape == (200, 5)
    assert np.array_equal(task.next_tokens, task.collocation[task.optimal])
    assert np.array_equal(ntp.check_realizable(*task[:3]), task.optimal)
    for x, best in zip(task.sentences.tolist(), task.optimal.tolist()):
        assert all(task.orders[x[-1], best, other] for other in x if other != best)
    assert (task.orders.sum((1, 2)) == 190).all() == (order == "total")         # all 20 * 19 / 2 pairs of each query
    gram = model.E.T @ model.E - torch.eye(20)
    assert (gram.abs().max() < 1e-12) == (embedding == "orthonormal") and torch.linalg.matrix_rank(model.E) == 20
    assert task.weights.sum() == pytest.approx(1) and task.weights.min() > 0


def test_what_theorem_3_adds_to_the_data():
    # query 3: 0 > 1 and 1 > 2 are said; 4 and 5 were never seen with it, 2 and 3 never optimal
    sentences, optimal = np.array([[0, 1, 3], [1, 2, 3]]), np.array([0, 1])
    extended = ntp.extended_orders(sentences, optimal, 6)
    assert not extended[[0, 1, 2, 4, 5]].any()
    pairs = {tuple(map(int, pair)) for pair in np.argwhere(extended[3])}
    said = {(0, 1), (0, 3), (1, 2), (1, 3), (0, 2)}
    assert pairs == said | set(itertools.product([0, 1], [4, 5])) | set(itertools.product([4, 5], [2, 3]))


def test_a_sentence_of_one_repeated_token_compares_nothing():
    sentences, optimal = np.array([[0, 1, 3], [3, 3, 3], [2, 2, 2]]), np.array([0, 3, 2])
    extended = ntp.extended_orders(sentences, optimal, 4)
    assert {tuple(map(int, pair)) for pair in np.argwhere(extended[3])} == {(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)}
    assert not extended[:3].any()
    np.testing.assert_allclose(ntp.max_margin_kq(np.eye(4), sentences, optimal)[:, 3], [2 / 3, -1 / 3, 0, -1 / 3], atol=1e-9)


@pytest.mark.parametrize("order", ["total", "partial"])
@pytest.mark.parametrize("seed", range(5))
def test_the_extended_order_is_the_one_of_the_max_margin_solution(order, seed):
    """With orthonormal embeddings a token that is optimal and below no other scores above those never seen with the query,
    and no token that is never optimal does."""
    sentences, _, _, optimal = ntp.make_dataset(20, 200, 5, seed, order)
    scores = ntp.max_margin_kq(np.eye(20), sentences, optimal).T                 # (query, token)
    checked = 0
    for q in set(sentences[:, -1].tolist()):
        with_q = sentences[:, -1] == q
        seen, best = set(sentences[with_q].flatten().tolist()), set(optimal[with_q].tolist())
        below = {t for x, b in zip(sentences[with_q].tolist(), optimal[with_q]) for t in x if t != b}
        for unseen in set(range(20)) - seen:
            assert all(scores[q, token] > scores[q, unseen] + 1e-6 for token in best - below)
            assert all(scores[q, token] < scores[q, unseen] + 1e-6 for token in seen - best)
            checked += len(best - below)
    assert checked > 50


def levels(sentences, optimal):
    """The pairs (query, token) that are optimal, and that are beaten, in sentences of more than one token."""
    best, beaten = set(), set()
    for x, b in zip(sentences.tolist(), optimal.tolist()):
        others = set(x) - {b}
        best |= {(x[-1], b)} if others else set()
        beaten |= {(x[-1], other) for other in others}
    return best, beaten


@pytest.mark.parametrize("seed", range(5))
def test_in_data_of_two_levels_each_token_is_always_optimal_or_never(seed):
    sentences, following, collocation, optimal = ntp.make_dataset(20, 200, 5, seed, "two-level")
    assert np.array_equal(ntp.check_realizable(sentences, following, collocation), optimal)
    best, beaten = levels(sentences, optimal)
    assert not best & beaten and len(best) > 50 and len(beaten) > 50
    sentences, _, _, optimal = ntp.make_dataset(20, 200, 5, seed, "total")
    best, beaten = levels(sentences, optimal)
    assert len(best & beaten) > 20                                               # chains


@pytest.mark.parametrize("seed", range(5))
def test_with_two_levels_the_exact_solution_follows_the_extended_order_and_with_chains_it_has_ties(seed):
    def measured(order):
        dataset, orders = ntp.draw_dataset(20, 200, 5, seed, order)
        model = ntp.OneLayer(torch.eye(20, dtype=torch.float64))
        return ntp.generalisation(model, ntp.Task(*dataset, np.ones(20) / 20, orders), seed, n=3_000)
    found = measured("two-level")
    assert found["exact_decided"] == found["exact_extended"] == 1 and found["ties_extended"] == 0
    assert found["fraction_extended"] > 0.3 and found["fraction_chain"] == 0 and found["exact_chain"] is None
    found = measured("total")
    assert found["exact_decided"] == found["exact_top"] == 1
    assert found["exact_extended"] + found["ties_extended"] < 1 and found["ties_extended"] > 0


def test_the_chain_of_the_docstring():
    A = np.array([[1, -1, 0, 0], [0, 1, 0, -1], [1, 0, -1, 0]], dtype=float)
    w, _ = ntp.max_margin(A)
    np.testing.assert_allclose(w, [1, 0, 0, -1], atol=1e-9)                      # of a, b, c, d
    scores = np.array([[3.0, 0], [1, 0], [1, 0]])                                # of tokens 0, 1, 2 with query 0, 1
    sentences, optimal = np.array([[1, 2, 0], [2, 2, 1], [1, 1, 1]]), np.array([1, 2, 1])
    assert ntp.leads(scores, sentences, optimal).tolist() == [-2, 0, math.inf]


@pytest.mark.parametrize("order", ["total", "partial", None])
def test_generalisation_agrees_with_plain_loops(tmp_path, order):
    V, L, N = 9, 4, 40
    dataset, orders = ntp.draw_dataset(V, N, L, 3, order or "total")
    sentences, _, collocation, optimal = dataset
    task = ntp.Task(*dataset, np.ones(V) / V, orders if order else None)
    model = ntp.OneLayer(torch.eye(V, dtype=torch.float64))
    model.W_OV.data = 5 * torch.from_numpy(ntp.max_margin_ov(np.eye(V), collocation))
    model.W_KQ.data = 3 * torch.from_numpy(ntp.max_margin_kq(np.eye(V), sentences, optimal))
    found = ntp.generalisation(model, task, 11, n=300)

    rng = np.random.default_rng(20_011)
    if order:
        unseen, truth = ntp.draw_sentences(300, L, orders, rng)
    else:
        unseen, truth = rng.integers(V, size=(300, L)), [None] * 300
    known = set(map(tuple, sentences.tolist()))
    above = {q: set() for q in range(V)}                                         # pairs said, closed by hand
    seen, best = {q: set() for q in range(V)}, {q: set() for q in range(V)}
    for x, b in zip(sentences.tolist(), optimal.tolist()):
        above[x[-1]] |= {(b, other) for other in x if other != b}
        if len(set(x)) > 1:
            seen[x[-1]] |= set(x)
            best[x[-1]].add(b)

    def closed(pairs):
        while more := {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs:
            pairs = pairs | more
        return pairs

    def decide(pairs, x):
        return next((a for a in x if all(a == b or (a, b) in pairs for b in x)), None)
    groups, right, true, exact = {}, {}, {}, {}
    W = ntp.max_margin_kq(np.eye(V), sentences, optimal)
    for x, t in zip(unseen.tolist(), truth):
        if tuple(x) in known:
            continue
        q, z = x[-1], model(torch.tensor([x])).argmax().item()
        by_data = decide(closed(above[q]), x)
        extra = {(a, b) for a in best[q] for b in range(V) if b not in seen[q]}
        extra |= {(a, b) for a in range(V) if a not in seen[q] for b in seen[q] - best[q]}
        by_both = decide(closed(above[q] | extra), x)
        group = "decided" if by_data is not None else "extended" if by_both is not None else "undecided"
        token = {"decided": by_data, "extended": by_both, "undecided": t}[group]
        groups[group] = groups.get(group, 0) + 1
        if group == "extended":
            kind = "new" if token not in seen[q] else "chain" if any(b == token for _, b in above[q]) else "top"
            groups[kind] = groups.get(kind, 0) + 1
        for name in [group] if group != "extended" else [group, kind]:
            if token is not None:
                right.setdefault(name, []).append(z == collocation[token])
                lead = min([W[token, q] - W[other, q] for other in x if other != token], default=1)
                exact.setdefault(name, []).append((lead > 1e-6, abs(lead) <= 1e-6))
        if t is not None:
            true.setdefault(group, []).append(z == collocation[t])
    total = groups["decided"] + groups["extended"] + groups["undecided"]
    assert len(groups) == 6 and min(groups.values()) > 0
    for group, count in groups.items():
        assert found[f"fraction_{group}"] == pytest.approx(count / total)
        if group == "undecided" and not order:
            assert found["accuracy_undecided"] is found["exact_undecided"] is found["ties_undecided"] is None
            continue
        assert found[f"accuracy_{group}"] == pytest.approx(np.mean(right[group]))
        expected = np.mean(exact[group], axis=0)
        assert (found[f"exact_{group}"], found[f"ties_{group}"]) == pytest.approx(tuple(expected))
    assert found["accuracy_decided"] == 1
    assert found["accuracy_truth"] == (pytest.approx(np.mean(true["extended"])) if order else None)


def test_long_sentences_that_partial_orders_seldom_decide_are_refused():
    with pytest.raises(ValueError, match="of 10000 random sentences of 50 tokens only 0 have an optimal token"):
        ntp.make_dataset(4, 10, 50, 0, "partial")


def test_without_an_order_only_a_repeated_token_is_optimal():
    no_order = np.zeros((6, 6, 6), dtype=bool)
    sentences, optimal = ntp.draw_sentences(5, 3, no_order, np.random.default_rng(0))
    assert sentences.tolist() == [[token] * 3 for token in optimal] and len(optimal) == 5
    assert len(ntp.draw_sentences(5, 50, no_order, np.random.default_rng(0))[0]) == 0


@pytest.mark.parametrize("sentences, following, collocation, error", [
    ([[0, 1, 2], [0, 1, 2]], [1, 2], [1, 2, 0], "query 2 put token 0 above itself"),
    ([[0, 1, 3], [1, 2, 3], [2, 0, 3]], [1, 2, 3], [1, 2, 3, 0], "query 3 put token 0 above itself"),
    ([[0, 1, 2]], [1], [1, 1, 0], "tokens 0 and 1 are both followed by 1"),
    ([[0, 1, 0]], [0], [1, 2, 0], r"sentence 0, \[0, 1, 0\], none gives 0"),
])
def test_what_is_not_realizable_is_refused_with_the_reason(sentences, following, collocation, error):
    with pytest.raises(ValueError, match=error):
        ntp.check_realizable(np.array(sentences), np.array(following), np.array(collocation))


# ---- The model and its gradients --------------------------------------------------------------------------------------

def random_case(seed=0, V=7, L=4, N=9):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = ntp.OneLayer(torch.from_numpy(rng.standard_normal((V, V))))
    for W in model.parameters():
        W.data = torch.randn(W.shape, dtype=torch.float64, generator=generator)
    weights = rng.random(N)
    return model, *(torch.from_numpy(x) for x in (rng.integers(V, size=(N, L)), rng.integers(V, size=N), weights / weights.sum()))


def test_the_model_agrees_with_numpy():
    model, sentences, _, _ = random_case()
    E, OV, KQ = model.E.numpy(), model.W_OV.detach().numpy(), model.W_KQ.detach().numpy()
    logits, attn = model(sentences, return_attn=True)
    assert torch.equal(model(sentences), logits)
    for x, row, weights in zip(sentences.tolist(), logits, attn):
        X = E[:, x]
        scores = X.T @ KQ @ X[:, -1]
        softmax = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(weights.detach(), softmax, atol=1e-12)
        np.testing.assert_allclose(row.detach(), OV @ X @ softmax, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_in_closed_form_agree_with_autograd(seed):
    model, sentences, following, weights = random_case(seed)
    loss, by_OV, by_KQ = ntp.gradients(model, sentences, following, weights)
    expected = weights @ torch.nn.functional.cross_entropy(model(sentences), following, reduction="none")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert (by_OV - model.W_OV.grad).abs().max() < 1e-10 and (by_KQ - model.W_KQ.grad).abs().max() < 1e-10


def test_tiny_losses_keep_their_digits():
    logits = torch.tensor([[60.0, 0.0, 1.0], [0.0, -5.0, 700.0]], dtype=torch.float64)
    losses, residual = ntp.loss_and_residual(logits, torch.tensor([0, 2]))
    assert losses[0].item() == pytest.approx(math.exp(-60) + math.exp(-59), rel=1e-12)
    assert losses[1].item() == pytest.approx(math.exp(-700) + math.exp(-705), rel=1e-9)
    assert residual[0, 0].item() == pytest.approx(-math.exp(-60) - math.exp(-59), rel=1e-12)
    assert residual[0, 2].item() == pytest.approx(math.exp(-59), rel=1e-12)


# ---- Max-margin solutions ---------------------------------------------------------------------------------------------

def certify(A, w, l):
    assert (A @ w).min() > 1 - 1e-6                                              # constraints met
    assert np.abs(l * (A @ w - 1)).max() < 1e-8 and l.min() >= 0                 # complementary slackness
    np.testing.assert_allclose(w, A.T @ l, atol=1e-9)                            # stationarity


def ov_constraints(E, collocation):
    """(e_n(v) - e_u)^T W x_v >= 1 for all u != n(v): rows over the entries of W (V, d)."""
    V, one = len(collocation), np.eye(len(collocation))
    return np.array([np.outer(one[n] - one[u], E[:, v]).ravel()
                     for v, n in enumerate(collocation) for u in range(V) if u != n])


def kq_constraints(E, sentences, optimal):
    """(x* - x)^T W x_q >= 1 for each sentence, each other distinct token x in it: rows over the entries of W (d, d)."""
    triples = {(x[-1], best, other) for x, best in zip(sentences.tolist(), optimal.tolist()) for other in x if other != best}
    return np.array([np.outer(E[:, best] - E[:, other], E[:, q]).ravel() for q, best, other in sorted(triples)])


def exhaustive(A):
    """The smallest w that meets all constraints, over every set of constraints held with equality."""
    best = None
    for size in range(1, A.shape[1] + 1):
        for held in itertools.combinations(range(len(A)), size):
            w = np.linalg.lstsq(A[list(held)], np.ones(size), rcond=None)[0]
            if (A @ w).min() > 1 - 1e-9 and (best is None or w @ w < best @ best):
                best = w
    return best


@pytest.mark.parametrize("seed", range(8))
def test_max_margin_agrees_with_an_exhaustive_search(seed):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(4)
    A = rng.standard_normal((9, 4))
    A *= np.sign(A @ truth)[:, None]
    A = np.concatenate([A, A[:2], A[:1] + A[1:2]])                               # repeated and dependent constraints
    w, l = ntp.max_margin(A)
    certify(A, w, l)
    np.testing.assert_allclose(w, exhaustive(A), atol=1e-8)


def test_kq_of_a_tiny_dataset_agrees_with_an_exhaustive_search():
    sentences, _, _, optimal = ntp.make_dataset(4, 6, 3, seed=1)
    A = kq_constraints(np.eye(4), sentences, optimal)
    used = np.abs(A).sum(0) > 0
    expected = np.zeros(16)
    for q in range(4):                                                           # with orthonormal embeddings, query by query
        rows, columns = A[np.abs(A.reshape(-1, 4, 4)[:, :, q]).sum(1) > 0], np.arange(q, 16, 4)
        if len(rows):
            expected[columns] = exhaustive(rows[:, columns])
    np.testing.assert_allclose(ntp.max_margin_kq(np.eye(4), sentences, optimal).ravel(), expected, atol=1e-8)
    assert not expected[~used].any()


@pytest.mark.parametrize("embedding", ["orthonormal", "gaussian"])
@pytest.mark.parametrize("order", ["total", "partial"])
def test_both_solutions_are_certified_at_the_papers_size(embedding, order):
    E = np.random.default_rng(3).standard_normal((20, 20)) / math.sqrt(20)
    E = np.linalg.qr(E)[0] if embedding == "orthonormal" else E
    sentences, _, collocation, optimal = ntp.make_dataset(20, 200, 5, 3, order)
    for A, W in ((ov_constraints(E, collocation), ntp.max_margin_ov(E, collocation)),
                 (kq_constraints(E, sentences, optimal), ntp.max_margin_kq(E, sentences, optimal))):
        w, l = ntp.max_margin(A)
        certify(A, w, l)
        np.testing.assert_allclose(W.ravel(), w, atol=1e-8)                      # query by query, or all at once
    for v, n in enumerate(collocation):                                          # the constraints are those of the paper
        margins = (ntp.max_margin_ov(E, collocation) @ E[:, v])[n] - np.delete(ntp.max_margin_ov(E, collocation) @ E[:, v], n)
        assert margins.min() > 1 - 1e-6
        break
    W = ntp.max_margin_kq(E, sentences, optimal)
    for x, best in zip(sentences, optimal):
        assert all((E[:, best] - E[:, other]) @ W @ E[:, x[-1]] > 1 - 1e-6 for other in x if other != best)
    if embedding == "orthonormal":
        closed = sum(np.outer(np.eye(20)[n] - 1 / 20, E[:, v]) for v, n in enumerate(collocation))
        np.testing.assert_allclose(ntp.max_margin_ov(E, collocation), closed, atol=1e-9)


@pytest.mark.parametrize("A", [[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 1.0], [-1.0, 0.5], [0.0, -1.0]], [[0.0, 0.0]]])
def test_constraints_that_cannot_be_met_are_refused(A):
    with pytest.raises(ValueError, match="cannot all be met"):
        ntp.max_margin(np.array(A))


def test_a_large_vocabulary_costs_the_max_margin_solver_little(monkeypatch):
    """With orthonormal embeddings each query, or token of a pair, is a problem of its own: V - 1 constraints at most."""
    V, sizes, solve = 60, [], np.linalg.solve
    E = np.linalg.qr(np.random.default_rng(0).standard_normal((V, V)))[0]
    monkeypatch.setattr(np.linalg, "solve", lambda G, y: (sizes.append(len(G)), solve(G, y))[1])
    collocation = np.random.default_rng(1).permutation(V)
    closed = sum(np.outer(np.eye(V)[n] - 1 / V, E[:, v]) for v, n in enumerate(collocation))
    np.testing.assert_allclose(ntp.max_margin_ov(E, collocation), closed, atol=1e-9)
    assert max(sizes) <= V - 1 and len(sizes) <= 2 * V * V
    sentences, _, _, optimal = ntp.make_dataset(V, 300, 5, 0)
    W = ntp.max_margin_kq(E, sentences, optimal)
    A = kq_constraints(E, sentences, optimal)
    assert max(sizes) <= V - 1 and (A @ W.ravel()).min() > 1 - 1e-9


# ---- Algorithm 1 ------------------------------------------------------------------------------------------------------

def one_run(tmp_path, *flags):
    """The results and the metrics of one run."""
    results, = call_main(ntp, *TINY, "--out-dir", tmp_path, *flags)
    lines = (Path(results["folder"]) / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_two_stages_take_normalised_steps_one_matrix_at_a_time(tmp_path, monkeypatch):
    path, models, step = [], [], torch.optim.SGD.step
    monkeypatch.setattr(ntp, "build", lambda args, build=ntp.build: (models.append(made := build(args)), made)[1])
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (step(self), path.append(
        [W.detach().clone() for W in models[0][1].parameters()]))[0])
    one_run(tmp_path, "--steps-ov", "7", "--steps", "5")
    assert len(path) == 12
    path = [[torch.zeros(6, 6).double()] * 2] + path
    for t, (before, after) in enumerate(zip(path, path[1:])):
        moved = [(b - a).norm().item() for a, b in zip(before, after)]
        expected = [0.2 / math.sqrt(6), 0.0] if t < 7 else [0.0, 0.05 / math.sqrt(6)]
        assert moved == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("optimizer, stages", [("ngd", "joint"), ("gd", "two"), ("adam", "two"), ("adam", "joint")])
def test_the_other_optimizers_learn_the_sentences_too(tmp_path, optimizer, stages):
    size = JOINT if stages == "joint" else TINY
    results, = call_main(ntp, *size, "--out-dir", tmp_path, "--optimizer", optimizer, "--stages", stages)
    assert results["accuracy"] == 1 and results["loss_kq"] < 0.05


def test_an_optimizer_is_added_in_one_place(tmp_path, monkeypatch):
    adagrad = ntp.Optimizer(torch.optim.Adagrad, False, lr_ov=0.5, lr=0.5)
    monkeypatch.setitem(ntp.OPTIMIZERS, "adagrad", adagrad)
    results, _ = one_run(tmp_path, "--optimizer", "adagrad", "--steps", "300")
    assert results["loss_ov"] < 0.1
    with pytest.raises(TypeError, match="'lr'"):                                 # an incomplete one says what is missing
        ntp.Optimizer(torch.optim.Adagrad, False, lr_ov=0.5)


def test_a_small_run_converges_as_the_theorems_say(tmp_path):
    results, _ = one_run(tmp_path, "--steps", "4000", "--steps-ov", "1000")
    assert results["loss_ov"] < 1e-6 and results["cosine_ov"] > 0.99 and results["cosine_kq"] > 0.98 and results["accuracy"] == 1
    assert results["norm_ov_rate"][1] > 0.999 and results["norm_kq_rate"][1] > 0.999
    assert results["loss_kq_rate"][0] < 0 and results["loss_kq_rate"][1] > 0.99 and results["exponent_kq"][0] < -0.3
    assert results["accuracy_decided"] == 1
    assert ntp.line_fit([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 1))


def test_with_uniform_weights_stage_1_is_aligned_by_symmetry(tmp_path):
    _, metrics = one_run(tmp_path, "--weights", "uniform", "--steps", "2")
    assert all(line["cosine_ov"] > 1 - 1e-9 for line in metrics)
    _, metrics = one_run(tmp_path, "--weights", "random", "--steps", "2")
    assert metrics[0]["cosine_ov"] < 0.95


def test_the_first_step_below_1e_3_is_found_and_outlives_a_checkpoint(tmp_path):
    results, metrics = one_run(tmp_path)
    first = results["steps_to_1e_3"]
    stage_2 = [line for line in metrics if line["stage"] == 2]
    assert 1 < first < 1500
    for line in stage_2:                                                         # the loss is measured after a step
        assert (line["loss_kq"] < 1e-3) == (line["t"] >= first)
    _, model = ntp.load(results["folder"])
    assert model.first == first


def test_weights_stand_still_where_the_norm_of_the_gradient_underflows(tmp_path, monkeypatch):
    models = []

    def tiny(model, *rest):
        models.append(model)
        loss, by_W_OV, by_W_KQ = gradients(model, *rest)
        return loss, 1e-170 * by_W_OV, 1e-170 * by_W_KQ          # their squares are 0

    gradients = ntp.gradients
    monkeypatch.setattr(ntp, "gradients", tiny)
    with pytest.raises(SystemExit):
        call_main(ntp, "--steps-ov", 5, "--steps", 5, "--device", "cpu", "--out-dir", tmp_path)
    assert models[-1].W_OV.abs().max() < 1e-10


def test_an_underflowing_gradient_ends_in_one_line_without_nan(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        one_run(tmp_path, "--lr-ov", "30", "--steps", "10")
    assert stop.value.code == 1 and "underflows at step" in capsys.readouterr().err
    path, = tmp_path.glob("*/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines and all(math.isfinite(value) for line in lines for value in line.values())
    assert not path.with_name("results.json").exists()


# ---- The command ------------------------------------------------------------------------------------------------------

def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    out = cut_and_continued(SCRIPT, tmp_path, [*TINY, "--steps", "400", "--optimizer", "adam"], "step 1:", "step 108:")
    assert "Theorems 1 and 2" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_trained_run_is_loaded_and_read_again(tmp_path, capsys):
    results, _ = one_run(tmp_path, "--steps", "400")
    task, model = ntp.load(results["folder"])
    assert not model.training
    prompt = torch.from_numpy(task.sentences[:1])
    logits, attn = model(prompt, return_attn=True)
    assert logits.shape == (1, 6) and attn.shape == (1, 3) and attn.sum().item() == pytest.approx(1)
    predicted = model(torch.from_numpy(task.sentences)).argmax(1).numpy()
    assert (predicted == task.next_tokens).mean() == results["accuracy"]
    again, _ = one_run(tmp_path, "--steps", "400")
    assert again == results and ": finished on" in capsys.readouterr().out


def test_a_group_without_sentences_is_left_out_of_the_median(capsys):
    args = ntp.parse_args(["--device", "cpu", "--seed", "0", "1"])
    runs = common.sweep(args, ntp.SWEEP, ntp.resolve)
    results = []
    for accuracy, first in (0.5, 10), (None, None):
        one = {key: [1.0, 1.0] if index is not None else 1.0 for _, _, key, index in ntp.SUMMARY}
        unseen = {f"{measure}_{group}": 0.25 for group in ntp.GROUPS for measure in ntp.MEASURES}
        results.append({**one, **unseen, "accuracy_extended": accuracy, "exact_chain": None, "steps_to_1e_3": first})
    ntp.print_summary(runs, results)
    ntp.print_unseen(runs, results)
    out = capsys.readouterr().out
    assert re.search(r"extension only +0\.250 +0\.500 +0\.250 +0\.250\n", out)  # not known for one seed
    assert re.search(r"\(chain\) +0\.250 +0\.250 +- +0\.250\n", out)             # for none
    assert re.search(r"L < 1e-3 +- \[10, -\]", out)                              # not reached by one seed


def test_a_sweep_trains_each_different_run_once(tmp_path, capsys):
    flags = write(tmp_path / "data", *PAIRS, "0 1 2 1", "1 0 2 1", "2 1 0 0")
    results = call_main(ntp, "--device", "cpu", "--out-dir", tmp_path / "out", "--steps-ov", 50, "--steps", 50, *flags)
    assert len(results) == 1
    capsys.readouterr()
    results = call_main(ntp, *TINY, "--steps", 30, "--order", "total", "partial", "--seed", 0, 1, "--out-dir", tmp_path / "out")
    out = capsys.readouterr().out
    assert len({r["folder"] for r in results}) == 4
    for setting in ("total orders", "partial orders"):                           # each setting's panels, not the first ones'
        assert f"{setting}, seed 0: stage 1" in out and f"{setting}, seed 0: stage 2" in out
    assert max(map(len, out.splitlines())) <= 100


def write(path, *lines):
    path.write_text("\n".join(lines))
    return ["--sentences", str(path)]


PAIRS = ["0 1", "1 2", "2 0"]


def test_sentences_from_a_file_are_trained(tmp_path):
    flags = write(tmp_path / "data", *PAIRS, "0 1 2 1", "1 0 2 1", "2 1 0 0")
    results, = call_main(ntp, "--device", "cpu", "--steps-ov", 300, "--steps", 800, "--out-dir", tmp_path / "out", *flags)
    assert results["accuracy"] == 1 and results["accuracy_truth"] is None
    task, _ = ntp.load(results["folder"])
    assert task.orders is None and task.sentences.tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0]]


FILES = [
    ([*PAIRS, "0 1 2 1", "0 1 2 2"], "query 2 put token 0 above itself"),
    ([*PAIRS, "0 1 x 1"], "line 4"),
    ([*PAIRS, "0"], "line 4"),
    ([*PAIRS, "0 -1 1"], "line 4"),
    ([*PAIRS, "0 1 2.0"], "line 4"),
    ([*PAIRS, "0 2", "0 1 2 1"], "line 4: 0 is followed by 1 and 2"),
    ([*PAIRS, "0 0 0 1"], "nothing to learn"),
    ([*PAIRS], "sentences of two tokens or more"),
    ([], "sentences of two tokens or more"),
    ([*PAIRS, "0 1 2", "0 1 2 1"], "all of one length"),
    (["0 1", "1 2", "0 1 2 1"], "2 has none"),
    ([*PAIRS, "0 1 999999999 1"], "3 has none"),
    ([*PAIRS, "0 1 9999999999999 1"], "line 4"),
    (["0 1", "1 1", "2 0", "0 1 2 1"], "tokens 0 and 1 are both followed by 1"),
    ([*PAIRS, "0 0 1 0"], "none gives 0"),
]


@pytest.mark.parametrize("lines, error", FILES)
def test_a_file_that_is_no_dataset_ends_in_one_line_with_nothing_written(tmp_path, capsys, lines, error):
    flags = write(tmp_path / "data", *lines)
    with pytest.raises(SystemExit) as stop:
        call_main(ntp, "--device", "cpu", *flags, "--out-dir", tmp_path / "out")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error in line and len(line) < 400
    assert not (tmp_path / "out").exists()


def test_mps_which_has_no_float64_is_not_picked(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ntp.parse_args([]).device == "cpu" == ntp.parse_args(["--device", "auto"]).device
    with pytest.raises(SystemExit) as stop:
        ntp.parse_args(["--device", "mps"])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "mps" in line


@pytest.mark.parametrize("where", ["max_margin_ov", "draw_dataset"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_interruptible_before_its_first_step(tmp_path, monkeypatch, where, number):
    usual, calls = getattr(ntp, where), []

    def interrupted(*args):
        calls.append(1)
        if where == "max_margin_ov" or len(calls) == 2:                          # the first call checks the arguments
            os.kill(os.getpid(), number)
        return usual(*args)
    monkeypatch.setattr(ntp, where, interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        one_run(tmp_path)
    assert stop.value.args[1] == 128 + number
    assert not list(tmp_path.glob("*/*/ckpt.pt"))


def commands():
    """The commands of the docstring."""
    lines = re.findall(r"^    python ntp_convergence.py(.*)", ntp.__doc__, re.M)
    return [line.partition("   ")[0] for line in lines]                          # what it shows stands three spaces away


def test_the_commands_of_the_docstring_parse_and_do_not_share_folders(tmp_path):
    assert len(commands()) == 8
    write(tmp_path / "data", *PAIRS, "0 1 2 1")
    trained = {}
    for line in commands():
        flags = [str(tmp_path / "data") if word == "FILE" else word for word in shlex.split(line)]
        flags = [word for word in flags if word != "--plot"]                     # trains the same, and wants matplotlib
        args = ntp.parse_args([*flags, "--device", "cpu"])
        for run in common.sweep(args, ntp.SWEEP, ntp.resolve):
            assert trained.setdefault(run.folder, run.config["settings"]) == run.config["settings"]
    assert len(trained) > 20


def test_every_flag_of_the_presets_is_there_and_paper_and_medium_differ_as_the_docstring_says():
    flags = vars(ntp.parse_args(["--device", "cpu"]))
    for name, preset in ntp.PRESETS.items():
        assert set(preset) - {"seed"} == set(ntp.PRESETS["quick"]) and set(preset) <= set(flags)
    assert ntp.parse_args(["--preset", "medium", "--device", "cpu"]).seed == list(range(10))
    assert ntp.parse_args(["--preset", "medium", "--device", "cpu", "--seed", "3"]).seed == [3]


def test_the_figure_is_drawn_with_every_setting(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda figure, runs, name, save=common.save_figure: (
        figures.append(figure), save(figure, runs, name)))
    results = call_main(ntp, *TINY, "--out-dir", tmp_path, "--plot", "--steps-ov", 120, "--steps", 120, "--order", "total", "partial", "--seed", 0, 1)
    path, = tmp_path.glob("ntp_convergence/fig2,*.png")
    assert path.stat().st_size > 10_000
    figure, = figures
    assert len(figure.axes) == 6
    for axis in figure.axes:
        solid = [line.get_label() for line in axis.lines if not line.get_label().startswith("fit")]
        assert solid == ["total orders", "partial orders"] and axis.get_xlabel() and axis.get_ylabel()
        assert sum(line.get_label().startswith("fit") for line in axis.lines) == 2
        assert len(axis.collections) == 2                                        # the range over seeds
    lines = [json.loads(line) for line in (Path(results[0]["folder"]) / "metrics.jsonl").read_text().splitlines()]
    both = [json.loads(line) for line in (Path(results[1]["folder"]) / "metrics.jsonl").read_text().splitlines()]
    last = (1 - lines[-1]["cosine_kq"] + 1 - both[-1]["cosine_kq"]) / 2          # the median of two
    assert figure.axes[4].lines[0].get_ydata()[-1] == pytest.approx(last)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11])
def test_quick_shows_the_theorems_on_a_seed_that_nothing_was_chosen_on(tmp_path, seed):
    results, = call_main(ntp, "--device", "cpu", "--out-dir", tmp_path, "--seed", seed)
    assert results["cosine_ov"] >= 0.99 and results["cosine_kq"] >= 0.99
    assert results["norm_ov_rate"][1] >= 0.999 and results["norm_kq_rate"][1] >= 0.999 and results["loss_kq_rate"][1] > 0.99
    assert results["accuracy"] == 1 and results["accuracy_decided"] == 1 and results["accuracy_extended"] > 0.9


@pytest.mark.slow
def test_gaussian_embeddings_converge_more_slowly(tmp_path):
    results, = call_main(ntp, "--device", "cpu", "--out-dir", tmp_path, "--order", "partial", "--embedding", "gaussian")
    lines = (Path(results["folder"]) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["cosine_ov"] < 0.8
    assert results["cosine_ov"] > 0.97 and results["cosine_kq"] > 0.97 and results["accuracy"] == 1
    assert results["accuracy_decided"] == 1 and results["norm_ov_rate"][1] > 0.999


# ---- What is trained on, measured and shown, once more in plain code --------------------------------------------------

def test_the_fit_of_a_line_is_least_squares_with_its_r_squared():
    assert ntp.line_fit([0, 1, 2, 3], [0, 1, 0, 1]) == pytest.approx((0.2, 0.2))
    t = np.arange(1.0, 1_001)
    parts = ntp.straight_parts(dict(t=t, loss=1 / t, total=1 / t, gap=1 / t, norm=t))
    begins = {name: x[0] for name, (x, y) in parts.items()}
    assert begins == pytest.approx({"norm": 1, "loss": 500, "gap": math.log(100)})
    rounding = 2e-16 * np.cos(t)                                                 # already aligned: nothing to fit
    parts = ntp.straight_parts(dict(t=t, loss=rounding, total=1 / t, gap=rounding, norm=t))
    assert len(parts["loss"][0]) == len(parts["gap"][0]) == 0


def test_each_label_of_the_tables_shows_its_own_number():
    quantities = {"|W": "norm", "log": "loss", "1 - ": "exponent", "alignment of": "cosine"}
    stage, above = "ov", None
    for label, _, key, index in ntp.SUMMARY[:17]:
        stage = "kq" if label.startswith("stage 2") else stage
        assert key == "accuracy" or stage in key
        if "R^2" in label:
            assert (key, index) == (above, 1)                                    # of the line above
            continue
        above = key
        assert index == (0 if "a step" in label or "t^" in label else None)
        for start, quantity in quantities.items():
            assert not label.startswith(start) or key.startswith(quantity)
    assert [key for _, _, key, _ in ntp.SUMMARY[17:]] == ["steps_to_1e_3"]
    assert {label: key for _, label, key, _ in ntp.PANELS} == {
        "L_0": "loss_ov", "cosine W_OV": "cosine_ov", "|W_OV|": "norm_ov", "L": "loss_kq", "L - L_min": "excess",
        "cosine W_KQ": "cosine_kq", "|W_KQ|": "norm_kq", "accuracy": "accuracy"}


def test_joint_training_moves_w_ov_by_pairs_and_sentences(tmp_path):
    flags = ["--steps", 1, "--optimizer", "gd", "--stages", "joint", "--lr-ov", 1, "--out-dir", tmp_path]
    result, = call_main(ntp, *JOINT, *flags)
    task, model = ntp.load(result["folder"])
    fresh, data = ntp.OneLayer(model.E), task.tensors("cpu")
    of_pairs = F.cross_entropy(fresh(torch.arange(6)[:, None]), data.collocation, reduction="none")
    loss = data.weights @ of_pairs + F.cross_entropy(fresh(data.sentences), data.next_tokens)
    loss.backward()
    torch.testing.assert_close(model.W_OV.data, -fresh.W_OV.grad / math.sqrt(6))
