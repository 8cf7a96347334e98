r"""
Non-asymptotic Convergence of Training Transformers for Next-token Prediction.
Huang, Liang, Yang. NeurIPS 2024, arXiv 2409.17335. The paper has no public code.

The task is to predict the token that follows a sentence of five tokens. The last token of a
sentence is its query. Each query has its own order on the 20 tokens of the vocabulary, and the
optimal token of a sentence is the one that this order puts above all its other tokens. The optimal
token v alone decides what follows: the token n(v), where n is a fixed permutation.

    The query 3 orders 0 > 1 > 2 > ... The sentence 1 2 2 1 3 has the optimal token 1; n(1) follows.

An order is total if it compares any two tokens, partial if it compares only some pairs. In a
two-level order each token is upper or lower, and each upper token is above each lower one.

The model is one layer of attention. W_KQ gives each token of a sentence a score with the query; the
softmax of the scores is the attention, which has to go to the optimal token. W_OV turns the token
that gets the attention into the logits of the next token. Many matrices solve this task. The
max-margin solution of each, W_OV* and W_KQ*, is the matrix of smallest norm with which the right
token leads all others by at least 1, in logit or in score, as in a support vector machine.

Training has two stages: stage 1 trains W_OV on the pairs v, n(v), stage 2 trains W_KQ on the
sentences. Both use normalised gradient descent, whose steps all have the same length. The claim: it
turns each matrix to the direction of its max-margin solution, although no term of the loss asks for
it. The cosine between a matrix and its solution goes to 1 at a sub-linear rate, the norm grows
linearly, and the loss goes to its minimum exponentially fast (Theorems 1, 2). The model then also
predicts what follows an unseen sentence if the training sentences imply which of its tokens is
optimal (Theorem 3).

What to look for: both cosines pass 0.99, and 1 - cosine falls roughly like a power of the step;
both norms are straight lines; the log of the loss above its minimum ends as a straight line; the
accuracy on unseen sentences is 1 if the data decide which token is optimal.

The theorem also extends the order of the data, to tokens that they do not compare (in
extended_orders below). If only this extension decides, the accuracy is 1 for two-level orders.
Total orders have chains a > b > d, where b is optimal in one sentence and beaten in another. Then
W_KQ* itself has ties and errors: if the data say a > b, b > d and a > c, it gives a, b, c, d the
scores 1, 0, 0, -1, so that b ties with c, and with all tokens that no sentence compares.

The vocabulary, d = 20 and the step sizes of normalised gradient descent are the paper's. Ours are
the numbers of steps, the 200 sentences of 5 tokens, the random weights of the pairs in stage 1
(with equal ones and an orthonormal embedding the cosine of W_OV is 1 from the first step) and the
other optimizers.

    python ntp_convergence.py                          Fig. 2 as rows of numbers
    python ntp_convergence.py --preset medium --plot   Fig. 2, ten seeds
    python ntp_convergence.py --preset paper --plot    Fig. 2, one seed
    python ntp_convergence.py --order total partial two-level      Theorem 3: unseen sentences
    python ntp_convergence.py --order total partial --embedding orthonormal gaussian
    python ntp_convergence.py --embedding gaussian --steps-ov 5000 --steps 60000
    python ntp_convergence.py --optimizer ngd gd adam --stages two joint
    python ntp_convergence.py --sentences FILE         your own data: the first line is n(0) n(1)
        ...; each other line is a sentence and its next token, all sentences of one length

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

# The permutation n, called the collocation, says what follows each token. Each query q, the last
# token of a sentence, has a strict order >_q on the vocabulary. A sentence with the query q has an
# optimal token x* >_q all its other tokens, and n(x*) follows it.
#
#     0 >_3 1 >_3 2 >_3 3:    1 2 2 3 -> n(1)    2 0 1 3 -> n(0)

ORDERS = ["total", "partial", "two-level"]

class Task(NamedTuple):
    """A dataset and what it was made from."""
    sentences: np.ndarray                      # (N, L) token ids; the last one is the query
    next_tokens: np.ndarray                    # (N,) n(x*)
    collocation: np.ndarray                    # (V,) n, a permutation
    optimal: np.ndarray                        # (N,) x*
    orders: np.ndarray                         # (V, V, V) bool, [q, a, b]: a >_q b; None for a file
    weights: np.ndarray                        # (V,) of the pairs v, n(v) in stage 1, sum 1

def closure(orders):
    """The transitive closure of relations (..., V, V): a > b and b > c also give a > c."""
    for _ in range(orders.shape[-1].bit_length()):           # each round joins chains twice as long
        ones = orders.astype(np.float32)
        orders = orders | (ones @ ones > 0)
    return orders

def make_orders(vocab_size, kind, rng):
    """A strict order for each query: (V, V, V) bool, [q, a, b]: a is above b with the query q.

    total: a random permutation. partial: a quarter of its pairs, and what these imply. two-level:
    each token is upper or lower at random, and each upper token is above each lower one.
    """
    V = vocab_size
    if kind == "two-level":
        upper = rng.random((V, V)) < 0.5                     # (query, token)
        return upper[:, :, None] & ~upper[:, None, :]
    rank = np.argsort(rng.random((V, V)), axis=1)            # (query, token): permutations
    orders = rank[:, :, None] > rank[:, None, :]
    if kind == "partial":
        orders = closure(orders & (rng.random((V, V, V)) < 0.25))
    return orders

def optimal_token(sentences, orders):
    """The token of each sentence (N, L) that is above all its other ones; -1 if there is none."""
    tokens = sentences.T                                     # (L, N)
    query = tokens[-1]
    best = np.full(len(sentences), -1)
    for token in tokens:                                     # (N,): of each sentence the i-th
        above_or_same = orders[query, token, tokens] | (token == tokens)             # (L, N)
        best = np.where(above_or_same.all(axis=0), token, best)
    return best

def draw_sentences(n, length, orders, rng):
    """Random sentences (n, L) that have an optimal token, and this token (n,).

    A sentence may repeat tokens. Fewer than n are returned if less than one random sentence in
    1,000 has an optimal token: long sentences seldom do.
    """
    found = np.empty((0, length), dtype=int)
    for _ in range(250):                                     # 250 times 4 n are 1,000 n
        sentences = rng.integers(len(orders), size=(4 * n, length))
        has_one = optimal_token(sentences, orders) >= 0
        found = np.concatenate([found, sentences[has_one]])
        if len(found) >= n:
            break
    return found[:n], optimal_token(found[:n], orders)

def draw_dataset(vocab_size, n_sentences, length, seed, order):
    """Returns what make_dataset returns, and the orders of all queries (V, V, V)."""
    rng = np.random.default_rng(seed)
    collocation = rng.permutation(vocab_size)
    orders = make_orders(vocab_size, order, rng)
    sentences, optimal = draw_sentences(n_sentences, length, orders, rng)
    if len(sentences) < n_sentences:
        raise ValueError(f"only {len(sentences)} of {1_000 * n_sentences} random sentences have an "
                         "optimal token: take shorter ones or total orders")
    return sentences, collocation[optimal], collocation, optimal, orders

def make_dataset(vocab_size, n_sentences, length, seed, order="total"):
    """Sentences (N, L), next_tokens (N,), collocation (V,), optimal (N,): realizable, int64.

    ValueError if less than one random sentence in 1,000 has an optimal token.
    """
    return draw_dataset(vocab_size, n_sentences, length, seed, order)[:4]

def said_orders(sentences, optimal, vocab_size):
    """What the sentences say: (V, V, V) bool, [q, a, b]: with query q, a is optimal beside b."""
    said = np.zeros((vocab_size,) * 3, dtype=bool)
    said[sentences[:, -1:], optimal[:, None], sentences] = True          # (N, 1), (N, 1), (N, L)
    return said & ~np.eye(vocab_size, dtype=bool)            # no token is above itself

def extended_orders(sentences, optimal, vocab_size):
    """What the sentences say and imply, and what Theorem 3 adds as we read it: (V, V, V) bool.

    For each query, Theorem 3 puts the tokens that are optimal in some sentence above those that no
    sentence compares, and these above those that are beaten and never optimal. If all tokens are
    compared, that adds nothing. A sentence that repeats a single token compares none.
    """
    said = said_orders(sentences, optimal, vocab_size)
    once_optimal = said.any(axis=2)                          # (query, token)
    beaten = said.any(axis=1)
    unseen = ~once_optimal & ~beaten
    above_unseen = once_optimal[:, :, None] & unseen[:, None, :]
    below_unseen = unseen[:, :, None] & (beaten & ~once_optimal)[:, None, :]
    return closure(said | above_unseen | below_unseen)

def check_realizable(sentences, next_tokens, collocation):
    """The optimal tokens (N,) of a dataset, if it is realizable: if some orders explain it.

    ValueError if none do: the collocation is no permutation, the next token of a sentence is n(v)
    for none of its tokens v, or what the sentences say about a query has a cycle.
    """
    V = len(collocation)
    if sorted(collocation) != list(range(V)):
        raise ValueError("not realizable: each token must follow exactly one token")
    optimal = np.argsort(collocation)[next_tokens]           # argsort inverts a permutation
    missing = (sentences != optimal[:, None]).all(axis=1)
    if missing.any():
        sentence = sentences[missing][0]
        raise ValueError(f"not realizable: no token of {sentence} gives its next token")
    implied = closure(said_orders(sentences, optimal, V))
    cyclic = implied.diagonal(axis1=1, axis2=2).any(axis=1)
    if cyclic.any():
        raise ValueError(f"not realizable: the order of query {cyclic.argmax()} has a cycle")
    return optimal

def read_dataset(path):
    """What draw_dataset returns, from a file of token ids; the orders are None.

    The first line is the collocation, n(0) n(1) ...; each other line is a sentence and its next
    token, all sentences of one length. ValueError if the file does not hold a realizable dataset.
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
    """logits(X) = W_OV X softmax(X^T W_KQ x_q), where the last column x_q of X is the query.

    W_OV (V, d) and W_KQ (d, d) start from zero; the embedding (d, V), float64, is not trained.
    """
    def __init__(self, embedding):
        super().__init__()
        d, V = embedding.shape
        self.register_buffer("E", embedding)                 # (d, V)
        self.W_OV = nn.Parameter(embedding.new_zeros(V, d))
        self.W_KQ = nn.Parameter(embedding.new_zeros(d, d))
        # for train alone, here so that a checkpoint keeps it: after how many steps of W_KQ the loss
        # was first below 1e-3, or -1
        self.register_buffer("first", torch.tensor(-1))

    def token_logits(self):
        """(V, V): row x is W_OV x, the logits if all attention is on token x."""
        return (self.W_OV @ self.E).mT

    def attention(self, sentences):
        """sentences (N, L) -> attention of the last token to each (N, L)."""
        scores = self.E.mT @ self.W_KQ @ self.E              # (V, V): x^T W_KQ q for all x and q
        return scores[sentences, sentences[:, -1:]].softmax(-1)

    def forward(self, sentences):
        """sentences (N, L) -> logits (N, V)."""
        attn = self.attention(sentences)
        values = self.token_logits()[sentences]              # (N, L, V)
        return (attn.unsqueeze(1) @ values).squeeze(1)

