"""
Birth of a Transformer: A Memory Viewpoint.
Bietti, Cabannes, Bouchacourt, Jegou, Bottou. NeurIPS 2023, arXiv 2306.00802.

A sequence follows the bigrams of English text, except after a few characters, the triggers. The
successor of a trigger, its output, is drawn once for each sequence:

    theXr weXk maneX    The trigger e has the output X here, in another sequence perhaps a comma.

A two-layer transformer learns the global bigrams fast. Then it slowly builds an induction head,
which looks up what followed the trigger before. The in-context accuracy counts how often it is
right from a trigger's second occurrence on. Each weight matrix is an associative memory, a sum of
outer products of embeddings, and a probe reads off which pairs it holds. The paper's claim: the
memories are learned from the top down. First W_O2, what to output, then W_K2, which key to look
for, then W_K1, how to attend to the previous token.

What to look for. The in-context accuracy rises to nearly 1. While it does, W_K1 (its probe is
wk1_64, at the first 64 positions) is behind W_O2 (wo2) and W_K2 (wk2). Freezing a matrix at its
random start shows why. While W_O2 is frozen, nothing is learned. While W_K2 is frozen, W_O2 is
learned, but W_K1 is not (at T = 256; in the quick preset, at T = 32, it is, slowly).

--preset paper trains W_F as well, which reads what W_O2 writes. There wo2_wf, which reads W_O2
through W_F too, tells what it holds, and wo2 does not. The triggers are random, and wk2 then counts
all characters, of which many are rare: it can be behind wk1_64.

What not to conclude. Whether wo2 or wk2 is the first to pass a level depends on the level and on
the probe: wk2 looks for the key among all characters, the authors' probe (wk2_triggers) among the K
fixed triggers. It also depends on self-loops: if a trigger's output is the trigger itself, the
sequence repeats it to the end, which teaches W_K2 its pairs early. The quick and medium presets of
the simple model have no self-loops. They train on in-context predictions alone, so that the loss on
global tokens rises. --preset paper has self-loops, and trains on all tokens. With less frequent
triggers (fixed:10) W_K1 passes one half before W_O2, on the one seed measured.

    python memory_birth.py                          the birth of an induction head, in a minute
    python memory_birth.py --preset medium --plot   Fig. 3, all five panels, T = 256
    python memory_birth.py --preset paper           the paper's own setting, one run

    Fig. 3 at the paper's size, some matrices frozen until step 300:
    python memory_birth.py --preset paper --triggers fixed --loss in-context --no-use-wf \\
        --steps 1000 --freeze none wo2:300 wk1:300+wk2:300 wk1:300 wk2:300 --plot
    Fig. 4, global before in-context, fixed before random triggers; each kind of output on both:
    python memory_birth.py --preset paper --triggers fixed random --outputs uniform bigram
    The same with less frequent fixed triggers, without the ten most frequent characters:
    python memory_birth.py --preset paper --triggers fixed:10
    The order of the curves, frozen or not; and at the released code's width and learning rate:
    python memory_birth.py --freeze none wo2:300 wk1:300 wk2:300 --seed 20 21 22
    python memory_birth.py --preset paper --triggers fixed --loss in-context --no-use-wf \\
        --n-embd 256 --lr 0.03 --steps 200 --eval-every 10
    Sec. 3, one layer (paper: 55%) against two (over 99%), all trained; at the paper's size:
    python memory_birth.py --model full --n-layer 1 2 --loss all
    python memory_birth.py --preset paper --model full --n-layer 1 2
    Sec. 6, Theorem 3, three gradient steps from zero, and what breaks them:
    python memory_birth.py --preset three-steps

To reuse: BigramTask needs LARGE and count_pairs, and for its default text CHARS, PAIRS and
shakespeare_pairs (NumPy); SimpleTransformer needs attend; probes needs the functions above it;
evaluate needs chunk_size. Of common they need RunError (evaluate) and, for FullTransformer, Block
with CausalSelfAttention and MLP.
"""
import argparse
import base64
import itertools
import math
import re
import string
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 3): global bigrams, and K triggers whose outputs are private to a sequence --

CHARS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase

# A random integer below LARGE, modulo n, is a nearly uniform draw from 0 ... n-1: the probabilities
# are off by a factor of at most 1 + n / LARGE, for Tiny Shakespeare 1.00008.
LARGE = 2**31 - 1

def shakespeare_pairs():
    """The 1,115,393 adjacent pairs of Tiny Shakespeare, counted: (V, V) int64, V = 65.

    Entry a, b: how often b follows a. The counts are PAIRS, at the end of this file.
    """
    packed = base64.b85decode("".join(PAIRS.split()))
    planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(3, 65, 65)
    low, middle, high = planes.astype(np.int64)
    return torch.from_numpy(low + 256 * middle + 65536 * high)

def count_pairs(text):
    """A text's characters, sorted, and entry a, b: how often b follows a (V, V)."""
    chars = "".join(sorted(set(text)))
    V = len(chars)
    z = torch.tensor([chars.index(char) for char in text], dtype=torch.long)
    pair = z[:-1] * V + z[1:]                                # a number for each pair
    return chars, torch.bincount(pair, minlength=V * V).view(V, V)

