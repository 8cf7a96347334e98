"""
Algorithmic Capabilities of Random Transformers. Zhong, Andreas. NeurIPS 2024, arXiv 2410.04368

Freeze every attention and MLP weight of a transformer at its random initialisation and train only the embeddings and the
unembedding: it still learns modular addition, associative recall, decimal addition, balancing parentheses, even some
language. The abilities were there, training picks the subspace that uses them. It takes width: look in the table for
`embeddings`, the random transformer, which succeeds when wide and fails when narrow, where full training succeeds.

    python random_transformer.py                             parentheses at widths 128 and 16, in minutes
    python random_transformer.py --preset paper --table1     Table 1; --seed 0 1 2 3 4 5 6 7 8 9 for the paper's restarts
    Table 2, what has to be trained. Tables 4 and 5, the subspace, are printed below the scores of every transformer:
    python random_transformer.py --preset paper --n-embd 1024 --train full embeddings token_unembed embed unembed
    Table 3, bits a parameter (the authors' script trained at --lr 5e-3); Table 6, parameters; Table 9, linear attention:
    python random_transformer.py --preset paper --task memorize --n-embd 128
    python random_transformer.py --preset paper --params
    python random_transformer.py --preset paper --model linear --n-embd 1024
    The threshold in width; Fig. 2, the attention of associative recall; Fig. 3, the circle of modular addition:
    python random_transformer.py --preset paper --train embeddings --n-embd 16 32 64 128 256 512 1024 --plot
    python random_transformer.py --preset paper --task needle --n-embd 1024 --plot
    python random_transformer.py --preset paper --task modadd --n-embd 1024 --plot
    Fig. 4, a language model of TinyStories (downloaded, or --text FILE), and its prose; Fig. 6, imitation:
    python random_transformer.py --preset paper --task lm --n-embd 16 32 64 128 256 512 --plot
    python random_transformer.py --preset paper --task imitate --n-embd 512 --target-width 4 8 12 16 32 64 128 256 512 --plot
"""
import argparse, functools, hashlib, itertools, math, os, re, urllib.request
from collections import Counter
from pathlib import Path
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from tqdm import tqdm
import common

# ---- The tasks (App. D.1) -------------------------------------------------------------------------------------------
class Task:
    """A distribution of sequences of which some tokens are answers: the model is trained and tested on those alone.
    sample(batch, generator) -> tokens (B, T), scored (B, T) bool, true where the token is an answer. At most n_answers are
    scored in a sequence, and T - 1 <= block_size tokens are fed. ValueError where there is no task of that size."""
    metric, n_answers, sizes = "accuracy", 1, range(5, 2_000)
    def __init__(self, size, device):
        if size not in self.sizes:
            raise ValueError(f"{type(self).__name__.lower()}: {size} is not in {self.sizes[0]} .. {self.sizes[-1]}")
        self.device = device
    @functools.cached_property
    def test_set(self):
        """The fixed test set: tokens, scored. Here 4,000 fresh sequences from a seed that training does not use."""
        return self.sample(4_000, torch.Generator(self.device).manual_seed(10**9))
    def held_out(self, tokens):
        """Which of tokens (B, T) belong to the test alone: (B,) bool. Training learns nothing from those. Here none."""
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    def losses(self, logits, targets, tokens):
        """Cross-entropy of each answer in nats: logits (B, Q, V), targets (B, Q), -100 for none -> (B, Q)."""
        return F.cross_entropy(logits.mT, targets, reduction="none")
    def scored_from(self, tokens, first):
        """tokens (B, T), and that all of them from position `first` on are answers."""
        return tokens, (torch.arange(tokens.shape[1], device=tokens.device) >= first).expand_as(tokens)

class HashedTask(Task):
    """A task that draws its sequences afresh, and so draws the short ones again and again: a test set that is drawn like
    them would mostly have been trained on. So a twentieth of all sequences is held out, told by a hash of their tokens:
    training learns from the others alone, the test has these alone, and nobody has to keep a list of either. (A list of
    4,000 draws, kept out of training, would take every short sequence from it, and test another distribution.)"""
    prime = 1_000_003
    def __init__(self, size, device):
        super().__init__(size, device)
        weights = torch.randint(self.prime, (1_000,), generator=torch.Generator().manual_seed(0))
        self.hash_weights = weights.to(device)
    def held_out(self, tokens):
        """A twentieth of all sequences, the same in every run: (B, T) -> (B,) bool."""
        weights = self.hash_weights[:tokens.shape[1]]
        return (tokens * weights).sum(1) % self.prime % 20 == 0
    @functools.cached_property
    def test_set(self):
        """The fixed test set: tokens, scored. The first 4,000 held-out sequences from a seed that training does not use."""
        generator = torch.Generator(self.device).manual_seed(10**9)
        all_tokens, all_scored, n = [], [], 0
        while n < 4_000:
            tokens, scored = self.sample(20_000, generator)
            held_out = self.held_out(tokens)
            all_tokens.append(tokens[held_out])
            all_scored.append(scored[held_out])
            n += len(all_tokens[-1])
        return torch.cat(all_tokens)[:4_000], torch.cat(all_scored)[:4_000]

class Lookup(Task):
    """Sequences x, y, z, of which z is the answer: rows of a table (n, 3)."""
    block_size = 5
    def sample(self, batch, generator):
        rows = torch.randint(len(self.train_rows), (batch,), generator=generator, device=self.device)
        return self.scored_from(self.train_rows[rows], 2)
    @functools.cached_property
    def test_set(self):
        return self.scored_from(self.test_rows, 2)