# The function gradients() below does what these two lines do, and a test compares both:
#
#     loss = weights @ F.cross_entropy(model(sentences), next_tokens, reduction="none")
#     loss, *torch.autograd.grad(loss, [model.W_OV, model.W_KQ])
#
# But autograd loses all digits of a tiny gradient. At a loss of 1e-17 the probability p of the next
# token rounds to 1, and its gradient p - 1 to 0. Normalised gradient descent divides by the norm,
# so it needs the direction of a gradient of any size. The digits are lost in two differences of
# nearly equal numbers, and both can be avoided:
#
# 1. p - 1 = -sigmoid(z) and loss = log(1 + e^z), where
#    z = log(sum of e^logit over the other tokens) - logit of the next token.
# 2. The gradient with respect to the scores of a sentence, mixture * (by_mixture - mean), sums to
#    0. Its entry for the token with the most attention is computed as minus the sum of the others,
#    which are tiny and exact.

def loss_and_residual(logits, next_tokens):
    """The cross-entropy of each row (N,) in nats, and its gradient in the logits (N, V)."""
    is_next = F.one_hot(next_tokens, logits.shape[1]).bool()                         # (N, V)
    others = logits.masked_fill(is_next, -math.inf)
    z = others.logsumexp(1, keepdim=True) - logits.gather(1, next_tokens[:, None])   # (N, 1)
    # the gradient: p for each other token, p - 1 for the next one
    residual = (others.softmax(1) - is_next.double()) * z.sigmoid()
    return F.softplus(z).squeeze(1), residual

