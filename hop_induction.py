"""
Transformers, Parallel Computation, and Logarithmic Depth. Sanford, Hsu, Telgarsky. ICML 2024, arXiv 2402.09268

k-hop induction heads, a chain of k look-ups, need depth Theta(log k) and no more: depth floor(log2 k) + 2 is enough
(Theorem 4.2), because each layer can double the number of hops. Trained transformers obey the same threshold, and their
heads find the same doubling: they look at find^1, find^2, find^4, ...

What to look for: in the table of errors by depth and hops, the largest k that is solved. In the paper's setting it about
doubles with each layer. The quick preset stops at 4 hops after a short training, where doubling cannot be told from one
more hop a layer: it shows that depth decides, and heads that turn to find^1 first and mix the others.

    python hop_induction.py                                  depths 2, 3, 4 on a small task, in minutes
    python hop_induction.py --preset paper --n-layer 4       the paper's setting, one depth

    Fig. 2, errors by depth and number of hops; Figs. 3 and 4, what the heads look at:
    python hop_induction.py --preset paper --n-layer 2 3 4 5 6 --plot
    Fig. 2 for 8 heads; the finite training sets of App. G:
    python hop_induction.py --preset paper --n-layer 4 5 6 --n-head 8 --n-embd 256
    python hop_induction.py --preset paper --n-layer 4 --n-train 1000 3000
    Theorem 4.2, a transformer of its depth, written down instead of trained:
    python hop_induction.py --construct
    Fig. 1, the same computation by machines that exchange words in rounds:
    python hop_induction.py --mpc
    Sec. 5, a recurrent network with as many parameters:
    python hop_induction.py --arch transformer lstm --n-layer 4
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The task (Sec. 4, App. G.1) ------------------------------------------------------------------------------------
def follow(map, positions):
    """map[positions], row by row, for (B, N) each, where -1 stands for undefined and stays so."""
    return torch.where(positions < 0, -1, map.gather(1, positions.clamp_min(0)))

def find(chars, k, max_hops=None):
    """Positions find^k of every position, for characters (B, N) and hops k, an int or (B,): (B, N), -1 where undefined.

    find^1(i) = 1 + max{j < i : X_j = X_i}, the position after the last occurrence of the same character before i;
    find^k = find^1 of find^(k-1), find^0(i) = i (Sec. 4). Found by doubling, as the transformer does: f, f f, ...
    A bound max_hops on k saves doublings, and asks nothing of the device that k is on.
    """
    B, N = chars.shape
    here = torch.arange(N, device=chars.device).expand(B, N)
    ordered, order = chars.sort(dim=1, stable=True)                              # equal characters side by side
    before = torch.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1] + 1, -1)
    f = torch.full_like(here, -1).scatter(1, order[:, 1:], before)               # find^1
    # find^1(i) <= i, so that after N hops all positions are undefined or stay: beyond, find^k = find^N
    k = torch.as_tensor(k, device=chars.device).view(-1, 1).clamp_max(N)         # (B, 1) or (1, 1)
    most = N if max_hops is None else min(max_hops, N)
    positions = here
    for bit in range(most.bit_length()):
        positions = torch.where((k >> bit & 1).bool(), follow(f, positions), positions)
        f = follow(f, f)
    return positions

class HopTask:
    """k-hop induction. Tokens: the number of hops k, then the characters of X; targets: X at find^k, all positions.

    Of seq_len positions counted by the paper, seq_len - 1 are fed. Ids: 0 .. max_hops the number of hops, then the
    characters, `undefined` (no k-th hop) and `blank` (the target at the k token). At the paper's setting these are the
    authors' ids, in their vocabulary of 30. Raises ValueError where there is no such task.
    """

    def __init__(self, seq_len=100, n_chars=4, max_hops=16, device="cpu"):
        if seq_len < 4 or n_chars < 2 or max_hops < 1:
            raise ValueError(f"no task: seq_len {seq_len} (4 at least), n_chars {n_chars} (2), max_hops {max_hops} (1)")
        self.seq_len, self.n_chars, self.max_hops, self.device = seq_len, n_chars, max_hops, device
        self.char = max_hops + 1                                                 # id of the first character
        self.undefined, self.blank = self.char + n_chars, self.char + n_chars + 1
        self.vocab_size, self.block_size = math.ceil((self.blank + 1) / 10) * 10, seq_len - 1

    def sample(self, batch, generator, hops=None):
        """tokens, targets (B, seq_len-1) each; hops: None (uniform over 0..max_hops), an int, or (B,).
        ValueError where hops has no token: it is not in 0..max_hops."""
        if hops is None:
            hops = torch.randint(self.max_hops + 1, (batch,), generator=generator, device=self.device)
        else:
            hops = torch.as_tensor(hops, device=self.device).expand(batch)
            if batch and (hops.min() < 0 or hops.max() > self.max_hops):
                raise ValueError(f"hops {hops.tolist()}: tokens name 0 to {self.max_hops}")
        # no two neighbours are equal: a uniform first character, then steps of 1 .. n_chars - 1 around the circle
        steps = torch.randint(1, self.n_chars, (batch, self.seq_len - 2), generator=generator, device=self.device)
        steps[:, 0] = torch.randint(self.n_chars, (batch,), generator=generator, device=self.device)
        chars = self.char + steps.cumsum(1) % self.n_chars                       # (B, seq_len-2)
        positions = find(chars, hops, self.max_hops)
        targets = torch.where(positions < 0, self.undefined, chars.gather(1, positions.clamp_min(0)))
        return torch.cat([hops[:, None], chars], 1), F.pad(targets, (1, 0), value=self.blank)

# ---- The models: a GPT-2, and a recurrent network to compare with ---------------------------------------------------
class HopTransformer(nn.Module):
    """Causal GPT-2 with learned positions, under GPT-2's parameter names. Unlike the authors' model, whose last hidden
    state is the logits (so that its width is at least the vocabulary), it has an unembedding of its own, lm_head."""

    def __init__(self, n_layer, n_head, n_embd, vocab_size, block_size, dropout=0.0):
        super().__init__()
        self.n_layer = n_layer
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([common.Block(n_embd, n_head, dropout) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        common.gpt2_init_(self, n_layer)

    def forward(self, tokens, return_attn=False):
        """tokens (B, N) -> logits (B, N, V), with return_attn also each layer's attention weights (B, H, N, N)."""
        x, attns = self.drop(self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]), []
        for block in self.h:
            x, attn = block(x, return_attn=True) if return_attn else (block(x), None)
            attns.append(attn)
        logits = self.lm_head(self.ln_f(x))
        return (logits, attns) if return_attn else logits

