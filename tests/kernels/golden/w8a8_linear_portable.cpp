// w8a8_linear_portable: y = residual + x W^T on int8 codes, after the norm (if any) and the quantization of x.
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
// stay in the L1 cache, and runs all tokens over a panel, 2 x 4 results at a time. Weights are read as they lie.
//
// Two products of codes fit into an int16; pairs of them are then added in int32: exact.
//
// Promises: without a norm, codes, integer sums and result are those of the torch reference, bit for bit. The norm sums
// squares in another order, and its exp is within 2 units in the last place: a code may differ by one at a tie.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <vector>

namespace {

constexpr int LANES = 4;  // floats of one vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Ints widen(Bytes bytes) { return __builtin_convertvector(bytes, Ints); }
inline Ints widen_signed(Bytes bytes) { return widen(bytes) << 24 >> 24; }
inline Bytes narrow(Ints lanes) { return __builtin_convertvector(lanes, Bytes); }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Words widen_halves(Halves halves) { return __builtin_convertvector(halves, Words); }
inline Halves narrow_to_halves(Words words) { return __builtin_convertvector(words, Halves); }

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
    x += ROTATED(x, 2, 3, 0, 1);
    x += ROTATED(x, 1, 2, 3, 0);
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

constexpr int STEP = 16;  // codes of one product instruction
constexpr int ROWS = 4, TOKENS = 2;
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

typedef int16_t Code;  // of a token

// Tokens as the products read them: rows of `width` codes, zero from k on.
struct Tokens {
    Code* codes;
    float* scale;
    int32_t* excess;
    int64_t width;
};

typedef int8_t Eight __attribute__((vector_size(8)));
typedef int16_t Shorts __attribute__((vector_size(16)));
struct Codes {
    Shorts low, high;
};
inline Codes load_weights(const int8_t* from) {
    return {__builtin_convertvector(load<Eight>(from), Shorts), __builtin_convertvector(load<Eight>(from + 8), Shorts)};
}
inline Codes load_codes(const Code* from) { return {load<Shorts>(from), load<Shorts>(from + 8)}; }
inline Ints add_products(Ints sums, Codes weights, Codes codes) {
    const Ints pairs = (Ints)(weights.low * codes.low + weights.high * codes.high);
    return sums + (pairs << 16 >> 16) + (pairs >> 16);
}

// Lane i of the result is vector i reduced over its lanes; merge(a, b) reduces two lanes.
template <class Vector, class Merge>
inline Vector reduce_each(Vector* vectors, Merge merge) {
    for (int i = 0; i < 2; ++i) {
        const Vector a = vectors[i], b = vectors[i + 2];
        vectors[i] = merge(
            SHUFFLED(a, b, 0, 1, 6, 7),
            SHUFFLED(a, b, 2, 3, 4, 5)
        );
    }
    for (int i = 0; i < 1; ++i) {
        const Vector a = vectors[i], b = vectors[i + 1];
        vectors[i] = merge(
            SHUFFLED(a, b, 0, 5, 2, 7),
            SHUFFLED(a, b, 1, 4, 3, 6)
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
    multiply_tokens<TOKENS, ROWS, true>(a, t, row, end, token);
    token += TOKENS;
    for (; token + TOKENS <= last; token += TOKENS) multiply_tokens<TOKENS, ROWS, false>(a, t, row, end, token);
    if (last - token == 1) multiply_tokens<1, ROWS, false>(a, t, row, end, token);
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
        store(codes + i, narrow_to_halves((Words)code));
    }
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

// Norm and quantize one token. `row`: scratch of `width` floats, zero from k on.
void prepare_token(const Arguments& a, const Tokens& t, int64_t token, float* row) {
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
    Code* const codes = t.codes + token * t.width;
    int32_t sum = 0;
    if (finite) sum = (a.act_scale ? quantize_row<true> : quantize_row<false>)(row, a.k, inverse, codes);
    t.scale[token] = finite ? scale : NAN;
    t.excess[token] = 0;
}

// Zeros, the first of them at a multiple of 64 bytes: an aligned operator new takes 0.1 us more each time.
class Scratch {
    std::vector<int8_t> bytes;

  public:
    explicit Scratch(int64_t size) : bytes(size + 63) {}
    int8_t* data() { return (int8_t*)(((uintptr_t)bytes.data() + 63) / 64 * 64); }
};

}  // namespace

extern "C" void w8a8_linear_portable(const void* packed_arguments) {
    Arguments a;
    memcpy(&a, packed_arguments, sizeof a);
    const int64_t width = (a.k + STEP - 1) / STEP * STEP;
    const int64_t places = a.tokens;
    Scratch shared(places * width * sizeof(Code) + 8 * a.tokens);
    Code* const codes = (Code*)shared.data();
    float* const row_scale = (float*)(codes + places * width);
    const Tokens t = {codes, row_scale, (int32_t*)(row_scale + a.tokens), width};
    const int64_t fitting_tokens = CHUNK_BYTES / (int64_t)sizeof(Code) / width / TOKENS * TOKENS;
    const int64_t chunk = fitting_tokens > 0 ? fitting_tokens : TOKENS;
    const int64_t fitting = a.k * ROWS < PANEL_BYTES ? PANEL_BYTES / a.k / ROWS * ROWS : ROWS;
    const int64_t panel = fitting, panels = (a.o + panel - 1) / panel;
    by_threads(a.threads, [&] {
        {
            Scratch own(4 * width);
            float* const row = (float*)own.data();
#pragma omp for schedule(static)
            for (int64_t token = 0; token < a.tokens; ++token) {
                prepare_token(a, t, token, row);
            }
        }
        for (int64_t token = 0; token < a.tokens; token += chunk) {
            const int64_t last = token + chunk < a.tokens ? token + chunk : a.tokens;
#pragma omp for schedule(static) nowait
            for (int64_t index = 0; index < panels; ++index) {
                const int64_t row = index * panel, end = row + panel < a.o ? row + panel : a.o;
                multiply_panel(a, t, row, end, token, last);
            }
        }
    });
}
