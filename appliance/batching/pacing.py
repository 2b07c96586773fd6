"""How many prefill tokens a step may carry beside decodes, so that running answers do not stutter when prompts arrive.

Knows numbers of tokens and how long steps took. Which prefill gets the tokens is `fairness.py`'s business.

Policy: a step with decodes takes at most `max_stretch` times as long as the same step without prefill. With 2, prefill
has half of the time while anything decodes, and the gap between two tokens of an answer is at most doubled. A burst,
more than 16 sequences waiting for their prefill, gets more the larger it is beside the decodes: few answers stutter
for a while, many begin earlier, and the batch is full sooner, which throughput lives on. Without decodes there is no
limit. Simulated on an H200's step times, 256 requests of 1024/1024 at once take 2% longer than without any limit.

Prediction: seconds = decode(number of decodes) + [any prefill] * (overhead + per_token * prefill tokens + per_pair *
pairs of a prefill token and one before it, which attention looks at). `decode` is a running mean for each power of two,
measured by steps without prefill (where there were none, what the rest of the formula leaves of mixed steps).
`overhead` (a mixed step may lack what makes decode steps fast, such as CUDA graphs), `per_token` and `per_pair` are a
least-squares plane through recent mixed steps. Everything is learned while serving: until a step without prefill was
seen there is no limit. On an H200 the last tokens of an 8192-token prompt take twice as long as its first ones.

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
_SPREAD = 0.2  # standard deviation of a variable over its mean, from which on its slope can be trusted
_MOST_PAIRS = 0.75  # of a usual chunk's time that can be put down to its pairs


@dataclass(slots=True)
class _DecodeTime:
    seconds: float
    measured: bool  # by a step without prefill; else inferred from mixed ones


class _Plane:
    """seconds = overhead + per_token * tokens + per_pair * pairs through recent samples, with overhead >= 0,
    per_token > 0 and per_pair >= 0."""

    def __init__(self) -> None:
        self.known = False
        self.overhead = 0.0
        self.per_token = 0.0
        self.per_pair = 0.0
        self._n = 0.0
        self._sums = [0.0] * 3  # tokens (x), pairs (z), seconds (y)
        self._products = [0.0] * 5  # xx, xz, zz, xy, zy

    def add(self, tokens: int, pairs: float, seconds: float) -> None:
        self._n = self._n * _MEMORY + 1.0
        sample = (tokens, pairs, seconds)
        products = (tokens * tokens, tokens * pairs, pairs * pairs, tokens * seconds, pairs * seconds)
        self._sums = [old * _MEMORY + new for old, new in zip(self._sums, sample)]
        self._products = [old * _MEMORY + new for old, new in zip(self._products, products)]
        self._fit()

    def seconds(self, tokens: int, pairs: float) -> float:
        return self.overhead + self.per_token * tokens + self.per_pair * pairs

    def tokens(self, seconds: float, context: int) -> float:
        """Of a chunk behind `context` tokens that takes so long besides the overhead."""
        first = seconds / (self.per_token + self.per_pair * context)
        return seconds / (self.per_token + self.per_pair * (context + first / 2))

    def _fit(self) -> None:
        x, z, y = (total / self._n for total in self._sums)
        means = (x * x, x * z, z * z, x * y, z * y)
        xx, xz, zz, xy, zy = (total / self._n - mean for total, mean in zip(self._products, means))
        varied = xx > (_SPREAD * x) ** 2  # else all are of about one length
        slope = self.per_token if self.known else y / x
        own = zz - xz * xz / xx if varied else zz  # what the lengths do not explain of the pairs
        if z > 0.0 and own > (_SPREAD * z) ** 2:
            found = (zy - xz * xy / xx if varied else zy - slope * xz) / own
            self.per_pair = max(0.0, min(found, _MOST_PAIRS * y / z))
        y -= self.per_pair * z
        steepest = max(y, 0.0) / x  # without any overhead
        if varied:
            slope = (xy - self.per_pair * xz) / xx
        elif not self.known:
            slope = steepest
        # Noise may turn the plane: no more than three quarters of a usual chunk's time is taken for overhead.
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
        self._plane = _Plane()
        # Of one token in steps without decodes, weights and all: the least seen. Only for the first chunk.
        self._prefill_seconds: float | None = None

    def limit(self, num_decodes: int, num_prefills: int, context: int = 0) -> int | None:
        """Prefill tokens that the next step may run at most; None: any number. `num_prefills`: sequences that could run
        some; `context`: tokens of the first of them that have been run."""
        decode = self._decode_seconds(num_decodes)
        if decode is None:
            return None
        pressure = max(1.0, num_prefills / num_decodes * min(num_prefills / _BURST, _MAX_URGENCY))
        allowed = self._allowed * decode * pressure
        if not self._plane.known:
            least, most = _FIRST_CHUNK
            guess = most * pressure
            if self._prefill_seconds is not None:
                guess = min(guess, allowed / self._prefill_seconds)
            return int(max(least, guess))
        overhead = self._plane.overhead
        return max(_SMALLEST_CHUNK, int(self._plane.tokens(max(allowed - overhead, overhead), context)))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float, prefill_pairs: float = 0.0) -> None:
        """How long a step took. `prefill_pairs`: of each of its prefill tokens and each token that it attends to."""
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
            self._plane.add(num_prefill_tokens, prefill_pairs, max(0.0, seconds - known.seconds))
        elif self._plane.known:
            rest = seconds - self._plane.seconds(num_prefill_tokens, prefill_pairs)
            rest = max(rest, self._decode_seconds_below(bucket))
            if known is None and rest > 0.0:
                self._decode[bucket] = _DecodeTime(rest, False)
            elif known is not None:
                _move(known, rest)
        elif (decode := self._decode_seconds(num_decodes)) is not None:
            self._plane.add(num_prefill_tokens, prefill_pairs, max(0.0, seconds - decode))

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
