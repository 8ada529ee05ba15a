"""Multipliers of a radius or a learning rate at step t of T, with floor h.

    constant         1
    linear           1 - t (1 - h) / T                                            thesis Eq. 4.1
    cosine           h + (1 - h) (1 + cos(pi t / T)) / 2                          Loshchilov & Hutter 2017, Eq. 5
    cosine_restarts  the cosine run `cycles` times, each over T / cycles steps    (the same, equal cycles)
    warmup           (t + 1) / w in the first w steps, then the schedule over the remaining T - w

Reads the source as: a cycle may have a fractional length (T_cur / T_i of the paper is a real number), and a step on
which a cycle begins is at 1. t = T, which no training step reaches, is the end of the last cycle: h.
"""

from __future__ import annotations

import math


def constant(t: int, total: int) -> float:
    return 1.0


def linear(t: int, total: int, h: float = 0.0) -> float:
    return 1.0 - t * (1.0 - h) / total


def cosine(t: int, total: int, h: float = 0.0) -> float:
    return h + (1.0 - h) * (1.0 + math.cos(math.pi * t / total)) / 2.0


def cosine_restarts(t: int, total: int, h: float = 0.0, cycles: int = 1) -> float:
    if t >= total:
        return h
    part = (t * cycles) % total  # in integers: no cycle begins a step late by rounding
    return cosine(part, total, h)


def warmup(schedule, t: int, total: int, w: int, **options) -> float:
    if t < w:
        return (t + 1) / w
    return schedule(t - w, total - w, **options)
