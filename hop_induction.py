"""
Transformers, Parallel Computation, and Logarithmic Depth.
Sanford, Hsu, Telgarsky. ICML 2024, arXiv 2402.09268.

The task: a hop leads from a position to the last earlier occurrence of its character, and from
there one position on. In cabcab, the last b (position 5) leads to position 3, a c, and that to
position 1, an a, which has no earlier occurrence. find^k(i) is where k hops from i lead.

A transformer of depth floor(log2 k) + 2 can make k hops, since each layer can double their number
(Theorem 4.2). That a depth of order log k is necessary, too, for a bounded size, follows from a
conjecture about parallel machines. Trained transformers also make more hops with each layer: at
depths 2 to 5 the authors' models solve 2, 4, 7 and 12 (measured without dropout).

What to look for: the largest number of hops that each depth solves, with errors below 5% up to it.
It is in the row `solved` of the first table, and in the last lines beside Theorem 4.2's 1, 3, 7 for
depths 2, 3, 4. The short training of the quick preset solves 1, 3 (rarely 2) and 4 to 6 hops; see
RESULTS.md.

The second table shows what the heads look at, which depends on k. In the authors' model of depth 4
(cosine similarities in brackets) it follows the construction only at k = 8:

    layer      2               3               4
    k = 4      find^1          find^2          find^3
    k = 8      find^1 (.98)    find^2 (.83)    find^4 (.83)
    k = 16     find^1 (.98)    find^2 (.48)    find^6 (.36)

    python hop_induction.py                              depths 2, 3, 4 on a small task, in minutes
    python hop_induction.py --preset medium --plot       twice as wide, 64 positions, in an hour
    python hop_induction.py --preset paper --n-layer 4   the paper's setting, one depth
    python hop_induction.py --preset construct           Theorem 4.2, written down, not trained
    python hop_induction.py --preset mpc                 Fig. 1, parallel machines that make hops
    python hop_induction.py --arch transformer lstm --n-layer 4   beside an LSTM of the same size

    Fig. 2, errors by depth and number of hops; Figs. 3 and 4, what the heads look at:
    python hop_induction.py --preset paper --n-layer 2 3 4 5 6 --plot
    Fig. 2 for 8 heads; the finite training sets of App. G:
    python hop_induction.py --preset paper --n-layer 2 3 4 5 6 --n-head 8 --n-embd 256
    python hop_induction.py --preset paper --n-layer 4 --n-train 1000 3000

To reuse a part: HopTask needs find and follow, and Construction needs HopTask. mpc_hops needs
Cluster, find_first and look_up, but not torch. HopTransformer needs Block, CausalSelfAttention, MLP
and gpt2_init_ of common. hop_errors takes any model in eval mode; head_alignment takes one that
returns its attention.
"""
import collections
import math
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 4, App. G.1) ----------------------------------------------------------------

def follow(f, positions, undefined=-1):
    """f[positions] in each row, and `undefined` for a position -1. f, positions: (B, length).

    f [[7, 8, 9]] and positions [[2, -1, 0]] give [[9, undefined, 7]].
    """
    found = f.gather(1, positions.clamp_min(0))
    return torch.where(positions < 0, undefined, found)

def find(chars, k):
    """find^k of every position, (B, length), -1 if undefined. chars (B, length); k: int or (B,).

    find^1(i) = 1 + max{j < i : X_j = X_i}, and find^k is find^1 of find^(k-1) (Sec. 4). In cabcab,
    find^1 is -1 -1 -1 1 2 3, and find^2 is -1 -1 -1 -1 -1 1. As the transformer does, this squares
    f again and again (1, 2, 4, ... hops), and applies it for each bit of k that is one.
    """
    length = chars.shape[1]
    here = torch.arange(length, device=chars.device)
    earlier = (chars[:, :, None] == chars[:, None, :]).tril(-1)      # (B, i, j): X_i = X_j, j < i
    f = torch.where(earlier, here + 1, -1).amax(dim=2)       # find^1
    # a hop goes back or stays, so `length` hops lead to where any larger number of hops leads
    k = torch.as_tensor(k, device=chars.device).view(-1, 1).clamp_max(length)    # (B, 1) or (1, 1)
    positions = here.expand_as(chars)
    for bit in range(length.bit_length()):                   # here f is find^(2^bit)
        is_one = (k >> bit) % 2 == 1
        positions = torch.where(is_one, follow(f, positions), positions)
        f = follow(f, f)
    return positions