@torch.no_grad()
def gradients(model, sentences, next_tokens, weights):
    """The weighted loss of sentences (N, L), and its gradients in W_OV (V, d) and W_KQ (d, d)."""
    V = model.E.shape[1]
    values = model.token_logits()                                                    # (V, V)
    attn = model.attention(sentences)                                                # (N, L)
    # the attention to each token of the vocabulary, repeats added up: logits = mixture @ values
    mixture = attn.new_zeros(len(attn), V).scatter_add_(1, sentences, attn)          # (N, V)
    losses, residual = loss_and_residual(mixture @ values, next_tokens)
    residual = residual * weights[:, None]
    by_W_OV = residual.mT @ mixture @ model.E.mT                                     # (V, d)

    # through the softmax of the attention
    by_mixture = residual @ values.mT                                                # (N, V)
    mean = (mixture * by_mixture).sum(1, keepdim=True)
    by_scores = mixture * (by_mixture - mean)
    largest = mixture.argmax(1, keepdim=True)
    others = by_scores.scatter(1, largest, 0).sum(1, keepdim=True)
    by_scores = by_scores.scatter(1, largest, -others)

    # score = x^T W_KQ q: the gradients are first added up for each pair of query q and token x
    by_query = attn.new_zeros(V, V).index_add_(0, sentences[:, -1], by_scores)       # (q, x)
    by_W_KQ = model.E @ by_query.mT @ model.E.mT                                     # (d, d)
    return weights @ losses, by_W_OV, by_W_KQ

