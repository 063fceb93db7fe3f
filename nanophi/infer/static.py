"""Decoding on a GPU: the loop of generate.py, recorded once and played back.

Skip this file at first reading: `decode_steps` in generate.py is the loop, and gives the same.

One token of the plain loop is some five hundred small kernels. Python asks the GPU for each of
them, and then waits for the number of the token. Most of the time the GPU has nothing to do:

    plain       ask ask ask ... ask  wait  choose  ask ask ask ...      each token
    recorded    play play play ... play  wait                           each token is one "play"

A CUDA graph is such a recording: kernels, and the places in memory that they read and write. Played
back, it asks nothing and reads no number of the CPU. So a step may depend on nothing that Python
knows, not even on how long the answer is:

    plain path                                   here
    KVCache: lengths on the CPU                  StaticCache: lengths on the GPU
    attention sees the keys that there are       it sees the whole room, through a mask
    `choose` reads the token                     the token stays on the GPU, for the next step
    an answer ends at its [EOS]                  the tokens are read WINDOW at a time, and those
                                                 behind the [EOS] are thrown away

The engine of --serve plays steps too (`StaticRows`), and reads each token at once.

To record is to run the step once, and needs no compiler. torch.compile could fuse more kernels, but
it would have to work for many seconds before the first answer.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from nanophi.infer.decoder import Decoder, computes_the_same
from nanophi.infer.generate import Network, prefill
from nanophi.infer.products import Product
from nanophi.infer.sampling import FILTERS, Sampling, are_numbers, filtered, no_probabilities
from nanophi.model.attention import AttentionPlan, attend
from nanophi.model.backends import preferred_kernels
from nanophi.model.phi import KVCache, Phi

WINDOW = 16  # tokens between two waits
FIRST = 4  # tokens of the first window: a recording needs kernels that have run before
ROUND = 64  # the room of a cache is a multiple of it, as fast attention kernels want their mask
DAMAGED = -1  # stands for the token of a row whose logits are no numbers


class StaticCache(KVCache):
    """A KVCache whose lengths lie on the GPU, for single tokens behind a prompt.

    Its tensors keep their places. Each row writes at its own length, and a mask hides the rest:

        room 6, lengths [2, 4]    row 0   感 冒 x _ _ _     x sees 感 冒 x
                                  row 1   你 是 谁 ？ x _    x sees 你 是 谁 ？ x

    A row whose answer has ended goes on with the others. Where its room is full, it writes the last
    place again and again, which nobody reads any more.
    """

    def __init__(self, filled: KVCache):
        """filled: holds the prompts. Both have the same memory"""
        self.store = filled.store
        device = self.store.device
        self.lengths = filled.lengths.to(device)
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]
        self.keys = torch.arange(self.store.shape[4], device=device)
        self.start = None

    def begin(self, time: int) -> Tensor:
        """The position of the next token of each row: (B, 1)."""
        assert time == 1, "a StaticCache reads one token at a time"
        self.places = self.lengths.clamp(max=len(self.keys) - 1)[:, None]
        return self.places

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, 1, 2, key heads, K); return the whole room of them."""
        held = self.store[layer]  # (2, B, key heads, room, K)
        held[:, self.rows, :, self.places] = new
        return held[0], held[1]

    def visible(self) -> Tensor:
        """bool (B, 1, 1, room)"""
        return (self.keys <= self.places[:, :, None])[:, None]


class FewKernels(Decoder):
    """The network of decoder.py on a GPU: 12 kernels a layer in place of 32.

    It holds the weights once more. They are made anew for each answer, which takes less time than
    to look whether they have changed.
    """

    def product(self) -> Callable[..., Product]:
        """The weights stay in the dtype that they have."""
        return lambda weight, bias: partial(F.linear, weight=weight, bias=bias)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, causal: bool
    ) -> Tensor:
        """Attention as in the model, which knows what the kernels of a GPU want."""
        with preferred_kernels(q.device, masked=visible is not None):
            if visible is None and not causal:  # one token a row, which sees all that is there
                return super().attend(q, keys, values, visible, causal)
            return attend(q, keys, values, AttentionPlan("sdpa", visible))


