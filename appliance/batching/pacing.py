"""How many prefill tokens a step may carry beside decodes, so that running answers do not stutter when prompts arrive.

Knows numbers of tokens and how long steps took. Which prefill gets the tokens is `fairness.py`'s business.

Policy: a step with decodes takes at most `max_stretch` times as long as the same step without prefill. With 2, prefill
has half of the time while anything decodes, and the gap between two tokens of an answer is at most doubled. A burst,
more than 16 sequences waiting for their prefill, gets more the larger it is beside the decodes: few answers stutter
for a while, many begin earlier, and the batch is full sooner, which throughput lives on. Without decodes there is no
limit. Simulated on an H200's step times, 256 requests of 1024/1024 at once take 2% longer than without any limit.

Prediction: seconds = decode(number of decodes) + [any prefill] * (overhead + per_token * prefill tokens). `decode` is a
running mean for each power of two, measured by steps without prefill (where there were none, what the rest of the
formula leaves of mixed steps). `overhead` (a mixed step may lack what makes decode steps fast, such as CUDA graphs) and
`per_token` are a least-squares line through recent mixed steps. Everything is learned while serving: until a step
without prefill was seen there is no limit.

An overhead that is larger than the time allowed cannot be paid off with smaller chunks, which would only make more
mixed steps. So a chunk is at least so long that its own work takes as long as the overhead.
"""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.2  # of a new sample in a mean of decode steps
_MEMORY = 0.95  # of the sums behind the line: about the last 20 mixed steps count
_FIRST_CHUNK = (64, 512)  # tokens: bounds of the first chunk, before any mixed step was seen
_TELLING = 64  # tokens of a step without decodes, from which on its time is mostly theirs and not the weights'
_SMALLEST_CHUNK = 16  # tokens
_BURST = 16  # sequences that wait for their prefill; as many as decode have the same right to the time
_MAX_URGENCY = 8.0  # of one sequence in a large burst against one that decodes
_SPREAD = 0.2  # standard deviation of chunk lengths over their mean, from which on a slope can be trusted


@dataclass(slots=True)
class _DecodeTime:
    seconds: float
    measured: bool  # by a step without prefill; else inferred from mixed ones


class _Line:
    """seconds = overhead + per_token * tokens through recent samples, with overhead >= 0 and per_token > 0."""

    def __init__(self) -> None:
        self.known = False
        self.overhead = 0.0
        self.per_token = 0.0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._n = self._n * _MEMORY + 1.0
        self._x = self._x * _MEMORY + tokens
        self._y = self._y * _MEMORY + seconds
        self._xx = self._xx * _MEMORY + tokens * tokens
        self._xy = self._xy * _MEMORY + tokens * seconds
        self._fit()

    def _fit(self) -> None:
        x, y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - x * x
        steepest = y / x  # without any overhead
        if variance > (_SPREAD * x) ** 2:
            slope = (self._xy / self._n - x * y) / variance
        else:  # all of about one length: nothing new on how the time is made up
            slope = self.per_token if self.known else steepest
        # Noise may turn the line: no more than three quarters of a usual chunk's time is taken for overhead.
        self.per_token = max(min(slope, steepest), steepest / 4, 1e-9)
        self.overhead = max(0.0, y - self.per_token * x)
        self.known = True


class PrefillPacer:
    """`limit` before each step, `observe` after it."""

    def __init__(self, max_stretch: float) -> None:
        """`max_stretch`: how many times longer prefill may make a step with decodes; more than 1."""
        if max_stretch <= 1.0:
            raise ValueError(f"max_stretch is {max_stretch}; it must be more than 1")
        self._allowed = max_stretch - 1.0
        self._decode: dict[int, _DecodeTime] = {}  # by bit length of the number of decodes
        self._line = _Line()
        # Of one token in steps without decodes, weights and all: the least seen. Only for the first chunk.
        self._prefill_seconds: float | None = None

    def limit(self, num_decodes: int, num_prefills: int) -> int | None:
        """Prefill tokens that the next step may run at most; None: any number. `num_prefills`: sequences that could run
        some."""
        decode = self._decode_seconds(num_decodes)
        if decode is None:
            return None
        pressure = max(1.0, num_prefills / num_decodes * min(num_prefills / _BURST, _MAX_URGENCY))
        line = self._line
        allowed = self._allowed * decode * pressure
        if not line.known:
            least, most = _FIRST_CHUNK
            guess = most * pressure
            if self._prefill_seconds is not None:
                guess = min(guess, allowed / self._prefill_seconds)
            return int(max(least, guess))
        tokens = max(allowed - line.overhead, line.overhead) / line.per_token
        return max(_SMALLEST_CHUNK, int(tokens))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """How long a step took."""
        if seconds <= 0.0:
            return
        if num_decodes == 0:
            if num_prefill_tokens >= _TELLING:
                each = seconds / num_prefill_tokens
                self._prefill_seconds = min(each, self._prefill_seconds or each)
            return
        bucket = num_decodes.bit_length()
        known = self._decode.get(bucket)
        if num_prefill_tokens == 0:
            if known is None or not known.measured:
                self._decode[bucket] = _DecodeTime(seconds, True)
            else:
                _move(known, seconds)
            return
        if known is not None and known.measured:
            self._line.add(num_prefill_tokens, max(0.0, seconds - known.seconds))
        elif self._line.known:
            rest = seconds - self._line.overhead - self._line.per_token * num_prefill_tokens
            rest = max(rest, self._decode_seconds_below(bucket))
            if known is None and rest > 0.0:
                self._decode[bucket] = _DecodeTime(rest, False)
            elif known is not None:
                _move(known, rest)
        elif (decode := self._decode_seconds(num_decodes)) is not None:
            self._line.add(num_prefill_tokens, max(0.0, seconds - decode))

    def _decode_seconds(self, num_decodes: int) -> float | None:
        """Of the nearest number of decodes that was seen, the smaller of two."""
        if num_decodes == 0 or not self._decode:
            return None
        bucket = num_decodes.bit_length()
        nearest = min(self._decode, key=lambda other: (abs(other - bucket), other))
        return self._decode[nearest].seconds

    def _decode_seconds_below(self, bucket: int) -> float:
        """More decodes do not take less time."""
        return max((time.seconds for other, time in self._decode.items() if other < bucket), default=0.0)


def _move(mean: _DecodeTime, seconds: float) -> None:
    """Towards a new sample. One that is far off counts as half or double: the odd long step is no new rule."""
    sample = min(max(seconds, mean.seconds / 2), mean.seconds * 2)
    mean.seconds += _WEIGHT * (sample - mean.seconds)
