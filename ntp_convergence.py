r"""
Non-asymptotic Convergence of Training Transformers for Next-token Prediction.
Huang, Liang, Yang. NeurIPS 2024, arXiv 2409.17335. The paper has no public code.

In a realizable dataset each query has an order on the tokens, and the one token x* of a sentence
that is above all the others in it decides what follows. A one-layer transformer trained on it by
two-stage normalised gradient descent converges: each matrix, in direction, to its max-margin
solution at a sub-linear rate, its norm growing linearly; the loss to its minimum at a linear rate
(Theorems 1, 2). And it predicts unseen sentences, by an order that extends the data's (Theorem 3).

What to look for: both alignments pass 0.99, and 1 - alignment falls roughly like a power of the
step; both norms are straight lines; log L_0 and log(L - L_min) end as straight lines (L itself
ends at L_min); accuracy on unseen sentences is 1 if the data decide the answer.

If only the extended order does, it is 1 for data of two levels (--order two-level: with each query,
a token is always optimal or never). Random total orders have chains a > b > c: b is optimal in one
sentence and beaten in another. With chains the exact W_KQ* itself has ties and errors: of a > b,
b > d, a > c it gives a, b, c, d the scores 1, 0, 0, -1, so that b and c tie with tokens that the
data do not compare. Its accuracy stands beside the trained model's, ties counted as wrong.

|V| = d = 20 and the step sizes of normalised gradient descent are the paper's. The numbers of
steps, 200 sentences of 5 tokens, random weights of the pairs in stage 1 (with equal ones, W_OV is
aligned from the first step) and the step sizes of the other optimizers are ours.

    python ntp_convergence.py                          Fig. 2 as rows of numbers
    python ntp_convergence.py --preset medium --plot   Fig. 2, ten seeds
    python ntp_convergence.py --preset paper --plot    Fig. 2, one seed
    python ntp_convergence.py --order total partial two-level      Theorem 3: unseen sentences
    python ntp_convergence.py --order total partial --embedding orthonormal gaussian
    python ntp_convergence.py --embedding gaussian --steps-ov 5000 --steps 60000
    python ntp_convergence.py --optimizer ngd gd adam --stages two joint
    python ntp_convergence.py --sentences FILE         your own data: a line n(0) n(1) ..., that is,
        what follows each token; then lines of one length, a sentence and its next token

To reuse: max_margin needs only numpy, max_margin_kq also max_margin_matrix, orthonormal and
said_orders; OneLayer (with a float64 embedding) and gradients (with loss_and_residual) need torch;
the task needs numpy.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 3, Assumption 1) ------------------------------------------------------------

# A collocation n says what follows each token alone. For every query q, the last token of a
# sentence, there is a strict partial order >_q on the vocabulary. A sentence whose query is q has
# an optimal token x* >_q all its other tokens, and is followed by n(x*).
#
#     query 3, 0 >_3 1 >_3 2 >_3 3:    1 2 2 3 -> n(1)    2 0 1 3 -> n(0)

ORDERS = ["total", "partial", "two-level"]

class Task(NamedTuple):
    """A dataset and what it was made from."""
    sentences: np.ndarray                      # (N, L) token ids; the last one is the query
    next_tokens: np.ndarray                    # (N,) n(x*)
    collocation: np.ndarray                    # (V,) n, an injective map
    optimal: np.ndarray                        # (N,) x*
    orders: np.ndarray                         # (V, V, V) bool, [q, a, b]: a >_q b; None: a file
    weights: np.ndarray                        # (V,) of the pairs (v, n(v)) in stage 1, sum 1

def closure(orders):
    """The transitive closure of each relation of (..., V, V), by squaring."""
    for _ in range(orders.shape[-1].bit_length()):
        ones = orders.astype(np.float32)
        orders = orders | (ones @ ones > 0)
    return orders

def make_orders(vocab_size, kind, rng):
    """A strict order for each query: (V, V, V) bool, [q, a, b] where a >_q b.

    total: a random permutation. partial: 1/4 of its pairs, and what these imply. two-level: each
    token is upper or lower, at random; all upper ones are above all lower ones.
    """
    V = vocab_size
    if kind == "two-level":
        upper = rng.random((V, V)) < 0.5                     # (query, token)
        return upper[:, :, None] & ~upper[:, None, :]
    rank = np.argsort(rng.random((V, V)), axis=1)            # (query, token)
    orders = rank[:, :, None] > rank[:, None, :]
    if kind == "partial":
        orders = closure(orders & (rng.random((V, V, V)) < 0.25))
    return orders

def optimal_token(sentences, orders):
    """The token of each sentence (N, L) that is above all its other ones; -1 where there is none.

    A tournament: whoever is above the winner so far takes its place. One that is above all others
    wins when its turn comes, and stays.
    """
    query = sentences[:, -1]
    best = sentences[:, 0]
    for token in sentences.T[1:]:
        best = np.where(orders[query, token, best], token, best)                     # (N,)
    above = orders[query[:, None], best[:, None], sentences]                         # (N, L)
    above_all = (above | (sentences == best[:, None])).all(axis=1)
    return np.where(above_all, best, -1)

def draw_sentences(n, length, orders, rng, batches=250):
    """Random sentences (n, L) that have an optimal token, repeats allowed; and that token (n,).

    Fewer than n if so many batches of 4 n do not hold them: long sentences seldom have one.
    """
    found = np.empty((0, length), dtype=np.int64)
    for _ in range(batches):
        sentences = rng.integers(len(orders), size=(4 * n, length))
        has_one = optimal_token(sentences, orders) >= 0
        found = np.concatenate([found, sentences[has_one]])
        if len(found) >= n:
            break
    return found[:n], optimal_token(found[:n], orders)

def draw_dataset(vocab_size, n_sentences, length, seed, order):
    """What make_dataset returns, and the orders (V, V, V)."""
    rng = np.random.default_rng(seed)
    collocation = rng.permutation(vocab_size)
    orders = make_orders(vocab_size, order, rng)
    sentences, optimal = draw_sentences(n_sentences, length, orders, rng)
    if len(sentences) < n_sentences:
        found = f"only {len(sentences)} of {1_000 * n_sentences} random sentences"
        raise ValueError(f"{found} have an optimal token: take shorter ones or total orders")
    return sentences, collocation[optimal], collocation, optimal, orders

def make_dataset(vocab_size, n_sentences, length, seed, order="total"):
    """Sentences (N, L), next_tokens (N,), collocation (V,), optimal (N,): realizable, int64.

    ValueError if less than one random sentence in 1,000 has an optimal token.
    """
    return draw_dataset(vocab_size, n_sentences, length, seed, order)[:4]

def said_orders(sentences, optimal, vocab_size):
    """What the sentences say: (V, V, V) bool, [q, a, b]: a is optimal in one with b and query q."""
    said = np.zeros((vocab_size,) * 3, dtype=bool)
    said[sentences[:, -1:], optimal[:, None], sentences] = True
    tokens = np.arange(vocab_size)
    said[:, tokens, tokens] = False                          # x* is not above itself
    return said

def extended_orders(sentences, optimal, vocab_size):
    """What the sentences say, imply, and what Theorem 3 adds, as we understand it: (V, V, V) bool.

    For each query, the tokens that are optimal in some sentence are above those that no sentence
    compares, and these are above those that are beaten and optimal in none. A sentence of one
    repeated token compares none.
    """
    said = said_orders(sentences, optimal, vocab_size)
    once_optimal = said.any(axis=2)                          # (query, token)
    beaten = said.any(axis=1)
    unseen = ~once_optimal & ~beaten
    above_unseen = once_optimal[:, :, None] & unseen[:, None, :]
    below_unseen = unseen[:, :, None] & (beaten & ~once_optimal)[:, None, :]
    return closure(closure(said) | above_unseen | below_unseen)

def check_realizable(sentences, next_tokens, collocation):
    """The optimal tokens (N,) of a realizable dataset, however it was made.

    ValueError if it is not realizable: the collocation is not injective, no token of a sentence
    gives its next token, or a query's order has a cycle.
    """
    V = len(collocation)
    if sorted(collocation) != list(range(V)):
        raise ValueError("not realizable: each token must follow exactly one token")
    optimal = np.argsort(collocation)[next_tokens]           # n^-1
    missing = (sentences != optimal[:, None]).all(axis=1)
    if missing.any():
        sentence = sentences[missing][0].tolist()
        raise ValueError(f"not realizable: no token of {sentence} gives its next token")
    implied = closure(said_orders(sentences, optimal, V))
    for query, token in np.argwhere(implied.diagonal(axis1=1, axis2=2)):
        raise ValueError(f"not realizable: with query {query}, token {token} is above itself")
    return optimal

def read_dataset(path):
    """What draw_dataset returns, of a file of token ids; the orders are None.

    The first line is the collocation, n(0) n(1) ...; the others are sentences of one length, each
    followed by its next token. ValueError says what is wrong.
    """
    with open(path) as file:
        collocation = np.loadtxt(file, dtype=int, ndmin=1, max_rows=1)
        rows = np.loadtxt(file, dtype=int, ndmin=2)
    if not np.isin(rows, np.arange(len(collocation))).all():
        raise ValueError("the first line does not say what follows each token")
    sentences, next_tokens = rows[:, :-1], rows[:, -1]
    optimal = check_realizable(sentences, next_tokens, collocation)
    return sentences, next_tokens, collocation, optimal, None

# ---- The model (Sec. 3) -------------------------------------------------------------------------

class OneLayer(nn.Module):
    """logits(X) = W_OV X softmax(X^T W_KQ x_q): x_q is the last token, its query; float64.

    W_OV (V, d) and W_KQ (d, d) start from zero; the embedding (d, V) is fixed.
    """
    def __init__(self, embedding):
        super().__init__()
        d, V = embedding.shape
        self.register_buffer("E", embedding)                 # (d, V)
        self.W_OV = nn.Parameter(embedding.new_zeros(V, d))
        self.W_KQ = nn.Parameter(embedding.new_zeros(d, d))
        # part of the checkpoint: the first step of stage 2 with a loss below 1e-3, -1 before
        self.register_buffer("first", torch.tensor(-1))

    def token_logits(self):
        """(V, V): row x is W_OV x, the logits where all attention is on token x."""
        return (self.W_OV @ self.E).mT

    def attention(self, sentences):
        """sentences (N, L) -> attention of the last token to each (N, L)."""
        scores = self.E.mT @ self.W_KQ @ self.E              # (V, V): x^T W_KQ q for all x and q
        return scores[sentences, sentences[:, -1:]].softmax(-1)

    def forward(self, sentences, return_attn=False):
        """sentences (N, L) -> logits (N, V), with return_attn also the attention (N, L)."""
        attn = self.attention(sentences)
        values = self.token_logits()[sentences]              # (N, L, V)
        logits = (attn.unsqueeze(1) @ values).squeeze(1)     # (N, V)
        return (logits, attn) if return_attn else logits

def plain_gradients(model, sentences, next_tokens, weights):
    """What gradients computes, by autograd: what it means, and what a test compares it with."""
    losses = F.cross_entropy(model(sentences), next_tokens, reduction="none")
    loss = weights @ losses
    return loss, *torch.autograd.grad(loss, [model.W_OV, model.W_KQ])

# Autograd loses all digits just where this paper looks. At a loss of 1e-17 the probability p of
# the next token rounds to 1, and its residual p - 1 to 0; yet normalised gradient descent goes on
# as fast as ever, in the direction of what is left. Two differences of nearly equal numbers are to
# blame, and each has a form that keeps the digits:
#
#     p - 1 = -sigmoid(z) and loss = log(1 + e^z), with
#         z = log(sum of e^logit of the other tokens) - logit of the next token
#     the gradient by the scores of a sentence, mixture * (by_mixture - its mean), sums to 0, so
#         that the entry of the token with nearly all attention is minus the sum of the others,
#         which are tiny and exact

def loss_and_residual(logits, next_tokens):
    """Cross-entropy of each row (N,) in nats, and its gradient by the logits (N, V)."""
    is_next = F.one_hot(next_tokens, logits.shape[1]).bool()                         # (N, V)
    others = logits.masked_fill(is_next, -math.inf)
    z = others.logsumexp(1, keepdim=True) - logits.gather(1, next_tokens[:, None])   # (N, 1)
    # p of each other token; p - 1 of the next
    residual = (others.softmax(1) - is_next.double()) * z.sigmoid()
    return F.softplus(z).squeeze(1), residual

@torch.no_grad()
def gradients(model, sentences, next_tokens, weights):
    """The loss of sentences (N, L), weighted (N,); its gradients by W_OV (V, d), W_KQ (d, d)."""
    V = model.E.shape[1]
    values = model.token_logits()                                                    # (V, V)
    attn = model.attention(sentences)                                                # (N, L)
    # the attention by token, so that a token's repeats count as one: logits = mixture values
    mixture = attn.new_zeros(len(attn), V).scatter_add_(1, sentences, attn)          # (N, V)
    losses, residual = loss_and_residual(mixture @ values, next_tokens)
    residual = residual * weights[:, None]
    by_W_OV = residual.mT @ mixture @ model.E.mT                                     # (V, d)

    # through the softmax
    by_mixture = residual @ values.mT                                                # (N, V)
    mean = (mixture * by_mixture).sum(1, keepdim=True)
    by_scores = mixture * (by_mixture - mean)
    largest = mixture.argmax(1, keepdim=True)
    others = by_scores.scatter(1, largest, 0).sum(1, keepdim=True)
    by_scores = by_scores.scatter(1, largest, -others)

    # score = x^T W_KQ q: sum by query, so that E enters once
    by_query = attn.new_zeros(V, V).index_add_(0, sentences[:, -1], by_scores)       # (q, x)
    by_W_KQ = model.E @ by_query.mT @ model.E.mT                                     # (d, d)
    return weights @ losses, by_W_OV, by_W_KQ

# ---- The max-margin solutions (Sec. 4) ----------------------------------------------------------

def max_margin(A):
    """argmin |w| subject to A w >= 1, for A (m, n): w (n,) and multipliers l (m,), w = A^T l.

    Ascent of the dual, sum l - |A^T l|^2 / 2 for l >= 0, one multiplier at a time (Hildreth 1957):
    each goes to where its constraint is met exactly, or to 0. ValueError if this does not converge,
    as where no w meets all constraints.
    """
    G = A @ A.T
    l = np.zeros(len(A))
    margins = np.zeros(len(A))                               # A w = G l
    for _ in range(100_000):
        largest = 0.0
        for i, size in enumerate(G.diagonal()):
            change = max(-l[i], (1 - margins[i]) / size)
            if change != 0:
                l[i] += change
                margins += change * G[i]
                largest = max(largest, abs(change) * size)
        if largest < 1e-11:
            return A.T @ l, l
    raise ValueError("no max-margin solution: the constraints cannot all be met")

def orthonormal(embedding):
    """Are the columns of an embedding (d, V) orthonormal?"""
    return np.allclose(embedding.T @ embedding, np.eye(embedding.shape[1]))

def max_margin_matrix(differences, queries, embedding):
    """argmin |W|_F subject to differences[i]^T W x_queries[i] >= 1: W (a, d).

    For differences (m, a), token ids queries (m,) and an embedding (d, V).
    """
    W = np.zeros((differences.shape[1], len(embedding)))
    if orthonormal(embedding):
        # W = sum_q w_q x_q^T, and each w_q has its own constraints
        for q in np.unique(queries):
            w, _ = max_margin(differences[queries == q])
            W += np.outer(w, embedding[:, q])
        return W
    A = np.einsum("ma,dm->mad", differences, embedding[:, queries])
    w, _ = max_margin(A.reshape(len(A), -1))
    return w.reshape(W.shape)

def max_margin_ov(embedding, collocation):
    """W_OV* (V, d): (e_n(v) - e_u)^T W x_v >= 1 for each v and all u != n(v).

    For an embedding (d, V); with an orthonormal one it is sum_v (e_n(v) - 1/V) x_v^T.
    """
    E = np.asarray(embedding)
    V = len(collocation)
    one_hot = np.eye(V)
    if orthonormal(E):
        return (one_hot[collocation].T - 1 / V) @ E.T
    v, u = np.nonzero(one_hot[collocation] == 0)             # all pairs with u != n(v)
    return max_margin_matrix(one_hot[collocation[v]] - one_hot[u], v, E)

def max_margin_kq(embedding, sentences, optimal):
    """W_KQ* (d, d): (x* - x)^T W x_q >= 1 for each sentence and each other token x in it.

    For an embedding (d, V), sentences (N, L) and their optimal tokens (N,).
    """
    E = np.asarray(embedding)
    said = said_orders(sentences, optimal, E.shape[1])
    query, best, other = np.nonzero(said)                    # (m,) each, without repeats
    differences = (E[:, best] - E[:, other]).T
    return max_margin_matrix(differences, query, E)

# ---- Training (Algorithm 1) ---------------------------------------------------------------------

# Step sizes of W_OV and W_KQ, in units of 1 / sqrt(d): normalised (Algorithm 1), plain, Adam
STEP_SIZES = {"ngd": (0.2, 0.05), "gd": (40.0, 40.0), "adam": (0.05, 0.05)}
PRESETS = {"quick": {}, "medium": dict(seed=list(range(10))), "paper": {}}
SWEEP = ["optimizer", "stages", "order", "embedding", "weights", "seed"]

def resolve(args):
    """Completes a run's flags: the optimizer's step sizes. Unused ones become None."""
    lr_ov, lr = STEP_SIZES[args.optimizer]
    args.lr_ov = args.lr_ov or lr_ov
    args.lr = args.lr or lr
    if args.stages == "joint":
        args.steps_ov = None
    if args.sentences:
        args.order = args.vocab_size = args.n_sentences = args.seq_len = None

def build(args):
    """The task and the model of a run. ValueError, OSError: there is no such dataset."""
    if args.sentences:
        dataset = read_dataset(args.sentences)
    else:
        size = args.vocab_size, args.n_sentences, args.seq_len
        dataset = draw_dataset(*size, args.seed, args.order)
    sentences, _, collocation, optimal, _ = dataset
    V = len(collocation)
    n_orders = said_orders(sentences, optimal, V).sum()
    if n_orders == 0:
        raise ValueError("each sentence repeats one token, so that attention has nothing to learn")
    rng = np.random.default_rng(args.seed + 10_000)
    embedding = rng.standard_normal((V, V)) / math.sqrt(V)
    if args.embedding == "orthonormal":
        embedding, _ = np.linalg.qr(embedding)
    elif max(V * (V - 1), n_orders) > 4_000:                 # minutes, gigabytes
        raise ValueError("over 4,000 max-margin constraints at once: take fewer tokens")
    weights = rng.exponential(size=V) if args.weights == "random" else np.ones(V)
    task = Task(*dataset, weights / weights.sum())
    return task, OneLayer(torch.from_numpy(embedding)).to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run's folder, the model in eval mode."""
    return common.load(folder, build, device)

