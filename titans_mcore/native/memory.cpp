// The chunk form of the memory as one CPU operation: a thread takes a memory through all its chunks, or back.
//
// Twin of memory/chunk.py, chunk_backward.py and general.py, which explain the equations; the oracle of all of them is
// memory/naive.py. The file reads in the order of the form: products, coefficients of the gates, the keys' pass, the
// exact last matrix, reads, the chunk's end, then the way back. It includes itself once for every instruction set and
// precision: REAL is the number, LANES how many of them a vector holds.
//
// Letters: W, S weights and momentum of a matrix, M_0 where forgetting leads; token t reads, token j writes; n tokens
// of a chunk, b slots. Every row is padded with zeros to whole vectors: ldi and ldo are the padded d_in and d_out.

#ifndef REAL
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// What operation.py passes; tensors are contiguous, N = rows * heads memories.
struct Problem {
  int64_t rows, heads, chunks, size, group, depth, width[5];  // width: d_in of each matrix, then D
  int64_t norm, anchored, exact, holds, closed, rule_chunk;
  int64_t old;  // tokens of an open chunk that are worked out already
  double rms_limit, smallest_decay, epsilon;
  const void *queries, *keys, *values, *theta, *eta, *alpha;  // (B, C b, H, D) and (B, C b, H, L)
  const void *scale, *shift;                                  // (H, D) or null
  const void* anchors[4];                                     // (H, d_in, d_out)
  const void *weights[4], *momentum[4];                       // (N, d_in, d_out)
  const void *fresh_weights[4], *fresh_momentum[4];           // likewise, or null
  const int64_t* counts;                                      // (C, B) or null
  const bool* restarts;                                       // (C, B) or null
  const void *old_inputs[4], *old_deltas[4], *old_steps;      // (N, old, d) and (B, old, H, L)
  void *reads, *weights_after[4], *momentum_after[4];         // the last two null where a chunk stays open
  void* kept;                                                 // states before groups 1, 2, ...; or null
  void *inputs[4], *deltas[4], *steps;                        // of an open chunk, (N, n, d) and (B, n, H, L)
  const void* of_reads;
  void *of_queries, *of_keys, *of_values, *of_theta, *of_eta, *of_alpha;
  void *of_scale, *of_shift, *of_anchors[4];           // by memory, (N, D) and (N, d_in, d_out); added to, like the next
  void *of_fresh_weights[4], *of_fresh_momentum[4];
  void *of_weights[4], *of_momentum[4];  // at the states after the last chunk, then at those before the first
};
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#endif

#ifdef REAL
namespace NAME {
typedef REAL T;
typedef T V __attribute__((vector_size(LANES * sizeof(T))));
typedef T Unaligned __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
INLINE V load(const T* p) { return *(const Unaligned*)p; }
INLINE void store(T* p, V x) { *(Unaligned*)p = x; }
INLINE int padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// ---------------------------------------------------------------------------------------------- small products
enum Mode { SET, ADD, SUB };
constexpr int TALL = 8, BROAD = LANES * sizeof(T) == 64 ? 8 : 6;  // rows of a tile one and two vectors wide

INLINE void tile(const int m, const int v, Mode mode, int K, const T* A, int row, int column, const T* B, int ldb, T* C,
                 int ldc) {
  V sum[16] = {};
  for (int k = 0; k < K; k++, A += column, B += ldb) {
    V b[8];
#pragma GCC unroll 8
    for (int j = 0; j < v; j++) b[j] = load(B + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) {
      T a = A[(int64_t)i * row];
#pragma GCC unroll 8
      for (int j = 0; j < v; j++) sum[i * v + j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < m; i++)
#pragma GCC unroll 8
    for (int j = 0; j < v; j++) {
      T* c = C + i * ldc + j * LANES;
      V x = sum[i * v + j];
      store(c, mode == SET ? x : mode == ADD ? load(c) + x : load(c) - x);
    }
}

// C (M, N) {=, +=, -=} A (M, K) B (K, N): A with any strides, N whole vectors.
NOINLINE void product(Mode mode, int M, int N, int K, const T* A, int row, int column, const T* B, int ldb, T* C,
                      int ldc) {
  int n = 0;
  if (M == 1)
    for (; n + 8 * LANES <= N; n += 8 * LANES) tile(1, 8, mode, K, A, row, column, B + n, ldb, C + n, ldc);
  for (int v = 2; v > 0; v--)
    for (; n + v * LANES <= N; n += v * LANES) {
      const int most = v == 2 ? BROAD : TALL, tiles = (M + most - 1) / most;
      for (int i = 0, m = 0; i < tiles; i++) {
        const int rows = M / tiles + (i < M % tiles);
        const T* a = A + (int64_t)m * row;
        T* c = C + (int64_t)m * ldc + n;
#define CASE(r)                                                            \
  case r: tile(r, 2, mode, K, a, row, column, B + n, ldb, c, ldc); break; \
  case r + 8: tile(r, 1, mode, K, a, row, column, B + n, ldb, c, ldc); break;
        switch (rows + (v == 1) * 8) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
        m += rows;
      }
    }
}

INLINE T dot(int n, const T* a, const T* b) {  // n whole vectors
  V s = {}, r = {};
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) s += load(a + i) * load(b + i), r += load(a + i + LANES) * load(b + i + LANES);
  if (i < n) s += load(a + i) * load(b + i);
  s += r;
  T sum = 0;
  for (int k = 0; k < LANES; k++) sum += s[k];
  return sum;
}
INLINE void add(int n, T factor, const T* x, T* y) {
  for (int i = 0; i < n; i += LANES) store(y + i, load(y + i) + factor * load(x + i));
}
INLINE void times(int n, T factor, const T* x, T* y) {
  for (int i = 0; i < n; i += LANES) store(y + i, factor * load(x + i));
}

// One step of a transposition in registers: log2(LANES) of them turn a square of vectors.
#if defined(__clang__) || __GNUC__ >= 12  // an older GCC has no __builtin_shufflevector
#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif LANES == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#else
#define LOW 0, 2
#define HIGH 1, 3
#endif
#endif
// to (C, R) = from (R, C)^T; rows beyond R come as zeros, and `keep` rows of the result are written.
NOINLINE void transpose(int R, int C, const T* from, int ldf, T* to, int ldt, int keep) {
  for (int r = 0; r < R; r += LANES)
    for (int c = 0; c < C; c += LANES) {
      V x[LANES], y[LANES];
      for (int i = 0; i < LANES; i++) x[i] = r + i < R ? load(from + (int64_t)(r + i) * ldf + c) : V{};
#ifdef LOW
#pragma GCC unroll 4
      for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
          y[2 * i] = __builtin_shufflevector(x[i], x[i + LANES / 2], LOW);
          y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + LANES / 2], HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
      }
#else
      for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) y[i][k] = x[k][i];
      for (int i = 0; i < LANES; i++) x[i] = y[i];
#endif
      for (int i = 0; i < LANES && c + i < keep; i++) store(to + (int64_t)(c + i) * ldt + r, x[i]);
    }
}
#undef LOW
#undef HIGH

