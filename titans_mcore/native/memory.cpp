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
// Letters: token t reads, token j writes; n tokens of a chunk, b slots; d[l] and d[l + 1] are d_in and d_out of matrix
// l. Channels are padded with zeros to whole lines of the cache, tokens to whole vectors. The file includes itself for
// every instruction set, with BYTES as the size of a vector.

#ifndef BYTES
#include <ATen/Parallel.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

// What operation.py passes; tensors are contiguous, N = rows * heads memories, widths in shapes padded ones.
template <typename T>
struct Problem {
  int64_t rows, heads, chunks, size, group, depth, width[5], padded[5];  // widths: d_in of each matrix, then D
  int64_t norm, anchored, exact, holds_last, closed, old;  // old: tokens of an open chunk that are worked out already
  double rms_limit, lower_steps, smallest_decay, epsilon;
  T *queries, *keys, *values, *theta, *eta, *alpha;   // (B, C b, H, D) and (B, C b, H, L)
  T *scale, *shift;                                   // (H, D) or null
  T *anchors[4], *state[2][4], *fresh[2][4];          // M_0 (H, d_in, d_out); W and S (N, d_in, d_out); may be null
  int64_t* counts;                                    // (C, B) or null
  bool* restarts;                                     // (C, B) or null
  T *old_inputs[4], *old_deltas[4], *old_steps;       // (N, old, d) and (B, old, H, L)
  T *reads, *after[2][4], *kept;                      // kept: states before groups 1, 2, ...; both may be null
  T *inputs[4], *deltas[4], *steps;                   // of an open chunk, (N, n, d) and (B, n, H, L); or null
  T *of_reads, *of_queries, *of_keys, *of_values, *of_theta, *of_eta, *of_alpha;
  T *of_scale, *of_shift, *of_anchors[4];             // (N, D) and (N, d_in, d_out); zeros, like of_fresh
  T *of_state[2][4], *of_fresh[2][4];                 // at the state behind the last chunk, then before the first
};
constexpr int LINE = 64;  // bytes
#define INLINE inline __attribute__((always_inline))
#endif

