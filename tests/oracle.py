"""The definitions in plain float64 loops over pixels; shares no code with the package, nor any of torch."""

import math

import numpy as np


def resize_bilinear(z, height, width, align_corners=False):
    """Bilinear resize of (C, h, w) to (C, height, width), from the definition of the sampling grid."""
    channels, h, w = z.shape
    out = np.empty((channels, height, width))

    def source(i, size, new):
        if align_corners:
            x = i * (size - 1) / (new - 1) if new > 1 else 0.0
        else:
            x = max((i + 0.5) * size / new - 0.5, 0.0)
        low = min(math.floor(x), size - 1)
        return low, min(low + 1, size - 1), x - low

    for i in range(height):
        i0, i1, u = source(i, h, height)
        for j in range(width):
            j0, j1, v = source(j, w, width)
            top = z[:, i0, j0] * (1 - v) + z[:, i0, j1] * v
            bottom = z[:, i1, j0] * (1 - v) + z[:, i1, j1] * v
            out[:, i, j] = top * (1 - u) + bottom * u
    return out


def softmax(z):
    top = max(z)
    e = [math.exp(x - top) for x in z]
    total = sum(e)
    return [x / total for x in e], [x - top - math.log(total) for x in z]


def soft_stats(
    logits,
    target,
    *,
    pixel_weight=None,
    ignore_index=255,
    logit_bias=None,
    focal_gamma=0.0,
    square_prediction=False,
    group=None,
    num_groups=0,
    marked=None,
    align_corners=False,
):
    """Dict of every field of SoftStats as float64 arrays, from arrays (B, C, h, w) and (B, H, W)."""
    batch, channels = logits.shape[:2]
    height, width = target.shape[1:]
    names = ('nll', 'intersection', 'prediction', 'truth', 'log_prob', 'class_correct', 'class_count')
    names += ('marked_intersection', 'marked_truth')
    sums = {name: np.zeros((batch, channels)) for name in names}
    sums['correct'] = np.zeros(batch)
    sums['group_nll'], sums['group_count'] = np.zeros(num_groups), np.zeros(num_groups)
    for b in range(batch):
        z = resize_bilinear(logits[b].astype(np.float64), height, width, align_corners)
        for i in range(height):
            for j in range(width):
                y = int(target[b, i, j])
                if y == ignore_index:
                    continue
                m = 1.0 if pixel_weight is None else float(pixel_weight[b, i, j])
                pixel = [z[c, i, j] + (0 if logit_bias is None else logit_bias[c]) for c in range(channels)]
                p, log_p = softmax(pixel)
                sums['nll'][b, y] += -m * (1 - p[y]) ** focal_gamma * log_p[y]
                sums['intersection'][b, y] += m * p[y]
                sums['truth'][b, y] += m
                if marked is not None and marked[b, i, j]:
                    sums['marked_intersection'][b, y] += m * p[y]
                    sums['marked_truth'][b, y] += m
                right = pixel.index(max(pixel)) == y
                sums['correct'][b] += right
                sums['class_correct'][b, y] += right
                sums['class_count'][b, y] += 1
                for c in range(channels):
                    sums['prediction'][b, c] += m * p[c] ** (2 if square_prediction else 1)
                    sums['log_prob'][b, c] += m * log_p[c]
                if group is not None:
                    sums['group_nll'][int(group[b, i, j])] += -log_p[y]
                    sums['group_count'][int(group[b, i, j])] += 1
    return sums


def cross_entropy(sums, weight, label_smoothing=0.0):
    """Weighted mean over pixels, PyTorch's label smoothing, from the oracle's sums."""
    batch, channels = sums['nll'].shape
    value = norm = 0.0
    for b in range(batch):
        for c in range(channels):
            value += (1 - label_smoothing) * weight[c] * sums['nll'][b, c]
            value -= label_smoothing / channels * weight[c] * sums['log_prob'][b, c]
            norm += weight[c] * sums['truth'][b, c]
    return value / norm if norm else 0.0


