"""Many questions, many answers: scans read once, choices in one pass, reports in a full batch.

A prompt is the same for every question about a scan up to its last visual token: its prefix.

    prefix: [start token] [visual tokens]      its keys and values are kept, scan by scan
    rows:   [padding] [words] [choice A] [choice B] ...     what is computed anew

The columns of a row that stand for padding are seen by nobody, and every position is given, so
it does not matter to the language model where among the columns they stand. A choice sees the
prefix, the words and itself, and its positions follow the words': as if it stood there alone.

Both need a language model whose attention takes such a mask (:func:`shares_prefixes`).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

if TYPE_CHECKING:
    from med3dvlm.models.med3dvlm import Med3DVLM
    from med3dvlm.scan import Scan

T = TypeVar("T")
Watch = Callable[[list[int], list[int]], Collection[int]]
"""Told (texts, their next tokens) at every step; gives the texts that are to end there."""
Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (rows, heads, columns, dim)

COLUMNS_AT_ONCE = 8192  # rows times columns of one scoring pass
LOGITS_AT_ONCE = 2**26  # elements, 256 MB in float32
ROWS_AT_ONCE = 32  # texts written side by side


class Recent(Generic[T]):
    """The values used last, by key; the oldest are forgotten. Copies of it are empty."""

    def __init__(self, size: int):
        self.size = size
        self.kept: OrderedDict[Hashable, T] = OrderedDict()
        self.lock = Lock()

    def get(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """The value of each key; `compute` makes those missing, given their places in `keys`."""
        with self.lock:
            found = {key: self.kept[key] for key in keys if key in self.kept}
        missing: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            if key not in found:
                missing.setdefault(key, place)
        if missing:
            found.update(zip(missing, compute(list(missing.values())), strict=True))
        with self.lock:
            for key in keys:
                self.kept[key] = found[key]
                self.kept.move_to_end(key)
            while len(self.kept) > self.size:
                self.kept.popitem(last=False)
        return [found[key] for key in keys]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)


def state_of(model: Med3DVLM) -> int:
    """Changes with every change of the weights, without reading them."""
    return hash(
        tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in (*model.parameters(), *model.buffers())
        )
    )


def content_of(scan: Scan) -> bytes:
    """A hash of all that preparation looks at."""
    facts = (scan.array.shape, scan.array.dtype.str, scan.spacing_mm, scan.modality, scan.units)
    digest = hashlib.sha256(repr((*facts, scan.orientation)).encode())
    digest.update(np.ascontiguousarray(scan.affine))
    digest.update(np.ascontiguousarray(scan.array))
    return digest.digest()


def shares_prefixes(model: Med3DVLM, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether its language model takes positions and masks as they are given here.

    Rotary positions and full attention in every layer do; layers that look back over a window,
    recurrent ones and attention kernels without masks do not. And there must be words behind
    the prefix: of a one-token question the published layout leaves none.
    """
    text = model.config.text_config
    return (
        not model.training
        and all(len(prompt) > prefix_length(model, prompt) for prompt in prompts)
        and getattr(text, "rope_parameters", None) is not None
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(text, "sliding_window", None) is None
        and model.language_model.config._attn_implementation in ("sdpa", "eager")
    )


# --- what rows are made of --------------------------------------------------------------------


def prefix_length(model: Med3DVLM, prompt: Sequence[int]) -> int:
    """Tokens of a prompt up to and with the last visual token."""
    first = prompt.index(model.config.image_token_id)
    return first + model.num_visual_tokens + (model.config.prompt_layout == "published")


def read_prefixes(model: Med3DVLM, visual: Tensor, prefix: Sequence[int]) -> list[Layers]:
    """Keys and values of the prefix of each row of visual tokens (n, N, width); (1, …) each."""
    known = (state_of(model), tuple(prefix))
    rows = visual.detach().cpu().contiguous().view(torch.uint8).numpy()
    keys = [(*known, hashlib.sha256(row).digest()) for row in rows]

    def compute(places: list[int]) -> list[Layers]:
        cache = DynamicCache()
        model(
            input_ids=torch.tensor([list(prefix)] * len(places), device=visual.device),
            visual_tokens=visual[torch.tensor(places, device=visual.device)],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [
            [(keys[[i]], values[[i]]) for keys, values in map(_content, cache.layers)]
            for i in range(len(places))
        ]

    return model.prefixes.get(keys, compute)


def side_by_side(rows: Sequence[Layers]) -> DynamicCache:
    """One cache of several rows with as many columns."""
    cache = DynamicCache()
    for number in range(len(rows[0])):
        keys, values = (torch.cat([row[number][i] for row in rows]) for i in (0, 1))
        cache.update(keys, values, number)
    return cache


def as_mask(model: Med3DVLM, allowed: Tensor) -> Tensor:
    """(rows, queries, columns) bool to the form that the attention takes."""
    if model.language_model.config._attn_implementation == "sdpa":
        return allowed.unsqueeze(1)
    dtype = model.language_model.dtype  # the encoder may have another
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, lowest).unsqueeze(1)


