r"""
Birth of a Transformer: A Memory Viewpoint. Bietti, Cabannes, Bouchacourt, Jegou, Bottou. NeurIPS 2023, arXiv 2306.00802

On sequences that mix global bigrams (those of English text) with bigrams private to a sequence, a two-layer transformer
learns the global ones fast, then slowly builds an induction head. Each weight matrix is an associative memory, a sum of
outer products of embeddings, and a probe reads off which pairs it holds. The memories are learned from the top down:
what to output (W_O2), then which key to look for (W_K2), then how to attend to the previous token (W_K1).

What to look for, in the order in which each first reaches a half: wo2, then wk2, then the in-context accuracy, and with it
wk1. Later thresholds hide that order (wk2 is a share of five triggers, wo2 one of 65 characters, whose last ones are slow),
and so do self-loops: where a trigger's output may be the trigger itself, the sequence is stuck, a fifth of all scored
predictions are such loops, and they teach W_K2 its pairs before there is anything to output. The quick preset leaves
them out, --preset paper has them; with --self-loops --seq-len 64, wk2 comes first.

    python memory_birth.py                                                   the birth of an induction head, in a minute
    python memory_birth.py --preset paper                                    the paper's setting: batch 512, T = 256

    Fig. 3, one panel for each --freeze (none, then some matrices until step 300):
    python memory_birth.py --preset paper --triggers fixed --loss in-context --no-use-wf --steps 1000 --plot \
        --freeze --freeze wo2:300 --freeze wk1:300 wk2:300 --freeze wk1:300 --freeze wk2:300
    Fig. 4, left (global before in-context, fixed before random triggers) and right (outputs, and their transfer):
    python memory_birth.py --preset paper --triggers fixed random --outputs uniform bigram
    Sec. 3, one layer against two, everything trained:
    python memory_birth.py --model full --n-layer 1 2 --loss all
    Sec. 6, Theorem 3, three gradient steps from zero, and what breaks them:
    python memory_birth.py --three-steps

Without --preset paper, the same flags give the same figures, small enough for a laptop (for Fig. 4: --loss all --use-wf).
"""
import argparse
import base64
import math
import string
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 3): global bigrams, and K triggers whose successors are private to the sequence -----------------
CHARS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase

def shakespeare_pairs():
    """The 1,115,393 adjacent pairs of Tiny Shakespeare, counted: (V, V) int64, row: first character, V = 65."""
    planes = np.frombuffer(zlib.decompress(base64.b85decode("".join(PAIRS.split()))), np.uint8).reshape(3, 65, 65)
    return torch.from_numpy(np.tensordot([1, 256, 65536], planes.astype(np.int64), 1))     # low, middle, high bytes

LARGE = 2**31 - 1                 # draw % n is uniform up to n / LARGE, 2e-4 at most; mps has no larger random integers

class BigramTask:
    """Sequences z_1 ... z_{T+1} over V characters (Sec. 3).

    For each sequence, K triggers q_k (fixed: the K most frequent characters; random: drawn from pi_u without
    replacement) get an output o_k (uniform over V; bigram: from pi_b(.|q_k)). z_1 ~ pi_u, and z_t = o_k where
    z_{t-1} = q_k, else z_t ~ pi_b(.|z_{t-1}). pi_u and pi_b are the character and pair frequencies of `text`, a path;
    None is Tiny Shakespeare, unless vocab_size is given: so many characters, and pi_u and pi_b are uniform.

    A sequence with o_k = q_k is stuck from q_k on, in a loop of one. Without self_loops, o_k is another character.
    Raises OSError for a text that cannot be read, ValueError for one without K characters, or in which a character
    is followed by nothing but itself where there are to be no self-loops.
    """

    def __init__(self, k=5, seq_len=256, triggers="fixed", outputs="uniform", text=None, device="cpu",
                 self_loops=True, vocab_size=None):
        self.k, self.seq_len, self.triggers, self.outputs, self.device = k, seq_len, triggers, outputs, device
        if vocab_size is not None:
            self.chars = "".join(chr(ord("!") + v) for v in range(vocab_size))
            pairs = torch.ones(vocab_size, vocab_size, dtype=torch.long)
            counts = pairs[0]
        elif text is None:
            self.chars, pairs = CHARS, shakespeare_pairs()
            counts = torch.maximum(pairs.sum(0), pairs.sum(1))       # the pairs miss one end of the text or the other
        else:
            text = Path(text).read_text(encoding="utf-8")
            self.chars, V = "".join(sorted(set(text))), len(set(text))
            number = {char: i for i, char in enumerate(self.chars)}
            z = torch.tensor([number[char] for char in text], dtype=torch.long)
            pairs = torch.bincount(z[:-1] * V + z[1:], minlength=V * V).view(V, V)
            counts = torch.bincount(z, minlength=V)
        V = self.vocab_size = len(self.chars)
        if not 1 <= k <= V or V < 2:
            raise ValueError(f"{k} triggers need as many characters, and two at least; there are {V}")
        pairs = torch.where(pairs.sum(1, keepdim=True) > 0, pairs, counts)       # a text's very last character: pi_u
        self.unigram = (counts / counts.sum()).to(self.device)
        self.bigram = (pairs / pairs.sum(1, keepdim=True)).to(self.device)
        # All successors in one list, sorted by the character before: a's are successors[start[a]], width[a] of them.
        # V entries at its end stand for themselves, so that a trigger is a character with the one successor o_k.
        everyone = torch.arange(V)
        self.successors = torch.cat([everyone.repeat(V).repeat_interleave(pairs.flatten()), everyone]).to(self.device)
        self.width = pairs.sum(1).to(self.device)
        self.start = self.width.cumsum(0) - self.width
        self.total = int(pairs.sum())
        # Weights of the outputs, summed up along each row: o_k is the first column above a draw from 0 to the row's sum
        self.outputs_upto = {}
        for name, weights in dict(uniform=torch.ones_like(pairs), bigram=pairs).items():
            if not self_loops:
                weights = weights - weights.diag().diag()
            if (weights.sum(1) == 0).any():
                raise ValueError("a character that only itself follows has no output without self-loops")
            self.outputs_upto[name] = weights.cumsum(1).to(self.device)                   # (V, V)
        self.fixed = self.unigram.topk(self.k).indices                           # (K,)

    def sample(self, batch, generator):
        """Returns tokens (B, T+1), and occurrence (B, T): n where the token is a trigger for the n-th time, else 0."""
        B, T, V, K = batch, self.seq_len, self.vocab_size, self.k
        if self.triggers == "fixed":
            q = self.fixed.expand(B, K)
        else:
            race = torch.empty(B, V, device=self.device).exponential_(generator=generator) / self.unigram
            q = race.topk(K, largest=False).indices                              # without replacement (B, K)
        upto = self.outputs_upto[self.outputs][q]                                # (B, K, V)
        draw = torch.randint(LARGE, (B, K, 1), generator=generator, device=self.device) % upto[:, :, -1:]
        o = torch.searchsorted(upto, draw, right=True).squeeze(2)                # (B, K)
        start = self.start.expand(B, V).scatter(1, q, self.total + o)            # each sequence's own table
        width = self.width.expand(B, V).scatter(1, q, 1)

        draw = torch.randint(LARGE, (T + 1, B), generator=generator, device=self.device)
        z = torch.empty(T + 1, B, dtype=torch.long, device=self.device)
        z[0] = torch.multinomial(self.unigram, B, replacement=True, generator=generator)
        for t in range(T):                                                       # a chain is sequential in t alone
            here = z[t].unsqueeze(1)
            z[t + 1] = self.successors[start.gather(1, here)[:, 0] + draw[t] % width.gather(1, here)[:, 0]]
        tokens = z.T.contiguous()                                                # (B, T+1)
        hit = tokens[:, None, :T] == q[:, :, None]                               # (B, K, T)
        return tokens, (hit.cumsum(2) * hit).sum(1)

