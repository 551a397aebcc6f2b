"""Device functions: the errors of a chunk's keys, forward and backward.

Twin of _errors in memory/chunk.py, by the same names: the delta at the last matrix' output is LayerNorm's derivative at
aim + slope n, n the LayerNorm of the output and slope 2 scale^2; in a plain network it is aim + 2 output. Outputs are
those at the chunk's start or, EXACT, those of the last matrix as the token before has left it. Then they follow one
upon the other, and a loop takes token after token out of a tile of all.

Where steps of the first of two matrices are held, its deltas are scaled with the factor on the step: whoever writes
or attends to them takes them so.

LayerNorm sees neither a mean of what it normalises nor one of the aim, and a delta has none. So both are taken out once
a chunk, and of a single token all sums over channels are known in one step, where each one costs the program barriers.
"""

import triton
import triton.language as tl


@triton.jit
def centre(x, NORM: tl.constexpr):
    """x (b, D) without its means over channels; in a plain network as it is."""
    return x - (tl.sum(x, 1) / x.shape[1])[:, None] if NORM else x


@triton.jit
def aims_of(keys, values, scale, shift, NORM: tl.constexpr):
    """What of the errors does not depend on the memory, (b, D), centred."""
    return centre(2.0 * scale[None, :] * (keys + shift[None, :] - values), NORM) if NORM else -2.0 * values


@triton.jit
def means(a, b, c, d):
    """Means over channels of four (b, D), (b,) each, by one reduction."""
    both = tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1) / a.shape[1]
    first, second = tl.split(both)
    mean_a, mean_b = tl.split(first)
    mean_c, mean_d = tl.split(second)
    return mean_a, mean_b, mean_c, mean_d


@triton.jit
def deltas_of(raw, aim, scale, NORM: tl.constexpr, EPS: tl.constexpr):
    """The deltas of the last matrix, (b, D), from its centred outputs.

    Returns:
        The deltas; then, without meaning in a plain network, LayerNorm's value n (b, D) and inverse standard
        deviation (b,), and means over channels (b,): of (aim + slope n) n, of slope n, of slope n^2.
    """
    if NORM:
        slope = 2.0 * (scale * scale)[None, :]
        square, along_aim, tilt, along_slope = means(raw * raw, aim * raw, slope * raw, slope * raw * raw)
        inverse_std = tl.rsqrt(square + EPS)
        normed = raw * inverse_std[:, None]
        tilt, along_slope = tilt * inverse_std, along_slope * inverse_std * inverse_std
        along = along_aim * inverse_std + along_slope
        sent = aim + slope * normed
        delta = inverse_std[:, None] * (sent - tilt[:, None] - normed * along[:, None])
        return delta, normed, inverse_std, along, tilt, along_slope
    else:
        nothing = tl.sum(raw, 1)
        return aim + 2.0 * raw, raw, nothing, nothing, nothing, nothing


@triton.jit
def deltas_gradient(of_delta, delta, normed, inverse_std, along, tilt, along_slope, scale):
    """Back through deltas_of with LayerNorm, from a centred gradient.

    Returns:
        Gradients at aim and at raw, (b, D).
    """
    slope = 2.0 * (scale * scale)[None, :]
    by_normed, by_delta, by_slope, by_both = means(
        of_delta * normed, of_delta * delta, slope * of_delta, slope * of_delta * normed
    )
    of_aim = inverse_std[:, None] * (of_delta - normed * by_normed[:, None])
    # What LayerNorm's derivative makes of slope of_aim; then what delta owes to raw through n and the deviation.
    mean = inverse_std * (by_slope - by_normed * tilt)
    mean_along = inverse_std * (by_both - by_normed * along_slope)
    of_raw = slope * of_aim - mean[:, None] - normed * (mean_along + by_delta)[:, None]
    of_raw -= along[:, None] * of_aim + by_normed[:, None] * delta
    return of_aim, inverse_std[:, None] * of_raw