def left_padded(rows: Sequence[Sequence[int]], value: int, device: Any) -> Tensor:
    """(rows, longest) integers."""
    tensors = [torch.tensor(row) for row in rows]
    padded = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")
    return padded.to(device)


# --- scoring ----------------------------------------------------------------------------------


def score_plainly(
    model: Med3DVLM,
    visual: Tensor,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[Sequence[int]]],
) -> list[Tensor]:
    """What :func:`score` gives, by any language model: a row for each target, prompt by prompt."""
    found = []
    for row, (prompt, of) in enumerate(zip(prompts, targets, strict=True)):
        ids = [torch.tensor([*prompt, *target]) for target in of]
        input_ids = pad_sequence(ids, batch_first=True).to(visual.device)
        lengths = torch.tensor([len(i) for i in ids], device=visual.device)
        columns = torch.arange(input_ids.shape[1], device=visual.device)
        logits = model(
            input_ids=input_ids,
            attention_mask=(columns < lengths[:, None]).long(),
            visual_tokens=visual[row].expand(len(of), -1, -1),
        ).logits
        told = -F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:], reduction="none"
        )
        counted = (columns >= len(prompt)) & (columns < lengths[:, None])
        found.append((told * counted[:, 1:]).sum(1))
    return found


def score(
    model: Med3DVLM,
    visual: Tensor,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[Sequence[int]]],
) -> list[Tensor]:
    """For each prompt the log-likelihoods of its targets, all in as few passes as memory allows.

    Args:
        visual: (n, N, width), one row a prompt.
        prompts: n lists of tokens.
        targets: for each prompt the tokens of each text that may follow, with their end token.
    """
    length = prefix_length(model, prompts[0])
    words = [list(prompt[length:]) for prompt in prompts]
    sizes = [length + len(w) + sum(map(len, of)) for w, of in zip(words, targets, strict=True)]
    kept = max(1 + sum(map(len, of)) for of in targets)
    at_once = min(
        COLUMNS_AT_ONCE // max(sizes),
        LOGITS_AT_ONCE // (kept * model.config.text_config.vocab_size),
    )
    found: list[Tensor] = []
    for first in range(0, len(prompts), max(1, at_once)):
        part = slice(first, first + max(1, at_once))
        found += _score_part(model, visual[part], prompts[0][:length], words[part], targets[part])
    return found


def _score_part(
    model: Med3DVLM,
    visual: Tensor,
    prefix: Sequence[int],
    words: Sequence[list[int]],
    targets: Sequence[Sequence[Sequence[int]]],
) -> list[Tensor]:
    rows, segments, positions = [], [], []
    for asked, of in zip(words, targets, strict=True):
        start = len(prefix) + len(asked)
        rows.append([*asked, *(token for target in of for token in target)])
        segments.append([0] * len(asked) + [k for k, t in enumerate(of, 1) for _ in t])
        positions.append(
            [*range(len(prefix), start), *(start + j for target in of for j in range(len(target)))]
        )
    device = visual.device
    ids = left_padded(rows, 0, device)
    segment = left_padded(segments, -1, device)  # 0: words, k: the k-th target, -1: padding
    columns = ids.shape[1]
    seen, seeing = segment.unsqueeze(1), segment.unsqueeze(2)
    allowed = ((seen == 0) | (seen == seeing)) & (seen >= 0)
    allowed &= torch.ones(columns, columns, dtype=torch.bool, device=device).tril()
    allowed = F.pad(allowed, (len(prefix), 0), value=True)
    kept = max(1 + sum(map(len, of)) for of in targets)
    logits = model(
        input_ids=ids,
        attention_mask=as_mask(model, allowed),
        position_ids=left_padded(positions, 0, device),
        past_key_values=side_by_side(read_prefixes(model, visual, prefix)),
        use_cache=True,
        logits_to_keep=kept,
    ).logits
    # Each target's first token is told by the last word, each other one by the token before it.
    places: list[tuple[int, int, int]] = []  # row, column among those kept, token
    for row, of in enumerate(targets):
        last_word = kept - 1 - sum(map(len, of))
        before = last_word
        for target in of:
            tellers = [last_word, *range(before + 1, before + len(target))]
            places += [(row, t, token) for t, token in zip(tellers, target, strict=True)]
            before += len(target)
    at_row, at_column, token = torch.tensor(places, device=device).T
    offset = logits.shape[1] - kept  # a model may keep them all
    told = -F.cross_entropy(logits[at_row, at_column + offset].float(), token, reduction="none")
    counts = [len(target) for of in targets for target in of]
    sums = torch.stack([of_target.sum() for of_target in told.split(counts)])
    return list(sums.split([len(of) for of in targets]))


# --- writing ----------------------------------------------------------------------------------


@dataclass
class _Text:
    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0


