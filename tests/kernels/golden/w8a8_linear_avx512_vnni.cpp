// w8a8_linear_avx512_vnni: y = residual + x W^T on int8 codes, after the norm (if any) and the quantization of x.
//
// Tensors (m tokens, k in_features, o out_features: arguments of the call, so one library serves every layer):
//     x           [m, k] row stride       read; for a norm rounded to x_dtype, behind it to normed_dtype
//     gate        [m, k] row stride       or null: x * silu(gate) is what the norm gets
//     norm        [k]                     or null: weight of the RMSNorm in front, over groups of group_size features
//     smooth      [k], x's dtype          or null: SmoothQuant factors that multiply the (normed) x
//     act_scale   [1] float32             or null: static scale; otherwise each token has its own
//     qdata       [o, k] int8, scale [o] float32, bias [o] or null
//     residual    [m, o] row stride       or null: what x W^T, rounded to linear_dtype, is added to
//     y           [m, o]                  written; float32 or bfloat16
//
// Work: tokens are quantized once to codes [m, k]. Then each OpenMP thread takes panels of weight rows, small enough to
// stay in the L1 cache, and runs all tokens over a panel, 4 x 4 results at a time. Weights are read as they lie.
// From 36 tokens on panels are first repacked, a group of them that stays in the L2 cache at a time, for 12 x 32
// results at a time without a sum across lanes.
//
// vpdpbusd wants one unsigned operand: weights + 128 (a flipped sign bit). What this adds, 128 * the sum of a token's
// codes, is taken off at the end; so no sums of weights are kept. The int32 sums wrap, as torch's do.
//
// Promises: without a norm, codes, integer sums and result are those of the torch reference, bit for bit. The norm sums
// squares in another order, and its exp is within 2 units in the last place: a code may differ by one at a tie.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <immintrin.h>
#include <vector>

namespace {

constexpr int LANES = 16;  // floats of one vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Ints widen(Bytes bytes) { return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes); }
inline Ints widen_signed(Bytes bytes) { return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes); }
inline Bytes narrow(Ints lanes) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)lanes); }
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Lanes of b where MASK has a 1. gcc makes shuffles of some, which one port does, and a blend is for two.
template <int MASK>
inline Floats blend(Floats a, Floats b) { return _mm512_mask_blend_ps(MASK, a, b); }
template <int MASK>
inline Ints blend(Ints a, Ints b) { return (Ints)_mm512_mask_blend_epi32(MASK, (__m512i)a, (__m512i)b); }
// Entry of the table that the low four bits of each lane name.
inline Floats look_up(Floats table, Ints nibbles) { return _mm512_permutexvar_ps((__m512i)nibbles, table); }
inline Words widen_halves(Halves halves) { return (Words)_mm512_cvtepu16_epi32((__m256i)halves); }
inline Halves narrow_to_halves(Words words) { return (Halves)_mm512_cvtepi32_epi16((__m512i)words); }
// sum + the products of four unsigned and four signed bytes in each lane.
inline Ints add_bytes(Ints sum, Words unsigned_bytes, Words signed_bytes) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
}

template <class Body>
__attribute__((noinline)) void invoke(const Body& body) {
    body();
}

// `body` by each of so many threads, which share its loops. One alone is no team: a team's barrier costs libgomp a
// system call, 0.4 us. Inside of somebody else's team the loops would be shared with that.
template <class Body>
inline void by_threads(int64_t threads, const Body& body) {
#ifdef _OPENMP
    if (threads == 1 && !omp_in_parallel()) return invoke(body);
#pragma omp parallel num_threads(threads)
#endif
    invoke(body);
}

// Through a type that may be unaligned and alias anything; gcc turns a short memcpy into integer registers instead.
template <class Vector, class Element>
inline Vector load(const Element* from) {
    typedef Vector Anywhere __attribute__((aligned(1), may_alias));
    return *(const Anywhere*)from;
}

template <class Vector, class Element>
inline void store(Element* to, Vector vector) {
    typedef Vector Anywhere __attribute__((aligned(1), may_alias));
    *(Anywhere*)to = vector;
}

// The first `count` lanes from memory, at least one; zero behind them.
template <class Vector, class Element>
inline Vector load_first(const Element* from, int64_t count) {
    if (count >= LANES) return load<Vector>(from);
    Vector vector = {};
    memcpy(&vector, from, count * sizeof(Element));
    return vector;
}

