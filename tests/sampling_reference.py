"""The random stream of sampling in plain Python: what the kernel and the sampler are compared with."""

from __future__ import annotations

import math


def reference_mix(h):
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def reference_noise(seed, position, token):
    key = reference_mix(reference_mix(seed % 2**32 ^ 0x9E3779B9) ^ (seed >> 32) % 2**32)
    key = reference_mix(key ^ position)
    bits = reference_mix(reference_mix((token * 0x9E3779B9 + key) % 2**32) ^ reference_mix(key ^ 0x6A09E667))
    return -math.log1p(-(bits + 0.5) / 2**32)