class Static:
    """Answers under way. `step` gives each row its next token, and reads no number of the CPU.

    ids:   (B, 1), the last token of each row
    noise: (B, V), random numbers that `draw` renews; one shape, one place
    """

    def __init__(self, network: Network, cache: StaticCache, how: Sampling):
        self.network = network
        self.cache = cache
        self.how = how
        rows = len(cache.lengths)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=network.device)
        self.noise = torch.ones(rows, network.cfg.vocab_size, device=network.device)

    def step(self) -> None:
        ids = self.ids.clamp(min=0)  # DAMAGED is no id
        states = self.network.hidden(ids, cache=self.cache)
        self.choose(self.network.lm_head(states[:, -1]))

    def choose(self, logits: Tensor) -> None:
        """`sampling.choose`, which leaves the ids on the GPU. logits (B, V)."""
        logits = logits.float()
        sound = are_numbers(logits)
        logits = filtered(logits, [], self.how)
        if not self.how.greedy:
            logits = logits.softmax(-1) / self.noise
        ids = logits.argmax(-1)
        self.ids.copy_(torch.where(sound, ids, DAMAGED)[:, None])

    def draw(self, generator: torch.Generator | None) -> None:
        """Renew the noise. It is drawn outside of the recording, which would draw the same again.

        The id with the largest quotient of probability and noise is taken. Each is taken with its
        own probability where the noise has an exponential distribution:

            probabilities    0.5  0.3  0.2
            noise            2.0  0.6  1.0
            quotients        0.25 0.5  0.2      the second id is taken

        torch.multinomial does the same, with the same numbers. But it looks at the probabilities
        first, and waits for what it sees.
        """
        if not self.how.greedy:
            self.noise.exponential_(generator=generator)