def _content(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that has seen tokens."""
    return layer.keys, layer.values


@dataclass
class _Rows:
    """Texts being written side by side.

    Attributes:
        numbers: which text each row is.
        allowed: (rows, columns) bool, the columns of the cache that stand for tokens.
        position: (rows,) of the next token.
        logits: (rows, vocabulary) of the next token.
    """

    numbers: list[int]
    cache: DynamicCache
    allowed: Tensor
    position: Tensor
    logits: Tensor

    def keep(self, rows: list[int]) -> None:
        """Let the other rows go, and the columns in front that only they needed."""
        chosen = torch.tensor(rows, device=self.allowed.device)
        self.numbers = [self.numbers[row] for row in rows]
        self.allowed, self.position = self.allowed[chosen], self.position[chosen]
        self.logits = self.logits[chosen]
        first = int(self.allowed.any(0).int().argmax()) if rows else 0
        self.allowed = self.allowed[:, first:]
        for layer in self.cache.layers:
            keys, values = _content(layer)
            layer.keys, layer.values = keys[chosen, :, first:], values[chosen, :, first:]

    def join(self, other: _Rows) -> None:
        """Take in other rows; whichever has fewer columns gets empty ones in front."""
        columns = max(self.allowed.shape[1], other.allowed.shape[1])

        def together(a: Tensor, b: Tensor, *, axis: int) -> Tensor:
            behind = (0, 0) * (a.ndim - 1 - axis)
            return torch.cat([F.pad(t, (*behind, columns - t.shape[axis], 0)) for t in (a, b)])

        self.numbers = self.numbers + other.numbers
        self.allowed = together(self.allowed, other.allowed, axis=1)
        self.position = torch.cat([self.position, other.position])
        self.logits = torch.cat([self.logits, other.logits])
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = together(mine.keys, its.keys, axis=2)
            mine.values = together(mine.values, its.values, axis=2)


def write(
    model: Med3DVLM,
    visual: Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: int,
    streamer: Any = None,
    watch: Watch | None = None,
) -> list[tuple[list[int], float]]:
    """Continue each prompt greedily; a row that has ended makes room for the next prompt.

    Args:
        visual: (n, N, width), one row a prompt.
        end: token that ends a text.
        streamer: is fed the prompt and then each token, where there is one prompt.
        watch: follows the texts by their number, and may end them early.

    Returns:
        For each prompt its new tokens and the geometric mean of their probabilities.
    """
    texts = [_Text() for _ in prompts]
    waiting = deque(range(len(prompts)))
    live: _Rows | None = None
    while waiting or live is not None:
        room = ROWS_AT_ONCE - (len(live.numbers) if live is not None else 0)
        if waiting and (live is None or 4 * room >= ROWS_AT_ONCE):
            numbers = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            fresh = _begin(model, visual, prompts, numbers)
            if live is None:
                live = fresh
            else:
                live.join(fresh)
        assert live is not None
        chosen = live.logits.argmax(-1)
        told = -F.cross_entropy(live.logits, chosen, reduction="none")
        going = []
        stopped = watch(live.numbers, chosen.tolist()) if watch is not None else ()
        for row, (number, token, log_probability) in enumerate(
            zip(live.numbers, chosen.tolist(), told.tolist(), strict=True)
        ):
            texts[number].tokens.append(token)
            texts[number].log_probability += log_probability
            full = len(texts[number].tokens) >= max_new_tokens
            if token != end and not full and number not in stopped:
                going.append(row)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if not going:
            live = None
            continue
        if len(going) < len(live.numbers):
            live.keep(going)
            chosen = chosen[torch.tensor(going, device=chosen.device)]
        _step(model, live, chosen)
    return [(t.tokens, math.exp(t.log_probability / len(t.tokens))) for t in texts]


def _begin(
    model: Med3DVLM, visual: Tensor, prompts: Sequence[Sequence[int]], numbers: list[int]
) -> _Rows:
    length = prefix_length(model, prompts[0])
    words = [list(prompts[number][length:]) for number in numbers]
    device = visual.device
    ids = left_padded(words, 0, device)
    is_word = left_padded([[1] * len(row) for row in words], 0, device).bool()
    allowed = F.pad(is_word, (length, 0), value=True)
    columns = ids.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=device).tril()
    counts = is_word.sum(1)
    seen = visual[torch.tensor(numbers, device=device)]
    cache = side_by_side(read_prefixes(model, seen, prompts[0][:length]))
    logits = model(
        input_ids=ids,
        attention_mask=as_mask(
            model, allowed.unsqueeze(1) & F.pad(causal, (length, 0), value=True)
        ),
        position_ids=(length + is_word.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return _Rows(numbers, cache, allowed, length + counts, logits[:, -1].float())


def _step(model: Med3DVLM, live: _Rows, chosen: Tensor) -> None:
    live.allowed = F.pad(live.allowed, (0, 1), value=True)
    live.logits = (
        model(
            input_ids=chosen.unsqueeze(1),
            attention_mask=as_mask(model, live.allowed.unsqueeze(1)),
            position_ids=live.position.unsqueeze(1),
            past_key_values=live.cache,
            use_cache=True,
        )
        .logits[:, -1]
        .float()
    )
    live.position = live.position + 1