class BigramTask:
    """Sequences z_1 ... z_{T+1} over V characters (Sec. 3).

    z_1 ~ pi_u, the frequencies of the characters. Then z_t ~ pi_b(.|z_{t-1}), the frequencies of
    the pairs, except that z_t = o_k if z_{t-1} is the trigger q_k. Each sequence has K triggers:

    triggers  fixed: the K most frequent characters; fixed:10: the K most frequent after the first
              ten; random: drawn from pi_u without replacement
    outputs   uniform: o_k is drawn from all characters; bigram: from pi_b(.|q_k)
    text      the path of the text whose frequencies are taken; None: Tiny Shakespeare, or, with
              vocab_size, that many characters with uniform pi_u and pi_b

    A sequence with o_k = q_k is stuck from q_k on; without self_loops o_k is another character.
    OSError for a text that cannot be read, ValueError for too few characters or successors, or for
    triggers of another form.
    """

    def __init__(self, k=5, seq_len=256, triggers="fixed", outputs="uniform", text=None,
                 device="cpu", self_loops=True, vocab_size=None):
        self.k = k
        self.seq_len = seq_len
        self.triggers = triggers
        self.device = device
        if vocab_size is not None:
            self.chars = "".join(map(chr, range(33, 33 + vocab_size)))
            pairs = torch.ones(vocab_size, vocab_size, dtype=torch.long)
        elif text is not None:
            self.chars, pairs = count_pairs(Path(text).read_text(encoding="utf-8"))
        else:
            self.chars = CHARS
            pairs = shakespeare_pairs()
        self.vocab_size = V = len(self.chars)
        if not re.fullmatch(r"random|fixed(:\d+)?", triggers):
            raise ValueError(f"--triggers are random, fixed or fixed:OFFSET, not {triggers}")
        offset = int(triggers.partition(":")[2] or 0)
        if V < offset + k:
            raise ValueError(f"{k} triggers need {offset + k} characters; there are {V}")
        pairs = pairs.to(device)
        # a text's first character follows none, and its last has no successor
        counts = torch.maximum(pairs.sum(0), pairs.sum(1))                       # (V,)
        # a last character that occurs only there gets pi_u as its successors
        pairs = torch.where(pairs.sum(1, keepdim=True) > 0, pairs, counts)
        self.unigram = counts / counts.sum()                                     # pi_u (V,)
        self.bigram = pairs / pairs.sum(1, keepdim=True)                         # pi_b (V, V)
        self.fixed = self.unigram.topk(offset + k).indices[offset:]              # (K,)

        # To draw from pi_b: all successors in one list, sorted by the character before. Those of a
        # are successors[start[a] : start[a] + width[a]]. Behind them each character v stands once
        # more, at own_entry + v: a trigger with output o has start = own_entry + o and width = 1.
        # Example: "abaca" has a -> b, b -> a, a -> c, c -> a, so successors = b c a a, a b c,
        # start = 0 2 3, width = 2 1 1, own_entry = 4. Trigger a with output c: start 6, width 1.
        all_chars = torch.arange(V, device=device)
        listed = all_chars.repeat(V).repeat_interleave(pairs.flatten())          # b for each a -> b
        self.successors = torch.cat([listed, all_chars])
        self.width = pairs.sum(1)                                                # (V,)
        self.start = self.width.cumsum(0) - self.width                           # (V,)
        self.own_entry = len(listed)

        # To draw o_k: weights 2 0 1 are summed up to 2 2 3. A draw from 0, 1, 2 gives the first
        # column whose sum is larger, here column 0, 0, 2.
        weights = pairs if outputs == "bigram" else torch.ones_like(pairs)
        if not self_loops:
            weights = weights - weights.diag().diag()
        if not self_loops and (pairs.sum(1) == pairs.diag()).any():
            raise ValueError("a character that only itself follows needs self-loops")
        self.cumulative = weights.cumsum(1)                                      # (V, V)

    def sample(self, batch, generator):
        """Tokens (B, T+1), and occurrence (B, T): n at a trigger's n-th time so far, else 0.

        The generator is on the task's device.
        """
        B, T, V, K = batch, self.seq_len, self.vocab_size, self.k
        how = dict(generator=generator, device=self.device)
        if self.triggers == "random":
            q = torch.multinomial(self.unigram.expand(B, V), K, generator=generator)     # (B, K)
        else:
            q = self.fixed.expand(B, K)
        cumulative = self.cumulative[q]                                          # (B, K, V)
        draw = torch.randint(LARGE, (B, K, 1), **how) % cumulative[:, :, -1:]
        o = torch.searchsorted(cumulative, draw, right=True).squeeze(2)          # (B, K)
        # each sequence's own start and width, in which a trigger has one successor
        start = self.start.expand(B, V).scatter(1, q, self.own_entry + o)        # (B, V)
        width = self.width.expand(B, V).scatter(1, q, 1)

        draw = torch.randint(LARGE, (T + 1, B, 1), **how)    # time first: draw[t] is for a batch
        z = torch.empty_like(draw)
        z[0, :, 0] = torch.multinomial(self.unigram, B, replacement=True, generator=generator)
        for t in range(T):
            which = draw[t] % width.gather(1, z[t])                              # (B, 1)
            z[t + 1] = self.successors[start.gather(1, z[t]) + which]
        tokens = z[:, :, 0].T.contiguous()                                       # (B, T+1)
        hit = tokens[:, None, :T] == q[:, :, None]                               # (B, K, T)
        # along T, for each trigger: hit F T F T -> 0 1 0 2
        return tokens, (hit.cumsum(2) * hit).sum(1)

# ---- The model ----------------------------------------------------------------------------------

def attend(query, key, value, mask):
    """softmax(query key^T + mask) value, and the weights (B, T, T), the softmax.

    query and key (B, T, d); value (B, T, any width).
    """
    attn = (query @ key.mT + mask).softmax(-1)
    return attn @ value, attn