// ---------------------------------------------------------------------------------------------- GELU, exact
#if SINGLE
typedef int32_t I __attribute__((vector_size(LANES * sizeof(T))));
INLINE V within(V x, T low, T high) {
  x = x < low ? V{} + low : x;
  return x > high ? V{} + high : x;
}
// Phi(z) and the density phi(z): erf as a rational function, exp as a power of two times a polynomial (Cephes).
INLINE void normal(V z, V& cdf, V& density) {
  V x = within(z * T(0.70710678118654752), -4, 4), s = x * x;
  V p = s * T(-2.72614225801306e-10) + T(2.77068142495902e-08);
  p = p * s + T(-2.10102402082508e-06);
  p = p * s + T(-5.69250639462346e-05);
  p = p * s + T(-7.34990630326855e-04);
  p = p * s + T(-2.95459980854025e-03);
  p = p * s + T(-1.60960333262415e-02);
  V q = s * T(-1.45660718464996e-05) + T(-2.13374055278905e-04);
  q = q * s + T(-1.68282697438203e-03);
  q = q * s + T(-7.37332916720468e-03);
  q = q * s + T(-1.42647390514189e-02);
  cdf = T(0.5) + T(0.5) * x * p / q;
  V e = within(T(-0.5) * z * z, -87, 0);
  I n = __builtin_convertvector(e * T(1.44269504088896341) - T(0.5), I);
  V whole = __builtin_convertvector(n, V), r = e - whole * T(0.693359375) - whole * T(-2.12194440e-4);
  V t = r * T(1.9875691500e-4) + T(1.3981999507e-3);
  t = t * r + T(8.3334519073e-3);
  t = t * r + T(4.1665795894e-2);
  t = t * r + T(1.6666665459e-1);
  t = t * r + T(5.0000001201e-1);
  t = t * r * r + r + T(1);
  density = t * (V)((n + 127) << 23) * T(0.3989422804014327);
}
#else
INLINE void normal(V z, V& cdf, V& density) {
  for (int i = 0; i < LANES; i++) {
    cdf[i] = 0.5 * __builtin_erfc(-z[i] * 0.70710678118654752440);
    density[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * z[i] * z[i]);
  }
}
#endif
// gelu(z), its slope and its bend (second derivative), n whole vectors; the last two may be null.
NOINLINE void gelu(int n, const T* z, T* value, T* slope, T* bend) {
  for (int i = 0; i < n; i += LANES) {
    V x = load(z + i), cdf, density;
    normal(x, cdf, density);
    store(value + i, x * cdf);
    if (slope) store(slope + i, cdf + x * density);
    if (bend) store(bend + i, (T(2) - x * x) * density);
  }
}

// ---------------------------------------------------------------------------------------------- one memory's way
struct Found {  // What is worked out of a chunk's keys and gates; lists by matrix, rows by token.
  T *input[4], *slope[4], *bend[4], *arriving[4], *delta[4];
  T *error, *normed, *inverse, *similar, *reach;  // at the last matrix' output
  T *keep[4], *writes[4], *decay[4];              // row -1 is before the first token, column b the chunk's start
  T *theta[4], *eta[4], *alpha[4], *mass[4], *steps[4];
  T *share, *pull, *loss, *squares;
  int n, full;
};

struct Walk {
  const Problem& p;
  const int L, b, D, old;
  int din[4], dout[4], ldi[4], ldo[4], ldd, widest, bt, bc;  // bt, bc: padded b and b + 1
  int64_t at[4], state_size;
  char* memory_base;
  int64_t used = 0, memory = 0, row = 0, head = 0;
  const T *anchor[4], *w[4], *s[4];  // M_0, and the state that a chunk begins with
  T *own_anchor[4], *scale, *shift, *unit, *turned, *swapped, *one, *two, *three, *four;
  T *x[4], *xslope[4], *similar[4], *attended[4], *carried[4], *led[4], *output, *rnormed, *rinverse;
  T *left[4], *right[4], *of_input[4], *of_delta[4], *of_anchor[4], *of_error, *of_query;
  T *of_writes[4], *of_decay[4], *of_keep[4], *of_steps[4], *of_mass[4];

