r"""
Non-asymptotic Convergence of Training Transformers for Next-token Prediction. Huang, Liang, Yang. NeurIPS 2024,
arXiv 2409.17335. The paper has no public code: the definitions that the experiment needs stand in this file.

On a realizable dataset, where query-dependent partial orders decide which token of a sentence the next one follows, a
one-layer transformer is trained by two-stage normalised gradient descent. Each matrix converges in direction to its
max-margin solution at a sub-linear rate, its norm grows linearly and the loss falls to its minimum at a linear rate
(Theorems 1, 2); and the model predicts sentences that it never saw, by an order that extends the data's (Theorem 3).

What to look for: both alignments go to 1, 1 - alignment like a power of the step; both norms are straight lines; log L_0
and log(L - L_min) end as straight lines (L itself ends at L_min); accuracy on unseen sentences is 1 where the training
data decide the answer, near 1 where only the extended order does (orthonormal embeddings), lower where neither does.

The paper's in the preset: |V| = d = 20 and the two step sizes of normalised gradient descent. Ours, where the paper leaves
it open or we do not know it: the numbers of steps, 200 sentences of 5 tokens, the random weights of the pairs in stage 1
(with equal ones, orthonormal embeddings are aligned from the first step), the step sizes of the other optimizers.

    python ntp_convergence.py                                       the paper's run, Fig. 2 as rows of numbers
    python ntp_convergence.py --plot                                Fig. 2 as six panels
    python ntp_convergence.py --seed 0 1 2 3 4 5 6 7 8 9            median and range
    python ntp_convergence.py --order total partial --embedding orthonormal gaussian
    With and without the normalisation and the two stages:
    python ntp_convergence.py --optimizer ngd gd adam --stages two joint
    Your own data, token ids, each line a sentence and its next token:
    python ntp_convergence.py --sentences FILE
"""
import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The data (Sec. 3, Assumption 1): collocations, and a strict partial order for each query -----------------------
def make_orders(vocab_size, kind, rng):
    """A strict order for each query: (V, V, V) bool, [q, a, b] where a >_q b. total: a random permutation for each q;
    partial: each pair of it kept with probability 1/4, and closed transitively."""
    V = vocab_size
    rank = np.argsort(rng.random((V, V)), axis=1)                                # (V, V): rank of each token by query
    orders = rank[:, :, None] > rank[:, None, :]
    return orders if kind == "total" else closure(orders & (rng.random((V, V, V)) < 0.25))

def closure(orders):
    """Transitive closure of each relation of (..., V, V), by squaring."""
    for _ in range(max(1, (orders.shape[-1] - 1).bit_length())):
        orders = orders | (orders.astype(np.float32) @ orders.astype(np.float32) > 0)
    return orders

def optimal_token(sentences, orders):
    """The token of each sentence (N, L) that every other distinct one is below, by its query's order; -1: none."""
    query = sentences[:, -1]
    best = sentences[:, 0]
    for token in sentences.T[1:]:                        # whoever is above all others wins when its turn comes, and stays
        best = np.where(orders[query, token, best], token, best)                                       # (N,)
    above = orders[query[:, None], best[:, None], sentences]                                           # (N, L)
    above_all = (above | (sentences == best[:, None])).all(1)
    return np.where(above_all, best, -1)