template <class Vector, class Element>
inline void store_first(Element* to, Vector vector, int64_t count) {
    if (count >= LANES) {
        store(to, vector);
    } else {
        memcpy(to, &vector, count * sizeof(Element));
    }
}

// Less zero, which changes no value and costs nothing; plus zero would change -0.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// Lanes of two vectors; those of the second count on from the first's.
#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLED_SHORTS SHUFFLED
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#define SHUFFLED_SHORTS(a, b, ...) __builtin_shuffle(a, b, (Shorts){__VA_ARGS__})
#endif
#define ROTATED(x, ...) SHUFFLED(x, x, __VA_ARGS__)

// Sum of all lanes by halving: lane i and lane i + step. Every lane ends with the same sum.
inline float sum_lanes(Floats x) {
    x += ROTATED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += ROTATED(x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3);
    x += ROTATED(x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1);
    x += ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0);
    return x[0];
}

inline float from_bfloat16(uint16_t stored) {
    const uint32_t word = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN becomes the NaN that torch stores.
inline uint16_t to_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

// The same, in the upper half of each lane.
inline Words to_bfloat16(Floats values) {
    const Words words = (Words)values;
    return values == values ? (words + 0x7fff + (words >> 16 & 1)) & 0xffff0000u : Words{} + 0x7fc00000u;
}

// An input as the caller has it: its last dimension is contiguous. dtype: 0 float32, 1 bfloat16.
struct Input {
    const void* data;
    int64_t dtype;
    int64_t batch_stride;
    int64_t head_stride;

    float at(int64_t index) const {
        return dtype == 0 ? ((const float*)data)[index] : from_bfloat16(((const uint16_t*)data)[index]);
    }
};

// Values from `index` of a tensor; `left` of them exist.
inline Floats read(const Input& input, int64_t index, int64_t left) {
    if (input.dtype == 0) return load_first<Floats>((const float*)input.data + index, left);
    return (Floats)(widen_halves(load_first<Halves>((const uint16_t*)input.data + index, left)) << 16);
}

// Round to the precision of a dtype.
inline Floats round_to(Floats values, int64_t dtype) { return dtype == 0 ? values : (Floats)to_bfloat16(values); }

inline void write(void* output, int64_t dtype, int64_t index, Floats values, int64_t left) {
    if (dtype == 0) {
        store_first((float*)output + index, values, left);
    } else {
        store_first((uint16_t*)output + index, narrow_to_halves(to_bfloat16(values) >> 16), left);
    }
}

// e^x by 2^n * e^r with |r| <= log(2) / 2 and the Taylor polynomial of degree 7 (error below 1e-8): within 2 units in
// the last place. Infinite above 88, where float32 nearly ends, e^-87 below -87; NaN stays NaN.
inline Floats exponential(Floats from) {
    const Floats x = from < -87.0f ? splat(-87.0f) : from;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // n in the low bits
    const Floats n = shifted - 12582912.0f;
    // log(2) in two parts, the first short enough for n times it to be exact.
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats sum = splat(1.0f / 5040.0f);
    sum = multiply_add(sum, r, splat(1.0f / 720.0f));
    sum = multiply_add(sum, r, splat(1.0f / 120.0f));
    sum = multiply_add(sum, r, splat(1.0f / 24.0f));
    sum = multiply_add(sum, r, splat(1.0f / 6.0f));
    sum = multiply_add(sum, r, splat(1.0f / 2.0f));
    sum = multiply_add(sum * r, r, r) + 1.0f;
    const Floats result = sum * (Floats)(((Words)shifted - 0x4b400000u + 127u) << 23);
    return from > 88.0f ? splat(INFINITY) : result;
}

inline Floats silu(Floats x) { return x / (exponential(-x) + 1.0f); }

constexpr int STEP = 64;  // codes of one product instruction
constexpr int ROWS = 4, TOKENS = 4;
constexpr int64_t PANEL_BYTES = 24576;
constexpr int64_t CHUNK_BYTES = 524288;
constexpr float TINY_SCALE = 7.888609052210118e-31f;

struct Arguments {
    Input x, gate, norm, smooth, bias, residual;
    const float* act_scale;
    const int8_t* qdata;
    const float* scale;
    void* y;
    int64_t x_dtype, normed_dtype, linear_dtype, y_dtype, tokens, k, o, group_size;
    double epsilon;
    int64_t threads;
};

typedef int8_t Code;  // of a token

// Tokens as the products read them: rows of `width` codes, zero from k on.
struct Tokens {
    Code* codes;
    float* scale;
    int32_t* excess;
    int64_t width;
};

typedef Words Codes;
inline Codes load_weights(const int8_t* from) { return load<Words>(from) ^ 0x80808080u; }
inline Codes load_codes(const Code* from) { return load<Words>(from); }
inline Ints add_products(Ints sums, Codes weights, Codes codes) { return add_bytes(sums, weights, codes); }

// Lane i of the result is vector i reduced over its lanes; merge(a, b) reduces two lanes.
template <class Vector, class Merge>
inline Vector reduce_each(Vector* vectors, Merge merge) {
    for (int i = 0; i < 8; ++i) {
        const Vector a = vectors[i], b = vectors[i + 8];
        vectors[i] = merge(
            blend<0b1111111100000000>(a, b),
            SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
        );
    }
    for (int i = 0; i < 4; ++i) {
        const Vector a = vectors[i], b = vectors[i + 4];
        vectors[i] = merge(
            blend<0b1111000011110000>(a, b),
            SHUFFLED(a, b, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27)
        );
    }
    for (int i = 0; i < 2; ++i) {
        const Vector a = vectors[i], b = vectors[i + 2];
        vectors[i] = merge(
            blend<0b1100110011001100>(a, b),
            SHUFFLED(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29)
        );
    }
    for (int i = 0; i < 1; ++i) {
        const Vector a = vectors[i], b = vectors[i + 1];
        vectors[i] = merge(
            blend<0b1010101010101010>(a, b),
            SHUFFLED(a, b, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30)
        );
    }
    return vectors[0];
}

template <class Vector>
inline Vector sum_each(Vector* vectors) {
    return reduce_each(vectors, [](Vector a, Vector b) { return a + b; });
}

inline Ints largest_each(Ints* vectors) {
    return reduce_each(vectors, [](Ints a, Ints b) { return larger(a, b); });
}

typedef int32_t Four __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8)));