# ---- The models -----------------------------------------------------------------------------------------------------
def attend(query, key, value, mask):
    """softmax(query key^T + mask) value, for (B, T, d) each; also returns the attention weights (B, T, T)."""
    attn = (query @ key.mT + mask).softmax(-1)
    return attn @ value, attn

class SimpleTransformer(nn.Module):
    """The simplified model of Sec. 4.2: two layers of one head, no layer norm, no MLP, mostly frozen and random.

        x_t = W_E(z_t) + p_t
        h_t = x_t + W_O1 W_V1 sum_s a_ts x_s        a = softmax over s <= t of x_t . W_K1 x_s / sqrt(d)
        g_t = h_t + W_O2 W_V2 sum_s b_ts h_s        b = softmax over s <= t of h_t . W_K2 h_s / sqrt(d)
        logits = W_U (g_t + W_F g_t)                W_F only with use_wf

    Trained: W_K1, W_K2, W_O2 and W_F. Matrices start uniform in +-1/sqrt(d), embeddings as N(0, 1).
    """

    def __init__(self, vocab_size, block_size, n_embd, use_wf=False):
        super().__init__()
        V, T, d = vocab_size, block_size, n_embd
        def random(rows): return torch.empty(rows, d).uniform_(-1, 1) / math.sqrt(d)
        for name, frozen in dict(W_E=torch.randn(V, d), P=torch.randn(T, d), W_U=random(V), W_V1=random(d),
                                 W_O1=random(d), W_V2=random(d)).items():
            self.register_buffer(name, frozen)
        self.W_K1, self.W_K2, self.W_O2 = (nn.Parameter(random(d)) for _ in range(3))
        self.W_F = nn.Parameter(random(d)) if use_wf else None
        self.register_buffer("mask", torch.full((T, T), -math.inf).triu(1), persistent=False)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also the layers' attention weights, (B, 1, T, T) each."""
        T, d = tokens.shape[1], self.W_E.shape[1]

        def embed(W=None):                     # W x_t, without a product for each token: W x_t = (W W_E)(z_t) + W p_t
            E, P = (self.W_E, self.P[:T]) if W is None else (self.W_E @ W.mT, self.P[:T] @ W.mT)
            return F.embedding(tokens, E) + P                                    # (B, T, d)

        mask = self.mask[:T, :T]
        x = embed()
        y, attn1 = attend(x, embed(self.W_K1 / math.sqrt(d)), embed(self.W_O1 @ self.W_V1), mask)
        h = x + y
        # U (h + W_OV2 b h) as U h + b (U W_OV2 h): linear maps are merged while they are small, V < d
        U = self.W_U if self.W_F is None else self.W_U + self.W_U @ self.W_F                               # (V, d)
        y, attn2 = attend(h @ (self.W_K2 / math.sqrt(d)), h, h @ (U @ (self.W_O2 @ self.W_V2)).mT, mask)
        logits = h @ U.mT + y                                                                              # (B, T, V)
        return (logits, [attn1.unsqueeze(1), attn2.unsqueeze(1)]) if return_attn else logits