def examples(task, device):
    """What stages 1 and 2 train on: sentences (N, L), next tokens (N,), weights (N,) of sum 1."""
    V, N = len(task.collocation), len(task.sentences)

    def tensors(*arrays):
        return [torch.from_numpy(x).to(device) for x in arrays]

    pairs = tensors(np.arange(V)[:, None], task.collocation, task.weights)
    return pairs, tensors(task.sentences, task.next_tokens, np.full(N, 1 / N))

def marks(steps):
    """The steps to measure at: some log-spaced, some evenly spaced, the last one."""
    spaced = [*np.geomspace(1, steps, 25), *np.linspace(0, steps, 26)[1:]]
    return {round(t) for t in spaced}

def train(args, run):
    """One run of the sweep: stage 1 on the pairs, stage 2 on the sentences; or both jointly."""
    task, model = build(args)
    pairs, sentences = examples(task, args.device)
    E = model.E.cpu()
    best = max_margin_ov(E, task.collocation), max_margin_kq(E, task.sentences, task.optimal)
    best = [torch.from_numpy(W).to(model.E) for W in best]   # W_OV*, W_KQ*
    V = len(task.collocation)
    descent = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    optimizer = descent([
        {"params": model.W_OV, "lr": args.lr_ov / math.sqrt(V)},
        {"params": model.W_KQ, "lr": args.lr / math.sqrt(V)},
    ])
    start = run.restore(model, optimizer, torch.Generator())             # nothing is drawn

    joint = args.stages == "joint"
    steps_ov = 0 if joint else args.steps_ov
    measured = {steps_ov + t for t in marks(args.steps)}
    if not joint:
        measured |= marks(steps_ov)

    for step in run.steps(start, steps_ov + args.steps):
        train_ov = joint or step < steps_ov
        train_kq = step >= steps_ov
        optimizer.zero_grad()
        if train_ov:
            _, model.W_OV.grad, _ = gradients(model, *pairs)
        if train_kq:
            loss, by_W_OV, model.W_KQ.grad = gradients(model, *sentences)
            below = (loss < 1e-3) & (model.first < 0)        # an `if` would make a GPU wait
            model.first = torch.where(below, step - steps_ov, model.first)
        if joint:
            model.W_OV.grad += by_W_OV
        for W in model.parameters():
            if args.optimizer == "ngd" and W.grad is not None:
                # below 1e-150 the squares in the norm underflow: no direction is left
                W.grad /= W.grad.norm().clamp_min(1e-150)
        optimizer.step()
        if step + 1 in measured:
            now = panels(model, task, best)
            name = "kq" if train_kq else "ov"
            if now[f"gradient_{name}"] < 1e-150:
                raise common.RunError(f"the gradient underflows at step {step + 1}: take fewer")
            loss, cosine = now[f"loss_{name}"], now[f"cosine_{name}"]
            stage = 0 if joint else STAGE[name]
            t = step + 1 - steps_ov if train_kq else step + 1
            run.log(step + 1, loss=loss, cosine=cosine, stage=stage, t=t, **now)