// The linears of the 130M shape in bfloat16 with results converted one by one / so, one thread of Zen 4: 35 / 30 ms of
// 32 tokens, 10.9 / 9.9 of 8; but 5.2 / 5.5 of one token, which gets them one by one.
inline FourHalves narrow_four(FourFloats values) {
    const FourWords words = (FourWords)values, rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
    return __builtin_convertvector(values == values ? rounded : FourWords{} + 0x7fc0u, FourHalves);
}

inline FourFloats widen_four(FourHalves halves) {
    return (FourFloats)(__builtin_convertvector(halves, FourWords) << 16);
}

// `count` values from `index` of a tensor.
inline FourFloats read_four(const Input& input, int64_t index, int count) {
    FourFloats values = {};
    FourHalves halves = {};
    if (input.dtype == 0) {
        memcpy(&values, (const float*)input.data + index, count * sizeof(float));
        return values;
    }
    memcpy(&halves, (const uint16_t*)input.data + index, count * sizeof(uint16_t));
    return widen_four(halves);
}

// How weights are read: the hardware alone reads too little ahead. Microseconds of one thread of Emerald Rapids,
// 768x3352, one and four tokens: 99 and 105 with the rows that follow fetched to the L1 cache, 106 and 114 to the L2.
constexpr int ROWS_AHEAD = ROWS, CACHE = 3;  // 3 is the L1
constexpr int abreast(int) { return ROWS; }