# ---- The max-margin solutions (Sec. 4) ----------------------------------------------------------

def max_margin(A):
    """argmin |w| subject to A w >= 1, for A (m, n): w (n,) = A^T dual, and dual (m,).

    Hildreth's method (1957) maximises the dual, sum(dual) - |A^T dual|^2 / 2 for dual >= 0, one
    multiplier dual[i] at a time: it is moved to where constraint i holds with equality, but not
    below 0. ValueError if this does not converge, as when no w meets all constraints.
    """
    G = A @ A.T
    dual = np.zeros(len(A))
    margins = np.zeros(len(A))                               # A w = G dual
    for _ in range(100_000):
        largest = 0.0                                        # change of a margin in this round
        for i, slope in enumerate(G.diagonal()):             # of margins[i] against dual[i]
            change = max(-dual[i], (1 - margins[i]) / slope)
            if change != 0:
                dual[i] += change
                margins += change * G[i]
                largest = max(largest, abs(change) * slope)
        if largest < 1e-11:
            return A.T @ dual, dual
    raise ValueError("no max-margin solution found: the constraints cannot all be met, or the "
                     "embeddings are nearly dependent")

def orthonormal(embedding):
    """Whether the columns of an embedding (d, V) are orthonormal."""
    return np.allclose(embedding.T @ embedding, np.eye(embedding.shape[1]))

def max_margin_matrix(differences, queries, embedding):
    """argmin |W|_F subject to differences[i]^T W x_queries[i] >= 1: W (a, d).

    For differences (m, a), token ids queries (m,) and an embedding (d, V).
    """
    W = np.zeros((differences.shape[1], len(embedding)))
    if orthonormal(embedding):
        # W = sum_q w_q x_q^T, and each w_q can be found alone
        for q in np.unique(queries):
            w, _ = max_margin(differences[queries == q])
            W += np.outer(w, embedding[:, q])
        return W
    A = np.einsum("ma,dm->mad", differences, embedding[:, queries])
    w, _ = max_margin(A.reshape(len(A), -1))
    return w.reshape(W.shape)

def max_margin_ov(embedding, collocation):
    """W_OV* (V, d): the logit of n(v) leads all others by 1, (e_n(v) - e_u)^T W x_v >= 1.

    For an embedding (d, V). If it is orthonormal, W_OV* = sum_v (e_n(v) - 1/V) x_v^T.
    """
    V = len(collocation)
    one_hot = np.eye(V)
    if orthonormal(embedding):
        return (one_hot[collocation].T - 1 / V) @ embedding.T
    v, u = np.nonzero(one_hot[collocation] == 0)             # all pairs with u != n(v)
    return max_margin_matrix(one_hot[collocation[v]] - one_hot[u], v, embedding)

def max_margin_kq(embedding, sentences, optimal):
    """W_KQ* (d, d): the score of x* leads all others of its sentence by 1, (x* - x)^T W x_q >= 1.

    For an embedding (d, V), sentences (N, L) and their optimal tokens (N,).
    """
    said = said_orders(sentences, optimal, embedding.shape[1])
    query, best, other = np.nonzero(said)                    # (m,) each, without repeats
    differences = (embedding[:, best] - embedding[:, other]).T
    return max_margin_matrix(differences, query, embedding)

# ---- Training (Algorithm 1) ---------------------------------------------------------------------

# Step sizes of W_OV and W_KQ in units of 1 / sqrt(d). ngd: normalised gradient descent
# (Algorithm 1); gd: plain gradient descent
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
    """The task and the model of a run. ValueError or OSError if there is no such dataset."""
    if args.sentences:
        dataset = read_dataset(args.sentences)
    else:
        size = args.vocab_size, args.n_sentences, args.seq_len
        dataset = draw_dataset(*size, args.seed, args.order)
    sentences, _, collocation, optimal, _ = dataset
    V = len(collocation)
    n_orders = said_orders(sentences, optimal, V).sum()
    if n_orders == 0:
        raise ValueError("each sentence repeats one token: attention has nothing to learn")
    rng = np.random.default_rng(args.seed + 10_000)
    embedding = rng.standard_normal((V, V)) / math.sqrt(V)
    if args.embedding == "orthonormal":
        embedding, _ = np.linalg.qr(embedding)
    elif max(V * (V - 1), n_orders) > 4_000:                 # takes minutes and gigabytes
        raise ValueError("over 4,000 max-margin constraints at once: take fewer tokens")
    weights = rng.exponential(size=V) if args.weights == "random" else np.ones(V)
    task = Task(*dataset, weights / weights.sum())
    return task, OneLayer(torch.from_numpy(embedding)).to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run's folder, the model in eval mode."""
    return common.load(folder, build, device)