class Modadd(Lookup):
    """a, b, (a + b) mod p. Of all p^2 pairs a fixed 5% are held out for the test."""
    def __init__(self, p=199, device="cpu"):
        super().__init__(p, device)
        self.p = self.vocab_size = p
        a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
        self.table = torch.stack([a, b, (a + b) % p], 1).to(device)              # (p^2, 3)
        order = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
        self.test_rows, self.train_rows = self.table[order.to(device)].tensor_split([p * p // 20])

class Memorize(Lookup):
    """x, y, z: a fixed random z for each of n x n pairs; y's ids begin at n. What is trained is what is tested."""
    def __init__(self, n=512, device="cpu"):
        super().__init__(n, device)
        self.vocab_size = 2 * n
        x, y = torch.cartesian_prod(torch.arange(n), torch.arange(n, 2 * n)).T
        z = torch.randint(n, (n * n,), generator=torch.Generator().manual_seed(0))
        self.train_rows = self.test_rows = torch.stack([x, y, z], 1).to(device)

class Needle(HashedTask):
    """Associative recall: k ~ U[1, n_pairs] pairs of a marker and a value, then one marker's query and its value.
    Markers 128..157, distinct and shuffled; values 1..127; the query is the marker + 30; 0 pads."""
    vocab_size, block_size, sizes = 256, 100, range(1, 31)
    def __init__(self, n_pairs=30, device="cpu"):
        super().__init__(n_pairs, device)
        self.n_pairs = n_pairs
    def sample(self, batch, generator):
        draw, n = dict(generator=generator, device=self.device), self.n_pairs
        k = torch.randint(1, n + 1, (batch, 1), **draw)
        markers = 128 + torch.rand(batch, 30, **draw).argsort(1)[:, :n]          # (B, n)
        values = torch.randint(1, 128, (batch, n), **draw)
        asked = (torch.rand(batch, 1, **draw) * k).long()
        position = torch.arange(2 * n + 2, device=self.device)
        tokens = F.pad(torch.stack([markers, values], 2).flatten(1), (0, 2)) * (position < 2 * k)        # (B, 2n + 2)
        tokens.scatter_(1, 2 * k, markers.gather(1, asked) + 30)
        tokens.scatter_(1, 2 * k + 1, values.gather(1, asked))
        return tokens, position == 2 * k + 1

class Addition(HashedTask):
    """a + b = sum, then a stop; operands uniform over numbers of n_digits digits, all digits lowest first.
    Digits 0-9, + 10, = 11, pad 12, digits of the sum 20-29, stop 30. Answers: every digit of the sum, and the stop."""
    vocab_size, sizes = 31, range(1, 18)
    def __init__(self, n_digits=10, device="cpu"):
        super().__init__(n_digits, device)
        self.n_digits, self.block_size, self.n_answers = n_digits, 3 * n_digits + 10, n_digits + 2
        self.powers = 10 ** torch.arange(n_digits, device=device)
    def sample(self, batch, generator):
        n, draw = self.n_digits, dict(generator=generator, device=self.device)
        digits = torch.randint(10, (2, batch, n), **draw)
        digits[..., -1] = torch.randint(1, 10, (2, batch), **draw)               # the leading digit is not 0
        total = (digits * self.powers).sum((0, 2))[:, None]                      # (B, 1)
        carry = total >= 10 * self.powers[-1]                                    # the sum has a digit more
        tokens = torch.cat([digits[0], torch.full_like(total, 10), digits[1], torch.full_like(total, 11),
                            20 + total // self.powers % 10, torch.where(carry, 21, 30), torch.where(carry, 30, 12)], 1)
        return tokens, self.scored_from(tokens, 2 * n + 2)[1] & (tokens != 12)

class Parens(HashedTask):
    """Up to 2 max_pairs brackets, "?", and a label: 2 where they are balanced, else 1. 0 ends, "(" is 1, ")" 2, "?" 3.
    A third are uniformly random strings, the rest random balanced ones, of which half are left as they are. All others get
    both, one or none (1/4 each) of two mutations: a geometric number (1, 2, ...) of random position pairs, of which those
    are swapped whose first position is left of its second; a geometric number (1, 2, ..., doubled with probability 2/3) of
    random positions are flipped. All strings of up to 8 brackets are for training: of so few (two of one bracket) none
    follows from the others."""
    vocab_size, block_size, sizes = 4, 80, range(5, 40)
    def __init__(self, max_pairs=30, device="cpu"):
        super().__init__(max_pairs, device)
        self.max_pairs = max_pairs
    def held_out(self, tokens):
        has_nine_brackets = (tokens[:, :9] != 3).all(1)                          # "?" comes later
        return super().held_out(tokens) & has_nine_brackets
    def balanced(self, pairs, generator):
        """g(pairs) for (B,) -> is_close (B, 2 max_pairs) bool, true at each ")". g(1) = "()", and g(t) is "(" g(t-1) ")"
        or g(u) g(t-u) with u ~ U[1, t-1], each with probability 1/2. All parts of all strings grow at once: `size` holds
        at the start of each part its number of pairs, and a round replaces each part by what it consists of."""
        B, N = len(pairs), 2 * self.max_pairs + 2
        start, nowhere = torch.arange(N, device=self.device).expand(B, N), N - 1
        size, is_close = torch.zeros_like(start), torch.zeros(B, N, dtype=torch.bool, device=self.device)
        size[:, 0] = pairs
        for _ in range(self.max_pairs):                                          # a part of t pairs is done in t rounds
            coin, u = torch.rand(2, B, N, generator=generator, device=self.device)
            wrap = (size == 1) | (size > 1) & (coin < 0.5)
            split = (size > 0) & ~wrap
            u = (1 + (u * (size - 1)).long()) * split
            is_close.scatter_(1, torch.where(wrap, start + 2 * size - 1, nowhere), True)
            right = torch.where(split, start + 2 * u, nowhere)                   # where g(t-u) starts
            inner = F.pad((size - 1) * wrap, (1, -1))                            # g(t-1) starts one place further on
            size = (u + inner).scatter_add(1, right, (size - u) * split)
        return is_close[:, :N - 2]
    def geometric(self, batch, generator):
        """1, 2, .., 21 with probabilities 1/2, 1/4, ..: (batch, 1)."""
        chance = torch.rand(batch, 1, generator=generator, device=self.device).clamp_min(2**-20)
        return 1 - chance.log2().ceil().long()
    def swap(self, is_close, length, generator):
        """Tries a geometric number of random pairs of positions, and swaps those whose first is left of the second."""
        n_tries = self.geometric(len(is_close), generator)                       # (B, 1)
        for n in range(21):
            pair = torch.rand(len(is_close), 2, generator=generator, device=self.device)
            pair = (pair * length).long()                                        # (B, 2)
            is_swap = (n < n_tries) & (pair[:, :1] < pair[:, 1:])                # (B, 1)
            swapped = is_close.scatter(1, pair, is_close.gather(1, pair.flip(1)))
            is_close = torch.where(is_swap, swapped, is_close)
        return is_close
    def flip(self, is_close, length, generator):
        """Flips a geometric number of random positions, twice as many with probability 2/3, one after the other."""
        B = len(is_close)
        twice = torch.rand(B, 1, generator=generator, device=self.device) < 2 / 3
        n_flips = self.geometric(B, generator) * (1 + twice.long())              # (B, 1)
        position = torch.rand(B, 42, generator=generator, device=self.device)
        position = (position * length).long()                                    # (B, 42)
        flips = (torch.arange(42, device=self.device) < n_flips).long()
        times = torch.zeros_like(is_close, dtype=torch.long).scatter_add(1, position, flips)
        return is_close ^ (times % 2 == 1)                                       # a position flipped twice is as it was
    def sample(self, batch, generator):
        draw, N = dict(generator=generator, device=self.device), 2 * self.max_pairs
        chance = lambda probability: torch.rand(batch, 1, **draw) < probability
        pairs = torch.randint(1, self.max_pairs + 1, (batch,), **draw)
        random = chance(1 / 3)
        length = torch.where(random, torch.randint(1, N + 1, (batch, 1), **draw), 2 * pairs[:, None])    # (B, 1)
        is_close = torch.where(random, torch.rand(batch, N, **draw) < 0.5, self.balanced(pairs, generator))
        mutate = random | chance(0.5)
        is_close = torch.where(mutate & chance(0.5), self.swap(is_close, length, generator), is_close)
        is_close = torch.where(mutate & chance(0.5), self.flip(is_close, length, generator), is_close)
        place = torch.arange(N + 2, device=self.device)
        inside = place[:N] < length
        depth = torch.where(inside, 1 - 2 * is_close.long(), 0).cumsum(1)
        label = 1 + ((depth.amin(1) >= 0) & (depth[:, -1] == 0)).long()[:, None]
        tokens = F.pad(torch.where(inside, 1 + is_close.long(), 0), (0, 2))
        return tokens.scatter(1, length, 3).scatter(1, length + 1, label), place == length + 1

class Imitate(Task):
    """40 random tokens; the answer is a random transformer's distribution over the next, so its token is a mere 0.
    The target has 3 layers and 2 heads; its query, key and value weights are GPT-2's x10, its MLP output weights x20, its
    unembedding has standard deviation 2 / sqrt(width)."""
    metric, vocab_size, block_size, sizes = "loss", 512, 40, range(2, 2_000, 2)
    def __init__(self, width=32, device="cpu"):
        super().__init__(width, device)
        with torch.random.fork_rng(), torch.no_grad():
            common.seed_everything(0)                                            # the same target for every student
            self.target = Transformer(self.vocab_size, self.block_size, 3, 2, width)
            for block in self.target.h:
                block.attn.c_attn.weight *= 10
                block.mlp.c_proj.weight *= 20
            self.target.lm_head.weight.normal_(std=2 / math.sqrt(width))
        self.target.to(device)
    def sample(self, batch, generator):
        tokens = torch.randint(self.vocab_size, (batch, self.block_size), generator=generator, device=self.device)
        return self.scored_from(F.pad(tokens, (0, 1)), self.block_size)
    @torch.no_grad()
    def log_probs(self, tokens):                                                 # of the target, after 40 tokens: (B, 1, V)
        return self.target(tokens[:, :-1], torch.full_like(tokens[:, :1], self.block_size - 1)).log_softmax(-1)
    def losses(self, logits, targets, tokens):
        """KL(target | model) in nats, (B, 1)."""
        return F.kl_div(logits.log_softmax(-1), self.log_probs(tokens), log_target=True, reduction="none").sum(-1)
    def describe(self):
        """Mean entropy of the target's output, and mean KL between its outputs on different inputs, in nats."""
        log_p = self.log_probs(self.test_set[0][:500])[:, 0]
        return [-(log_p.exp() * log_p).sum(1).mean().item(), (log_p.exp() * (log_p - log_p.roll(1, 0))).sum(1).mean().item()]

class LM(Task):
    """Language modelling: text as words and punctuation marks, the vocab_size - 1 most frequent and an unknown (id 0).
    Training windows begin anywhere in the training text; the test's 200 come from TinyStories' own validation split, or,
    of another text, from its last 5%, which is not trained on."""
    metric, block_size, n_answers, sizes = "loss", 512, 512, range(2, 10**6)
    def __init__(self, vocab_size=10_000, text=None, device="cpu"):
        super().__init__(vocab_size, device)
        train_ids, test_ids, self.words = read_text(vocab_size, text)
        self.vocab_size = len(self.words)                                        # a small text may have fewer words
        self.train_ids = torch.from_numpy(train_ids).to(device)
        self.test_ids = torch.from_numpy(test_ids).to(device)
        if len(self.test_ids) <= self.block_size:
            n_words, enough = len(train_ids) + len(test_ids), 20 * (self.block_size + 1)
            raise ValueError(f"lm: {n_words:,} words of text are too few, {enough:,} would do")
    def sample(self, batch, generator, ids=None):
        ids = self.train_ids if ids is None else ids
        starts = torch.randint(len(ids) - self.block_size, (batch, 1), generator=generator, device=self.device)
        return self.scored_from(ids[starts + torch.arange(self.block_size + 1, device=self.device)].long(), 1)
    @functools.cached_property
    def test_set(self):
        return self.sample(200, torch.Generator(self.device).manual_seed(0), self.test_ids)

def words_of(path):
    """The words and punctuation marks of a text file, one after the other."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield from re.findall(r"<\|endoftext\|>|\w+(?:'\w+)*|[^\w\s]", line)

def word_ids(path, vocabulary):
    """The text as numbers (n,) int32: each word's place in the vocabulary, 0 where it has none."""
    index = {word: i for i, word in enumerate(vocabulary)}
    return np.fromiter((index.get(word, 0) for word in words_of(path)), np.int32)

@functools.lru_cache
def read_text(vocab_size, path=None):
    """-> ids to train on (n,), ids to test on (m,), words: a list whose i-th entry is the word of id i. Without a path,
    TinyStories, whose validation split is a file of its own."""
    train_path = path or tinystories("train")
    most_common = Counter(words_of(train_path)).most_common(vocab_size - 1)
    vocabulary = ["<unknown>", *(word for word, _ in most_common)]
    ids = word_ids(train_path, vocabulary)
    if path is None:
        return ids, word_ids(tinystories("valid"), vocabulary), vocabulary
    cut = len(ids) * 95 // 100
    return ids[:cut], ids[cut:], vocabulary

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-{}.txt"
def tinystories(split):
    """The path of TinyStories' split, train or valid, downloaded to the cache folder on first use. A download that broke
    off is taken up where it did; the whole has the size and the SHA-256 of the repository's Git LFS pointer, or OSError."""
    url = TINYSTORIES.format(split)
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotheory" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    pointer = urllib.request.urlopen(url.replace("/resolve/", "/raw/"), timeout=30).read().decode()
    digest, size = re.search(r"sha256:(\w+)\s+size (\d+)", pointer).groups()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".part"), "ab+") as part:
        if (have := part.tell()) < int(size):
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as response, tqdm(
                    desc=path.name, initial=have, total=int(size), unit="B", unit_scale=True) as bar:
                while data := response.read(1 << 20):
                    bar.update(part.write(data))
        part.flush()
        if part.tell() < int(size):
            raise OSError(f"it broke off at {part.tell():,} of {int(size):,} bytes; the same command goes on")
        if hashlib.sha256(np.memmap(part.name, mode="r")).hexdigest() != digest:
            part.truncate(0)
            raise OSError(f"its SHA-256 is not {digest}; the same command starts anew")
    return path.with_suffix(".part").rename(path)

TASKS = dict(modadd=Modadd, needle=Needle, addition=Addition, parens=Parens, memorize=Memorize, imitate=Imitate, lm=LM)

# ---- The models -----------------------------------------------------------------------------------------------------
class Block(common.Block):
    """A pre-norm GPT-2 block that is computed where it is needed. With linear, attention is the causal sum of values
    (App. E, as far as we know)."""
    def __init__(self, n_embd, n_head, linear=False, dropout=0.0):
        super().__init__(n_embd, n_head, dropout)
        self.linear = linear
        if linear:
            self.attn.c_attn = nn.Linear(n_embd, n_embd)                         # values alone
    def forward(self, x, at=None, return_attn=False):
        """x (B, T, C); at (B, Q): the positions to compute, None for all -> (B, Q, C), and with return_attn the attention
        weights (B, H, Q, T), else None. Keys and values are needed everywhere, all else only at those positions."""
        C, h, W, b, attn = x.shape[2], self.ln_1(x), self.attn.c_attn.weight, self.attn.c_attn.bias, None
        position = torch.arange(x.shape[1], device=x.device)
        where = (position if at is None else at)[..., None]                      # (T, 1) or (B, Q, 1)
        pick = lambda y: y if at is None else y.gather(1, where.expand(-1, -1, C))                       # (B, Q, C)
        heads = lambda y: y.unflatten(-1, (self.attn.n_head, -1)).transpose(1, 2)                        # (B, H, T, C/H)
        if self.linear:
            y = pick(F.linear(h, W, b).cumsum(1))
        else:
            q, (k, v) = F.linear(pick(h), W[:C], b[:C]), F.linear(h, W[C:], b[C:]).split(C, 2)
            q, k, v = heads(q), heads(k), heads(v)
            dropout = self.attn.dropout * self.training
            if at is None and not return_attn:
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            else:
                future = torch.where(position > where, -math.inf, 0.0)           # (T, T) or (B, Q, T)
                attn = (q @ k.mT / math.sqrt(q.shape[-1]) + (future if at is None else future[:, None])).softmax(-1)
                y = F.dropout(attn, dropout) @ v                                 # (B, H, Q, C/H)
            y = y.transpose(1, 2).flatten(2)                                     # (B, Q, C)
        x = pick(x) + F.dropout(self.attn.c_proj(y), self.attn.dropout, self.training)
        return x + self.mlp(self.ln_2(x)), attn

class Transformer(nn.Module):
    """GPT-2 with an unembedding of its own. Parameters a layer: 12 d^2 + 13 d."""
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, linear=False, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(n_embd, n_head, linear, dropout) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        common.gpt2_init_(self, n_layer)
    def forward(self, tokens, at=None, return_states=False):
        """tokens (B, T), at (B, Q) or None for all -> logits (B, Q, V): the last block is computed only at `at`. With
        return_states also lists of hidden states after the embedding and each layer, and of attention weights."""
        x = self.drop(self.wte(tokens) + self.wpe.weight[:tokens.shape[1]])      # (B, T, C)
        states, attns = [x], []
        for block in self.h:
            x, attn = block(x, at if block is self.h[-1] else None, return_states)
            states, attns = [*states, x], [*attns, attn]
        logits = self.lm_head(self.ln_f(x))
        return (logits, states, attns) if return_states else logits

class Recurrent(nn.Module):
    """An embedding, two recurrent layers (nn.LSTM or nn.RNN), and an unembedding with a bias; forward as the
    transformer's."""
    def __init__(self, vocab_size, kind, n_embd, dropout=0.0):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.rnn = kind(n_embd, n_embd, num_layers=2, batch_first=True, dropout=dropout)
        self.lm_head = nn.Linear(n_embd, vocab_size)
    def forward(self, tokens, at=None):
        h = self.rnn(self.wte(tokens))[0]
        return self.lm_head(h if at is None else h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])))