class FullTransformer(nn.Module):
    """The full model of Sec. 3: GPT-2's blocks, learned positions, everything trained.

    The authors' has ReLU, no biases, and an MLP that reads the normed input of the block in place of the attention's
    output; here they are GPT-2's. It keeps torch's initialisation. From GPT-2's own, N(0, 0.02), the induction head takes several times as long.
    """

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList([common.Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also the layers' attention weights, (B, H, T, T) each."""
        x, attns = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]], []
        for block in self.h:
            x, attn = block(x, return_attn=True) if return_attn else (block(x), None)
            attns.append(attn)
        logits = self.lm_head(self.ln_f(x))
        return (logits, attns) if return_attn else logits

# ---- Training (App. E) ----------------------------------------------------------------------------------------------
def build(args):
    """The task and the model of a run."""
    task = BigramTask(args.n_triggers, args.seq_len, args.triggers, args.outputs, args.text, args.device,
                      args.self_loops, args.vocab_size)
    if args.model == "simple":
        model = SimpleTransformer(task.vocab_size, args.seq_len, args.n_embd, args.use_wf)
    else:
        model = FullTransformer(task.vocab_size, args.seq_len, args.n_layer, args.n_head, args.n_embd)
    return task, model.to(args.device)

def chunk_size(task):
    """Sequences to work on at once: on a CPU few enough that a layer's attention weights, 4 MB, stay in the cache."""
    return max(1, 2**20 // task.seq_len**2) if torch.device(task.device).type == "cpu" else 2**20

def train(args, run):
    """One run of the sweep; continues from its checkpoint where there is one. Returns its results."""
    task, model = build(args)
    if args.model == "simple":
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True,
                                      weight_decay=args.weight_decay, capturable=torch.device(args.device).type == "cuda")
    data = torch.Generator(args.device).manual_seed(args.seed)                   # training batches alone
    start = run.restore(model=model, optimizer=optimizer, data=data)
    frozen_until = {name: int(step) for name, step in (item.split(":") for item in args.freeze)}
    chunk = chunk_size(task)

    def training_step():
        tokens, occurrence = task.sample(args.batch_size, data)                  # (B, T+1), (B, T)
        scored = torch.ones_like(occurrence) if args.loss == "all" else occurrence >= 2
        weight = scored / scored.sum().clamp_min(1)
        total = 0.0
        for z, w in zip(tokens.split(chunk), weight.split(chunk)):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logits = model(z[:, :-1])                                        # (chunk, T, V)
            ce = F.cross_entropy(logits.float().flatten(0, 1), z[:, 1:].flatten(), reduction="none")
            loss = ce @ w.flatten()
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    if start == 0:
        run.log(0, **measure(args, model, task))
    for step in run.steps(start, args.steps):
        if step == start or step in frozen_until.values():                       # a frozen matrix has no gradient
            for name, until in frozen_until.items():
                getattr(model, name.replace("w", "W_").upper()).requires_grad_(step >= until)
            step_once = common.compile_step(training_step, model, data) if args.compile else training_step
        step_once()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            run.log(step + 1, **measure(args, model, task))
            run.save(step + 1)

    results = {key: value for key, value in run.metrics[-1].items() if key not in ("step", "seconds")}
    for task.outputs in "uniform", "bigram":                                     # Fig. 4, right: does it transfer?
        results[f"accuracy_{task.outputs}"] = evaluate(model, task, n=1024)["accuracy"]
    results["first"] = {key: next((m["step"] for m in run.metrics if m[key] >= 0.5), None)
                        for key in ("wo2", "wk2", "wk1_64", "accuracy") if key in results}
    return results

# ---- Three gradient steps (Sec. 6, Theorem 3; App. B) ----------------------------------------------------------------
# The theorem's setting, and what breaks it: embeddings that overlap, and sequences that are stuck in a loop of one
CASES = {
    "orthonormal": dict(embedding="orthonormal", self_loops=False),
    "gaussian": dict(embedding="gaussian", self_loops=False),
    "self-loops": dict(embedding="orthonormal", self_loops=True),
}

@torch.no_grad()
def theorem_init_(model, embedding):
    """In place: trained matrices zero, and frozen ones as in the theorem, with embeddings of norm 1.

    orthonormal: the rows of W_E, P, W_OV1 W_E, W_OV1 P and W_U are different members of one orthonormal basis, which
    takes d >= 3 V + 2 T, and W_V2 is orthogonal. gaussian: all are random, so that any two overlap by about 1/sqrt(d).
    """
    V, d = model.W_E.shape
    n = V + len(model.P)
    for W in model.parameters():
        W.zero_()
    if embedding == "gaussian":
        for W in (model.W_E, model.P):
            W /= math.sqrt(d)
        for W in (model.W_U, model.W_O1, model.W_V1, model.W_V2):                # entries of variance 1/d keep norms
            W *= math.sqrt(3)
    else:
        basis = torch.linalg.qr(torch.randn(d, d)).Q                             # rows b_0 ... b_{d-1}
        model.W_E.copy_(basis[:V])
        model.P.copy_(basis[V:n])
        model.W_U.copy_(basis[2 * n:2 * n + V])
        model.W_O1.copy_(torch.eye(d))
        model.W_V1.copy_(basis.roll(-n, 0).mT @ basis)                           # b_i -> b_{i+n}
        model.W_V2.copy_(torch.linalg.qr(torch.randn(d, d)).Q)