def examples(task, device):
    """The data of both stages, each sentences (N, L), next tokens (N,), weights (N,) of sum 1."""
    V, N = len(task.collocation), len(task.sentences)

    def tensors(*arrays):
        return [torch.from_numpy(x).to(device) for x in arrays]

    stage_1 = tensors(np.arange(V)[:, None], task.collocation, task.weights)
    return stage_1, tensors(task.sentences, task.next_tokens, np.full(N, 1 / N))

def marks(steps):
    """The steps to measure at: 25 log-spaced ones and 25 evenly spaced ones, without duplicates."""
    spaced = [*np.geomspace(1, steps, 25), *np.linspace(0, steps, 26)[1:]]
    return {round(t) for t in spaced}

def train(args, run):
    """One run: stage 1 on the pairs, stage 2 on the sentences; or both at once (joint)."""
    task, model = build(args)
    stage_1, stage_2 = examples(task, args.device)
    E = model.E.cpu().numpy()
    try:
        W_KQ = max_margin_kq(E, task.sentences, task.optimal)
    except ValueError as error:                              # of random embeddings
        raise common.RunError(str(error)) from error
    solutions = max_margin_ov(E, task.collocation), W_KQ
    solutions = [torch.from_numpy(W).to(model.E) for W in solutions]     # W_OV*, W_KQ*
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
        if step == steps_ov and not joint:
            print(f"step {step:,}: stage 2 starts, on the sentences' loss")
        optimizer.zero_grad()
        if train_ov:
            _, model.W_OV.grad, _ = gradients(model, *stage_1)
        if train_kq:
            loss, by_W_OV, model.W_KQ.grad = gradients(model, *stage_2)
            below = (loss < 1e-3) & (model.first < 0)        # an `if` would wait for the GPU
            model.first = torch.where(below, step - steps_ov, model.first)
        if joint:
            model.W_OV.grad += by_W_OV
        for W in model.parameters():
            if args.optimizer == "ngd" and W.grad is not None:
                # below 1e-150 the squares in the norm underflow, and the direction is lost
                W.grad /= W.grad.norm().clamp_min(1e-150)
        optimizer.step()
        if step + 1 in measured:
            metrics = panels(model, task, solutions)
            name = "kq" if train_kq else "ov"
            if metrics[f"gradient_{name}"] < 1e-150:
                raise common.RunError(f"gradient underflows at step {step + 1}: take fewer steps")
            metrics["stage"] = 0 if joint else STAGE[name]
            metrics["t"] = step + 1 - steps_ov if train_kq else step + 1
            shown = dict(loss=metrics[f"loss_{name}"], cosine=metrics[f"cosine_{name}"])
            run.log(step + 1, **shown, **metrics)

# ---- Measurement --------------------------------------------------------------------------------

MATRICES = {"ov": "W_OV", "kq": "W_KQ"}
STAGE = {"ov": 1, "kq": 2}                                   # in which the matrix is trained

def cosine(W, solution):
    """The cosine of the angle between two matrices; 0 if W is 0."""
    return ((W * solution).sum() / W.norm().clamp_min(1e-300) / solution.norm()).item()

@torch.no_grad()
def panels(model, task, solutions):
    """What Fig. 2 shows of a model, given the max-margin solutions W_OV* and W_KQ* (tensors).

    Losses in nats, cosines with the solutions, Frobenius norms, accuracy on the training
    sentences, and the norms of both gradients. excess is the loss of the sentences above its
    minimum: the loss with this W_OV if all attention is on x*.
    """
    stage_1, stage_2 = examples(task, model.E.device)
    loss_ov, by_W_OV, _ = gradients(model, *stage_1)
    loss_kq, _, by_W_KQ = gradients(model, *stage_2)
    sentences, next_tokens, _ = stage_2
    logits = model(sentences)
    losses, _ = loss_and_residual(logits, next_tokens)
    lowest, _ = loss_and_residual(model.token_logits()[task.optimal], next_tokens)
    right = logits.argmax(1) == next_tokens
    return {
        "accuracy": right.double().mean().item(),
        "loss_ov": loss_ov.item(),
        "cosine_ov": cosine(model.W_OV, solutions[0]),
        "norm_ov": model.W_OV.norm().item(),
        "loss_kq": loss_kq.item(),
        "excess": (losses - lowest).mean().item(),
        "cosine_kq": cosine(model.W_KQ, solutions[1]),
        "norm_kq": model.W_KQ.norm().item(),
        "gradient_ov": by_W_OV.norm().item(),
        "gradient_kq": by_W_KQ.norm().item(),
    }