@triton.jit
def own_outputs(
    met, alike, aims, writes, scale, NORM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr
):
    """What each token's own last matrix makes of its key, z_t = met_t - sum_{j < t} K[t, j] delta_j, (b, D).

    When its turn comes a token's row of the tile is without what the tokens before have written.

    Args:
        met: What the keys meet without the chunk's own writes, (b, D), centred.
        alike: Pointer to the products h_t . h_j, (b, b) and symmetric.
        aims: Pointer to what aims_of gives, (b, D).
        writes: Pointer to the chunk's G of the last matrix: K[t, j] is G[t - 1, j] times alike[t, j].
        scale: LayerNorm's scale.
    """
    rows = tl.arange(0, BLOCK)
    for t in range(BLOCK - 1):
        aim = tl.load(aims + t * D + tl.arange(0, D)[None, :])
        reach = tl.load(writes + (rows - 1) * BLOCK + t, mask=rows > t, other=0.0)
        reach *= tl.load(alike + t * BLOCK + rows)
        own = tl.sum(tl.where(rows[:, None] == t, met, 0.0), 0, keep_dims=True)
        delta, _, _, _, _, _ = deltas_of(own, aim, scale, NORM, EPS)
        met -= reach[:, None] * delta
    return met


@triton.jit
def own_outputs_gradient(
    of_delta, deltas, normed, known, alike, writes, scale, NORM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    """All of the gradient at delta (b, D), from that without what later tokens' outputs owe to it.

    Args:
        of_delta: Gradient at delta, centred.
        deltas: Pointer to what deltas_of gives for all tokens, (b, D), like `normed`.
        known: Pointer to its other results, (4, b).
        alike: As own_outputs has it, like what follows.
    """
    rows = tl.arange(0, BLOCK)
    for t in range(BLOCK - 1, 0, -1):
        reach = tl.load(writes + (t - 1) * BLOCK + rows, mask=rows < t, other=0.0)
        reach *= tl.load(alike + t * BLOCK + rows)
        own = tl.sum(tl.where(rows[:, None] == t, of_delta, 0.0), 0, keep_dims=True)
        if NORM:
            delta = tl.load(deltas + t * D + tl.arange(0, D)[None, :])
            own_normed = tl.load(normed + t * D + tl.arange(0, D)[None, :])
            inverse_std, along, tilt, along_slope = load_known(known + t + tl.arange(0, 1), BLOCK)
            _, of_own = deltas_gradient(own, delta, own_normed, inverse_std, along, tilt, along_slope, scale)
        else:
            of_own = 2.0 * own
        of_delta -= reach[:, None] * of_own
    return of_delta


@triton.jit
def chord_of(normed, aim):
    """|aim| (b,), and the chord (b, D) from the best direction to the answer's: see removable_loss in rule.py."""
    size = tl.sqrt(tl.sum(aim * aim, 1))
    return size, normed / aim.shape[1] ** 0.5 + aim / tl.where(size > 0.0, size, 1.0)[:, None]


@triton.jit
def lower_share(normed, aim, mass, key_square, delta_square):
    """Factor (b,) on the steps of the first of two matrices. Twin of removable_loss and lower_step_share in rule.py.

    Args:
        normed: LayerNorm's value, (b, D).
        aim: As aims_of gives it, (b, D).
        mass: Of its steps, times b, (b,) like what follows.
        key_square: |k|^2.
        delta_square: |delta|^2 at the first matrix.
    """
    size, chord = chord_of(normed, aim)
    allowed = 2.0 * aim.shape[1] ** 0.5 * size * tl.sum(chord * chord, 1)
    asked = mass * key_square * delta_square
    held = asked > allowed
    return tl.where(held, allowed / tl.where(held, asked, 1.0), 1.0)


@triton.jit
def lower_share_gradient(of_share, share, normed, aim, mass, key_square, delta_square):
    """Gradients at the arguments of lower_share, in their order; at normed not centred."""
    held = share < 1.0
    # Where steps are held none of the three factors is zero; what can be removed may be.
    mass, key_square = tl.where(held, mass, 1.0), tl.where(held, key_square, 1.0)
    delta_square = tl.where(held, delta_square, 1.0)
    size, chord = chord_of(normed, aim)
    root = aim.shape[1] ** 0.5
    by_size = 0.5 * root * (1.0 + tl.sum(normed * normed, 1) / aim.shape[1]) / tl.where(size > 0.0, size, 1.0)
    of_removable = tl.where(held, 4.0 * of_share / (mass * key_square * delta_square), 0.0)[:, None]
    less = tl.where(held, -of_share * share, 0.0)
    of_normed, of_aim = of_removable * size[:, None] * chord, of_removable * (by_size[:, None] * aim + normed)
    return of_normed, of_aim, less / mass, less / key_square, less / delta_square


@triton.jit
def load_known(pointers, BLOCK: tl.constexpr):
    """What deltas_of gives besides delta and n, of the tokens behind pointers (b,) to the first of it."""
    return (
        tl.load(pointers),
        tl.load(pointers + BLOCK),
        tl.load(pointers + 2 * BLOCK),
        tl.load(pointers + 3 * BLOCK),
    )