# ---- Measurement --------------------------------------------------------------------------------

STAGE = {"ov": 1, "kq": 2}                                   # that trains W_OV, W_KQ

def alignment(W, W_best):
    """The cosine of the angle between two matrices; 0 where W is 0."""
    return ((W * W_best).sum() / W.norm().clamp_min(1e-300) / W_best.norm()).item()

@torch.no_grad()
def panels(model, task, best):
    """What Fig. 2 shows of a model, beside its max-margin solutions W_OV* and W_KQ* (tensors).

    Losses in nats, cosines with the solutions, Frobenius norms, accuracy, and the norms of both
    gradients. excess is L - L_min: L_min is the loss of a hard attention to x*, with this W_OV.
    """
    pairs, sentences = examples(task, model.E.device)
    loss_ov, by_W_OV, _ = gradients(model, *pairs)
    loss_kq, _, by_W_KQ = gradients(model, *sentences)
    x, next_tokens, _ = sentences
    logits = model(x)
    soft, _ = loss_and_residual(logits, next_tokens)
    hard, _ = loss_and_residual(model.token_logits()[task.optimal], next_tokens)
    right = logits.argmax(1) == next_tokens
    return {
        "accuracy": right.double().mean().item(),
        "loss_ov": loss_ov.item(),
        "cosine_ov": alignment(model.W_OV, best[0]),
        "norm_ov": model.W_OV.norm().item(),
        "loss_kq": loss_kq.item(),
        "excess": (soft - hard).mean().item(),
        "cosine_kq": alignment(model.W_KQ, best[1]),
        "norm_kq": model.W_KQ.norm().item(),
        "gradient_ov": by_W_OV.norm().item(),
        "gradient_kq": by_W_KQ.norm().item(),
    }

