r"""
Algorithmic Capabilities of Random Transformers.
Zhong, Andreas. NeurIPS 2024, arXiv 2410.04368.

Freeze every attention and MLP weight of a transformer at its random initialisation and train only
the embeddings and the unembedding: it still learns modular addition, associative recall, decimal
addition, balancing parentheses and, in the paper, some language. The paper's explanation: the
abilities are there, and training picks the subspace that uses them. This requires a wide model.

The last lines of the output name what each model solves. A random transformer, of which only the
embeddings and the unembedding are trained, solves parentheses at width 128 but not at width 16;
full training solves them at both widths. The narrow random model learns only that an odd number of
brackets cannot be balanced, which gives an accuracy of 0.683. Larger batches, more steps and a
lower learning rate raise it to 0.84 (RESULTS.md).

    python random_transformer.py                             parentheses, widths 128 and 16
    python random_transformer.py --preset medium --plot      the threshold in width, four tasks
    python random_transformer.py --preset table1             Table 1; add --seed 0 1 2 3 4 5 6 7 8 9

    Table 2, which matrices have to be trained; Tables 4 and 5, the subspace (with the smaller
    presets only in results.json):
    python random_transformer.py --preset paper --n-embd 1024 \
        --train full embeddings token_unembed embed unembed
    Table 3, bits per parameter (the authors' script used --lr 5e-3); Table 6, parameter counts:
    python random_transformer.py --preset paper --task memorize --n-embd 128
    python random_transformer.py --preset params
    Table 9, linear attention; the threshold in width at the paper's size:
    python random_transformer.py --preset paper --model linear --n-embd 1024
    python random_transformer.py --preset paper --train embeddings --n-embd 16 64 256 1024 --plot
    Fig. 2, the attention of associative recall; Fig. 3, the circle of modular addition:
    python random_transformer.py --preset paper --task needle --n-embd 1024 --plot
    python random_transformer.py --preset paper --task modadd --n-embd 1024 --plot
    Fig. 4, a language model of TinyStories (downloaded, or --text FILE) and a text that it writes;
    the loss is that of a word, in the paper that of a BPE token:
    python random_transformer.py --preset paper --task lm --n-embd 16 32 64 128 256 512 --plot
    Fig. 6, imitation of random transformers of many widths:
    python random_transformer.py --preset paper --task imitate --n-embd 512 --plot

To reuse a task, copy Task and the task's base class (HashedTask or Lookup); LM also needs words_of,
tinystories and TINYSTORIES, Imitate needs Transformer. To reuse Transformer, copy init_, Block and
SumOfValues as well, and CausalSelfAttention, MLP and gpt2_init_ from common.
"""
import functools
import math
import re
import textwrap
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- The tasks of Tables 1 and 3 (App. D.1) -----------------------------------------------------

class Task:
    """A distribution of sequences. Only some of their tokens, the answers, have to be predicted.

    A task defines
        sizes         the allowed values of `size`; ValueError for others
        vocab_size
        block_size    the model reads the first T - 1 tokens, at most block_size
        sample(batch, generator) -> tokens (B, T), scored (B, T) bool, true if a token is an answer
        test_set      a pair tokens, scored that is always the same
        trivial       in words, a guess that does not need the ability, or None
        chance        the accuracy of that guess
    """
    trivial = None
    metric, ylabel = "accuracy", "test accuracy"             # or "loss", in nats

    def __init__(self, size=30, device="cpu"):
        if size not in self.sizes:
            raise ValueError(f"{type(self).__name__.lower()}: {size} is not in {self.sizes}")
        self.size = size
        self.device = device

    @functools.cached_property
    def n_answers(self):
        """The largest number of answers in a sequence, found in the test set."""
        return self.test_set[1].sum(1).max().item()

    def rand(self, generator, *shape):
        """Uniform numbers between 0 and 1."""
        return torch.rand(shape, generator=generator, device=self.device)

    def randint(self, generator, low, high, *shape):
        """Uniform integers from low to high - 1."""
        return torch.randint(low, high, shape, generator=generator, device=self.device)

    def held_out(self, tokens):
        """Which sequences of tokens (B, T) are only for the test: (B,) bool. Here none."""
        return tokens.new_zeros(len(tokens), dtype=torch.bool)

    def losses(self, logits, targets, tokens):
        """The loss of each of Q answers in nats, (B, Q): cross-entropy.

        logits (B, Q, V); targets (B, Q), -100 (no answer) is ignored: loss 0; tokens (B, T).
        """
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets)

    def scored_from(self, tokens, first):
        """Returns tokens, scored (B, T): all tokens from position `first` on are answers."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens, (position >= first).expand_as(tokens)

class HashedTask(Task):
    """A task that holds out a twentieth of all sequences, chosen by a hash of their tokens.

    There are few short sequences, and each is drawn often. If the test set were only drawn with
    another seed, training would have seen all its short sequences; if training left these out, it
    would see none. The hash holds out a twentieth of the short ones as of the long ones.
    """
    PRIME = 1_000_003

    @functools.cached_property
    def hash_weights(self):
        """A random number for each position."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.PRIME, (1_000,), generator=generator).to(self.device)

    def held_out(self, tokens):
        """Which sequences of tokens (B, T) are only for the test, in every run: (B,) bool."""
        weights = self.hash_weights[:tokens.shape[1]]
        return (tokens * weights).sum(1) % self.PRIME % 20 == 0

    @functools.cached_property
    def test_set(self):
        """The first 4,000 sequences drawn that are held out. RunError if none is."""
        generator = torch.Generator(self.device).manual_seed(10**9)
        tokens, scored = self.sample(0, generator)           # (N, T) each; N grows from 0
        while len(tokens) < 4_000:
            new_tokens, new_scored = self.sample(20_000, generator)
            held_out = self.held_out(new_tokens)
            if not held_out.any():
                raise common.RunError("no sequence is held out: too few are different")
            tokens = torch.cat([tokens, new_tokens[held_out]])
            scored = torch.cat([scored, new_scored[held_out]])
        return tokens[:4_000], scored[:4_000]

class Lookup(Task):
    """Sequences x, y, z with the answer z: one for each x and y in 0 .. size - 1.

    A subclass defines train_rows (n, 3) and columns(x, y, generator) -> x, y, z, (size^2,) each.
    """
    sizes = range(5, 2_000)
    block_size = 5                                           # the paper's: more than is used
    trivial = "any number"

    def __init__(self, size, device):
        super().__init__(size, device)
        generator = torch.Generator().manual_seed(0)
        # all pairs; with size 2, x is 0 0 1 1 and y is 0 1 0 1
        x, y = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
        self.table = torch.stack(self.columns(x, y, generator), dim=1).to(device)
        self.shuffled = self.table[torch.randperm(size**2, generator=generator)]     # (size^2, 3)

    @property
    def chance(self):
        """The accuracy of always guessing the same number."""
        return 1 / self.size

    def sample(self, batch, generator):
        rows = self.randint(generator, 0, len(self.train_rows), batch)
        return self.scored_from(self.train_rows[rows], 2)