def of_stage(metrics, name):
    """The lines of metrics.jsonl while a matrix is trained; joint training is stage 0."""
    return [line for line in metrics if line["stage"] in (0, STAGE[name])]

# The panels of Fig. 2: the y-axis, and the scales on which Theorems 1 and 2 expect a straight line
PANELS = {
    "loss": ("loss above its minimum (nats)", "linear", "log"),                      # e^(-ct)
    "direction": ("1 - cosine with the max-margin solution", "log", "log"),          # t^(-c)
    "norm": ("Frobenius norm", "linear", "linear"),                                  # ct
}

def curves(metrics, name):
    """The panels of one matrix, arrays (T,), and its steps t; total: the loss itself."""
    lines = of_stage(metrics, name)

    def column(key):
        return np.array([line[key] for line in lines])

    return {
        "t": column("t"),
        "loss": column("loss_ov" if name == "ov" else "excess"),         # loss_ov has the minimum 0
        "total": column(f"loss_{name}"),
        "direction": 1 - column(f"cosine_{name}"),
        "norm": column(f"norm_{name}"),
    }

def on_scale(x, scale):
    """x, or its logarithm."""
    return np.log(x) if scale == "log" else x

def fit(curve, panel):
    """The straight line of a panel by least squares: slope, R^2, and its ends: t (2,), y (2,).

    Each is None for fewer than 3 points. The fit leaves out rounding errors, the first half of the
    steps for the loss, and the first 100 for the direction, which has hardly begun to change.
    """
    t, y = curve["t"], curve[panel]
    begin = {"loss": t[-1] / 2, "direction": 100, "norm": 1}[panel]
    rounding = {"loss": 1e-12 * curve["total"], "direction": 1e-12, "norm": -1}[panel]
    used = (t >= begin) & (y > rounding)
    if used.sum() < 3:
        return None, None, None, None
    _, x_scale, y_scale = PANELS[panel]
    x, y = on_scale(t[used], x_scale), on_scale(y[used], y_scale)
    slope, offset = np.polyfit(x, y, 1)
    unexplained = ((y - slope * x - offset) ** 2).sum()
    total = ((y - y.mean()) ** 2).sum()
    r_squared = 1 - unexplained / total
    ends = np.array([begin, t[-1]])
    line = slope * on_scale(ends, x_scale) + offset
    return float(slope), float(r_squared), ends, np.exp(line) if y_scale == "log" else line

def unseen_sentences(task, n, rng):
    """Sentences (M, L) that are not in the data, M <= n; their optimal tokens, -1 for a file."""
    size = n, task.sentences.shape[1]
    if task.orders is None:
        drawn, truth = rng.integers(len(task.collocation), size=size), np.full(n, -1)
    else:
        drawn, truth = draw_sentences(*size, task.orders, rng)
    seen = set(map(tuple, task.sentences.tolist()))
    new = np.array([tuple(x) not in seen for x in drawn.tolist()])
    return drawn[new], truth[new]

def leads(scores, sentences, optimal):
    """By how much x* leads the other tokens of its sentence (N,); infinity if there are none.

    For scores (V, V) of each token with each query, sentences (N, L), x* (N,).
    """
    query = sentences[:, -1]
    others = scores[sentences, query[:, None]]                                       # (N, L)
    others[sentences == optimal[:, None]] = -np.inf
    return scores[optimal, query] - others.max(axis=1)

