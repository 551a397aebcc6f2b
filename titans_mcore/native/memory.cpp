// The chunk form of the memory as one CPU operation: a thread takes a memory through all its chunks, or back.
//
// Twin of memory/chunk.py, which explains the equations; the oracle of both is memory/naive.py. The file reads in their
// order, then back. Of one matrix, in a chunk that begins with weights W and momentum S:
//
//   (1) E[t, j] = eta_t E[t-1, j], G[t, j] = (1 - alpha_t) G[t-1, j] + E[t, j], E[t, t] = G[t, t] = 1
//       How much of token j's step is in momentum and weights at t; of S in a column of its own, f_t; a_t is that of W.
//   (2) met_t = a_t x_t W + f_t x_t S + (1 - a_t) x_t M_0
//       What x_t meets there without the chunk's own writes; M_0 is where forgetting leads, if it leads anywhere.
//   (3) z_t = met_t - sum_j G[t, j] theta_j (x_t . h_j) delta_j
//       What a query reads. An exact last matrix answers its keys' inputs h_t with (2) and G of t - 1, other matrices
//       theirs with W alone.
//   (4) e_t = 2 (M(k_t) - v_t), delta_t
//       Errors of the answer and at the matrix' output.
//   (5) W <- a W + f S + (1 - a) M_0 - sum_j G[n, j] theta_j h_j^T delta_j, and with E likewise S
//       Behind the last token n, each into its shell.
//
// Letters: token t reads, token j writes; n tokens of a chunk, b slots. Rows are padded with zeros to whole vectors;
// ldi and ldo are d_in and d_out so padded. The file includes itself for every instruction set and precision: REAL is
// the number, BYTES the size of a vector.

#ifndef REAL
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

// What operation.py passes; tensors are contiguous, N = rows * heads memories.
struct Problem {
  int64_t rows, heads, chunks, size, group, depth, width[5];  // width: d_in of each matrix, then D
  int64_t norm, anchored, exact, holds_last, closed;
  int64_t old;  // tokens of an open chunk that are worked out already
  double rms_limit, whole, smallest_decay, epsilon;
  const void *queries, *keys, *values, *theta, *eta, *alpha;  // (B, C b, H, D) and (B, C b, H, L)
  const void *scale, *shift;                                  // (H, D) or null
  const void* anchors[4];                                     // (H, d_in, d_out)
  const void *state[2][4], *fresh[2][4];                      // W and S, (N, d_in, d_out); the latter or null
  const int64_t* counts;                                      // (C, B) or null
  const bool* restarts;                                       // (C, B) or null
  const void *old_inputs[4], *old_deltas[4], *old_steps;      // (N, old, d) and (B, old, H, L)
  void *reads, *after[2][4];                                  // the latter null where a chunk stays open
  void* kept;                                                 // states before groups 1, 2, ...; or null
  void *inputs[4], *deltas[4], *steps;                        // of an open chunk, (N, n, d) and (B, n, H, L); or null
  const void* of_reads;
  void *of_queries, *of_keys, *of_values, *of_theta, *of_eta, *of_alpha;
  void *of_scale, *of_shift, *of_anchors[4];  // by memory, (N, D) and (N, d_in, d_out)
  void *of_state[2][4], *of_fresh[2][4];      // at the state behind the last chunk, then before the first
};
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

#endif