# What is trained, by module (Table 2). A recurrent network has no wpe and a transformer no rnn.
TRAINABLE = dict(full=["wte", "wpe", "h", "rnn", "ln_f", "lm_head"], embeddings=["wte", "wpe", "lm_head"],
                 token_unembed=["wte", "lm_head"], embed=["wte", "wpe"], unembed=["lm_head"])

def train_only(model, which):
    """Freezes all parameters but those that `which`, a key of TRAINABLE, names. Returns the list of those to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in TRAINABLE[which])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

# ---- Training (App. D.3) --------------------------------------------------------------------------------------------
def build(args):
    """The task and the model of a run."""
    text = dict(text=args.text) if args.task == "lm" else {}
    task = TASKS[args.task](args.target_width if args.task == "imitate" else args.size, device=args.device, **text)
    if args.model in ("lstm", "rnn"):
        kind = nn.LSTM if args.model == "lstm" else nn.RNN
        model = Recurrent(task.vocab_size, kind, args.n_embd, args.dropout)
    else:
        model = Transformer(task.vocab_size, task.block_size, args.n_layer, args.n_head, args.n_embd,
                            args.model == "linear", args.dropout)
    return task, model.to(args.device)

def answers(tokens, scored, n):
    """at (B, n), where up to n answers are predicted, or None for everywhere; targets (B, n), the answers, -100 for none."""
    if n == tokens.shape[1] - 1:
        return None, tokens[:, 1:].masked_fill(~scored[:, 1:], -100)
    at = scored[:, 1:].int().argsort(dim=1, descending=True, stable=True)[:, :n]
    return at, tokens[:, 1:].gather(1, at).masked_fill(~scored[:, 1:].gather(1, at), -100)

def train(args, run):
    """One run of the sweep; continues from its checkpoint where there is one. Returns its results."""
    task, model = build(args)
    trained = train_only(model, args.train)
    peak = args.lr_lstm if args.model == "lstm" else args.lr
    lr = torch.tensor(0.0, device=args.device)                                   # a tensor: a CUDA graph sees it change
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]       # biases and norms: lm's do not decay
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0 if args.task == "lm" else args.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True, capturable=lr.is_cuda)
    data = torch.Generator(args.device).manual_seed(args.seed)                   # training data alone
    start = run.restore(model=model, optimizer=optimizer, data=data)
    for group in optimizer.param_groups:
        group["lr"] = lr
    def training_step():
        tokens, scored = task.sample(args.batch_size, data)                      # (B, T) each
        # Held-out sequences stay in the batch, unscored: to draw others for them would have to wait for their number
        scored = scored & ~task.held_out(tokens)[:, None]
        at, targets = answers(tokens, scored, task.n_answers)                    # (B, Q) each
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens[:, :-1], at)                                   # (B, Q, V)
        loss = task.losses(logits.float(), targets, tokens).sum() / (targets >= 0).sum().clamp_min(1)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    step_once = common.compile_step(training_step, model, data) if args.compile else training_step
    for step in run.steps(start, args.steps):
        done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        lr.fill_(peak * min(1, (step + 1) / args.warmup) * (1 + math.cos(math.pi * done)) / 2)
        loss = step_once()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            model.eval()                                                         # without dropout
            scores = evaluate(model, task, *(x[:1_000] for x in task.test_set))
            model.train()
            run.log(step + 1, loss=loss.item(), **{f"test_{task.metric}": scores[task.metric]})
            run.save(step + 1)
    model.eval()
    return dict(evaluate(model, task, *task.test_set), found=measure(model, task, args), n_trained=sum(p.numel() for p in trained))

# ---- Measurement ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, task, tokens, scored):
    """Mean loss (nats) and accuracy over the answers of tokens, scored (N, T) each."""
    loss, right, n, size = 0.0, 0, 0, max(1, 20_000 // tokens.shape[1])
    for tokens, scored in zip(tokens.split(size), scored.split(size)):
        at, targets = answers(tokens, scored, task.n_answers)
        logits = model(tokens[:, :-1], at).float()
        loss += task.losses(logits, targets, tokens).cpu().double().sum().item()           # mps has no float64
        right += (logits.argmax(-1) == targets).sum().item()
        n += (targets >= 0).sum().item()
    return dict(loss=loss / n, accuracy=right / n)

def explained_variance(hidden, top=10):
    """Share of the variance of hidden (N, d) in its top principal components, and in its top neurons (Tables 4, 5)."""
    covariance = hidden.cpu().double().T.cov(correction=0)                       # (d, d)
    of_components, of_neurons = torch.linalg.eigvalsh(covariance), covariance.diagonal()
    return tuple((x.sort(descending=True).values[:top].sum() / x.sum()).item() for x in (of_components, of_neurons))

def find_needles(attns, tokens, scored):
    """Fig. 2 as numbers: layer 1's attention from each value to its marker, the last layer's from the query to the value
    that it asks for; mean over positions and sequences, best head. attns: (B, H, T, T) each, tokens and scored (B, T+1)."""
    rows, query = scored[:, 1:].nonzero().T                                      # one query a sequence
    values = torch.arange(1, attns[0].shape[-1], 2, device=tokens.device)        # positions 1, 3, ..
    to_marker = attns[0][:, :, values, values - 1].transpose(1, 2)[values < query[:, None]].mean(0)      # (H,)
    target = (tokens[:, :-1] == tokens[rows, query][:, None] - 30).int().argmax(1) + 1
    return [to_marker.max().item(), attns[-1][rows, :, query, target].mean(0).max().item()]

def circuit(model, task):
    """Fig. 3 as numbers, after Zhong et al. 2023: gradient symmetricity, the mean cosine of the gradients of a logit with
    respect to the embeddings of a and of b, and distance irrelevance, the spread of the right answer's logit among pairs of
    equal a - b relative to its spread among all pairs. A pizza has 1 and 0, a clock 0 and 1."""
    draw = torch.Generator().manual_seed(0)
    tokens, some = task.table[torch.randperm(task.p**2, generator=draw)[:500]], torch.randint(task.p, (500,), generator=draw)
    with torch.enable_grad():
        x = embedded = model.wte(tokens[:, :2]).detach().requires_grad_()
        x = x + model.wpe.weight[:2]
        for block in model.h:
            x = block(x)[0]
        logits = model.lm_head(model.ln_f(x[:, -1]))
        gradient, = torch.autograd.grad(logits.gather(1, some[:len(x), None].to(x.device)).sum(), embedded)   # (500, 2, C)
    right = model(task.table[:, :2])[:, -1].gather(1, task.table[:, 2:]).view(task.p, task.p)
    a = torch.arange(task.p)
    spread = right[a, (a - a[:, None]) % task.p].std(1, correction=0)            # row d: all pairs a, a - d
    return [F.cosine_similarity(*gradient.unbind(1)).mean().item(), (spread.mean() / right.std(correction=0)).item()]

@torch.no_grad()
def measure(model, task, args):
    """What is found beyond the score, where it applies: {title: numbers or text}."""
    found = {}
    if args.model in ("transformer", "linear"):
        tokens, scored = (x[:20_000 // x.shape[1]] for x in task.test_set)
        _, states, attns = model(tokens[:, :-1], return_states=True)
        inside = scored.flip(1).cumsum(1).flip(1)[:, 1:] > 0                     # up to the last answer: no padding
        found["Variance in the top 10 principal components, then neurons, after embedding and layers (Tables 4, 5)"] = sum(
            zip(*(explained_variance(state[inside]) for state in states)), ())
        if args.model == "transformer" and args.task == "needle":
            found["Attention: value to marker, query to value (Fig. 2)"] = find_needles(attns, tokens, scored)
        if args.task == "modadd":
            found["Gradient symmetricity, distance irrelevance (Fig. 3; pizza 1, 0; clock 0, 1)"] = circuit(model, task)
    if args.task == "imitate":
        found["Target: entropy of its output, KL between its outputs (paper: 2.89 to 3.02, 0.8 to 3.3)"] = task.describe()
    if args.task == "lm":
        ids, draw = task.test_ids[None, :1].long(), torch.Generator(args.device).manual_seed(args.seed)
        for position in range(60):
            next_word = model(ids, torch.full_like(ids[:, :1], position))[:, 0].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(next_word, 1, generator=draw)], 1)
        found["Prose"] = re.sub(r" ([.,!?;:])", r"\1", " ".join(task.words[i] for i in ids[0].tolist()))
    return found

# ---- The command, its tables and its figures ------------------------------------------------------------------------
by_task = lambda *values: dict(zip(TASKS, values))       # of modadd, needle, addition, parens, memorize, imitate, lm
PRESETS = {
    "quick": dict(task=["parens"], model=["transformer"], train=["embeddings", "full"], n_embd=[128, 16], target_width=[16],
                  size=by_task(59, 4, 3, 10, 64, 0, 1_000), steps=by_task(600, 3_000, 2_000, 1_000, 2_000, 500, 200),
                  batch_size=by_task(1_500, 128, 128, 128, 512, 64, 4), lr=by_task(5e-3, 1e-3, *[5e-3] * 5), weight_decay=1e-3,
                  warmup=100, eval_every=100),
    "paper": dict(task=["modadd", "needle", "addition", "parens"], model=["transformer"], train=["embeddings", "full"],
                  n_embd=[1024, 16], target_width=[32], size=by_task(199, 30, 10, 30, 512, 0, 10_000),
                  steps=by_task(50_000, 10_000, 10_000, 10_000, 168_000, 10_000, 230_000),
                  batch_size=by_task(4_000, 1_000, 1_000, 1_000, 2**15, 1_000, 20), warmup=500, eval_every=500,
                  lr=by_task(*[1e-3] * 6, 6e-4), weight_decay=by_task(1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-3, 0.1)),
}
N_LAYER = by_task(2, 2, 2, 2, 2, 3, 4)                   # lm: the published 2.64 probably belongs to 4 layers, not to 2
SWEEP = ["task", "model", "train", "n_embd", "target_width", "seed"]
# The paper's medians over 10 restarts: Table 1, then what it says of Tables 2 and 3 and of Fig. 4
TABLE1 = [("transformer", "embeddings", 1024), ("transformer", "embeddings", 16), ("transformer", "full", 1024),
          ("transformer", "full", 16), ("lstm", "full", 1024)]
PUBLISHED = {(task, *column): value for (task, column), value in zip(itertools.product(TASKS, TABLE1), """
    1.000 0.013 1.000 0.972 1.000   1.000 0.075 1.000 0.120 0.995
    1.000 0.266 1.000 0.675 0.530   1.000 0.873 0.923 1.000 1.000""".split())}
PUBLISHED |= {(task, "transformer", train, width): value for task, train, width, value in [
    ("modadd", "unembed", 1024, "fails"), ("needle", "unembed", 1024, "fails"), ("addition", "unembed", 1024, "fails"),
    ("parens", "unembed", 1024, "fails"), ("addition", "token_unembed", 1024, "fails"), ("modadd", "embed", 1024, "fails"),
    ("memorize", "full", 128, "2.88 bits"), ("memorize", "embeddings", 128, "0.41 bits"), ("lm", "embeddings", 512, "2.64")]}

def dropout_rate(text):
    """argparse type: a number from 0 to below 1."""
    if 0 <= float(text) < 1:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")

def parse_args(argv=None):
    """The command line. What cannot be run ends here, before anything is written."""
    parser = argparse.ArgumentParser(description="Algorithmic Capabilities of Random Transformers, Zhong and Andreas, "
                                     "NeurIPS 2024", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, count = parser.add_argument, common.positive_int
    add("--task", nargs="+", choices=list(TASKS), help="tasks")
    add("--model", nargs="+", choices=["transformer", "linear", "lstm", "rnn"], help="linear: attention is a sum of values")
    add("--train", nargs="+", choices=list(TRAINABLE), help="what is trained; embeddings: the paper's random transformer")
    add("--n-embd", nargs="+", type=count, help="widths")
    add("--n-layer", type=count, default=N_LAYER, help="layers of a transformer")
    add("--n-head", type=count, default=by_task(4, 4, 4, 4, 4, 4, 8), help="heads a layer")
    add("--dropout", type=dropout_rate, default=by_task(0, 0, 0, 0, 0, 0, 0.1), help="dropout in training")
    add("--size", type=count, help="modulus (modadd), most pairs (needle, parens), digits, side of the table, or vocabulary")
    add("--target-width", nargs="+", type=count, help="imitate: widths of the targets")
    add("--text", help="lm: a text file; without one, TinyStories is downloaded")
    add("--steps", type=count, help="training steps")
    add("--batch-size", type=count, help="sequences a step")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--lr-lstm", type=float, default=5e-3, help="the same, of an LSTM")
    add("--warmup", type=count, help="steps of linear warm-up; the learning rate then falls to 0 along a cosine")
    add("--weight-decay", type=float, help="weight decay of AdamW")
    add("--seed", nargs="+", type=int, default=[0], help="seeds of weights and data")
    add("--table1", action="store_true", help="Table 1's five columns in place of --model, --train and --n-embd")
    add("--params", action="store_true", help="Table 6: count parameters, train nothing")
    args = common.parse_args(parser, PRESETS, argv)
    if args.table1:
        args.model, args.train, args.n_embd = ["transformer", "lstm"], ["embeddings", "full"], [1024, 16]
    for task in args.task:
        n_head, size = (value[task] if isinstance(value, dict) else value for value in (args.n_head, args.size))
        for n_embd in args.n_embd:
            if n_embd % n_head:
                parser.error(f"--n-embd {n_embd} is not divisible by --n-head {n_head}")
        try:
            for n in args.target_width if task == "imitate" else [size]:
                TASKS[task](n, **dict(text=args.text) if task == "lm" else {})
        except ValueError as error:
            parser.error(f"{'--target-width' if task == 'imitate' else '--size'}: {error}")
        except OSError as error:
            parser.error(f"--text: {error}" if args.text else f"TinyStories did not come: {error}. Give --text FILE instead")
    return args

def print_scores(runs, results):
    """Table 1's layout: a row a task, a column a setting; the paper's number beneath where the setting is the paper's."""
    cells = {}
    for run, result in zip(runs, results):
        a, score = run.args, [result[TASKS[run.args.task].metric]]
        if a.task == "memorize":                                                 # log2 n bits for each recalled pair
            score.append(math.log2(a.size) * a.size**2 * result["accuracy"] / result["n_trained"])
        row = f"imitate {a.target_width}" if a.task == "imitate" else a.task
        cells.setdefault(row, {}).setdefault((a.model, a.train, a.n_embd), []).append(score)
    columns, table = list(dict.fromkeys(column for row in cells.values() for column in row)), []
    for task, row in cells.items():
        table.append([task, *(", ".join(map(common.spread, zip(*row.get(column, [])))) for column in columns)])
        paper = [PUBLISHED.get((task, *column), "") for column in columns]
        settings = {(run.args.size, run.args.n_layer) for run in runs if run.args.task == task}
        if any(paper) and settings == {(PRESETS["paper"]["size"][task], N_LAYER[task])}:
            table.append(["paper", *paper])
    print("\nTest accuracy (lm: loss, imitate: KL, nats; memorize: and bits a trained parameter), median [range] over seeds")
    common.print_table(["task", *(" ".join(map(str, column)).removeprefix("transformer ") for column in columns)], table)