class SimpleTransformer(nn.Module):
    """The simplified model of Sec. 4.2: two layers of one head, no layer norm, no MLP.

        x_t = W_E(z_t) + p_t
        h_t = x_t + W_O1 W_V1 sum_s a_ts x_s     a = softmax over s <= t of x_t . W_K1 x_s / sqrt(d)
        g_t = h_t + W_O2 W_V2 sum_s b_ts h_s     b = softmax over s <= t of h_t . W_K2 h_s / sqrt(d)
        logits_t = W_U (g_t + W_F g_t)           W_F only with use_wf

    Trained: W_K1, W_K2, W_O2 and W_F; the rest is frozen and random. Matrices start uniform in
    +-1/sqrt(d), embeddings as N(0, 1).
    """

    def __init__(self, vocab_size, block_size, n_embd, use_wf=False):
        super().__init__()
        d = n_embd

        def uniform(rows):
            return torch.empty(rows, d).uniform_(-1, 1) / math.sqrt(d)

        self.register_buffer("W_E", torch.randn(vocab_size, d))
        self.register_buffer("P", torch.randn(block_size, d))
        self.register_buffer("W_U", uniform(vocab_size))
        for name in ("W_V1", "W_O1", "W_V2"):
            self.register_buffer(name, uniform(d))
        self.W_K1 = nn.Parameter(uniform(d))
        self.W_K2 = nn.Parameter(uniform(d))
        self.W_O2 = nn.Parameter(uniform(d))
        self.W_F = nn.Parameter(uniform(d)) if use_wf else None
        future = torch.full((block_size, block_size), -math.inf).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also each layer's (B, 1, T, T)."""
        T = tokens.shape[1]
        sqrt_d = math.sqrt(self.W_E.shape[1])
        mask = self.mask[:T, :T]
        W_OV1 = self.W_O1 @ self.W_V1
        W_OV2 = self.W_O2 @ self.W_V2
        # In plain form:
        #     x = embedding(tokens, W_E) + P
        #     h = x + softmax(x (W_K1 / sqrt_d) x^T + mask) x W_OV1^T
        #     g = h + softmax(h (W_K2 / sqrt_d) h^T + mask) h W_OV2^T
        #     logits = (g + g W_F^T) W_U^T
        # The same, faster: matrices are multiplied with each other first. W x_t is computed as
        # (W W_E)(z_t) + W p_t, for each character and position once, not for each token. And with
        # U = W_U + W_U W_F, logits = g U^T = h U^T + attention (h (U W_OV2)^T): the values of the
        # second attention have V columns in place of d.
        x = self.embed(tokens)                                                   # (B, T, d)
        key = self.embed(tokens, self.W_K1 / sqrt_d)
        y, attn1 = attend(x, key, self.embed(tokens, W_OV1), mask)
        h = x + y
        U = self.W_U                                                             # (V, d)
        if self.W_F is not None:
            U = U + self.W_U @ self.W_F
        y, attn2 = attend(h @ (self.W_K2 / sqrt_d), h, h @ (U @ W_OV2).mT, mask)
        logits = h @ U.mT + y                                                    # (B, T, V)
        if not return_attn:
            return logits
        return logits, [attn1.unsqueeze(1), attn2.unsqueeze(1)]

    def embed(self, tokens, W=None):
        """W x_t for all tokens, (B, T, d); x_t if there is no W."""
        E = self.W_E
        P = self.P[:tokens.shape[1]]
        if W is not None:
            E = E @ W.mT
            P = P @ W.mT
        return F.embedding(tokens, E) + P