#ifdef REAL
namespace NAME {
typedef REAL T;
constexpr int LANES = BYTES / sizeof(T);
typedef T V __attribute__((vector_size(BYTES)));
typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
INLINE V load(const T* p) { return *(const Unaligned*)p; }
INLINE void store(T* p, V x) { *(Unaligned*)p = x; }
INLINE int padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// ---------------------------------------------------------------------------------------------- small products
enum Mode { SET, ADD, SUB };
constexpr int TALL = 8, BROAD = BYTES == 64 ? 8 : 6;  // rows of a tile one and two vectors wide

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
  if (M == 1) {
    for (; n + 8 * LANES <= N; n += 8 * LANES) tile(1, 8, mode, K, A, row, column, B + n, ldb, C + n, ldc);
    for (; n + 4 * LANES <= N; n += 4 * LANES) tile(1, 4, mode, K, A, row, column, B + n, ldb, C + n, ldc);
  }
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

INLINE T sum(V x) {
  T part[LANES];
  store(part, x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}
INLINE T dot(int n, const T* a, const T* b) {  // n whole vectors, like the next
  V s = {}, r = {};
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    s += load(a + i) * load(b + i);
    r += load(a + i + LANES) * load(b + i + LANES);
  }
  if (i < n) s += load(a + i) * load(b + i);
  return sum(s + r);
}
INLINE void add(int n, T factor, const T* x, T* y) {
  for (int i = 0; i < n; i += LANES) store(y + i, load(y + i) + factor * load(x + i));
}
INLINE void times(int n, T factor, const T* x, T* y) {
  for (int i = 0; i < n; i += LANES) store(y + i, factor * load(x + i));
}

// Elements of two vectors in turn, from one on; a compiler makes one instruction of it.
template <int from, int... i>
INLINE V in_turn(V x, V y, std::integer_sequence<int, i...>) {
  return V{(i % 2 ? y : x)[from + i / 2]...};
}
// to (C, R) = from (R, C)^T; rows beyond R come as zeros, and `keep` rows of the result are written.
NOINLINE void transpose(int R, int C, const T* from, int ldf, T* to, int ldt, int keep) {
  const std::make_integer_sequence<int, LANES> lanes{};
  for (int r = 0; r < R; r += LANES)
    for (int c = 0; c < C; c += LANES) {
      V x[LANES], y[LANES];
      for (int i = 0; i < LANES; i++) x[i] = r + i < R ? load(from + (int64_t)(r + i) * ldf + c) : V{};
#pragma GCC unroll 4
      for (int step = 1; step < LANES; step *= 2) {  // log2(LANES) of them turn a square of vectors
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
          y[2 * i] = in_turn<0>(x[i], x[i + LANES / 2], lanes);
          y[2 * i + 1] = in_turn<LANES / 2>(x[i], x[i + LANES / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
      }
      for (int i = 0; i < LANES && c + i < keep; i++) store(to + (int64_t)(c + i) * ldt + r, x[i]);
    }
}

// ---------------------------------------------------------------------------------------------- GELU, exact
#ifdef SINGLE
template <int terms>
INLINE V polynomial(V x, const T (&c)[terms]) {  // the highest power first
  V y = V{} + c[0];
#pragma GCC unroll 8
  for (int i = 1; i < terms; i++) y = y * x + c[i];
  return y;
}
INLINE V within(V x, T low, T high) {
  x = x < low ? V{} + low : x;
  return x > high ? V{} + high : x;
}
// Phi(z) and the density phi(z): erf as a rational function, exp as a power of two times a polynomial (Cephes).
INLINE void normal(V z, V& cdf, V& density) {
  typedef int32_t I __attribute__((vector_size(BYTES)));
  V x = within(z * T(0.70710678118654752), -4, 4);
  V p = polynomial(x * x, {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f,
                           -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
                           -1.60960333262415e-02f});
  V q = polynomial(x * x, {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                           -7.37332916720468e-03f, -1.42647390514189e-02f});
  cdf = T(0.5) + T(0.5) * x * p / q;
  V e = within(T(-0.5) * z * z, -87, 0);
  I n = __builtin_convertvector(e * T(1.44269504088896341) - T(0.5), I);
  V whole = __builtin_convertvector(n, V), r = e - whole * T(0.693359375) - whole * T(-2.12194440e-4);
  V t = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f});
  density = (t * r * r + r + T(1)) * (V)((n + 127) << 23) * T(0.3989422804014327);
}
#else
INLINE void normal(V z, V& cdf, V& density) {
  for (int i = 0; i < LANES; i++) {
    cdf[i] = 0.5 * __builtin_erfc(-z[i] * 0.70710678118654752440);
    density[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * z[i] * z[i]);
  }
}
#endif
// gelu(z), its slope and, unless null, its bend (second derivative), n whole vectors.
NOINLINE void gelu(int n, const T* z, T* value, T* slope, T* bend) {
  for (int i = 0; i < n; i += LANES) {
    V x = load(z + i), cdf, density;
    normal(x, cdf, density);
    store(value + i, x * cdf);
    store(slope + i, cdf + x * density);
    if (bend) store(bend + i, (T(2) - x * x) * density);
  }
}

// ---------------------------------------------------------------------------------------------- one memory's way
enum Part { W, S, M0 };  // what a chunk begins with

struct Found {  // What is worked out of a chunk's keys and gates; lists by matrix, rows by token.
  T *theta[4], *eta[4], *alpha[4], *mass[4], *steps[4];
  T *keep[4], *writes[4], *decay[4];  // a, G and E; row -1 is before the first token, column b the chunk's start
  T *input[4], *slope[4], *bend[4], *arriving[4], *delta[4];
  T *error, *normed, *inverse, *similar, *reach;  // at the last matrix' output
  T* squares;  // of the matrices before the shell
  int n, full;
};

struct Walk {
  const Problem& p;
  const int L, b, D, old, parts;
  int din[4], dout[4], ldi[4], ldo[4], ldd, widest = 0, bt, bc;  // bt, bc: padded b and b + 1
  int64_t at[4], state_size = 0, used = 0, memory = 0, row = 0, head = 0;
  char* base;
  const T* start[4][3];  // the matrices that a chunk begins with
  T *own_anchor[4], *scale, *shift, *unit, *aim, *chord, *turned, *swapped, *one, *two;
  T *x[4], *xslope[4], *similar[4], *reach[4], *left[4][3], *output, *values, *rnormed, *rinverse;
  // Gradients; right holds those at outputs of the rows in left: reads, keys, errors on their way down. Those between
  // of_memory and of_chunk begin with zeros in every memory, those from there to of_end in every chunk.
  T *right[4], *of_input[4], *of_delta[4], *of_anchor[4], *of_error, *of_normed, *of_query, *of_scale, *of_shift;
  T* of_fresh;
  T *of_writes[4], *of_decay[4], *of_keep[4], *of_steps[4], *of_mass[4];
  int64_t of_memory, of_chunk, of_end;