@torch.inference_mode()
def static_steps(
    model: Phi,
    prompts: list[list[int]],
    rooms: list[int],
    eos: set[int],
    how: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[dict[int, int]]:
    """`generate.decode_steps`, with one wait for WINDOW tokens. The arguments are the same.

    The random numbers are the same too. But the generator goes on to the end of a window: what is
    drawn from it afterwards differs.
    """
    longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    filled = KVCache(model.cfg, len(prompts), room_for(model, longest), model.lm_head.weight)
    network = network_for(model)
    logits = network.lm_head(prefill(network, prompts, filled))  # (B, V)
    static = Static(network, StaticCache(filled), how)
    static.draw(generator)
    static.choose(logits)
    said = [static.ids.clone()]
    left = dict(enumerate(rooms))  # prompts that go on, and how many ids each may still get
    window = FIRST
    step = static.step
    while left:
        while len(said) < min(window, max(left.values())):
            static.draw(generator)
            step()
            said.append(static.ids.clone())
        yield from handed_out(said, left, eos)
        said = []
        if window == FIRST and left:
            step = recorded(static.step, model.device)
            window = WINDOW


class StaticRows:
    """The steps of an engine, recorded: one more token for every row of its cache.

    A row that is not in use gets one too. It writes behind what it holds, where nobody reads:

        row 0, in use    感 冒 x _ _ _      x is its next token, and its state is returned
        row 1, free      你 是 谁 ？ o _     o is overwritten by the next one who takes the row

    ids:    (B, 1), the last token of each row
    states: (B, D), what is played back leaves the new ones here
    """

    def __init__(self, network: Network, plain: KVCache):
        """plain: the cache of the engine, with lengths on the CPU. Both have the same memory"""
        self.network = network
        self.plain = plain
        self.cache = StaticCache(plain)
        rows = len(plain.lengths)
        device = plain.store.device
        # Ids and lengths travel together, from a place that the GPU fetches them from by itself.
        self.told = torch.zeros(2, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.heard = self.told.to(device)
        self.ids = self.heard[0][:, None]
        self.cache.lengths = self.heard[1]
        self.states = plain.store.new_zeros(rows, network.cfg.hidden_size)
        self.play: Callable[[], None] = self.step
        self.steps = 0

    def step(self) -> None:
        self.states.copy_(self.network.hidden(self.ids, cache=self.cache)[:, -1])

    def read(self, ids: list[int]) -> Tensor:
        """The states (rows, D) of the first rows after these ids. The next call changes them."""
        rows = len(ids)
        self.told[0, :rows] = torch.tensor(ids)
        self.told[1] = self.plain.lengths
        self.heard.copy_(self.told, non_blocking=True)
        if self.steps == FIRST:
            self.play = recorded(self.step, self.heard.device)
        self.play()
        self.steps += 1
        self.plain.lengths[:rows] += 1
        return self.states[:rows]


def handed_out(said: list[Tensor], left: dict[int, int], eos: set[int]) -> Iterator[dict[int, int]]:
    """Read some tokens (B, 1), and yield the steps of those rows that go on: of `left`, which
    shrinks. A row's tokens behind its end are dropped.

    >>> said = [torch.tensor([[5], [7]]), torch.tensor([[1], [8]]), torch.tensor([[6], [9]])]
    >>> list(handed_out(said, {0: 9, 1: 9}, eos={1}))
    [{0: 5, 1: 7}, {0: 1, 1: 8}, {1: 9}]
    """
    for tokens in torch.cat(said, 1).t().tolist():  # here the CPU waits for the GPU
        new = {row: tokens[row] for row in left}
        if DAMAGED in new.values():
            raise no_probabilities()
        yield new
        for row, token in new.items():
            left[row] -= 1
            if token in eos or not left[row]:
                del left[row]
        if not left:
            return


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that plays a step back. A step that cannot be recorded is done as before."""
    try:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: an engine of --serve, or NCCL's watchdog.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            step()
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0][:200]
        warnings.warn(f"decoding goes on without a CUDA graph: {reason}", stacklevel=2)
        return step
    return graph.replay


def room_for(model: Phi, longest: int) -> int:
    """The tokens that the cache of a row gets, for a longest prompt with its answer."""
    return min(-(-longest // ROUND) * ROUND, model.cfg.max_position_embeddings)


# ---- which model, and which filters

Way = Callable[[Phi], Network]  # from a model to what computes a step
WAYS: tuple[Way, ...] = (FewKernels, lambda model: model)  # the best one first

# The way of each model, and the kinds of its modules, by which a changed one is known.
KNOWN: "WeakKeyDictionary[Phi, tuple[tuple[type, ...], Way | None]]" = WeakKeyDictionary()


def suits(model: Phi, how: Sampling) -> bool:
    """Whether `static_steps` gives what the loop gives, for a model and the filters of an answer.

    In a recording, dropout would draw the same again, autocast's copies of the weights would be
    gone, and nobody would call a hook.
    """
    if model.training or torch.is_autocast_enabled(model.device.type):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return all(FILTERS[name].on_device for name in how.chosen) and way_of(model) is not None


def network_for(model: Phi) -> Network:
    """What computes the steps of an answer. Where memory is short, the model itself."""
    way = way_of(model)
    assert way is not None, "ask `suits` first"
    try:
        return way(model)
    except torch.OutOfMemoryError:
        return model


def way_of(model: Phi) -> Way | None:
    """The first of WAYS that gives what the model gives. A changed network may compute something
    else than decoder.py does, and may ask its cache for what only a KVCache can tell.
    """
    kinds = tuple(map(type, model.modules()))
    known = KNOWN.get(model)
    if known is None or known[0] != kinds:
        way = next((way for way in WAYS if gives_the_same(way, model)), None)
        known = KNOWN[model] = (kinds, way)
    return known[1]


def gives_the_same(way: Way, model: Phi) -> bool:
    close = 1e-3 if model.lm_head.weight.dtype == torch.float32 else 0.05
    try:
        return computes_the_same(way(model), model, close, StaticCache)
    except Exception:  # whatever a changed network asks, the loop knows the answer
        return False