// y of `R` rows (from `row`), of which ABREAST are read at a time, and `T` tokens (from `token`). The FIRST tokens of a
// panel wait for memory; while later ones are multiplied, the next panel, `panel` rows on, comes to the L2 cache:
// without / with that, all linears of the 130M shape, one thread of Zen 4, 8, 16 and 32 tokens: 10.6 / 8.3, 17.6 / 13.8
// and 33.0 / 27.9 ms.
template <int R, int T, int ABREAST, bool FIRST>
inline void multiply_block(const Arguments& a, const Tokens& t, int64_t row, int64_t token, int64_t panel) {
    const int8_t* weights = a.qdata + row * a.k;
    const int8_t* ahead = weights + (FIRST ? ROWS_AHEAD : panel) * a.k;
    const Code* codes = t.codes + token * t.width;
    constexpr int VECTORS = (R * T + LANES - 1) / LANES;  // of results
    // Every loop over these is unrolled: an index that is no constant would keep them in memory.
    Ints sums[VECTORS * LANES] = {};
#pragma GCC unroll 4
    for (int first = 0; first < R; first += ABREAST) {
        int64_t i = 0;
        for (; i + STEP <= a.k; i += STEP) {
            Codes w[ABREAST];
#pragma GCC unroll 4
            for (int r = 0; r < ABREAST; ++r) {
                w[r] = load_weights(weights + (first + r) * a.k + i);
                if (ABREAST > 1) __builtin_prefetch(ahead + (first + r) * a.k + i, 0, FIRST ? CACHE : 2);
            }
#pragma GCC unroll 4
            for (int m = 0; m < T; ++m) {
                const Codes c = load_codes(codes + m * t.width + i);
#pragma GCC unroll 4
                for (int r = 0; r < ABREAST; ++r) {
                    sums[m * R + first + r] = add_products(sums[m * R + first + r], w[r], c);
                }
            }
        }
        if (i < a.k) {
#pragma GCC unroll 4
            for (int r = first; r < first + ABREAST; ++r) {
                int8_t rest[STEP] = {};
                memcpy(rest, weights + r * a.k + i, a.k - i);
                const Codes w = load_weights(rest);
#pragma GCC unroll 4
                for (int m = 0; m < T; ++m) {
                    sums[m * R + r] = add_products(sums[m * R + r], w, load_codes(codes + m * t.width + i));
                }
            }
        }
    }
    int32_t products[VECTORS * LANES + 4];  // the last is read with three behind it
    for (int v = 0; v < VECTORS; ++v) store(products + v * LANES, sum_each(sums + v * LANES));
    FourFloats scale = {}, bias = {};
    memcpy(&scale, a.scale + row, R * sizeof(float));
    if (a.bias.data) {
        for (int r = 0; r < R; ++r) bias[r] = a.bias.at(row + r);
    }
#pragma GCC unroll 4
    for (int m = 0; m < T; ++m) {
        const Four product = load<Four>(products + m * R) - t.excess[token + m];
        FourFloats y = __builtin_convertvector(product, FourFloats) * t.scale[token + m] * scale;
        if (a.bias.data) y += bias;
        if (a.residual.data) {
            if (a.linear_dtype != 0) y = widen_four(narrow_four(y));
            y += read_four(a.residual, (token + m) * a.residual.batch_stride + row, R);
        }
        const int64_t at = (token + m) * a.o + row;
        if (a.y_dtype == 0) {
            memcpy((float*)a.y + at, &y, R * sizeof(float));
        } else if (T == 1) {
            for (int r = 0; r < R; ++r) ((uint16_t*)a.y)[at + r] = to_bfloat16(y[r]);
        } else {
            const FourHalves halves = narrow_four(y);
            memcpy((uint16_t*)a.y + at, &halves, R * sizeof(uint16_t));
        }
    }
}

template <int T, int ABREAST, bool FIRST>
inline void multiply_tokens(const Arguments& a, const Tokens& t, int64_t row, int64_t end, int64_t token) {
    // Results of the next tokens: rows of y lie too far apart for the hardware to foresee them. 512 tokens, 768x3352,
    // one thread: 8.0 ms without, 6.0 with.
    const int64_t element = a.y_dtype == 0 ? 4 : 2;
    for (int64_t next = token + T; next < token + 2 * T && next < a.tokens; ++next) {
        const char* y = (const char*)a.y + (next * a.o + row) * element;
        for (int64_t at = 0; at < (end - row) * element; at += 64) __builtin_prefetch(y + at, 1);
    }
    const int64_t panel = end - row;
    for (; row + ROWS <= end; row += ROWS) multiply_block<ROWS, T, ABREAST, FIRST>(a, t, row, token, panel);
    for (; row < end; ++row) multiply_block<1, T, 1, FIRST>(a, t, row, token, panel);
}

// Tokens `token` to `last` over weight rows `row` to `end`, which lie in the L1 cache behind the first tokens.
inline void multiply_panel(const Arguments& a, const Tokens& t, int64_t row, int64_t end, int64_t token, int64_t last) {
    if (last - token == 1) return multiply_tokens<1, abreast(1), true>(a, t, row, end, token);
    if (last - token == 2) return multiply_tokens<2, abreast(2), true>(a, t, row, end, token);
    if (last - token == 3) return multiply_tokens<3, abreast(3), true>(a, t, row, end, token);
    if (last - token == 4) return multiply_tokens<4, abreast(4), true>(a, t, row, end, token);
    multiply_tokens<TOKENS, ROWS, true>(a, t, row, end, token);
    token += TOKENS;
    for (; token + TOKENS <= last; token += TOKENS) multiply_tokens<TOKENS, ROWS, false>(a, t, row, end, token);
    if (last - token == 1) multiply_tokens<1, ROWS, false>(a, t, row, end, token);
    if (last - token == 2) multiply_tokens<2, ROWS, false>(a, t, row, end, token);
    if (last - token == 3) multiply_tokens<3, ROWS, false>(a, t, row, end, token);
}