class HopLSTM(nn.Module):
    """A two-layer LSTM of the width that brings it closest to n_params parameters."""

    def __init__(self, n_params, vocab_size, dropout=0.0):
        super().__init__()
        width = min(range(8, 2048, 8), key=lambda d: abs(16 * d * d + 16 * d + 2 * vocab_size * d - n_params))
        self.wte = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        """tokens (B, N) -> logits (B, N, V)."""
        hidden, _ = self.lstm(self.drop(self.wte(tokens)))                       # (B, N, width)
        return self.lm_head(self.drop(hidden))

# ---- Theorem 4.2: a transformer of this depth, written down ---------------------------------------------------------
class Construction(nn.Module):
    """A transformer with explicit weights that solves max_hops hops in floor(log2 max_hops) + 2 layers, without error.

    It has the theorem's depth and not its size: the theorem has one head and a width that does not grow with N. Here the
    first layer has a second head, as k is read from the input, and N dimensions tell a position from all others, with
    which a head looks at the strict past alone.

    The residual stream has named features, and every layer writes features of its own, so that nothing is ever erased.
    Heads are given by two bilinear forms: the score of looking from i to j is x_i . W_QK x_j, and what is brought back
    and added to x_i is W_OV x_j. In token positions, 0 is the k token, where every undefined hop goes and stays; f_l(i)
    is find^(2^l) of i, and c_l(i) is the character (or `undefined`) at find^(k mod 2^l) of i.
    """

    def __init__(self, max_hops, n_chars=4, seq_len=100):
        super().__init__()
        task = HopTask(seq_len, n_chars, max_hops)
        N, n_bits, C = task.block_size, max_hops.bit_length(), n_chars + 1
        self.n_layer, self.inverse_temperature = n_bits + 1, 30.0
        sizes = dict(one=1, pos=1, pos2=1, is_k=1, where=N, k_bits=n_bits, bits=n_bits, f0=1, c0=C)
        for l in range(n_bits):
            sizes.update({f"c{l} at f{l}": C, f"f{l + 1}": 1, f"c{l + 1}": C})
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        x = {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends)}     # feature: its dimensions
        self.n_embd = d = ends[-1]

        def zeros(*shape):
            return nn.Parameter(torch.zeros(shape), requires_grad=False)

        def write(matrix, targets, sources, value=1.0):                          # matrix[target, source] = value
            for target, source in zip(targets, sources, strict=True):
                matrix[target, source] = value

        # Embeddings: a token knows its character, or the bits of k; a position knows j, j^2, and which one it is.
        self.wte, self.wpe, self.lm_head = zeros(task.vocab_size, d), zeros(N, d), zeros(task.vocab_size, d)
        characters = range(task.char, task.undefined)
        write(self.wte, characters, x["c0"][:n_chars])
        for k in range(max_hops + 1):
            write(self.wte, [k, k], [x["is_k"][0], x["c0"][n_chars]])            # the k token's character: `undefined`
            write(self.wte, [k] * k.bit_count(), [x["k_bits"][bit] for bit in range(n_bits) if k >> bit & 1])
        for j in range(N):
            self.wpe[j, [x["one"][0], x["pos"][0], x["pos2"][0], x["where"][j]]] = torch.tensor([1.0, j, j * j, 1.0])

        # Layer 1, head 1: the last earlier position with the same character. A match counts more than recency (j),
        # oneself less than anything, and the k token ranks between matches and the rest. Brings back j + 1, or 0.
        QK, OV, match = zeros(2, d, d), zeros(2, d, d), 4.0 * N
        write(QK[0], x["c0"][:n_chars], x["c0"][:n_chars], match)
        write(QK[0], x["one"], x["pos"])
        write(QK[0], x["where"], x["where"], -2 * match)
        write(QK[0], x["one"], x["is_k"], match / 2)
        write(OV[0], x["f0"], x["pos"])
        write(OV[0], x["f0"], x["one"])
        write(OV[0], x["f0"], x["is_k"], -1.0)
        # Layer 1, head 2: everybody learns the bits of k from the k token.
        write(QK[1], x["one"], x["is_k"])
        write(OV[1], x["bits"], x["k_bits"])
        W_in, b_in, W_out = zeros(2 * C, d), zeros(2 * C), zeros(d, 2 * C)       # no MLP yet
        layers = [(QK, OV, W_in, b_in, W_out)]

        # Layer l + 2: look at position p = f_l(i), where 2 p j - j^2 = p^2 - (p - j)^2 is largest, and bring back f_l
        # from there, which makes f_(l+1), and c_l. The MLP then takes the new character where bit b_l of k is one:
        # c_(l+1)(i) = relu(c_l(f_l(i)) + b_l - 1) + relu(c_l(i) - b_l).
        for l in range(n_bits):
            QK, OV = zeros(1, d, d), zeros(1, d, d)
            write(QK[0], x[f"f{l}"], x["pos"], 2.0)
            write(QK[0], x["one"], x["pos2"], -1.0)
            write(OV[0], x[f"f{l + 1}"], x[f"f{l}"])
            write(OV[0], x[f"c{l} at f{l}"], x[f"c{l}"])
            W_in, b_in, W_out = zeros(2 * C, d), zeros(2 * C), zeros(d, 2 * C)
            new, old, bit = range(C), range(C, 2 * C), [x["bits"][l]] * C
            write(W_in, new, x[f"c{l} at f{l}"])
            write(W_in, new, bit)
            b_in[:C] = -1.0
            write(W_in, old, x[f"c{l}"])
            write(W_in, old, bit, -1.0)
            write(W_out, x[f"c{l + 1}"], new)
            write(W_out, x[f"c{l + 1}"], old)
            layers.append((QK, OV, W_in, b_in, W_out))
        self.layers = nn.ModuleList(nn.ParameterList(layer) for layer in layers)

        # Unembedding: the last character; at the k token, `blank`.
        write(self.lm_head, [*characters, task.undefined], x[f"c{n_bits}"])
        write(self.lm_head, [task.blank], x["is_k"], 2.0)

    def forward(self, tokens, return_attn=False):
        """tokens (B, N) -> logits (B, N, V), with return_attn also each layer's attention weights (B, H, N, N)."""
        N = tokens.shape[1]
        x, attns = self.wte[tokens] + self.wpe[:N], []                           # (B, N, d)
        future = torch.full((N, N), -math.inf, device=tokens.device).triu(1)
        for W_QK, W_OV, W_in, b_in, W_out in self.layers:
            each = x.unsqueeze(1)                                                # (B, 1, N, d), for every head
            scores = each @ W_QK @ each.mT                                       # (B, H, N, N)
            attns.append((self.inverse_temperature * scores + future).softmax(-1))
            x = x + (attns[-1] @ (each @ W_OV.mT)).sum(1)
            x = x + F.relu(x @ W_in.mT + b_in) @ W_out.mT
        logits = x @ self.lm_head.mT
        return (logits, attns) if return_attn else logits