def recall_cross_entropy(batches, weight, momentum=1.0):
    """Of the last batch: class c weighs the part of it that is missed, by shares averaged over batches."""
    channels = len(weight)
    right, share = [0.0] * channels, [0.0] * channels
    for sums in batches:
        valid = sum(sums['class_count'][b][c] for b in range(len(sums['nll'])) for c in range(channels))
        for c in range(channels):
            hit = sum(image[c] for image in sums['class_correct'])
            count = sum(image[c] for image in sums['class_count'])
            right[c] = (1 - momentum) * right[c] + momentum * (hit / valid if valid else 0.0)
            share[c] = (1 - momentum) * share[c] + momentum * (count / valid if valid else 0.0)
    value = norm = 0.0
    for nll, truth in zip(batches[-1]['nll'], batches[-1]['truth'], strict=True):
        for c in range(channels):
            missed = 1 - right[c] / share[c] if share[c] else 0.0
            value += weight[c] * missed * nll[c]
            norm += weight[c] * truth[c]
    return value / norm if norm else 0.0


def region_loss(sums, weight, alpha, beta, smooth, gamma=1.0, reduction='image', absent='include'):
    """Mean over images of the weighted mean over classes of (1 - Tversky index)^gamma."""
    keys = ('intersection', 'prediction', 'truth')
    images = [{k: sums[k][b] for k in keys} for b in range(len(sums['truth']))]
    if reduction == 'batch':
        images = [{k: sum(image[k] for image in images) for k in keys}]
    total = 0.0
    for image in images:
        value = norm = 0.0
        for c, w in enumerate(weight):
            hit, area, truth = (image[k][c] for k in keys)
            if absent == 'ignore' and truth == 0:
                continue
            low = hit + alpha * (area - hit) + beta * (truth - hit) + smooth
            index = (hit + smooth) / low if low > 0 else 1.0
            value += w * (1 - index) ** gamma
            norm += w
        total += value / norm if norm else 0.0
    return total / len(images)


def generalized_dice(sums, weight=None, smooth=0.0, reduction='image', absent='include'):
    """Mean over images of Sudre's ratio, one minus; weights over their truth-weighted mean."""
    keys = ('intersection', 'prediction', 'truth')
    images = [{k: sums[k][b] for k in keys} for b in range(len(sums['truth']))]
    if reduction == 'batch':
        images = [{k: sum(image[k] for image in images) for k in keys}]
    total = 0.0
    for image in images:
        hit, area, truth = (image[k] for k in keys)
        w = list(weight) if weight is not None else [t**-2 if t else None for t in truth]
        largest = max((x for x in w if x is not None), default=0.0)
        w = [largest if x is None else x for x in w]
        if absent == 'ignore':
            w = [x if t else 0.0 for x, t in zip(w, truth, strict=True)]
        mean = sum(x * t for x, t in zip(w, truth, strict=True)) / sum(truth) if sum(truth) else 0.0
        w = [x / mean if mean else 0.0 for x in w]
        over = 2 * sum(x * i for x, i in zip(w, hit, strict=True)) + smooth
        under = sum(x * (p + t) for x, p, t in zip(w, area, truth, strict=True)) + smooth
        total += 1 - (over / under if under else 1.0)
    return total / len(images)


