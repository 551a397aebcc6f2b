// The chunk form of the memory as one CPU operation: a thread takes a memory through all its chunks, or back.
//
// Twin of memory/chunk.py, which explains the equations; the oracle of both is memory/naive.py. The file reads in their
// order, then back. Of one matrix, in a chunk that begins with weights W and momentum S:
//
//   (1) E[t, j] = eta_t E[t-1, j], G[t, j] = (1 - alpha_t) G[t-1, j] + E[t, j], E[t, t] = G[t, t] = 1
//       How much of token j's step is in momentum and weights at t. W and S have columns of their own behind the
//       tokens', which begin with G = 1 and E = 1: a_t and f_t in G, how much of them is in the weights at t.
//   (2) met_t = a_t x_t W + f_t x_t S + (1 - a_t) x_t M_0
//       What x_t meets there without the chunk's own writes; M_0 is where forgetting leads, if it leads anywhere.
//   (3) z_t = met_t - sum_j G[t, j] theta_j (x_t . h_j) delta_j
//       What a query reads. The last matrix answers its keys' inputs h_t with (2) and (3) of t - 1, or of the chunk's
//       start if the rule is not exact; other matrices theirs with W alone.
//   (4) e_t = 2 (M(k_t) - v_t), delta_t
//       Errors of the answer and at the matrix' output.
//   (5) W <- a W + f S + (1 - a) M_0 - sum_j G[n, j] theta_j h_j^T delta_j, and with E likewise S
//       Behind the last token n, each into its shell.
//
// Letters: token t reads, token j writes; n tokens of a chunk, b slots; d[l] and d[l + 1] are d_in and d_out of matrix l.
// Channels are padded with zeros to whole lines of the cache, tokens to whole vectors. The file includes itself for
// every instruction set, with BYTES as the size of a vector.

#ifndef BYTES
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// What operation.py passes; tensors are contiguous, N = rows * heads memories, widths in shapes padded ones.
struct Problem {
  int64_t rows, heads, chunks, size, group, depth, width[5];  // width: d_in of each matrix, then D, not padded
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
constexpr int LINE = 64;  // bytes
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#endif

#ifdef BYTES
namespace NAME {
enum Mode { SET, ADD, SUB };
enum Part { W, S, M0 };  // what a chunk begins with

template <typename T>
struct Walk {
  static constexpr int LANES = BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(BYTES)));
  INLINE static V load(const T* p) {
    V x;
    memcpy(&x, p, BYTES);
    return x;
  }
  INLINE static void store(T* p, V x) { memcpy(p, &x, BYTES); }
  INLINE static int padded(int64_t n, int to = LANES) { return (n + to - 1) / to * to; }

  // -------------------------------------------------------------------------------------------- small products
  template <int m, int v>
  INLINE static void tile(Mode mode, int K, const T* A, int row, int column, const T* B, int ldb, T* C, int ldc) {
    V sum[m][v] = {}, b[v];
    for (int k = 0; k < K; k++, A += column, B += ldb) {
#pragma GCC unroll 8
      for (int j = 0; j < v; j++) b[j] = load(B + j * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < v; j++) sum[i][j] += A[(int64_t)i * row] * b[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++, C += ldc)
#pragma GCC unroll 8
      for (int j = 0; j < v; j++) {
        const V x = sum[i][j], c = mode == SET ? V{} : load(C + j * LANES);
        store(C + j * LANES, mode == SUB ? c - x : c + x);
      }
  }
  template <int m, int v, typename... Rest>
  INLINE static void tile_of(int rows, Rest... rest) {
    if (rows == m) return tile<m, v>(rest...);
    if constexpr (m > 1) tile_of<m - 1, v>(rows, rest...);
  }
  // C (M, N) {=, +=, -=} A (M, K) B (K, N): A with any strides, N whole vectors; in tiles of about equal height.
  NOINLINE static void product(Mode mode, int M, int N, int K, const T* A, int row, int column, const T* B, int ldb,
                               T* C, int ldc) {
    constexpr int most = BYTES == 64 ? 8 : 6;  // rows, two vectors wide: as many as a processor has registers for
    const int tiles = (M + most - 1) / most;
    for (int n = 0, v; n < N; n += v * LANES) {
      v = M == 1 && n + 4 * LANES <= N ? 4 : n + 2 * LANES <= N ? 2 : 1;
      for (int i = 0, m = 0, rows; i < tiles; i++, m += rows) {
        rows = M / tiles + (i < M % tiles);
        const T* a = A + (int64_t)m * row;
        T* c = C + (int64_t)m * ldc + n;
        if (v == 4) tile<1, 4>(mode, K, a, row, column, B + n, ldb, c, ldc);
        if (v == 2) tile_of<most, 2>(rows, mode, K, a, row, column, B + n, ldb, c, ldc);
        if (v == 1) tile_of<most, 1>(rows, mode, K, a, row, column, B + n, ldb, c, ldc);
      }
    }
  }

  INLINE static T sum(V x) {
    T part[LANES];
    store(part, x);
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
  }
  INLINE static T dot(int n, const T* a, const T* b) {  // n whole vectors, like the next
    V s = {};
    for (int i = 0; i < n; i += LANES) s += load(a + i) * load(b + i);
    return sum(s);
  }
  INLINE static void add(int n, T factor, const T* x, T* y) {
    for (int i = 0; i < n; i += LANES) store(y + i, load(y + i) + factor * load(x + i));
  }
  INLINE static void times(int n, T factor, const T* x, T* y) {
    for (int i = 0; i < n; i += LANES) store(y + i, factor * load(x + i));
  }
  static void copy(int64_t n, const T* from, T* to) {
    if (n) memcpy(to, from, n * sizeof(T));
  }

  // Elements of two vectors in turn, from one on; a compiler makes one instruction of it.
  template <int... i>
  INLINE static V in_turn(V x, V y, int from, std::integer_sequence<int, i...>) {
    return V{(i % 2 ? y : x)[from + i / 2]...};
  }
  // to (C, R) = from (R, C)^T; rows beyond R come as zeros, and `keep` rows of the result are written.
  NOINLINE static void transpose(int R, int C, const T* from, int ldf, T* to, int ldt, int keep) {
    const std::make_integer_sequence<int, LANES> lanes{};
    for (int r = 0; r < R; r += LANES)
      for (int c = 0; c < C; c += LANES) {
        V x[LANES], y[LANES];
        for (int i = 0; i < LANES; i++) x[i] = r + i < R ? load(from + (int64_t)(r + i) * ldf + c) : V{};
#pragma GCC unroll 4
        for (int step = 1; step < LANES; step *= 2) {  // log2(LANES) of them turn a square of vectors
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) y[i] = in_turn(x[i / 2], x[i / 2 + LANES / 2], i % 2 * LANES / 2, lanes);
          memcpy(x, y, sizeof x);
        }
        for (int i = 0; i < LANES && c + i < keep; i++) store(to + (int64_t)(c + i) * ldt + r, x[i]);
      }
  }