@torch.no_grad()
def generalisation(model, task, seed, n=20_000):
    """Theorem 3: accuracy on unseen sentences, in groups by what decides which token x* is optimal.

    decided    the order that the data imply
    extended   only extended_orders. Three parts:
      top      x* is optimal in some sentence of the data, beaten in none
      chain    x* is optimal in one sentence, beaten in another
      new      x* is compared in no sentence
    truth      the sentences of extended again, but with the x* of the true orders
    undecided  neither; x* is that of the true orders

    For each group: fraction_ of the unseen sentences; accuracy_, how often the model predicts
    n(x*); exact_, how often the exact W_KQ* gives x* the highest score; ties_, how often another
    token has the same score, to 1e-6 (wrong in exact_). None if a group has no sentences.
    """
    V = len(task.collocation)
    unseen, truth = unseen_sentences(task, n, np.random.default_rng(seed + 20_000))
    logits = model(torch.from_numpy(unseen).to(model.E.device))
    predicted = logits.argmax(1).cpu().numpy()
    E = model.E.cpu().numpy()
    scores = E.T @ max_margin_kq(E, task.sentences, task.optimal) @ E        # (token, query)

    said = said_orders(task.sentences, task.optimal, V)
    by_data = optimal_token(unseen, closure(said))           # -1 where there is none
    by_extension = optimal_token(unseen, extended_orders(task.sentences, task.optimal, V))
    extended = (by_data < 0) & (by_extension >= 0)
    # where by_extension is -1, these two mean nothing: `extended` is false there
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
        group = group & (optimal >= 0)                       # a file has no true orders
        best = optimal[group]
        lead = leads(scores, unseen[group], best)
        results[f"accuracy_{name}"] = mean(predicted[group] == task.collocation[best])
        results[f"exact_{name}"] = mean(lead > 1e-6)
        results[f"ties_{name}"] = mean(np.abs(lead) <= 1e-6)
    return results

# The straight line of each panel: its key in results.json, its name in the table
LINES = {
    "norm": ("norm_{}_rate", "norm"),
    "loss": ("loss_{}_rate", "log(loss - minimum)"),
    "direction": ("exponent_{}", "log(1 - cosine) against log t"),
}

def measure(args, run):
    """What Theorems 1 to 3 say of a trained run: its last metrics, straight lines, accuracies."""
    task, model = run.trained(build)
    results = {**run.metrics[-1]}
    for name in MATRICES:
        curve = curves(run.metrics, name)
        for panel, (key, _) in LINES.items():
            results[key.format(name)] = fit(curve, panel)[:2]
    results.update(generalisation(model, task, args.seed))
    results["steps_to_1e_3"] = None if model.first < 0 else int(model.first)
    return results

# ---- Tables and figures -------------------------------------------------------------------------

LEARNS = {"ov": "what follows each token", "kq": "to attend to the optimal token"}
ROWS = {                                                     # of the metrics
    "ov": {"loss_ov": "loss (nats)", "cosine_ov": "cosine with W_OV*", "norm_ov": "norm"},
    "kq": {"loss_kq": "loss (nats)", "excess": "loss above its minimum",
           "cosine_kq": "cosine with W_KQ*", "norm_kq": "norm", "accuracy": "training accuracy"},
}

def print_panels(run):
    """Fig. 2 of one run: each panel a row of numbers at log-spaced steps."""
    for name, matrix in MATRICES.items():
        lines = of_stage(run.metrics, name)
        shown = {round(t) for t in np.geomspace(1, lines[-1]["t"], 7)}
        cells = []
        for line in lines:
            if line["t"] in shown:
                for key, label in ROWS[name].items():
                    cells.append((label, line["t"], line[key], ".4g"))
        title = f"Fig. 2, seed {run.args.seed}: {matrix} learns {LEARNS[name]}"
        common.print_table(f"{title}; columns: steps of its stage", cells)

def print_theorems(runs):
    """What Theorems 1 and 2 say of one setting: median and range over seeds."""
    cells = []
    for run in runs:
        found = run.results
        for name, matrix in MATRICES.items():
            cells.append(("cosine", matrix, found[f"cosine_{name}"], ".4f"))
            for key, label in LINES.values():
                slope, r_squared = found[key.format(name)]
                cells.append((f"{label}: slope", matrix, slope, ".5f"))
                cells.append((f"{label}: R^2", matrix, r_squared, ".5f"))
        cells.append(("steps to a loss of 1e-3", "W_KQ", found["steps_to_1e_3"], ".0f"))
    common.print_table("Theorems 1 and 2: the cosine at the end, and straight lines fitted against "
                       "the step t of the stage", cells)

GROUPS = {                                                   # of generalisation()
    "decided": "decided by the data",
    "extended": "decided only by the extended order",
    "top": "of these: optimal in the data and never beaten",
    "chain": "of these: optimal in one sentence, beaten in another",
    "new": "of these: compared in no sentence",
    "truth": "the same, judged by the true orders",
    "undecided": "decided by neither, judged by the true orders",
}
TRAINED = """Theorem 3: accuracy on unseen sentences, by what decides which token is optimal
(the extended order: tokens once optimal > tokens never compared > tokens only beaten)"""
EXACT = "The same if all attention goes to the token that the exact W_KQ* scores highest"