def print_findings(runs, results):
    """Tables 4 and 5, the numbers of Figs. 2, 3 and 6, and prose: under each title a line a run."""
    for title in dict.fromkeys(title for result in results for title in result["found"]):
        print(f"\n{title}")
        for run, found in ((run, result["found"][title]) for run, result in zip(runs, results) if title in result["found"]):
            print(f"{run.name}: {found if isinstance(found, str) else '  '.join(f'{x:.2f}' for x in found)}")

def print_parameters(runs):
    """Table 6: parameters by part, and how many are trained. (The paper's 99,328 of modadd is 97 x 1024: p = 97.)"""
    rows = []
    for a, model in ((run.args, build(run.args)[1]) for run in runs):
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        parts = [sum(sizes[name] for name in sizes if name.startswith(part)) for part in ("wte", "wpe", "lm_head", "")]
        parts.append(sum(parameter.numel() for parameter in train_only(model, a.train)))
        rows.append([a.task, a.model, str(a.n_embd), a.train, *(f"{n:,}" for n in parts)])
    common.print_table(["task", "model", "width", "train", "E_token", "E_pos", "U", "all", "trained"], rows)

def plot(runs, results, folder):
    """The score against width (Figs. 4, 6, the threshold); of a needle run Fig. 2, of a modadd run Fig. 3."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    lines = {}
    for a, result in zip((run.args for run in runs), results):
        line = lines.setdefault(a.task, {}).setdefault(f"{a.model}, {a.train}", {})
        line.setdefault(a.target_width if a.task == "imitate" else a.n_embd, []).append(result[TASKS[a.task].metric])
    figure, axes = plt.subplots(1, len(lines), figsize=(4.5 * len(lines), 3.8), squeeze=False)
    figures = {"width": figure}
    for axis, (task, own) in zip(axes[0], lines.items()):
        for label, line in own.items():
            axis.semilogx(sorted(line), [np.median(line[width]) for width in sorted(line)], base=2, marker="o", label=label)
        axis.set(title=task, xlabel="width", ylabel=f"test {TASKS[task].metric}")
        axis.legend(fontsize=8)
    for run in [run for run in runs if run.args.model == "transformer" and run.args.task in ("needle", "modadd")]:
        task, model = build(run.args)
        model.load_state_dict(torch.load(run.folder / "ckpt.pt", map_location=run.args.device, weights_only=True)["model"])
        model.requires_grad_(False).cpu()
        if run.args.task == "needle":
            tokens, query = task.test_set[0].cpu(), task.test_set[1].cpu().int().argmax(1) - 1
            attns = model(tokens[query.argmax(), :query.max() + 1][None], return_states=True)[2]         # a longest one
            figures[run.name], axes = plt.subplots(len(attns), run.args.n_head, figsize=(3 * run.args.n_head, 3.2 * len(attns)))
            for axis, (i, j) in zip(axes.flat, itertools.product(range(len(attns)), range(run.args.n_head))):
                axis.imshow(attns[i][0, j], cmap="Blues")
                axis.set(title=f"layer {i + 1}, head {j + 1}", xlabel="to", ylabel="from")
        else:
            points = model.wte.weight - model.wte.weight.mean(0)
            points = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T                     # (p, 2)
            figures[run.name], axis = plt.subplots(figsize=(4.6, 4.6))
            figures[run.name].colorbar(axis.scatter(*points.T, s=12, c=range(task.p), cmap="hsv"))
            axis.set(title="embeddings of the numbers", xlabel="principal component 1", ylabel="principal component 2")
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=130)
        print(f"figure: {folder / name}.png")

def main():
    """Trains what the flags ask for, prints the tables."""
    args = parse_args()
    runs = common.sweep(args, PRESETS, SWEEP)
    if args.table1:
        runs = [run for run in runs if (run.args.model, run.args.train, run.args.n_embd) in TABLE1]
    if args.params:
        return print_parameters(runs)
    results = common.complete(runs, train)
    print_scores(runs, results)
    print_findings(runs, results)
    if args.plot:
        plot(runs, results, Path(args.out_dir) / "random_transformer")

if __name__ == "__main__":
    main()