@torch.no_grad()
def mean_logit(model, name):
    """The mean logit, or attention score, of the pairs that a memory should hold."""
    E, P, scale = model.W_E, model.P, 1 / math.sqrt(model.W_E.shape[1])
    if name == "W_O2":
        return (E @ (model.W_U @ model.W_O2 @ model.W_V2).mT).diagonal().mean()                # v -> v
    if name == "W_K2":
        return scale * (E @ model.W_K2 @ (E @ (model.W_O1 @ model.W_V1).mT).mT).diagonal().mean()    # q -> after q
    return scale * (P @ model.W_K1 @ P.mT).diagonal(-1).mean()                                 # t -> t - 1

def three_steps(args, seed, case):
    """Theorem 3: from zero matrices, one large gradient step on W_O2, then W_K2, then W_K1, each after the others.

    Unigrams and bigrams are uniform over --vocab-size characters, triggers random; the loss is the sum over a
    trigger's second and later occurrences. Each step is as large as gives its memory's pairs a mean logit of
    --step-logits: a first one above 1 makes the model too sure of the current token for the later gradients. Returns a
    row (probes, accuracy) before the first step and after each, all measured on sequences without self-loops;
    self_loops: their share of the predictions that gave the gradient.
    """
    common.seed_everything(seed)
    setting = dict(k=args.n_triggers, seq_len=args.seq_len, triggers="random", vocab_size=args.vocab_size)
    task = BigramTask(**setting, device=args.device, self_loops=CASES[case]["self_loops"])
    test = BigramTask(**setting, device=args.device, self_loops=False)
    model = SimpleTransformer(args.vocab_size, args.seq_len, args.n_embd).to(args.device)
    theorem_init_(model, CASES[case]["embedding"])
    data = torch.Generator(args.device).manual_seed(seed)

    rows = [dict(case=case, step="start", self_loops=None, **probes(model, test), **evaluate(model, test, n=4096))]
    for name, logit in zip(("W_O2", "W_K2", "W_K1"), args.step_logits):
        W = getattr(model, name)
        gradient, n_scored, n_loops = torch.zeros_like(W), 0, 0
        for drawn in range(0, args.batch_size, 4096):
            tokens, occurrence = task.sample(min(4096, args.batch_size - drawn), data)
            scored = occurrence >= 2
            some = scored.any(1)                                                 # half of the sequences have no repeat
            for z, at in zip(tokens[some].split(256), scored[some].split(256)):
                loss = F.cross_entropy(model(z[:, :-1])[at], z[:, 1:][at], reduction="sum")
                gradient += torch.autograd.grad(loss, W)[0]
            n_scored += scored.sum().item()
            n_loops += (scored & (tokens[:, 1:] == tokens[:, :-1])).sum().item()
        with torch.no_grad():
            W.copy_(-gradient)
            W *= logit / mean_logit(model, name)
        rows.append(dict(case=case, step=name, self_loops=n_loops / max(1, n_scored), **probes(model, test),
                         **evaluate(model, test, n=4096)))
    return rows

# ---- Measurement: the memories' probes (Sec. 5), and what the model does on fresh sequences -------------------------
@torch.no_grad()
def recall_wk1(model, first=None):
    """Share of positions 1 <= t < first (None: all) at which W_K1 points to t - 1: argmax_s p_t . W_K1 p_s = t - 1."""
    P = model.P[:first]
    return ((P @ model.W_K1 @ P.mT).argmax(1)[1:] == torch.arange(len(P) - 1, device=P.device)).float().mean().item()

@torch.no_grad()
def probes(model, task):
    """What a SimpleTransformer's matrices hold, four numbers (Sec. 5).

    wk1: share of positions t with argmax_s p_t . W_K1 p_s = t - 1.
    wk2: share of trigger characters q (any character where triggers are random) whose key is their own,
         argmax_q' W_E(q) . W_K2 W_O1 W_V1 W_E(q') = q. For fixed triggers the authors look for the argmax among the
         K triggers, where chance is 1/K; over all characters, as here, it is 1/V.
    wo2: share of characters v with argmax_j (W_U W_O2 W_V2 W_E(v))_j = v.
    wf:  mean KL(pi_b(.|v) || softmax(W_U W_F W_E(v))) in nats over characters that are not fixed triggers; a model
         without W_F counts as W_F = 0.
    """
    E, everyone = model.W_E, torch.arange(task.vocab_size, device=model.W_E.device)
    key = (E @ model.W_K2 @ (E @ (model.W_O1 @ model.W_V1).mT).mT).argmax(1) == everyone
    out = (E @ (model.W_U @ model.W_O2 @ model.W_V2).mT).argmax(1) == everyone
    W_F = torch.zeros_like(model.W_K2) if model.W_F is None else model.W_F
    log_p = (E @ (model.W_U @ W_F).mT).log_softmax(-1)
    kl = (torch.special.xlogy(task.bigram, task.bigram) - task.bigram * log_p).sum(1)                    # (V,)
    fixed = torch.zeros_like(key).index_fill(0, task.fixed, task.triggers == "fixed")
    return dict(wk1=recall_wk1(model), wk2=(key[fixed] if fixed.any() else key).float().mean().item(),
                wo2=out.float().mean().item(), wf=kl[~fixed].mean().item() if not fixed.all() else 0.0)