  T* take(int64_t n) {
    T* found = (T*)((uintptr_t)memory_base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return found;
  }
  // Lays out the working memory; with a base of null it only counts it.
  Walk(const Problem& problem, void* base, bool backward)
      : p(problem), L(p.depth), b(p.size), D(p.width[p.depth]), old(p.old), memory_base((char*)base) {
    state_size = widest = 0;
    bt = padded(b), bc = padded(b + 1), ldd = padded(D);
    for (int l = 0; l < L; l++) {
      din[l] = p.width[l], dout[l] = p.width[l + 1], ldi[l] = padded(din[l]), ldo[l] = padded(dout[l]);
      at[l] = state_size, state_size += 2 * (int64_t)din[l] * ldo[l];
      for (int width : {ldi[l], ldo[l]}) widest = width > widest ? width : widest;
    }
    const int64_t rows = (int64_t)b * widest;
    for (int l = 0; l < L; l++) {
      own_anchor[l] = take((int64_t)din[l] * ldo[l]);
      x[l] = take(rows), xslope[l] = take(rows), similar[l] = take(b * bt), attended[l] = take(b * bt);
      left[l] = take(3 * rows), carried[l] = take(2 * rows), led[l] = take(2 * rows);
      if (!backward) continue;
      right[l] = take(3 * rows), of_input[l] = take(rows), of_delta[l] = take(rows);
      of_writes[l] = take((b + 1) * bc) + bc, of_decay[l] = take((b + 1) * bc) + bc, of_keep[l] = take(b + 1) + 1;
      of_steps[l] = take(b), of_mass[l] = take(b), of_anchor[l] = take((int64_t)din[l] * ldo[l]);
    }
    scale = take(ldd), shift = take(ldd), unit = take(ldd), output = take(rows), rnormed = take(rows), rinverse = take(b);
    turned = take((int64_t)widest * bt), swapped = take(2 * (int64_t)widest * bt);
    one = take(rows), two = take(rows), three = take(rows), four = take(rows);
    if (backward) of_error = take(rows), of_query = take(rows);
  }
  void take(Found& f) {
    const int64_t rows = (int64_t)b * widest;
    for (int l = 0; l < L; l++) {
      f.input[l] = take(rows), f.slope[l] = take(rows), f.bend[l] = take(rows);
      f.arriving[l] = take(rows), f.delta[l] = take(rows);
      f.writes[l] = take((b + 1) * bc) + bc, f.decay[l] = take((b + 1) * bc) + bc, f.keep[l] = take(b + 1) + 1;
      for (T** list : {f.theta, f.eta, f.alpha, f.mass, f.steps}) list[l] = take(b);
    }
    f.error = p.norm ? take(rows) : f.delta[L - 1];  // without LayerNorm the last matrix' output is the answer
    f.similar = take(b * bt), f.reach = take(b * bt), f.normed = take(rows), f.inverse = take(b), f.share = take(b), f.pull = take(b), f.loss = take(b);
    f.squares = take(8);
  }

  // Rows between tensors, without padding, and working memory, padded with zeros.
  void in(int rows, int width, int ld, const void* from, int64_t stride, T* to) {
    for (int r = 0; r < rows; r++) {
      memcpy(to + (int64_t)r * ld, (const T*)from + r * stride, width * sizeof(T));
      memset(to + (int64_t)r * ld + width, 0, (ld - width) * sizeof(T));
    }
  }
  void out(int rows, int width, int ld, const T* from, void* to, int64_t stride) {
    for (int r = 0; r < rows; r++) memcpy((T*)to + r * stride, from + (int64_t)r * ld, width * sizeof(T));
  }
  int64_t slots() const { return p.chunks * p.size; }
  int64_t token(int chunk, int t) const { return (row * slots() + (int64_t)chunk * b + t) * p.heads + head; }
  int64_t matrix(int l) const { return memory * din[l] * dout[l]; }
  void state_in(const void* const* weights, const void* const* momentum, T* state) {
    for (int l = 0; l < L; l++) {
      in(din[l], dout[l], ldo[l], (const T*)weights[l] + matrix(l), dout[l], state + at[l]);
      in(din[l], dout[l], ldo[l], (const T*)momentum[l] + matrix(l), dout[l], state + at[l] + half(l));
    }
  }
  void state_out(const T* state, void* const* weights, void* const* momentum) {
    for (int l = 0; l < L; l++) {
      out(din[l], dout[l], ldo[l], state + at[l], (T*)weights[l] + matrix(l), dout[l]);
      out(din[l], dout[l], ldo[l], state + at[l] + half(l), (T*)momentum[l] + matrix(l), dout[l]);
    }
  }
  int64_t half(int l) const { return (int64_t)din[l] * ldo[l]; }
  void at_state(const T* state) {
    for (int l = 0; l < L; l++) w[l] = state + at[l], s[l] = w[l] + half(l);
  }
  void begin(int64_t which) {
    memory = which, row = which / p.heads, head = which % p.heads;
    for (int l = 0; l < L && p.anchored; l++) {
      const T* outside = (const T*)p.anchors[l] + head * din[l] * dout[l];
      anchor[l] = outside;
      if (dout[l] != ldo[l]) in(din[l], dout[l], ldo[l], outside, dout[l], own_anchor[l]), anchor[l] = own_anchor[l];
    }
    for (int i = 0; i < ldd; i++) scale[i] = unit[i] = i < D, shift[i] = 0;
    if (p.scale) memcpy(scale, (const T*)p.scale + head * D, D * sizeof(T));
    if (p.shift) memcpy(shift, (const T*)p.shift + head * D, D * sizeof(T));
  }
  // Slots of a chunk that hold tokens; whether it is over with its last one.
  void open(int chunk, Found& f) {
    f.n = p.counts ? p.counts[chunk * p.rows + row] : b;
    f.full = p.closed && f.n == b;
  }
  bool restarts(int chunk) const { return p.restarts && p.restarts[chunk * p.rows + row]; }

  // to (n, M) = x (n, K) times the transpose of a matrix (M, K), both halves of a state at once where there are two.
  void across(int n, int M, int K, const T* x, int ldx, const T* matrix, int ld, T* to, int ldt, T* second = nullptr) {
    const int nt = padded(n), both = second ? 2 * M : M;
    if (n <= 2 && !second) {
      for (int t = 0; t < n; t++) {
        for (int i = 0; i < M; i++) to[t * ldt + i] = dot(ld, x + t * ldx, matrix + (int64_t)i * ld);
        memset(to + t * ldt + M, 0, (ldt - M) * sizeof(T));
      }
    } else if (M <= b && !second) {
      transpose(M, ld, matrix, ld, turned, bt, ld);
      product(SET, n, padded(M), K, x, ldx, 1, turned, bt, to, ldt);
    } else {
      transpose(n, ld, x, ldx, turned, bt, ld);
      product(SET, both, nt, K, matrix, ld, 1, turned, bt, swapped, bt);
      transpose(M, nt, swapped, bt, to, ldt, n);
      if (second) transpose(M, nt, swapped + (int64_t)M * bt, bt, second, ldt, n);
    }
  }

  // ------------------------------------------------------------------------------------------ coefficients
  // Products of decays E[t, j] and A E[t, j] as recurrences over t; column b is the momentum at the chunk's start.
  void coefficients(int chunk, Found& f) {
    for (int l = 0; l < L; l++) {
      memset(f.decay[l] - bc, 0, bc * sizeof(T)), memset(f.writes[l] - bc, 0, bc * sizeof(T));
      f.keep[l][-1] = f.decay[l][b - bc] = 1;
      for (int t = 0; t < f.n; t++) {
        const int64_t gate = token(chunk, t) * L + l;
        const T eta = f.eta[l][t] = ((const T*)p.eta)[gate], theta = f.theta[l][t] = ((const T*)p.theta)[gate];
        const T keep = 1 - (f.alpha[l][t] = ((const T*)p.alpha)[gate]), left = 1 - eta;
        T *e = f.decay[l] + t * bc, *g = f.writes[l] + t * bc;
        times(bc, eta, e - bc, e), times(bc, keep, g - bc, g), add(bc, 1, e, g);
        e[t] = g[t] = 1;
        f.keep[l][t] = keep * f.keep[l][t - 1];
        f.mass[l][t] = theta / (left > T(p.smallest_decay) ? left : T(p.smallest_decay));
        f.steps[l][t] = theta;  // unless the rule holds it
      }
    }
  }

  // What an open chunk's first tokens have come to, and what all of them have.
  void old_in(Found& f) {
    for (int l = 0; l < L; l++) {
      in(old, din[l], ldi[l], (const T*)p.old_inputs[l] + memory * old * din[l], din[l], f.input[l]);
      in(old, dout[l], ldo[l], (const T*)p.old_deltas[l] + memory * old * dout[l], dout[l], f.delta[l]);
      for (int t = 0; t < old; t++)
        f.steps[l][t] = ((const T*)p.old_steps)[((row * old + t) * p.heads + head) * L + l];
    }
  }
  void worked_out(const Found& f) {
    for (int l = 0; l < L; l++) {
      out(f.n, din[l], ldi[l], f.input[l], (T*)p.inputs[l] + memory * f.n * din[l], din[l]);
      out(f.n, dout[l], ldo[l], f.delta[l], (T*)p.deltas[l] + memory * f.n * dout[l], dout[l]);
      for (int t = 0; t < f.n; t++) ((T*)p.steps)[token(0, t) * L + l] = f.steps[l][t];
    }
  }

  // ------------------------------------------------------------------------------------------ the keys' pass
  void layer_norm(int n, const T* raw, T* normed, T* inverse) {
    const T smaller = T(1) / ((int64_t)1 << 48);  // as network.layer_norm: its square stays finite
    for (int t = 0; t < n; t++) {
      const T *z = raw + t * ldd, mean = dot(ldd, z, unit) / D;
      T* y = normed + t * ldd;
      for (int i = 0; i < ldd; i++) y[i] = (z[i] - mean) * smaller * unit[i];
      const T r = 1 / std::sqrt(dot(ldd, y, y) / D + T(p.epsilon) * smaller * smaller);
      times(ldd, r, y, y);
      inverse[t] = r * smaller;
    }
  }
  // Of one token, its own transpose as a map: r (g - mean g - n mean(g n)).
  void norm_gradient(const T* g, const T* normed, T inverse, T* to) {
    const T mean = dot(ldd, g, unit) / D, along = dot(ldd, g, normed) / D;
    for (int i = 0; i < ldd; i++) to[i] = inverse * unit[i] * (g[i] - mean - along * normed[i]);
  }
  void keys(int chunk, Found& f, bool bends) {
    const int n = f.n - old, last = L - 1;
    in(n, D, ldd, (const T*)p.keys + token(chunk, old) * D, p.heads * D, f.input[0] + old * ldd);
    for (int l = 0; l < last; l++) {
      product(SET, n, ldo[l], din[l], f.input[l] + old * ldi[l], ldi[l], 1, w[l], ldo[l], one, ldo[l]);
      gelu(n * ldo[l], one, f.input[l + 1] + old * ldo[l], f.slope[l], bends ? f.bend[l] : nullptr);
    }
    if (p.holds) hold_last(f);
    last_output(f, output);
    in(n, D, ldd, (const T*)p.values + token(chunk, old) * D, p.heads * D, four);
    for (int t = old; t < f.n; t++) {
      T* z = output + (t - old) * ldd;
      if (p.exact) product(SUB, 1, ldd, t, f.reach + (t - old) * bt, bt, 1, f.delta[last], ldd, z, ldd);
      error(f, t, z, four + (t - old) * ldd);
    }
    for (int l = last; l > 0; l--) {
      T *arriving = f.arriving[l - 1], *below = f.delta[l - 1] + old * ldi[l];
      across(n, din[l], dout[l], f.delta[l] + old * ldo[l], ldo[l], w[l], ldo[l], arriving, ldi[l]);
      for (int i = 0; i < n * ldi[l]; i++) below[i] = arriving[i] * f.slope[l - 1][i];
    }
    if (p.holds && L > 1) hold_lower(f);
  }
  // What the keys meet in the last matrix without the chunk's own writes: at the chunk's start, or, exact, where the
  // token before has left it, and how far the writes reach.
  void last_output(Found& f, T* z) {
    const int l = L - 1, n = f.n - old;
    const T *h = f.input[l] + old * ldi[l], *before = f.writes[l] + (old - 1) * bc;
    if (!p.exact) return product(SET, n, ldd, din[l], h, ldi[l], 1, w[l], ldd, z, ldd);
    meet(n, l, h, f.keep[l] + old - 1, before + b, 0, z);
    attend(f, l, n, h, before, f.similar, f.reach);
  }
  // Of one token's answer and, through LayerNorm, of the last matrix' output z, which is lost.
  void error(Found& f, int t, T* z, const T* value) {
    const T* key = f.input[0] + t * ldd;
    T *e = f.error + t * ldd, *y = f.normed + t * ldd;
    if (!p.norm) {
      for (int i = 0; i < ldd; i++) e[i] = 2 * (z[i] - value[i]);
      return;
    }
    layer_norm(1, z, y, f.inverse + t);
    for (int i = 0; i < ldd; i++) e[i] = 2 * (key[i] + y[i] * scale[i] + shift[i] - value[i]), z[i] = e[i] * scale[i];
    norm_gradient(z, y, f.inverse[t], f.delta[L - 1] + t * ldd);
  }
  // x times how much of weights, momentum and M_0 is there after each token, in rows of left, carried and led.
  void spread(int n, int l, const T* x, const T* keep, const T* carry, int row) {
    for (int t = 0; t < n; t++, x += ldi[l]) {
      const int at = (row + t) * ldi[l];
      times(ldi[l], keep[t], x, left[l] + at), times(ldi[l], carry[t * bc], x, carried[l] + at);
      if (p.anchored) times(ldi[l], 1 - keep[t], x, led[l] + at);
    }
  }
  // What x meets in a matrix as some tokens have left it, without the chunk's own writes.
  void meet(int n, int l, const T* x, const T* keep, const T* carry, int row, T* z) {
    spread(n, l, x, keep, carry, row);
    product(SET, n, ldo[l], din[l], left[l] + row * ldi[l], ldi[l], 1, w[l], ldo[l], z, ldo[l]);
    product(ADD, n, ldo[l], din[l], carried[l] + row * ldi[l], ldi[l], 1, s[l], ldo[l], z, ldo[l]);
    if (p.anchored) product(ADD, n, ldo[l], din[l], led[l] + row * ldi[l], ldi[l], 1, anchor[l], ldo[l], z, ldo[l]);
  }
  // How far the deltas of all the chunk's tokens reach x: G[t, j] theta_j (x_t . h_j), and the products alone.
  void attend(const Found& f, int l, int n, const T* x, const T* writes, T* similar, T* reach) {
    across(n, f.n, din[l], x, ldi[l], f.input[l], ldi[l], similar, bt);
    for (int t = 0; t < n; t++)
      for (int j = 0; j < f.n; j++) reach[t * bt + j] = similar[t * bt + j] * writes[t * bc + j] * f.steps[l][j];
  }

  // ------------------------------------------------------------------------------------------ held steps
  void hold_last(Found& f) {
    const int l = L - 1;
    for (int t = old; t < f.n; t++) {
      const T *h = f.input[l] + t * ldi[l], asked = 2 * f.mass[l][t] * dot(ldi[l], h, h);
      f.steps[l][t] = f.theta[l][t] / (asked > 1 ? asked : 1);
    }
  }
  void hold_lower(Found& f) {
    for (int t = old; t < f.n; t++) {
      T pull = 0, share = 1;
      for (int l = 0; l < L - 1; l++) {
        const T *h = f.input[l] + t * ldi[l], *d = f.delta[l] + t * ldo[l];
        pull += f.mass[l][t] * dot(ldi[l], h, h) * dot(ldo[l], d, d);
      }
      const T *e = f.error + t * ldd, loss = dot(ldd, e, e) / 4, asked = T(p.rule_chunk) * pull;
      if (asked > 2 * loss) share = 2 * loss / asked;
      f.share[t] = share, f.pull[t] = pull, f.loss[t] = loss;
      for (int l = 0; l < L - 1; l++) f.steps[l][t] = f.theta[l][t] * share;
    }
  }

  // ------------------------------------------------------------------------------------------ reads
  // Each query through the state that its own token has left; leaves the last output in `output`.
  void queries(int chunk, const Found& f, bool slopes) {
    const int n = f.n - old;
    in(n, D, ldi[0], (const T*)p.queries + token(chunk, old) * D, p.heads * D, x[0]);
    for (int l = 0; l < L; l++) {
      T* z = l == L - 1 ? output : one;
      meet(n, l, x[l], f.keep[l] + old, f.writes[l] + old * bc + b, 0, z);
      attend(f, l, n, x[l], f.writes[l] + old * bc, similar[l], attended[l]);
      product(SUB, n, ldo[l], f.n, attended[l], bt, 1, f.delta[l], ldo[l], z, ldo[l]);
      if (l < L - 1) gelu(n * ldo[l], z, x[l + 1], slopes ? xslope[l] : nullptr, nullptr);
    }
    if (p.norm) layer_norm(n, output, rnormed, rinverse);
  }
  void answers(int chunk, const Found& f) {
    for (int t = 0; t < f.n - old; t++) {
      T *y = output + t * ldd, *q = x[0] + t * ldi[0], *normed = rnormed + t * ldd;
      for (int i = 0; i < D && p.norm; i++) y[i] = q[i] + normed[i] * scale[i] + shift[i];
      memcpy((T*)p.reads + token_read(chunk, t) * D, y, D * sizeof(T));
    }
  }
  int64_t token_read(int chunk, int t) const {  // reads are of new tokens only
    return (row * (slots() - old) + (int64_t)chunk * b + t) * p.heads + head;
  }

  // ------------------------------------------------------------------------------------------ the chunk's end
  // h times how much of each step is in weights and momentum after the chunk.
  void shares(int l, const Found& f, T* in_weights, T* in_momentum) {
    const T *g = f.writes[l] + (f.n - 1) * bc, *e = f.decay[l] + (f.n - 1) * bc;
    for (int j = 0; j < f.n; j++) {
      times(ldi[l], g[j] * f.steps[l][j], f.input[l] + j * ldi[l], in_weights + j * ldi[l]);
      times(ldi[l], e[j] * f.steps[l][j], f.input[l] + j * ldi[l], in_momentum + j * ldi[l]);
    }
  }
  void end(Found& f, T* after) {
    for (int l = 0; l < L; l++) {
      const T keep = f.keep[l][f.n - 1], carry = f.writes[l][(f.n - 1) * bc + b], stay = f.decay[l][(f.n - 1) * bc + b];
      T *nw = after + at[l], *ns = nw + half(l);
      for (int64_t i = 0; i < half(l); i += LANES) {
        const V weight = load(w[l] + i), momentum = load(s[l] + i);
        V kept = keep * weight + carry * momentum;
        if (p.anchored) kept += (1 - keep) * load(anchor[l] + i);
        store(nw + i, kept), store(ns + i, stay * momentum);
      }
      shares(l, f, one, two);
      product(SUB, din[l], ldo[l], f.n, one, 1, ldi[l], f.delta[l], ldo[l], nw, ldo[l]);
      product(SUB, din[l], ldo[l], f.n, two, 1, ldi[l], f.delta[l], ldo[l], ns, ldo[l]);
      for (int i = 0; i < 2 && f.full && std::isfinite(p.rms_limit); i++) {  // the state shell
        T* part = i ? ns : nw;
        const T square = f.squares[2 * l + i] = dot(half(l), part, part) / (T(din[l]) * dout[l]);
        if (outside(square)) times(half(l), T(p.rms_limit) / std::sqrt(square), part, part);
      }
    }
  }
  bool outside(T square) const { return square > T(p.rms_limit) * T(p.rms_limit); }

  // ------------------------------------------------------------------------------------------ the way back
  // Back through `meet`: adds to the gradient at x, at what was kept and at what was carried.
  void meet_back(int n, int l, const T* x, const T* of_z, const T* keep, const T* carry, T* of_x, T* of_keep, T* of_carry) {
    across(n, din[l], dout[l], of_z, ldo[l], w[l], ldo[l], one, ldi[l], two);
    if (p.anchored) across(n, din[l], dout[l], of_z, ldo[l], anchor[l], ldo[l], three, ldi[l]);
    for (int t = 0; t < n; t++) {
      const T *own = x + t * ldi[l], *pw = one + t * ldi[l], *ps = two + t * ldi[l], *pm = three + t * ldi[l];
      T* to = of_x + t * ldi[l];
      add(ldi[l], keep[t], pw, to), add(ldi[l], carry[t * bc], ps, to);
      if (p.anchored) add(ldi[l], 1 - keep[t], pm, to);
      of_keep[t] += dot(ldi[l], own, pw) - (p.anchored ? dot(ldi[l], own, pm) : 0);
      of_carry[t * bc] += dot(ldi[l], own, ps);
    }
  }
  // Back through `attend` for x of all tokens; `reach` is lost. Where G is zero its gradient is no more than finite.
  void attend_back(const Found& f, int l, const T* x, const T* of_z, int before, const T* similar, T* reach, T* of_x) {
    const int n = f.n;
    const T *writes = f.writes[l] - before * bc, *step = f.steps[l];
    across(n, n, dout[l], of_z, ldo[l], f.delta[l], ldo[l], reach, bt);
    for (int t = 0; t < n; t++) {
      const T *g = writes + t * bc, *same = similar + t * bt;
      T *pair = reach + t * bt, *of_g = of_writes[l] + (t - before) * bc;
      for (int j = 0; j < n; j++) {
        const T of_write = -pair[j] * same[j];
        of_g[j] += of_write * step[j], of_steps[l][j] += of_write * g[j];
        pair[j] *= -g[j] * step[j];
      }
    }
    product(ADD, n, ldi[l], n, reach, bt, 1, f.input[l], ldi[l], of_x, ldi[l]);
    product(ADD, n, ldi[l], n, reach, 1, bt, x, ldi[l], of_input[l], ldi[l]);
  }
  // W = s U with s = limit / rms(U) where the shell acted: s (D - (D . W) W / (size limit^2)).
  void shell_back(const Found& f, const T* after, T* g) {
    for (int l = 0; l < L && f.full && std::isfinite(p.rms_limit); l++)
      for (int i = 0; i < 2; i++) {
        const T square = f.squares[2 * l + i], limit = p.rms_limit, size = T(din[l]) * dout[l];
        T* of = g + at[l] + i * half(l);
        const T* state = after + at[l] + i * half(l);
        if (!outside(square)) continue;
        add(half(l), -dot(half(l), of, state) / (size * limit * limit), state, of);
        times(half(l), limit / std::sqrt(square), of, of);
      }
  }
  void reads_back(int chunk, const Found& f, T* g_scale, T* g_shift) {
    const int n = f.n;
    in(n, D, ldd, (const T*)p.of_reads + token(chunk, 0) * D, p.heads * D, of_query);
    memcpy(right[L - 1], of_query, sizeof(T) * n * ldd);
    for (int t = 0; t < n && p.norm; t++) {
      const T *g = of_query + t * ldd, *y = rnormed + t * ldd;
      for (int i = 0; i < D; i++) g_scale[i] += g[i] * y[i], g_shift[i] += g[i];
      for (int i = 0; i < ldd; i++) one[i] = g[i] * scale[i];
      norm_gradient(one, y, rinverse[t], right[L - 1] + t * ldd);
    }
    for (int l = L - 1; l >= 0; l--) {
      T *of_z = right[l], *of_x = l ? right[l - 1] : four;
      product(SUB, n, ldo[l], n, attended[l], 1, bt, of_z, ldo[l], of_delta[l], ldo[l]);
      memset(of_x, 0, sizeof(T) * n * ldi[l]);
      attend_back(f, l, x[l], of_z, 0, similar[l], attended[l], of_x);
      meet_back(n, l, x[l], of_z, f.keep[l], f.writes[l] + b, of_x, of_keep[l], of_writes[l] + b);
      for (int i = 0; i < n * ldi[l] && l; i++) of_x[i] *= xslope[l - 1][i];
    }
    for (int i = 0; i < n * ldi[0]; i++) four[i] += p.norm ? of_query[i] : 0;
    out(n, D, ldi[0], four, (T*)p.of_queries + token(chunk, 0) * D, p.heads * D);
  }
  void end_back(const Found& f, const T* g) {
    for (int l = 0; l < L; l++) {
      const T *gw = g + at[l], *gs = gw + half(l), *last = f.writes[l] + (f.n - 1) * bc, *decay = f.decay[l] + (f.n - 1) * bc;
      T *of_last = of_writes[l] + (f.n - 1) * bc, *of_stay = of_decay[l] + (f.n - 1) * bc;
      shares(l, f, one, two);
      product(SUB, f.n, ldo[l], din[l], one, ldi[l], 1, gw, ldo[l], of_delta[l], ldo[l]);
      product(SUB, f.n, ldo[l], din[l], two, ldi[l], 1, gs, ldo[l], of_delta[l], ldo[l]);
      across(f.n, din[l], dout[l], f.delta[l], ldo[l], gw, ldo[l], one, ldi[l], two);
      for (int j = 0; j < f.n; j++) {
        const T *h = f.input[l] + j * ldi[l], *pw = one + j * ldi[l], *ps = two + j * ldi[l], step = f.steps[l][j];
        const T of_w = -dot(ldi[l], h, pw), of_s = -dot(ldi[l], h, ps);
        of_last[j] += of_w * step, of_stay[j] += of_s * step;
        of_steps[l][j] += of_w * last[j] + of_s * decay[j];
        add(ldi[l], -last[j] * step, pw, of_input[l] + j * ldi[l]);
        add(ldi[l], -decay[j] * step, ps, of_input[l] + j * ldi[l]);
      }
    }
  }
  void hold_lower_back(const Found& f) {
    for (int t = 0; t < f.n; t++) {
      T of_share = 0;
      for (int l = 0; l < L - 1; l++) {
        of_share += of_steps[l][t] * f.theta[l][t];
        of_steps[l][t] *= f.share[t];  // now at theta
      }
      if (!(T(p.rule_chunk) * f.pull[t] > 2 * f.loss[t])) continue;
      const T of_pull = -of_share * f.share[t] / f.pull[t], of_loss = of_share * 2 / (T(p.rule_chunk) * f.pull[t]);
      times(ldd, of_loss / 2, f.error + t * ldd, of_error + t * ldd);
      for (int l = 0; l < L - 1; l++) {
        const T *h = f.input[l] + t * ldi[l], *d = f.delta[l] + t * ldo[l], mass = f.mass[l][t];
        const T hh = dot(ldi[l], h, h), dd = dot(ldo[l], d, d);
        of_mass[l][t] += of_pull * hh * dd;
        add(ldi[l], 2 * of_pull * mass * dd, h, of_input[l] + t * ldi[l]);
        add(ldo[l], 2 * of_pull * mass * hh, d, of_delta[l] + t * ldo[l]);
      }
    }
  }
  void hold_last_back(const Found& f) {
    const int l = L - 1;
    for (int t = 0; t < f.n; t++) {
      const T *h = f.input[l] + t * ldi[l], square = dot(ldi[l], h, h), asked = 2 * f.mass[l][t] * square;
      const T share = 1 / (asked > 1 ? asked : 1), of_asked = asked > 1 ? -of_steps[l][t] * f.theta[l][t] * share * share : 0;
      of_steps[l][t] *= share;
      of_mass[l][t] += 2 * square * of_asked;
      add(ldi[l], 4 * f.mass[l][t] * of_asked, h, of_input[l] + t * ldi[l]);
    }
  }
  // From the last deltas to the last matrix' output: from the last token to the first, each of which gets what comes
  // from the outputs behind it. Leaves the gradient at the answers in of_error.
  void errors_back(const Found& f, T* at_z, T* g_scale, T* g_shift) {
    for (int t = f.n - 1; t >= 0; t--) {
      T* of = of_delta[L - 1] + t * ldd;
      if (p.exact && t < f.n - 1)
        product(SUB, 1, ldd, f.n - 1 - t, f.reach + (t + 1) * bt + t, 0, bt, at_z + (t + 1) * ldd, ldd, of, ldd);
      error_back(f, t, of, of_error + t * ldd, at_z + t * ldd, g_scale, g_shift);
    }
  }
  // Of one token; `at_answer` holds what comes to the answer's error from elsewhere. LayerNorm's derivative at z depends
  // on z through n and r as well: see chunk._NormErrors.
  void error_back(const Found& f, int t, const T* of, T* at_answer, T* raw, T* g_scale, T* g_shift) {
    const T *e = f.error + t * ldd, *y = f.normed + t * ldd, *delta = f.delta[L - 1] + t * ldd, share = f.inverse[t] / D;
    T *of_scaled = one, *scaled = two, *of_normed = three;
    if (!p.norm) {
      for (int i = 0; i < ldd; i++) raw[i] = at_answer[i] = 2 * (of[i] + at_answer[i]);
      return;
    }
    norm_gradient(of, y, f.inverse[t], of_scaled);
    for (int i = 0; i < ldd; i++) {
      at_answer[i] = 2 * (of_scaled[i] * scale[i] + at_answer[i]);
      scaled[i] = e[i] * scale[i], of_normed[i] = at_answer[i] * scale[i];
    }
    for (int i = 0; i < D; i++) g_scale[i] += of_scaled[i] * e[i] + at_answer[i] * y[i], g_shift[i] += at_answer[i];
    norm_gradient(of_normed, y, f.inverse[t], raw);
    add(ldd, -share * dot(ldd, scaled, y), of_scaled, raw);
    add(ldd, -share * dot(ldd, of, y), delta, raw);
    add(ldd, -share * dot(ldd, of, delta), y, raw);
  }
  // Reverse of `coefficients`, and of theta's way into steps and masses.
  void gates_back(int chunk, const Found& f) {
    for (int l = 0; l < L; l++) {
      T of_kept = 0;
      for (int t = f.n - 1; t >= 0; t--) {
        const T eta = f.eta[l][t], keep = 1 - f.alpha[l][t], left = 1 - eta, smallest = p.smallest_decay;
        T *of_g = of_writes[l] + t * bc, *of_e = of_decay[l] + t * bc;
        add(bc, 1, of_g, of_e);
        of_kept += of_keep[l][t];
        const T of_keep_now = dot(bc, of_g, f.writes[l] + (t - 1) * bc) + of_kept * f.keep[l][t - 1];
        const T of_eta = dot(bc, of_e, f.decay[l] + (t - 1) * bc);
        add(bc, keep, of_g, of_g - bc), add(bc, eta, of_e, of_e - bc);
        of_kept *= keep;
        const int64_t gate = token(chunk, t) * L + l;
        const T divisor = left > smallest ? left : smallest;
        ((T*)p.of_theta)[gate] = of_steps[l][t] + of_mass[l][t] / divisor;
        ((T*)p.of_eta)[gate] = of_eta + (left >= smallest ? of_mass[l][t] * f.mass[l][t] / left : 0);
        ((T*)p.of_alpha)[gate] = -of_keep_now;
      }
    }
  }
  // From the gradient at the state after a chunk to that at the state before, in place.
  void state_back(const Found& f, T* g) {
    for (int l = 0; l < L; l++) {
      const int last = f.n - 1, n = f.n, exact_here = p.exact && l == L - 1;
      const T keep = f.keep[l][last], carry = f.writes[l][last * bc + b], stay = f.decay[l][last * bc + b];
      T *gw = g + at[l], *gs = gw + half(l), *ga = of_anchor[l];
      V of_keep_end = {}, of_carry = {}, of_stay = {};
      for (int64_t i = 0; i < half(l); i += LANES) {
        const V x = load(gw + i), y = load(gs + i), weight = load(w[l] + i), momentum = load(s[l] + i);
        of_keep_end += x * weight, of_carry += x * momentum, of_stay += y * momentum;
        if (p.anchored) {
          of_keep_end -= x * load(anchor[l] + i);
          store(ga + i, load(ga + i) + (1 - keep) * x);
        }
        store(gw + i, keep * x), store(gs + i, carry * x + stay * y);
      }
      for (int i = 0; i < LANES; i++) {
        of_keep[l][last] += of_keep_end[i], of_writes[l][last * bc + b] += of_carry[i];
        of_decay[l][last * bc + b] += of_stay[i];
      }
      // Rows of left and right: reads, the matrix' own output, the errors that went down through it.
      const int blocks = l ? 3 : 2, met = exact_here ? 2 : 1;
      product(ADD, din[l], ldo[l], blocks * n, left[l], 1, ldi[l], right[l], ldo[l], gw, ldo[l]);
      product(ADD, din[l], ldo[l], met * n, carried[l], 1, ldi[l], right[l], ldo[l], gs, ldo[l]);
      if (p.anchored) product(ADD, din[l], ldo[l], met * n, led[l], 1, ldi[l], right[l], ldo[l], ga, ldo[l]);
    }
  }
  // A document has begun in its first state, not in what the chunk before has left.
  void into_fresh(T* g) {
    for (int l = 0; l < L; l++)
      for (int i = 0; i < 2; i++) {
        T* to = (T*)(i ? p.of_fresh_momentum : p.of_fresh_weights)[l] + matrix(l);
        T* of = g + at[l] + i * half(l);
        for (int r = 0; r < din[l]; r++)
          for (int k = 0; k < dout[l]; k++) to[r * dout[l] + k] += of[r * ldo[l] + k];
        memset(of, 0, half(l) * sizeof(T));
      }
  }
  void back(int chunk, const Found& f, const T* after, T* g) {
    const int n = f.n, last = L - 1;
    T *g_scale = p.norm ? (T*)p.of_scale + memory * D : nullptr, *g_shift = p.norm ? (T*)p.of_shift + memory * D : nullptr;
    for (int l = 0; l < L; l++) {
      memset(of_writes[l] - bc, 0, sizeof(T) * (n + 1) * bc), memset(of_decay[l] - bc, 0, sizeof(T) * (n + 1) * bc);
      memset(of_keep[l] - 1, 0, sizeof(T) * (n + 1));
      for (T* x : {of_steps[l], of_mass[l]}) memset(x, 0, sizeof(T) * n);
      memset(of_input[l], 0, sizeof(T) * n * ldi[l]), memset(of_delta[l], 0, sizeof(T) * n * ldo[l]);
    }
    memset(of_error, 0, sizeof(T) * n * ldd);
    shell_back(f, after, g);
    queries(chunk, f, true);
    reads_back(chunk, f, g_scale, g_shift);
    end_back(f, g);
    if (p.holds && L > 1) hold_lower_back(f);
    for (int l = 0; l < last; l++) {  // upward, through the back-propagation
      T *of_arriving = left[l + 1] + 2 * n * ldo[l], *at_z = right[l] + n * ldo[l];
      for (int i = 0; i < n * ldo[l]; i++) {
        of_arriving[i] = of_delta[l][i] * f.slope[l][i];
        at_z[i] = of_delta[l][i] * f.arriving[l][i] * f.bend[l][i];
      }
      product(ADD, n, ldo[l + 1], dout[l], of_arriving, ldo[l], 1, w[l + 1], ldo[l + 1], of_delta[l + 1], ldo[l + 1]);
      memcpy(right[l + 1] + 2 * n * ldo[l + 1], f.delta[l + 1], sizeof(T) * n * ldo[l + 1]);
    }
    T *at_last = right[last] + n * ldd, *h = f.input[last];
    errors_back(f, at_last, g_scale, g_shift);
    if (p.exact) {
      attend_back(f, last, h, at_last, 1, f.similar, f.reach, of_input[last]);
      spread(n, last, h, f.keep[last] - 1, f.writes[last] + b - bc, n);
      meet_back(n, last, h, at_last, f.keep[last] - 1, f.writes[last] + b - bc, of_input[last], of_keep[last] - 1,
                of_writes[last] + b - bc);
    }
    if (p.holds) hold_last_back(f);
    for (int l = last; l >= 0; l--) {  // downward, through the forward pass
      T *at_z = right[l] + n * ldo[l], *of_h = of_input[l];
      if (!(p.exact && l == last)) {
        across(n, din[l], dout[l], at_z, ldo[l], w[l], ldo[l], one, ldi[l]);
        for (int i = 0; i < n * ldi[l]; i++) of_h[i] += one[i];
        memcpy(left[l] + n * ldi[l], f.input[l], sizeof(T) * n * ldi[l]);
      }
      T* below = l ? right[l - 1] + n * ldi[l] : nullptr;
      for (int i = 0; i < n * ldi[l] && l; i++) below[i] += of_h[i] * f.slope[l - 1][i];
    }
    for (int i = 0; i < n * ldd && p.norm; i++) of_input[0][i] += of_error[i];
    out(n, D, ldi[0], of_input[0], (T*)p.of_keys + token(chunk, 0) * D, p.heads * D);
    for (int i = 0; i < n * ldd; i++) of_error[i] = -of_error[i];
    out(n, D, ldd, of_error, (T*)p.of_values + token(chunk, 0) * D, p.heads * D);
    state_back(f, g);
    gates_back(chunk, f);
  }
};

// ---------------------------------------------------------------------------------------------- memories in turn
NOINLINE void forward(const Problem& p, int64_t from, int64_t to, Walk& walk) {
  Found f;
  walk.take(f);
  T* state = walk.take(walk.state_size);
  if (!walk.memory_base) return;
  for (int64_t m = from; m < to; m++) {
    walk.begin(m);
    walk.state_in(p.weights, p.momentum, state);
    for (int c = 0; c < p.chunks; c++) {
      if (p.kept && c && c % p.group == 0)
        memcpy((T*)p.kept + ((c / p.group - 1) * p.rows * p.heads + m) * walk.state_size, state, walk.state_size * sizeof(T));
      if (walk.restarts(c)) walk.state_in(p.fresh_weights, p.fresh_momentum, state);
      walk.open(c, f);
      if (!f.n) continue;
      walk.at_state(state);
      walk.coefficients(c, f);
      walk.keys(c, f, false);
      walk.queries(c, f, false);
      walk.answers(c, f);
      walk.end(f, state);
    }
    walk.state_out(state, p.weights_after, p.momentum_after);
  }
}
// Goes through a group once more from the state kept before it, then back through its chunks.
NOINLINE void backward(const Problem& p, int64_t from, int64_t to, Walk& walk) {
  const int64_t size = walk.state_size;
  Found* found = (Found*)walk.take(p.group * sizeof(Found) / sizeof(T) + 1);
  T *states = walk.take((p.group + 1) * size), *g = walk.take(size);
  if (!walk.memory_base) {
    Found f;
    for (int i = 0; i < p.group; i++) walk.take(f);
    return;
  }
  for (int i = 0; i < p.group; i++) walk.take(found[i]);
  for (int64_t m = from; m < to; m++) {
    walk.begin(m);
    walk.state_in(p.of_weights, p.of_momentum, g);
    for (int l = 0; l < walk.L && p.anchored; l++) memset(walk.of_anchor[l], 0, walk.half(l) * sizeof(T));
    for (int group = (p.chunks - 1) / p.group; group >= 0; group--) {
      const int first = group * p.group, last = first + p.group < p.chunks ? first + p.group : p.chunks;
      if (group)
        memcpy(states, (const T*)p.kept + ((group - 1) * p.rows * p.heads + m) * size, size * sizeof(T));
      else
        walk.state_in(p.weights, p.momentum, states);
      for (int c = first; c < last; c++) {
        Found& f = found[c - first];
        T *before = states + (c - first) * size, *after = before + size;
        if (walk.restarts(c)) walk.state_in(p.fresh_weights, p.fresh_momentum, before);
        walk.open(c, f);
        if (!f.n) memcpy(after, before, size * sizeof(T));
        if (!f.n) continue;
        walk.at_state(before);
        walk.coefficients(c, f);
        walk.keys(c, f, true);
        walk.end(f, after);
      }
      for (int c = last - 1; c >= first; c--) {
        const T* before = states + (c - first) * size;
        walk.at_state(before);
        if (found[c - first].n) walk.back(c, found[c - first], before + size, g);
        if (walk.restarts(c)) walk.into_fresh(g);
      }
    }
    walk.state_out(g, p.of_weights, p.of_momentum);
    for (int l = 0; l < walk.L && p.anchored; l++)
      walk.out(walk.din[l], walk.dout[l], walk.ldo[l], walk.of_anchor[l], (T*)p.of_anchors[l] + walk.matrix(l), walk.dout[l]);
  }
}
// Some tokens that go on in a chunk, whose first ones are worked out: reads, and what is worked out of all of them.
NOINLINE void go_on(const Problem& p, int64_t from, int64_t to, Walk& walk) {
  Found f;
  walk.take(f);
  T* state = walk.take(walk.state_size);
  if (!walk.memory_base) return;
  bool whole = true;  // vectors: then states are read where they lie
  for (int l = 0; l < walk.L; l++) whole = whole && walk.dout[l] == walk.ldo[l];
  for (int64_t m = from; m < to; m++) {
    walk.begin(m);
    if (!whole) walk.state_in(p.weights, p.momentum, state);
    walk.at_state(state);
    for (int l = 0; l < walk.L && whole; l++) {
      walk.w[l] = (const T*)p.weights[l] + walk.matrix(l);
      walk.s[l] = (const T*)p.momentum[l] + walk.matrix(l);
    }
    walk.open(0, f);
    walk.coefficients(0, f);
    walk.old_in(f);
    walk.keys(0, f, false);
    walk.queries(0, f, false);
    walk.answers(0, f);
    walk.worked_out(f);
    if (!p.weights_after[0]) continue;
    walk.end(f, state);
    walk.state_out(state, p.weights_after, p.momentum_after);
  }
}
// Bytes of working memory that a thread needs, without a base; else the work.
int64_t run(const Problem& p, int what, int64_t from, int64_t to, void* base) {
  Walk walk(p, base, what == 1);
  (what == 0 ? forward : what == 1 ? backward : go_on)(p, from, to, walk);
  return walk.used;
}
}  // namespace NAME
#undef NAME
#undef REAL
#undef LANES
#undef SINGLE