// x, or x * silu(gate), over groups of features by their root mean square, times the weight of the norm.
void norm_token(const Arguments& a, int64_t token, float* row) {
    for (int64_t begin = 0; begin < a.k; begin += a.group_size) {
        const int64_t end = begin + a.group_size;
        Floats squares = {};
        for (int64_t i = begin; i < end; i += LANES) {
            Floats value = round_to(read(a.x, token * a.x.batch_stride + i, end - i), a.x_dtype);
            if (a.gate.data) value *= silu(read(a.gate, token * a.gate.batch_stride + i, end - i));
            squares += value * value;
            store_first(row + i, value, end - i);
        }
        const float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)a.group_size + (float)a.epsilon);
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats value = round_to(load_first<Floats>(row + i, end - i) * inverse, a.x_dtype);
            store_first(row + i, round_to(value * read(a.norm, i, end - i), a.normed_dtype), end - i);
        }
    }
}

// Write the codes of a token, whose values wait in `row`; returns their sum. A scale of the token's own leaves nothing
// to limit, a static one does. 64 tokens, 1536x768, one thread: 324 us with the limits, 311 without.
template <bool LIMITED>
inline int32_t quantize_row(const float* row, int64_t k, float inverse, Code* codes) {
    Ints sums = {};
    for (int64_t i = 0; i < k; i += LANES) {
        Floats scaled = load<Floats>(row + i) * inverse;
        if (LIMITED) scaled = scaled > 127.0f ? splat(127.0f) : scaled < -127.0f ? splat(-127.0f) : scaled;
        // Adding 1.5 * 2^23 rounds half to even, and the low bits of the sum are the rounded value.
        const Ints code = (Ints)(scaled + 12582912.0f) - 0x4b400000;
        sums += code;
        store(codes + i, narrow(code));
    }
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

typedef __m512i Vector;
constexpr int BLOCK = 12, PANEL = 2 * LANES;  // tokens and rows: 24 vectors of sums, 2 of weights and one of codes
constexpr int UNIT = STEP / LANES;  // codes of a lane
constexpr int64_t PANELS_FROM = 3 * BLOCK;  // tokens
constexpr int64_t GROUP_BYTES = 393216;

// The units of a panel's rows that begin at one place.
struct alignas(4 * LANES) Column {
    Codes rows[2];
};

// STEP codes of `rows` rows, LANES at most, transposed: a vector for each unit, of that half of a panel.
// `count`: codes that exist.
inline void pack_tile(const int8_t* from, int64_t stride, int64_t rows, int64_t count, int half, Column* to) {
    Vector a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) {
        int8_t rest[STEP] = {};
        if (i < rows && count < STEP) memcpy(rest, from + i * stride, count);
        a[i] = (Vector)load_weights(i < rows && count >= STEP ? from + i * stride : rest);
        // 64 tokens, 768x3352, one thread: 833 us without, 767 with.
        __builtin_prefetch(from + (i + LANES) * stride, 0, 2);
    }
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // Quarter q of a[4 g + j] is unit 4 q + j of the rows 4 g to 4 g + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        to[j].rows[half] = (Codes)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
        to[4 + j].rows[half] = (Codes)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        to[8 + j].rows[half] = (Codes)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        to[12 + j].rows[half] = (Codes)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// Rows from `row`.
inline void pack_panel(const Arguments& a, int64_t row, Column* panel) {
    for (int half = 0; half < 2; ++half) {
        const int64_t first = row + LANES * half;
        for (int64_t i = 0; i < a.k; i += STEP) {
            pack_tile(a.qdata + first * a.k + i, a.k, a.o - first, a.k - i, half, panel + i / UNIT);
        }
    }
}

// Where units of a block of tokens lie: place after place in a row, in each the tokens one after the other.
inline Code* block_of(const Tokens& t, int64_t token) {
    return t.codes + token / BLOCK * BLOCK * t.width + token % BLOCK * UNIT;
}

inline void spread_token(const Tokens& t, int64_t token, const Code* codes) {
    Code* to = block_of(t, token);
    for (int64_t i = 0; i < t.width; i += UNIT) memcpy(to + i * BLOCK, codes + i, UNIT * sizeof(Code));
}

// y of one token in LANES rows of a panel.
inline void write_sums(const Arguments& a, const Tokens& t, int64_t row, int64_t token, Ints sums) {
    const int64_t left = a.o - row;
    if (token >= a.tokens || left <= 0) return;
    const Ints product = sums - t.excess[token];
    Floats y = __builtin_convertvector(product, Floats) * t.scale[token] * load_first<Floats>(a.scale + row, left);
    if (a.bias.data) y += read(a.bias, row, left);
    if (a.residual.data) {
        y = round_to(y, a.linear_dtype) + read(a.residual, token * a.residual.batch_stride + row, left);
    }
    write(a.y, a.y_dtype, token * a.o + row, y, left);
}

// What `multiply` will write is fetched before.
inline void fetch_results(const Arguments& a, int64_t row, int64_t token, int places) {
    const int64_t element = a.y_dtype == 0 ? 4 : 2;
    for (int64_t next = token; next < token + places && next < a.tokens; ++next) {
        const char* y = (const char*)a.y + (next * a.o + row) * element;
        __builtin_prefetch(y, 1);
        __builtin_prefetch(y + 64, 1);
    }
}

// The weights that `column` of a panel is packed from, of the panel that begins at `next`.
inline void fetch_weights(const int8_t* next, int64_t column) {
    for (int byte = 0; byte < PANEL * UNIT; byte += 64) {
        __builtin_prefetch(next + column * PANEL * UNIT + byte, 0, 2);
    }
}

// y of a panel's rows and 12 tokens of one block.
inline void multiply_12(
    const Arguments& a, const Tokens& t, int64_t row, const Column* panel, int64_t token, const int8_t* next
) {
    const Code* codes = block_of(t, token);
    fetch_results(a, row, token, 12);
    Ints low0 = {}, high0 = {};
    Ints low1 = {}, high1 = {};
    Ints low2 = {}, high2 = {};
    Ints low3 = {}, high3 = {};
    Ints low4 = {}, high4 = {};
    Ints low5 = {}, high5 = {};
    Ints low6 = {}, high6 = {};
    Ints low7 = {}, high7 = {};
    Ints low8 = {}, high8 = {};
    Ints low9 = {}, high9 = {};
    Ints low10 = {}, high10 = {};
    Ints low11 = {}, high11 = {};

    for (int64_t column = 0; column < t.width / UNIT; ++column) {
        if (next) fetch_weights(next, column);
        const Codes low = panel[column].rows[0], high = panel[column].rows[1];
        const Code* units = codes + column * UNIT * BLOCK;
        const Codes unit0 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 0 * UNIT));
        low0 = add_products(low0, low, unit0);
        high0 = add_products(high0, high, unit0);
        const Codes unit1 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 1 * UNIT));
        low1 = add_products(low1, low, unit1);
        high1 = add_products(high1, high, unit1);
        const Codes unit2 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 2 * UNIT));
        low2 = add_products(low2, low, unit2);
        high2 = add_products(high2, high, unit2);
        const Codes unit3 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 3 * UNIT));
        low3 = add_products(low3, low, unit3);
        high3 = add_products(high3, high, unit3);
        const Codes unit4 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 4 * UNIT));
        low4 = add_products(low4, low, unit4);
        high4 = add_products(high4, high, unit4);
        const Codes unit5 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 5 * UNIT));
        low5 = add_products(low5, low, unit5);
        high5 = add_products(high5, high, unit5);
        const Codes unit6 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 6 * UNIT));
        low6 = add_products(low6, low, unit6);
        high6 = add_products(high6, high, unit6);
        const Codes unit7 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 7 * UNIT));
        low7 = add_products(low7, low, unit7);
        high7 = add_products(high7, high, unit7);
        const Codes unit8 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 8 * UNIT));
        low8 = add_products(low8, low, unit8);
        high8 = add_products(high8, high, unit8);
        const Codes unit9 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 9 * UNIT));
        low9 = add_products(low9, low, unit9);
        high9 = add_products(high9, high, unit9);
        const Codes unit10 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 10 * UNIT));
        low10 = add_products(low10, low, unit10);
        high10 = add_products(high10, high, unit10);
        const Codes unit11 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 11 * UNIT));
        low11 = add_products(low11, low, unit11);
        high11 = add_products(high11, high, unit11);
    }
    // Through memory, so that no sum has to live in it before: what follows calls functions, which keep no vector.
    Ints sums[24];
    sums[0] = low0, sums[1] = high0;
    sums[2] = low1, sums[3] = high1;
    sums[4] = low2, sums[5] = high2;
    sums[6] = low3, sums[7] = high3;
    sums[8] = low4, sums[9] = high4;
    sums[10] = low5, sums[11] = high5;
    sums[12] = low6, sums[13] = high6;
    sums[14] = low7, sums[15] = high7;
    sums[16] = low8, sums[17] = high8;
    sums[18] = low9, sums[19] = high9;
    sums[20] = low10, sums[21] = high10;
    sums[22] = low11, sums[23] = high11;
    asm volatile("" : : "r"(sums) : "memory");
    for (int m = 0; m < 12; ++m) {
        write_sums(a, t, row, token + m, sums[2 * m]);
        write_sums(a, t, row + LANES, token + m, sums[2 * m + 1]);
    }
}