  // -------------------------------------------------------------------------------------------- GELU, exact
  template <int terms>
  INLINE static V polynomial(V x, const T (&c)[terms]) {  // the highest power first
    V y = V{} + c[0];
    for (int i = 1; i < terms; i++) y = y * x + c[i];
    return y;
  }
  // Phi(z) and the density phi(z). In float32 exp is a power of two times a polynomial (Cephes), and what Phi lacks to
  // 0 or 1 a rational function times the density (Abramowitz and Stegun 7.1.26, within 2e-7).
  INLINE static void normal(V z, V& cdf, V& density) {
    if constexpr (sizeof(T) == 8) {
      for (int i = 0; i < LANES; i++) {
        cdf[i] = 0.5 * __builtin_erfc(-z[i] * 0.70710678118654752440);
        density[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * z[i] * z[i]);
      }
    } else {
      typedef int32_t I __attribute__((vector_size(BYTES)));
      V e = T(-0.5) * z * z;
      e = e < T(-87) ? V{} - T(87) : e;
      const I n = __builtin_convertvector(e * T(1.44269504088896341) - T(0.5), I);
      const V whole = __builtin_convertvector(n, V), r = e - whole * T(0.693359375) - whole * T(-2.12194440e-4);
      const V y = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                 1.6666665459e-1f, 5.0000001201e-1f});
      const V power = (y * r * r + r + T(1)) * (V)((n + 127) << 23), x = z < T(0) ? -z : z;
      const V t = T(1) / (T(1) + T(0.3275911 * 0.70710678118654752) * x);
      const V tail = T(0.5) * power * t * polynomial(t, {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f,
                                                         0.254829592f});
      cdf = z < T(0) ? tail : T(1) - tail;
      density = T(0.3989422804014327) * power;
    }
  }
  // gelu(z), its slope and its bend (second derivative), n whole vectors.
  NOINLINE static void gelu(int n, const T* z, T* value, T* slope, T* bend) {
    for (int i = 0; i < n; i += LANES) {
      V x = load(z + i), cdf, density;
      normal(x, cdf, density);
      store(value + i, x * cdf);
      store(slope + i, cdf + x * density);
      store(bend + i, (T(2) - x * x) * density);
    }
  }

  // -------------------------------------------------------------------------------------------- one memory's way
  typedef std::array<T*, 4> List;  // by matrix
  struct Pass {  // Tokens on their way through the matrices: rows of their inputs, of GELU's slope and bend behind them,
    bool keys;   // of how far what the chunk writes reaches them (see attend), of gradients.
    List x, slope, bend, similar, reach, of_x;
    Pass(Walk& w, bool keys, const List& of_x)
        : keys(keys), x(w.rows()), slope(w.rows()), bend(w.rows()), similar(w.each(w.b * w.bt)),
          reach(w.each(w.b * w.bt)), of_x(of_x) {}
  };
  struct Found : Pass {  // What is worked out of a chunk's keys and gates.
    int n;
    List mass, steps, writes, decay;  // the latter G and E; row -1 is before the first token
    List arriving, delta;
    T *error, *normed, *inverse, *shell;  // the latter what the shell has scaled the matrices by
    Found(Walk& w)
        : Pass(w, true, w.of_input), mass(w.each(w.b)), steps(w.each(w.b)), writes(w.gates()), decay(w.gates()),
          arriving(w.rows()), delta(w.rows()), error(w.take(w.b * w.D)), normed(w.take(w.b * w.D)),
          inverse(w.take(w.b)), shell(w.take(8)) {}
  };
  const Problem& p;
  char* const base;
  const int backward, L = p.depth, last = L - 1, b = p.size, old = p.old, parts = 2 + p.anchored;
  const std::array<int, 5> d = padded_widths();
  const int D = d[L], widest = *std::max_element(d.begin(), d.end());
  const T width = p.width[L];                    // D without padding
  const int bt = padded(b), bc = padded(b + 2);  // padded b, and b with the columns of W and S
  const int64_t state_size = place(L, W);
  int64_t used = 0, memory = 0, row = 0, head = 0;
  // Working memory; with a base of null it is only counted.
  const T *state, *scale, *shift;  // what a chunk begins with
  T *unit = take(D), *none = take(D), *aim = take(D), *chord = take(D), *inverse = take(b), *normed = take(b * D);
  T *output = take(b * D), *values = take(b * D), *turned = take(widest * bt), *swapped = take(widest * bt);
  T* one = take(3 * b * widest);
  const std::array<List, 3> left = {rows(3), rows(3), rows(3)};  // rows that have met W, S and M_0
  // Gradients; they begin with zeros in every memory, from of_chunk on in every chunk.
  const int64_t of_memory = used;
  T *of_scale = of(D), *of_shift = of(D), *of_fresh = of(state_size), *of_anchor = of(state_size);
  const int64_t of_chunk = used;
  const List of_input = rows(backward), of_delta = rows(backward);
  const List right = rows(3 * backward);  // at what came out of left: of reads, of keys, of errors on their way down
  const List of_writes = gates(), of_decay = gates(), of_steps = each(b), of_mass = each(b);
  T *of_error = of(b * D), *of_normed = of(b * D);
  const Pass reads{*this, false, rows(backward)};
  const int64_t of_end = used;

  Walk(const Problem& p, void* base, bool backward) : p(p), base((char*)base), backward(backward) {}
  T* take(int64_t n) {
    T* found = (T*)((uintptr_t)base + used);
    used += (n * sizeof(T) + LINE - 1) / LINE * LINE;
    return found;
  }
  T* of(int64_t n) { return take(backward * n); }
  List each(int64_t n, int64_t first = 0) {
    List list{};
    for (int l = 0; l < L; l++) list[l] = take(n) + first;
    return list;
  }
  List rows(int blocks = 1) { return each((int64_t)blocks * b * widest); }
  List gates() { return each((b + 1) * bc, bc); }
  std::array<int, 5> padded_widths() const {
    std::array<int, 5> widths{};
    for (int l = 0; l <= L; l++) widths[l] = padded(p.width[l], LINE / sizeof(T));
    return widths;
  }
  int64_t size(int l) const { return (int64_t)d[l] * d[l + 1]; }
  T entries(int l) const { return T(p.width[l]) * p.width[l + 1]; }
  int64_t place(int l, int part) const {  // of W or S in a state
    int64_t at = part * size(l);
    while (l--) at += 2 * size(l);
    return at;
  }
  const T* matrix(int l, int part, const T* state) const {  // of the state that the tensors hold if it is null
    if (part == M0) return (const T*)p.anchors[l] + head * size(l);
    return state ? state + place(l, part) : (const T*)p.state[part][l] + memory * size(l);
  }

  // Where tensors hold what is of this memory.
  int64_t token(int chunk, int t) const { return (row * p.chunks * b + (int64_t)chunk * b + t) * p.heads + head; }
  T gate(const void* gates, int chunk, int t, int l) const { return ((const T*)gates)[token(chunk, t) * L + l]; }
  T* kept(int group) const { return (T*)p.kept + ((group - 1) * p.rows * p.heads + memory) * state_size; }
  void tokens_in(int n, const void* from, int64_t first, T* to) {
    for (int t = 0; t < n; t++) copy(D, (const T*)from + (first + t * p.heads) * D, to + t * D);
  }
  void tokens_out(int n, const T* from, void* to, int64_t first) {
    for (int t = 0; t < n; t++) copy(D, from + t * D, (T*)to + (first + t * p.heads) * D);
  }
  void state_in(const void* const (&from)[2][4], T* to) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) copy(size(l), (const T*)from[part][l] + memory * size(l), to + place(l, part));
  }
  void state_out(const T* from, void* const (&to)[2][4]) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) copy(size(l), matrix(l, part, from), (T*)to[part][l] + memory * size(l));
  }
  void save(T* to) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) copy(size(l), matrix(l, part, state), to + place(l, part));
  }
  void begin(int64_t which) {
    memory = which, row = which / p.heads, head = which % p.heads;
    for (int i = 0; i < D; i++) unit[i] = i < width, none[i] = 0;
    scale = p.scale ? (const T*)p.scale + head * D : unit;
    shift = p.shift ? (const T*)p.shift + head * D : none;
  }
  // An open chunk: what all its tokens come to goes to tensors, and what the first of them have come to is there.
  void open(Found& f) {
    for (int l = 0; l < L; l++) {
      f.x[l] = (T*)p.inputs[l] + memory * b * d[l], f.delta[l] = (T*)p.deltas[l] + memory * b * d[l + 1];
      copy(old * d[l], (const T*)p.old_inputs[l] + memory * old * d[l], f.x[l]);
      copy(old * d[l + 1], (const T*)p.old_deltas[l] + memory * old * d[l + 1], f.delta[l]);
    }
  }

  // Products of a matrix: z (n, d_out) of x (n, d_in), and the matrix of x^T z.
  void through(Mode mode, int l, int n, const T* x, const T* matrix, T* z) {
    product(mode, n, d[l + 1], d[l], x, d[l], 1, matrix, d[l + 1], z, d[l + 1]);
  }
  void outer(Mode mode, int l, int n, const T* x, const T* z, T* matrix) {
    product(mode, d[l], d[l + 1], n, x, 1, d[l], z, d[l + 1], matrix, d[l + 1]);
  }
  // to (n, d_in), for W or W, S and M_0 one after the other, = z (n, d_out) times the matrix transposed.
  void down(int l, int n, const T* z, const T* state, int count, T* to) {
    transpose(n, d[l + 1], z, d[l + 1], turned, bt, d[l + 1]);
    for (int part = 0; part < count; part++, to += n * d[l]) {
      product(SET, d[l], padded(n), d[l + 1], matrix(l, part, state), d[l + 1], 1, turned, bt, swapped, bt);
      transpose(d[l], padded(n), swapped, bt, to, d[l], n);
    }
  }
  // to (n, m) = x y^T for rows of tokens.
  void pairs(int n, int m, int d, const T* x, const T* y, T* to) {
    transpose(m, d, y, d, turned, bt, d);
    product(SET, n, padded(m), d, x, d, 1, turned, bt, to, bt);
  }

  // -------------------------------------------------------------------------------------------- (1) coefficients
  void coefficients(int chunk, Found& f) {
    for (int l = 0; l < L; l++) {
      memset(f.decay[l] - bc, 0, bc * sizeof(T)), memset(f.writes[l] - bc, 0, bc * sizeof(T));
      f.writes[l][b + W - bc] = f.decay[l][b + S - bc] = 1;
      for (int t = 0; t < f.n; t++) {
        const T eta = gate(p.eta, chunk, t, l), theta = gate(p.theta, chunk, t, l), smallest = p.smallest_decay;
        T *e = f.decay[l] + t * bc, *g = f.writes[l] + t * bc;
        times(bc, eta, e - bc, e), times(bc, 1 - gate(p.alpha, chunk, t, l), g - bc, g), add(bc, 1, e, g);
        e[t] = g[t] = 1;
        f.mass[l][t] = theta / (1 - eta > smallest ? 1 - eta : smallest);
        f.steps[l][t] = t < old ? ((const T*)p.old_steps)[((row * old + t) * p.heads + head) * L + l] : theta;
      }
    }
  }

  // -------------------------------------------------------------------------------------------- (2), (3) outputs
  // Keys meet W alone but in the last matrix of an exact rule, where they meet what the tokens before them have left.
  int met(const Pass& s, int l) const { return s.keys && (l < last || !p.exact) ? 1 : parts; }
  // Of such a row the coefficients G, and a, f and 1 - a in factors, each of which takes it to its block of left.
  const T* spread(const Found& f, const Pass& s, int l, int t, int block, T* factors) {
    const T* g = f.writes[l] + (t - s.keys) * bc;
    factors[W] = met(s, l) == 1 ? 1 : g[b + W], factors[S] = g[b + S], factors[M0] = 1 - g[b + W];
    for (int part = 0; part < met(s, l); part++)
      times(d[l], factors[part], s.x[l] + t * d[l], left[part][l] + (block * f.n + t) * d[l]);
    return g;
  }
  // How far the deltas of all the chunk's tokens reach rows: G[t, j] theta_j (x_t . h_j), and the products alone.
  void attend(const Found& f, const Pass& s, int l) {
    T *similar = s.similar[l] + old * bt, *reach = s.reach[l] + old * bt;
    pairs(f.n - old, f.n, d[l], s.x[l] + old * d[l], f.x[l], similar);
    for (int t = old; t < f.n; t++, similar += bt, reach += bt) {
      const T* g = f.writes[l] + (t - s.keys) * bc;
      for (int j = 0; j < f.n; j++) reach[j] = similar[j] * g[j] * f.steps[l][j];
    }
  }
  // New tokens through all matrices; z (b, D) of the last one is without what keys meet of the chunk's own writes.
  void pass(int chunk, const Found& f, const Pass& s, T* z) {
    const int n = f.n - old;
    T factors[3];
    for (int l = 0; l < L; l++) {
      T* out = (l < last ? one : z) + old * d[l + 1];
      for (int t = old; t < f.n; t++) spread(f, s, l, t, 0, factors);
      for (int part = 0; part < met(s, l); part++)
        through(part ? ADD : SET, l, n, left[part][l] + old * d[l], matrix(l, part, state), out);
      if (s.keys && l == last && p.holds_last) hold(chunk, f, last, L);
      if (met(s, l) == parts) attend(f, s, l);
      if (!s.keys) product(SUB, n, d[l + 1], f.n, s.reach[l] + old * bt, bt, 1, f.delta[l], d[l + 1], out, d[l + 1]);
      if (l == last) break;
      const int64_t first = old * d[l + 1];
      gelu(n * d[l + 1], out, s.x[l + 1] + first, s.slope[l] + first, s.bend[l] + first);
    }
  }

  // -------------------------------------------------------------------------------------------- (4) the keys' errors
  void layer_norm(int n, const T* raw, T* normed, T* inverse) {
    const T smaller = T(1) / ((int64_t)1 << 48);  // as network.layer_norm: its square stays finite
    for (int t = 0; t < n; t++, raw += D, normed += D) {
      const T mean = dot(D, raw, unit) / width;
      for (int i = 0; i < D; i++) normed[i] = (raw[i] - mean) * smaller * unit[i];
      const T r = 1 / std::sqrt(dot(D, normed, normed) / width + T(p.epsilon) * smaller * smaller);
      times(D, r, normed, normed);
      inverse[t] = r * smaller;
    }
  }
  // Of one token, its own transpose as a map: r (g - mean g - n mean(g n)).
  void norm_gradient(const T* g, const T* normed, T inverse, T* to) {
    const T mean = dot(D, g, unit) / width, along = dot(D, g, normed) / width;
    for (int i = 0; i < D; i++) to[i] = inverse * unit[i] * (g[i] - mean - along * normed[i]);
  }
  void keys(int chunk, Found& f) {
    tokens_in(f.n - old, p.keys, token(chunk, old), f.x[0] + old * D);
    tokens_in(f.n - old, p.values, token(chunk, old), values + old * D);
    pass(chunk, f, f, output);
    for (int t = old; t < f.n; t++) {
      product(SUB, 1, D, p.exact ? t : 0, f.reach[last] + t * bt, bt, 1, f.delta[last], D, output + t * D, D);
      error(f, t, output + t * D, values + t * D);
    }
    for (int l = last; l > 0; l--) {
      down(l, f.n - old, f.delta[l] + old * d[l + 1], state, 1, f.arriving[l - 1] + old * d[l]);
      for (int i = old * d[l]; i < f.n * d[l]; i++) f.delta[l - 1][i] = f.arriving[l - 1][i] * f.slope[l - 1][i];
    }
    if (p.exact) hold(chunk, f, 0, last);
    for (int l = 0; l < L && p.steps; l++)
      for (int t = 0; t < f.n; t++) ((T*)p.steps)[token(chunk, t) * L + l] = f.steps[l][t];
  }
  T* error_of(const Found& f, int t) const {  // without LayerNorm the last matrix' output is the answer
    return (p.norm ? f.error : f.delta[last]) + t * D;
  }
  // Of one token's answer and, through LayerNorm, of the last matrix' output z, which is lost.
  void error(const Found& f, int t, T* z, const T* value) {
    const T* key = f.x[0] + t * D;
    T *e = error_of(f, t), *y = f.normed + t * D;
    if (!p.norm) {
      for (int i = 0; i < D; i++) e[i] = 2 * (z[i] - value[i]);
      return;
    }
    layer_norm(1, z, y, f.inverse + t);
    for (int i = 0; i < D; i++) e[i] = 2 * (key[i] + y[i] * scale[i] + shift[i] - value[i]), z[i] = e[i] * scale[i];
    norm_gradient(z, y, f.inverse[t], f.delta[last] + t * D);
  }
  // For the matrices below the last 4 times what can be removed of a loss, through LayerNorm rule.removable_loss.
  T allowed(const Found& f, int end, int t) {
    const T *e = error_of(f, t), *y = f.normed + t * D, root = std::sqrt(width);
    if (end == L) return 1;
    if (!p.norm) return dot(D, e, e);
    for (int i = 0; i < D; i++) aim[i] = scale[i] * (e[i] - 2 * scale[i] * y[i]);
    add(D, -dot(D, aim, unit) / width, unit, aim);
    const T size = std::sqrt(dot(D, aim, aim)), inverse = size > 0 ? 1 / size : 0;
    for (int i = 0; i < D; i++) chord[i] = y[i] / root + inverse * aim[i];
    return 2 * root * size * dot(D, chord, chord);
  }
  // Steps held to what they remove of an error, rule.last_step_share and lower_step_share, or its gradient: of some
  // matrices together, the last one or all below it. A matrix asks for slope mass |h|^2.
  void hold(int chunk, const Found& f, int first, int end, bool back = false) {
    for (int t = old; t < f.n; t++) {
      T asked = 0, of_share = 0, slope[4], square[4];
      for (int l = first; l < end; l++) {
        const T *h = f.x[l] + t * d[l], *delta = f.delta[l] + t * d[l + 1];
        slope[l] = l == last ? 2 : T(p.whole) * dot(d[l + 1], delta, delta), square[l] = dot(d[l], h, h);
        asked += slope[l] * f.mass[l][t] * square[l];
      }
      const T share = allowed(f, end, t) / asked;
      for (int l = first; l < end && share < 1; l++) {
        if (back) of_share += of_steps[l][t] * gate(p.theta, chunk, t, l);
        (back ? of_steps : f.steps)[l][t] *= share;  // on the way back the gradient at theta
      }
      if (!back || !(share < 1)) continue;
      if (end < L && share > 0) allowed_back(f, t, of_share / asked);
      for (int l = first; l < end; l++) {
        const T of_asked = -of_share * share / asked;
        of_mass[l][t] += of_asked * slope[l] * square[l];
        add(d[l], 2 * of_asked * slope[l] * f.mass[l][t], f.x[l] + t * d[l], of_input[l] + t * d[l]);
        const T of_slope = l == last ? 0 : of_asked * T(p.whole) * f.mass[l][t] * square[l];
        add(d[l + 1], 2 * of_slope, f.delta[l] + t * d[l + 1], of_delta[l] + t * d[l + 1]);
      }
    }
  }
  // Behind allowed(), whose aim and chord it uses: into of_normed what goes to n, into of_error what goes by the aim to
  // k + shift - v.
  void allowed_back(const Found& f, int t, T of) {
    const T *e = error_of(f, t), *y = f.normed + t * D, root = std::sqrt(width);
    if (!p.norm) return add(D, 2 * of, e, of_delta[last] + t * D);
    const T size = std::sqrt(dot(D, aim, aim)), along = root / 2 * (1 + dot(D, y, y) / width);
    times(D, 4 * of * size, chord, of_normed + t * D);
    for (int i = 0; i < D; i++) aim[i] = 4 * of * (along / size * aim[i] + y[i]);  // now its gradient
    add(D, -dot(D, aim, unit) / width, unit, aim);
    for (int i = 0; i < D; i++)
      of_error[t * D + i] = 2 * scale[i] * aim[i], of_scale[i] += (e[i] - 2 * scale[i] * y[i]) * aim[i];
  }

  // -------------------------------------------------------------------------------------------- reads
  // Each query through the state that its own token has left.
  void queries(int chunk, const Found& f) {
    tokens_in(f.n - old, p.queries, token(chunk, old), reads.x[0] + old * D);
    pass(chunk, f, reads, output);
    if (p.norm) layer_norm(f.n - old, output + old * D, normed + old * D, inverse + old);
    for (int t = old; t < f.n && p.norm; t++)
      for (int i = 0, at = t * D; i < D; i++, at++) output[at] = reads.x[0][at] + normed[at] * scale[i] + shift[i];
    const int64_t first = token(chunk, old) - (row + 1) * old * p.heads;  // the tensor has reads of new tokens only
    if (p.reads) tokens_out(f.n - old, output + old * D, p.reads, first);
  }

  // -------------------------------------------------------------------------------------------- (5) the chunk's end
  // h times how much of each step is in weights or momentum after the chunk.
  void stepped(const Found& f, int l, const T* reach, T* to) {
    for (int j = 0; j < f.n; j++) times(d[l], reach[j] * f.steps[l][j], f.x[l] + j * d[l], to + j * d[l]);
  }
  void end(const Found& f, T* after) {
    for (int l = 0; l < L; l++) {
      const T *g = f.writes[l] + (f.n - 1) * bc, *e = f.decay[l] + (f.n - 1) * bc, *anchor = matrix(l, M0, state);
      const T *weight = matrix(l, W, state), *momentum = matrix(l, S, state), limit = p.rms_limit;
      T* to[] = {after + place(l, W), after + place(l, S)};
      for (int64_t i = 0; i < size(l); i += LANES) {
        const V s = load(momentum + i);
        V w = g[b + W] * load(weight + i) + g[b + S] * s;
        if (p.anchored) w += (1 - g[b + W]) * load(anchor + i);
        store(to[W] + i, w), store(to[S] + i, e[b + S] * s);
      }
      for (int part : {W, S}) {
        stepped(f, l, part == W ? g : e, one);
        outer(SUB, l, f.n, one, f.delta[l], to[part]);
        T& shell = f.shell[2 * l + part] = 1;
        if (!p.closed || f.n < b) continue;
        const T rms = std::sqrt(dot(size(l), to[part], to[part]) / entries(l));
        if (rms > limit) times(size(l), shell = limit / rms, to[part], to[part]);
      }
    }
    state = after;
  }

  // -------------------------------------------------------------------------------------------- the way back
  // (5), the shell: W = s U with s = limit / rms(U) where it acted, so s (g - (g . W) W / (entries limit^2)).
  void shell_back(const Found& f, const T* after, T* g) {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) {
        const T shell = f.shell[2 * l + part], limit = p.rms_limit, *found = after + place(l, part);
        T* of = g + place(l, part);
        if (shell == 1) continue;
        add(size(l), -dot(size(l), of, found) / (entries(l) * limit * limit), found, of);
        times(size(l), shell, of, of);
      }
  }
  // (5), the steps.
  void end_back(const Found& f, const T* g) {
    for (int l = 0; l < L; l++) {
      down(l, f.n, f.delta[l], g, 2, one);
      for (int part : {W, S}) {
        const T *reach = (part == W ? f.writes : f.decay)[l] + (f.n - 1) * bc, *arriving = one + part * f.n * d[l];
        T* of_reach = (part == W ? of_writes : of_decay)[l] + (f.n - 1) * bc;
        for (int j = 0; j < f.n; j++, arriving += d[l]) {
          const T of = -dot(d[l], f.x[l] + j * d[l], arriving);
          of_reach[j] += of * f.steps[l][j], of_steps[l][j] += of * reach[j];
          add(d[l], -reach[j] * f.steps[l][j], arriving, of_input[l] + j * d[l]);
        }
      }
      for (int part : {W, S}) {
        stepped(f, l, (part == W ? f.writes : f.decay)[l] + (f.n - 1) * bc, one);
        through(SUB, l, f.n, one, g + place(l, part), of_delta[l]);
      }
    }
  }
  // (2) and (3) of a pass, the errors aside; reach is lost. Where G is zero its gradient is no more than finite.
  void pass_back(int chunk, const Found& f, const Pass& s) {
    const int n = f.n;
    for (int l = last; l >= 0; l--) {
      T *of_z = right[l] + s.keys * n * d[l + 1], *of_x = s.of_x[l];
      const int block = n * d[l], count = met(s, l);
      if (!s.keys) product(SUB, n, d[l + 1], n, s.reach[l], 1, bt, of_z, d[l + 1], of_delta[l], d[l + 1]);
      if (count == parts) pairs(n, n, d[l + 1], of_z, f.delta[l], s.reach[l]);
      down(l, n, of_z, state, count, one);
      for (int t = 0; t < n; t++) {
        T *pair = s.reach[l] + t * bt, *of_g = of_writes[l] + (t - s.keys) * bc, factors[3], of[3] = {};
        const T *g = spread(f, s, l, t, s.keys, factors), *same = s.similar[l] + t * bt;
        for (int part = 0; part < count; part++) {
          const T* arriving = one + part * block + t * d[l];
          add(d[l], factors[part], arriving, of_x + t * d[l]);
          of[part] = dot(d[l], s.x[l] + t * d[l], arriving);
        }
        if (count < parts) continue;
        of_g[b + W] += of[W] - of[M0], of_g[b + S] += of[S];
        for (int j = 0; j < n; j++) {
          const T of_write = -pair[j] * same[j];
          of_g[j] += of_write * f.steps[l][j], of_steps[l][j] += of_write * g[j];
          pair[j] *= -g[j] * f.steps[l][j];
        }
      }
      if (count == parts) {
        product(ADD, n, d[l], n, s.reach[l], bt, 1, f.x[l], d[l], of_x, d[l]);
        product(ADD, n, d[l], n, s.reach[l], 1, bt, s.x[l], d[l], of_input[l], d[l]);
      }
      if (s.keys && l == last && p.holds_last) hold(chunk, f, last, L, true);
      for (int i = 0; i < block && l; i++) right[l - 1][s.keys * block + i] += of_x[i] * s.slope[l - 1][i];
    }
  }
  void reads_back(int chunk, const Found& f) {
    T *of_reads = values, *of_z = right[last];
    tokens_in(f.n, p.of_reads, token(chunk, 0), of_reads);
    copy(f.n * D, of_reads, of_z);
    for (int t = 0; t < f.n && p.norm; t++) {
      const T *g = of_reads + t * D, *y = normed + t * D;
      for (int i = 0; i < D; i++) of_scale[i] += g[i] * y[i], of_shift[i] += g[i], one[i] = g[i] * scale[i];
      norm_gradient(one, y, inverse[t], of_z + t * D);
    }
    pass_back(chunk, f, reads);
    if (p.norm) add(f.n * D, 1, of_reads, reads.of_x[0]);
    tokens_out(f.n, reads.of_x[0], p.of_queries, token(chunk, 0));
  }
  // (4) of one token, from its delta and what allowed_back has left; of_error ends as the gradient at k, shift and -v.
  // LayerNorm's derivative at z depends on z through n and r as well: see chunk._NormErrors.
  void error_back(const Found& f, int t, T* of_z) {
    const T *e = f.error + t * D, *y = f.normed + t * D, *delta = f.delta[last] + t * D, r = f.inverse[t];
    T *of = of_delta[last] + t * D, *at_answer = of_error + t * D;
    T *of_scaled = one, *scaled = one + D, *of_y = of_normed + t * D;
    if (!p.norm) {
      for (int i = 0; i < D; i++) of_z[i] = at_answer[i] = 2 * of[i];
      return;
    }
    norm_gradient(of, y, r, of_scaled);
    for (int i = 0; i < D; i++) {
      const T of_answer = 2 * of_scaled[i] * scale[i];
      scaled[i] = e[i] * scale[i], of_y[i] += of_answer * scale[i], at_answer[i] += of_answer;
      of_scale[i] += of_scaled[i] * e[i] + of_answer * y[i], of_shift[i] += at_answer[i];
    }
    norm_gradient(of_y, y, r, of_z);
    add(D, -r / width * dot(D, scaled, y), of_scaled, of_z);
    add(D, -r / width * dot(D, of, y), delta, of_z);
    add(D, -r / width * dot(D, of, delta), y, of_z);
  }
  void keys_back(int chunk, const Found& f) {
    const int n = f.n;
    for (int l = 0; l < last; l++) {  // upward, through the back-propagation
      T *of_arriving = left[W][l + 1] + 2 * n * d[l + 1], *of_z = right[l] + n * d[l + 1];
      for (int i = 0; i < n * d[l + 1]; i++) {
        of_arriving[i] = of_delta[l][i] * f.slope[l][i];
        of_z[i] = of_delta[l][i] * f.arriving[l][i] * f.bend[l][i];
      }
      through(ADD, l + 1, n, of_arriving, matrix(l + 1, W, state), of_delta[l + 1]);
      copy(n * d[l + 2], f.delta[l + 1], right[l + 1] + 2 * n * d[l + 2]);
    }
    T* of_z = right[last] + n * D;
    for (int t = n - 1; t >= 0; t--) {  // a delta has reached the outputs behind it
      const T *reach = f.reach[last] + (t + 1) * bt + t, *behind = of_z + (t + 1) * D;
      product(SUB, 1, D, p.exact ? n - 1 - t : 0, reach, 0, bt, behind, D, of_delta[last] + t * D, D);
      error_back(f, t, of_z + t * D);
    }
    pass_back(chunk, f, f);
    if (p.norm) add(n * D, 1, of_error, of_input[0]);
    times(n * D, -1, of_error, of_error);
    tokens_out(n, of_input[0], p.of_keys, token(chunk, 0));
    tokens_out(n, of_error, p.of_values, token(chunk, 0));
  }
  // (5), (2) and the keys' errors at what the chunk began with: from the gradient behind the chunk, in place.
  void state_back(const Found& f, T* gradient) {
    const int end = (f.n - 1) * bc;
    for (int l = 0; l < L; l++) {
      const T *g = f.writes[l] + end, *e = f.decay[l] + end, *anchor = matrix(l, M0, state);
      const T *weight = state + place(l, W), *momentum = state + place(l, S);
      T* of[] = {gradient + place(l, W), gradient + place(l, S), of_anchor + place(l, W)};
      V of_keep = {}, of_carry = {}, of_stay = {};
      for (int64_t i = 0; i < size(l); i += LANES) {
        const V of_w = load(of[W] + i), of_s = load(of[S] + i), s = load(momentum + i);
        of_keep += of_w * load(weight + i), of_carry += of_w * s, of_stay += of_s * s;
        store(of[W] + i, g[b + W] * of_w), store(of[S] + i, g[b + S] * of_w + e[b + S] * of_s);
        if (!p.anchored) continue;
        of_keep -= of_w * load(anchor + i);
        store(of[M0] + i, load(of[M0] + i) + (1 - g[b + W]) * of_w);
      }
      of_writes[l][end + b + W] += sum(of_keep), of_writes[l][end + b + S] += sum(of_carry);
      of_decay[l][end + b + S] += sum(of_stay);
      for (int part = 0; part < parts; part++) {
        const int blocks = part == W && l ? 3 : part < met(f, l) ? 2 : 1;  // of rows that have met it
        outer(ADD, l, blocks * f.n, left[part][l], right[l], of[part]);
      }
    }
  }
  // (1), and theta's way into steps and masses.
  void gates_back(int chunk, const Found& f) {
    for (int l = 0; l < L; l++)
      for (int t = f.n - 1; t >= 0; t--) {
        const T eta = gate(p.eta, chunk, t, l), left = 1 - eta, smallest = p.smallest_decay;
        T *of_g = of_writes[l] + t * bc, *of_e = of_decay[l] + t * bc;
        add(bc, 1, of_g, of_e);
        const int64_t place = token(chunk, t) * L + l;
        ((T*)p.of_theta)[place] = of_steps[l][t] + of_mass[l][t] / (left > smallest ? left : smallest);
        ((T*)p.of_eta)[place] = dot(bc, of_e, f.decay[l] + (t - 1) * bc);
        if (left >= smallest) ((T*)p.of_eta)[place] += of_mass[l][t] * f.mass[l][t] / left;
        ((T*)p.of_alpha)[place] = -dot(bc, of_g, f.writes[l] + (t - 1) * bc);
        add(bc, 1 - gate(p.alpha, chunk, t, l), of_g, of_g - bc), add(bc, eta, of_e, of_e - bc);
      }
  }
  // A chunk from the gradient g at the state behind it to that at the one before, in place.
  void back(int chunk, const Found& f, const T* before, T* g) {
    if (f.n) {
      state = before;
      memset(base + of_chunk, 0, of_end - of_chunk);
      shell_back(f, before + state_size, g);
      queries(chunk, f);
      reads_back(chunk, f);
      end_back(f, g);
      if (p.exact) hold(chunk, f, 0, last, true);
      keys_back(chunk, f);
      state_back(f, g);
      gates_back(chunk, f);
    }
    if (!p.restarts || !p.restarts[chunk * p.rows + row]) return;
    add(state_size, 1, g, of_fresh);  // a document has begun in its first state, not in what the chunk before has left
    memset(g, 0, state_size * sizeof(T));
  }
  void gradients_out(const T* g) {
    state_out(g, p.of_state);
    if (p.of_fresh[W][0]) state_out(of_fresh, p.of_fresh);
    copy(D, of_scale, (T*)p.of_scale + memory * D);
    copy(D, of_shift, (T*)p.of_shift + memory * D);
    for (int l = 0; l < L && p.anchored; l++)
      copy(size(l), of_anchor + place(l, W), (T*)p.of_anchors[l] + memory * size(l));
  }

  // -------------------------------------------------------------------------------------------- memories in turn
  // A chunk up to its keys' errors, from its own first state if a document begins; whether there are tokens in it.
  bool enter(int chunk, Found& f, T* own) {
    if (p.restarts && p.restarts[chunk * p.rows + row]) state_in(p.fresh, own), state = own;
    f.n = p.counts ? p.counts[chunk * p.rows + row] : b;
    if (!f.n) return false;
    coefficients(chunk, f);
    keys(chunk, f);
    return true;
  }
  // In an open chunk the first tokens are worked out already; what is worked out of all of them goes on, or ends.
  void forward(int64_t from, int64_t to) {
    Found f(*this);
    T* own = take(state_size);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      state = nullptr;
      if (p.steps) open(f);
      for (int c = 0; c < p.chunks; c++) {
        if (p.kept && c && c % p.group == 0) save(kept(c / p.group));
        if (!enter(c, f, own)) continue;
        queries(c, f);
        if (p.after[W][0]) end(f, own);
      }
      if (p.after[W][0]) state_out(state, p.after);
    }
  }
  // Goes through a group once more from the state kept before it, then back through its chunks.
  void backward_through(int64_t from, int64_t to) {
    std::vector<Found> found;
    for (int i = 0; i < p.group; i++) found.emplace_back(*this);
    T *states = take((p.group + 1) * state_size), *g = take(state_size);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      state_in(p.of_state, g);
      memset(base + of_memory, 0, of_chunk - of_memory);
      for (int group = (p.chunks - 1) / p.group; group >= 0; group--) {
        const int first = group * p.group, end_of = std::min<int>(first + p.group, p.chunks);
        group ? copy(state_size, kept(group), states) : state_in(p.state, states);
        for (int c = first; c < end_of; c++) {
          T *before = states + (c - first) * state_size, *after = before + state_size;
          state = before;
          enter(c, found[c - first], before) ? end(found[c - first], after) : copy(state_size, before, after);
        }
        for (int c = end_of - 1; c >= first; c--) back(c, found[c - first], states + (c - first) * state_size, g);
      }
      gradients_out(g);
    }
  }
};