def draw_sentences(n, length, orders, rng, tries=1_000):
    """Random sentences (n, L), repeats allowed, that have an optimal token; and that token (n,). Fewer than n, where
    `tries` random sentences for each do not give n: with partial orders, a long one seldom has an optimal token."""
    found = np.empty((0, length), dtype=np.int64)
    for _ in range(tries // 4):
        sentences = rng.integers(len(orders), size=(4 * n, length))
        found = np.concatenate([found, sentences[optimal_token(sentences, orders) >= 0]])
        if len(found) >= n:
            break
    return found[:n], optimal_token(found[:n], orders)

def make_dataset(vocab_size, n_sentences, length, seed, order="total", return_orders=False):
    """A realizable dataset: sentences (N, L), next_tokens (N,), collocation (V,), optimal (N,), int64 arrays.

    The last token of a sentence is its query q; its optimal token x* is above all others by >_q; the next token is
    n(x*), n the collocation, an injective map. With return_orders also the orders (V, V, V). ValueError: V or L below 2,
    or an order so sparse that less than one sentence in a thousand has an optimal token.
    """
    if vocab_size < 2 or length < 2:
        raise ValueError(f"nothing to learn with a vocabulary of {vocab_size} and sentences of {length} (2 at least)")
    rng = np.random.default_rng(seed)
    collocation, orders = rng.permutation(vocab_size), make_orders(vocab_size, order, rng)
    sentences, optimal = draw_sentences(n_sentences, length, orders, rng)
    if len(sentences) < n_sentences:
        raise ValueError(f"of {1_000 * n_sentences} random sentences of {length} tokens only {len(sentences)} have an optimal "
                         f"token by the {order} orders of seed {seed}: take shorter ones, a larger vocabulary or total orders")
    dataset = sentences, collocation[optimal], collocation, optimal
    return (*dataset, orders) if return_orders else dataset

def said_orders(sentences, optimal, vocab_size):
    """What the sentences say: (V, V, V) bool, [q, a, b] where a is optimal in a sentence with b and query q."""
    said = np.zeros((vocab_size,) * 3, dtype=bool)
    said[sentences[:, -1:], optimal[:, None], sentences] = True
    tokens = np.arange(vocab_size)
    said[:, tokens, tokens] = False                                              # x* is not above itself
    return said

def implied_orders(sentences, optimal, vocab_size):
    """What the sentences say and imply: (V, V, V) bool, [q, a, b] where a >_q b in the transitive closure."""
    return closure(said_orders(sentences, optimal, vocab_size))

def extended_orders(sentences, optimal, vocab_size):
    """What Theorem 3 adds to implied_orders, as we understand it: (V, V, V) bool. For each query, the tokens that are
    optimal in some sentence are above those it was never seen with, and these above those seen and never optimal."""
    seen = np.zeros((vocab_size, vocab_size), dtype=bool)                        # (query, token)
    seen[sentences[:, -1:], sentences] = True
    once_optimal = np.zeros_like(seen)
    once_optimal[sentences[:, -1], optimal] = True
    never_optimal = seen & ~once_optimal
    above_unseen = once_optimal[:, :, None] & ~seen[:, None, :]
    below_unseen = ~seen[:, :, None] & never_optimal[:, None, :]
    return closure(implied_orders(sentences, optimal, vocab_size) | above_unseen | below_unseen)

def check_realizable(sentences, next_tokens, collocation):
    """The optimal tokens (N,) of a realizable dataset, however it was made. ValueError says what makes it not one:
    a collocation that is not injective, a next token that no token of the sentence gives, or a cycle in an order."""
    given = {}
    for v, n in enumerate(collocation):
        if given.setdefault(int(n), v) != v:
            raise ValueError(f"not realizable: tokens {given[int(n)]} and {v} are both followed by {n}")
    optimal = []
    for i, (x, n) in enumerate(zip(sentences, next_tokens)):
        if given.get(int(n)) not in x:
            raise ValueError(f"not realizable: no token of sentence {i}, {list(map(int, x))}, is followed by {n}")
        optimal.append(given[int(n)])
    for q in np.unique(sentences[:, -1]):
        below = {}                                                               # what the sentences put under a token
        for x, best in zip(sentences, optimal):
            if x[-1] == q:
                below.setdefault(best, set()).update(set(map(int, x)) - {best})
        done = set()
        def visit(token, path):
            if token in path:
                cycle = " > ".join(map(str, path[path.index(token):] + [token]))
                raise ValueError(f"not realizable: the sentences with query {q} say {cycle}")
            for other in sorted(below.get(token, ())) if token not in done else ():
                visit(other, path + [token])
            done.add(token)
        for token in sorted(below):
            visit(token, [])
    return np.array(optimal)

def read_dataset(path):
    """Token ids, a line a sentence and its next token; lines of two give the collocation. ValueError names the line."""
    rows = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
    for i, row in enumerate(rows, 1):
        if len(row) < 2 or not all(word.isdecimal() for word in row):
            raise ValueError(f"line {i}: give token ids 0, 1, ..., the sentence and its next token")
    rows = [list(map(int, row)) for row in rows]
    pairs, longer = dict(row for row in rows if len(row) == 2), [row for row in rows if len(row) > 2]
    tokens = {token for row in rows for token in row}
    if not longer or len({len(row) for row in longer}) > 1:
        raise ValueError("give sentences of two tokens or more, all of one length, each with its next token")
    if sorted(tokens) != list(range(len(tokens))) or set(pairs) != tokens:
        missing = sorted((tokens | set(range(max(tokens)))) - set(pairs))
        raise ValueError(f"every token needs a line with what follows it alone; none for {missing[:5]}")
    collocation, longer = np.array([pairs[v] for v in range(len(pairs))]), np.array(longer)
    return longer[:, :-1], longer[:, -1], collocation, check_realizable(longer[:, :-1], longer[:, -1], collocation)

# ---- The model (Sec. 3) ---------------------------------------------------------------------------------------------
class OneLayer(nn.Module):
    """logits(X) = W_OV X softmax(X^T W_KQ x_q): W_OV (V, d) and W_KQ (d, d) from zero, float64; x_q is X's last token."""

    def __init__(self, embedding):
        super().__init__()
        d, V = embedding.shape
        self.register_buffer("E", embedding)                                     # (d, V)
        self.W_OV = nn.Parameter(torch.zeros(V, d, dtype=torch.float64))
        self.W_KQ = nn.Parameter(torch.zeros(d, d, dtype=torch.float64))
        self.register_buffer("first", torch.tensor(-1))                          # the first step with a loss below 1e-3

    def forward(self, sentences):
        """sentences (N, L) -> logits (N, V), attention (N, L), the V x V table of each token's logits."""
        table = (self.W_OV @ self.E).mT                                          # (V, V): row x is W_OV x
        scores = self.E.mT @ self.W_KQ @ self.E                                  # (V, V): x^T W_KQ q
        attn = scores[sentences, sentences[:, -1:]].softmax(-1)                  # (N, L)
        return (attn.unsqueeze(1) @ table[sentences]).squeeze(1), attn, table

def loss_and_residual(logits, next_tokens):
    """Cross-entropy of each row (N,), and its gradient by the logits (N, V), softmax - one_hot. Nothing cancels where the
    loss is tiny: with z = log sum_{u != y} e^(l_u) - l_y, the loss is log(1 + e^z) and 1 - p_y is sigmoid(z)."""
    here = F.one_hot(next_tokens, logits.shape[1]).bool()
    others = logits.masked_fill(here, -math.inf)
    z = others.logsumexp(1, keepdim=True) - logits.gather(1, next_tokens[:, None])                     # (N, 1)
    return F.softplus(z).squeeze(1), (others.softmax(1) - here.double()) * z.sigmoid()

@torch.no_grad()
def gradients(model, sentences, next_tokens, weights):
    """The cross-entropy, weights (N,) that sum to 1, and its gradients by W_OV and W_KQ, in closed form."""
    logits, attn, table = model(sentences)
    losses, residual = loss_and_residual(logits, next_tokens)
    residual = residual * weights[:, None]                                       # (N, V)
    mixture = torch.zeros_like(logits).scatter_add_(1, sentences, attn)          # (N, V): attention by token
    by_attn = (table[sentences] @ residual[:, :, None]).squeeze(2)               # (N, L)
    by_scores = attn * (by_attn - (attn * by_attn).sum(1, keepdim=True))         # (N, L)
    most = attn.argmax(1, keepdim=True)                                          # its entry is minus the others': exact
    by_scores = by_scores.scatter_add(1, most, -by_scores.sum(1, keepdim=True))
    V = logits.shape[1]
    by_pair = torch.zeros(V * V, dtype=attn.dtype, device=attn.device)           # (token, query)
    by_pair = by_pair.index_add(0, (sentences * V + sentences[:, -1:]).flatten(), by_scores.flatten()).view(V, V)
    return weights @ losses, residual.mT @ mixture @ model.E.mT, model.E @ by_pair @ model.E.mT

# ---- Max-margin solutions (Sec. 4) ----------------------------------------------------------------------------------
def max_margin(A, tolerance=1e-12):
    """argmin |w| subject to A w >= 1, for A (m, n): w (n,) and the multipliers l (m,), w = A^T l, l >= 0.

    Least distance programming (Lawson and Hanson 1974, ch. 23): u >= 0 that minimises |A^T u|^2 + (1 - sum u)^2 gives
    l = u / (1 - sum u). Active set: add the most violated constraint, solve for those held with equality, drop what turns
    negative. ValueError where no w meets all constraints.
    """
    G, u, held = A @ A.T + 1, np.zeros(len(A)), np.zeros(len(A), dtype=bool)
    for _ in range(10 * len(A)):
        slack = np.where(held, 0.0, G @ u - 1)
        if slack.min() > -tolerance:
            break
        held[slack.argmin()] = True
        while True:
            solution = np.zeros(len(A))
            solution[held] = np.linalg.solve(G[np.ix_(held, held)], np.ones(held.sum()))
            down = held & (solution <= 0)
            if not down.any():
                break
            u = u + (u[down] / (u[down] - solution[down])).min() * (solution - u)
            held &= ~down | (u > 1e-15)
        u = solution
    l = u / max(1 - u.sum(), 1e-12)
    if (A @ (A.T @ l)).min() < 1 - 1e-6:
        raise ValueError("no max-margin solution: the constraints cannot all be met")
    return A.T @ l, l

def max_margin_matrix(differences, queries, embedding):
    """argmin |W|_F subject to differences[i]^T W x_queries[i] >= 1, for (m, a) and (m,): W (a, d)."""
    if np.allclose(embedding.T @ embedding, np.eye(len(embedding.T))):           # orthonormal: W = sum_q w_q x_q^T, and
        W = np.zeros((differences.shape[1], len(embedding)))                     # each w_q has its own constraints
        for q in np.unique(queries):
            w, _ = max_margin(differences[queries == q])
            W += np.outer(w, embedding[:, q])
        return W
    x = embedding[:, queries].T                                                  # (m, d)
    A = differences[:, :, None] * x[:, None, :]                                  # (m, a, d)
    return max_margin(A.reshape(len(A), -1))[0].reshape(A.shape[1:])

def max_margin_ov(embedding, collocation):
    """W_OV* (V, d) for an embedding (d, V): (e_n(v) - e_u)^T W x_v >= 1 for each v and all u != n(v). With an
    orthonormal embedding it is sum_v (e_n(v) - 1/V) x_v^T."""
    V = len(collocation)
    one_hot = np.eye(V)
    v, u = np.nonzero(one_hot[collocation] == 0)                                 # all pairs with u != n(v)
    return max_margin_matrix(one_hot[collocation[v]] - one_hot[u], v, np.asarray(embedding))

def max_margin_kq(embedding, sentences, optimal):
    """W_KQ* (d, d) for an embedding (d, V), sentences (N, L) and their optimal tokens (N,): (x* - x)^T W x_q >= 1 for
    each sentence, each other distinct token x in it."""
    E = np.asarray(embedding)
    query, best, other = np.nonzero(said_orders(sentences, optimal, E.shape[1]))                       # (m,) each
    return max_margin_matrix((E[:, best] - E[:, other]).T, query, E)

# ---- Training (Algorithm 1) -----------------------------------------------------------------------------------------
def get_dataset(args, order, seed):
    """A run's dataset and its true orders (None for a file). ValueError or OSError where it cannot be had."""
    if args.sentences:
        dataset, orders = read_dataset(args.sentences), None
    else:
        size = args.vocab_size, args.n_sentences, args.seq_len
        *dataset, orders = make_dataset(*size, seed, order, return_orders=True)
    sentences = dataset[0]
    if (sentences == sentences[:, -1:]).all():
        raise ValueError("each sentence repeats one token, so that the attention has nothing to learn: take more of them")
    return dataset, orders

def build(args):
    """A run's dataset, its true orders (None for a file), its model, and weights of the collocation pairs (V,)."""
    rng = np.random.default_rng(args.seed + 10_000)
    dataset, orders = get_dataset(args, args.order, args.seed)
    V = len(dataset[2])
    E = rng.standard_normal((V, V)) / math.sqrt(V)
    E = np.linalg.qr(E)[0] if args.embedding == "orthonormal" else E
    weights = rng.exponential(size=V) if args.weights == "random" else np.ones(V)
    return dataset, orders, OneLayer(torch.from_numpy(E)).to(args.device), weights / weights.sum()

def marks(stop):
    """The steps to measure at: some log-spaced, some evenly spaced, the last one."""
    return {round(t) for t in [*np.geomspace(1, stop, 25), *np.linspace(0, stop, 26)[1:]]}

def train(args, run):
    """One run of the sweep: stage 1 on the pairs, stage 2 on the sentences, or both jointly. Returns its results."""
    dataset, orders, model, weights = build(args)
    sentences, next_tokens, collocation, optimal = data = [torch.from_numpy(x).to(args.device) for x in dataset]
    V, weights = len(collocation), torch.from_numpy(weights).to(args.device)
    single = torch.arange(V, device=args.device)[:, None]                        # the one-token sentences (V, 1)
    uniform = torch.full((len(sentences),), 1 / len(sentences), dtype=torch.float64, device=args.device)
    best = solutions(model, dataset)
    groups = [{"params": model.W_OV, "lr": args.lr_ov / math.sqrt(V)}, {"params": model.W_KQ, "lr": args.lr / math.sqrt(V)}]
    optimizer = torch.optim.Adam(groups) if args.optimizer == "adam" else torch.optim.SGD(groups)
    start = run.restore(model=model, optimizer=optimizer)
    stage_1 = args.steps_ov if args.stages == "two" else 0                       # its length
    measured = marks(stage_1) if stage_1 else set()
    measured |= {stage_1 + t for t in marks(args.steps)}

    for step in run.steps(start, stage_1 + args.steps):
        model.W_OV.grad = model.W_KQ.grad = None
        if step < stage_1 or args.stages == "joint":
            _, model.W_OV.grad, _ = gradients(model, single, collocation, weights)
        if step >= stage_1:
            loss, by_OV, model.W_KQ.grad = gradients(model, sentences, next_tokens, uniform)
            model.first = torch.where((model.first < 0) & (loss < 1e-3), step - stage_1, model.first)
            if args.stages == "joint":
                model.W_OV.grad += by_OV
        if args.optimizer == "ngd":                                              # normalised gradient descent
            for W in (model.W_OV, model.W_KQ):
                if W.grad is not None:
                    W.grad /= W.grad.norm().clamp_min(1e-300)
        optimizer.step()
        if step + 1 in measured:
            stage = 0 if args.stages == "joint" else 1 + (step >= stage_1)
            now = measure(model, data, weights, best)
            if min(now["gradient_ov"] if stage < 2 else 1, now["gradient_kq"] if stage != 1 else 1) < 1e-290:
                common.fail(f"{run.name}: the gradient underflows at step {step + 1}, its direction is lost; take fewer")
            loss, t = now["loss_ov" if stage == 1 else "loss_kq"], step + 1 - stage_1 * (stage == 2)
            run.log(step + 1, loss=loss, accuracy=now.pop("accuracy"), stage=stage, t=t, **now)
            run.save(step + 1)

    last = {key: run.metrics[-1][key] for key in ("loss_ov", "loss_kq", "accuracy", "cosine_ov", "cosine_kq")}
    first = None if model.first < 0 else int(model.first)
    return dict(**last, **rates(run.metrics), **generalisation(args, model, dataset, orders), steps_to_1e_3=first)

# ---- Measurement ----------------------------------------------------------------------------------------------------
def solutions(model, dataset):
    """Both max-margin solutions for a run's dataset, on the model's device: W_OV* (V, d), W_KQ* (d, d)."""
    E, (sentences, _, collocation, optimal) = model.E.cpu(), dataset
    return [torch.from_numpy(W).to(model.E) for W in (max_margin_ov(E, collocation), max_margin_kq(E, sentences, optimal))]

@torch.no_grad()
def measure(model, data, weights, best):
    """The quantities of Fig. 2: losses in nats, cosines with the max-margin solutions, Frobenius norms; excess is
    L - L_min, L_min the loss of a hard attention to x* with the present W_OV; and the norms of both gradients."""
    sentences, next_tokens, collocation, optimal = data
    uniform = torch.full((len(sentences),), 1 / len(sentences)).to(weights)
    single = torch.arange(len(collocation), device=weights.device)[:, None]
    loss_ov, by_OV, _ = gradients(model, single, collocation, weights)
    loss_kq, _, by_KQ = gradients(model, sentences, next_tokens, uniform)
    logits, _, table = model(sentences)
    hard = loss_and_residual(table[optimal], next_tokens)[0]
    soft = loss_and_residual(logits, next_tokens)[0]
    cosines = [((W * W_best).sum() / W.norm().clamp_min(1e-300) / W_best.norm()).item()
               for W, W_best in zip((model.W_OV, model.W_KQ), best)]
    return dict(loss_ov=loss_ov.item(), cosine_ov=cosines[0], norm_ov=model.W_OV.norm().item(),
                loss_kq=loss_kq.item(), excess=(soft - hard).mean().item(), cosine_kq=cosines[1],
                norm_kq=model.W_KQ.norm().item(), accuracy=(logits.argmax(1) == next_tokens).double().mean().item(),
                gradient_ov=by_OV.norm().item(), gradient_kq=by_KQ.norm().item())

def line_fit(x, y):
    """Least squares y = a x + b: slope a and R^2; None, None for fewer than 3 points."""
    if len(x) < 3:
        return None, None
    x, y = np.array(x, dtype=float), np.array(y)
    slope, offset = np.polyfit(x, y, 1)
    total = ((y - y.mean())**2).sum()
    return float(slope), float(1 - ((y - slope * x - offset)**2).sum() / total) if total > 0 else 1.0

def rates(metrics):
    """Theorems 1 and 2 as fits, each a slope and its R^2: for each stage the norm against t, log loss against t over the
    second half of the steps, its straight part, and log(1 - cosine) against log t from t = 100."""
    found = {}
    for stage, name, loss in (1, "ov", "loss_ov"), (2, "kq", "excess"):
        lines = [m for m in metrics if m["stage"] in (0, stage)]
        half = [m for m in lines if m["t"] >= lines[-1]["t"] / 2 and m[loss] > 1e-12 * m[f"loss_{name}"]]      # no noise
        late = [m for m in lines if m["t"] >= 100 and m[f"cosine_{name}"] < 1]
        gaps = [math.log(1 - m[f"cosine_{name}"]) for m in late]
        found[f"norm_{name}"] = line_fit([m["t"] for m in lines], [m[f"norm_{name}"] for m in lines])
        found[f"loss_{name}_rate"] = line_fit([m["t"] for m in half], [math.log(m[loss]) for m in half])
        found[f"exponent_{name}"] = line_fit([math.log(m["t"]) for m in late], gaps)
    return {key: list(value) for key, value in found.items()}

def generalisation(args, model, dataset, orders, n=20_000):
    """Theorem 3: unseen sentences in three groups, by what gives their optimal token: the training sentences' transitive
    closure, only its extension (extended_orders), or neither. Of each the share, the accuracy by what gives the token, and
    the accuracy by the true orders; of the extension's also the accuracy where its token is below another in no training
    sentence with this query. None: there are no such sentences, or (a file) no true orders."""
    sentences, _, collocation, optimal = dataset
    V, rng = len(collocation), np.random.default_rng(args.seed + 20_000)
    if orders is None:
        unseen, truth = rng.integers(V, size=(n, sentences.shape[1])), np.full(n, -1)
    else:
        unseen, truth = draw_sentences(n, sentences.shape[1], orders, rng, tries=100)
    seen = {tuple(x) for x in sentences.tolist()}
    new = np.array([tuple(x) not in seen for x in unseen.tolist()])
    unseen, truth = unseen[new], truth[new]
    implied = implied_orders(sentences, optimal, V)
    by_data = optimal_token(unseen, implied)
    by_extension = optimal_token(unseen, extended_orders(sentences, optimal, V))
    with torch.no_grad():
        logits, _, _ = model(torch.from_numpy(unseen).to(model.E.device))
    predicted = logits.argmax(1).cpu().numpy()

    decided = by_data >= 0
    extended = ~decided & (by_extension >= 0)
    undecided = by_extension < 0
    on_top = ~implied.any(1)[unseen[:, -1], by_extension]                        # below no other, for this query
    known = truth >= 0

    def accuracy(group, token):
        return float((predicted == collocation[token])[group].mean()) if group.any() else None

    return dict(share_decided=float(decided.mean()), accuracy_decided=accuracy(decided, by_data),
                share_extended=float(extended.mean()), accuracy_extended=accuracy(extended, by_extension),
                accuracy_on_top=accuracy(extended & on_top, by_extension), true_extended=accuracy(extended & known, truth),
                share_undecided=float(undecided.mean()), true_undecided=accuracy(undecided & known, truth))

# ---- The command, its tables and its figure -------------------------------------------------------------------------
RUN = dict(optimizer=["ngd"], stages=["two"], order=["total"], embedding=["orthonormal"], weights=["random"],
           vocab_size=20, n_sentences=200, seq_len=5, steps_ov=2_000, steps=20_000, eval_every=None,
           lr_ov=dict(ngd=0.2, gd=40.0, adam=0.05), lr=dict(ngd=0.05, gd=40.0, adam=0.05))
PRESETS = {"quick": RUN, "paper": RUN}                                           # the paper's run takes seconds
SWEEP = ["optimizer", "stages", "order", "embedding", "weights", "seed"]

def parse_args(argv=None):
    """The command line. What cannot be run ends here, before anything is written."""
    parser = argparse.ArgumentParser(
        description="Non-asymptotic Convergence of Training Transformers for Next-token Prediction, Huang et al., "
        "NeurIPS 2024", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, count = parser.add_argument, common.positive_int
    add("--vocab-size", type=count, help="|V|, tokens; also d, the width of the embedding")
    add("--n-sentences", type=count, help="training sentences (200 is our choice)")
    add("--seq-len", type=count, help="L, tokens of a sentence (5 is our choice)")
    add("--order", nargs="+", choices=["total", "partial"], help="the strict order of each query")
    add("--embedding", nargs="+", choices=["orthonormal", "gaussian"], help="orthonormal or independent embeddings")
    add("--weights", nargs="+", choices=["random", "uniform"],
        help="of the pairs in stage 1, random is our choice: with uniform ones and an orthonormal embedding W_OV is aligned from "
        "the first step, by symmetry")
    add("--sentences", default=None, help="a file, each line the token ids of a sentence and of its next token")
    add("--optimizer", nargs="+", choices=["ngd", "gd", "adam"], help="normalised gradient descent, plain, or Adam")
    add("--stages", nargs="+", choices=["two", "joint"], help="W_OV first, then W_KQ; or both at once")
    add("--steps-ov", type=count, help="steps of stage 1 (our choice)")
    add("--steps", type=count, help="steps of stage 2, or of the joint training (our choice)")
    add("--lr-ov", type=float, help="times 1/sqrt(d): the step size eta_0 of W_OV")
    add("--lr", type=float, help="times 1/sqrt(d): the step size eta of W_KQ")
    add("--seed", nargs="+", type=int, default=[0], help="seeds of the data")
    args = common.parse_args(parser, PRESETS, argv)
    if args.compile or args.dtype != "float32":
        parser.error("everything is float64 in closed form here: leave out --compile and --dtype")
    if args.eval_every:
        parser.error("measured at log-spaced and evenly spaced steps: leave out --eval-every")
    if args.device == "mps" and parser.parse_args(argv).device == "auto":
        args.device = "cpu"                                                      # mps has no float64
    if args.device == "mps":
        parser.error("--device mps has no float64; try --device cpu")
    try:
        for order, seed in itertools.product(args.order, args.seed):
            get_dataset(args, order, seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args

PANELS = {1: dict(loss_ov="L_0", cosine_ov="cosine W_OV", norm_ov="|W_OV|"),
          2: dict(loss_kq="L", excess="L - L_min", cosine_kq="cosine W_KQ", norm_kq="|W_KQ|", accuracy="accuracy")}

def print_panels(run):
    """Fig. 2 of one run: each panel a row of numbers at log-spaced steps."""
    metrics = run.read("metrics.jsonl")
    for stage, panels in PANELS.items():
        lines = [m for m in metrics if m["stage"] in (0, stage)]
        t = np.array([m["t"] for m in lines])
        shown = [lines[i] for i in sorted({int(np.abs(t - goal).argmin()) for goal in np.geomspace(1, t[-1], 10)})]
        print(f"\n{run.name}, {'both stages jointly' if lines[0]['stage'] == 0 else f'stage {stage}'}")
        rows = [[title, *(f"{m[key]:{'.4f' if 'cosine' in key else '.3g'}}" for m in shown)] for key, title in panels.items()]
        common.print_table(["step", *(str(m["t"]) for m in shown)], rows)

def print_summary(runs, results):
    """What the theorems say, a column a setting: median and range over seeds."""
    settings = {}
    for run, result in zip(runs, results):
        settings.setdefault(" ".join(str(vars(run.args)[key]) for key in SWEEP[:-1]), []).append(result)
    def row(title, form, key, i=None):
        return [title, *(common.spread([r[key] if i is None else r[key][i] for r in group], form) for group in settings.values())]
    rows = [row("stage 1: L_0", ".1e", "loss_ov"), row("alignment of W_OV", ".4f", "cosine_ov"),
            row("|W_OV| a step", ".4f", "norm_ov", 0), row("  R^2", ".5f", "norm_ov", 1),
            row("log L_0 a step, second half", ".5f", "loss_ov_rate", 0), row("  R^2", ".4f", "loss_ov_rate", 1),
            row("1 - alignment ~ t^", ".2f", "exponent_ov", 0), row("  R^2", ".4f", "exponent_ov", 1),
            row("stage 2: L", ".1e", "loss_kq"), row("training accuracy", ".3f", "accuracy"),
            row("alignment of W_KQ", ".4f", "cosine_kq"),
            row("|W_KQ| a step", ".4f", "norm_kq", 0), row("  R^2", ".5f", "norm_kq", 1),
            row("log(L - L_min) a step, second half", ".5f", "loss_kq_rate", 0), row("  R^2", ".4f", "loss_kq_rate", 1),
            row("1 - alignment ~ t^", ".2f", "exponent_kq", 0), row("  R^2", ".4f", "exponent_kq", 1),
            row("steps of stage 2 to L < 1e-3", ".0f", "steps_to_1e_3"),
            row("unseen, decided by the data: share", ".3f", "share_decided"), row("  accuracy", ".4f", "accuracy_decided"),
            row("by their extension only: share", ".3f", "share_extended"), row("  accuracy", ".4f", "accuracy_extended"),
            row("  accuracy, x* never below another", ".4f", "accuracy_on_top"),
            row("  accuracy by the true orders", ".3f", "true_extended"),
            row("undecided: share", ".3f", "share_undecided"), row("  accuracy by the true orders", ".3f", "true_undecided")]
    print("\nTheorems 1, 2 and 3, measured (median [range] over seeds)")
    common.print_table(["", *settings], rows)

def plot(run, path):
    """Fig. 2: loss, alignment and norm of both stages."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    metrics = run.read("metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5))
    for row, stage, loss, name in zip(axes, (1, 2), ("loss_ov", "excess"), ("ov", "kq")):
        lines = [m for m in metrics if m["stage"] in (0, stage)]
        for axis, key, scale in zip(row, (loss, f"cosine_{name}", f"norm_{name}"), ("semilogy", "semilogx", "plot")):
            getattr(axis, scale)([m["t"] for m in lines], [m[key] for m in lines], marker=".")
            axis.set(title=f"stage {stage}: {PANELS[stage][key]}", xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")

def main():
    """Trains what the flags ask for, prints the tables."""
    args = parse_args()
    runs = common.sweep(args, PRESETS, SWEEP)
    results = common.complete(runs, train)
    for run in runs[:4]:
        if run.args.seed == args.seed[0]:
            print_panels(run)
    print_summary(runs, results)
    if args.plot:
        plot(runs[0], Path(args.out_dir) / "ntp_convergence" / "fig2.png")

if __name__ == "__main__":
    main()