// y of a panel's rows and 4 tokens of one block.
inline void multiply_4(
    const Arguments& a, const Tokens& t, int64_t row, const Column* panel, int64_t token
) {
    const Code* codes = block_of(t, token);
    fetch_results(a, row, token, 4);
    Ints low0 = {}, high0 = {};
    Ints low1 = {}, high1 = {};
    Ints low2 = {}, high2 = {};
    Ints low3 = {}, high3 = {};

    for (int64_t column = 0; column < t.width / UNIT; ++column) {
        const Codes low = panel[column].rows[0], high = panel[column].rows[1];
        const Code* units = codes + column * UNIT * BLOCK;
        const Codes unit0 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 0 * UNIT));
        low0 = add_products(low0, low, unit0);
        high0 = add_products(high0, high, unit0);
        const Codes unit1 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 1 * UNIT));
        low1 = add_products(low1, low, unit1);
        high1 = add_products(high1, high, unit1);
        const Codes unit2 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 2 * UNIT));
        low2 = add_products(low2, low, unit2);
        high2 = add_products(high2, high, unit2);
        const Codes unit3 = (Codes)_mm512_set1_epi32(load<int32_t>(units + 3 * UNIT));
        low3 = add_products(low3, low, unit3);
        high3 = add_products(high3, high, unit3);
    }
    // Through memory, so that no sum has to live in it before: what follows calls functions, which keep no vector.
    Ints sums[8];
    sums[0] = low0, sums[1] = high0;
    sums[2] = low1, sums[3] = high1;
    sums[4] = low2, sums[5] = high2;
    sums[6] = low3, sums[7] = high3;
    asm volatile("" : : "r"(sums) : "memory");
    for (int m = 0; m < 4; ++m) {
        write_sums(a, t, row, token + m, sums[2 * m]);
        write_sums(a, t, row + LANES, token + m, sums[2 * m + 1]);
    }
}