@torch.no_grad()
def evaluate(model, task, n=256, seed=10_000):
    """On n fresh sequences, the same at every call: cross-entropies in nats, in-context accuracy, attention.

    Global: tokens that follow no trigger. In context: a trigger's second and later occurrences. attn_prev: share of
    queries right after a trigger at which layer 1 attends most to the previous position; attn_match: share of queries
    at a repeated trigger at which the last layer attends most to a position that follows the same character; both of
    the best head.
    """
    batches = []
    generator = torch.Generator(task.device).manual_seed(seed)
    for tokens, occurrence in zip(*(x.split(chunk_size(task)) for x in task.sample(n, generator))):
        z, y = tokens[:, :-1], tokens[:, 1:]
        logits, attns = model(z, return_attn=True)
        ce = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        right = (logits.argmax(-1) == y).float()
        repeat, after = occurrence >= 2, F.pad(occurrence[:, :-1] > 0, (1, 0))
        tops = [attn.argmax(-1).transpose(0, 1) for attn in attns]               # (H, B, T): where each head looks
        previous = tops[0] == torch.arange(-1, z.shape[1] - 1, device=z.device)
        before = F.pad(z[:, :-1], (1, 0), value=-1).expand_as(tops[-1])          # each position's predecessor
        match = before.gather(2, tops[-1]) == z
        batches.append([ce.flatten(), ce[occurrence == 0], ce[repeat], right[repeat],
                        previous[:, after].float(), match[:, repeat].float()])
    loss, loss_global, loss_in_context, accuracy, previous, match = (torch.cat(x, -1).mean(-1) for x in zip(*batches))
    return dict(loss_all=loss.item(), loss_global=loss_global.item(), loss_in_context=loss_in_context.item(),
                accuracy=accuracy.item(), attn_prev=previous.max().item(),
                attn_match=match.max().item() if len(attns) > 1 else None)

def measure(args, model, task):
    """All that a line of metrics.jsonl holds; `loss` is the one that is trained."""
    model.eval()
    metrics = evaluate(model, task)
    if args.model == "simple":
        metrics.update(probes(model, task), wk1_64=recall_wk1(model, 64))
    model.train()
    loss = metrics["loss_all" if args.loss == "all" else "loss_in_context"]
    return dict(loss=loss, accuracy=metrics.pop("accuracy"), **metrics)

# ---- The command, its tables and its figure -------------------------------------------------------------------------
# A dict holds what differs between the models. The full model's learning rate and initialisation are our choice.
PRESETS = {
    "quick": dict(model=["simple"], n_layer=[2], loss=["in-context"], triggers=["fixed"], outputs=["uniform"],
                  use_wf=False, seq_len=dict(simple=24, full=64), self_loops=dict(simple=False, full=True),
                  batch_size=dict(simple=128, full=64), steps=dict(simple=600, full=1_000),
                  lr=dict(simple=0.2, full=3e-3), weight_decay=dict(simple=1e-4, full=1e-2),
                  eval_every=dict(simple=5, full=20)),
    "paper": dict(model=["simple"], n_layer=[2], loss=["all"], triggers=["random"], outputs=["uniform"],
                  use_wf=True, seq_len=256, self_loops=True, batch_size=512, steps=dict(simple=10_000, full=1_000),
                  lr=dict(simple=0.2, full=3e-3), weight_decay=dict(simple=1e-4, full=1e-2), eval_every=50),
}
THREE_STEPS = dict(n_triggers=2, vocab_size=24, seq_len=32, n_embd=136, batch_size=128_000)
SWEEP = ["model", "n_layer", "loss", "triggers", "outputs", "freeze", "seed"]