def print_unseen(runs, title, measures):
    """Theorem 3 for one setting: median and range over seeds. measures: {name: column title}."""
    cells = []
    for run in runs:
        for group, row in GROUPS.items():
            for measure, column in measures.items():
                value = run.results[f"{measure}_{group}"]
                if value is not None:                        # None: there are no such sentences
                    cells.append((row, column, value))
    if cells:                                                # none if the data are all sentences
        common.print_table(title, cells)

def verdict(runs):
    """Whether one setting's runs show the theorems, and the numbers that this rests on."""
    cosines, fits, decided = [], [], []
    for run in runs:
        for name in MATRICES:
            cosines.append(run.results[f"cosine_{name}"])
            fits.append(run.results[f"norm_{name}_rate"][1] or 0)        # None: too few steps
        if run.results["accuracy_decided"] is not None:      # None: no sentence is decided so
            decided.append(run.results["accuracy_decided"])
    turned = min(cosines) >= 0.99 and min(fits) >= 0.999

    def seen(yes):
        return "seen here" if yes else "not seen here"

    print(f"""
The directions and norms of Theorems 1 and 2 are {seen(turned)}: at the end the cosines with the
max-margin solutions are at least {min(cosines):.4f} (asked for: 0.99), and straight lines fit the
norms with an R^2 of at least {min(fits):.4f} (0.999).""")
    if decided:
        print(f"""\
Theorem 3 is {seen(min(decided) == 1)}: if the data decide which token is optimal, the accuracy on
unseen sentences is at least {min(decided):.3f} (1).""")

def plot(runs):
    """Fig. 2: the panels of both matrices, and the fitted lines."""
    panels = {}
    for name, matrix in MATRICES.items():
        for panel, (what, x_scale, y_scale) in PANELS.items():
            drawn = []
            for run in runs:
                label = run.args.label or "training"
                curve = curves(run.metrics, name)
                drawn.append((label, curve["t"], curve[panel], {}))
                slope, _, t, line = fit(curve, panel)
                if slope is not None:
                    drawn.append((f"{label}: fit", t, line, dict(color="k", ls="--", lw=1)))
            axis = dict(xlabel=f"training steps of {matrix}", ylabel=what)
            axis.update(xscale=x_scale, yscale=y_scale)
            if x_scale == "linear":
                axis["xticks"] = np.linspace(0, curve["t"][-1], 5)       # so that none overlap
            panels[f"{matrix}: {panel}"] = axis, drawn
    common.plot(runs[0].folder.parent / "fig2.png", panels)

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    size = common.number(int, 2, 200)
    own = "in units of 1/sqrt(d) (default: the optimizer's own)"

    def choice(flag, choices, about):
        add(flag, nargs="+", choices=choices, default=choices[:1], help=about)

    add("--vocab-size", type=size, default=20, help="|V|, tokens; also d, the embedding's width")
    add("--n-sentences", type=common.positive_int, default=200, help="N, training sentences")
    add("--seq-len", type=size, default=5, help="L, tokens of a sentence")
    choice("--order", ORDERS, "the strict order of each query")
    choice("--embedding", ["orthonormal", "gaussian"], "of the tokens")
    choice("--weights", ["random", "uniform"], "of the pairs in stage 1")
    add("--sentences", help="a file of sentences and their next tokens, to train on instead")
    choice("--optimizer", list(STEP_SIZES), "normalised gradient descent, plain, or Adam")
    choice("--stages", ["two", "joint"], "W_OV, then W_KQ; or both at once")
    add("--steps-ov", type=common.positive_int, default=2_000, help="steps of stage 1")
    add("--steps", type=common.positive_int, default=20_000, help="of stage 2, or joint training")
    add("--lr-ov", type=common.positive_float, help=f"eta_0, the step size of W_OV, {own}")
    add("--lr", type=common.positive_float, help=f"eta, the step size of W_KQ, {own}")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds of data and embedding")
    return common.parse_args(parser, PRESETS, argv)

def show(runs):
    """Each setting's tables (Fig. 2: of its first seed) and verdict; with --plot draws Fig. 2."""
    if runs[0].args.plot:
        plot(runs)
    for label in dict.fromkeys(run.args.label for run in runs):
        seeds = [run for run in runs if run.args.label == label]
        print(f"\n{label or 'Measured'} (seeds: {len(seeds)})")
        print_panels(seeds[0])
        print_theorems(seeds)
        print_unseen(seeds, TRAINED, {"fraction": "fraction of sentences", "accuracy": "accuracy"})
        print_unseen(seeds, EXACT, {"exact": "accuracy", "ties": "ties, counted as wrong"})
        verdict(seeds)

def main(argv=None):
    """Trains what the flags ask for, prints the tables, and returns a dict of results a run."""
    args = parse_args(argv)
    runs = common.sweep(args, SWEEP, build, resolve)
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