def of_stage(metrics, name):
    """The lines of metrics.jsonl where a matrix is trained; the joint training is stage 0."""
    return [line for line in metrics if line["stage"] in (0, STAGE[name])]

def curves(metrics, name):
    """The panels of Fig. 2 of one stage, arrays (T,): loss, gap (1 - cosine) and norm against t."""
    lines = of_stage(metrics, name)

    def column(key):
        return np.array([line[key] for line in lines])

    return {
        "t": column("t"),
        "loss": column("loss_ov" if name == "ov" else "excess"),
        "total": column(f"loss_{name}"),                     # of which L - L_min is a small part
        "gap": 1 - column(f"cosine_{name}"),
        "norm": column(f"norm_{name}"),
    }

# Theorems 1 and 2: norm ~ t, loss ~ e^(-t), 1 - alignment ~ a power of t: straight on these scales
SCALES = {"loss": ("linear", "log"), "gap": ("log", "log"), "norm": ("linear", "linear")}

def on_scale(x, scale):
    """x, or its logarithm."""
    return np.log(x) if scale == "log" else x

def fit(curve, panel):
    """The straight line of a panel by least squares: slope, R^2, and both ends: t (2,), y (2,).

    Each is None for fewer than 3 points. The loss is fitted in the second half, the gap after its
    first bend, both above rounding.
    """
    t, y = curve["t"], curve[panel]
    begin = {"loss": t[-1] / 2, "gap": 100, "norm": 1}[panel]
    rounding = {"loss": 1e-12 * curve["total"], "gap": 1e-12, "norm": -1}[panel]
    used = (t >= begin) & (y > rounding)
    if used.sum() < 3:
        return None, None, None, None
    x_scale, y_scale = SCALES[panel]
    x, y = on_scale(t[used], x_scale), on_scale(y[used], y_scale)
    slope, offset = np.polyfit(x, y, 1)
    left = ((y - slope * x - offset) ** 2).sum()
    total = ((y - y.mean()) ** 2).sum()
    r_squared = 1 - left / total if total > 0 else 1.0
    ends = np.array([begin, t[-1]])
    line = slope * on_scale(ends, x_scale) + offset
    return float(slope), float(r_squared), ends, np.exp(line) if y_scale == "log" else line