// All tokens over the panels `first` to `last`, a group of them at a time: packed, a group stays in the L2 cache while
// all tokens pass by, and a token's results in it are one run of memory, not a line or two in each panel.
void multiply_panels(const Arguments& a, const Tokens& t, int64_t first, int64_t last) {
    const int64_t columns = t.width / UNIT;  // of a panel
    const int64_t fitting = GROUP_BYTES / (int64_t)(columns * sizeof(Column)), group = fitting > 1 ? fitting : 1;
    std::vector<Column> packed((group < last - first ? group : last - first) * columns);
    for (; first < last; first += group) {
        const int64_t end = first + group < last ? first + group : last;
        for (int64_t index = first; index < end; ++index) {
            pack_panel(a, index * PANEL, packed.data() + (index - first) * columns);
        }
        for (int64_t token = 0; token < a.tokens; token += BLOCK) {
            for (int64_t index = first; index < end; ++index) {
                const Column* panel = packed.data() + (index - first) * columns;
                // While the first tokens are multiplied the next group comes to the L2 cache. All linears of the 130M
                // shape, one thread of Zen 4, 48 and 128 tokens: 41.2 and 90.6 ms without, 40.1 and 86.9 with.
                const int8_t* next = token ? nullptr : a.qdata + (index + end - first) * PANEL * a.k;
                if (token + BLOCK <= a.tokens) {
                    multiply_12(a, t, index * PANEL, panel, token, next);
                    continue;
                }
                for (int64_t rest = token; rest < a.tokens; rest += 4) {
                    multiply_4(a, t, index * PANEL, panel, rest);
                }
            }
        }
    }
}