class FullTransformer(nn.Module):
    """The full model of Sec. 3: GPT-2's blocks, learned positions, everything trained.

    The authors' model has ReLU, no biases, and an MLP that reads the layer norm of the block's
    input. PyTorch's initialisation: with GPT-2's, of standard deviation 0.02, the induction head
    takes several times as long to appear.
    """

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList([common.Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also each layer's (B, H, T, T)."""
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        attns = []
        for block in self.h:
            x = block(x, return_attn)
            if return_attn:
                x, attn = x
                attns.append(attn)
        logits = self.lm_head(self.ln_f(x))
        return (logits, attns) if return_attn else logits

# ---- Settings (App. E), and the task and model that they make ------------------------------------

# Trained matrices of the simple model: the name on the command line and in the tables, the model's
MATRICES = {"wk1": "W_K1", "wk2": "W_K2", "wo2": "W_O2", "wf": "W_F"}

PRESETS = {                                                  # what differs from the flags' defaults
    "quick": {},
    "medium": dict(freeze=["none", "wo2:300", "wk1:300+wk2:300", "wk1:300", "wk2:300"]),
    "paper": dict(loss=["all"], triggers=["random"], use_wf=True),
    "three-steps": dict(n_triggers=2, vocab_size=24, seq_len=32, n_embd=136, batch_size=128_000),
}
# The flags whose default depends on preset and model, and a row of defaults for each of these
COLUMNS = ["seq_len", "batch_size", "steps", "lr", "weight_decay", "self_loops", "eval_every"]
SETTINGS = {
    ("quick", "simple"): (32, 128, 1_000, 0.1, 1e-4, False, 5),  # lr: slow, to see which is first
    ("quick", "full"): (64, 64, 1_000, 3e-3, 1e-2, True, 20),    # the full model's lr is our choice
    ("medium", "simple"): (256, 128, 1_000, 0.2, 1e-4, False, 20),
    ("medium", "full"): (256, 64, 1_000, 3e-3, 1e-2, True, 20),
    ("paper", "simple"): (256, 512, 10_000, 0.2, 1e-4, True, 50),
    ("paper", "full"): (256, 512, 1_000, 3e-3, 1e-2, True, 50),
}
SWEEP = ["model", "n_layer", "loss", "triggers", "outputs", "freeze", "seed"]

def resolve(args):
    """Completes a run's settings. Unused ones become None."""
    for key, value in zip(COLUMNS, SETTINGS[args.preset, args.model]):
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.model == "simple":
        args.n_layer = args.n_head = None
    else:
        args.use_wf = args.freeze = None
    if args.vocab_size is not None:
        args.text = None

def build_task(args, outputs):
    """The task of a run, with outputs "uniform" or "bigram"."""
    return BigramTask(args.n_triggers, args.seq_len, args.triggers, outputs, args.text, args.device,
                      args.self_loops, args.vocab_size)

def build(args):
    """The task and the model of a run. OSError or ValueError if the text, the triggers, the width
    or --freeze are impossible."""
    task = build_task(args, args.outputs)
    V, T, d = task.vocab_size, args.seq_len, args.n_embd
    if args.model == "simple":
        model = SimpleTransformer(V, T, d, args.use_wf)
        trained = [name for name, W in MATRICES.items() if getattr(model, W) is not None]
        if not set(parse_freeze(args.freeze)) < set(trained):
            raise ValueError(f"--freeze takes some of {' '.join(trained)}, but not all of them")
    else:
        model = FullTransformer(V, T, args.n_layer, args.n_head, d)
    return task, model.to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run."""
    return common.load(folder, build, device)

def chunk_size(task):
    """Sequences to work on at once: few enough that attention weights, 4 MB, fit a CPU's cache."""
    if str(task.device) != "cpu":
        return 2**20
    return max(1, 2**20 // task.seq_len**2)

def parse_freeze(text):
    """wk1:300+wk2:300 -> {"wk1": 300, "wk2": 300}: the step until which each stays frozen.

    ValueError for text of another form.
    """
    if text in (None, "none"):
        return {}
    if not re.fullmatch(r"\w+:\d+(\+\w+:\d+)*", text):
        raise ValueError(f"--freeze {text} is neither none nor of the form wk1:300+wk2:300")
    pairs = [item.split(":") for item in text.split("+")]
    return {name: int(step) for name, step in pairs}

# ---- Training -----------------------------------------------------------------------------------

def train(args, run):
    """Trains one run, or resumes it; the trained model is in its checkpoint."""
    task, model = build(args)
    rates = dict(lr=args.lr, weight_decay=args.weight_decay)                     # constant
    if args.model == "simple":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **rates)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True, **rates)
    data = torch.Generator(args.device).manual_seed(args.seed)                   # training batches
    start = run.restore(model, optimizer, data)
    if args.compile:
        model.compile()
    chunk = chunk_size(task)
    frozen_until = parse_freeze(args.freeze)
    for step in run.steps(start, args.steps):
        if not run.metrics:                                  # before the first step
            run.log(0, **snapshot(args, model, task))
        for name, until in frozen_until.items():             # the optimizer skips what has no grad
            getattr(model, MATRICES[name]).requires_grad_(step >= until)
        tokens, occurrence = task.sample(args.batch_size, data)                  # (B, T+1), (B, T)
        scored = torch.ones_like(occurrence) if args.loss == "all" else occurrence >= 2
        weight = scored / scored.sum().clamp_min(1)          # the loss is a mean over the scored
        for z, w in zip(tokens.split(chunk), weight.split(chunk)):
            with torch.autocast(z.device.type, torch.bfloat16, args.dtype == "bfloat16"):
                logits = model(z[:, :-1])                                        # (chunk, T, V)
            targets = z[:, 1:].flatten()
            losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
            (losses @ w.flatten()).backward()                # adds up the gradients of the chunks
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            run.log(step + 1, **snapshot(args, model, task))

# ---- Measurement --------------------------------------------------------------------------------

@torch.no_grad()
def output_scores(model, with_wf=False):
    """Entry v, j: what attending to the character v adds to the logit of j (V, V).

    Through W_U alone, as the paper's probe; with_wf: through W_U + W_U W_F, as in the model.
    """
    U = model.W_U
    if with_wf:
        U = U + model.W_U @ model.W_F
    return model.W_E @ (U @ model.W_O2 @ model.W_V2).mT

@torch.no_grad()
def key_scores(model):
    """Entry q, q': the score of the query q for a token that followed q' (V, V).

    W_E(q) . W_K2 W_O1 W_V1 W_E(q'), as layer 1 has written W_O1 W_V1 W_E(q') into that token.
    """
    keys = model.W_E @ (model.W_O1 @ model.W_V1).mT
    return model.W_E @ model.W_K2 @ keys.mT

@torch.no_grad()
def position_scores(model):
    """Entry t, s: the score of the query at position t for position s, p_t . W_K1 p_s (T, T)."""
    return model.P @ model.W_K1 @ model.P.mT

def recall(scores, right):
    """Fraction of the rows of scores (n, m) whose argmax is the right one (n,)."""
    return (scores.argmax(1) == right).float().mean().item()

@torch.no_grad()
def probes(model, task):
    """What a SimpleTransformer's matrices hold, a dict of numbers (Sec. 5).

    wk1: fraction of positions t with argmax_s p_t . W_K1 p_s = t - 1; wk1_64: of the first 64.
    wk2: fraction of triggers q (of all characters if triggers are random) with
         argmax_q' W_E(q) . W_K2 W_O1 W_V1 W_E(q') = q, over all characters q': chance is 1/V.
    wk2_triggers: the same over the K triggers q' alone, which is the authors' probe: chance is 1/K.
         Only with fixed triggers.
    wo2: fraction of characters v with argmax_j (W_U W_O2 W_V2 W_E(v))_j = v.
    wo2_wf: the same with W_U + W_U W_F in place of W_U, since W_F reads what W_O2 writes, too.
         Only with W_F.
    wf:  mean KL(pi_b(.|v) || softmax(W_U W_F W_E(v))) in nats over characters v that are not fixed
         triggers; a model without W_F counts as W_F = 0.
    """
    all_chars = torch.arange(task.vocab_size, device=model.W_E.device)
    W_F = torch.zeros_like(model.W_K2) if model.W_F is None else model.W_F
    log_p = (model.W_E @ (model.W_U @ W_F).mT).log_softmax(-1)
    kl = F.kl_div(log_p, task.bigram, reduction="none").sum(1)                   # (V,)
    keys = key_scores(model)
    positions = position_scores(model)
    previous = torch.arange(len(positions) - 1, device=positions.device)
    held = dict(
        wk1=recall(positions[1:], previous),
        wk1_64=recall(positions[1:64, :64], previous[:63]),
        wo2=recall(output_scores(model), all_chars),
    )
    if model.W_F is not None:
        held["wo2_wf"] = recall(output_scores(model, with_wf=True), all_chars)
    if task.triggers == "random":
        held["wk2"] = recall(keys, all_chars)
    else:
        q = task.fixed
        held["wk2"] = recall(keys[q], q)
        held["wk2_triggers"] = recall(keys[q][:, q], all_chars[:task.k])
        kl = kl[torch.isin(all_chars, q, invert=True)]
    held["wf"] = kl.mean().item() if len(kl) else 0.0
    return held

@torch.no_grad()
def evaluate(model, task, n=256, seed=10_000):
    """On n fresh sequences, the same at every call: losses in nats, accuracy, attention.

    loss_all: at all tokens. loss_global: at all that are no trigger.
    loss_in_context, accuracy: at a trigger's second and later occurrences.
    attn_prev: at tokens after a trigger, how often layer 1 attends most to the previous position.
    attn_match: at a trigger's second and later occurrences, how often the last layer attends most
         to a position that follows the same character. Both of the best head.
    RunError if no trigger occurs twice.
    """
    tokens, occurrence = task.sample(n, torch.Generator(task.device).manual_seed(seed))
    z, y = tokens[:, :-1], tokens[:, 1:]                                         # (n, T)
    repeat = occurrence >= 2
    if not repeat.any():
        raise common.RunError(f"no trigger occurs twice in {n} sequences: a larger --seq-len")
    chunks = []
    for part in z.split(chunk_size(task)):
        logits, attns = model(part, return_attn=True)
        chunks.append((logits, attns[0].argmax(-1), attns[-1].argmax(-1)))
    logits, first, last = [torch.cat(parts) for parts in zip(*chunks)]
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    right = (logits.argmax(-1) == y).float()
    # (H, n, T): the position to which each head of the first and of the last layer attends most
    first, last = first.transpose(0, 1), last.transpose(0, 1)
    previous = first == torch.arange(-1, z.shape[1] - 1, device=z.device)
    # is the token before this position the same as the query's?
    before = F.pad(z[:, :-1], (1, 0), value=-1).expand_as(last)                  # (H, n, T)
    match = before.gather(2, last) == z
    after = F.pad(occurrence[:, :-1] > 0, (1, 0))            # the position before is a trigger
    values = dict(
        accuracy=right[repeat],
        loss_all=losses.flatten(),
        loss_global=losses[occurrence == 0],
        loss_in_context=losses[repeat],
        attn_prev=previous[:, after].float(),                                    # (H, some)
        attn_match=match[:, repeat].float(),
    )
    return {name: x.mean(-1).max().item() for name, x in values.items()}         # the best head's

def snapshot(args, model, task):
    """A line of metrics.jsonl: the training loss, on fresh sequences, and all measurements."""
    metrics = evaluate(model, task)
    if args.model == "simple":
        metrics.update(probes(model, task))
    loss = metrics["loss_all" if args.loss == "all" else "loss_in_context"]
    return dict(loss=loss, **metrics)                        # loss, accuracy: what run.log shows

def measure(args, run):
    """A finished run: its last evaluation, and its accuracy on both kinds of outputs (Fig. 4)."""
    task, model = run.trained(build)
    results = snapshot(args, model, task)
    for outputs in ("uniform", "bigram"):
        other = evaluate(model, build_task(args, outputs), n=1024)
        results[f"accuracy_{outputs}"] = other["accuracy"]
    return results

# ---- Theorem 3: three gradient steps (Sec. 6, App. B) -------------------------------------------

# The theorem's setting, and two that break it, the first by embeddings that overlap, the second by
# sequences stuck in a loop: (embeddings, whether training has self-loops)
CASES = {
    "theorem": ("orthonormal", False),
    "gaussian": ("gaussian", False),
    "self-loops": ("orthonormal", True),
}

@torch.no_grad()
def theorem_init_(model, embedding):
    """In place: trained matrices become zero, the frozen ones the theorem's, embeddings of norm 1.

    orthonormal: the embeddings, W_OV1 times each of them, and the rows of W_U are different members
    of one orthonormal basis, which takes d >= 3 V + 2 T; W_V2 is orthogonal. gaussian: all are
    random, so that any two of them overlap by about 1/sqrt(d). ValueError if d < 3 V + 2 T.
    """
    V, d = model.W_E.shape
    n = V + len(model.P)                                     # embeddings
    if d < 2 * n + V:
        raise ValueError(f"{V} characters and {len(model.P)} positions need --n-embd {2 * n + V}")
    for W in model.parameters():
        W.zero_()
    if embedding == "gaussian":
        for W in (model.W_E, model.P):
            W /= math.sqrt(d)
        for W in (model.W_U, model.W_O1, model.W_V1, model.W_V2):
            W *= math.sqrt(3)                                # variance 1/d: norms are kept
        return
    basis = torch.linalg.qr(torch.randn(d, d)).Q             # rows b_0 ... b_{d-1}
    model.W_E.copy_(basis[:V])
    model.P.copy_(basis[V:n])
    model.W_U.copy_(basis[2 * n:2 * n + V])
    model.W_O1.copy_(torch.eye(d))
    model.W_V1.copy_(basis.roll(-n, 0).mT @ basis)           # b_i -> b_{i+n}
    model.W_V2.copy_(torch.linalg.qr(torch.randn(d, d)).Q)

# For each step: its matrix, the scores of all pairs, the diagonal on which the right pairs stand,
# and the mean of their scores after the step (logits, then attention scores). With logits above 1
# the model would be too sure of its answers for the gradients of the next steps.
STEPS = [
    ("W_O2", output_scores, 0, 1.0),                         # pairs v, v
    ("W_K2", key_scores, 0, 5.0),                            # pairs q, q
    ("W_K1", position_scores, -1, 20.0),                     # pairs t, t - 1
]

def three_steps(args, seed, case):
    """From zero matrices, one large gradient step on W_O2, one on W_K2, one on W_K1.

    Each starts from the result of those before, and takes the gradient on --batch-size sequences of
    uniform bigrams with random triggers, of the loss summed over triggers' second and later
    occurrences. The gradient gives the direction, STEPS the size. Returns rows for the start and
    for each step: probes and evaluations, on sequences without self-loops. ValueError if the
    sequences have no repeat.
    """
    common.seed_everything(seed)
    setting = dict(k=args.n_triggers, seq_len=args.seq_len, triggers="random",
                   vocab_size=args.vocab_size, device=args.device)
    embedding, self_loops = CASES[case]
    task = BigramTask(**setting, self_loops=self_loops)
    test = BigramTask(**setting, self_loops=False)
    model = SimpleTransformer(args.vocab_size, args.seq_len, args.n_embd).to(args.device)
    theorem_init_(model, embedding)
    data = torch.Generator(args.device).manual_seed(seed)

    def row(step):
        about = dict(case=case, seed=seed, step=step)
        return {**about, **evaluate(model, test, n=4096), **probes(model, test)}

    rows = [row("start")]
    for name, scores, diagonal, wanted in STEPS:
        W = getattr(model, name)
        for drawn in range(0, args.batch_size, 4096):
            tokens, occurrence = task.sample(min(4096, args.batch_size - drawn), data)
            scored = occurrence >= 2
            some = scored.any(1)                             # sequences with something to learn
            for z, at in zip(tokens[some].split(256), scored[some].split(256)):
                logits = model(z[:, :-1])[at]
                F.cross_entropy(logits, z[:, 1:][at], reduction="sum").backward(inputs=[W])
        with torch.no_grad():
            W.copy_(-W.grad)
            mean = scores(model).diagonal(diagonal).mean().abs()     # keeps the gradient's sign
            if name != "W_O2":
                mean /= math.sqrt(args.n_embd)               # as in the softmax of the attention
            if not 0 < mean < math.inf:
                raise ValueError(f"the step on {name} has no direction: a larger --batch-size")
            W *= wanted / mean
        rows.append(row(name))
    return rows

def show_three_steps(args):
    """--preset three-steps: the theorem beside what breaks it. Returns the rows of all cases."""
    rows = []
    cells = []
    said = ""
    for seed, case in itertools.product(args.seed, CASES):
        try:
            case_rows = three_steps(args, seed, case)
        except ValueError as error:
            raise common.UsageError(error) from error
        rows += case_rows
        for row in case_rows:
            about = f"seed {seed}, {case}, after {row['step']}"
            for key in ("accuracy", "wo2", "wk2", "wk1", "attn_prev", "attn_match"):
                cells.append((about, key, row[key]))
        accuracy = [row["accuracy"] for row in case_rows]
        steps = zip(accuracy, accuracy[1:])
        rises = "rises" if all(a < b for a, b in steps) else "does not rise"
        said += f"\nSeed {seed}, {case}: the in-context accuracy {rises} with every step."
    title = "In-context accuracy, probes and attention, on sequences without self-loops"
    common.print_table(title, cells)
    print(said)
    return rows

# ---- Tables and figures -------------------------------------------------------------------------

# The metrics of a training curve's table
SHOWN = ["loss_global", "loss_in_context", "accuracy", "wo2", "wo2_wf", "wk2", "wk1_64", "wf",
         "attn_prev", "attn_match"]
# The metrics and the levels of the table of first steps
FIRSTS = ["wo2", "wo2_wf", "wk2", "wk2_triggers", "wk1_64", "accuracy"]
LEVELS = [0.5, 0.9]
# Fig. 3's panels: settings of an axis, and the metrics that it draws with their legends
CURVES = {
    "losses": (dict(ylabel="loss (nats)"),
               dict(loss_global="on global bigrams", loss_in_context="in context")),
    "memories": (dict(ylabel="fraction right", ylim=(-0.02, 1.02)),
                 dict(accuracy="in-context accuracy", wo2="W_O2: output",
                      wo2_wf="W_O2: output, read by W_F as well",
                      wk2="W_K2: key to look for",
                      wk1_64="W_K1: previous token, first 64\n"
                      "positions (later ones are hardly used)")),
}

def print_curve(run):
    """A run's evaluations at log-spaced steps."""
    log_spaced = np.geomspace(1, len(run.metrics) - 1, 16).round().astype(int)
    cells = []
    for i in sorted({0, *log_spaced}):
        line = run.metrics[i]
        for key in SHOWN:
            if key in line and (key != "wf" or run.args.use_wf):
                cells.append((line["step"], key.removeprefix("loss_"), line[key]))
    common.print_table(f"""{run.args.label}, seed {run.args.seed}, by step
Losses (nats): on global bigrams, in context; accuracy: in context. Fractions of a memory that are
right: wo2 (what to output), wo2_wf (the same, read by W_F as well), wk2 (which key to look for),
wk1_64 (the previous token, first 64 positions); wf: KL of W_F to the bigrams. Attention: layer 1 to
the previous token, the last layer to what followed the same one""",
                       cells)

def print_summary(runs):
    """The accuracies at the end, and the first steps at LEVELS: median and range over seeds."""
    accuracies, firsts = [], []
    for run in runs:
        label = run.args.label
        for outputs in ("uniform", "bigram"):
            accuracies.append((label, f"{outputs} outputs", run.results[f"accuracy_{outputs}"]))
        for level, key in itertools.product(LEVELS, FIRSTS):
            if key in run.metrics[0]:                        # the full model has no memories
                steps = [line["step"] for line in run.metrics if line[key] >= level]
                firsts.append((f"{label}, {level}", key, min(steps, default=None), ".0f"))
    common.print_table("At the end: in-context accuracy on both kinds of outputs", accuracies)
    common.print_table("""The first evaluated step at which each reaches a level
(wk2 looks for a key among all characters, wk2_triggers among the fixed triggers)""", firsts)

def verdict(run):
    """What a run shows of the paper's claims, a sentence a line."""
    said = [f"{run.args.label}, seed {run.args.seed}:"]
    outputs = "wo2_wf" if run.args.use_wf else "wo2"
    memories = [key for key in (outputs, "wk2", "wk1_64") if key in run.metrics[0]]
    if run.args.loss == "all":
        for key in ("loss_global", "loss_in_context"):
            half = (run.metrics[0][key] + run.metrics[-1][key]) / 2
            steps = [line["step"] for line in run.metrics if line[key] <= half]
            if steps:                                        # none if all characters are triggers
                said.append(f"{key} has made half of its fall by step {steps[0]}.")
    thaw = max(parse_freeze(run.args.freeze).values(), default=0)
    if 0 < thaw < run.args.steps:
        before = [line for line in run.metrics if line["step"] <= thaw][-1]
        held = [key for key in memories if before[key] >= 0.5] or ["nothing"]
        said.append(f"Learned before the thaw at step {thaw}: {', '.join(held)}.")
    born = next((line for line in run.metrics if line["accuracy"] >= 0.5), None)
    if born is None:
        said.append("No induction head: the accuracy stays below one half.")
    elif memories:
        levels = ", ".join(f"{key} {born[key]:.2f}" for key in memories)
        last = min(memories, key=born.get)
        said.append(f"When the accuracy passes one half, at step {born['step']}: {levels}.")
        said.append(f"Least learned of these: {last} (in the paper wk1).")
    said.append(f"The accuracy ends at {run.results['accuracy']:.3f}.")
    return "\n  ".join(said)

def plot_curves(runs):
    """Fig. 3: losses, accuracy and memories against the step, a row for each setting."""
    panels = {}
    for run in runs:
        steps = [line["step"] for line in run.metrics]
        for title, (axis, names) in CURVES.items():
            axis = dict(axis, xlabel="step", xscale="symlog", xlim=(0, steps[-1]))
            _, curves = panels.setdefault(f"{run.args.label}: {title}", (axis, []))
            for key, name in names.items():
                if key in run.metrics[0]:                    # the full model has no memories
                    curves.append((name, steps, [line[key] for line in run.metrics], {}))
            top = max(1, *curves[0][2])
            for name, until in parse_freeze(run.args.freeze).items():
                style = dict(color="black", linestyle="-")
                curves.append((f"{MATRICES[name]} thaws", [until, until], [0, top], style))
    common.plot(runs[0].folder.parent / "curves.png", panels, columns=2)

@torch.no_grad()
def plot_attention(runs, length=32):
    """Each layer's attention on one sequence, the mean over heads.

    Stars mark triggers. Circles mark where an induction head looks: in layer 1 the token after a
    trigger looks at the trigger, in the others a trigger looks at what followed it before.
    """
    panels = {}
    for run in runs:
        task, model = load(run.folder, run.args.device)
        data = torch.Generator(run.args.device).manual_seed(1)
        tokens, occurrence = task.sample(1, data)
        trigger = occurrence[0, :length] > 0                                     # (T,)
        z = tokens[0, :len(trigger)]
        # [t, s]: the trigger at t has occurred at s before
        repeat = (z[:, None] == z).tril(-1) & trigger[:, None]                   # (T, T)
        to_previous = [(t + 1, t) for t in range(len(z) - 1) if trigger[t]]
        to_match = [(t, s + 1) for t, s in repeat.nonzero().tolist()]
        chars = task.chars.replace("\n", "\u21b5").replace(" ", "\u2423")
        columns = [chars[i] for i in z]
        rows = [char + "*" if hit else char for char, hit in zip(columns, trigger)]
        axis = dict(xlabel="token looked at (red: by an induction head)", ylabel="token, * trigger")
        _, attns = model(z[None], return_attn=True)
        for layer, attn in enumerate(attns, 1):
            weights = attn[0].mean(0).cpu()                                      # (T, T)
            circles = to_previous if layer == 1 else to_match
            panels[f"{run.args.label}, layer {layer}"] = weights, rows, columns, axis, circles
    common.plot_matrices(runs[0].folder.parent / "attention.png", panels, columns=2)

def show(runs):
    """Prints the tables of a sweep and its verdicts; with --plot draws its figures."""
    for run in runs:
        run.args.label = run.args.label or f"{run.args.model} model"
    settings = [run for run in runs if run.args.seed == runs[0].args.seed]
    for run in settings:
        print_curve(run)
    print_summary(runs)
    if runs[0].args.plot:
        plot_curves(runs)
        plot_attention(settings)
    print()
    for run in settings:
        print(verdict(run))

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    count = common.positive_int
    switch = argparse.BooleanOptionalAction
    add("--model", nargs="+", choices=["simple", "full"], default=["simple"],
        help="Sec. 4.2's simple one, Sec. 3's full one")
    add("--n-layer", nargs="+", type=count, default=[2], help="layers of the full model")
    add("--n-head", type=count, default=4, help="heads per layer of the full model")
    add("--n-embd", type=count, default=128, help="width d")
    add("--use-wf", action=switch, default=False, help="simple: W_F, the memory of global bigrams")
    add("--n-triggers", type=count, default=5, help="K, the triggers of a sequence")
    add("--triggers", nargs="+", default=["fixed"],
        help="fixed, the most frequent; fixed:10, without the first ten; random, drawn anew")
    add("--outputs", nargs="+", choices=["uniform", "bigram"], default=["uniform"],
        help="a trigger's output: uniform over characters, or drawn from pi_b")
    add("--self-loops", action=switch,
        help="an output may be the trigger itself (default: the preset's)")
    add("--text", help="a text for the bigrams (default: Tiny Shakespeare)")
    add("--vocab-size", type=count, help="characters of uniform bigrams, in place of a text's")
    add("--seq-len", type=common.number(int, 4, 2**14),
        help="T, predictions a sequence (default: the preset's)")
    add("--loss", nargs="+", choices=["all", "in-context"], default=["in-context"],
        help="on all tokens, or at a trigger's second and later occurrences")
    add("--freeze", nargs="+", default=["none"],
        help="matrices (wk1, wk2, wo2, wf) frozen until a step, as in wk1:300+wk2:300; none")
    add("--batch-size", type=count, help="sequences per step (default: the preset's)")
    add("--steps", type=count, help="training steps (default: the preset's)")
    add("--eval-every", type=count, help="steps between evaluations (default: the preset's)")
    add("--lr", type=common.positive_float,
        help="learning rate of SGD with momentum 0.9; full: of AdamW (default: the preset's)")
    add("--weight-decay", type=common.non_negative, help="weight decay (default: the preset's)")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds of weights and data")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile")
    return common.parse_args(parser, PRESETS, argv)