class HopTask:
    """k-hop induction: tokens are the number of hops k, then X; targets are X at find^k.

    tokens:  2     c a b c a b       the paper counts N = seq_len positions, of which the model is
    targets: blank u u u u u a       fed T = N - 1: the k token and N - 2 characters

    Ids: 0 .. max_hops for the number of hops, then the characters, `undefined` (u: no k-th hop),
    `blank`. In the paper's setting these are the authors' ids, in their vocabulary of 30.
    ValueError if no sequence of that length has max_hops hops.
    """

    def __init__(self, seq_len=100, n_chars=4, max_hops=16, device="cpu"):
        # abab... has the most hops: there find^1(i) = i - 1, and no hop leads to position 0, so the
        # last character, at i = seq_len - 3, has seq_len - 4 hops
        if n_chars < 2 or not 1 <= max_hops <= seq_len - 4:
            raise ValueError(f"no seq_len {seq_len} of n_chars {n_chars} has max_hops {max_hops}: "
                             "that takes a seq_len of max_hops + 4, and n_chars of 2")
        self.seq_len = seq_len
        self.n_chars = n_chars
        self.max_hops = max_hops
        self.device = device
        self.char = max_hops + 1                             # id of the first character
        self.undefined = self.char + n_chars
        self.blank = self.undefined + 1
        self.vocab_size = self.blank + 10 - self.blank % 10  # the next multiple of 10
        self.block_size = seq_len - 1

    def sample(self, batch, generator, hops=None):
        """tokens, targets (B, T); the generator is on the task's device. hops: None (uniform in
        0..max_hops), an int, or (B,). ValueError for hops that have no token."""
        on = dict(generator=generator, device=self.device)
        if hops is None:
            hops = torch.randint(self.max_hops + 1, (batch,), **on)
        else:
            hops = torch.as_tensor(hops, device=self.device).expand(batch)
            if hops.min() < 0 or hops.max() > self.max_hops:
                raise ValueError(f"hops {hops.tolist()}: tokens name 0 to {self.max_hops}")
        # no two neighbours are equal: a uniform first character, then steps of 1 .. n_chars - 1;
        # with four characters 2 3 1 3 -> 2 1 2 1
        steps = torch.randint(1, self.n_chars, (batch, self.seq_len - 2), **on)
        steps[:, 0] = torch.randint(self.n_chars, (batch,), **on)
        chars = self.char + steps.cumsum(1) % self.n_chars   # (B, N-2)
        targets = follow(chars, find(chars, hops), self.undefined)
        tokens = torch.cat([hops[:, None], chars], dim=1)
        return tokens, F.pad(targets, (1, 0), value=self.blank)

# ---- The model: a GPT-2, and a recurrent network to compare with --------------------------------