def nearest(i, size, new):
    """The cell that resizing from ``size`` to ``new`` by nearest neighbour takes for i."""
    return min(i * size // new, size - 1)


def log_p(z):
    return softmax(z)[1]


class Subclasses:
    """The subclass state of the whole batch, walked pixel by pixel on features resized to the label.

    Random numbers in [0, 1) come from ``draw_cells(iteration, image, cells)`` and ``draw_seeds(iteration,
    each, sets, starts, candidates)``.
    """

    STARTS, CANDIDATES, ROUNDS, CELLS = 4, 8, 10, 256

    def __init__(
        self, number, draw_cells, draw_seeds, *, update, momentum, update_freq, reservoir_size, a, b, warmup,
        ramp, max_ratio, min_share, normalize,
    ):  # fmt: skip
        self.number = number  # K_c of each class
        self.draw_cells, self.draw_seeds = draw_cells, draw_seeds
        self.update, self.momentum, self.freq, self.size = update, momentum, update_freq, reservoir_size
        self.a, self.b, self.warmup, self.ramp = a, b, warmup, ramp
        self.max_ratio, self.min_share, self.normalize = max_ratio, min_share, normalize
        self.iteration = 0
        self.state = [{} for _ in number]  # of each class: subclass -> centroid, pixels, loss, starved
        self.reservoir = [[None] * reservoir_size for _ in number]

    def vector(self, features, image, i, j):
        f = [float(x) for x in features[image, :, i, j]]
        length = math.sqrt(sum(x * x for x in f)) if self.normalize else 1.0
        return [x / length for x in f]

    def closest(self, f, c):
        """The subclass of class c whose centroid is nearest; 0 if there is none."""
        parts = self.state[c]
        if not parts:
            return 0
        return min(
            parts, key=lambda k: (sum((x - y) ** 2 for x, y in zip(f, parts[k]['centroid'], strict=True)), k)
        )

    def weights(self, c):
        parts = self.state[c]
        total = sum(part['pixels'] for part in parts.values())
        share = {k: part['pixels'] / total for k, part in parts.items()}
        grown = min(max((self.iteration - self.warmup) / max(self.ramp, 1), 0.0), 1.0)
        w = {
            k: share[k] ** -self.a * max(part['loss'] / part['pixels'], 1e-6) ** (self.b * grown)
            for k, part in parts.items()
        }
        w = {k: x / sum(share[t] * w[t] for t in w) for k, x in w.items()}
        if self.max_ratio is not None:
            most = math.sqrt(self.max_ratio)
            w = {k: min(max(x, 1 / most), most) for k, x in w.items()}
            w = {k: x / sum(share[t] * w[t] for t in w) for k, x in w.items()}
        return w

    def step(self, features, logits, target, class_weight, ignore_index=255):
        """(loss, subclass of every pixel with -1 for ignored ones, its weight); the state learns."""
        batch, height, width = target.shape
        h, w = features.shape[2:]
        weights = [self.weights(c) for c in range(len(self.number))]
        chosen = np.full(target.shape, -1)
        pixel_weight = np.zeros(target.shape)
        pixels, losses, sums = {}, {}, {}
        members = {}  # (class, image, cell) -> pixels
        value = norm = 0.0
        for b in range(batch):
            z = resize_bilinear(logits[b], height, width)
            for i in range(height):
                for j in range(width):
                    c = int(target[b, i, j])
                    if c == ignore_index:
                        continue
                    cell = nearest(i, h, height), nearest(j, w, width)
                    f = self.vector(features, b, *cell)
                    k = self.closest(f, c)
                    chosen[b, i, j] = k
                    pixel_weight[b, i, j] = m = weights[c].get(k, 1.0)
                    nll = -log_p([float(x) for x in z[:, i, j]])[c]
                    value += class_weight[c] * m * nll
                    norm += class_weight[c] * m
                    pixels[c, k] = pixels.get((c, k), 0) + 1
                    losses[c, k] = losses.get((c, k), 0.0) + nll
                    sums[c, k] = [x + y for x, y in zip(sums.get((c, k), [0.0] * len(f)), f, strict=True)]
                    members[c, b, cell] = members.get((c, b, cell), 0) + 1
        self.learn(pixels, losses, sums, members, features, logits)
        return value / norm, chosen, pixel_weight

    def learn(self, pixels, losses, sums, members, features, logits):
        g = self.momentum
        present = sorted({c for c, _ in pixels})
        waiting, lost = [], {}
        for c in present:
            parts = self.state[c]
            if not parts:
                waiting.append(c)
            for k, part in parts.items():
                n = pixels.get((c, k), 0)
                part['pixels'] = (1 - g) * part['pixels'] + g * n
                part['loss'] = (1 - g) * part['loss'] + g * losses.get((c, k), 0.0)
                if self.update == 'ema' and n:
                    rate = g / part['pixels']
                    part['centroid'] = [
                        x + rate * (s - n * x) for x, s in zip(part['centroid'], sums[c, k], strict=True)
                    ]
            total = sum(part['pixels'] for part in parts.values())
            for k in range(self.number[c]) if parts else ():
                part = parts.get(k)
                small = part is None or part['pixels'] / total < self.min_share
                count = self.starving(c)
                count[k] = count.get(k, 0) + 1 if small else 0
                if count[k] > 1 / g:
                    lost.setdefault(c, []).append(k)
        batch = {
            c: [sum(of.get((c, k), 0) for k in range(self.number[c])) for of in (pixels, losses)]
            for c in present
        }
        if self.update == 'kmeans':
            each = math.ceil(self.size / self.freq)
            for c, rows in self.sample(present, members, features, each).items():
                for r, row in enumerate(rows):
                    self.reservoir[c][(self.iteration * each + r) % self.size] = row
            if (self.iteration + 1) % self.freq == 0:
                known = {c: [x for x in rows if x is not None] for c, rows in enumerate(self.reservoir)}
                for c, parts in enumerate(self.state):
                    if parts:
                        centroids, _, _ = self.lloyd(
                            known[c], {k: part['centroid'] for k, part in parts.items()}
                        )
                        for k, centroid in centroids.items():
                            parts[k]['centroid'] = centroid
            if waiting and self.iteration + 1 >= self.freq:
                known = {c: [x for x in self.reservoir[c] if x is not None] for c in waiting}
                self.start(waiting, known, batch)
        elif waiting:
            self.start(waiting, self.sample(waiting, members, features, self.CELLS), batch)
        self.reseed(lost, members, features, logits)
        self.iteration += 1

    def starving(self, c):
        self._starving = getattr(self, '_starving', {})
        return self._starving.setdefault(c, {})

    def sample(self, classes, members, features, most):
        """Cells of each class, drawn one after the other with a chance proportional to their pixels."""
        w = features.shape[3]
        draws = {}
        rows = {}
        for c in classes:
            keys = []
            for (owner, b, (i, j)), n in members.items():
                if owner != c:
                    continue
                if b not in draws:
                    draws[b] = self.draw_cells(self.iteration, b, features.shape[2] * w)
                keys.append((math.log(draws[b][i * w + j]) / n, b, i, j))
            keys.sort(reverse=True)
            rows[c] = [self.vector(features, b, i, j) for _, b, i, j in keys[:most]]
        return rows

    def lloyd(self, points, centroids):
        """(centroids, points of each, squared distances) after some rounds; a dict by subclass."""
        for _ in range(self.ROUNDS):
            groups = {k: [] for k in centroids}
            spread = 0.0
            for f in points:
                away = {k: sum((x - y) ** 2 for x, y in zip(f, m, strict=True)) for k, m in centroids.items()}
                k = min(away, key=lambda k: (away[k], k))
                groups[k].append(f)
                spread += away[k]
            centroids = {
                k: [sum(x) / len(fs) for x in zip(*fs, strict=True)] if fs else centroids[k]
                for k, fs in groups.items()
            }
        return centroids, {k: len(fs) for k, fs in groups.items()}, spread

    def start(self, classes, points, batch):
        if not classes:
            return
        draws = self.draw_seeds(self.iteration, max(self.number), len(classes), self.STARTS, self.CANDIDATES)
        for n, c in enumerate(classes):
            fs = points[c]
            middle = [sum(x) / len(fs) for x in zip(*fs, strict=True)]
            radius = max(sum((x - y) ** 2 for x, y in zip(f, middle, strict=True)) for f in fs)
            same = 1e-5 * radius + 1e-10 * max(sum(x * x for x in f) for f in fs)
            tries = []
            for start in range(self.STARTS):
                nearest = [math.inf] * len(fs)
                chance = [1.0] * len(fs)
                centroids = {}
                for k in range(self.number[c]):
                    if sum(chance) == 0:
                        break
                    best = None
                    for u in draws[k][n][start]:
                        until, drawn = 0.0, len(fs) - 1
                        for at, x in enumerate(chance):
                            until += x
                            if until > u * sum(chance):
                                drawn = at
                                break
                        away = [
                            min(old, sum((x - y) ** 2 for x, y in zip(f, fs[drawn], strict=True)))
                            for f, old in zip(fs, nearest, strict=True)
                        ]
                        if best is None or sum(away) < sum(best[1]):
                            best = drawn, away
                    centroids[k] = fs[best[0]]
                    nearest = best[1]
                    chance = [x if x > same else 0.0 for x in nearest]
                tries.append(self.lloyd(fs, centroids))
            centroids, counts, _ = min(tries, key=lambda t: t[2])
            pixels, loss = (x / len(fs) for x in batch[c])
            self.state[c] = {
                k: dict(centroid=centroids[k], pixels=n * pixels, loss=n * loss)
                for k, n in counts.items()
                if n
            }

    def reseed(self, lost, members, features, logits):
        for c, ks in lost.items():
            cells = [
                (-log_p([float(x) for x in logits[b, :, i, j]])[c], b, i, j)
                for owner, b, (i, j) in members
                if owner == c
            ]
            cells.sort(reverse=True)
            parts = self.state[c]
            pixels, loss = (1e-3 * sum(p[name] for p in parts.values()) for name in ('pixels', 'loss'))
            for k, (_, b, i, j) in zip(ks, cells, strict=False):
                parts[k] = dict(centroid=self.vector(features, b, i, j), pixels=pixels, loss=loss)
                self.starving(c)[k] = 0
            self.state[c] = dict(sorted(parts.items()))


def similarity_weight(logits, target, threshold=0.98, ignore_index=255, exact=False):
    """The weights of each image, (B, H, W), from logits (B, C, H, W) at label size, query by query."""
    batch, height, width = target.shape
    maps = np.ones(target.shape)
    for b in range(batch):
        grids = []
        for stride in (4, 8):
            h, w = max(height // stride, 1), max(width // stride, 1)
            z = resize_bilinear(logits[b], h, w)
            label = [
                [int(target[b, nearest(i, height, h), nearest(j, width, w)]) for j in range(w)]
                for i in range(h)
            ]
            grids.append((z, np.array(label)))
        (q, q_label), (k, k_label) = grids
        weight, known = np.zeros(q_label.shape), np.zeros(q_label.shape)
        for i, j in np.ndindex(q_label.shape):
            if q_label[i, j] == ignore_index and not exact:
                continue
            similar = 0
            for m, n in np.ndindex(k_label.shape):
                dot = sum(x * y for x, y in zip(q[:, i, j], k[:, m, n], strict=True))
                longest = max(sum(x * x for x in q[:, i, j]), sum(x * x for x in k[:, m, n]))
                similar += k_label[m, n] == q_label[i, j] and dot / (longest + 1e-5) > threshold
            weight[i, j], known[i, j] = 1 / math.sqrt(similar + 10), 1.0
        weight, known = resize_bilinear(np.stack([weight, known]), height, width)
        counted = [
            (i, j)
            for i, j in np.ndindex(height, width)
            if known[i, j] > 0 and (exact or target[b, i, j] != ignore_index)
        ]
        mean = sum(weight[at] / known[at] for at in counted) / len(counted) if counted else 0.0
        for at in counted:
            maps[b][at] = min(weight[at] / known[at] / mean, 10.0)
    return maps