def unseen_sentences(task, n, rng):
    """Sentences (M, L) that are not in the data, M <= n; their optimal tokens, -1 for a file."""
    size = n, task.sentences.shape[1]
    if task.orders is None:
        drawn, truth = rng.integers(len(task.collocation), size=size), np.full(n, -1)
    else:
        drawn, truth = draw_sentences(*size, task.orders, rng, batches=25)
    seen = set(map(tuple, task.sentences.tolist()))
    new = np.array([tuple(x) not in seen for x in drawn.tolist()])
    return drawn[new], truth[new]

def leads(scores, sentences, optimal):
    """By how much x* outscores the other tokens of its sentence (N,); inf if there are none.

    For scores (V, V) of each token with each query, sentences (N, L), x* (N,).
    """
    query = sentences[:, -1]
    others = scores[sentences, query[:, None]]                                       # (N, L)
    others[sentences == optimal[:, None]] = -np.inf
    return scores[optimal, query] - others.max(axis=1)

def generalisation(model, task, seed, n=20_000):
    """Theorem 3: unseen sentences, in groups by what says which token x* is optimal.

    decided: the order that the data imply. extended: extended_orders alone; of these, top: x* is
    never beaten in the data of its query; chain: x* is optimal in one sentence and beaten in
    another; new: x* is compared in none. undecided: neither; x* is that of the true orders there.
    truth: extended again, with x* by the true orders.

    For each group: fraction_ of the unseen sentences (which have an optimal token by the true
    orders, if these are known); accuracy_: how often the model predicts n(x*); exact_: how often
    the exact W_KQ* scores x* above all others; ties_: how often it scores x* as high as the best
    other (to 1e-6), which exact_ counts as wrong. None if there are no such sentences.
    """
    V = len(task.collocation)
    unseen, truth = unseen_sentences(task, n, np.random.default_rng(seed + 20_000))
    with torch.no_grad():
        logits = model(torch.from_numpy(unseen).to(model.E.device)).cpu()
    predicted = logits.argmax(1).numpy()
    E = model.E.cpu().numpy()
    scores = E.T @ max_margin_kq(E, task.sentences, task.optimal) @ E        # (token, query)

    said = said_orders(task.sentences, task.optimal, V)
    by_data = optimal_token(unseen, closure(said))           # -1 where there is none
    by_extension = optimal_token(unseen, extended_orders(task.sentences, task.optimal, V))
    extended = (by_data < 0) & (by_extension >= 0)
    once_optimal = said.any(axis=2)[unseen[:, -1], by_extension]
    beaten = said.any(axis=1)[unseen[:, -1], by_extension]
    groups = {                                               # which sentences, x*
        "decided": (by_data >= 0, by_data),
        "extended": (extended, by_extension),
        "top": (extended & once_optimal & ~beaten, by_extension),
        "chain": (extended & once_optimal & beaten, by_extension),
        "new": (extended & ~once_optimal & ~beaten, by_extension),
        "truth": (extended, truth),
        "undecided": (by_extension < 0, truth),
    }

    def mean(values):
        return float(values.mean()) if len(values) else None

    results = {}
    for name, (group, optimal) in groups.items():
        results[f"fraction_{name}"] = mean(group)
        group = group & (optimal >= 0)
        best = optimal[group]
        lead = leads(scores, unseen[group], best)
        results[f"accuracy_{name}"] = mean(predicted[group] == task.collocation[best])
        results[f"exact_{name}"] = mean(lead > 1e-6)
        results[f"ties_{name}"] = mean(np.abs(lead) <= 1e-6)
    return results