def parse_args(argv=None):
    """The command line. What cannot be run ends here, before anything is written."""
    parser = argparse.ArgumentParser(description="Birth of a Transformer: A Memory Viewpoint, Bietti et al., NeurIPS 2023",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, count = parser.add_argument, common.positive_int
    add("--model", nargs="+", choices=["simple", "full"], help="Sec. 4.2's simplified model, Sec. 3's full one")
    add("--n-layer", nargs="+", type=count, help="layers of the full model; the simple one has 2")
    add("--n-head", type=count, default=4, help="heads a layer of the full model; the simple one has 1")
    add("--n-embd", type=count, default=128, help="width d")
    add("--use-wf", action=argparse.BooleanOptionalAction, help="W_F in the simple model, the memory of global bigrams")
    add("--n-triggers", type=count, default=5, help="K, the triggers of a sequence")
    add("--triggers", nargs="+", choices=["fixed", "random"], help="the K most frequent, or drawn for each sequence")
    add("--outputs", nargs="+", choices=["uniform", "bigram"], help="a trigger's output: uniform, or from its bigrams")
    add("--text", help="a text file that gives the bigrams (default: Tiny Shakespeare's, embedded)", default=None)
    add("--vocab-size", type=count, help="so many characters with uniform bigrams, in place of a text's", default=None)
    add("--self-loops", action=argparse.BooleanOptionalAction, help="a trigger's output may be the trigger itself")
    add("--seq-len", type=count, help="T, predictions a sequence")
    add("--loss", nargs="+", choices=["all", "in-context"], help="all tokens, or triggers' outputs from the second on")
    add("--freeze", nargs="*", action="append", metavar="W:STEP",
        help="keep wk1, wk2, wo2 or wf frozen until STEP; give the flag again for another run of the sweep")
    add("--batch-size", type=count, help="sequences a step")
    add("--steps", type=count, help="training steps")
    add("--lr", type=float, help="learning rate: SGD with momentum 0.9 (simple), AdamW (full)")
    add("--weight-decay", type=float, help="weight decay")
    add("--seed", nargs="+", type=int, default=[0], help="seeds of weights and data")
    add("--three-steps", action="store_true", help="Theorem 3: three gradient steps, of BATCH_SIZE sequences each")
    add("--step-logits", nargs=3, type=float, default=[1.0, 5.0, 20.0], metavar=("O2", "K2", "K1"),
        help="three steps: the mean logit that a step gives to its memory")
    own = THREE_STEPS if "--three-steps" in (argv or sys.argv) else {}
    args = common.parse_args(parser, {name: {**preset, **own} for name, preset in PRESETS.items()}, argv)
    args.freeze = args.freeze or [[]]
    for item in (item for items in args.freeze for item in items):
        name, _, step = item.partition(":")
        if name not in ("wk1", "wk2", "wo2", "wf") or not step.isdecimal():
            parser.error(f"--freeze {item}: give wk1, wk2, wo2 or wf, a colon and a step, as in wo2:300")
        if name == "wf" and not args.use_wf:
            parser.error("--freeze wf needs --use-wf")
    for items in args.freeze:
        frozen = {name for name, _, step in (item.partition(":") for item in items) if int(step) > 0}
        if frozen >= {"wk1", "wk2", "wo2", *(["wf"] if args.use_wf else [])}:
            parser.error(f"--freeze {' '.join(items)}: nothing is left to train at the start")
    if "full" in args.model and any(args.freeze):
        parser.error("--freeze works on the simple model's matrices: leave out --model full")
    if "full" in args.model and args.n_embd % args.n_head:
        parser.error(f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}")
    if "simple" in args.model and args.n_layer != [2]:
        parser.error("the simple model has two layers: --n-layer is for --model full")
    if isinstance(args.seq_len, int) and args.seq_len < 4:
        parser.error(f"--seq-len {args.seq_len}: no room for a trigger to come back; give 4 or more")
    if args.three_steps and args.plot:
        parser.error("--three-steps has a table and no figure: leave out --plot")
    if args.text is not None and args.vocab_size is not None:
        parser.error("--vocab-size gives uniform bigrams, --text its own: leave one out")
    if args.three_steps and args.n_embd < 3 * args.vocab_size + 2 * args.seq_len:
        parser.error(f"--three-steps: orthonormal embeddings of {args.vocab_size} characters and {args.seq_len} positions "
                     f"need --n-embd {3 * args.vocab_size + 2 * args.seq_len} or more")
    try:
        BigramTask(args.n_triggers, text=args.text, self_loops=args.self_loops is True, vocab_size=args.vocab_size)
    except (OSError, ValueError) as error:
        parser.error(f"--n-triggers {args.n_triggers}, {args.text or args.vocab_size or 'Tiny Shakespeare'}: {error}")
    return args

COLUMNS = dict(loss_global="global", loss_in_context="in-context", accuracy="accuracy", wo2="wo2", wk2="wk2",
               wk1_64="wk1<64", wk1="wk1", wf="KL wf", attn_prev="attn prev", attn_match="attn match")

def print_three_steps(rows):
    """A line for the start and for each step, of each case of CASES."""
    names = ["loss_in_context", "accuracy", "wo2", "wk2", "wk1", "attn_prev", "attn_match", "self_loops"]
    cells = [[str(seed), row["case"], row["step"],
              *("-" if row[name] is None else f"{row[name]:.3f}" for name in names)] for seed, row in rows]
    print("\nLoss in context (nats), accuracy, probes and attention, on sequences without self-loops"
          "\nloops: the share of self-loops among the predictions whose gradient was taken")
    common.print_table(["seed", "case", "after", *(COLUMNS.get(name, "loops") for name in names)], cells)

def print_course(run):
    """A run's evaluations at log-spaced steps: losses in nats, shares as in evaluate() and probes()."""
    metrics = run.read("metrics.jsonl")
    names = [name for name in COLUMNS if metrics[0].get(name) is not None and (run.args.use_wf or name != "wf")]
    shown = sorted({0, *np.geomspace(1, len(metrics) - 1, 24).round().astype(int)})
    print(f"\n{run.name}: losses on global and in-context tokens in nats; accuracy in context; probes; attention")
    rows = [[str(metrics[i]["step"]), *(f"{metrics[i][name]:.3f}" for name in names)] for i in shown]
    common.print_table(["step", *(COLUMNS[name] for name in names)], rows)

def print_summary(runs, results):
    """A row a setting, median and range over its seeds: the end of the run, and when each memory was first half full."""
    paper = {("full", 1): "0.55", ("full", 2): "> 0.99"}                         # Sec. 3, in-context accuracy
    settings = {}
    for run, result in zip(runs, results):
        settings.setdefault(tuple(str(vars(run.args)[key]) for key in SWEEP[:-1]), []).append((run.args, result))
    rows = []
    for group in settings.values():
        args, results = group[0][0], [result for _, result in group]
        rows.append([args.model, str(args.n_layer), args.loss, args.triggers, args.outputs,
                     " ".join(args.freeze) or "-",
                     *(common.spread([result[key] for result in results])
                       for key in ("loss_global", "loss_in_context", "accuracy_uniform", "accuracy_bigram")),
                     paper.get((args.model, args.n_layer), ""),
                     *(common.spread([result["first"].get(key) for result in results], ".0f")
                       for key in ("wo2", "wk2", "wk1_64", "accuracy"))])
    print("\nAt the end (median [range] over seeds), and the first evaluated step at which each is at least 0.5:")
    common.print_table(["model", "layers", "loss on", "triggers", "outputs", "frozen", "global", "in-context",
                        "acc uniform", "acc bigram", "paper", "wo2", "wk2", "wk1<64", "accuracy"], rows)

def plot(runs, path):
    """Fig. 3: a column a run, with its accuracy and its probes against the step, and both layers' attention below."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(4, len(runs), figsize=(4.2 * len(runs), 14), squeeze=False)
    for run, (top, middle, *maps) in zip(runs, axes.T):
        metrics = run.read("metrics.jsonl")
        for axis, names in (top, ["accuracy", "attn_prev", "attn_match"]), (middle, ["wo2", "wk2", "wk1_64", "wk1"]):
            for name in names:
                if metrics[0].get(name) is not None:
                    axis.plot([m["step"] for m in metrics], [m[name] for m in metrics], label=COLUMNS[name])
            axis.set(xlabel="step", ylim=(-0.02, 1.02))
            axis.legend()
        top.set_title(run.name.replace(",", "\n"), fontsize=9)
        task, model = build(run.args)
        checkpoint = torch.load(run.folder / "ckpt.pt", map_location=run.args.device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        tokens = task.sample(1, torch.Generator(run.args.device).manual_seed(0))[0][:, :-1][:, :40]
        with torch.no_grad():
            attns = model(tokens, return_attn=True)[1]
        names = [repr(task.chars[c])[1:-1] for c in tokens[0].tolist()]
        for axis, attn, layer in zip(maps, attns, (1, 2)):
            axis.imshow(attn[0].mean(0).float().cpu(), cmap="Blues")
            axis.set(title=f"attention of layer {layer}", xlabel="to", ylabel="from")
            axis.set_xticks(range(len(names)), names, fontsize=6)
            axis.set_yticks(range(len(names)), names, fontsize=6)
        for axis in maps[len(attns):]:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")

def main():
    """Trains what the flags ask for, prints the tables."""
    args = parse_args()
    if args.three_steps:
        print_three_steps([(seed, row) for seed in args.seed for case in CASES for row in three_steps(args, seed, case)])
        return
    runs = common.sweep(args, PRESETS, SWEEP)
    results = common.complete(runs, train)
    for run in runs:
        if run.args.seed == args.seed[0]:
            print_course(run)
    print_summary(runs, results)
    if args.plot:
        plot([run for run in runs if run.args.seed == args.seed[0]], Path(args.out_dir) / "memory_birth" / "curves.png")

# ---- Tiny Shakespeare's 1,115,393 adjacent pairs, counted: (3, 65, 65) bytes (low, middle, high), zlib, base85 ------
PAIRS = """
c-rk*32;@_8UD^W_ujW9Z%JNAUN%S|AWITLNJxN+1O<em0R{+&R!b6*MfM#P5J-
)vXj#+_#Wtc9rz%hsEHa84Qgx&(b!#bz2vmmwT$n*h|8wqp+1~;|9jEV~ch9}=EdTxY|3ByU0Ko-tq|p7`vU%SudhyP<SGSkEG3TG9n-
3kS%K321GuVeeO_@5leOb;!WrpXfJNgeP6>WB0mFQfD5^y&lW=bp^c<}43&*r{j{QK0hPfql>@5NGU&CWH(iodkV$LFrp%3U?vR{wWyQ9)+Wnd;?zFQyHf
(G6bvdsAp_XC&aq0~T_WU-G&+hlL!~>0%z2-KoLua>sKfbf)XDcy@uuL+HB0^W523pTRks>5Lb4w9UVP35^ylj-
&P0;`z(w=!_&<V5gr0&cHOyPV@+2r6DUb+3H@NcYA!lHY4ff-R5Vv>Zv777-n<yhYen-g%VgVU#KZ9R7%ei)U-nUWg~cOHZ@-
2<#M6pP1LyHxO}_1lNwDiL)Z6M;zE|r;NJSd2GpQ@#RJz<cPx<MZjIL63kAbVStZE8gzA31wIV#*5ZmwR`ZdiTDK(4vz(0Tm)K`cR)JlB~1~P%CfI;T$KQ
^@DA#~dSq<XNEMm`1%U^Vr{z^AMQ#q-
tFFCe9!X3{<{fZ!Yngl<K2Em9rr$c_XiVH44kO#g4AYpxo34zgo}=^rJgqcGwadM9i;LLwzN+~?*T3m%(Fp&}uE8qv)+$!>aaigglA&vbAx45_s8V1R-
+^JXsq@_}sN7eHxXa4}RDx~q400$!t;rWW?fhCu$AF$O3HDv0CHl|)`B@>^;SUE^uZKp+>=@b3XEjTAZ^@Wh%dk(A-
gn56_;pwzg<6dj&WQwOUyK}mkXw~~ztBw?si^B5PpuPKNJS?2<lag3pFe#ZX$QH(W8PF)q5nzIMp-KSp*Yh#(Jy{lG0uG*0t)edVkzmwVZ09{?0AiK#_D=
Orl#0EoJ;DL;7St>Aq9>>8!a_TC3(+ZUZEb>pfS+!GC+pAFwy%pF>5_^Ll?~wnC2Pq|*vi^v!N6ohoyi&{D+rW_kf(L<D-8D~^62D2L5ajm-
c9$9(uc5IlxtQ$2@3n_jJI=HN5AooNfwU+yavvmL!<f?p*Bb4ycChO!Pe&(|R}j6D92=IBA#5i`3?_}l6QF<wN1C#YF+0c(re$3FEA?DO*D4wz2O?W415T
UH#KH%R4}*^Q)jA}Qcv=Hn-1m>HaLgjF+*#h%LT_~Td#Vo`hm*=rC&TYiNL6i`xpIDhiuZv{nWJzWkWNOHPHN~wdf#rS!6is!B*;-
daF3l=O5H9VhAimyC?bceCJlTGBvDMT8knZ!A~m04OrUl+u>T!3b*b{XUZj`)jrlsz_H4Fv(~QJ@t)=1J^H~$t1(x9kXrhVyD7w1+c5a%>yn2IP|46?2m)
opRNixZ?rotCB8T``J2iqP{ursJ~`a4m-
UNOQ}6(xa(SZP)L>W%COL@hsTti`u37_tZbk*^^bO?v7pui~z@3<EZ1X2I!A3}KLC2Hff!zO7q)k+0yR197{>GX=kmdAi7#IY=v{7kHDo4VoT;(ZZ|Ym_v
bS@jzTKIC<;RrR8}fnNBeJQ%qn^Dw4Psyu!kbqyviQnQM^swp6HhoPGUim1vSiyi1kp!AT!r$*NC+BRCGR`Oyy5`hKA$XOBIuA>mdwW7-
Z%e~+JklfwVSU1XYHrUyr`a^iuphpJ}PWX4WD`sB*R>&KtJ;p;BFmi51AR1G2{i+L+?BC?A!f+P4&nmHxvy)yK%3lwGBtjbrB`(D-
_7(KoF`xrX1AUJ}!JfuA=CLJG2*|)4<9mC{_J$EYO*>~YuielC6zrpCrqTmSLNi$q2$<S^DI^5CsM#gqmln*EC?*|q`${T3m9GrzvW4oR2y|nL%qdG^jea
M~dI@nfJ9yzp*mE(g5D<N6My<Y1RdsX|cnV%Nq0dGE(z6!a$bAuy@Asb1fQtm887=DagM4!$rl$4V2*G!7Cd}Uc5Ji4SXL>2E_P&QzY8|U%zfypts3(>w}
aKZClJc7HwAkkIqv8JPPN}u2e97OMTm8!0AB#i1Z7VJ01DJF0`UeBO{=hQFz+=9W55GDJ-
v`@#BCVPtx4XOUL_>s}6omVcM`L~JLII6FC>lR9=pFDgLw=9|&96{y0S*x<YU)lA2ZT6(}wuA1`>=~cFd~jjH^3={7DL)MTUFtPRX%iPBy;#8B)Um4yT9r
V}+t~JA@e7pe%3D&W-=^9<-fA*$ZFV_MChrYCx!+9JO*1|o*LJt_?!PA+X)oL7j6U|~^*it+Tc}Yva&}U;`>_8+m*5CStUBEL-uyPBa@hP0+kCF6ZdUlTj
gO^rD`_Da*z(o0#^XO_mf#3Buo6BrUEB8ua;C)6qXO4|bsM7+W4joC9c7@>cf@*h>sb;Ufu-A-
8DidQD)aVj{@2{z`FL%QtOa;_q#KRf%{m@?)W1cw(Yg#%ihC0ak7vz8*W#Su2+sLf;ZvD-(Ff}Yt(eNx3v(<?m1vqQ-eMhOm0%%)Y7(wTWeT)Z<&d08O<u
)S)w81WS}J0f^vuI&pRElM6R);&tD9-
}Q?_bn%(Wu#I60$|I%g_nhbeYi`708KDl9Gjd?}ziQtMB18X9MsFl^vL7aE~8+%iG(aJ%uq1V&<zvCX9fLLp9uIr&5PjD!TMFE%HI8QxCbR1dS|-
fR&ascz5&e)hm3ov1eynALwz=<y@d(FBsUpIU~QdJ7R4mKGwg@GB;N-
prwv)~tT4A@#;0RyA*a3ipSIpo>`}RIH^Y#+skWAPZN{`48fHyro{iLk+N?Z|2Rv)E($h(q(lMbPaVq4c4(AHZ-
x2C#w+%$B%#o(6DAWXW<B85t|ch+94Ab52LZBcEB2K#njnUljZEv-
211>F#c>`*TEvDQVYkCG*uP?L7gGh)jEx5Is!)sVf`$y{Shs)>MOmFMlI}zbHYoa`^pANdxS4Fte|q%2E%Q1ke{VoZG??Sy4qBy%j8oF{Pasvvtgdn(Ed|
n>bQ>w@|Wmg9tCoQ+B&N@#hQqiDs{Q;4?X%s8N8e{B6!GZU2{4GlVrylX(Wtnp954Ei`o<M2x>gqx=Tt-
7PMNAu}5SB!aVY{sBkMkYiYF^BR(R_$bxxboDw*iV~U_=4yl6Lo<+B6k`W$b?PxIA(-LuoDnvbEKd=Q1hc{RvkN)KDBJ5(DhbxgMnHIshKNr~0I0-
igvCKS^*VSZG8C=CUCO-nmleFeatNLoRv~w}9nYEZaAT^wRMp`5Ej<GgT8O*8PYdC#&jts+<r@88Ka5&KX=lrHIQvGFw_MJ<JORS@c7U8^+_Kx=UM6g3{4
F&Nc>{g+IgXqnamV`ea2elR^6&_<%a&yStYqG9r5c2y2vxGxnp>-bG?K_kVXd`S9La15-
&dBOnCYWY!v8~KX58fEZB?te+MtQsL!$t%YSj^07RUajU<w_PJ>?$+p^2kEF|A6%JDEJAhrzk`r3Q>qc6rvD?C`2I&QHVkmqVWF>{{zu5)KL
"""

if __name__ == "__main__":
    main()
