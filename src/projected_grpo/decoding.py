"""Rows that are decoded at once, token by token: draws, a cache whose columns come round, a turn that can be repeated.

A *slot* holds a row that is being written; a row that has ended gives its slot to a waiting one. All slots take one
token a *turn*. A turn reads and writes the same tensors every time and asks the device for nothing, so on a GPU it is
one CUDA graph a batch size; which rows have ended is looked at between turns (``Pace``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from loguru import logger
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from projected_grpo.data_types import Completion, Sampling
from projected_grpo.loss import logits_of

# --------------------------------------------------------------------------------------------------------------- draws

PREFIX = 1024
"""Tokens among which a nucleus is looked for: sorting a vocabulary costs more than the rest of a turn. Where these hold
less than top_p they are the nucleus."""


def nucleus(logits: Float[Tensor, "b v"], top_p: float) -> Float[Tensor, "b v"]:
    """Logits with all but the smallest set of tokens that holds probability top_p set to −inf."""
    if top_p >= 1:
        return logits
    p = logits.softmax(-1)
    most = p.topk(min(PREFIX, p.shape[-1]), dim=-1).values
    inside = most.cumsum(-1) - most < top_p
    least = most.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    return logits.masked_fill(p < least, -torch.inf)


def draw(
    logits: Float[Tensor, "b v"], how: Sampling, race: Float[Tensor, "b v"] | None
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token a row and its probability: argmax of p over an Exp(1) variable, the exponential race that
    torch.multinomial runs; of a greedy token the probability at temperature 1.
    """
    if race is None:
        token = logits.argmax(-1)
        return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    p = nucleus(logits / how.temperature, how.top_p).softmax(-1)
    token = (p / race).argmax(-1)
    return token, p.gather(-1, token[:, None])[:, 0]


# --------------------------------------------------------------------------------------------------------------- cache


class Ring:
    """The columns of the slots' cache, used round and round: at each turn all slots write the same one.

    A row needs ``size`` = width + max_new of them, from its prompt's first to its last token's, so a column that comes
    round holds nothing that a row still reads. at: the turn's column if they did not come round; ``column`` (1,): that
    of them, for the device. static: attention looks at all columns, so that shapes do not depend on the turn.
    """

    def __init__(self, size: int, at: int, static: bool, device: torch.device) -> None:
        self.size, self.at, self.static = size, at, static
        self.column = torch.tensor([at % size], device=device)

    @property
    def limit(self) -> int:
        """Columns that attention looks at, that of the turn included."""
        return self.size if self.static else min(self.at + 1, self.size)

    def write(self, room: Tensor, new: Tensor, dim: int) -> None:
        """Into the turn's column: by its number, or by where a graph finds it."""
        if self.static:
            room.index_copy_(dim, self.column, new)
        else:
            room.narrow(dim, self.at % self.size, 1).copy_(new)

    def spans(self, width: int) -> list[tuple[int, int]]:
        """The ``width`` columns before the turn's, as (first, number); two spans where they come round."""
        first = (self.at - width) % self.size
        n = min(width, self.size - first)
        return [(first, n), (0, width - n)] if n < width else [(first, n)]