# Slope and R^2 of each panel's line: the key in results.json, {} being ov or kq, and its name
RATES = {
    "norm": ("norm_{}_rate", "norm a step"),
    "loss": ("loss_{}_rate", "log(loss - minimum) a step"),
    "gap": ("exponent_{}", "1 - alignment ~ t^"),
}

def measure(args, run):
    """What Theorems 1 to 3 say of a trained run: its last metrics, the fits, generalisation."""
    task, model = load(run.folder, args.device)
    results = {**run.metrics[-1]}
    for name in STAGE:
        curve = curves(run.metrics, name)
        for panel, (key, _) in RATES.items():
            results[key.format(name)] = fit(curve, panel)[:2]
    results.update(generalisation(model, task, args.seed))
    results["steps_to_1e_3"] = None if model.first < 0 else int(model.first)
    return results

# ---- Tables and figures -------------------------------------------------------------------------

MATRICES = {"ov": "W_OV", "kq": "W_KQ"}
PANELS = {                                                   # Fig. 2 as numbers
    "ov": {"loss_ov": "L_0 (nats)", "cosine_ov": "cosine", "norm_ov": "|W_OV|"},
    "kq": {"loss_kq": "L (nats)", "excess": "L - L_min", "cosine_kq": "cosine",
           "norm_kq": "|W_KQ|", "accuracy": "accuracy"},
}

