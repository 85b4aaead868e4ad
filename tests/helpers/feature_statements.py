"""The losses on features stated once more, in plain Python on nested lists of floats.

A statement takes the lists of feature maps of student and teacher. Most losses read one map of each.
"""

import itertools
import math

import numpy as np

from tests.helpers.features import (
    Nested,
    at_one_size,
    averaged,
    direction,
    dot,
    flat,
    mean,
    mean_square,
    minus,
    smaller,
)

VARIANCE = [0.25, 2.0, 5.0]
MARGIN = [-0.5, -0.125, -1.5]


def fitnet(student: Nested, teacher: Nested) -> float:
    return mean_square(student[0], teacher[0])


def simkd(student: Nested, teacher: Nested) -> float:
    return mean_square(*at_one_size(student[0], teacher[0]))


def at(student: Nested, teacher: Nested) -> float:
    def attention(sample: Nested) -> list[float]:
        return direction([math.fsum(x * x for x in pixel) for pixel in zip(*map(flat, sample), strict=True)])

    pairs = zip(*at_one_size(student[0], teacher[0]), strict=True)
    return mean((a - b) ** 2 for s, t in pairs for a, b in zip(attention(s), attention(t), strict=True))


def sp(student: Nested, teacher: Nested) -> float:
    def rows(features: Nested) -> list[float]:
        samples = [flat(sample) for sample in features]
        return [x for a in samples for x in direction([dot(a, b) for b in samples])]

    return mean_square(rows(student[0]), rows(teacher[0]))


def cc(student: Nested, teacher: Nested) -> float:
    apart = [[abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student[0], teacher[0], strict=True)]
    return mean(dot(apart[i], apart[i + 1]) for i in range(len(apart) - 1))


def vid(guess: Nested, teacher: Nested) -> float:
    return mean(
        ((b - a) ** 2 / v + math.log(v)) / 2
        for s, t in zip(guess[0], teacher[0], strict=True)
        for c, d, v in zip(s, t, VARIANCE, strict=True)
        for a, b in zip(flat(c), flat(d), strict=True)
    )


def huber(a: float) -> float:
    return a * a / 2 if abs(a) < 1 else abs(a) - 1 / 2


def rkd_distance(student: Nested, teacher: Nested) -> float:
    def distances(x: Nested) -> list[float]:
        found = {(i, j): math.dist(x[i], x[j]) for i in range(len(x)) for j in range(len(x))}
        unit_of_length = mean(d for (i, j), d in found.items() if i != j)
        return [d / unit_of_length for d in found.values()]

    return mean(map(huber, minus(distances(student[0]), distances(teacher[0]))))


def rkd_angle(student: Nested, teacher: Nested) -> float:
    def cosine(x: Nested, i: int, j: int, k: int) -> float:
        return 0.0 if j in (i, k) else dot(direction(minus(x[i], x[j])), direction(minus(x[k], x[j])))

    count = range(len(student[0]))
    triples = [(i, j, k) for i in count for j in count for k in count]
    return mean(huber(cosine(student[0], *triple) - cosine(teacher[0], *triple)) for triple in triples)


def pkt(student: Nested, teacher: Nested) -> float:
    def rows(x: Nested) -> list[float]:
        kernel = [[(1 + dot(direction(a), direction(b))) / 2 for b in x] for a in x]
        return [k / math.fsum(row) for row in kernel for k in row]

    pairs = zip(rows(student[0]), rows(teacher[0]), strict=True)
    return mean(q * math.log((q + 1e-7) / (p + 1e-7)) for p, q in pairs)


def nst(student: Nested, teacher: Nested) -> float:
    def kernel(x: Nested, y: Nested) -> float:
        return mean(dot(direction(flat(a)), direction(flat(b))) ** 2 for a in x for b in y)

    pairs = zip(*at_one_size(student[0], teacher[0]), strict=True)
    return mean(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in pairs)


def ofd(student: Nested, teacher: Nested) -> float:
    def distance(s: float, t: float, margin: float) -> float:
        target = max(t, margin)
        return 0 if s <= target <= 0 else (target - s) ** 2

    return math.fsum(
        distance(a, b, margin)
        for s, t in zip(student[0], teacher[0], strict=True)
        for c, d, margin in zip(s, t, MARGIN, strict=True)
        for a, b in zip(flat(c), flat(d), strict=True)
    ) / len(student[0])


def ab(student: Nested, teacher: Nested) -> float:
    pairs = zip(flat(student), flat(teacher), strict=True)
    return math.fsum(max(0, 1 - s if t > 0 else 1 + s) ** 2 for s, t in pairs) / len(student[0])