  // Lays out the working memory; with a base of null it only counts it.
  Walk(const Problem& problem, void* base, bool backward)
      : p(problem), L(p.depth), b(p.size), D(p.width[p.depth]), old(p.old), parts(2 + p.anchored), base((char*)base) {
    bt = padded(b), bc = padded(b + 1), ldd = padded(D);
    for (int l = 0; l < L; l++) {
      din[l] = p.width[l], dout[l] = p.width[l + 1], ldi[l] = padded(din[l]), ldo[l] = padded(dout[l]);
      at[l] = state_size, state_size += 2 * half(l);
      for (int width : {ldi[l], ldo[l]}) widest = width > widest ? width : widest;
    }
    const int64_t rows = (int64_t)b * widest;
    for (int l = 0; l < L; l++) {
      own_anchor[l] = take(half(l)), x[l] = take(rows), xslope[l] = take(rows);
      similar[l] = take(b * bt), reach[l] = take(b * bt);
      for (T*& part : left[l]) part = take(3 * rows);
    }
    for (T** list : {&scale, &shift, &unit, &aim, &chord}) *list = take(ldd);
    for (T** list : {&output, &values, &rnormed, &two}) *list = take(rows);
    one = take(3 * rows), rinverse = take(b), turned = take((int64_t)widest * bt), swapped = take((int64_t)widest * bt);
    if (!backward) return;
    of_memory = used;
    of_scale = take(ldd), of_shift = take(ldd), of_fresh = take(state_size);
    for (int l = 0; l < L; l++) of_anchor[l] = take(half(l));
    of_chunk = used;
    of_error = take(rows), of_normed = take(rows);
    for (int l = 0; l < L; l++) {
      of_writes[l] = behind_one(bc), of_decay[l] = behind_one(bc), of_keep[l] = behind_one(1);
      of_steps[l] = take(b), of_mass[l] = take(b), of_input[l] = take(rows), of_delta[l] = take(rows);
    }
    of_end = used;
    of_query = take(rows);
    for (int l = 0; l < L; l++) right[l] = take(3 * rows);
  }
  void take(Found& f) {
    const int64_t rows = (int64_t)b * widest;
    for (int l = 0; l < L; l++) {
      for (T** list : {f.theta, f.eta, f.alpha, f.mass, f.steps}) list[l] = take(b);
      for (T** list : {f.input, f.slope, f.bend, f.arriving, f.delta}) list[l] = take(rows);
      f.writes[l] = behind_one(bc), f.decay[l] = behind_one(bc), f.keep[l] = behind_one(1);
    }
    f.error = p.norm ? take(rows) : f.delta[L - 1];  // without LayerNorm the last matrix' output is the answer
    f.normed = take(rows), f.inverse = take(b), f.similar = take(b * bt), f.reach = take(b * bt);
    f.squares = take(8);
  }
  T* behind_one(int64_t n) { return take((b + 1) * n) + n; }  // rows of tokens with one in front
  T* take(int64_t n) {
    T* found = (T*)((uintptr_t)base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return found;
  }

  // Rows between tensors, without padding, and working memory, padded with zeros.
  void in(int rows, int width, int ld, const T* from, int64_t stride, T* to) {
    for (int r = 0; r < rows; r++) {
      memcpy(to + (int64_t)r * ld, from + r * stride, width * sizeof(T));
      memset(to + (int64_t)r * ld + width, 0, (ld - width) * sizeof(T));
    }
  }
  void out(int rows, int width, int ld, const T* from, T* to, int64_t stride) {
    for (int r = 0; r < rows; r++) memcpy(to + r * stride, from + (int64_t)r * ld, width * sizeof(T));
  }
  int64_t half(int l) const { return (int64_t)din[l] * ldo[l]; }
  int64_t matrix(int l) const { return memory * din[l] * dout[l]; }
  int64_t token(int chunk, int t) const { return (row * p.chunks * b + (int64_t)chunk * b + t) * p.heads + head; }
  void tokens_in(const void* from, int chunk, int t, int n, T* to) {
    in(n, D, ldd, (const T*)from + token(chunk, t) * D, p.heads * D, to);
  }
  void tokens_out(const T* from, int chunk, int n, void* to) {
    out(n, D, ldd, from, (T*)to + token(chunk, 0) * D, p.heads * D);
  }
  // A matrix where it lies if its rows are whole vectors, else in `own`.
  const T* whole(int l, const void* const* list, int64_t place, T* own) {
    const T* from = (const T*)list[l] + place;
    if (dout[l] == ldo[l]) return from;
    in(din[l], dout[l], ldo[l], from, dout[l], own);
    return own;
  }
  void begin(int64_t which) {
    memory = which, row = which / p.heads, head = which % p.heads;
    for (int l = 0; l < L && p.anchored; l++)
      start[l][M0] = whole(l, p.anchors, head * din[l] * dout[l], own_anchor[l]);
    for (int i = 0; i < ldd; i++) scale[i] = unit[i] = i < D, shift[i] = 0;
    if (p.scale) memcpy(scale, (const T*)p.scale + head * D, D * sizeof(T));
    if (p.shift) memcpy(shift, (const T*)p.shift + head * D, D * sizeof(T));
  }
  int64_t place(int l, int part) const { return at[l] + part * half(l); }
  void begin_in(const void* const (&state)[2][4], T* own) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) start[l][part] = whole(l, state[part], matrix(l), own + place(l, part));
  }
  void begin_in(const T* state) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) start[l][part] = state + place(l, part);
  }
  void save(T* state) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) memmove(state + place(l, part), start[l][part], half(l) * sizeof(T));
  }
  void state_out(void* const (&state)[2][4]) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) out(din[l], dout[l], ldo[l], start[l][part], (T*)state[part][l] + matrix(l), dout[l]);
  }
  T* kept(int group) const { return (T*)p.kept + ((group - 1) * p.rows * p.heads + memory) * state_size; }
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

  // Products of a matrix: z (n, d_out) of x (n, d_in), and the matrix of x^T z.
  void through(Mode mode, int l, int n, const T* x, const T* matrix, T* z) {
    product(mode, n, ldo[l], din[l], x, ldi[l], 1, matrix, ldo[l], z, ldo[l]);
  }
  void outer(Mode mode, int l, int n, const T* x, const T* z, T* matrix) {
    product(mode, din[l], ldo[l], n, x, 1, ldi[l], z, ldo[l], matrix, ldo[l]);
  }
  // to (n, d_in), for some matrices one after the other, = z (n, d_out) times the matrix transposed.
  void down(int l, int n, const T* z, const T* const* matrices, int count, T* to) {
    if (n > 2) transpose(n, ldo[l], z, ldo[l], turned, bt, ldo[l]);
    for (int i = 0; i < count; i++, to += n * ldi[l]) {
      if (n > 2) {
        product(SET, din[l], padded(n), dout[l], matrices[i], ldo[l], 1, turned, bt, swapped, bt);
        transpose(din[l], padded(n), swapped, bt, to, ldi[l], n);
        continue;
      }
      memset(to, 0, n * ldi[l] * sizeof(T));
      for (int t = 0; t < n; t++)
        for (int r = 0; r < din[l]; r++) to[t * ldi[l] + r] = dot(ldo[l], z + t * ldo[l], matrices[i] + r * ldo[l]);
    }
  }
  // to (n, m) = x y^T for rows of tokens.
  void pairs(int n, int m, int ld, const T* x, const T* y, T* to) {
    if (n > 2) {
      transpose(m, ld, y, ld, turned, bt, ld);
      return product(SET, n, padded(m), ld, x, ld, 1, turned, bt, to, bt);
    }
    for (int t = 0; t < n; t++)
      for (int j = 0; j < m; j++) to[t * bt + j] = dot(ld, x + t * ld, y + j * ld);
  }

  // ------------------------------------------------------------------------------------------ (1) coefficients
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

  // ------------------------------------------------------------------------------------------ (2), (3) outputs
  // x times a, f and 1 - a of some tokens, in rows of left.
  void spread(const Found& f, int l, int first, int n, const T* x, int to) {
    for (int t = first; t < first + n; t++, to++, x += ldi[l]) {
      const T factors[] = {f.keep[l][t], f.writes[l][t * bc + b], 1 - f.keep[l][t]};
      for (int part = 0; part < parts; part++) times(ldi[l], factors[part], x, left[l][part] + to * ldi[l]);
    }
  }
  void meet(const Found& f, int l, int first, int n, const T* x, T* z) {
    spread(f, l, first, n, x, 0);
    for (int part = 0; part < parts; part++) through(part ? ADD : SET, l, n, left[l][part], start[l][part], z);
  }
  // How far the deltas of all the chunk's tokens reach x: G[t, j] theta_j (x_t . h_j), and the products alone.
  void attend(const Found& f, int l, int first, int n, const T* x, T* similar, T* reach) {
    const T* writes = f.writes[l] + first * bc;
    pairs(n, f.n, ldi[l], x, f.input[l], similar);
    for (int t = 0; t < n; t++)
      for (int j = 0; j < f.n; j++) reach[t * bt + j] = similar[t * bt + j] * writes[t * bc + j] * f.steps[l][j];
  }

  // ------------------------------------------------------------------------------------------ (4) the keys' errors
  void layer_norm(int n, const T* raw, T* normed, T* inverse) {
    const T smaller = T(1) / ((int64_t)1 << 48);  // as network.layer_norm: its square stays finite
    for (int t = 0; t < n; t++, raw += ldd, normed += ldd) {
      const T mean = dot(ldd, raw, unit) / D;
      for (int i = 0; i < ldd; i++) normed[i] = (raw[i] - mean) * smaller * unit[i];
      const T r = 1 / std::sqrt(dot(ldd, normed, normed) / D + T(p.epsilon) * smaller * smaller);
      times(ldd, r, normed, normed);
      inverse[t] = r * smaller;
    }
  }
  // Of one token, its own transpose as a map: r (g - mean g - n mean(g n)).
  void norm_gradient(const T* g, const T* normed, T inverse, T* to) {
    const T mean = dot(ldd, g, unit) / D, along = dot(ldd, g, normed) / D;
    for (int i = 0; i < ldd; i++) to[i] = inverse * unit[i] * (g[i] - mean - along * normed[i]);
  }
  void keys(int chunk, Found& f) {
    const int n = f.n - old, last = L - 1;
    tokens_in(p.keys, chunk, old, n, f.input[0] + old * ldd);
    tokens_in(p.values, chunk, old, n, values);
    for (int l = 0; l < last; l++) {
      through(SET, l, n, f.input[l] + old * ldi[l], start[l][W], one);
      gelu(n * ldo[l], one, f.input[l + 1] + old * ldo[l], f.slope[l], f.bend[l]);
    }
    if (p.holds_last) hold(f, last, L);
    const T* h = f.input[last] + old * ldi[last];
    if (p.exact) {
      meet(f, last, old - 1, n, h, output);
      attend(f, last, old - 1, n, h, f.similar, f.reach);
    } else {
      through(SET, last, n, h, start[last][W], output);
    }
    for (int t = 0; t < n; t++) {
      T* z = output + t * ldd;
      if (p.exact) product(SUB, 1, ldd, old + t, f.reach + t * bt, bt, 1, f.delta[last], ldd, z, ldd);
      error(f, old + t, z, values + t * ldd);
    }
    for (int l = last; l > 0; l--) {
      T *arriving = f.arriving[l - 1], *below = f.delta[l - 1] + old * ldi[l];
      down(l, n, f.delta[l] + old * ldo[l], start[l], 1, arriving);
      for (int i = 0; i < n * ldi[l]; i++) below[i] = arriving[i] * f.slope[l - 1][i];
    }
    if (p.exact) hold(f, 0, last);
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
  // Steps held to what they remove of an error, rule.last_step_share and lower_step_share: of some matrices together,
  // the last one or all below it. A matrix asks for `slope` mass |h|^2; the share of all is allowed / asked.
  T slope_of(const Found& f, int l, int t) const {
    const T* d = f.delta[l] + t * ldo[l];
    return l == L - 1 ? 2 : T(p.whole) * dot(ldo[l], d, d);
  }
  T asked(const Found& f, int first, int end, int t) const {
    T all = 0;
    for (int l = first; l < end; l++) {
      const T* h = f.input[l] + t * ldi[l];
      all += slope_of(f, l, t) * f.mass[l][t] * dot(ldi[l], h, h);
    }
    return all;
  }
  // For the matrices below the last 4 times what can be removed of a loss, through LayerNorm rule.removable_loss.
  T allowed(const Found& f, int end, int t) {
    const T *e = f.error + t * ldd, *y = f.normed + t * ldd, root = std::sqrt(T(D));
    if (end == L) return 1;
    if (!p.norm) return dot(ldd, e, e);
    for (int i = 0; i < ldd; i++) aim[i] = scale[i] * (e[i] - 2 * scale[i] * y[i]);
    const T mean = dot(ldd, aim, unit) / D;
    for (int i = 0; i < ldd; i++) aim[i] -= mean * unit[i];
    const T size = std::sqrt(dot(ldd, aim, aim)), inverse = size > 0 ? 1 / size : 0;
    for (int i = 0; i < ldd; i++) chord[i] = y[i] / root + inverse * aim[i];
    return 2 * root * size * dot(ldd, chord, chord);
  }
  void hold(Found& f, int first, int end) {
    for (int t = old; t < f.n; t++) {
      const T all = asked(f, first, end, t), most = allowed(f, end, t);
      for (int l = first; l < end && all > most; l++) f.steps[l][t] *= most / all;
    }
  }

  // ------------------------------------------------------------------------------------------ reads
  // Each query through the state that its own token has left, by (2) and (3).
  void queries(int chunk, const Found& f) {
    const int n = f.n - old;
    tokens_in(p.queries, chunk, old, n, x[0]);
    for (int l = 0; l < L; l++) {
      T* z = l == L - 1 ? output : one;
      meet(f, l, old, n, x[l], z);
      attend(f, l, old, n, x[l], similar[l], reach[l]);
      product(SUB, n, ldo[l], f.n, reach[l], bt, 1, f.delta[l], ldo[l], z, ldo[l]);
      if (l < L - 1) gelu(n * ldo[l], z, x[l + 1], xslope[l], nullptr);
    }
    if (p.norm) layer_norm(n, output, rnormed, rinverse);
    for (int t = 0; t < n && p.norm; t++)
      for (int i = 0, at = t * ldd; i < ldd; i++, at++) output[at] = x[0][at] + rnormed[at] * scale[i] + shift[i];
    const int64_t first = token(chunk, old) - (row + 1) * old * p.heads;  // the tensor has reads of new tokens only
    if (p.reads) out(n, D, ldd, output, (T*)p.reads + first * D, p.heads * D);
  }

  // ------------------------------------------------------------------------------------------ (5) the chunk's end
  // h times how much of each step is in weights or momentum after the chunk.
  void stepped(const Found& f, int l, const T* reach, T* to) {
    for (int j = 0; j < f.n; j++) times(ldi[l], reach[j] * f.steps[l][j], f.input[l] + j * ldi[l], to + j * ldi[l]);
  }
  bool outside(T square) const { return square > T(p.rms_limit) * T(p.rms_limit); }
  void end(Found& f, T* after) {
    for (int l = 0; l < L; l++) {
      const T *g = f.writes[l] + (f.n - 1) * bc, *e = f.decay[l] + (f.n - 1) * bc, keep = f.keep[l][f.n - 1];
      T* to[] = {after + place(l, W), after + place(l, S)};
      for (int64_t i = 0; i < half(l); i += LANES) {
        const V weight = load(start[l][W] + i), momentum = load(start[l][S] + i);
        V kept = keep * weight + g[b] * momentum;
        if (p.anchored) kept += (1 - keep) * load(start[l][M0] + i);
        store(to[W] + i, kept), store(to[S] + i, e[b] * momentum);
      }
      for (int part : {W, S}) {
        stepped(f, l, part == W ? g : e, one);
        outer(SUB, l, f.n, one, f.delta[l], to[part]);
        if (!f.full || !std::isfinite(p.rms_limit)) continue;
        const T square = f.squares[2 * l + part] = dot(half(l), to[part], to[part]) / (T(din[l]) * dout[l]);
        if (outside(square)) times(half(l), T(p.rms_limit) / std::sqrt(square), to[part], to[part]);
      }
    }
    begin_in(after);
  }

  // ------------------------------------------------------------------------------------------ the way back
  // (5), the shell: W = s U with s = limit / rms(U) where it acted, so s (g - (g . W) W / (size limit^2)).
  void shell_back(const Found& f, const T* after, T* g) {
    for (int l = 0; l < L && f.full && std::isfinite(p.rms_limit); l++)
      for (int part : {W, S}) {
        const T square = f.squares[2 * l + part], limit = p.rms_limit, size = T(din[l]) * dout[l];
        const T* state = after + place(l, part);
        T* of = g + place(l, part);
        if (!outside(square)) continue;
        add(half(l), -dot(half(l), of, state) / (size * limit * limit), state, of);
        times(half(l), limit / std::sqrt(square), of, of);
      }
  }
  // (5), the steps.
  void end_back(const Found& f, const T* g) {
    const int64_t last = (f.n - 1) * bc;
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) {
        const T *of_part = g + place(l, part), *reach = (part == W ? f.writes : f.decay)[l] + last;
        T* of_reach = (part == W ? of_writes : of_decay)[l] + last;
        stepped(f, l, reach, one);
        through(SUB, l, f.n, one, of_part, of_delta[l]);
        down(l, f.n, f.delta[l], &of_part, 1, one);
        for (int j = 0; j < f.n; j++) {
          const T *arriving = one + j * ldi[l], of = -dot(ldi[l], f.input[l] + j * ldi[l], arriving);
          of_reach[j] += of * f.steps[l][j], of_steps[l][j] += of * reach[j];
          add(ldi[l], -reach[j] * f.steps[l][j], arriving, of_input[l] + j * ldi[l]);
        }
      }
  }
  // (3) for x of all tokens, the errors aside; `reach` is lost. Where G is zero its gradient is no more than finite.
  void attend_back(const Found& f, int l, int first, const T* x, const T* of_z, const T* similar, T* reach, T* of_x) {
    const int n = f.n;
    const T *writes = f.writes[l] + first * bc, *step = f.steps[l];
    pairs(n, n, ldo[l], of_z, f.delta[l], reach);
    for (int t = 0; t < n; t++) {
      const T *g = writes + t * bc, *same = similar + t * bt;
      T *pair = reach + t * bt, *of_g = of_writes[l] + (first + t) * bc;
      for (int j = 0; j < n; j++) {
        const T of_write = -pair[j] * same[j];
        of_g[j] += of_write * step[j], of_steps[l][j] += of_write * g[j];
        pair[j] *= -g[j] * step[j];
      }
    }
    product(ADD, n, ldi[l], n, reach, bt, 1, f.input[l], ldi[l], of_x, ldi[l]);
    product(ADD, n, ldi[l], n, reach, 1, bt, x, ldi[l], of_input[l], ldi[l]);
  }
  // (2): adds to the gradient at x, at what was kept and at what was carried.
  void meet_back(const Found& f, int l, int first, const T* x, const T* of_z, T* of_x) {
    const int block = f.n * ldi[l];
    down(l, f.n, of_z, start[l], parts, one);
    for (int t = 0; t < f.n; t++) {
      const T *own = x + t * ldi[l], *arriving = one + t * ldi[l], keep = f.keep[l][first + t];
      const T factors[] = {keep, f.writes[l][(first + t) * bc + b], 1 - keep};
      T of[] = {0, 0, 0};
      for (int part = 0; part < parts; part++) {
        add(ldi[l], factors[part], arriving + part * block, of_x + t * ldi[l]);
        of[part] = dot(ldi[l], own, arriving + part * block);
      }
      of_keep[l][first + t] += of[W] - of[M0];
      of_writes[l][(first + t) * bc + b] += of[S];
    }
  }
  void reads_back(int chunk, const Found& f) {
    const int n = f.n;
    tokens_in(p.of_reads, chunk, 0, n, of_query);
    memcpy(right[L - 1], of_query, sizeof(T) * n * ldd);
    for (int t = 0; t < n && p.norm; t++) {
      const T *g = of_query + t * ldd, *y = rnormed + t * ldd;
      for (int i = 0; i < ldd; i++) of_scale[i] += g[i] * y[i], of_shift[i] += g[i], one[i] = g[i] * scale[i];
      norm_gradient(one, y, rinverse[t], right[L - 1] + t * ldd);
    }
    for (int l = L - 1; l >= 0; l--) {
      T *of_z = right[l], *of_x = l ? right[l - 1] : two;
      product(SUB, n, ldo[l], n, reach[l], 1, bt, of_z, ldo[l], of_delta[l], ldo[l]);
      memset(of_x, 0, sizeof(T) * n * ldi[l]);
      attend_back(f, l, 0, x[l], of_z, similar[l], reach[l], of_x);
      meet_back(f, l, 0, x[l], of_z, of_x);
      for (int i = 0; i < n * ldi[l] && l; i++) of_x[i] *= xslope[l - 1][i];
    }
    if (p.norm) add(n * ldd, 1, of_query, two);
    tokens_out(two, chunk, n, p.of_queries);
  }
  // Behind allowed(), whose aim and chord it uses: into of_normed what goes to n, into of_error what goes by the aim to
  // k + shift - v.
  void allowed_back(const Found& f, int t, T of) {
    const T *e = f.error + t * ldd, *y = f.normed + t * ldd, root = std::sqrt(T(D));
    if (!p.norm) return add(ldd, 2 * of, e, of_delta[L - 1] + t * ldd);
    const T size = std::sqrt(dot(ldd, aim, aim)), along = root / 2 * (1 + dot(ldd, y, y) / D);
    times(ldd, 4 * of * size, chord, of_normed + t * ldd);
    for (int i = 0; i < ldd; i++) aim[i] = 4 * of * (along / size * aim[i] + y[i]);  // now its gradient
    const T mean = dot(ldd, aim, unit) / D;
    for (int i = 0; i < ldd; i++) {
      const T at_aim = (aim[i] - mean) * unit[i];
      of_error[t * ldd + i] = 2 * scale[i] * at_aim, of_scale[i] += (e[i] - 2 * scale[i] * y[i]) * at_aim;
    }
  }
  void hold_back(const Found& f, int first, int end) {
    for (int t = 0; t < f.n; t++) {
      const T all = asked(f, first, end, t), share = allowed(f, end, t) / all;
      if (!(share < 1)) continue;
      T of_share = 0;
      for (int l = first; l < end; l++) of_share += of_steps[l][t] * f.theta[l][t];
      const T of_asked = -of_share * share / all;
      if (end < L && share > 0) allowed_back(f, t, of_share / all);
      for (int l = first; l < end; l++) {
        const T *h = f.input[l] + t * ldi[l], square = dot(ldi[l], h, h), slope = slope_of(f, l, t);
        of_steps[l][t] *= share;  // now at theta
        of_mass[l][t] += of_asked * slope * square;
        add(ldi[l], 2 * of_asked * slope * f.mass[l][t], h, of_input[l] + t * ldi[l]);
        if (end == L) continue;
        const T of_square = of_asked * T(p.whole) * f.mass[l][t] * square;
        add(ldo[l], 2 * of_square, f.delta[l] + t * ldo[l], of_delta[l] + t * ldo[l]);
      }
    }
  }
  // (4) of one token, from its delta and what allowed_back has left; of_error ends as the gradient at k, shift and -v.
  // LayerNorm's derivative at z depends on z through n and r as well: see chunk._NormErrors.
  void error_back(const Found& f, int t, T* of_z) {
    const T *e = f.error + t * ldd, *y = f.normed + t * ldd, *delta = f.delta[L - 1] + t * ldd, r = f.inverse[t];
    T *of = of_delta[L - 1] + t * ldd, *at_answer = of_error + t * ldd;
    T *of_scaled = one, *scaled = one + ldd, *of_y = of_normed + t * ldd;
    if (!p.norm) {
      for (int i = 0; i < ldd; i++) of_z[i] = at_answer[i] = 2 * of[i];
      return;
    }
    norm_gradient(of, y, r, of_scaled);
    for (int i = 0; i < ldd; i++) {
      const T of_answer = 2 * of_scaled[i] * scale[i];
      scaled[i] = e[i] * scale[i], of_y[i] += of_answer * scale[i], at_answer[i] += of_answer;
      of_scale[i] += of_scaled[i] * e[i] + of_answer * y[i], of_shift[i] += at_answer[i];
    }
    norm_gradient(of_y, y, r, of_z);
    add(ldd, -r / D * dot(ldd, scaled, y), of_scaled, of_z);
    add(ldd, -r / D * dot(ldd, of, y), delta, of_z);
    add(ldd, -r / D * dot(ldd, of, delta), y, of_z);
  }
  void keys_back(int chunk, const Found& f) {
    const int n = f.n, last = L - 1;
    for (int l = 0; l < last; l++) {  // upward, through the back-propagation
      T *of_arriving = left[l + 1][W] + 2 * n * ldo[l], *of_z = right[l] + n * ldo[l];
      for (int i = 0; i < n * ldo[l]; i++) {
        of_arriving[i] = of_delta[l][i] * f.slope[l][i];
        of_z[i] = of_delta[l][i] * f.arriving[l][i] * f.bend[l][i];
      }
      through(ADD, l + 1, n, of_arriving, start[l + 1][W], of_delta[l + 1]);
      memcpy(right[l + 1] + 2 * n * ldo[l + 1], f.delta[l + 1], sizeof(T) * n * ldo[l + 1]);
    }
    T *h = f.input[last], *at_last = right[last] + n * ldd;
    for (int t = n - 1; t >= 0; t--) {  // a delta has reached the outputs behind it
      const T *reach = f.reach + (t + 1) * bt + t, *behind = at_last + (t + 1) * ldd;
      if (p.exact) product(SUB, 1, ldd, n - 1 - t, reach, 0, bt, behind, ldd, of_delta[last] + t * ldd, ldd);
      error_back(f, t, at_last + t * ldd);
    }
    if (p.exact) {
      attend_back(f, last, -1, h, at_last, f.similar, f.reach, of_input[last]);
      meet_back(f, last, -1, h, at_last, of_input[last]);
      spread(f, last, -1, n, h, n);
    }
    if (p.holds_last) hold_back(f, last, L);
    for (int l = last; l >= 0; l--) {  // downward, through the forward pass
      T* below = l ? right[l - 1] + n * ldi[l] : nullptr;
      if (!p.exact || l < last) {
        down(l, n, right[l] + n * ldo[l], start[l], 1, one);
        add(n * ldi[l], 1, one, of_input[l]);
        memcpy(left[l][W] + n * ldi[l], f.input[l], sizeof(T) * n * ldi[l]);
      }
      for (int i = 0; i < n * ldi[l] && l; i++) below[i] += of_input[l][i] * f.slope[l - 1][i];
    }
    if (p.norm) add(n * ldd, 1, of_error, of_input[0]);
    times(n * ldd, -1, of_error, of_error);
    tokens_out(of_input[0], chunk, n, p.of_keys);
    tokens_out(of_error, chunk, n, p.of_values);
  }
  // (5), (2) and the keys' errors at what the chunk began with: from the gradient behind the chunk, in place.
  void state_back(const Found& f, T* g) {
    const int last = f.n - 1;
    for (int l = 0; l < L; l++) {
      const T keep = f.keep[l][last], carry = f.writes[l][last * bc + b], stay = f.decay[l][last * bc + b];
      T* of[] = {g + place(l, W), g + place(l, S), of_anchor[l]};
      V at_keep = {}, at_carry = {}, at_stay = {};
      for (int64_t i = 0; i < half(l); i += LANES) {
        const V of_w = load(of[W] + i), of_s = load(of[S] + i), momentum = load(start[l][S] + i);
        at_keep += of_w * load(start[l][W] + i), at_carry += of_w * momentum, at_stay += of_s * momentum;
        store(of[W] + i, keep * of_w), store(of[S] + i, carry * of_w + stay * of_s);
        if (!p.anchored) continue;
        at_keep -= of_w * load(start[l][M0] + i);
        store(of[M0] + i, load(of[M0] + i) + (1 - keep) * of_w);
      }
      of_keep[l][last] += sum(at_keep), of_writes[l][last * bc + b] += sum(at_carry);
      of_decay[l][last * bc + b] += sum(at_stay);
      const int met = p.exact && l == L - 1 ? 2 : 1, all = l ? 3 : 2;  // blocks of rows that went through S, M_0 and W
      for (int part = 0; part < parts; part++)
        outer(ADD, l, (part == W ? all : met) * f.n, left[l][part], right[l], of[part]);
    }
  }
  // (1), and theta's way into steps and masses.
  void gates_back(int chunk, const Found& f) {
    for (int l = 0; l < L; l++) {
      T of_kept = 0;
      for (int t = f.n - 1; t >= 0; t--) {
        const T eta = f.eta[l][t], keep = 1 - f.alpha[l][t], left = 1 - eta, smallest = p.smallest_decay;
        T *of_g = of_writes[l] + t * bc, *of_e = of_decay[l] + t * bc;
        add(bc, 1, of_g, of_e);
        of_kept += of_keep[l][t];
        const T at_keep = dot(bc, of_g, f.writes[l] + (t - 1) * bc) + of_kept * f.keep[l][t - 1];
        const T at_eta = dot(bc, of_e, f.decay[l] + (t - 1) * bc);
        add(bc, keep, of_g, of_g - bc), add(bc, eta, of_e, of_e - bc);
        of_kept *= keep;
        const int64_t gate = token(chunk, t) * L + l;
        ((T*)p.of_theta)[gate] = of_steps[l][t] + of_mass[l][t] / (left > smallest ? left : smallest);
        ((T*)p.of_eta)[gate] = at_eta + (left >= smallest ? of_mass[l][t] * f.mass[l][t] / left : 0);
        ((T*)p.of_alpha)[gate] = -at_keep;
      }
    }
  }
  // A chunk from the gradient g at the state behind it to that at the one before, in place.
  void back(int chunk, const Found& f, const T* before, T* g) {
    if (f.n) {
      begin_in(before);
      memset(base + of_chunk, 0, of_end - of_chunk);
      shell_back(f, before + state_size, g);
      queries(chunk, f);
      reads_back(chunk, f);
      end_back(f, g);
      if (p.exact) hold_back(f, 0, L - 1);
      keys_back(chunk, f);
      state_back(f, g);
      gates_back(chunk, f);
    }
    if (!p.restarts || !p.restarts[chunk * p.rows + row]) return;
    add(state_size, 1, g, of_fresh);  // a document has begun in its first state, not in what the chunk before has left
    memset(g, 0, state_size * sizeof(T));
  }
  void gradients_out(const T* g) {
    begin_in(g), state_out(p.of_state);
    if (p.of_fresh[W][0]) begin_in(of_fresh), state_out(p.of_fresh);
    memcpy((T*)p.of_scale + memory * D, of_scale, D * sizeof(T));
    memcpy((T*)p.of_shift + memory * D, of_shift, D * sizeof(T));
    for (int l = 0; l < L && p.anchored; l++)
      out(din[l], dout[l], ldo[l], of_anchor[l], (T*)p.of_anchors[l] + matrix(l), dout[l]);
  }

  // ------------------------------------------------------------------------------------------ memories in turn
  // A chunk up to its keys' errors, from its own first state if a document begins; whether there are tokens in it.
  bool enter(int chunk, Found& f, T* own) {
    if (p.restarts && p.restarts[chunk * p.rows + row]) begin_in(p.fresh, own);
    f.n = p.counts ? p.counts[chunk * p.rows + row] : b;
    f.full = p.closed && f.n == b;
    if (!f.n) return false;
    coefficients(chunk, f);
    if (old) old_in(f);
    keys(chunk, f);
    return true;
  }
  // In an open chunk the first tokens are worked out already; what is worked out of all of them goes on, or ends.
  void forward(int64_t from, int64_t to) {
    Found f;
    take(f);
    T* state = take(state_size);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      begin_in(p.state, state);
      for (int c = 0; c < p.chunks; c++) {
        if (p.kept && c && c % p.group == 0) save(kept(c / p.group));
        if (!enter(c, f, state)) continue;
        queries(c, f);
        if (p.steps) worked_out(f);
        if (p.after[W][0]) end(f, state);
      }
      if (p.after[W][0]) state_out(p.after);
    }
  }
  // Goes through a group once more from the state kept before it, then back through its chunks.
  void backward(int64_t from, int64_t to) {
    Found counted, *found = (Found*)take(p.group * sizeof(Found) / sizeof(T) + 1);
    T *states = take((p.group + 1) * state_size), *g = take(state_size);
    for (int i = 0; i < p.group; i++) take(base ? found[i] : counted);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      begin_in(p.of_state, g), save(g);
      memset(base + of_memory, 0, of_chunk - of_memory);
      for (int group = (p.chunks - 1) / p.group; group >= 0; group--) {
        const int first = group * p.group, last = first + p.group < p.chunks ? first + p.group : p.chunks;
        if (group)
          begin_in(kept(group));
        else
          begin_in(p.state, states);
        for (int c = first; c < last; c++) {
          T* before = states + (c - first) * state_size;
          const bool some = enter(c, found[c - first], before);
          save(before);
          if (some) end(found[c - first], before + state_size);
        }
        for (int c = last - 1; c >= first; c--) back(c, found[c - first], states + (c - first) * state_size, g);
      }
      gradients_out(g);
    }
  }
};