def main(argv=None):
    """Trains what the flags ask for, prints the tables, and returns a dict of results a run."""
    args = parse_args(argv)
    if args.preset == "three-steps":
        return show_three_steps(args)
    runs = common.sweep(args, SWEEP, build, resolve)
    return common.complete(runs, train, measure, show)

# ---- PAIRS: Tiny Shakespeare's 1,115,393 adjacent pairs, counted ---------------------------------

# (3, 65, 65) bytes (low, middle, high), zlib, base85
PAIRS = """
c-rk*32;@_8UD^W_ujW9Z%JNAUN%S|AWITLNJxN+1O<em0R{+&R!b6*MfM#P5J-)vXj#+_#Wtc9rz%hsEHa84Qgx&(b!#bz2vmmw
T$n*h|8wqp+1~;|9jEV~ch9}=EdTxY|3ByU0Ko-tq|p7`vU%SudhyP<SGSkEG3TG9n-3kS%K321GuVeeO_@5leOb;!WrpXfJNgeP
6>WB0mFQfD5^y&lW=bp^c<}43&*r{j{QK0hPfql>@5NGU&CWH(iodkV$LFrp%3U?vR{wWyQ9)+Wnd;?zFQyHf(G6bvdsAp_XC&aq
0~T_WU-G&+hlL!~>0%z2-KoLua>sKfbf)XDcy@uuL+HB0^W523pTRks>5Lb4w9UVP35^ylj-&P0;`z(w=!_&<V5gr0&cHOyPV@+2
r6DUb+3H@NcYA!lHY4ff-R5Vv>Zv777-n<yhYen-g%VgVU#KZ9R7%ei)U-nUWg~cOHZ@-2<#M6pP1LyHxO}_1lNwDiL)Z6M;zE|r
;NJSd2GpQ@#RJz<cPx<MZjIL63kAbVStZE8gzA31wIV#*5ZmwR`ZdiTDK(4vz(0Tm)K`cR)JlB~1~P%CfI;T$KQ^@DA#~dSq<XNE
Mm`1%U^Vr{z^AMQ#q-tFFCe9!X3{<{fZ!Yngl<K2Em9rr$c_XiVH44kO#g4AYpxo34zgo}=^rJgqcGwadM9i;LLwzN+~?*T3m%(F
p&}uE8qv)+$!>aaigglA&vbAx45_s8V1R-+^JXsq@_}sN7eHxXa4}RDx~q400$!t;rWW?fhCu$AF$O3HDv0CHl|)`B@>^;SUE^uZ
Kp+>=@b3XEjTAZ^@Wh%dk(A-gn56_;pwzg<6dj&WQwOUyK}mkXw~~ztBw?si^B5PpuPKNJS?2<lag3pFe#ZX$QH(W8PF)q5nzIMp
-KSp*Yh#(Jy{lG0uG*0t)edVkzmwVZ09{?0AiK#_D=Orl#0EoJ;DL;7St>Aq9>>8!a_TC3(+ZUZEb>pfS+!GC+pAFwy%pF>5_^Ll
?~wnC2Pq|*vi^v!N6ohoyi&{D+rW_kf(L<D-8D~^62D2L5ajm-c9$9(uc5IlxtQ$2@3n_jJI=HN5AooNfwU+yavvmL!<f?p*Bb4y
cChO!Pe&(|R}j6D92=IBA#5i`3?_}l6QF<wN1C#YF+0c(re$3FEA?DO*D4wz2O?W415TUH#KH%R4}*^Q)jA}Qcv=Hn-1m>HaLgjF
+*#h%LT_~Td#Vo`hm*=rC&TYiNL6i`xpIDhiuZv{nWJzWkWNOHPHN~wdf#rS!6is!B*;-daF3l=O5H9VhAimyC?bceCJlTGBvDMT
8knZ!A~m04OrUl+u>T!3b*b{XUZj`)jrlsz_H4Fv(~QJ@t)=1J^H~$t1(x9kXrhVyD7w1+c5a%>yn2IP|46?2m)opRNixZ?rotCB
8T``J2iqP{ursJ~`a4m-UNOQ}6(xa(SZP)L>W%COL@hsTti`u37_tZbk*^^bO?v7pui~z@3<EZ1X2I!A3}KLC2Hff!zO7q)k+0yR
197{>GX=kmdAi7#IY=v{7kHDo4VoT;(ZZ|Ym_vbS@jzTKIC<;RrR8}fnNBeJQ%qn^Dw4Psyu!kbqyviQnQM^swp6HhoPGUim1vSi
yi1kp!AT!r$*NC+BRCGR`Oyy5`hKA$XOBIuA>mdwW7-Z%e~+JklfwVSU1XYHrUyr`a^iuphpJ}PWX4WD`sB*R>&KtJ;p;BFmi51A
R1G2{i+L+?BC?A!f+P4&nmHxvy)yK%3lwGBtjbrB`(D-_7(KoF`xrX1AUJ}!JfuA=CLJG2*|)4<9mC{_J$EYO*>~YuielC6zrpCr
qTmSLNi$q2$<S^DI^5CsM#gqmln*EC?*|q`${T3m9GrzvW4oR2y|nL%qdG^jeaM~dI@nfJ9yzp*mE(g5D<N6My<Y1RdsX|cnV%Nq
0dGE(z6!a$bAuy@Asb1fQtm887=DagM4!$rl$4V2*G!7Cd}Uc5Ji4SXL>2E_P&QzY8|U%zfypts3(>w}aKZClJc7HwAkkIqv8JPP
N}u2e97OMTm8!0AB#i1Z7VJ01DJF0`UeBO{=hQFz+=9W55GDJ-v`@#BCVPtx4XOUL_>s}6omVcM`L~JLII6FC>lR9=pFDgLw=9|&
96{y0S*x<YU)lA2ZT6(}wuA1`>=~cFd~jjH^3={7DL)MTUFtPRX%iPBy;#8B)Um4yT9rV}+t~JA@e7pe%3D&W-=^9<-fA*$ZFV_M
ChrYCx!+9JO*1|o*LJt_?!PA+X)oL7j6U|~^*it+Tc}Yva&}U;`>_8+m*5CStUBEL-uyPBa@hP0+kCF6ZdUlTjgO^rD`_Da*z(o0
#^XO_mf#3Buo6BrUEB8ua;C)6qXO4|bsM7+W4joC9c7@>cf@*h>sb;Ufu-A-8DidQD)aVj{@2{z`FL%QtOa;_q#KRf%{m@?)W1cw
(Yg#%ihC0ak7vz8*W#Su2+sLf;ZvD-(Ff}Yt(eNx3v(<?m1vqQ-eMhOm0%%)Y7(wTWeT)Z<&d08O<u)S)w81WS}J0f^vuI&pRElM
6R);&tD9-}Q?_bn%(Wu#I60$|I%g_nhbeYi`708KDl9Gjd?}ziQtMB18X9MsFl^vL7aE~8+%iG(aJ%uq1V&<zvCX9fLLp9uIr&5P
jD!TMFE%HI8QxCbR1dS|-fR&ascz5&e)hm3ov1eynALwz=<y@d(FBsUpIU~QdJ7R4mKGwg@GB;N-prwv)~tT4A@#;0RyA*a3ipSI
po>`}RIH^Y#+skWAPZN{`48fHyro{iLk+N?Z|2Rv)E($h(q(lMbPaVq4c4(AHZ-x2C#w+%$B%#o(6DAWXW<B85t|ch+94Ab52LZB
cEB2K#njnUljZEv-211>F#c>`*TEvDQVYkCG*uP?L7gGh)jEx5Is!)sVf`$y{Shs)>MOmFMlI}zbHYoa`^pANdxS4Fte|q%2E%Q1
ke{VoZG??Sy4qBy%j8oF{Pasvvtgdn(Ed|n>bQ>w@|Wmg9tCoQ+B&N@#hQqiDs{Q;4?X%s8N8e{B6!GZU2{4GlVrylX(Wtnp954E
i`o<M2x>gqx=Tt-7PMNAu}5SB!aVY{sBkMkYiYF^BR(R_$bxxboDw*iV~U_=4yl6Lo<+B6k`W$b?PxIA(-LuoDnvbEKd=Q1hc{Rv
kN)KDBJ5(DhbxgMnHIshKNr~0I0-igvCKS^*VSZG8C=CUCO-nmleFeatNLoRv~w}9nYEZaAT^wRMp`5Ej<GgT8O*8PYdC#&jts+<
r@88Ka5&KX=lrHIQvGFw_MJ<JORS@c7U8^+_Kx=UM6g3{4F&Nc>{g+IgXqnamV`ea2elR^6&_<%a&yStYqG9r5c2y2vxGxnp>-bG
?K_kVXd`S9La15-&dBOnCYWY!v8~KX58fEZB?te+MtQsL!$t%YSj^07RUajU<w_PJ>?$+p^2kEF|A6%JDEJAhrzk`r3Q>qc6rvD?
C`2I&QHVkmqVWF>{{zu5)KL
"""

if __name__ == "__main__":
    common.command(main)