#ifdef BYTES
namespace NAME {
enum Mode { SET, ADD, SUB };
enum Part { W, S, M0 };  // what a chunk begins with

template <typename T>
struct Walk {
  static constexpr int LANES = BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(BYTES)));
  typedef V Unaligned __attribute__((aligned(sizeof(T)), may_alias));
  INLINE static V load(const T* p) { return *(const Unaligned*)p; }
  INLINE static void store(T* p, V x) { *(Unaligned*)p = x; }
  INLINE static int padded(int64_t n, int to = LANES) { return (n + to - 1) / to * to; }

  // -------------------------------------------------------------------------------------------- small products
  struct Factors {  // A with any strides, B and C in rows
    const T *A, *B;
    T* C;
    int64_t row, column, ldb, ldc;
  };
  // Of some vectors in a row all M, in tiles of m; what is left of them in tiles half as high.
  template <int m, int v>
  INLINE static void tiles(Mode mode, int M, int K, Factors f) {
    for (; M >= m; M -= m, f.A += m * f.row, f.C += m * f.ldc) {
      V sum[m][v] = {}, b[v];
      for (int k = 0; k < K; k++) {
        for (int j = 0; j < v; j++) b[j] = load(f.B + k * f.ldb + j * LANES);
        for (int i = 0; i < m; i++)
          for (int j = 0; j < v; j++) sum[i][j] += f.A[i * f.row + k * f.column] * b[j];
      }
      for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) {
          T* C = f.C + i * f.ldc + j * LANES;
          const V x = sum[i][j], c = mode == SET ? V{} : load(C);
          store(C, mode == SUB ? c - x : c + x);
        }
    }
    if constexpr (m > 1) tiles<m / 2, v>(mode, M, K, f);
  }
  // C (M, N) {=, +=, -=} A (M, K) B (K, N): N whole vectors.
  static void product(Mode mode, int M, int N, int K, Factors f) {
    constexpr int most = BYTES == 64 ? 8 : 4;  // rows, two vectors wide: as many as a processor has registers for
    for (; N >= 2 * LANES; N -= 2 * LANES, f.B += 2 * LANES, f.C += 2 * LANES) tiles<most, 2>(mode, M, K, f);
    if (N) tiles<most, 1>(mode, M, K, f);
  }
  INLINE static T dot(int n, const T* a, const T* b) {  // n whole vectors, like the next
    V s[4] = {};
    for (; n >= 4 * LANES; n -= 4 * LANES, a += 4 * LANES, b += 4 * LANES)
      for (int j = 0; j < 4; j++) s[j] += load(a + j * LANES) * load(b + j * LANES);
    for (int i = 0; i < n; i += LANES) s[0] += load(a + i) * load(b + i);
    T part[LANES];
    store(part, s[0] + s[1] + (s[2] + s[3]));
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
  }
  INLINE static void times(int n, T factor, const T* x, T* y) {
    for (int i = 0; i < n; i += LANES) store(y + i, factor * load(x + i));
  }
  INLINE static void mix(int n, T a, const T* x, T b, const T* y, T* z) {
    for (int i = 0; i < n; i += LANES) store(z + i, a * load(x + i) + b * load(y + i));
  }
  INLINE static void add(int n, T factor, const T* x, T* y) { mix(n, factor, x, 1, y, y); }
  // n rows of d, one so far behind the other.
  static void copy(int64_t n, int d, const T* from, int64_t ldf, T* to, int64_t ldt) {
    for (int64_t i = 0; d && i < n; i++) memcpy(to + i * ldt, from + i * ldf, d * sizeof(T));  // of nothing: null
  }

  // -------------------------------------------------------------------------------------------- GELU, exact
  // gelu(z) = z Phi(z), its slope and its bend (second derivative), n whole vectors. In float32 exp is a power of two
  // times a polynomial (Cephes), and what Phi lacks to 0 or 1 a rational function times the density (Abramowitz and
  // Stegun 7.1.26, within 2e-7).
  static void gelu(int n, const T* from, T* value, T* slope, T* bend) {
    for (int i = 0; i < n; i += LANES) {
      V z = load(from + i), cdf, density;
      if constexpr (sizeof(T) == 8) {
        for (int j = 0; j < LANES; j++) {
          cdf[j] = 0.5 * __builtin_erfc(-z[j] * 0.70710678118654752440);
          density[j] = 0.39894228040143267794 * __builtin_exp(-0.5 * z[j] * z[j]);
        }
      } else {
        typedef int32_t I __attribute__((vector_size(BYTES)));
        V e = T(-0.5) * z * z;
        e = e < T(-87) ? V{} - T(87) : e;
        const I n = __builtin_convertvector(e * T(1.44269504088896341) - T(0.5), I);
        const V whole = __builtin_convertvector(n, V), r = e - whole * T(0.693359375) - whole * T(-2.12194440e-4);
        V y = (T(1.9875691500e-4) * r + T(1.3981999507e-3)) * r + T(8.3334519073e-3);
        y = ((y * r + T(4.1665795894e-2)) * r + T(1.6666665459e-1)) * r + T(5.0000001201e-1);
        const V power = (y * r * r + r + T(1)) * (V)((n + 127) << 23);
        const V t = T(1) / (T(1) + T(0.3275911 * 0.70710678118654752) * (z < T(0) ? -z : z));
        V tail = ((T(1.061405429) * t - T(1.453152027)) * t + T(1.421413741)) * t - T(0.284496736);
        tail = T(0.5) * power * t * (tail * t + T(0.254829592));
        cdf = z < T(0) ? tail : T(1) - tail;
        density = T(0.3989422804014327) * power;
      }
      store(value + i, z * cdf);
      store(slope + i, cdf + z * density);
      store(bend + i, (T(2) - z * z) * density);
    }
  }

  // -------------------------------------------------------------------------------------------- one memory's way
  typedef std::array<T*, 4> List;     // by matrix
  typedef std::array<List, 3> State;  // where W, S and M_0 lie
  struct Pass {  // Tokens on their way through the matrices: rows of inputs, of GELU's slope and bend behind them, how
    bool keys;   // far what the chunk writes reaches them (see attend), gradients.
    List x, slope, bend, similar, reach, of_x, of_z;
    T *normed, *inverse;  // behind LayerNorm, and what it divides by
  };
  struct Chunk : Pass {  // What is worked out of a chunk's keys and gates.
    List mass, steps, gates[2];  // the latter G and E; row -1 is before the first token
    List arriving, delta;
    T *error, *shell;                     // the latter what the shell has scaled the matrices by
    int index = 0, n = 0, restarts = 0;  // the latter where a document begins with it, in the first state
  };
  const Problem<T>& p;
  char* const base;
  const int L = p.depth, last = L - 1, b = p.size, old = p.old, parts = 2 + p.anchored;
  const int64_t* const d = p.padded;
  const int D = d[L], widest = *std::max_element(d, d + L + 1);
  const T width = p.width[L];                    // D without padding
  const int bt = padded(b), bc = padded(b + 2);  // padded b, and b with the columns of W and S
  const int64_t state_size = 2 * std::inner_product(d, d + L, d + 1, int64_t{0});
  int64_t used = 0, memory = 0, row = 0, head = 0;
  State state{}, gradient{};  // what a chunk begins with, and the gradient there
  // Working memory; with a base of null it is only counted.
  T *identity = take(LANES * LANES), *unit = take(D), *none = take(D), *aim = take(D), *chord = take(D);
  T *output = take(b * D), *values = take(b * D), *turned = take(widest * bt), *swapped = take(widest * bt);
  T* const left[3] = {take(b * widest), take(b * widest), take(b * widest)};  // rows on their way to W, S and M_0
  T *scratch = take(3 * b * widest), *scale = nullptr, *shift = nullptr, *of_scale = nullptr, *of_shift = nullptr;
  // Gradients; they begin with zeros in every chunk.
  const int64_t of_chunk = used;
  const List of_input = rows(), of_delta = rows(), of_steps = each(b), of_mass = each(b);
  const List of_gates[2] = {gates(), gates()}, of_queries = rows(), of_z[2] = {rows(), rows()};
  T *of_error = take(b * D), *of_normed = take(b * D);
  const int64_t of_end = used;
  const Pass reads = new_pass(false, of_queries);

  Walk(const Problem<T>& p, void* base) : p(p), base((char*)base) {}
  T* take(int64_t n) {
    T* found = (T*)((uintptr_t)base + used);
    used += (n * sizeof(T) + LINE - 1) / LINE * LINE;
    return found;
  }
  List each(int64_t n, int64_t first = 0) {
    List list{};
    for (int l = 0; l < L; l++) list[l] = take(n) + first;
    return list;
  }
  List rows() { return each(b * widest); }
  List gates() { return each((b + 1) * bc, bc); }
  Pass new_pass(bool keys, const List& of_x) {
    return {keys, rows(), rows(), rows(), each(b * bt), each(b * bt), of_x, of_z[keys], take(b * D), take(b)};
  }
  Chunk new_chunk() {
    return {new_pass(true, of_input), each(b), each(b), {gates(), gates()}, rows(), rows(), take(b * D), take(8)};
  }
  int64_t size(int l) const { return d[l] * d[l + 1]; }
  T entries(int l) const { return T(p.width[l]) * p.width[l + 1]; }

  // A state that lies in one block of memory, or of this memory in tensors.
  State in_block(T* block) const {
    State s{};
    for (int l = 0; l < L; block += 2 * size(l), l++)
      s[W][l] = block, s[S][l] = block + size(l), s[M0][l] = p.anchors[l] + head * size(l);
    return s;
  }
  State in_tensors(T* const (&tensors)[2][4]) const {
    State s = in_block(nullptr);
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) s[part][l] = tensors[part][l] + memory * size(l);
    return s;
  }
  void copy_state(const State& from, const State& to) const {
    for (int l = 0; l < L; l++)
      for (int part : {W, S}) copy(1, size(l), from[part][l], 0, to[part][l], 0);
  }
  State kept(int group) const { return in_block(p.kept + ((group - 1) * p.rows * p.heads + memory) * state_size); }
  // Where tensors hold what is of this memory's tokens.
  int64_t token(const Chunk& c, int t) const { return ((row * p.chunks + c.index) * b + t) * p.heads + head; }
  void tokens_in(const Chunk& c, int from, const T* tokens, T* to) const {
    copy(c.n - from, D, tokens + token(c, from) * D, p.heads * D, to + from * D, D);
  }
  void begin(int64_t which) {
    memory = which, row = which / p.heads, head = which % p.heads;
    for (int i = 0; i < D; i++) unit[i] = i < width, none[i] = 0;
    for (int i = 0; i < LANES * LANES; i++) identity[i] = i % (LANES + 1) == 0;
    scale = p.scale ? p.scale + head * D : unit, shift = p.shift ? p.shift + head * D : none;
  }

  // to (C, R) = from (R, C)^T, as products with the identity.
  void transpose(int R, int C, const T* from, int ldf, T* to, int ldt) {
    for (int r = 0; r < R; r += LANES)
      product(SET, C, LANES, std::min(LANES, R - r), {from + r * ldf, identity, to + r, 1, ldf, LANES, ldt});
  }
  // Products of a matrix: z (n, d_out) of x (n, d_in), and the matrix of x^T z.
  void through(Mode mode, int l, int n, const T* x, const T* matrix, T* z) {
    product(mode, n, d[l + 1], d[l], {x, matrix, z, d[l], 1, d[l + 1], d[l + 1]});
  }
  void outer(Mode mode, int l, int n, const T* x, const T* z, T* matrix) {
    product(mode, d[l], d[l + 1], n, {x, z, matrix, 1, d[l], d[l + 1], d[l + 1]});
  }
  // to (n, d_in), for W or W, S and M_0 one after the other, = z (n, d_out) times the matrix transposed.
  void down(int l, int n, const T* z, const State& state, int count, T* to) {
    transpose(n, d[l + 1], z, d[l + 1], turned, bt);
    for (int part = 0; part < count; part++, to += n * d[l]) {
      product(SET, d[l], padded(n), d[l + 1], {state[part][l], turned, swapped, d[l + 1], 1, bt, bt});
      transpose(d[l], n, swapped, bt, to, d[l]);
    }
  }
  // to (n, m) = x y^T for rows of tokens.
  void pairs(int n, int m, int d, const T* x, const T* y, T* to) {
    transpose(m, d, y, d, turned, bt);
    product(SET, n, padded(m), d, {x, turned, to, d, 1, bt, bt});
  }

  // -------------------------------------------------------------------------------------------- (1) coefficients
  void coefficients(const Chunk& c) {
    for (int l = 0; l < L; l++) {
      T *g = c.gates[W][l] - bc, *e = c.gates[S][l] - bc;
      memset(g, 0, bc * sizeof(T)), memset(e, 0, bc * sizeof(T));
      g[b + W] = e[b + S] = 1;
      for (int t = 0; t < c.n; t++, g += bc, e += bc) {
        const int64_t gate = token(c, t) * L + l, gate_of_old = ((row * old + t) * p.heads + head) * L + l;
        times(bc, p.eta[gate], e, e + bc), times(bc, 1 - p.alpha[gate], g, g + bc), add(bc, 1, e + bc, g + bc);
        e[bc + t] = g[bc + t] = 1;
        c.mass[l][t] = p.theta[gate] / std::max(1 - p.eta[gate], T(p.smallest_decay));
        c.steps[l][t] = t < old ? p.old_steps[gate_of_old] : p.theta[gate];
      }
    }
  }

  // -------------------------------------------------------------------------------------------- (2), (3) outputs
  // Keys meet W alone but in the last matrix of an exact rule, where they meet what the tokens before them have left.
  int met(const Pass& s, int l) const { return s.keys && (l < last || !p.exact) ? 1 : parts; }
  // Of such a row the coefficients G, and a, f and 1 - a in factors, which take it to W, S and M_0.
  const T* spread(const Chunk& c, const Pass& s, int l, int t, T* factors) {
    const T* g = c.gates[W][l] + (t - s.keys) * bc;
    factors[W] = met(s, l) == 1 ? 1 : g[b + W], factors[S] = g[b + S], factors[M0] = 1 - g[b + W];
    for (int part = 0; part < met(s, l); part++)
      times(d[l], factors[part], s.x[l] + t * d[l], left[part] + t * d[l]);
    return g;
  }
  // How far the deltas of all the chunk's tokens reach rows: G[t, j] theta_j (x_t . h_j), and the products alone.
  void attend(const Chunk& c, const Pass& s, int l) {
    T *similar = s.similar[l] + old * bt, *reach = s.reach[l] + old * bt;
    pairs(c.n - old, c.n, d[l], s.x[l] + old * d[l], c.x[l], similar);
    for (int t = old; t < c.n; t++, similar += bt, reach += bt) {
      const T* g = c.gates[W][l] + (t - s.keys) * bc;
      for (int j = 0; j < c.n; j++) reach[j] = similar[j] * g[j] * c.steps[l][j];
    }
  }
  // New tokens through all matrices; output of the last one is without what keys meet of the chunk's own writes.
  void pass(const Chunk& c, const Pass& s) {
    const int n = c.n - old;
    T factors[3];
    for (int l = 0; l < L; l++) {
      const int64_t first = old * d[l + 1];
      T* z = (l < last ? scratch : output) + first;
      for (int t = old; t < c.n; t++) spread(c, s, l, t, factors);
      for (int part = 0; part < met(s, l); part++)
        through(part ? ADD : SET, l, n, left[part] + old * d[l], state[part][l], z);
      if (s.keys && l == last && p.holds_last) hold(c, last, L);
      if (met(s, l) == parts) attend(c, s, l);
      if (!s.keys) product(SUB, n, d[l + 1], c.n, {s.reach[l] + old * bt, c.delta[l], z, bt, 1, d[l + 1], d[l + 1]});
      if (l < last) gelu(n * d[l + 1], z, s.x[l + 1] + first, s.slope[l] + first, s.bend[l] + first);
    }
  }
  // The network's answer to a token in place of the last matrix' output, which is it already without LayerNorm.
  void answer(const Pass& s, int t) {
    if (!p.norm) return;
    T *x = s.x[0] + t * D, *z = output + t * D, *normed = s.normed + t * D;
    const T smaller = T(1) / ((int64_t)1 << 48);  // as network.layer_norm: its square stays finite
    const T mean = dot(D, z, unit) / width;
    for (int i = 0; i < D; i++) normed[i] = (z[i] - mean) * smaller * unit[i];
    const T r = 1 / std::sqrt(dot(D, normed, normed) / width + T(p.epsilon) * smaller * smaller);
    times(D, r, normed, normed);
    s.inverse[t] = r * smaller;
    for (int i = 0; i < D; i++) z[i] = x[i] + normed[i] * scale[i] + shift[i];
  }
  // Each query through the state that its own token has left, into output.
  void queries(const Chunk& c) {
    tokens_in(c, old, p.queries, reads.x[0]);
    pass(c, reads);
    for (int t = old; t < c.n; t++) answer(reads, t);
  }
  // LayerNorm's derivative, its own transpose as a map: r (g - mean g - n mean(g n)).
  void norm_gradient(const T* g, const T* normed, T inverse, T* to) {
    const T mean = dot(D, g, unit) / width, along = dot(D, g, normed) / width;
    for (int i = 0; i < D; i++) to[i] = inverse * unit[i] * (g[i] - mean - along * normed[i]);
  }

  // -------------------------------------------------------------------------------------------- (4) the keys' errors
  void keys(const Chunk& c) {
    tokens_in(c, old, p.keys, c.x[0]), tokens_in(c, old, p.values, values);
    pass(c, c);
    for (int t = old; t < c.n; t++) {
      T *z = output + t * D, *e = c.error + t * D, *value = values + t * D;
      product(SUB, 1, D, p.exact ? t : 0, {c.reach[last] + t * bt, c.delta[last], z, bt, 1, D, D});
      answer(c, t);
      for (int i = 0; i < D; i++) e[i] = 2 * (z[i] - value[i]), z[i] = e[i] * scale[i];
      if (p.norm) norm_gradient(z, c.normed + t * D, c.inverse[t], c.delta[last] + t * D);
    }
    for (int l = last; l > 0; l--) {
      down(l, c.n - old, c.delta[l] + old * d[l + 1], state, 1, c.arriving[l - 1] + old * d[l]);
      for (int i = old * d[l]; i < c.n * d[l]; i++) c.delta[l - 1][i] = c.arriving[l - 1][i] * c.slope[l - 1][i];
    }
    if (p.exact) hold(c, 0, last);
  }
  // For the matrices below the last 4 times what can be removed of a loss, through LayerNorm rule.removable_loss.
  T allowed(const Chunk& c, int t) {
    const T *e = c.error + t * D, *y = c.normed + t * D, root = std::sqrt(width);
    if (!p.norm) return dot(D, e, e);
    for (int i = 0; i < D; i++) aim[i] = scale[i] * (e[i] - 2 * scale[i] * y[i]);
    add(D, -dot(D, aim, unit) / width, unit, aim);
    const T size = std::sqrt(dot(D, aim, aim)), inverse = size > 0 ? 1 / size : 0;
    for (int i = 0; i < D; i++) chord[i] = y[i] / root + inverse * aim[i];
    return 2 * root * size * dot(D, chord, chord);
  }
  // Steps held to what they remove of an error, rule.last_step_share and lower_step_share, or its gradient: of some
  // matrices together, the last one or all below it. A matrix asks for slope mass |h|^2.
  void hold(const Chunk& c, int first, int end, bool back = false) {
    for (int t = old; t < c.n; t++) {
      T asked = 0, of_share = 0, slope[4], square[4];
      for (int l = first; l < end; l++) {
        const T *h = c.x[l] + t * d[l], *delta = c.delta[l] + t * d[l + 1];
        slope[l] = l == last ? 2 : T(p.lower_steps) * dot(d[l + 1], delta, delta), square[l] = dot(d[l], h, h);
        asked += slope[l] * c.mass[l][t] * square[l];
      }
      const T share = (end < L ? allowed(c, t) : 1) / asked;
      for (int l = first; l < end && share < 1; l++) {
        if (back) of_share += of_steps[l][t] * p.theta[token(c, t) * L + l];
        (back ? of_steps : c.steps)[l][t] *= share;  // on the way back the gradient at theta
      }
      if (!back || !(share < 1)) continue;
      if (end < L && share > 0) allowed_back(c, t, of_share / asked);
      for (int l = first; l < end; l++) {
        const T of_asked = -of_share * share / asked;
        of_mass[l][t] += of_asked * slope[l] * square[l];
        add(d[l], 2 * of_asked * slope[l] * c.mass[l][t], c.x[l] + t * d[l], of_input[l] + t * d[l]);
        const T of_slope = l == last ? 0 : of_asked * T(p.lower_steps) * c.mass[l][t] * square[l];
        add(d[l + 1], 2 * of_slope, c.delta[l] + t * d[l + 1], of_delta[l] + t * d[l + 1]);
      }
    }
  }
  // Behind allowed(), whose aim and chord it uses: to n into of_normed, to the answer into of_error.
  void allowed_back(const Chunk& c, int t, T of) {
    const T *e = c.error + t * D, *y = c.normed + t * D, root = std::sqrt(width);
    if (!p.norm) return add(D, 2 * of, e, of_delta[last] + t * D);
    const T size = std::sqrt(dot(D, aim, aim)), along = root / 2 * (1 + dot(D, y, y) / width);
    for (int i = 0; i < D; i++) aim[i] = 4 * of * (along / size * aim[i] + y[i]);  // now its gradient
    add(D, -dot(D, aim, unit) / width, unit, aim);
    for (int i = 0, at = t * D; i < D; i++, at++) {
      of_normed[at] = 4 * of * size * chord[i] - 2 * scale[i] * scale[i] * aim[i];
      of_error[at] = 2 * scale[i] * aim[i], of_scale[i] += (e[i] - 4 * scale[i] * y[i]) * aim[i];
    }
  }

  // -------------------------------------------------------------------------------------------- (5) the chunk's end
  void end(const Chunk& c, const State& after) {
    for (int l = 0; l < L; l++) {
      const T *g = c.gates[W][l] + (c.n - 1) * bc, *e = c.gates[S][l] + (c.n - 1) * bc, limit = p.rms_limit;
      mix(size(l), g[b + W], state[W][l], g[b + S], state[S][l], after[W][l]);
      times(size(l), e[b + S], state[S][l], after[S][l]);
      if (p.anchored) add(size(l), 1 - g[b + W], state[M0][l], after[W][l]);
      for (int part : {W, S}) {
        T *to = after[part][l], &shell = c.shell[2 * l + part] = 1;
        for (int j = 0; j < c.n; j++)
          times(d[l], (part == W ? g : e)[j] * c.steps[l][j], c.x[l] + j * d[l], scratch + j * d[l]);
        outer(SUB, l, c.n, scratch, c.delta[l], to);
        if (!p.closed || c.n < b) continue;
        const T rms = std::sqrt(dot(size(l), to, to) / entries(l));
        if (rms > limit) times(size(l), shell = limit / rms, to, to);
      }
    }
    state = after;
  }

  // -------------------------------------------------------------------------------------------- the way back
  // (5), from the gradient behind the chunk to what of it goes to the state before, in place, and into the steps.
  void end_back(const Chunk& c, const State& after) {
    for (int l = 0; l < L; l++) {
      T *of_weight = gradient[W][l], *of_momentum = gradient[S][l];
      const int64_t size = this->size(l), end = (c.n - 1) * bc;
      for (int part : {W, S}) {  // the shell: W = s U with s = limit / rms(U) where it acted
        const T shell = c.shell[2 * l + part], limit = p.rms_limit, *found = after[part][l];
        T* of = gradient[part][l];
        if (shell == 1) continue;
        add(size, -dot(size, of, found) / (entries(l) * limit * limit), found, of), times(size, shell, of, of);
      }
      down(l, c.n, c.delta[l], gradient, 2, scratch);
      for (int part : {W, S}) {
        T *of_reach = of_gates[part][l] + end, *met = scratch + 2 * b * widest;
        through(SET, l, c.n, c.x[l], gradient[part][l], met);
        for (int j = 0; j < c.n; j++) {
          const T reach = c.gates[part][l][end + j], step = c.steps[l][j];
          const T of = -dot(d[l + 1], c.delta[l] + j * d[l + 1], met + j * d[l + 1]);
          of_reach[j] += of * step, of_steps[l][j] += of * reach;
          add(d[l + 1], -reach * step, met + j * d[l + 1], of_delta[l] + j * d[l + 1]);
          add(d[l], -reach * step, scratch + (part * c.n + j) * d[l], of_input[l] + j * d[l]);
        }
      }
      const T *g = c.gates[W][l] + end, *e = c.gates[S][l] + end;
      of_gates[W][l][end + b + W] += dot(size, of_weight, state[W][l]);
      of_gates[W][l][end + b + S] += dot(size, of_weight, state[S][l]);
      of_gates[S][l][end + b + S] += dot(size, of_momentum, state[S][l]);
      if (p.anchored) of_gates[W][l][end + b + W] -= dot(size, of_weight, state[M0][l]);
      if (p.anchored) add(size, 1 - g[b + W], of_weight, gradient[M0][l]);
      mix(size, e[b + S], of_momentum, g[b + S], of_weight, of_momentum);
      times(size, g[b + W], of_weight, of_weight);
    }
  }
  // (2) and (3) of a pass, the errors aside; reach is lost. Where G is zero its gradient is no more than finite.
  void pass_back(const Chunk& c, const Pass& s) {
    const int n = c.n;
    for (int l = last; l >= 0; l--) {
      T *of_z = s.of_z[l], *of_x = s.of_x[l], factors[3];
      const int count = met(s, l);
      if (!s.keys) product(SUB, n, d[l + 1], n, {s.reach[l], of_z, of_delta[l], 1, bt, d[l + 1], d[l + 1]});
      if (count == parts) pairs(n, n, d[l + 1], of_z, c.delta[l], s.reach[l]);
      down(l, n, of_z, state, count, scratch);
      for (int t = 0; t < n; t++) {
        T *pair = s.reach[l] + t * bt, *of_g = of_gates[W][l] + (t - s.keys) * bc, of[3] = {};
        const T *g = spread(c, s, l, t, factors), *same = s.similar[l] + t * bt;
        for (int part = 0; part < count; part++) {
          const T* arriving = scratch + (part * n + t) * d[l];
          add(d[l], factors[part], arriving, of_x + t * d[l]);
          of[part] = dot(d[l], s.x[l] + t * d[l], arriving);
        }
        if (count < parts) continue;
        of_g[b + W] += of[W] - of[M0], of_g[b + S] += of[S];
        for (int j = 0; j < n; j++) {
          const T of_write = -pair[j] * same[j];
          of_g[j] += of_write * c.steps[l][j], of_steps[l][j] += of_write * g[j];
          pair[j] *= -g[j] * c.steps[l][j];
        }
      }
      for (int part = 0; part < count; part++) outer(ADD, l, n, left[part], of_z, gradient[part][l]);
      if (count == parts) {
        product(ADD, n, d[l], n, {s.reach[l], c.x[l], of_x, bt, 1, d[l], d[l]});
        product(ADD, n, d[l], n, {s.reach[l], s.x[l], of_input[l], 1, bt, d[l], d[l]});
      }
      if (s.keys && l == last && p.holds_last) hold(c, last, L, true);
      for (int i = 0; i < n * d[l] && l; i++) s.of_z[l - 1][i] += of_x[i] * s.slope[l - 1][i];
    }
  }
  // From the gradient g at an answer to that at the last matrix' output; of_normed has what goes to n in other ways.
  void answer_back(const Pass& s, int t, const T* g, T* of_normed) {
    const T* normed = s.normed + t * D;
    for (int i = 0; i < D; i++) of_scale[i] += g[i] * normed[i], of_shift[i] += g[i], of_normed[i] += g[i] * scale[i];
    norm_gradient(of_normed, normed, s.inverse[t], s.of_z[last] + t * D);
  }
  void reads_back(const Chunk& c) {
    tokens_in(c, 0, p.of_reads, values), copy(1, c.n * D, values, 0, reads.of_z[last], 0);
    for (int t = 0; t < c.n && p.norm; t++)
      memset(scratch, 0, D * sizeof(T)), answer_back(reads, t, values + t * D, scratch);
    pass_back(c, reads);
    if (p.norm) add(c.n * D, 1, values, of_queries[0]);
    copy(c.n, D, of_queries[0], D, p.of_queries + token(c, 0) * D, p.heads * D);
  }
  // (4) of one token, from its delta and what allowed_back has left; of_error ends as the gradient at k, shift and -v.
  // LayerNorm's derivative at z depends on z through n and r as well: see chunk._NormErrors.
  void error_back(const Chunk& c, int t) {
    const T *e = c.error + t * D, *y = c.normed + t * D, *delta = c.delta[last] + t * D, r = c.inverse[t];
    T *of = of_delta[last] + t * D, *of_z = c.of_z[last] + t * D, *at_answer = of_error + t * D;
    T *of_scaled = scratch, *scaled = scratch + D;
    if (!p.norm) return times(D, 2, of, at_answer), times(D, 2, of, of_z);
    norm_gradient(of, y, r, of_scaled);
    for (int i = 0; i < D; i++) {
      at_answer[i] += 2 * of_scaled[i] * scale[i], of_scale[i] += of_scaled[i] * e[i];
      scaled[i] = e[i] * scale[i];
    }
    answer_back(c, t, at_answer, of_normed + t * D);
    add(D, -r / width * dot(D, scaled, y), of_scaled, of_z);
    add(D, -r / width * dot(D, of, y), delta, of_z);
    add(D, -r / width * dot(D, of, delta), y, of_z);
  }
  void keys_back(const Chunk& c) {
    const int n = c.n;
    for (int l = 0; l < last; l++) {  // upward, through the back-propagation
      for (int i = 0; i < n * d[l + 1]; i++) {
        scratch[i] = of_delta[l][i] * c.slope[l][i];
        c.of_z[l][i] = of_delta[l][i] * c.arriving[l][i] * c.bend[l][i];
      }
      through(ADD, l + 1, n, scratch, state[W][l + 1], of_delta[l + 1]);
      outer(ADD, l + 1, n, scratch, c.delta[l + 1], gradient[W][l + 1]);
    }
    for (int t = n - 1; t >= 0; t--) {  // a delta has reached the outputs behind it
      const T *reach = c.reach[last] + (t + 1) * bt + t, *behind = c.of_z[last] + (t + 1) * D;
      product(SUB, 1, D, p.exact ? n - 1 - t : 0, {reach, behind, of_delta[last] + t * D, 0, bt, D, D});
      error_back(c, t);
    }
    pass_back(c, c);
    if (p.norm) add(n * D, 1, of_error, of_input[0]);
    times(n * D, -1, of_error, of_error);
    copy(n, D, of_input[0], D, p.of_keys + token(c, 0) * D, p.heads * D);
    copy(n, D, of_error, D, p.of_values + token(c, 0) * D, p.heads * D);
  }
  // (1), and theta's way into steps and masses.
  void gates_back(const Chunk& c) {
    for (int l = 0; l < L; l++)
      for (int t = c.n - 1; t >= 0; t--) {
        T *of_g = of_gates[W][l] + t * bc, *of_e = of_gates[S][l] + t * bc;
        const int64_t gate = token(c, t) * L + l;
        const T eta = p.eta[gate], left = 1 - eta;
        add(bc, 1, of_g, of_e);
        p.of_theta[gate] = of_steps[l][t] + of_mass[l][t] / std::max(left, T(p.smallest_decay));
        p.of_eta[gate] = dot(bc, of_e, c.gates[S][l] + (t - 1) * bc);
        if (left >= T(p.smallest_decay)) p.of_eta[gate] += of_mass[l][t] * c.mass[l][t] / left;
        p.of_alpha[gate] = -dot(bc, of_g, c.gates[W][l] + (t - 1) * bc);
        add(bc, 1 - p.alpha[gate], of_g, of_g - bc), add(bc, eta, of_e, of_e - bc);
      }
  }
  // A chunk's way back from the gradient behind it; `state` is what it began with.
  void back(const Chunk& c, const State& after) {
    memset(base + of_chunk, 0, of_end - of_chunk);
    end_back(c, after);
    queries(c);
    reads_back(c);
    if (p.exact) hold(c, 0, last, true);
    keys_back(c);
    gates_back(c);
  }

  // -------------------------------------------------------------------------------------------- memories in turn
  // A chunk up to its keys' errors, from its own first state if a document begins; whether there are tokens in it.
  bool enter(int index, Chunk& c, const State& own) {
    c.index = index, c.restarts = p.restarts && p.restarts[index * p.rows + row];
    if (c.restarts) copy_state(in_tensors(p.fresh), own), state = own;
    c.n = p.counts ? p.counts[index * p.rows + row] : b;
    if (!p.norm) c.error = c.delta[last];  // the last matrix' output is the answer
    if (!c.n) return false;
    coefficients(c);
    keys(c);
    return true;
  }
  // What all tokens of an open chunk come to goes to tensors, and what the first of them have come to is there.
  void open(Chunk& c) const {
    for (int l = 0; l < L; l++) {
      c.x[l] = p.inputs[l] + memory * b * d[l], c.delta[l] = p.deltas[l] + memory * b * d[l + 1];
      copy(1, old * d[l], p.old_inputs[l] + memory * old * d[l], 0, c.x[l], 0);
      copy(1, old * d[l + 1], p.old_deltas[l] + memory * old * d[l + 1], 0, c.delta[l], 0);
    }
  }
  void forward(int64_t from, int64_t to) {
    Chunk c = new_chunk();
    T* const block = take(state_size);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      const State own = in_block(block);
      state = in_tensors(p.state);
      if (p.steps) open(c);
      for (int index = 0; index < p.chunks; index++) {
        if (p.kept && index && index % p.group == 0) copy_state(state, kept(index / p.group));
        if (!enter(index, c, own)) continue;
        queries(c);
        const int64_t first = token(c, old) - (row + 1) * old * p.heads;  // reads are of new tokens only
        if (p.reads) copy(c.n - old, D, output + old * D, D, p.reads + first * D, p.heads * D);
        for (int t = 0; t < c.n && p.steps; t++)
          for (int l = 0; l < L; l++) p.steps[token(c, t) * L + l] = c.steps[l][t];
        if (p.after[W][0]) end(c, own);
      }
      if (p.after[W][0]) copy_state(state, in_tensors(p.after));
    }
  }
  // Goes through a group once more from the state kept before it, then back through its chunks.
  void backward(int64_t from, int64_t to) {
    std::vector<Chunk> chunks;
    for (int i = 0; i < p.group; i++) chunks.push_back(new_chunk());
    T* const states = take((p.group + 1) * state_size);
    for (int64_t m = from; m < to && base; m++) {
      begin(m);
      const State first = in_tensors(p.of_fresh);
      gradient = in_tensors(p.of_state);
      of_scale = p.of_scale + m * D, of_shift = p.of_shift + m * D;
      for (int l = 0; l < L; l++) gradient[M0][l] = p.of_anchors[l] + m * size(l);
      const auto at = [&](int place) { return in_block(states + place * state_size); };
      for (int group = (p.chunks - 1) / p.group; group >= 0; group--) {
        const int begun = group * p.group, count = std::min<int>(p.group, p.chunks - begun);
        copy_state(group ? kept(group) : in_tensors(p.state), at(0));
        for (int i = 0; i < count; i++) {
          state = at(i);
          enter(begun + i, chunks[i], at(i)) ? end(chunks[i], at(i + 1)) : copy_state(at(i), at(i + 1));
        }
        for (int i = count - 1; i >= 0; i--) {
          state = at(i);
          if (chunks[i].n) back(chunks[i], at(i + 1));
          for (int l = 0; l < L && chunks[i].restarts; l++)
            for (int part : {W, S})
              add(size(l), 1, gradient[part][l], first[part][l]), memset(gradient[part][l], 0, size(l) * sizeof(T));
        }
      }
    }
  }
};