def print_panels(run):
    """Fig. 2 of one run: each panel a row of numbers at log-spaced steps."""
    for name, matrix in MATRICES.items():
        lines = of_stage(run.metrics, name)
        shown = {round(t) for t in np.geomspace(1, lines[-1]["t"], 7)}
        cells = []
        for line in lines:
            if line["t"] in shown:
                for key, label in PANELS[name].items():
                    cells.append((label, line["t"], line[key], ".4g"))
        common.print_table(f"Fig. 2, seed {run.args.seed}: steps of {matrix}", cells)

def print_theorems(runs):
    """What Theorems 1 and 2 say of one setting: median and range over seeds."""
    cells = []
    for run in runs:
        found = run.results
        for name, matrix in MATRICES.items():
            cells.append(("loss (nats)", matrix, found[f"loss_{name}"], ".1e"))
            cells.append(("alignment", matrix, found[f"cosine_{name}"], ".4f"))
            for key, label in RATES.values():
                slope, r_squared = found[key.format(name)]
                cells.append((label, matrix, slope, ".5f"))
                cells.append((f"R^2 of {label}", matrix, r_squared, ".5f"))
        cells.append(("training accuracy", "W_KQ", found["accuracy"]))
        cells.append(("steps to L < 1e-3", "W_KQ", found["steps_to_1e_3"], ".0f"))
    common.print_table("Theorems 1 and 2: at the end, and fitted lines (loss: second half)", cells)