class RingLayer(DynamicLayer):
    """A layer's keys and values, (b, h, size, d) each, written in place at the ring's column."""

    def __init__(self, ring: Ring, b: int, like: DynamicLayer, blank: bool) -> None:
        super().__init__()
        self.ring, self.is_initialized = ring, True
        for_rows = torch.zeros if blank else torch.empty  # what no row has seen is multiplied by 0: a number, please
        self.room = [
            for_rows(b, t.shape[1], ring.size, t.shape[3], dtype=t.dtype, device=t.device)
            for t in (like.keys, like.values)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            self.ring.write(room, new, 2)
        keys, values = (room[:, :, : self.ring.limit] for room in self.room)
        return keys, values

    def get_seq_length(self) -> int:
        return self.ring.limit - 1

    def put(self, slots: Int[Tensor, " k"], prompts: DynamicLayer, sources: Int[Tensor, " k"]) -> None:
        """Give slots the keys and values of read prompts, in the columns before the turn's."""
        for room, read in zip(self.room, (prompts.keys, prompts.values), strict=True):
            done, rows = 0, read.index_select(0, sources)
            for first, n in self.ring.spans(read.shape[2]):
                room.narrow(2, first, n).index_copy_(0, slots, rows.narrow(2, done, n))
                done += n

    def keep(self, slots: Int[Tensor, " k"]) -> None:
        """Move these slots to the front and forget the others."""
        used = min(self.ring.at, self.ring.size)
        for room in self.room:
            room[: len(slots), :, :used] = room[:, :, :used].index_select(0, slots)
        self.room = [room[: len(slots)] for room in self.room]


def put_states(layer: LinearAttentionLayer, slots: Tensor, prompts: LinearAttentionLayer, sources: Tensor) -> None:
    """``RingLayer.put`` for a linear-attention layer, which has one state a row and no columns."""
    for own, read in ((layer.conv_states, prompts.conv_states), (layer.recurrent_states, prompts.recurrent_states)):
        for i, state in own.items():
            if state is not None:
                state[slots] = read[i][sources]


def reordered(layer: Any, rows: Int[Tensor, " n"]) -> Any:
    """A copy of a layer that holds these rows of it."""
    made = deepcopy(layer)
    made.reorder_cache(rows)
    return made


def cache_name(decoder: nn.Module) -> str:
    """What the installed transformers calls the cache. A name that it does not know it would swallow in silence."""
    return "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"


def takes_joiners(model: nn.Module) -> bool:
    """Whether a row can begin beside others that are in their middle: not where a layer keeps a window of columns."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}
    return kinds <= {DynamicLayer, LinearAttentionLayer}


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Read:
    """Prompts that one forward has read, padded on the left: the cache, what each one sees, the logits of its first
    token, and its length (``sizes`` to us, ``lengths`` to the device).
    """

    cache: DynamicCache
    seen: Bool[Tensor, "n w"]
    logits: Float[Tensor, "n v"]
    sizes: list[int]
    lengths: Int[Tensor, " n"]


def read(model: nn.Module, prompts: Sequence[Sequence[int]], how: Sampling) -> Read:
    """Read prompts, each once whatever the number of its rollouts."""
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[how.pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache, decoder = DynamicCache(config=model.config.get_text_config()), model.get_decoder()
    h = decoder(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        **{cache_name(decoder): cache},
    ).last_hidden_state[:, -1]
    assert cache.get_seq_length() == width, "the model did not fill the cache that it was given"
    logits = logits_of(model.get_output_embeddings(), h)[:, : how.vocab].float()
    return Read(cache, attention.bool(), logits, [len(p) for p in prompts], attention.sum(-1))


# --------------------------------------------------------------------------------------------------------------- slots


def additive(seen: Bool[Tensor, "b 1 1 c"], dtype: torch.dtype) -> Float[Tensor, "b 1 1 c"]:
    """0 where seen, the lowest number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


MASKS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {"sdpa": lambda seen, _: seen, "eager": additive}
"""What an attention implementation takes for a mask of one query a row. Others decode as sdpa: flash attention would
take the padding out of the keys, whose number it asks the device for."""


@contextmanager
def decoding_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the decoder attends in an implementation of ``MASKS``."""
    config = model.get_decoder().config
    usual = config._attn_implementation
    if usual not in MASKS:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if usual not in MASKS:
            config._attn_implementation = usual


@dataclass(frozen=True)
class Pace:
    """How turns are run. repeated: a turn -> what runs it again and again. stride: turns between two looks at which
    rows have ended, each of which waits for the device. static: shapes are the same at every turn of a batch size.
    """

    repeated: Callable[[Callable[[], None]], Callable[[], None]]
    stride: int
    static: bool


class Graph:
    """A turn as one launch: the first call runs it (libraries set up what they keep), the second captures it, and from
    then on it is replayed. Where it cannot be captured it goes on being run.
    """

    def __init__(self, turn: Callable[[], None]) -> None:
        self.turn, self.settled = turn, False
        self.run: Callable[[], None] | None = None

    def __call__(self) -> None:
        if not self.settled:
            self.settled = True
            self.settle()
            return
        if self.run is None:
            try:
                self.run = self.captured()
            except RuntimeError as error:
                logger.warning("sampling goes on without a CUDA graph: {}", str(error).splitlines()[0])
                self.run = self.turn
        self.run()

    def settle(self) -> None:
        """A turn on a stream aside, as capture asks for."""
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            self.turn()
        here.wait_stream(side)

    def captured(self) -> Callable[[], None]:
        """The turn captured, and not run: what runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.turn()
        return graph.replay


EAGER = Pace(lambda turn: turn, stride=1, static=False)
"""Where a look costs nothing: a row leaves as soon as it has ended."""
LAUNCHED = Pace(lambda turn: turn, stride=16, static=False)
GRAPHS = Pace(Graph, stride=16, static=True)


def pace_of(model: nn.Module) -> Pace:
    """Graphs on a GPU, where all layers keep keys and values and each weight is whole (what is sharded is gathered by
    hooks, which no graph holds).
    """
    if model.device.type != "cuda":
        return EAGER
    kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    return GRAPHS if kinds == {DynamicLayer} and not sharded else LAUNCHED


class Slots:
    """b slots, and what ``total`` rows have written.

    By slot: ``token`` last drawn, its ``position``, how many it has written (``count``), the ``row`` that is in it,
    whether that one goes on (``live``), which columns it has ``seen``. By row: ``out`` and the probability ``p`` of
    each token; the last column of both takes what is drawn for rows that have ended.
    """

    def __init__(self, model: nn.Module, how: Sampling, b: int, total: int, width: int, pace: Pace) -> None:
        self.model, self.how, self.pace, device = model, how, pace, model.device
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.ring = Ring(width + how.max_new, width, pace.static, device)
        self.token, self.position, self.count, self.row = (
            torch.zeros(b, dtype=torch.long, device=device) for _ in range(4)
        )
        self.live = torch.zeros(b, dtype=torch.bool, device=device)
        self.seen = torch.zeros(b, self.ring.size, dtype=torch.bool, device=device)
        self.yes = torch.ones(b, 1, dtype=torch.bool, device=device)
        self.out = torch.full((total, how.max_new + 1), how.pad, device=device)
        self.p = torch.ones(total, how.max_new + 1, device=device)
        self.eos = torch.tensor(how.eos, device=device)
        self.race: Tensor | None = None
        self.home: Tensor | None = None  # a slot's row of race, once slots were forgotten
        self.cache: DynamicCache | None = None
        self.kept, self.joins = cache_name(self.decoder), takes_joiners(model)
        self.rows: list[int | None] = [None] * b  # as of the last look
        self.whole = [False] * b  # whether a slot has seen every column up to the turn's
        self.length = [0] * total
        self.run = pace.repeated(self.turn)

    @property
    def free(self) -> list[int]:
        """Slots whose row had ended at the last look."""
        return [i for i, row in enumerate(self.rows) if row is None]

    def roll(self, dice: torch.Generator) -> None:
        """New random numbers, for as many rows as there were slots at the beginning: what a generator gives does not
        depend on which rows have ended.
        """
        if self.race is not None:
            self.race.exponential_(generator=dice)

    def admit(
        self, slots: Sequence[int], rows: Sequence[int], prompts: Read, sources: Sequence[int], dice: torch.Generator
    ) -> None:
        """Put waiting rows into free slots, each behind its prompt, and draw their first tokens."""
        device, width = self.token.device, prompts.seen.shape[1]
        at, of, which = (torch.tensor(list(x), device=device) for x in (slots, sources, rows))
        if self.race is None and self.how.temperature > 0:
            self.race = torch.empty(len(self.rows), prompts.logits.shape[1], device=device)
        self.fill(at, prompts, of)
        self.seen[at], done = False, 0
        for first, n in self.ring.spans(width):
            self.seen[at, first : first + n] = prompts.seen[of, done : done + n]
            done += n
        self.row[at], self.count[at], self.live[at] = which, 0, True
        self.position[at] = prompts.lengths[of] - 1
        self.roll(dice)
        everywhere = list(slots) == list(range(len(self.rows)))
        race = self.race if self.race is None or everywhere else self.race[at]
        self.write(at, *draw(prompts.logits[of], self.how, race))
        for slot, row, source in zip(slots, rows, sources, strict=True):
            self.rows[slot] = row
            self.whole[slot] = self.ring.at == width == prompts.sizes[source]

    def fill(self, slots: Tensor, prompts: Read, sources: Tensor) -> None:
        """The slots' cache; made of the first prompts that it takes."""
        if self.cache is None:
            b, first = len(self.rows), torch.zeros(len(self.rows), dtype=torch.long, device=slots.device)
            first[slots] = sources
            blank = self.pace.static or len(slots) < b or prompts.seen.shape[1] < self.ring.at
            self.cache = DynamicCache(config=self.model.config.get_text_config())
            self.cache.layers = [
                RingLayer(self.ring, b, layer, blank) if type(layer) is DynamicLayer else reordered(layer, first)
                for layer in prompts.cache.layers
            ]
        for layer, read_layer in zip(self.cache.layers, prompts.cache.layers, strict=True):
            if isinstance(layer, RingLayer):
                layer.put(slots, read_layer, sources)
            elif type(layer) is LinearAttentionLayer:
                put_states(layer, slots, read_layer, sources)

    def write(self, slots: Tensor | slice, token: Tensor, p: Tensor) -> None:
        """Note what was drawn for these slots."""
        count, live, row = self.count[slots], self.live[slots], self.row[slots]
        at = torch.where(live, count, self.how.max_new)
        self.out[row, at], self.p[row, at] = token, p
        count = count + live
        ended = (token[:, None] == self.eos).any(1) | (count == self.how.max_new)
        self.token[slots], self.count[slots], self.live[slots] = token, count, live & ~ended
        self.position[slots] += 1

    def mask(self) -> Tensor | None:
        """What the attention of a turn may look at, as the decoder takes it; None for everything."""
        seen = self.seen[:, : self.ring.limit]
        if not self.joins:
            return seen  # transformers makes the masks of windows itself
        if all(self.whole) and not self.pace.static:
            return None
        return MASKS[self.decoder.config._attn_implementation](seen[:, None, None], self.model.dtype)

    def turn(self) -> None:
        """Feed every slot's last token and draw its next one. It waits for nothing, and what it changes stays where it
        is: see ``Graph``.
        """
        self.ring.write(self.seen, self.yes[: len(self.seen)], 1)
        h = self.decoder(
            input_ids=self.token[:, None],
            attention_mask=self.mask(),
            position_ids=self.position[:, None],
            use_cache=True,
            **{self.kept: self.cache},
        ).last_hidden_state[:, -1]
        self.ring.column.add_(1).remainder_(self.ring.size)
        logits = logits_of(self.head, h)[:, : self.how.vocab].float()
        race = self.race if self.race is None or self.home is None else self.race[self.home]
        self.write(slice(None), *draw(logits, self.how, race))

    def take_turns(self, dice: torch.Generator) -> None:
        """Turns up to the next look, and that look."""
        with decoding_attention(self.model):
            for _ in range(self.pace.stride):
                self.roll(dice)
                self.run()
                self.ring.at += 1
        self.look()

    def look(self) -> None:
        """Ask the device which rows have ended, and how long they are."""
        live, count = torch.stack([self.live.long(), self.count]).tolist()
        for slot in range(len(self.rows)):
            if self.rows[slot] is not None and not live[slot]:
                self.length[self.rows[slot]], self.rows[slot] = count[slot], None

    def shrink(self) -> None:
        """Forget slots that nobody needs: all that are free, or as many as leave half, a quarter … of the slots where
        each size costs a graph.
        """
        going, keep = [i for i, row in enumerate(self.rows) if row is not None], len(self.rows)
        while self.pace.static and keep // 2 >= len(going):
            keep //= 2
        kept = sorted(going + self.free[: keep - len(going)]) if self.pace.static else going
        if len(kept) == len(self.rows):
            return
        at = torch.tensor(kept, device=self.token.device)
        for name in ("token", "position", "count", "row", "live", "seen"):
            setattr(self, name, getattr(self, name)[at])
        self.home = at if self.home is None else self.home[at]
        for layer in self.cache.layers:
            layer.keep(at) if isinstance(layer, RingLayer) else layer.reorder_cache(at)
        self.rows, self.whole = [self.rows[i] for i in kept], [self.whole[i] for i in kept]
        self.run = self.pace.repeated(self.turn)

    def written(self) -> list[Completion]:
        """What every row has written."""
        found = zip(self.out.tolist(), self.p.log().tolist(), self.length, strict=True)
        return [Completion(tuple(ids[:n]), tuple(logp[:n])) for ids, logp, n in found]