// Bytes of working memory that a thread needs, without a base; else the work on some memories.
template <typename T>
int64_t run(const void* problem, bool back, int64_t from, int64_t to, void* base) {
  Walk<T> walk(*(const Problem<T>*)problem, base);
  back ? walk.backward(from, to) : walk.forward(from, to);
  return walk.used;
}
}  // namespace NAME
#undef NAME
#undef BYTES

#else  // ---------------------------------------------------------------------------------------------- instances
#define NAME baseline
#define BYTES 16
#include "memory.cpp"
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#define NAME avx2
#define BYTES 32
#include "memory.cpp"
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#define NAME avx512
#define BYTES 64
#include "memory.cpp"
#pragma clang attribute pop
#pragma clang attribute pop
#pragma GCC pop_options
#endif
static decltype(&baseline::run<float>) const RUN[][2] = {  // by operation.widest and precision
    {baseline::run<float>, baseline::run<double>},
#ifdef __x86_64__
    {avx2::run<float>, avx2::run<double>},
    {avx512::run<float>, avx512::run<double>},
#endif
};
extern "C" int64_t memory_problem_bytes() { return sizeof(Problem<float>); }
extern "C" int64_t memory_workspace(const void* problem, bool back, int level, int bits) {
  return RUN[level][bits / 64](problem, back, 0, 0, nullptr);
}
// Forward or back of so many memories; `bytes` of the workspace belong to each thread.
extern "C" void memory_run(const void* problem, bool back, int level, int bits, int64_t count, char* workspace,
                           int64_t bytes) {
  at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
    RUN[level][bits / 64](problem, back, from, to, workspace + at::get_thread_num() * bytes);
  });
}
#endif