class HopTransformer(nn.Module):
    """Causal GPT-2 with learned positions, under GPT-2's parameter names. The authors use the last
    hidden state as logits; here an unembedding, lm_head, follows it."""

    def __init__(self, n_layer, n_head, n_embd, vocab_size, block_size, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(common.Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        common.gpt2_init_(self, n_layer)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also a (B, H, T, T) by layer."""
        x = self.drop(self.wte(tokens) + self.wpe.weight[:tokens.shape[1]])      # (B, T, d)
        attns = []
        for block in self.h:
            x = block(x, return_attn)                        # (B, T, d), or a pair
            if return_attn:
                x, attn = x
                attns.append(attn)
        logits = self.lm_head(self.ln_f(x))
        return (logits, attns) if return_attn else logits

class HopLSTM(nn.Module):
    """A two-layer LSTM, of the width (at most 2,040) at which it has about as many parameters as
    HopTransformer has with these arguments. n_head is not used."""

    def __init__(self, n_layer, n_head, n_embd, vocab_size, block_size, dropout=0.0):
        super().__init__()
        like = HopTransformer(n_layer, 1, n_embd, vocab_size, block_size)
        n_params = sum(p.numel() for p in like.parameters())
        # parameters at width d: two layers of 8 d^2 + 8 d, embedding and unembedding of V d each
        size = lambda d: 2 * d * (8 * d + 8 + vocab_size)
        width = min(range(8, 2048, 8), key=lambda d: abs(size(d) - n_params))
        self.wte = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V)."""
        hidden, _ = self.lstm(self.drop(self.wte(tokens)))   # (B, T, d)
        return self.lm_head(self.drop(hidden))

ARCHS = {"transformer": HopTransformer, "lstm": HopLSTM}     # the values of --arch

# ---- Training (Tables 1, 2) ---------------------------------------------------------------------

# What differs from the defaults of the flags, which are the quick preset. "construct" and "mpc"
# train nothing: they show the hand-built transformer and the parallel machines.
PRESETS = {
    "quick": {},
    "medium": dict(seq_len=64, n_embd=128, steps=6_000, warmup=500, lr=2e-3, eval_every=500),
    "paper": dict(
        seq_len=100, max_hops=16, n_layer=[2, 3, 4, 5, 6], n_embd=128, dropout=0.1,
        batch_size=32, steps=100_000, eval_every=2_000,
        warmup=1_000, lr=1e-4, beta2=0.999,
    ),
    "construct": dict(seq_len=100, max_hops=16),
    "mpc": dict(seq_len=1_000, max_hops=16),
}
# The flags that take several values, and how a label names a value other than the default. Depth is
# in every label, and the seed in none.
SWEEP = {
    "arch": "{}", "n_layer": "", "n_head": "{} heads",
    "n_train": "{} fixed sequences", "seed": "",
}

def resolve(args):
    """Completes a run's flags: those without effect become None."""
    if args.arch != "transformer":
        args.n_head = None

def build(args):
    """The task and the model of a run. ValueError if the flags do not fit each other."""
    if 0 < args.n_train < args.batch_size:
        raise ValueError(f"n_train {args.n_train} is less than one batch of {args.batch_size}")
    task = HopTask(args.seq_len, args.n_chars, args.max_hops, args.device)
    sizes = args.n_layer, args.n_head, args.n_embd, task.vocab_size, task.block_size
    model = ARCHS[args.arch](*sizes, args.dropout)
    return task, model.to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run's folder, the model in eval mode."""
    return common.load(folder, build, device)

def learning_rate(step, args):
    """Linear warm-up from 0 to args.lr at step args.warmup, then to 0 at args.steps (Table 2)."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    return args.lr * (args.steps - step) / (args.steps - args.warmup)

def train(args, run):
    """Trains one run, or resumes it; the trained model is in its checkpoint."""
    task, model = build(args)
    optimizer = torch.optim.AdamW(
        model.parameters(), fused=True,
        betas=(0.9, args.beta2), weight_decay=args.weight_decay,
    )
    data = torch.Generator(args.device).manual_seed(args.seed)
    if args.n_train:                                         # fixed batches, in a fixed order
        n_batches = args.n_train // args.batch_size          # the remainder is dropped
        sequences = task.sample(n_batches * args.batch_size, data)
        batches = torch.stack(sequences).split(args.batch_size, dim=1)           # each (2, B, T)
    start = run.restore(model, optimizer, data)
    if args.compile:
        model.compile()
    for step in run.steps(start, args.steps):
        rate = np.float32(learning_rate(step, args))         # as in the runs of RESULTS.md
        optimizer.param_groups[0]["lr"] = float(rate)
        if args.n_train:
            tokens, targets = batches[step % n_batches]      # (B, T)
        else:
            tokens, targets = task.sample(args.batch_size, data)                 # (B, T)
        bfloat16 = args.dtype == "bfloat16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(tokens)                           # (B, T, V)
        # over all positions, also those with the targets `undefined` and `blank`
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            fresh = torch.Generator(args.device).manual_seed(10_000)
            model.eval()
            errors = hop_errors(model, task, 50, fresh)
            model.train()
            error = errors[1:].nanmean().item()              # over 1 .. max_hops hops
            run.log(step + 1, loss=loss.item(), error=error, errors=plain(errors))

# ---- Measurement --------------------------------------------------------------------------------

# Evaluation draws its sequences with seeds from 10,000 on; take smaller ones for --seed.

@torch.no_grad()
def hop_errors(model, task, n, generator, return_se=False, everywhere=False):
    """Error rate by number of hops, (max_hops + 1,), each on n sequences. model: in eval mode.

    This is err_n^k (Sec. 5), the fraction of wrong predictions at positions where there is a k-th
    hop, so that the target is a character; nan if there are none. With everywhere, it is the
    fraction at all positions. With return_se, there are also standard errors over sequences.
    """
    wrong = []
    scored = []
    for k in range(task.max_hops + 1):
        for first in range(0, n, 256):
            tokens, targets = task.sample(min(256, n - first), generator, hops=k)
            is_wrong = model(tokens).argmax(-1) != targets   # (B, T)
            is_char = (targets >= task.char) & (targets < task.undefined)
            counts = is_char | everywhere                    # (B, T)
            wrong.append((is_wrong & counts).sum(1))         # (B,)
            scored.append(counts.sum(1))
    wrong = torch.cat(wrong).view(-1, n).float()             # (max_hops + 1, n)
    scored = torch.cat(scored).view(-1, n).float()
    total = scored.sum(1)
    errors = wrong.sum(1) / total                            # nan if k never occurs
    # standard error of the ratio of two sums over sequences
    excess = wrong - errors[:, None] * scored
    se = excess.square().sum(1).sqrt() / total
    return (errors, se) if return_se else errors

@torch.no_grad()
def head_alignment(model, task, k, n=10):
    """How much each head looks at find^j, j = 0 .. max_hops, if k hops are asked for (Sec. 5.2): a
    list by layer of lists (H, max_hops + 1).

    The measure is the cosine similarity <A, F_j> / (|A| |F_j|) of the head's attention matrix A and
    the matrix F_j with F_j[i, find^j(i)] = 1, and 0 elsewhere. It is the mean over n sequences,
    which are the same for every k.
    """
    data = torch.Generator(task.device).manual_seed(20_000)
    tokens, _ = task.sample(n, data, hops=k)
    _, attns = model(tokens, return_attn=True)               # (n, H, T, T) by layer
    matrices = []
    for j in range(task.max_hops + 1):
        positions = find(tokens[:, 1:], j) + 1               # of tokens, with k at 0; undefined: 0
        F_j = F.one_hot(F.pad(positions, (1, 0)), task.block_size)               # (n, T, T)
        F_j[:, :, 0] = 0                                     # no 1 for k and for undefined hops
        matrices.append(F_j.flatten(1)[:, None].float())     # (n, 1, T T)
    alignment = []
    for attn in attns:
        A = attn.float().flatten(2)                          # (n, H, T T)
        cosines = [F.cosine_similarity(A, F_j, dim=2) for F_j in matrices]
        alignment.append(torch.stack(cosines, dim=2).mean(0).tolist())
    return alignment

def plain(values):
    """A tensor as a list of numbers, with None for nan."""
    return [None if math.isnan(value) else value for value in values.tolist()]

def solved(errors):
    """The largest k up to which all errors are below 5%, and 0 if there is none. None, the error of
    a k that never occurs, is not below."""
    for k, error in enumerate(errors):
        if error is None or error >= 0.05:
            return max(k - 1, 0)
    return len(errors) - 1

def measure(args, run):
    """Errors and standard errors by number of hops, and what the heads look at."""
    task, model = run.trained(build)
    fresh = torch.Generator(args.device).manual_seed(30_000)
    errors, se = hop_errors(model, task, args.n_eval, fresh, return_se=True)
    results = dict(errors=plain(errors), se=plain(se))
    if args.arch == "transformer":
        hops = range(task.max_hops + 1)                      # lists by k, layer, head and j
        results["alignment"] = [head_alignment(model, task, k) for k in hops]
    return results

# ---- Theorem 4.2: a transformer of this depth, written down -------------------------------------

class Construction(nn.Module):
    """Explicit weights for up to max_hops hops in floor(log2 max_hops) + 2 layers, without error.

    f_l(i) denotes find^(2^l)(i), and c_l(i) the character at find^(k mod 2^l)(i), or `undefined`.
    Position 0 is the k token; undefined hops lead there, and stay there.
    - Layer 1 finds f_0, and copies the bits of k from the k token to every position.
    - Layer l + 2 looks from i at f_l(i), and reads f_l and c_l there. f_l of f_l(i) is f_(l+1)(i).
      c_l of f_l(i) is c_(l+1)(i) if bit l of k is one; else c_(l+1)(i) is c_l(i).
    - After the last bit, c(i) is the character at find^k(i), the answer.

    A head is two matrices: it looks from i to j by the score x_i . W_QK x_j, and adds W_OV x_j to
    x_i. Each layer writes features of its own, and nothing is ever erased. Scores of about
    seq_len^2 must be exact to 1, as they are in float64, but not in a GPU's TF32.

    The theorem has this depth, but needs only one head and a width that does not grow with N. Here
    layer 1 has a second head, since k is read from the input, and T dimensions tell each position
    from all others, so that a head can avoid its own position.
    """

    def __init__(self, max_hops, n_chars=4, seq_len=100):
        super().__init__()
        task = HopTask(seq_len, n_chars, max_hops)
        T = task.block_size
        C = n_chars + 1                                      # a character, or `undefined`
        n_bits = max_hops.bit_length()
        self.n_layer = n_bits + 1
        # A vector is a sum of features; a feature is (size, d), rows of the identity. For features
        # u and v, the matrix u.T @ v reads v and writes u; as W_QK it multiplies u at i and v at j.
        #   one, pos, pos2, itself   of position i: 1, i, i^2, and i as a one-hot vector
        #   is_k, k, b               1 at the k token; the bits of k there, and at every position
        #   f, c, new                for each l: f_l(i); c_l(i), and c_l of f_l(i), one-hot
        sizes = [1, 1, 1, 1, T]
        sizes += [n_bits, n_bits, n_bits + 1, (n_bits + 1) * C, n_bits * C]
        d = self.n_embd = sum(sizes)
        features = torch.eye(d).split(sizes)
        one, pos, pos2, is_k, itself, k, b, f, c, new = features
        f = f.split(1)                                       # f[l] is f_l, (1, d)
        c = c.split(C)                                       # (C, d)
        new = new.split(C)
        # Embeddings: of a token, its character or the bits of k; of position j, j, j^2 and itself
        hops = torch.arange(task.char)[:, None]              # (max_hops + 1, 1)
        bits = (hops // 2 ** torch.arange(n_bits) % 2).float()       # (max_hops + 1, n_bits)
        wte = torch.zeros(task.vocab_size, d)
        wte[:task.char] = is_k + c[0][-1] + bits @ k         # no character: `undefined`
        wte[task.char:task.undefined] = c[0][:-1]
        self.wte = nn.Parameter(wte)
        j = torch.arange(float(T))[:, None]                  # (T, 1)
        self.wpe = nn.Parameter(one + j * pos + j**2 * pos2 + itself)
        # Layer 1, head 1, looks at the last earlier position with the same character, by the score
        # 4T [X_i = X_j] + j + 2T [j is the k token] - 8T [i = j]. A match counts more than any j.
        # The k token scores less than a match, more than all else: it is chosen if there is no
        # match. The position itself scores lowest. The head brings back j + 1, from the k token 0.
        same = 4 * T
        find_QK = same * c[0].T @ c[0] + one.T @ pos
        find_QK += same / 2 * one.T @ is_k
        find_QK -= same * 2 * itself.T @ itself
        find_OV = f[0].T @ (pos + one - is_k)
        # Layer 1, head 2, copies the bits of k from the k token to all positions
        QK = torch.stack([find_QK, one.T @ is_k])            # (H, d, d)
        OV = torch.stack([find_OV, b.T @ k])
        zero = torch.zeros(d, d)
        layers = [(QK, OV, zero, zero)]                      # no MLP
        # Layer l + 2 looks at p = f_l(i), where the score 2 p j - j^2 = p^2 - (p - j)^2 is largest.
        # It brings back f_l as f_(l+1), and c_l as new_l. Its MLP takes new_l if b_l is one, else
        # c_l: c_(l+1) = relu(new_l + b_l - 1) + relu(c_l - b_l). Its hidden units are numbered as
        # the features that they read.
        for l in range(n_bits):
            QK = 2 * f[l].T @ pos - one.T @ pos2
            OV = f[l + 1].T @ f[l] + new[l].T @ c[l]
            W_in = new[l].T @ (new[l] + b[l] - one)
            W_in += c[l].T @ (c[l] - b[l])
            W_out = c[l + 1].T @ (new[l] + c[l])
            layers.append((QK[None], OV[None], W_in, W_out))
        self.layers = nn.ModuleList(map(nn.ParameterList, layers))
        # Unembedding: the last character; at the k token, `blank`
        lm_head = torch.zeros(task.vocab_size, d)
        lm_head[task.char:task.blank] = c[-1]
        lm_head[task.blank] = 2 * is_k
        self.lm_head = nn.Parameter(lm_head)
        self.double().requires_grad_(False)

    def forward(self, tokens, return_attn=False):
        """tokens (B, T) -> logits (B, T, V), with return_attn also a (B, H, T, T) by layer."""
        T = tokens.shape[1]
        x = self.wte[tokens] + self.wpe[:T]                  # (B, T, d)
        future = torch.full((T, T), -math.inf, device=tokens.device).triu(1)
        attns = []
        for W_QK, W_OV, W_in, W_out in self.layers:
            each = x.unsqueeze(1)                            # (B, 1, T, d), for every head
            scores = each @ W_QK @ each.mT                   # (B, H, T, T)
            attn = (30 * scores + future).softmax(-1)        # nearly all on the largest score
            x = x + (attn @ (each @ W_OV.mT)).sum(1)
            x = x + F.relu(x @ W_in.mT) @ W_out.mT
            attns.append(attn)
        logits = x @ self.lm_head.mT
        return (logits, attns) if return_attn else logits

construct = Construction                                     # its name for callers: construct(16)

# ---- Parallel machines: the other half of the title (Fig. 1, Sec. 2) ----------------------------

class Cluster:
    """q machines of s words. In a round each computes, then sends and receives at most s words."""

    def __init__(self, q, s):
        self.s = s
        self.rounds = 0
        self.memory = self.load = 0                          # most words held; sent or received
        # of each machine: the name of an array -> {position: word}
        self.words = [collections.defaultdict(dict) for _ in range(q)]

    def exchange(self, messages):
        """One round. messages: (sender, receiver, words). Returns an inbox for each machine, a list
        of the words of each message to it. ValueError if a machine sends, receives or holds more
        than s words."""
        sent = [0] * len(self.words)
        inboxes = [[] for _ in self.words]
        for sender, receiver, words in messages:
            sent[sender] += len(words)
            inboxes[receiver].append(words)
        self.rounds += 1
        for own, inbox, n_sent in zip(self.words, inboxes, sent):
            received = sum(map(len, inbox))
            held = received + sum(map(len, own.values()))
            self.memory = max(self.memory, held)
            self.load = max(self.load, received, n_sent)
        most = max(self.memory, self.load)
        if most > self.s:
            raise ValueError(f"round {self.rounds} takes {most} words, a machine has {self.s}")
        return inboxes

def mpc_hops(X, k, q, s, n_chars=4):
    """Computes hop_k, the characters of X at find^k, by q machines of s words. Returns a list, with
    -1 if undefined, and the Cluster. X: a list of characters, 0 .. n_chars - 1.

    Position i has three words, on machine i // m: its character X, a pointer f, which is find^1 at
    first, and a pointer r, which is i at first, find^k in the end. One round finds f. Two rounds
    for each bit of k move r along f if the bit is one, and square f. Two more replace r by X[r].

    ValueError if a machine needs more than s words, or if it could hold the whole input: then two
    rounds are enough to compute anything.
    """
    if s >= len(X):
        raise ValueError(f"a machine of {s} words could hold the whole input of {len(X)}")
    m = math.ceil(len(X) / q)                                # positions on a machine
    cluster = Cluster(q, s)
    for i, char in enumerate(X):
        own = cluster.words[i // m]
        own["X"][i] = char
        own["f"][i] = -1
        own["r"][i] = i
    find_first(cluster, n_chars)
    while k:
        look_up(cluster, m, ["f", "r"] if k % 2 else ["f"], "f")
        k //= 2
    look_up(cluster, m, ["r"], "X")
    answers = [word for own in cluster.words for word in own["r"].values()]
    return answers, cluster

def find_first(cluster, n_chars):
    """One round that writes find^1 to f. Each machine tells all later ones the position after its
    last a, its last b and so on, -1 for none. With X = abacba on two machines, machine 0 sends 3
    for a, 2 for b, -1 for c, so that machine 1, with cba, has f = -1, 2, 3."""
    q = len(cluster.words)
    messages = []
    for machine, own in enumerate(cluster.words):
        last = {char: i + 1 for i, char in own["X"].items()}
        words = [last.get(char, -1) for char in range(n_chars)]
        messages += [(machine, later, words) for later in range(machine + 1, q)]
    for own, inbox in zip(cluster.words, cluster.exchange(messages)):
        last = [-1] * n_chars
        for words in inbox:
            last = list(map(max, last, words))
        for i, char in own["X"].items():
            own["f"][i] = last[char]
            last[char] = i + 1

def look_up(cluster, m, pointers, array):
    """Two rounds, question and answer: each pointer p becomes array[p]; -1, undefined, stays -1.
    pointers, array: names of arrays."""
    questions = []
    for machine, own in enumerate(cluster.words):
        for pointer in pointers:
            for i, p in own[pointer].items():
                if p >= 0:
                    questions.append((machine, p // m, (pointer, p, i)))
    answers = []
    for machine, inbox in enumerate(cluster.exchange(questions)):
        for pointer, p, i in inbox:
            word = cluster.words[machine][array][p]
            answers.append((machine, i // m, (pointer, i, word)))
    for own, inbox in zip(cluster.words, cluster.exchange(answers)):
        for pointer, i, word in inbox:
            own[pointer][i] = word

# ---- Tables and figures -------------------------------------------------------------------------

# Errors of the authors' models at step 100,000 by k, as far as we know them. A setting is named as
# a run's folder. dropout off: we measured their checkpoint on 600 sequences for each k, without
# dropout, as we measure our models. on: we have no checkpoint, and these are the published numbers,
# with the dropout of training. Six layers of 4 heads had a schedule of 200,000 steps, so that their
# learning rate was at half its peak.
PUBLISHED = """
setting                              dropout    1    2    3    4    6    8   12   16
paper,n_layer=2                          off .000 .045 .257 .350 .521 .621 .712 .737
paper,n_layer=3                          off .000 .000 .002 .046 .238 .384 .581 .695
paper,n_layer=4                          off .000 .000 .000 .000 .001 .068 .337 .542
paper,n_layer=5                          off .000 .000 .000 .000 .000 .000 .041 .281
paper,n_layer=6                           on .000 .000 .001 .002 .003 .006 .012 .062
paper,n_layer=2,n_head=8,n_embd=256       on .003 .033 .140 .267
paper,n_layer=3,n_head=8,n_embd=256       on .001 .001 .005 .021
paper,n_layer=4,n_head=8,n_embd=256       on .000 .000 .000 .001 .004 .015 .139 .334
paper,n_layer=5,n_head=8,n_embd=256       on .000 .000 .000 .000 .000 .000 .003 .027
paper,n_layer=6,n_head=8,n_embd=256       on .000 .000 .000 .000 .000 .000 .002 .002
paper,n_layer=2,n_train=1000             off .053 .463 .563 .648 .730 .749 .766 .775
paper,n_layer=3,n_train=1000             off .065 .444 .572 .651 .732 .747 .763 .775
paper,n_layer=4,n_train=1000             off .001 .003 .335 .503 .701 .738 .757 .774
paper,n_layer=5,n_train=1000             off .000 .002 .155 .483 .684 .734 .756 .771
paper,n_layer=3,n_train=3000             off .000 .001 .099 .186 .385 .522 .687 .750
paper,n_layer=4,n_train=3000             off .000 .000 .000 .001 .008 .109 .395 .592
paper,n_layer=5,n_train=3000             off .000 .000 .000 .000 .000 .002 .106 .331
"""

def published(run):
    """The errors of the authors' model in a run's setting, {k: error}; {} in other settings."""
    name = re.split(",dtype=|,compile=|,seed=", run.folder.name)[0]  # the flags before these
    header, *rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    for setting, _, *errors in rows:
        if setting == name:
            return dict(zip(map(int, header[2:]), map(float, errors)))
    return {}

def in_words(args):
    """What differs from the preset, other than depth and seed, such as ", 8 heads"."""
    words = ""
    for key, phrase in SWEEP.items():
        value = getattr(args, key)
        if phrase and value is not None and args.defaults[key] != [value]:
            words += ", " + phrase.format(value)
    return words

def show_errors(runs):
    """Fig. 2: error by number of hops, a column and a curve for each setting."""
    args = runs[0].args
    hops = range(args.max_hops + 1)
    chance = 1 - 1 / args.n_chars
    ends = 0, args.max_hops
    thin = dict(color="black", linestyle="-", linewidth=0.6)
    cells = []
    curves = [
        ("a random character", ends, (chance, chance), thin),
        ("solved: below 5%", ends, (0.05, 0.05), dict(thin, linestyle=":")),
    ]
    colors = {}
    for run in runs:
        label, errors = run.args.label, run.results["errors"]
        # one color for the seeds of a label and for the paper's marks
        look = dict(color=colors.setdefault(label, f"C{len(colors)}"), marker="o")
        curves.append((label, hops, errors, look))
        cells += [(f"k={k}", label, errors[k]) for k in hops]
        paper = published(run)
        cells += [(f"k={k}, paper", label, error) for k, error in paper.items()]
        if paper:
            hollow = dict(look, linestyle="none", fillstyle="none", markersize=9)
            curves.append((f"{label}, paper", list(paper), list(paper.values()), hollow))
        cells.append(("solved", label, solved(errors), ".0f"))
    se = max(x or 0 for run in runs for x in run.results["se"])
    common.print_table(f"""\
Error where there is a k-th hop, by the number of hops k ({args.n_eval} sequences each, standard
errors up to {se:.3f}). Solved: the largest k up to which all errors are below 5%. Guessing a
character gives {chance:.2f}. The model can do worse by answering `undefined`: for large k this is
right at most positions, but not at those counted here. Paper: the authors' models, those of 4 heads
and up to 5 layers without dropout, else with it. An LSTM has two layers, and about as many
parameters as the transformer of the depth named.\
""", cells)
    if args.plot:
        axis = dict(xlabel="number of hops k", ylabel="error where there is a k-th hop")
        panels = {"Fig. 2: errors by depth": (axis, curves)}
        common.plot(runs[0].folder.parent / "errors.png", panels)

def show_heads(args, runs=()):
    """Figs. 3 and 4 as numbers: the find^j that each layer looks at most, by k."""
    alignments = {}                                          # by label; of the first seed
    for run in runs:
        alignments.setdefault(run.args.label, run.results["alignment"])
    task = HopTask(args.seq_len, args.n_chars, args.max_hops)
    built = construct(args.max_hops, args.n_chars, args.seq_len)
    hops = range(args.max_hops + 1)
    alignments["hand-built"] = [head_alignment(built, task, k) for k in hops]
    cells = []
    for label, alignment in alignments.items():
        layers = zip(*alignment)                             # from (k, L, H, j): L of (k, H, j)
        for i, layer in enumerate(layers, 1):
            best = np.max(layer, axis=1)                     # (k, j), over heads
            for k in 2 ** np.arange(args.max_hops.bit_length()):
                j = best[k].argmax()
                cells.append((f"{label}, layer {i}", f"k={k}", f"find^{j} {best[k, j]:.2f}"))
    common.print_table("""\
Heads of the first seed: the find^j that a head of the layer looks at most if k hops are asked for,
and their cosine similarity. find^0 is the position itself. Undefined hops count against a head; the
hand-built first layer looks for characters and for k, at no find^j.""", cells)

@torch.no_grad()
def plot_heads(run):
    """Figs. 3 and 4 of a run: the cosine similarity of each head with find^j; for k = max_hops, the
    attention of the best head of each layer, with circles where find^j leads."""
    args = run.args
    alignment = np.array(run.results["alignment"])           # (k, L, H, j)
    hops = range(args.max_hops + 1)
    heads = [f"{i + 1}.{h + 1}" for i, h in np.ndindex(alignment.shape[1:3])]
    axis = dict(xlabel="j of find^j", ylabel="layer.head")
    panels = {}
    for k in (args.max_hops // 2, args.max_hops):
        title = f"{args.label}, asked for {k} hops"
        panels[title] = np.concatenate(alignment[k]), heads, hops, axis, []
    common.plot_matrices(run.folder.parent / "heads.png", panels, columns=2)

    task, model = load(run.folder)
    tokens, _ = task.sample(1, torch.Generator().manual_seed(0), hops=args.max_hops)
    _, attns = model(tokens, return_attn=True)
    axis = dict(xlabel="position looked at", ylabel="position")
    panels = {}
    for i, (attn, cosines) in enumerate(zip(attns, alignment[-1]), 1):           # cosines (H, j)
        head = cosines.max(1).argmax()
        j = cosines[head].argmax()
        positions = find(tokens[:, 1:], j)[0].tolist()
        circles = [(at + 1, p + 1) for at, p in enumerate(positions) if p >= 0]
        title = f"head {i}.{head + 1} and find^{j}"
        panels[title] = attn[0, head], (), (), axis, circles
    common.plot_matrices(run.folder.parent / "attention.png", panels, columns=2)

def verdict(runs):
    """Prints the hops that each depth solves, beside those of Theorem 4.2: at depth L the largest k
    with floor(log2 k) + 2 = L, that is 2^(L-1) - 1. Says whether one more layer makes over 1.5
    times as many, or all."""
    found = {}                                               # (setting, depth) -> hops of the seeds
    for run in runs:
        if run.args.arch == "lstm":                          # always of two layers
            continue
        key = in_words(run.args), run.args.n_layer
        found.setdefault(key, []).append(solved(run.results["errors"]))
    each = []
    doubled = []
    for (setting, depth), seeds in sorted(found.items()):
        hops = np.median(seeds)
        each.append(f"{depth} layers{setting} {hops:g} ({2 ** (depth - 1) - 1})")
        if (setting, depth - 1) not in found:
            continue
        before = np.median(found[setting, depth - 1])
        if before < runs[0].args.max_hops:                   # else there is no more to solve
            doubled.append(hops > 1.5 * before or hops == runs[0].args.max_hops)
    if each:
        print(f"\nHops solved (possible by Theorem 4.2): {', '.join(each)}.")
    if doubled:
        print(f"One more layer makes over 1.5 times as many, or all {runs[0].args.max_hops}, "
              f"in {sum(doubled)} of {len(doubled)} cases.")

def show(runs):
    """The tables of a sweep, and with --plot its figures."""
    for run in runs:
        run.args.label = f"{run.args.n_layer} layers{in_words(run.args)}"
    show_errors(runs)
    with_heads = [run for run in runs if "alignment" in run.results]
    if with_heads:
        show_heads(runs[0].args, with_heads)
        if runs[0].args.plot:
            plot_heads(max(with_heads, key=lambda run: run.args.n_layer))        # the deepest
    verdict(runs)

# ---- The command --------------------------------------------------------------------------------

def show_construction(args):
    """--preset construct: the hand-built transformer's errors and heads, a dict for each k."""
    task = HopTask(args.seq_len, args.n_chars, args.max_hops, args.device)
    model = construct(args.max_hops, args.n_chars, args.seq_len).to(args.device)
    data = torch.Generator(args.device).manual_seed(args.seed[0])
    errors = hop_errors(model, task, args.n_eval, data, everywhere=True).tolist()
    show_heads(args)
    cells = [(f"k={k}", "error", error, "g") for k, error in enumerate(errors)]
    common.print_table(f"Errors on {args.n_eval} sequences, at all positions", cells)
    print(f"""
Largest error {max(errors):g}, by depth {model.n_layer} = floor(log2 {args.max_hops}) + 2, width \
{model.n_embd}, N = {args.seq_len}.
The depth is the theorem's, which needs only one head, and a width that does not grow with N.""")
    return [dict(k=k, error=error) for k, error in enumerate(errors)]

def show_mpc(args, q=32, s=320):
    """--preset mpc: rounds, memory and load for k = 1, 2, 4, ..., a dict for each k. The answers
    are compared with those of find."""
    task = HopTask(args.seq_len + 2, args.n_chars, args.max_hops)
    tokens, _ = task.sample(1, torch.Generator().manual_seed(args.seed[0]))
    chars = tokens[:, 1:] - task.char                        # (1, seq_len)
    results = []
    cells = []
    for bit in range(args.max_hops.bit_length()):
        k = 2**bit
        answers, cluster = mpc_hops(chars[0].tolist(), k, q, s, args.n_chars)
        right = answers == follow(chars, find(chars, k))[0].tolist()
        results.append(dict(
            k=k, right=right, rounds=cluster.rounds, depth=bit + 2,
            memory=cluster.memory, load=cluster.load,
        ))
        cells += [(f"hop_{k}", name, str(value)) for name, value in results[-1].items()]
    common.print_table(f"""\
hop_k of {args.seq_len} characters by {q} machines of {s} words. Right: as found by find. Depth: of
a transformer. Memory: the most words that one holds; load: that one sends or receives.""", cells)
    more = np.diff([result["rounds"] for result in results])
    print(f"\nRounds that each doubling of k adds: {more}. To a transformer, it adds a layer.")
    return results

SPECIAL = {"construct": show_construction, "mpc": show_mpc}  # presets that train nothing

def parse_args(argv=None):
    """The command line: name, type, default (a list for several values), and help of each flag."""
    parser = common.Parser(description=__doc__)

    def add(name, kind, default, text, **more):
        many = "+" if isinstance(default, list) else None
        parser.add_argument(name, type=kind, default=default, help=text, nargs=many, **more)

    count = common.positive_int
    add("--arch", str, ["transformer"], "lstm: two layers, as many parameters", choices=list(ARCHS))
    add("--n-layer", count, [2, 3, 4], "layers")
    add("--n-head", count, [4], "heads per layer of a transformer")
    add("--n-embd", count, 64, "width d")
    add("--dropout", common.non_negative, 0.0, "fraction of units dropped in training")
    add("--seq-len", count, 24, "positions N as the paper counts: k and N - 2 characters (mpc: N)")
    add("--n-chars", count, 4, "characters of the alphabet")
    add("--max-hops", count, 8, "largest number of hops")
    add("--n-train", common.number(int, 0, 10**5), [0],
        "fixed sequences, in whole batches (1000 are 992 in batches of 32); 0: fresh ones")
    add("--batch-size", count, 64, "sequences per step")
    add("--steps", count, 3_000, "training steps")
    add("--warmup", count, 400, "steps of linear warm-up, before the linear decay to 0")
    add("--lr", common.positive_float, 4e-3, "peak learning rate of AdamW")
    add("--beta2", common.number(float, 0, 0.99999), 0.98,
        "of AdamW: how slowly it forgets squared gradients")
    add("--weight-decay", common.non_negative, 0.01, "weight decay of AdamW")
    add("--eval-every", count, 250, "steps between evaluations")
    add("--n-eval", count, 1_000, "sequences for each k in the final errors")
    add("--seed", common.seed_int, [0], "seeds of weights and data")
    add("--dtype", str, "float32", "bfloat16: autocast", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    return common.parse_args(parser, PRESETS, argv)

def main(argv=None):
    """Trains what the flags ask for, prints the tables, and returns a list of results."""
    args = parse_args(argv)
    if args.preset in SPECIAL:
        try:
            return SPECIAL[args.preset](args)
        except ValueError as error:
            raise common.UsageError(error) from error
    runs = common.sweep(args, SWEEP, build, resolve, measured=["n_eval"])
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