class Modadd(Lookup):
    """a, b, (a + b) mod p. A fixed 5% of all p^2 pairs are held out for the test."""

    def __init__(self, size=199, device="cpu"):
        super().__init__(size, device)
        self.vocab_size = size
        test_rows, self.train_rows = self.shuffled.tensor_split([size**2 // 20])
        self.test_set = self.scored_from(test_rows, 2)

    def columns(self, a, b, generator):
        return a, b, (a + b) % self.size

class Memorize(Lookup):
    """x, y, z: a fixed random z for each pair. The token of y is size + y.

    The test set is the training set, shuffled so that its first rows have all values of x.
    """

    def __init__(self, size=512, device="cpu"):
        super().__init__(size, device)
        self.vocab_size = 2 * size
        self.train_rows = self.table
        self.test_set = self.scored_from(self.shuffled, 2)

    def columns(self, x, y, generator):
        return x, self.size + y, torch.randint(self.size, x.shape, generator=generator)

class Needle(HashedTask):
    """Associative recall: k ~ U[1, size] pairs of marker and value, then a query and its value.

        156 119   147 97   177   97   0 0        k = 2; 177 asks for the value of 177 - 30 = 147

    Markers are distinct, 128..157; values 1..127; 0 pads. For a size of 4 the released code draws
    the markers from only 4 ids, this one from all 30.
    """
    sizes = range(1, 31)
    vocab_size = 256
    block_size = 100                                         # the paper's: more than is used
    trivial = "the prompt's most frequent value"             # where training has its plateau

    def sample(self, batch, generator):
        n = self.size
        k = self.randint(generator, 1, n + 1, batch, 1)
        shuffled = 128 + self.rand(generator, batch, 30).argsort(1)          # (B, 30)
        markers = shuffled[:, :n]                            # (B, n), distinct
        values = self.randint(generator, 1, 128, batch, n)   # (B, n)
        asked = (self.rand(generator, batch, 1) * k).long()  # (B, 1): which of the k pairs
        pairs = torch.stack([markers, values], dim=2).flatten(1)             # (B, 2n)
        position = torch.arange(2 * n + 2, device=self.device)
        tokens = F.pad(pairs, (0, 2)) * (position < 2 * k)   # (B, 2n + 2): k pairs, zeros
        tokens.scatter_(1, 2 * k, markers.gather(1, asked) + 30)             # the query
        tokens.scatter_(1, 2 * k + 1, values.gather(1, asked))               # the answer
        return tokens, position == 2 * k + 1

    @functools.cached_property
    def chance(self):
        """The accuracy of guessing the prompt's most frequent value; of several, a random one."""
        tokens, scored = self.test_set                       # (N, T) each
        values = tokens.masked_fill(scored, 0)[:, 1::2]      # (N, size + 1), 0 for none
        counts = F.one_hot(values, 128).sum(1)               # (N, 128)
        counts[:, 0] = 0
        guesses = (counts == counts.amax(1, keepdim=True)).float()           # (N, 128)
        right = guesses.gather(1, tokens[scored][:, None])[:, 0]             # (N,)
        return (right / guesses.sum(1)).mean().item()

class Addition(HashedTask):
    """a + b = sum, stop: a and b uniform over the numbers of `size` digits, lowest digit first.

        2 1 + 3 9 =   25 20 21 stop              size 2: 12 + 93 = 105

    Digits 0-9, + 10, = 11, pad 12; the answers: digits of the sum 20-29, stop 30. This follows the
    paper's text. Its released code scores eleven positions, from the second digit on, which is
    easier: the best guess from the position and the previous token has 0.212 here, 0.250 there.
    """
    sizes = range(1, 18)
    vocab_size = 31
    trivial = "one answer at each position"

    def __init__(self, size=10, device="cpu"):
        super().__init__(size, device)
        self.block_size = 3 * self.size + 10
        self.powers = 10 ** torch.arange(self.size, device=device)

    def sample(self, batch, generator):
        n = self.size
        digits = self.randint(generator, 0, 10, 2, batch, n) # (2, B, n): of a and b, lowest first
        digits[..., -1] = self.randint(generator, 1, 10, 2, batch)           # no leading zeros
        total = (digits * self.powers).sum((0, 2))[:, None]  # (B, 1): a + b
        has_carry = total >= 10 * self.powers[-1]            # (B, 1): the sum has n + 1 digits
        parts = [
            digits[0], torch.full_like(total, 10),           # a +
            digits[1], torch.full_like(total, 11),           # b =
            20 + total // self.powers % 10,                  # (B, n): the sum's n lowest digits
            torch.where(has_carry, 21, 30),                  # the carry, or the stop
            torch.where(has_carry, 30, 12),                  # the stop, or a pad
        ]
        tokens, scored = self.scored_from(torch.cat(parts, dim=1), 2 * n + 2)
        return tokens, scored & (tokens != 12)

    @functools.cached_property
    def chance(self):
        """The accuracy of guessing the most frequent answer of each position."""
        tokens, scored = self.test_set                       # (N, T) each
        counts = F.one_hot(tokens * scored, 31).sum(0)[:, 20:]               # (T, 11)
        return (counts.amax(1).sum() / scored.sum()).item()

class Parens(HashedTask):
    """At most 2 * size brackets, "(" 1 and ")" 2, then "?" 3 and a label: 2 for balanced, else 1.

        1 1 2 2   3   2   0 0                    (()) is balanced; 0 pads

    A third of the strings are uniformly random, the rest random balanced ones. Half of the balanced
    ones stay as they are; to all others, swaps are applied with probability 1/2, and flips with
    probability 1/2. Strings of up to 8 brackets are never held out: they are too few to learn
    one from the others. (In the released code they are in both the training and the test set.)
    """
    sizes = range(5, 40)
    vocab_size = 4
    block_size = 80                                          # the paper's: more than is used
    trivial = "even lengths are balanced"

    def held_out(self, tokens):
        has_nine_brackets = (tokens[:, :9] != 3).all(1)      # no "?" among the first nine
        return super().held_out(tokens) & has_nine_brackets

    @functools.cached_property
    def chance(self):
        """The accuracy of guessing "balanced" if and only if the length is even."""
        tokens, scored = self.test_set                       # (N, T) each
        length = (tokens == 3).int().argmax(1)               # (N,)
        return (tokens[scored] == 2 - length % 2).float().mean().item()

    def balanced(self, pairs, generator):
        """Random balanced strings g(pairs): pairs (B,) -> is_close (B, 2 * size), true at each ")".

        g(1) = "()", and g(t) is "(" g(t-1) ")" or g(u) g(t-u) with u ~ U[1, t-1], each with
        probability 1/2. If a part g(t) starts at a position, `t` holds its t there, else 0. A round
        replaces all parts of all strings by what they consist of. For instance

            g(3)           t 3 . . . . .        splits with u = 1, into g(1) and g(2)
            g(1)  g(2)     t 1 . 2 . . .        g(1) closes at 1; g(2) wraps g(1) and closes at 5
            ( ) ( g(1) )   t . . . 1 . .        g(1) closes at 4
            ( ) ( ( )  )   t . . . . . .        is_close at 1, 4 and 5
        """
        B = len(pairs)
        N = 2 * self.size + 2
        unused = N - 1                                       # a position that is cut off at the end
        start = torch.arange(N, device=self.device).expand(B, N)             # each position
        is_close = torch.zeros(B, N, dtype=torch.bool, device=self.device)
        t = torch.zeros_like(start)
        t[:, 0] = pairs
        for _ in range(self.size):                           # g(t) is done in t rounds
            coin, uniform = self.rand(generator, 2, B, N)
            wraps = (t == 1) | ((t > 1) & (coin < 0.5))      # "(" g(t-1) ")"
            splits = (t > 0) & ~wraps                        # g(u) g(t-u)
            close = torch.where(wraps, start + 2 * t - 1, unused)
            is_close.scatter_(1, close, True)
            inner = torch.where(wraps, t - 1, 0)             # g(t-1) starts one further right
            u = torch.where(splits, 1 + (uniform * (t - 1)).long(), 0)       # g(u) starts here
            rest = torch.where(splits, t - u, 0)             # g(t-u) starts 2u further right
            rest_start = torch.where(splits, start + 2 * u, unused)
            t = u + F.pad(inner, (1, -1))                    # inner, moved by one
            t = t.scatter_add(1, rest_start, rest)
        return is_close[:, :N - 2]

    def geometric(self, batch, generator):
        """1, 2, .., 21 with probabilities 1/2, 1/4, ..: (batch, 1)."""
        uniform = self.rand(generator, batch, 1)             # above 1/2 gives 1, above 1/4 gives 2
        return 1 - uniform.clamp_min(2**-20).log2().ceil().long()

    def swap(self, is_close, length, generator):
        """Draws a geometric number of pairs of positions (i, j), and swaps each that has i < j.

        is_close (B, N), length (B, 1) -> is_close (B, N).
        """
        B = len(is_close)
        n_tries = self.geometric(B, generator)               # (B, 1)
        for n in range(21):
            uniform = self.rand(generator, B, 2)
            pair = (uniform * length).long()                 # (B, 2): i, j
            swapped = is_close.scatter(1, pair, is_close.gather(1, pair.flip(1)))
            from_left = pair[:, :1] < pair[:, 1:]            # (B, 1): i < j
            is_close = torch.where((n < n_tries) & from_left, swapped, is_close)
        return is_close

    def flip(self, is_close, length, generator):
        """Flips a geometric number of positions or, with probability 2/3, twice as many."""
        B = len(is_close)
        twice = self.rand(generator, B, 1) < 2 / 3
        n_flips = self.geometric(B, generator) * (1 + twice.long())          # (B, 1), at most 42
        position = (self.rand(generator, B, 42) * length).long()             # (B, 42)
        counts = (torch.arange(42, device=self.device) < n_flips).long()     # 1 .. 1 0 .. 0
        times = torch.zeros_like(is_close, dtype=torch.long).scatter_add(1, position, counts)
        return is_close ^ (times % 2 == 1)                   # two flips cancel

    def sample(self, batch, generator):
        N = 2 * self.size

        def coin(probability):
            return self.rand(generator, batch, 1) < probability              # (B, 1)

        pairs = self.randint(generator, 1, self.size + 1, batch)
        is_random = coin(1 / 3)
        random_length = self.randint(generator, 1, N + 1, batch, 1)
        length = torch.where(is_random, random_length, 2 * pairs[:, None])   # (B, 1)
        random_string = self.rand(generator, batch, N) < 0.5 # (B, N), true: ")"
        is_close = torch.where(is_random, random_string, self.balanced(pairs, generator))
        mutates = is_random | coin(0.5)
        swaps = mutates & coin(0.5)
        is_close = torch.where(swaps, self.swap(is_close, length, generator), is_close)
        flips = mutates & coin(0.5)
        is_close = torch.where(flips, self.flip(is_close, length, generator), is_close)
        # balanced: no prefix has more ")" than "(", and the string has as many of both
        position = torch.arange(N + 2, device=self.device)
        inside = position[:N] < length                       # (B, N)
        depth = torch.where(inside, 1 - 2 * is_close.long(), 0).cumsum(1)
        is_balanced = (depth.amin(1) >= 0) & (depth[:, -1] == 0)
        label = 1 + is_balanced.long()[:, None]              # (B, 1)
        brackets = torch.where(inside, 1 + is_close.long(), 0)
        tokens = F.pad(brackets, (0, 2))                     # (B, N + 2)
        tokens.scatter_(1, length, 3)                        # "?"
        tokens.scatter_(1, length + 1, label)
        return tokens, position == length + 1

# LM and Imitate (Figs. 4 and 6), and the list TASKS, come after the measurements.

# ---- The model ----------------------------------------------------------------------------------

class SumOfValues(common.CausalSelfAttention):
    """Linear attention: the sum of the values so far, our reading of App. E."""

    def __init__(self, n_embd, dropout=0.0):
        super().__init__(n_embd, 1, dropout)                 # for c_proj and dropout
        self.c_attn = nn.Linear(n_embd, n_embd)              # only values

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C)."""
        y = self.c_proj(self.c_attn(x).cumsum(1))
        return F.dropout(y, self.dropout, self.training)

class Block(nn.Module):
    """A pre-norm GPT-2 block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, n_embd, n_head, linear=False, dropout=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        if linear:
            self.attn = SumOfValues(n_embd, dropout)
        else:
            self.attn = common.CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = common.MLP(n_embd, dropout)

    def forward(self, x, at=None):
        """x (B, T, C) -> x (B, T, C), or (B, Q, C), only at the positions `at` (B, Q).

        `at` is for the last block, whose MLP is only needed where an answer is predicted.
        """
        x = x + self.attn(self.ln_1(x))
        if at is not None:
            x = x.take_along_dim(at[..., None], dim=1)       # (B, Q, C)
        return x + self.mlp(self.ln_2(x))

@torch.no_grad()
def init_(model, init):
    """Random weights of a Transformer, in place; biases are zero. Standard deviations:

    gpt2: 0.02, and 0.02 / sqrt(2 n_layer) of each c_proj, which writes to the residual stream.
    paper: 0.02, and 0.01 in the MLP; the paper's text, as an unpublished replication reads it.
    """
    common.gpt2_init_(model, len(model.h))
    if init == "paper":
        for block in model.h:
            block.attn.c_proj.weight.normal_(std=0.02)
            block.mlp.c_fc.weight.normal_(std=0.01)
            block.mlp.c_proj.weight.normal_(std=0.01)

class Transformer(nn.Module):
    """GPT-2, but embedding and unembedding share no weights.

    Parameters a layer: 12 d^2 + 13 d; with linear attention 10 d^2 + 11 d.
    """

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, linear=False, dropout=0.0,
            init="gpt2"):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.dropout = dropout
        self.h = nn.ModuleList(Block(n_embd, n_head, linear, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        init_(self, init)

    def forward(self, tokens, at=None):
        """tokens (B, T) -> logits (B, T, V), or (B, Q, V), only at the positions `at` (B, Q)."""
        return self.lm_head(self.ln_f(self.hidden_states(tokens, at)[-1]))

    def hidden_states(self, tokens, at=None):
        """tokens (B, T) -> n_layer + 1 states (B, T, C), after the embedding and after each layer.

        With `at` (B, Q) the last state is (B, Q, C), only at these positions.
        """
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        states = [F.dropout(x, self.dropout, self.training)]
        for block in self.h[:-1]:
            states.append(block(states[-1]))
        return [*states, self.h[-1](states[-1], at)]

    def attention(self, tokens):
        """tokens (B, T) -> each layer's attention weights (B, H, T, T), of softmax attention."""
        states = self.hidden_states(tokens)
        return [block.attn(block.ln_1(x), return_attn=True)[1] for block, x in zip(self.h, states)]

class Recurrent(nn.Module):
    """An embedding, two recurrent layers (nn.LSTM or nn.RNN), and an unembedding with a bias."""

    def __init__(self, vocab_size, kind, n_embd, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.rnn = kind(n_embd, n_embd, num_layers=2, batch_first=True, dropout=dropout)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens, at=None):
        """tokens (B, T) -> logits (B, T, V), or (B, Q, V), only at the positions `at` (B, Q)."""
        x, _ = self.rnn(self.wte(tokens))                    # (B, T, C)
        if at is not None:
            x = x.take_along_dim(at[..., None], dim=1)       # (B, Q, C)
        return self.lm_head(x)

RECURRENT = {"lstm": nn.LSTM, "rnn": nn.RNN}
MODELS = ["transformer", "linear", *RECURRENT]

# The modules that are trained (Table 2). A recurrent network has no wpe, a transformer no rnn
TRAINABLE = {
    "full": ["wte", "wpe", "h", "rnn", "ln_f", "lm_head"],
    "embeddings": ["wte", "wpe", "lm_head"],                 # the paper's random transformer
    "token_unembed": ["wte", "lm_head"],
    "embed": ["wte", "wpe"],
    "unembed": ["lm_head"],
}

def train_only(model, which):
    """Freezes all modules but those in TRAINABLE[which], and returns the trained parameters."""
    for name, part in model.named_children():
        part.requires_grad_(name in TRAINABLE[which])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

# ---- Settings -----------------------------------------------------------------------------------

FOUR = ["modadd", "needle", "addition", "parens"]
SMALL = ["quick", "medium"]                                  # presets of small tasks
PRESETS = {                                                  # what differs from the flags' defaults
    "quick": {},
    "medium": dict(task=FOUR, train=["embeddings"], n_embd=[16, 32, 64, 128, 256, 512],
        eval_every=500),
    "paper": dict(task=FOUR, n_embd=[1024, 16],
        target_width=[4, 8, 12, 16, 32, 64, 128, 256, 512],
        init="paper", warmup=500, eval_every=500),
}
PRESETS["table1"] = dict(PRESETS["paper"], model=["transformer", "lstm"])
PRESETS["params"] = PRESETS["paper"]                         # Table 6: counts, trains nothing

# Each task's values of the flags that are not given; the rows `small` are for quick and medium.
# The paper's steps are epochs: 5,000 of modadd, 21,000 of memorize (which the released code samples
# without replacement), 5 of lm. The layers, heads and dropout of lm are the released code's
COLUMNS = ["size", "steps", "batch_size", "lr", "n_layer", "n_head", "dropout", "weight_decay"]
SETTINGS = {
    ("modadd", "small"):   (    59,     600,   1500, 5e-3, 2, 4, 0.0, 1e-3),
    ("needle", "small"):   (     4,   6_000,    128, 1e-3, 2, 4, 0.0, 1e-3),
    ("addition", "small"): (     3,   2_000,    128, 5e-3, 2, 4, 0.0, 1e-3),
    ("parens", "small"):   (    10,   1_000,    128, 5e-3, 2, 4, 0.0, 1e-3),
    ("memorize", "small"): (    64,   2_000,    512, 5e-3, 2, 4, 0.0, 1e-3),
    ("imitate", "small"):  (  None,     500,     64, 5e-3, 3, 4, 0.0, 1e-3),
    ("lm", "small"):       ( 1_000,     200,      4, 5e-3, 4, 8, 0.1, 1e-3),
    ("modadd", "paper"):   (   199,  50_000,  4_000, 1e-3, 2, 4, 0.0, 1e-3),
    ("needle", "paper"):   (    30,  10_000,  1_000, 1e-3, 2, 4, 0.0, 1e-3),
    ("addition", "paper"): (    10,  10_000,  1_000, 1e-3, 2, 4, 0.0, 1e-3),
    ("parens", "paper"):   (    30,  10_000,  1_000, 1e-3, 2, 4, 0.0, 1e-3),
    ("memorize", "paper"): (   512, 168_000, 32_768, 1e-3, 2, 4, 0.0, 1e-4),
    ("imitate", "paper"):  (  None,  10_000,  1_000, 1e-3, 3, 4, 0.0, 1e-3),
    ("lm", "paper"):       (10_000, 230_000,     20, 6e-4, 4, 8, 0.1,  0.1),
}
# The flags that take several values
SWEEP = ["task", "model", "train", "n_embd", "target_width", "seed"]

def resolve(args):
    """Fills in the flags that were not given, in place. Unused settings become None."""
    preset = "small" if args.preset in SMALL else "paper"
    own = dict(zip(COLUMNS, SETTINGS[args.task, preset]))
    if args.model == "lstm":
        own["lr"] = 5e-3
    elif args.train == "full":                               # with 5e-3, width 128 fails at parens
        own["lr"] = min(own["lr"], 1e-3)
    for key, value in own.items():                           # dropout has no flag
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.task == "imitate":
        args.size = None                                     # its size is target_width
    else:
        args.target_width = None
    if args.task != "lm":
        args.text = None
    if args.model != "transformer":
        args.n_head = None                                   # a sum of values has no heads
    if args.model in RECURRENT:
        args.n_layer = None                                  # always two layers
        args.init = None                                     # PyTorch's default
        if args.train == "token_unembed":
            args.train = "embeddings"                        # the same, without position embeddings

@functools.cache
def make_task(name, size, text, device):
    """A task of a given size, shared by all runs, since its test set can take seconds."""
    own = dict(text=text) if name == "lm" else {}
    return TASKS[name](size, device=device, **own)

def build(args):
    """The task and the model of a run."""
    task = make_task(args.task, args.target_width or args.size, args.text, args.device)
    if args.model in RECURRENT:
        model = Recurrent(task.vocab_size, RECURRENT[args.model], args.n_embd, args.dropout)
    else:
        sizes = task.vocab_size, task.block_size, args.n_layer, args.n_head, args.n_embd
        model = Transformer(*sizes, args.model == "linear", args.dropout, args.init)
    return task, model.to(args.device)

def load(folder, device="cpu"):
    """The task and the trained model of a run, ready to use."""
    return common.load(folder, build, device)

# ---- Training (App. D.3) ------------------------------------------------------------------------

def learning_rate(step, args):
    """Linear warm-up to args.lr, then a cosine to 0 (from the authors' code, not the paper)."""
    warm = min(1, (step + 1) / args.warmup)
    done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * warm * (1 + math.cos(math.pi * done)) / 2

def answers(tokens, scored, n):
    """Where the answers of each sequence, at most n, are predicted, and what they are.

    tokens, scored (B, T) -> at (B, n); targets (B, n), -100 if a sequence has fewer answers.
    An answer is predicted at the position before its own. With n = 3:

        tokens   5  6  7 20 21 12     scored   .  .  .  x  x  .     at  2 3 0   targets  20 21 -100
    """
    predicts_answer = scored[:, 1:]                          # (B, T - 1): the next token is one
    next_token = tokens[:, 1:].masked_fill(~predicts_answer, -100)
    # the positions of the True entries, in order, then the others, whose next_token is -100
    at = predicts_answer.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    return at, next_token.gather(1, at)

def train(args, run):
    """Trains one run of the sweep, from its checkpoint if there is one."""
    task, model = build(args)
    trained = train_only(model, args.train)
    # biases and norms do not decay, as in the released code
    matrices = [weights for weights in trained if weights.dim() > 1]
    vectors = [weights for weights in trained if weights.dim() == 1]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    data = torch.Generator(args.device).manual_seed(args.seed)
    start = run.restore(model, optimizer, data)
    if args.compile:
        model.compile()
    for step in run.steps(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        tokens, scored = task.sample(args.batch_size, data)  # (B, T) each
        scored = scored & ~task.held_out(tokens)[:, None]    # nothing is learned from the test set
        at, targets = answers(tokens, scored, task.n_answers)                # (B, Q) each
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens[:, :-1], at)               # (B, Q, V)
        n_scored = (targets >= 0).sum().clamp_min(1)
        loss = task.losses(logits.float(), targets, tokens).sum() / n_scored
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            model.eval()                                     # no dropout
            tokens, scored = task.test_set
            score = evaluate(model, task, tokens[:1_000], scored[:1_000])[task.metric]
            run.log(step + 1, loss=loss.item(), **{f"test_{task.metric}": score})
            model.train()

# ---- Measurement --------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, task, tokens, scored):
    """Mean loss (nats) and accuracy over the answers of tokens, scored (N, T) each."""
    loss, right, n = 0.0, 0, 0
    size = 20_000 // tokens.shape[1]                         # sequences in a batch
    batches = zip(tokens.split(size), scored.split(size))
    for tokens, scored in batches:
        at, targets = answers(tokens, scored, task.n_answers)
        logits = model(tokens[:, :-1], at).float()
        losses = task.losses(logits, targets, tokens)
        loss += losses.double().sum().item()
        right += (logits.argmax(-1) == targets).sum().item()
        n += (targets >= 0).sum().item()
    return dict(loss=loss / n, accuracy=right / n)

def explained_variance(hidden, top=10):
    """Fraction of the variance of hidden (N, d) in its top components, and in its top neurons.

    Tables 4 and 5. Returns two numbers between 0 and 1.
    """
    covariance = hidden.double().T.cov(correction=0)         # (d, d)
    fractions = []
    # the variance along each principal component, then that of each neuron
    for variances in (torch.linalg.eigvalsh(covariance), covariance.diagonal()):
        largest = variances.sort(descending=True).values[:top]
        fractions.append((largest.sum() / variances.sum()).item())
    return tuple(fractions)

def find_needles(attns, tokens, scored):
    """Fig. 2 as two numbers, mean attention weights of the best head.

    The first is layer 1's attention from each value to its marker, the second the last layer's from
    the query to the value that it asks for. attns: (B, H, T, T) each; tokens, scored (B, T + 1).
    """
    rows, query_at = scored[:, 1:].nonzero().T               # (B,) each: one query a sequence
    value_at = torch.arange(1, tokens.shape[1] - 1, 2, device=tokens.device) # after its marker
    to_marker = attns[0][:, :, value_at, value_at - 1].transpose(1, 2)       # (B, values, H)
    is_value = value_at < query_at[:, None]                  # (B, values), false for padding
    to_marker = to_marker[is_value].mean(0)                  # (H,)
    marker = tokens[rows, query_at] - 30                     # (B,): the one that is asked for
    marker_at = (tokens == marker[:, None]).int().argmax(1)  # (B,)
    to_value = attns[-1][rows, :, query_at, marker_at + 1]   # (B, H)
    return [to_marker.max().item(), to_value.mean(0).max().item()]

@torch.no_grad()
def circuit(model, task):
    """Fig. 3 as two numbers, [gradient symmetricity, distance irrelevance] of Zhong et al. 2023.

    A model can add a and b, two points of a circle, by their product (a clock) or by their sum (a
    pizza). Symmetricity is the mean cosine similarity between the gradients of a random logit with
    respect to the embeddings of a and of b. Irrelevance is the standard deviation of the correct
    logit among the pairs with the same a - b, relative to that among all pairs.
    A clock has 0 and 1, a pizza 1 and 0.
    """
    p = task.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = task.table[torch.randperm(p * p, generator=generator)[:500]]    # (500, 3)
    output = torch.randint(p, (len(tokens), 1), generator=generator).to(tokens.device)
    with torch.enable_grad():
        states = model.hidden_states(tokens[:, :2])          # (500, 2, C) each
        logits = model.lm_head(model.ln_f(states[-1][:, -1]))                # (500, V)
        gradient, = torch.autograd.grad(logits.gather(1, output).sum(), states[0])   # (500, 2, C)
    symmetricity = F.cosine_similarity(gradient[:, 0], gradient[:, 1]).mean()
    correct = []                                             # the logit of a + b, for all pairs
    for pairs in task.table.split(5_000):
        correct.append(model(pairs[:, :2])[:, -1].gather(1, pairs[:, 2:]))
    correct = torch.cat(correct).view(p, p)                  # row a, column b
    a = torch.arange(p)
    by_distance = correct[a, (a - a[:, None]) % p]           # row d, column a: the pair a, a - d
    irrelevance = by_distance.std(1, correction=0).mean() / correct.std(correction=0)
    return [symmetricity.item(), irrelevance.item()]

def write_prose(model, task, seed, n_words=60):
    """A text that the language model writes after the first word of the test text."""
    generator = torch.Generator(task.device).manual_seed(seed)
    ids = task.test_ids[None, :1].long()                     # (1, 1)
    for _ in range(n_words):
        next_word = model(ids)[:, -1].softmax(-1)            # (1, V)
        ids = torch.cat([ids, torch.multinomial(next_word, 1, generator=generator)], dim=1)
    return " ".join(task.words[i] for i in ids[0].tolist())

@torch.no_grad()
def measure(args, run):
    """Loss and accuracy of a trained run on its whole test set, and its task's other numbers."""
    task, model = run.trained(build)
    found = evaluate(model, task, *task.test_set)
    if task.trivial:
        found["trivial"] = task.chance
    if isinstance(model, Transformer):
        n = 20_000 // task.test_set[0].shape[1]
        tokens, scored = [x[:n] for x in task.test_set]      # (n, T) each
        # the positions up to the last answer, without the padding: F F T F -> T T T F
        inside = scored[:, 1:].flip(1).cumsum(1).flip(1) > 0
        states = model.hidden_states(tokens[:, :-1])
        fractions = [explained_variance(state[inside]) for state in states]
        found["components"] = [principal for principal, _ in fractions]
        found["neurons"] = [neuron for _, neuron in fractions]
        if args.task == "modadd":
            found["circuit"] = circuit(model, task)
        if args.task == "needle" and args.model == "transformer":
            found["attention"] = find_needles(model.attention(tokens[:, :-1]), tokens, scored)
    if args.task == "imitate":
        found["target"] = task.describe()
        del found["accuracy"]                                # there is no right token
    if args.task == "lm":
        found["prose"] = write_prose(model, task, args.seed)
    found["n_trained"] = n_numbers(train_only(model, args.train))
    return found

# ---- Two more tasks, Fig. 4's and Fig. 6's, and the list of all ---------------------------------

class Imitate(Task):
    """40 random tokens, for which a random transformer, the target, predicts the next token.

    The model learns the target's distribution; the answer is a placeholder, 0. The target has 3
    layers, 2 heads and GPT-2's initialisation, but its query, key and value weights are multiplied
    by 10, its MLP output weights by 20, and its unembedding has standard deviation 2 / sqrt(width).
    """
    sizes = range(2, 2_000, 2)
    vocab_size = 512
    block_size = 40
    metric, ylabel = "loss", "test KL(target | model) (nats), by the target's width"

    def __init__(self, width=32, device="cpu"):
        super().__init__(width, device)
        with torch.random.fork_rng(), torch.no_grad():
            # the same target for all models, whose own random numbers fork_rng leaves as they are
            common.seed_everything(10**9)
            self.target = Transformer(self.vocab_size, self.block_size, 3, 2, width)
            for block in self.target.h:
                block.attn.c_attn.weight *= 10
                block.mlp.c_proj.weight *= 20
            self.target.lm_head.weight.normal_(std=2 / math.sqrt(width))
        self.target.to(device)
        self.test_set = self.sample(4_000, torch.Generator(device).manual_seed(10**9))

    def sample(self, batch, generator):
        tokens = self.randint(generator, 0, self.vocab_size, batch, self.block_size)
        return self.scored_from(F.pad(tokens, (0, 1)), self.block_size)

    @torch.no_grad()
    def log_probs(self, tokens):
        """The target's log probabilities after the 40 tokens: (B, 41) -> (B, 1, V)."""
        last = torch.full_like(tokens[:, :1], self.block_size - 1)
        return self.target(tokens[:, :-1], last).log_softmax(-1)

    def losses(self, logits, targets, tokens):
        """KL(target | model) in nats, (B, 1)."""
        log_q = logits.log_softmax(-1)
        log_p = self.log_probs(tokens)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def describe(self):
        """Mean entropy of the target's output, and mean KL between two of its outputs, in nats."""
        log_p = self.log_probs(self.test_set[0][:500])[:, 0] # (500, V)
        p = log_p.exp()
        entropy = -(p * log_p).sum(1).mean()
        kl = (p * (log_p - log_p.roll(1, 0))).sum(1).mean()  # each output and the one before it
        return [entropy.item(), kl.item()]

class LM(Task):
    """Windows of a text's words and punctuation marks: the size - 1 most frequent, 0 for others.

    The 200 test windows come from TinyStories' own validation split. Of another text the last 5%
    are held out for them.
    """
    sizes = range(2, 10**6)
    block_size = 512
    metric, ylabel = "loss", "test loss (nats)"

    def __init__(self, size=10_000, text=None, device="cpu"):
        super().__init__(size, device)
        path = text or tinystories("train")
        most_common = Counter(words_of(path)).most_common(self.size - 1)
        self.words = ["<unknown>", *dict(most_common)]       # most_common: pairs (word, count)
        self.vocab_size = len(self.words)
        ids = self.ids(path)
        if text:
            self.train_ids, self.test_ids = ids.tensor_split([len(ids) * 95 // 100])
        else:
            self.train_ids, self.test_ids = ids, self.ids(tinystories("valid"))
        if len(self.test_ids) <= self.block_size:
            raise ValueError(f"lm: {len(ids)} words of text are too few, 10,260 would do")
        self.test_set = self.windows(self.test_ids, 200, torch.Generator(device).manual_seed(0))

    def ids(self, path):
        """A text as numbers (n,) int32: each word's index in self.words, 0 if it has none."""
        index = {word: i for i, word in enumerate(self.words)}
        ids = np.fromiter((index.get(word, 0) for word in words_of(path)), np.int32)
        return torch.from_numpy(ids).to(self.device)

    def windows(self, ids, batch, generator):
        """Windows of 513 words that begin anywhere in ids: tokens, scored (B, 513)."""
        starts = self.randint(generator, 0, len(ids) - self.block_size, batch, 1)
        position = starts + torch.arange(self.block_size + 1, device=self.device)
        return self.scored_from(ids[position].long(), 1)

    def sample(self, batch, generator):
        return self.windows(self.train_ids, batch, generator)

def words_of(path):
    """The words and punctuation marks of a text file, one after the other: She, isn't, here, ."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield from re.findall(r"<\|endoftext\|>|\w+(?:'\w+)*|[^\w\s]", line)

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/{}/main/TinyStories-{}.txt"

def tinystories(split):
    """The path of a split of TinyStories, train or valid, downloaded to ~/.cache on first use.

    OSError if the download fails or does not have the SHA-256 in the repository's Git LFS pointer.
    """
    path = Path.home() / f".cache/nanotheory/TinyStories-{split}.txt"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(TINYSTORIES.format("raw", split), timeout=30) as response:
            pointer = response.read().decode()
        digest = re.search(r"sha256:(\w+)", pointer)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(TINYSTORIES.format("resolve", split), str(path), digest)
    except (OSError, RuntimeError, TypeError) as error:      # another hash, or no pointer
        raise OSError(f"no TinyStories, give --text FILE: {error}") from error
    return path

TASKS = {
    "modadd": Modadd,
    "needle": Needle,
    "addition": Addition,
    "parens": Parens,
    "memorize": Memorize,
    "imitate": Imitate,
    "lm": LM,
}

# ---- Tables and figures -------------------------------------------------------------------------

# Median accuracies of 10 restarts (Tables 1, 2); for memorize bits per parameter (Table 3)
PUBLISHED = """
model,train,width              modadd needle addition parens memorize
transformer,embeddings,1024     1.000  1.000    1.000  1.000        -
transformer,embeddings,16       0.013  0.075    0.266  0.873        -
transformer,full,1024           1.000  1.000    1.000  0.923        -
transformer,full,16             0.972  0.120    0.675  1.000        -
lstm,full,1024                  1.000  0.995    0.530  1.000        -
transformer,unembed,1024        fails  fails    fails  fails        -
transformer,embed,1024          fails      -        -      -        -
transformer,token_unembed,1024      -      -    fails      -        -
transformer,embeddings,128          -      -        -      -     0.41
transformer,full,128                -      -        -      -     2.88
"""

def published_row(args):
    """The row of PUBLISHED for a run's model, training and width; {} if there is none."""
    header, *rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    rows = {row[0]: dict(zip(header, row)) for row in rows}
    return rows.get(f"{args.model},{args.train},{args.n_embd}", {})

def published(args):
    """The paper's number if a run has the paper's size, layers, batch, steps and regularisation,
    else "-". The learning rate, the warm-up and the initialisation may differ."""
    number = published_row(args).get(args.task, "-")
    if number == "-":
        return number
    for key, value in zip(COLUMNS, SETTINGS[args.task, "paper"]):
        # not all of the paper's learning rates are known; None: the model has no such setting
        if key != "lr" and getattr(args, key) not in (None, value):
            return "-"
    return number

IN_WORDS = {
    "full": "fully trained", "embeddings": "random", "embed": "random, only embeddings trained",
    "token_unembed": "random, positions not trained", "unembed": "random, only unembedding trained",
}

def in_words(args):
    """What is trained; also the model if it is not the transformer, and for imitate the width."""
    words = IN_WORDS[args.train]
    if args.model != "transformer":
        words = f"{args.model}, {words}"
    return f"{words}, width {args.n_embd}" if args.task == "imitate" else words

def row_of(args):
    """The name of a run's row in the tables. Seeds share it."""
    if args.task == "imitate":
        return f"imitate {args.target_width}: {in_words(args)}"
    return f"{args.task}: {in_words(args)}, width {args.n_embd}"

def bits(args, results):
    """Table 3: bits per trained parameter; each recalled pair, of n x n, counts log2 n bits."""
    recalled = args.size**2 * results["accuracy"]
    return math.log2(args.size) * recalled / results["n_trained"]

def compared(run):
    """A run's score, and for comparison the trivial guess's and the paper's: {column: score}."""
    args, task = run.args, TASKS[run.args.task]
    found = {"measured": run.results[task.metric]}
    if task.trivial:
        found["trivial"] = run.results["trivial"]
    if args.task != "memorize" and published(args) != "-":   # memorize's are bits, not accuracies
        found["paper"] = published(args)
    return found

SCORES = """Accuracy on held-out sequences, median [lowest, highest] of the seeds (memorize: on its
training set; lm: loss, imitate: KL, both in nats; addition: the paper's numbers may count a pad and
not the first digit). Random: only the embeddings and the unembedding are trained. Trivial guesses:
any number (modadd), the prompt's most frequent value (needle), one answer at each position
(addition), even lengths are balanced (parens)"""

DEPTHS = ["embedding", *[f"layer {i}" for i in range(1, 100)]]
# key in results.json: (title of the table, names of its numbers)
FINDINGS = {
    "attention": ("Attention of the best head (Fig. 2)", ["value to marker", "query to value"]),
    "circuit": ("The circuit (Fig. 3): a pizza has 1 and 0, a clock 0 and 1",
        ["gradient symmetricity", "distance irrelevance"]),
    "target": ("The target of imitation, in nats (paper: 2.89 to 3.02, 0.8 to 3.3)",
        ["entropy of an output", "KL between two outputs"]),
    "components": ("Fraction of variance in the top 10 principal components (Tables 4, 5)", DEPTHS),
    "neurons": ("The same in the top 10 neurons: a subspace, not a sparse subnetwork", DEPTHS),
}

def print_scores(runs):
    """Tables 1 to 3, beside the paper's numbers and those of trivial guesses."""
    cells = []
    for run in runs:
        row = row_of(run.args)
        cells += [(row, column, score) for column, score in compared(run).items()]
        if run.args.task == "memorize":
            row = f"{row}, bits per parameter"
            cells.append((row, "measured", bits(run.args, run.results)))
            cells.append((row, "paper", published(run.args)))
    common.print_table(SCORES, cells)

def print_findings(runs):
    """The numbers of Figs. 2, 3 and 6, at the paper's size Tables 4 and 5, and texts of lm."""
    for key, (title, columns) in FINDINGS.items():
        cells = []
        for run in runs:
            for column, value in zip(columns, run.results.get(key, [])):
                cells.append((row_of(run.args), column, value, ".2f"))
        if cells and not (columns is DEPTHS and runs[0].args.preset in SMALL):
            common.print_table(title, cells)
    for run in runs:
        if "prose" in run.results:
            print(f"\nProse, {row_of(run.args)}")
            print(textwrap.fill(run.results["prose"], 100))

def print_verdict(runs):
    """The tasks that are solved on at least one seed, and those for which width matters."""
    solved = {}                                              # (what is trained, width): tasks
    for run in runs:
        if run.args.task in FOUR:
            tasks = solved.setdefault((in_words(run.args), run.args.n_embd), set())
            if run.results["accuracy"] >= 0.95:
                tasks.add(run.args.task)
    if solved:
        print("\nSolved: an accuracy of at least 0.95 on at least one seed")
    for (words, width), tasks in solved.items():
        print(f"  {words}, width {width}: {', '.join(sorted(tasks)) or 'nothing'}")
    random = {width: tasks for (words, width), tasks in solved.items() if words == "random"}
    if len(random) > 1:
        tasks = random[max(random)] - random[min(random)]    # by the widest, not by the narrowest
        names = ", ".join(sorted(tasks)) or "nothing"
        print(f"Solved by the widest random transformer but not by the narrowest: {names}")

def n_numbers(parameters):
    """The number of weights in a list of parameters."""
    return sum(parameter.numel() for parameter in parameters)

def print_parameters(runs):
    """Table 6: the parameters of each module, and how many are trained. Returns one dict per run.

    For modadd's embedding the paper has 99,328 = 97 x 1024, so p = 97 there.
    """
    cells, results = [], []
    for run in runs:
        model = build(run.args)[1]
        parts = dict(model.named_children(), all=model)
        counts = {name: n_numbers(part.parameters()) for name, part in parts.items()}
        counts["trained"] = n_numbers(train_only(model, run.args.train))
        cells += [(row_of(run.args), name, n, ",.0f") for name, n in counts.items()]
        results.append(counts)
    common.print_table("Parameters (Table 6)", cells)
    return results

LOOKS = {
    "measured": dict(marker="o"),
    "trivial": dict(linestyle=":", color="grey"),
    "paper": dict(marker="o", linestyle="none", fillstyle="none", markersize=10),
}

def plot_widths(runs):
    """The score against the width, for imitate against the target's width (Figs. 4, 6).

    Hollow marks are the paper's numbers, if the settings are the paper's.
    """
    lines = {}                                               # a curve: {width: score}
    colors, panels = {}, {}                                  # one color a model, in all panels
    for run in runs:
        args = run.args
        for kind, score in compared(run).items():
            what = TASKS[args.task].trivial if kind == "trivial" else in_words(args)
            seed = args.seed if kind == "measured" else None # only measured scores have a band
            if score != "fails":
                line = lines.setdefault((args.task, kind, what, seed), {})
                line[args.target_width or args.n_embd] = float(score)
    for (name, kind, what, _), line in lines.items():
        widths, scores = zip(*sorted(line.items()))
        x = np.log2(widths)
        axis = dict(xlabel="width", ylabel=TASKS[name].ylabel, xticks=x, xticklabels=widths)
        look = dict(color=colors.setdefault(what, f"C{len(colors)}")) | LOOKS[kind]
        _, curves = panels.setdefault(name, (axis, []))
        curves.append((f"{kind}: {what}", x, scores, look))
    common.plot(runs[0].folder.parent / "width.png", panels, columns=2)

@torch.no_grad()
def plot_attention(run):
    """Fig. 2: the attention of each head for one prompt of needle, up to 8 pairs long."""
    task, model = load(run.folder)
    tokens, scored = task.test_set
    query_at = scored.int().argmax(1) - 1                    # (N,)
    longest = torch.where(query_at <= 16, query_at, 0).argmax()              # more is hard to read
    prompt = tokens[longest, :query_at[longest] + 1]         # (T,)
    names = prompt.tolist()
    axis = dict(xlabel="looks at", ylabel="marker (128 ..), value, query")
    panels = {}
    for layer, attn in enumerate(model.attention(prompt[None]), 1):
        for head, weights in enumerate(attn[0], 1):
            panels[f"layer {layer}, head {head}"] = weights.numpy(), names, names, axis, []
    common.plot_matrices(run.folder / "attention.png", panels, columns=4)

@torch.no_grad()
def plot_circle(run):
    """Fig. 3: modadd's numbers, joined in order, on their top two principal components."""
    weight = load(run.folder)[1].wte.weight
    U, S, _ = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    x, y = (U * S)[:, :2].T.numpy()                          # (p,) each
    axis = dict(xlabel="principal component 1", ylabel="principal component 2")
    curve = "0, 1, 2, ..", x, y, dict(marker="o", linewidth=0.3)
    common.plot(run.folder / "circle.png", {row_of(run.args): (axis, [curve])})

# ---- The command --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The command line."""
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    count, own = common.positive_int, "(default: the task's own)"
    add("--task", nargs="+", choices=TASKS, default=["parens"],
        help="tasks; at the quick sizes a random model solves parens from width 64 or 128 on, "
        "modadd and addition from 256, needle from 512")
    add("--model", nargs="+", choices=MODELS, default=["transformer"],
        help="linear: attention is a sum of values")
    add("--train", nargs="+", choices=TRAINABLE, default=["embeddings", "full"],
        help="what is trained; embeddings: the paper's random transformer")
    add("--n-embd", nargs="+", type=count, default=[128, 16], help="widths")
    add("--init", choices=["gpt2", "paper"], default="gpt2",
        help="standard deviation of a transformer's initial weights; gpt2: 0.02, and 0.02 / "
        "sqrt(2 layers) if they write to the residual stream; paper: 0.02, and 0.01 in the MLP")
    add("--n-layer", type=count, help=f"layers of a transformer {own}")
    add("--n-head", type=count, help=f"heads per layer of a softmax transformer {own}")
    add("--size", type=count,
        help="modulus (modadd), most pairs (needle, parens), digits (addition), side of the table "
        f"(memorize), vocabulary (lm) {own}")
    add("--target-width", nargs="+", type=count, default=[16], help="imitate: the targets' widths")
    add("--text", help="lm: a text file (default: TinyStories, downloaded)")
    add("--steps", type=count, help=f"training steps {own}")
    add("--batch-size", type=count, help=f"sequences per step {own}")
    add("--lr", type=common.positive_float,
        help="peak learning rate of AdamW (default: the task's own; with --train full at most "
        "1e-3; with --model lstm 5e-3)")
    add("--warmup", type=count, default=100, help="steps of linear warm-up, before a cosine to 0")
    add("--weight-decay", type=common.non_negative, help=f"weight decay of AdamW {own}")
    add("--eval-every", type=count, default=100, help="steps between evaluations")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile")
    add("--seed", nargs="+", type=common.seed_int, default=[0], help="seeds of weights and data")
    return common.parse_args(parser, PRESETS, argv)

def show(runs):
    """Prints the tables of a sweep and a summary, and draws its figures with --plot."""
    print_scores(runs)
    print_findings(runs)
    if runs[0].args.plot:
        plot_widths(runs)
        for run in runs:
            if "attention" in run.results:
                plot_attention(run)
            if "circuit" in run.results:
                plot_circle(run)
    print_verdict(runs)

def main(argv=None):
    """Trains what the flags ask for, prints the tables, and returns one dict per run."""
    args = parse_args(argv)
    make_task.cache_clear()                                  # or an edited --text is not noticed
    runs = common.sweep(args, SWEEP, build, resolve)
    if args.preset == "params":
        return print_parameters(runs)
    if args.preset == "table1":
        runs = [run for run in runs if published_row(run.args)]              # not a narrow LSTM
        if not runs:
            raise common.UsageError("Table 1 has no such row: try --preset paper")
    return common.complete(runs, train, measure, show)

if __name__ == "__main__":
    common.command(main)