# The keys of generalisation: measure_group
GROUPS = ["decided", "extended", "top", "chain", "new", "truth", "undecided"]
MEASURES = {"fraction": "fraction", "accuracy": "trained", "exact": "exact W_KQ*", "ties": "ties"}

def print_unseen(runs):
    """Theorem 3 for one setting: median and range over seeds."""
    cells = []
    for run in runs:
        for group in GROUPS:
            for measure, column in MEASURES.items():
                value = run.results[f"{measure}_{group}"]
                if value is not None:                        # None: there are no such sentences
                    cells.append((group, column, value))
    common.print_table("Theorem 3: accuracy on unseen sentences, by what gives x*", cells)

LEGEND = """
decided: by the data and what they imply; extended: only by what Theorem 3 adds; of these, top: x*
is never beaten in the data; chain: x* is b of a > b > c; new: x* is not compared; truth: the same
sentences, x* by the true orders; undecided: the others, x* by the true orders
ties: x* scores as high as the best other token; the accuracy of W_KQ* counts them as wrong"""

FIG_2 = {
    "ov": {"loss": "L_0 (nats)", "gap": "1 - cosine(W_OV, W_OV*)", "norm": "norm of W_OV"},
    "kq": {"loss": "L - L_min (nats)", "gap": "1 - cosine(W_KQ, W_KQ*)", "norm": "norm of W_KQ"},
}

def plot(runs):
    """Fig. 2: L_0 and L - L_min, 1 - alignment, norms, and the fitted lines."""
    panels = {}
    for name, titles in FIG_2.items():
        for panel, title in titles.items():
            trained, fitted = [], []
            for run in runs:
                label = run.args.label or "trained"
                curve = curves(run.metrics, name)
                trained.append((label, curve["t"], curve[panel], {}))
                slope, _, t, y = fit(curve, panel)
                if slope is not None:
                    fitted.append((f"{label}: fit", t, y, dict(color="k", ls="--", lw=1)))
            x_scale, y_scale = SCALES[panel]
            axis = dict(xlabel="step of its stage", xscale=x_scale, yscale=y_scale)
            panels[title] = axis, trained + fitted
    common.plot(runs[0].folder.parent / "fig2.png", panels)

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    tokens, steps = common.number(int, 2, 200), common.positive_int
    own = "in units of 1/sqrt(d) (default: the optimizer's own)"
    add("--vocab-size", type=tokens, default=20, help="|V|, tokens; also d, the embedding's width")
    add("--n-sentences", type=steps, default=200, help="N, training sentences")
    add("--seq-len", type=tokens, default=5, help="L, tokens of a sentence")
    add("--order", nargs="+", choices=ORDERS, default=["total"], help="each query's strict order")
    add("--embedding", nargs="+", choices=["orthonormal", "gaussian"], default=["orthonormal"],
        help="of the tokens")
    add("--weights", nargs="+", choices=["random", "uniform"], default=["random"],
        help="of the pairs in stage 1")
    add("--sentences", help="a file: token ids, a sentence and what follows")
    add("--optimizer", nargs="+", choices=list(STEP_SIZES), default=["ngd"],
        help="ngd: normalised, gd: plain")
    add("--stages", nargs="+", choices=["two", "joint"], default=["two"],
        help="W_OV, then W_KQ; or both at once")
    add("--steps-ov", type=steps, default=2_000, help="steps of stage 1")
    add("--steps", type=steps, default=20_000, help="steps of stage 2, or of the joint training")
    add("--lr-ov", type=common.positive_float, help=f"eta_0, the step size of W_OV, {own}")
    add("--lr", type=common.positive_float, help=f"eta, the step size of W_KQ, {own}")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds of data and embedding")
    return common.parse_args(parser, PRESETS, argv)

def show(runs):
    """Prints Fig. 2 of each setting's first run, and the theorems' tables; draws Fig. 2."""
    for label in dict.fromkeys(run.args.label for run in runs):
        seeds = [run for run in runs if run.args.label == label]
        common.say(f"\n{label or 'Measured'} (seeds: {len(seeds)})")
        print_panels(seeds[0])
        print_theorems(seeds)
        print_unseen(seeds)
    common.say(LEGEND)
    if runs[0].args.plot:
        plot(runs)

def main(argv=None):
    """Trains what the flags ask for, shows it; returns the results, a dict a run."""
    args = parse_args(argv)
    runs = common.sweep(args, SWEEP, build, resolve)
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