def fsp(student: Nested, teacher: Nested) -> float:
    def matrix(first: Nested, last: Nested) -> list[float]:
        (first,), (last,) = at_one_size([first], [last])
        return [mean(a * b for a, b in zip(flat(c), flat(d), strict=True)) for c in first for d in last]

    def block(features: Nested, i: int, sample: int) -> list[float]:
        return matrix(features[i][sample], features[i + 1][sample])

    samples = range(len(student[0]))
    blocks = range(len(student) - 1)
    return math.fsum(mean(mean_square(block(student, i, s), block(teacher, i, s)) for s in samples) for i in blocks)


def ft(student: Nested, teacher: Nested, whole: bool) -> float:
    def factor(sample: Nested) -> list[float]:
        channels = [flat(channel) for channel in sample]
        x = flat(channels) if whole else [mean(a * a for a in pixel) for pixel in zip(*channels, strict=True)]
        return direction(x)

    pairs = zip(*at_one_size(student[0], teacher[0]), strict=True)
    return mean(abs(a - b) for s, t in pairs for a, b in zip(factor(s), factor(t), strict=True))


def singular(sample: Nested, n: int) -> tuple[list[list[float]], list[float]]:
    """The first n right singular vectors and values of a sample's features as pixels by channels, or fewer."""
    pixels = np.array([flat(channel) for channel in sample]).T
    n = min(n, *pixels.shape)
    squares, found = np.linalg.eigh(pixels.T @ pixels)
    return found.T[::-1][:n].tolist(), np.sqrt(squares[::-1][:n].clip(0)).tolist()


def aligned_vectors(student: Nested, teacher: Nested, count: int) -> list[list[list[float]]]:
    """The weighted vectors of one stage of a sample, of student and teacher."""
    candidates, _ = singular(student, count + 3)
    targets, values = singular(teacher, count)
    targets = [[x * (1 if sum(v) >= 0 else -1) for x in v] for v in targets]
    aligned = []
    for target in targets:
        cosines = [dot(candidate, target) for candidate in candidates]
        best = max(range(len(cosines)), key=[abs(cosine) for cosine in cosines].__getitem__)
        aligned.append([math.copysign(1, cosines[best]) * x for x in candidates[best]])
    shares = direction(values)
    return [[[x * w for x in v] for v, w in zip(vectors, shares, strict=True)] for vectors in (aligned, targets)]


def kdsvd(student: Nested, teacher: Nested, count: int) -> float:
    def relations(later: list[float], earlier: list[float]) -> list[float]:
        return [math.exp(-((a - b) ** 2) / 8) for a in later for b in earlier]

    total = 0.0
    for sample in range(len(student[0])):
        stages = [aligned_vectors(s[sample], t[sample], count) for s, t in zip(student, teacher, strict=True)]
        for (s0, t0), (s1, t1) in itertools.pairwise(stages):
            for k in range(count):
                apart = minus(relations(s1[k], s0[k]), relations(t1[k], t0[k]))
                total += dot(apart, apart)
    return total / len(student[0])


def contrast(student: Nested, teacher: Nested, negatives: Nested, temperature: float, mean_e: float) -> float:
    """Equations 18 and 19 of CRD, with the mean of e in place of 1 / M, as in RepDistiller."""
    total = 0.0
    for s, t in zip(student[0], teacher[0], strict=True):
        e, *others = (math.exp(dot(direction(s), direction(x)) / temperature) for x in (t, *negatives))
        noise = len(negatives) * mean_e
        total -= math.log(e / (e + noise)) + math.fsum(math.log(1 - x / (x + noise)) for x in others)
    return total / len(student[0])


def catkd(student: Nested, teacher: Nested, weights: tuple[Nested, Nested], size: int, normalize: bool) -> float:
    """CAT-KD's loss. `weights` are the weights of both classifiers, [classes][D]."""
    found = []
    for maps, weight in zip((student[0], teacher[0]), weights, strict=True):
        of_all = []
        for sample in maps:
            pixels = range(len(sample[0]))
            for row in weight:
                cam = [[dot(row, [channel[i][j] for channel in sample]) for j in pixels] for i in pixels]
                pooled = flat(averaged(cam, size))
                of_all.append(direction(pooled) if normalize else pooled)
        found.append(of_all)
    return mean_square(*found)


def context(student: Nested, teacher: Nested) -> float:
    """ReviewKD's loss of one level."""
    student, teacher = student[0], teacher[0]
    height, total, weight, share = len(student[0][0]), mean_square(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size < height:
            share /= 2
            total += share * mean_square(smaller(student, size), smaller(teacher, size))
            weight += share
    return total / weight