#else  // ---------------------------------------------------------------------------------------- instances
#if defined(__x86_64__) && defined(__clang__)
#define FOR(features) _Pragma(TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define DONE _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define FOR(features) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(features)))
#define DONE _Pragma("GCC pop_options")
#endif
#define TEXT(x) #x

#define NAME baseline_single
#define REAL float
#define LANES 4
#define SINGLE 1
#include "memory.cpp"
#define NAME baseline_double
#define REAL double
#define LANES 2
#define SINGLE 0
#include "memory.cpp"
#ifdef FOR
FOR("avx2,fma")
#define NAME avx2_single
#define REAL float
#define LANES 8
#define SINGLE 1
#include "memory.cpp"
#define NAME avx2_double
#define REAL double
#define LANES 4
#define SINGLE 0
#include "memory.cpp"
DONE
FOR("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#define NAME avx512_single
#define REAL float
#define LANES 16
#define SINGLE 1
#include "memory.cpp"
#define NAME avx512_double
#define REAL double
#define LANES 8
#define SINGLE 0
#include "memory.cpp"
DONE
#endif

typedef int64_t (*Run)(const Problem&, int, int64_t, int64_t, void*);
static Run chosen(int level, int bits) {
#ifdef FOR
  if (level == 2) return bits == 32 ? avx512_single::run : avx512_double::run;
  if (level == 1) return bits == 32 ? avx2_single::run : avx2_double::run;
#endif
  return bits == 32 ? baseline_single::run : baseline_double::run;
}
extern "C" {
// The widest instructions of this processor: 0 what every one has, 1 AVX2, 2 AVX-512.
int memory_level() {
#ifdef FOR
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
int64_t memory_problem_bytes() { return sizeof(Problem); }
int64_t memory_workspace(const Problem* p, int what, int level, int bits) {
  return chosen(level, bits)(*p, what, 0, 0, nullptr);
}
// `what` is 0 for forward, 1 for backward, 2 to go on in an open chunk; `bytes` of the workspace belong to each thread.
void memory_run(const Problem* p, int what, int level, int bits, char* workspace, int64_t bytes) {
  at::parallel_for(0, p->rows * p->heads, 1, [&](int64_t from, int64_t to) {
    chosen(level, bits)(*p, what, from, to, workspace + at::get_thread_num() * bytes);
  });
}
}
#endif