def construct(max_hops, n_chars=4, seq_len=100):
    """A transformer of Theorem 4.2's depth for up to max_hops hops: HopTransformer's forward, .n_layer, no training."""
    return Construction(max_hops, n_chars, seq_len)

# ---- Training (Tables 1, 2) -----------------------------------------------------------------------------------------
def build(args):
    """The task and the model of a run."""
    task = HopTask(args.seq_len, args.n_chars, args.max_hops, args.device)
    model = HopTransformer(args.n_layer, args.n_head, args.n_embd, task.vocab_size, task.block_size, args.dropout)
    if args.arch == "lstm":
        n_params = sum(p.numel() for p in model.parameters())
        model = HopLSTM(n_params, task.vocab_size, args.dropout)
    return task, model.to(args.device)

def learning_rate(step, args):
    """Linear warm-up from 0 at step 0 to the peak at step W, then linear decay to 0 at step T (Table 2)."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    return args.lr * (args.steps - step) / (args.steps - args.warmup)

def train(args, run):
    """One run of the sweep; continues from its checkpoint where there is one. Returns its results."""
    task, model = build(args)
    lr = torch.tensor(0.0, device=args.device)                                   # a tensor: a CUDA graph sees it change
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=args.weight_decay, fused=True,
                                  capturable=lr.is_cuda)
    data = torch.Generator(args.device).manual_seed(args.seed)                   # training data alone
    if args.n_train:                                                             # fixed sequences in a fixed order
        fixed = task.sample(args.n_train, torch.Generator(args.device).manual_seed(args.seed))
    start = run.restore(model=model, optimizer=optimizer, data=data)
    optimizer.param_groups[0]["lr"] = lr
    cursor = start * args.batch_size + torch.arange(args.batch_size, device=args.device)

    def training_step():
        if args.n_train:
            tokens, targets = (x[cursor % args.n_train] for x in fixed)          # (B, N)
            cursor.add_(args.batch_size)
        else:
            tokens, targets = task.sample(args.batch_size, data)                 # (B, N)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens)                                               # (B, N, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())  # every position counts
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step_once = common.compile_step(training_step, model, data) if args.compile else training_step
    for step in run.steps(start, args.steps):
        lr.fill_(learning_rate(step, args))
        loss = step_once()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            model.eval()
            errors = hop_errors(model, task, 50, torch.Generator(args.device).manual_seed(10_000))
            model.train()
            run.log(step + 1, loss=loss.item(), error=errors[1:].mean().item(), errors=errors.tolist())
            run.save(step + 1)

    model.eval()
    errors, se = hop_errors(model, task, args.n_eval, torch.Generator(args.device).manual_seed(30_000), return_se=True)
    results = dict(errors=errors.tolist(), se=se.tolist(), n_params=sum(p.numel() for p in model.parameters()))
    if args.arch == "transformer":
        results["alignment"] = [layer.tolist() for layer in head_alignment(model, task)]
    return results

# ---- Measurement ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def hop_errors(model, task, n, generator, return_se=False):
    """Error rate by number of hops, (max_hops + 1,): the share of wrong predictions over positions whose target is a
    character, on n fresh sequences for each k. With return_se also the standard errors, sequences being the draws."""
    errors, ses = [], []
    for k in range(task.max_hops + 1):
        wrong, scored = [], []
        for batch in [256] * (n // 256) + ([n % 256] if n % 256 else []):
            tokens, targets = task.sample(batch, generator, hops=k)
            logits = model(tokens)
            counts = (targets >= task.char) & (targets < task.undefined)
            wrong.append(((logits.argmax(-1) != targets) & counts).sum(1))
            scored.append(counts.sum(1))
        wrong, scored = torch.cat(wrong).float(), torch.cat(scored).float()                              # (n,) each
        errors.append(wrong.sum() / scored.sum().clamp_min(1))
        ses.append((wrong - errors[-1] * scored).square().sum().sqrt() / scored.sum().clamp_min(1))
    errors, ses = torch.stack(errors), torch.stack(ses)
    return (errors, ses) if return_se else errors

@torch.no_grad()
def head_alignment(model, task, n=10, seed=20_000):
    """How far each head looks at find^j: <A, F_j> / (|A| |F_j|), a list by layer of (H, max_hops) (Sec. 5.2).

    A is the head's attention matrix and row i of F_j has its one at find^j(i); mean over n sequences with k = max_hops.
    """
    tokens, _ = task.sample(n, torch.Generator(task.device).manual_seed(seed), hops=task.max_hops)
    attns = model(tokens, return_attn=True)[1]                                   # (n, H, N, N) each
    chars, N = tokens[:, 1:], tokens.shape[1]
    F_j = []
    for j in range(1, task.max_hops + 1):
        positions = find(chars, j) + 1                                           # among tokens; 0 where undefined
        F_j.append(F.pad(F.one_hot(positions, N).float() * (positions > 0)[:, :, None], (0, 0, 1, 0)))
    F_j = torch.stack(F_j, 1).flatten(2)                                         # (n, J, N N)
    F_j = F_j / F_j.norm(dim=2, keepdim=True).clamp_min(1e-9)
    return [(F.normalize(attn.float().flatten(2), dim=2) @ F_j.mT).mean(0).cpu() for attn in attns]

# ---- The other half of the title: massively parallel computation (Fig. 1, Sec. 2) -----------------------------------
class Cluster:
    """q machines of s words of memory each. In a round, each computes on its own words, sends and receives s at most."""

    def __init__(self, q, s):
        self.q, self.s, self.rounds, self.memory, self.load = q, s, 0, 0, 0
        self.words = [{} for _ in range(q)]                                      # what each machine holds: name -> list

    def exchange(self, messages):
        """One round: messages (sender, receiver, tuple of words) -> for each machine the tuples that it received.
        RuntimeError where a machine sends, receives or holds more than s words."""
        sent, received, inbox = [0] * self.q, [0] * self.q, [[] for _ in range(self.q)]
        for sender, receiver, words in messages:
            sent[sender] += len(words)
            received[receiver] += len(words)
            inbox[receiver].append(words)
        self.rounds += 1
        for machine in range(self.q):
            held = sum(map(len, self.words[machine].values())) + received[machine]
            for what, count in ("sends", sent[machine]), ("receives", received[machine]), ("holds", held):
                if count > self.s:
                    raise RuntimeError(f"round {self.rounds}: machine {machine} {what} {count} words, {self.s} at most")
            self.memory, self.load = max(self.memory, held), max(self.load, sent[machine], received[machine])
        return inbox

def mpc_hops(X, k, q, s, n_chars=4):
    """hop_k by q machines of s words: a list of characters -> (the list of hop_k, -1 where undefined; the Cluster).
    ValueError where a machine could hold the whole input: then one computes everything, in two rounds.

    Machine i // m holds position i: its character, and two pointers. Four rounds of counting sort find find^1. Then two
    rounds (ask, answer) for each bit of k move the pointer r along f where the bit is one, and square f; two fetch X.
    """
    if s >= len(X):
        raise ValueError(f"a machine of {s} words could hold the whole input of {len(X)}")
    m, cluster = math.ceil(len(X) / q), Cluster(q, s)
    machines, words = range(q), cluster.words
    for a in machines:
        mine = range(len(X))[a * m:(a + 1) * m]
        words[a].update(X=[X[i] for i in mine], f=[-1 for _ in mine], r=list(mine))

    # 1: all tell all how often each character occurs in their block, which gives each item its place in sorted order
    inbox = cluster.exchange([(a, b, (a, *map(words[a]["X"].count, range(n_chars)))) for a in machines for b in machines])
    items = []
    for a in machines:                                                           # 2: each item goes to its place
        counts = [count for _, *count in sorted(inbox[a])]
        place = [sum(sum(count[:c]) for count in counts) + sum(count[c] for count in counts[:a]) for c in range(n_chars)]
        for i, c in enumerate(words[a]["X"]):
            items.append((a, place[c] // m, (place[c], c, a * m + i)))
            place[c] += 1
    for a, received in enumerate(cluster.exchange(items)):
        words[a]["c"], words[a]["i"] = map(list, zip(*[item[1:] for item in sorted(received)])) if received else ([], [])
    # 3: a block's last item goes to the next block; 4: of neighbours with one character, the later learns the earlier
    last = [(a, a + 1, (words[a]["c"][-1], words[a]["i"][-1])) for a in machines[:-1] if words[a]["c"]]
    ahead = cluster.exchange(last)
    found = []
    for a in machines:
        row = ahead[a] + list(zip(words[a].pop("c"), words[a].pop("i")))
        found += [(a, i // m, (i, j + 1)) for (c, j), (d, i) in zip(row, row[1:]) if c == d]
    for a, received in enumerate(cluster.exchange(found)):
        for i, after in received:
            words[a]["f"][i - a * m] = after

    def ask(*questions):
        """(name of the pointers, name of the array): that array's words at all pointers. Two rounds."""
        calls = [(a, p // m, (n, p, a * m + i)) for n, (pointer, _) in enumerate(questions) for a in machines
                 for i, p in enumerate(words[a][pointer]) if p >= 0]
        answers = [(b, i // m, (n, i, words[b][questions[n][1]][p - b * m]))
                   for b, received in enumerate(cluster.exchange(calls)) for n, p, i in received]
        result = [[[-1] * len(words[a]["X"]) for a in machines] for _ in questions]
        for a, received in enumerate(cluster.exchange(answers)):
            for n, i, word in received:
                result[n][a][i - a * m] = word
        return result

    while k:
        r, f = ask(("r", "f"), ("f", "f"))
        for a in machines:
            words[a].update(r=r[a] if k & 1 else words[a]["r"], f=f[a])
        k >>= 1
    hop, = ask(("r", "X"))
    return [x for part in hop for x in part], cluster

# ---- The command, its tables and its figure -------------------------------------------------------------------------
PRESETS = {
    "quick": dict(arch=["transformer"], n_layer=[2, 3, 4], n_head=[4], n_embd=64, dropout=0.0,
                  seq_len=24, n_chars=4, max_hops=4, n_train=[0],
                  batch_size=32, steps=2_800, warmup=100, lr=5e-3, weight_decay=0.01, eval_every=250),
    "paper": dict(arch=["transformer"], n_layer=[2, 3, 4, 5, 6], n_head=[4], n_embd=128, dropout=0.1,
                  seq_len=100, n_chars=4, max_hops=16, n_train=[0],
                  batch_size=32, steps=100_000, warmup=1_000, lr=1e-4, weight_decay=0.01, eval_every=2_000),
}
SWEEP = ["arch", "n_layer", "n_head", "n_train", "seed"]
# What makes a run the paper's, but for the size of the model and of the training set, which index PUBLISHED
PAPER = ["arch", "dropout", "seq_len", "n_chars", "max_hops", "batch_size", "steps", "warmup", "lr", "weight_decay"]
# The authors' checkpoints at 100,000 steps, errors at k = 1, 2, 3, 4, 6, 8, 12, 16, by (layers, heads, d, n_train):
# as they released them, measured with the dropout of training still on; and without it, which is what ours compares
# with (measured by us on 600 sequences a k, for the checkpoints that we had). Six layers of d = 128 trained on a
# schedule of 200,000 steps, so that at 100,000 their learning rate was still at half its peak.
SHOWN = [1, 2, 3, 4, 6, 8, 12, 16]
PUBLISHED = {
    (2, 4, 128, 0): {"on": [.010, .140, .346, .423, .588, .658, .720, .737],
                     "off": [.000, .045, .257, .350, .521, .621, .712, .737]},
    (3, 4, 128, 0): {"on": [.003, .008, .048, .150, .359, .456, .644, .706],
                     "off": [.000, .000, .002, .046, .238, .384, .581, .695]},
    (4, 4, 128, 0): {"on": [.001, .003, .005, .015, .062, .216, .467, .612],
                     "off": [.000, .000, .000, .000, .001, .068, .337, .542]},
    (5, 4, 128, 0): {"on": [.001, .001, .001, .003, .015, .037, .218, .414],
                     "off": [.000, .000, .000, .000, .000, .000, .041, .281]},
    (6, 4, 128, 0): {"on": [.000, .000, .001, .002, .003, .006, .012, .062]},
    (4, 8, 256, 0): {"on": [.000, .000, .000, .001, .004, .015, .139, .334]},
    (5, 8, 256, 0): {"on": [.000, .000, .000, .000, .000, .000, .003, .027]},
    (6, 8, 256, 0): {"on": [.000, .000, .000, .000, .000, .000, .002, .002]},
    (2, 4, 128, 1000): {"off": [.053, .463, .563, .648, .730, .749, .766, .775]},
    (3, 4, 128, 1000): {"off": [.065, .444, .572, .651, .732, .747, .763, .775]},
    (4, 4, 128, 1000): {"on": [.015, .052, .410, .550, .723, .734, .753, .772],
                        "off": [.001, .003, .335, .503, .701, .738, .757, .774]},
    (5, 4, 128, 1000): {"off": [.000, .002, .155, .483, .684, .734, .756, .771]},
    (3, 4, 128, 3000): {"off": [.000, .001, .099, .186, .385, .522, .687, .750]},
    (4, 4, 128, 3000): {"on": [.002, .004, .012, .026, .094, .254, .506, .632],
                        "off": [.000, .000, .000, .001, .008, .109, .395, .592]},
    (5, 4, 128, 3000): {"off": [.000, .000, .000, .000, .000, .002, .106, .331]},
}

def published(args):
    """Rows of errors at SHOWN that the paper has for this run, by their label; none where the setting is not the paper's."""
    paper = {**PRESETS["paper"], "arch": "transformer"}
    if any(getattr(args, key) != paper[key] for key in PAPER):
        return {}
    errors = PUBLISHED.get((args.n_layer, args.n_head, args.n_embd, args.n_train), {})
    return {f"paper, dropout {state}": row for state, row in errors.items()}

def parse_args(argv=None):
    """The command line. What cannot be run ends here, before anything is written."""
    parser = argparse.ArgumentParser(
        description="Transformers, Parallel Computation, and Logarithmic Depth, Sanford et al., ICML 2024",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, count = parser.add_argument, common.positive_int
    add("--arch", nargs="+", choices=["transformer", "lstm"], help="lstm: two layers, as many parameters")
    add("--n-layer", nargs="+", type=count, help="layers")
    add("--n-head", nargs="+", type=count, help="heads a layer")
    add("--n-embd", type=count, help="width d")
    add("--dropout", type=float, help="dropout in training; in the paper, GPT-2's default of 0.1")
    add("--seq-len", type=count,
        help="positions N as the paper counts: k, then N - 2 characters are fed; with --mpc: N characters, 1000")
    add("--n-chars", type=count, help="characters of the alphabet")
    add("--max-hops", type=count, help="largest number of hops")
    add("--n-train", nargs="+", type=int, help="training sequences; 0: a fresh batch at every step")
    add("--batch-size", type=count, help="sequences a step")
    add("--steps", type=count, help="training steps")
    add("--warmup", type=count, help="steps of linear warm-up; then the learning rate falls linearly to 0")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--weight-decay", type=float, help="weight decay of AdamW")
    add("--n-eval", type=count, default=1_000, help="sequences for each k in the final errors")
    add("--seed", nargs="+", type=int, default=[0], help="seeds of weights and data")
    add("--construct", action="store_true", help="Theorem 4.2: build the transformer by hand, measure its errors and heads")
    add("--mpc", action="store_true", help="Fig. 1: run the protocol for parallel machines, count rounds and words")
    add("--machines", type=count, default=32, help="machines q, with --mpc")
    add("--words", type=count, default=320, help="words s that a machine may hold, send or receive, with --mpc")
    own = {}
    if {"--construct", "--mpc"} & set(argv or sys.argv):
        own = dict(seq_len=1000 if "--mpc" in (argv or sys.argv) else 100, max_hops=16)
    args = common.parse_args(parser, {name: {**preset, **own} for name, preset in PRESETS.items()}, argv)
    for n_head in args.n_head:
        if args.n_embd % n_head:
            parser.error(f"--n-embd {args.n_embd} is not divisible by --n-head {n_head}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout} is not in [0, 1)")
    if min(args.n_train) < 0:
        parser.error(f"--n-train {min(args.n_train)}: give 0 for fresh batches, or a number of sequences")
    if args.plot and (args.construct or args.mpc or "lstm" in args.arch):
        parser.error("--plot draws trained transformers: leave out --construct, --mpc and --arch lstm")
    if args.mpc and args.words >= args.seq_len:
        parser.error(f"--words {args.words}: a machine could hold the whole input, --seq-len {args.seq_len}, "
                     "and two rounds would be enough for anything")
    try:
        HopTask(args.seq_len, args.n_chars, args.max_hops)
    except ValueError as error:
        parser.error(str(error))
    return args

def print_errors(runs, results):
    """Fig. 2: a row a setting, error by number of hops with its standard error, or median and range over seeds."""
    settings = {}
    for run, result in zip(runs, results):
        settings.setdefault(tuple(vars(run.args)[key] for key in SWEEP[:-1]), []).append((run.args, result))
    max_hops = runs[0].args.max_hops
    hops = SHOWN if max_hops == 16 else range(1, max_hops + 1)
    rows, compared = [], False
    for (arch, n_layer, n_head, n_train), group in settings.items():
        results = [result for _, result in group]
        cells = [f"{results[0]['errors'][k]:.3f}±{results[0]['se'][k]:.3f}" if len(results) == 1 else
                 common.spread([result["errors"][k] for result in results]) for k in hops]
        solved = [max([0, *(k for k in range(max_hops + 1) if max(result["errors"][:k + 1]) < 0.05)]) for result in results]
        shape = [str(n_layer), str(n_head)] if arch == "transformer" else ["2", "-"]
        rows.append([arch, *shape, str(n_train or "fresh"), str(results[0]["n_params"]), *cells,
                     common.spread(solved, ".0f")])
        for label, errors in published(group[0][0]).items():
            rows.append([label, "", "", "", "", *(f"{error:.3f}" for error in errors), ""])
            compared = True
    print(f"\nError by number of hops k, on {runs[0].args.n_eval} sequences each (± standard error, or [range] over seeds);")
    print("solved: the largest k up to which all errors are below 5%. Theorem 4.2: depth floor(log2 k) + 2 is enough.")
    if compared:
        print("paper: the authors' checkpoints; dropout on: as released, measured as in training; off: what ours compares with")
    common.print_table(["arch", "layers", "heads", "samples", "params", *(f"k={k}" for k in hops), "solved"], rows)

def print_heads(alignment, built):
    """Figs. 3 and 4 as numbers: what each trained head looks at, beside the heads of the construction."""
    print("\nHeads: the find^j that a head looks at most, and its normalised inner product with it (undefined hops count")
    print("against it; the construction's first layer looks for the same character and for k)")
    def row(side, layer):
        best = [max((product, j) for j, product in enumerate(head, 1)) for head in side[layer]] if layer < len(side) else []
        return "   ".join(f"find^{j} {product:.2f}" for product, j in best)
    rows = [[str(layer + 1), row(alignment, layer), row(built, layer)] for layer in range(max(len(alignment), len(built)))]
    common.print_table(["layer", "trained, by head", "by construction"], rows)

def show_construction(args):
    """--construct: depth, size, errors by number of hops and heads of the hand-built transformer."""
    task = HopTask(args.seq_len, args.n_chars, args.max_hops, args.device)
    model = construct(args.max_hops, args.n_chars, args.seq_len).to(args.device)
    weights = sum(p.numel() for p in model.parameters()), sum(int((p != 0).sum()) for p in model.parameters())
    print(f"depth {model.n_layer} = floor(log2 {args.max_hops}) + 2, width {model.n_embd}, "
          f"{weights[0]:,} parameters of which {weights[1]:,} are not zero; N = {args.seq_len}")
    print("The theorem's depth; its one head and its width that does not grow with N are not met: layer 1 has two heads.")
    data, rows = torch.Generator(args.device).manual_seed(args.seed[0]), []
    for k in range(args.max_hops + 1):
        wrong = undefined = total = 0
        for _ in range(math.ceil(args.n_eval / 50)):
            tokens, targets = task.sample(50, data, hops=k)
            wrong += int((model(tokens).argmax(-1) != targets).sum())
            undefined += int((targets == task.undefined).sum())
            total += targets.numel()
        rows.append([str(k), str(wrong), str(total), f"{undefined / total:.2f}"])
    common.print_table(["k", "errors", "of positions", "share undefined"], rows)
    print_heads([], [layer.tolist() for layer in head_alignment(model, task)])

def show_mpc(args):
    """--mpc: rounds, machines and loads by number of hops, beside the transformer's depth; checked against find."""
    task = HopTask(args.seq_len + 2, args.n_chars, args.max_hops)                # of N + 2 positions, N characters
    tokens, _ = task.sample(1, torch.Generator().manual_seed(args.seed[0]))
    chars = tokens[:, 1:] - task.char                                            # (1, N)
    X, rows, k = chars[0].tolist(), [], 1
    while k <= args.max_hops:
        try:
            hop, cluster = mpc_hops(X, k, args.machines, args.words, args.n_chars)
        except RuntimeError as error:
            common.fail(f"the protocol breaks the limits in {error}; give more --words")
        expected = [X[p] if p >= 0 else -1 for p in find(chars, k)[0].tolist()]
        rows.append([str(k), str(cluster.rounds), str(cluster.q), str(cluster.s), str(cluster.memory), str(cluster.load),
                     str(int(math.log2(k)) + 2), "yes" if hop == expected else "NO"])
        k *= 2
    print(f"hop_k of {len(X)} characters by {args.machines} machines of {args.words} words")
    common.print_table(["k", "rounds", "machines", "words", "largest memory", "largest load", "transformer depth",
                        "agrees with find"], rows)

def plot(runs, results, folder):
    """Fig. 2: error against hops by depth. Figs. 3, 4: heads against find^j, and the deepest run's attention maps."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(6, 4))
    for run, result in zip(runs, results):
        axis.semilogy(range(run.args.max_hops + 1), [max(error, 1e-4) for error in result["errors"]], marker="o",
                      label=run.name.split(",", 1)[1])
    axis.set(xlabel="hops k", ylabel="error (1e-4 or less at the bottom)", title="Error by number of hops (Fig. 2)",
             xticks=range(runs[0].args.max_hops + 1))
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "errors.png", dpi=130)

    run, result = max(zip(runs, results), key=lambda pair: pair[0].args.n_layer)
    task, model = build(run.args)
    model.load_state_dict(torch.load(run.folder / "ckpt.pt", map_location=run.args.device, weights_only=True)["model"])
    model.eval()
    heads = torch.tensor(result["alignment"]).flatten(0, 1)                      # (L H, J)
    figure, axis = plt.subplots(figsize=(1.5 + 0.4 * heads.shape[1], 1.5 + 0.25 * len(heads)))
    image = axis.imshow(heads, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(heads.shape[1]), range(1, heads.shape[1] + 1))
    axis.set_yticks(range(len(heads)), [f"{i // run.args.n_head + 1}.{i % run.args.n_head + 1}" for i in range(len(heads))])
    axis.set(xlabel="j of find^j", ylabel="layer.head", title=f"{run.args.n_layer} layers")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(folder / "heads.png", dpi=130)

    tokens, _ = task.sample(1, torch.Generator(run.args.device).manual_seed(0), hops=task.max_hops)
    with torch.no_grad():
        attns = model(tokens, return_attn=True)[1]
    figure, axes = plt.subplots(1, len(attns), figsize=(4.5 * len(attns), 4.8), squeeze=False)
    for layer, (axis, attn) in enumerate(zip(axes[0], attns)):
        head = heads.view(len(attns), -1, heads.shape[1])[layer].amax(1).argmax()
        j = heads.view(len(attns), -1, heads.shape[1])[layer, head].argmax() + 1
        axis.imshow(attn[0, head].float().cpu(), cmap="Blues")
        positions = find(tokens[:, 1:], int(j))[0].cpu()
        rows = (positions >= 0).nonzero()[:, 0]
        axis.plot(positions[rows] + 1, rows + 1, "r.", markersize=3)
        axis.set(title=f"layer {layer + 1}, head {head + 1}; red: find^{j}", xlabel="to", ylabel="from")
    figure.tight_layout()
    figure.savefig(folder / "attention.png", dpi=130)
    print(f"figures: errors.png, heads.png and attention.png in {folder}")

def main():
    """Trains what the flags ask for, prints the tables."""
    args = parse_args()
    if args.construct:
        return show_construction(args)
    if args.mpc:
        return show_mpc(args)
    runs = common.sweep(args, PRESETS, SWEEP)
    results = common.complete(runs, train)
    print_errors(runs, results)
    trained = [(run, result) for run, result in zip(runs, results) if run.args.arch == "transformer"]
    if trained:
        run, result = max(trained, key=lambda pair: pair[0].args.n_layer)
        print(f"\n{run.name}", end="")
        built = construct(args.max_hops, args.n_chars, args.seq_len)
        print_heads(result["alignment"], [layer.tolist() for layer in head_alignment(built, build(run.args)[0])])
    if args.plot:
        plot(runs, results, Path(args.out_dir) / "hop_induction")

if __name__ == "__main__":
    main()