// Bytes of working memory that a thread needs, without a base; else the work.
int64_t run(const Problem& p, bool back, int64_t from, int64_t to, void* base) {
  Walk walk(p, base, back);
  back ? walk.backward(from, to) : walk.forward(from, to);
  return walk.used;
}
}  // namespace NAME
#undef NAME
#undef REAL
#undef SINGLE

#else  // ------------------------------------------------------------------------------------------ instances
#if defined(__x86_64__) && defined(__clang__)
#define FOR(features) _Pragma(TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define DONE _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define FOR(features) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(features)))
#define DONE _Pragma("GCC pop_options")
#endif
#define TEXT(x) #x

#define BYTES 16
#define NAME baseline_double
#define REAL double
#include "memory.cpp"
#define NAME baseline_single
#define REAL float
#define SINGLE
#include "memory.cpp"
#undef BYTES
#ifdef FOR
#define BYTES 32
FOR("avx2,fma")
#define NAME avx2_double
#define REAL double
#include "memory.cpp"
#define NAME avx2_single
#define REAL float
#define SINGLE
#include "memory.cpp"
DONE
#undef BYTES
#define BYTES 64
FOR("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#define NAME avx512_double
#define REAL double
#include "memory.cpp"
#define NAME avx512_single
#define REAL float
#define SINGLE
#include "memory.cpp"
DONE
#endif

typedef int64_t (*Run)(const Problem&, bool, int64_t, int64_t, void*);
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
int64_t memory_workspace(const Problem* p, bool back, int level, int bits) {
  return chosen(level, bits)(*p, back, 0, 0, nullptr);
}
// Forward or back; `bytes` of the workspace belong to each thread.
void memory_run(const Problem* p, bool back, int level, int bits, char* workspace, int64_t bytes) {
  at::parallel_for(0, p->rows * p->heads, 1, [&](int64_t from, int64_t to) {
    chosen(level, bits)(*p, back, from, to, workspace + at::get_thread_num() * bytes);
  });
}
}
#endif
