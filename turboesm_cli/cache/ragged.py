"""How many tokens each sequence of a batch holds: what all caches share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from turboesm_kernels.operands import Joint


class Ragged:
    """B sequences, each with tokens of its own number, in memory for `capacity` tokens each.

    A step is: `begin` (how many tokens each sequence gets), then for each layer what stores and reads them.
    `lengths` and `starts` int32 [B] are on the device, for kernels and CUDA graphs; the same numbers are kept on
    the host, so that nothing needs to ask the device. `unmasked` float32 [B, 1, 1] is each prompt's
    `Model.unmasked_fraction`: token dropout's factor stays what it was at prefill.
    """

    lengths: Tensor
    starts: Tensor
    unmasked: Tensor

    fits_a_graph = True
    """Whether a CUDA graph can hold a step."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.unmasked = torch.ones(batch, 1, 1, device=device)
        self._held = np.zeros(batch, dtype=np.int64)
        self._from = np.zeros(batch, dtype=np.int64)

    @property
    def batch(self) -> int:
        """Sequences B."""
        return len(self._held)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._held.max())

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence, before those that are being appended."""
        return int(self._from.min())

    @property
    def fewest(self) -> int:
        """Tokens of the shortest sequence."""
        return int(self._held.min())

    @property
    def is_even(self) -> bool:
        """Whether all sequences hold the same number of tokens."""
        return bool((self._held == self._held[0]).all())

    def begin(self, counts: int | Sequence[int]) -> None:
        """Make room for the next tokens of each sequence. Raises ValueError where they do not fit."""
        more = np.broadcast_to(counts, self.batch)
        longest = int((self._held + more).max())
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit in a cache of {self.capacity}")
        self._from[:] = self._held
        self._held += more
        torch.add(self.lengths, 0, out=self.starts)  # a copy in a CUDA graph is the driver's, and slower
        self.lengths += counts if isinstance(counts, int) else torch.tensor(counts).to(self.lengths)

    def leading(self, length: int) -> dict[str, Tensor]:
        """What the first `length` tokens of each sequence take, by name: views."""
        raise NotImplementedError

    def fill(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Hold what `leading` gave of such a cache, of one sequence for all of these, or of as many."""
        for name, own in self.leading(length).items():
            own.copy_(tensors[name])
        self.truncate(0)
        self.begin(length)

    def append(self, layer: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        """See `forward.Cache`."""
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See `forward.Cache`."""
        raise NotImplementedError

    def append_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """See `forward.Cache`."""
        self.append(layer, k, v, tokens)
        return self.attend(layer, q)

    def takes_joint(self, layer: int) -> bool:
        """See `forward.Cache`."""
        return False

    def append_and_attend_joint(self, layer: int, joint: Joint) -> Tensor:
        """See `forward.Cache`."""
        raise NotImplementedError

    def replayed(self, count: int = 1) -> None:
        """Count on the host what a CUDA graph did on the device: each sequence has `count` tokens more."""
        self._from[:] = self._held
        self._held += count

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.lengths.clamp_(max=length)
        np.minimum(self._held, length, out=self._held)

    def wipe(self, length: int) -> None:
        """Forget all tokens, and leave zeros where each sequence's first `length` were: they may be no numbers."""
        for name, tensor in self.leading(length).items():
            if name != "unmasked":
                tensor.zero_()
        self.truncate(0)

    def rewind(self, count: int = 1) -> None:
        """Forget each sequence's last `count` tokens."""
        self._held -= count
        self.lengths -= count

    def park(self, idle: Sequence[int], length: int) -> None:
        """Keep sequences that nobody uses at `length` tokens, so that steps never fill them."""
        if idle:
            self._held[idle] = length
            self.lengths[torch.tensor(idle, device=self.lengths.device)] = length

    def take(self, other: Self, sequences: Tensor) -> None:
        """Become as long as `sequences` int64 [B] of another cache, or of this one itself, are."""
        index = sequences.cpu().numpy()
        self._held[:], self._from[:] = other._held[index], other._from[index]
        for own, theirs in ((self.lengths, other.lengths), (self.starts, other.starts)):
            own.copy_(theirs.index_select(0, sequences))

    def rows(self, start: int, stop: int) -> Self:
        """Sequences start..stop - 1: a view of the same memory; of all of them, this cache itself."""
        if (start, stop) == (0, self.batch):
            return self
        part = copy.copy(self)
        for name in ("lengths", "starts", "unmasked", "_held", "_from"):
            setattr(part, name, getattr(self, name)[start:stop])
        return part

    def common_start(self) -> int:
        """Where the tokens that are being appended start, the same for all. Raises ValueError where it is not."""
        start = int(self._from[0])
        if not bool((self._from == start).all()):
            raise ValueError("several tokens at once need sequences of one length")
        return start