// Norm and quantize one token. `row`: scratch of `width` floats, zero from k on.
void prepare_token(const Arguments& a, const Tokens& t, int64_t token, float* row, Code* spread) {
    if (a.norm.data) {
        norm_token(a, token, row);
    } else {
        const int64_t x = token * a.x.batch_stride;
        for (int64_t i = 0; i < a.k; i += LANES) store(row + i, read(a.x, x + i, a.k - i));
    }
    Ints largest = {};
    for (int64_t i = 0; i < a.k; i += LANES) {
        Floats value = load<Floats>(row + i);
        if (a.smooth.data) {
            value = round_to(value * read(a.smooth, i, a.k - i), a.normed_dtype);
            store(row + i, value);
        }
        largest = larger(largest, (Ints)magnitude(value));
    }
    // As integers, magnitudes are in order, and what is not finite is above all that is.
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    float top;
    memcpy(&top, &bits, sizeof top);
    // A comparison with NaN is false, so a scale that is NaN stays NaN.
    float scale = a.act_scale ? *a.act_scale : top / 127.0f;
    if (!a.act_scale && scale < TINY_SCALE) scale = TINY_SCALE;
    const float inverse = 1.0f / scale;
    const bool finite = isfinite(a.act_scale ? top * inverse : scale);
    Code* const codes = spread ? spread : t.codes + token * t.width;
    int32_t sum = 0;
    if (finite) sum = (a.act_scale ? quantize_row<true> : quantize_row<false>)(row, a.k, inverse, codes);
    if (finite && spread) spread_token(t, token, spread);
    t.scale[token] = finite ? scale : NAN;
    t.excess[token] = (int32_t)((uint32_t)sum << 7);
}

// Zeros, the first of them at a multiple of 64 bytes: an aligned operator new takes 0.1 us more each time.
class Scratch {
    std::vector<int8_t> bytes;

  public:
    explicit Scratch(int64_t size) : bytes(size + 63) {}
    int8_t* data() { return (int8_t*)(((uintptr_t)bytes.data() + 63) / 64 * 64); }
};

}  // namespace

extern "C" void w8a8_linear_avx512_vnni(const void* packed_arguments) {
    Arguments a;
    memcpy(&a, packed_arguments, sizeof a);
    const int64_t width = (a.k + STEP - 1) / STEP * STEP;
    const bool packed = a.tokens >= PANELS_FROM;
    const int64_t places = packed ? (a.tokens + BLOCK - 1) / BLOCK * BLOCK : a.tokens;
    Scratch shared(places * width * sizeof(Code) + 8 * a.tokens);
    Code* const codes = (Code*)shared.data();
    float* const row_scale = (float*)(codes + places * width);
    const Tokens t = {codes, row_scale, (int32_t*)(row_scale + a.tokens), width};
    const int64_t fitting_tokens = CHUNK_BYTES / (int64_t)sizeof(Code) / width / TOKENS * TOKENS;
    const int64_t chunk = fitting_tokens > 0 ? fitting_tokens : TOKENS;
    const int64_t fitting = a.k * ROWS < PANEL_BYTES ? PANEL_BYTES / a.k / ROWS * ROWS : ROWS;
    const int64_t panel = packed ? PANEL : fitting, panels = (a.o + panel - 1) / panel;
    by_threads(a.threads, [&] {
        {
            Scratch own(4 * width + (packed ? width * sizeof(Code) : 0));
            float* const row = (float*)own.data();
            Code* const spread = packed ? (Code*)(row + width) : nullptr;
#pragma omp for schedule(static)
            for (int64_t token = 0; token < a.tokens; ++token) {
                prepare_token(a, t, token, row, spread);
            }
        }
        if (packed) {
#pragma omp for schedule(static) nowait
            for (int64_t share = 0; share < a.threads; ++share) {
                multiply_panels(a, t, panels * share / a.threads, panels * (share + 1) / a.threads);
            }
        }
        for (int64_t token = 0; token < a.tokens && !packed; token += chunk) {
            const int64_t last = token + chunk < a.tokens ? token + chunk : a.tokens;
#pragma omp for schedule(static) nowait
            for (int64_t index = 0; index < panels; ++index) {
                const int64_t row = index * panel, end = row + panel < a.o ? row + panel : a.o;
                multiply_panel(a, t, row, end, token, last);
            }
        }
    });
}