// Bytes of working memory that a thread needs, without a base; else the work.
template <typename T>
int64_t run(const Problem& p, bool back, int64_t from, int64_t to, void* base) {
  Walk<T> walk(p, base, back);
  back ? walk.backward_through(from, to) : walk.forward(from, to);
  return walk.used;
}
}  // namespace NAME
#undef NAME
#undef BYTES

#else  // ---------------------------------------------------------------------------------------------- instances
#if defined(__x86_64__) && defined(__clang__)
#define FOR(features) _Pragma(TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define DONE _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define FOR(features) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(features)))
#define DONE _Pragma("GCC pop_options")
#endif
#define TEXT(x) #x

#define NAME baseline
#define BYTES 16
#include "memory.cpp"
#ifdef FOR
#define NAME avx2
#define BYTES 32
FOR("avx2,fma")
#include "memory.cpp"
DONE
#define NAME avx512
#define BYTES 64
FOR("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#include "memory.cpp"
DONE
#endif

static int64_t run(const Problem& p, bool back, int level, int bits, int64_t from, int64_t to, void* base) {
#ifdef FOR
  if (level == 2) return (bits == 32 ? avx512::run<float> : avx512::run<double>)(p, back, from, to, base);
  if (level == 1) return (bits == 32 ? avx2::run<float> : avx2::run<double>)(p, back, from, to, base);
#endif
  return (bits == 32 ? baseline::run<float> : baseline::run<double>)(p, back, from, to, base);
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
  return run(*p, back, level, bits, 0, 0, nullptr);
}
// Forward or back; `bytes` of the workspace belong to each thread.
void memory_run(const Problem* p, bool back, int level, int bits, char* workspace, int64_t bytes) {
  at::parallel_for(0, p->rows * p->heads, 1, [&](int64_t from, int64_t to) {
    run(*p, back, level, bits, from, to, workspace + at::get_thread_num() * bytes);
  });
}
}
#endif
