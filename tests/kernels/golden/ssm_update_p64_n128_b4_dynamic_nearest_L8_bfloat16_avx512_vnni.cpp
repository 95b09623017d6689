// ssm_update_p64_n128_b4_dynamic_nearest_L8_bfloat16_avx512_vnni:
// one decode step of the SSM on a packed state.
//
//     h = exp(dt * A) * h + (dt * B) x        y = C . h + D x
//
// Tensors (b batch, h nheads, p = 64 headdim, g ngroups, n = 128 dstate; contiguous unless strides are named):
//     packed          [b, h, p, 64] uint8    read, rewritten by a store
//     channel_scale   [b, h, p] bfloat16      read, rewritten by a store
//     state_scale     [b, h, n] bfloat16      read, rewritten by a store
//     rng             [b, 2] int64            key and step; step + 1 at a store
//     ring_x          [b, 7, h, p] bfloat16    read; the slot at ring_position is written unless all are full
//     ring_B          [b, 7, g, n] bfloat16    the same
//     ring_decay      [b, 7, h] float32    the same
//     ring_position   [b] int32               + 1; a sequence at 7 stores its state and goes to 0
//     x               [b, h, p] strides (batch_stride, head_stride, 1)
//     B, C            [b, g, n] strides (batch_stride, head_stride of a group, 1)
//     dt              [b, h] strides (batch_stride, head_stride)
//     A, D, dt_bias   [h]; D and dt_bias may be null
//     y               [b, h, p], x's dtype    written
//
// Work: one (batch, head) at a time, shared among OpenMP threads.
// A sequence whose ring has room only reads its codes: y is their product with C, in integers, and what the ring adds.
// At the others, once in 8 steps, the ring is folded into the state, which is quantized again:
// A head's new state waits in 32768 bytes of scratch, since its state scales are known only after its last row.
//
// A byte holds columns c, c + 64, lowest bits first, each code plus 8.
//
// Promises: the operations of quant.py and recurrence.py in their order, fused where theirs are: codes and scales are
// the reference's, bit for bit. Only y differs, by rounding: its sum is taken in another order, with fused
// multiply-adds, and a step that only reads rounds C to 16 bits.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <immintrin.h>

namespace {

constexpr int HEADDIM = 64;
constexpr int DSTATE = 128;
constexpr int LANES = 16;  // floats of one vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // twice as many lanes

inline Ints widen(Bytes bytes) { return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes); }
inline Ints widen_signed(Bytes bytes) { return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes); }
inline Bytes narrow(Ints lanes) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)lanes); }
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// recurrence.multiply_add; where it decides no code, multiply_add may round twice.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return multiply_add(a, b, c); }
// Lanes of b where MASK has a 1. gcc makes shuffles of some, which one port does, and a blend is for two.
template <int MASK>
inline Floats blend(Floats a, Floats b) { return _mm512_mask_blend_ps(MASK, a, b); }
template <int MASK>
inline Ints blend(Ints a, Ints b) { return (Ints)_mm512_mask_blend_epi32(MASK, (__m512i)a, (__m512i)b); }
// Entry of the table that the low four bits of each lane name.
inline Floats look_up(Floats table, Ints nibbles) { return _mm512_permutexvar_ps((__m512i)nibbles, table); }
inline Words widen_halves(Halves halves) { return (Words)_mm512_cvtepu16_epi32((__m256i)halves); }
inline Halves narrow_to_halves(Words words) { return (Halves)_mm512_cvtepi32_epi16((__m512i)words); }
inline Ints smaller(Ints a, Ints b) { return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
// base + a * b rounded to an integer, half to even; base is 1.5 * 2^23 and something even and small.
inline Floats round_product(Floats a, Floats b, float base) { return multiply_add(a, b, Floats{} + base); }
// The larger magnitude, as an integer; of NaN and a number, the number.
inline Ints larger_magnitude(Ints most, Floats x) { return (Ints)_mm512_range_ps((Floats)most, x, 0x0b); }
inline Ints multiply_add_pairs(Shorts a, Shorts b, Ints sum) {
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
template <int COUNT>
inline Words load_bytes(const uint8_t* from) {
    return (Words)_mm512_maskz_loadu_epi8(~0ull >> (64 - COUNT), from);
}
// sum + the products of four unsigned and four signed bytes in each lane.
inline Ints add_bytes(Ints sum, Words unsigned_bytes, Words signed_bytes) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
}
// sum + (codes << shift) in the low byte of each lane.
inline Ints add_byte(Ints sum, Ints codes, int shift) {
    if (shift != 0) return add_bytes(sum, (Words)codes, Words{} + (1u << shift));
    return sum + (codes << shift);
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

// A row of the state is RUNS runs of RUN columns: the codes of one byte are one column of each run. In scratch each run
// is padded to whole vectors. Whatever multiplies a pad is zero, so a pad stays zero as long as its row is finite.
constexpr int RUNS = 2;
constexpr int RUN = DSTATE / RUNS;
constexpr int RUN_VECTORS = (RUN + LANES - 1) / LANES;
constexpr int TAIL = RUN % LANES;
constexpr int VECTORS = RUNS * RUN_VECTORS;
constexpr int ROW = VECTORS * LANES;

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

// Vector j of a run in memory; lanes past the end of the run are zero.
template <class Vector, class Element>
inline Vector load_run(const Element* run, int j) {
    if (TAIL == 0 || j < RUN_VECTORS - 1) return load<Vector>(run + j * LANES);
    Vector vector = {};
    memcpy(&vector, run + j * LANES, TAIL * sizeof(Element));
    return vector;
}

template <class Vector, class Element>
inline void store_run(Element* run, int j, Vector vector) {
    if (TAIL == 0 || j < RUN_VECTORS - 1) {
        store(run + j * LANES, vector);
    } else {
        memcpy(run + j * LANES, &vector, TAIL * sizeof(Element));
    }
}

// Less zero, which changes no value and costs nothing; plus zero would change -0.
inline Floats splat(float value) { return value - Floats{}; }
inline Words splat(uint32_t word) { return Words{} + word; }

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

inline int sum_lanes(Ints x) {
    x += ROTATED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += ROTATED(x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3);
    x += ROTATED(x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1);
    x += ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0);
    return x[0];
}

// The largest of all lanes, in every lane.
inline Ints max_lanes(Ints x) {
    x = larger(x, ROTATED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, ROTATED(x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
    x = larger(x, ROTATED(x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
    x = larger(x, ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
    return x;
}

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

    // `HEADDIM` values from `offset`.
    void read_row(int64_t offset, float* row) const {
        if (dtype == 0) {
            memcpy(row, (const float*)data + offset, HEADDIM * sizeof(float));
        } else {
            for (int p = 0; p < HEADDIM; ++p) row[p] = from_bfloat16(((const uint16_t*)data)[offset + p]);
        }
    }

    // Spread `DSTATE` values from `offset` over the runs of a row in scratch; pads are left alone.
    void read_columns(int64_t offset, float* row) const {
        for (int run = 0; run < RUNS; ++run) {
            float* to = row + run * RUN_VECTORS * LANES;
            const int64_t from = offset + run * RUN;
            if (dtype == 0) {
                memcpy(to, (const float*)data + from, RUN * sizeof(float));
            } else {
                for (int i = 0; i < RUN; ++i) to[i] = from_bfloat16(((const uint16_t*)data)[from + i]);
            }
        }
    }
};

inline Floats exact_exp(Floats x) {
    const Floats shifted = x * 1.44269502f + 12582912.0f;
    const Floats whole = shifted - 12582912.0f;
    Floats rest = x - whole * 0.693359375f;
    rest = rest - whole * -0.000212194442f;
    Floats series = splat(0.000198756912f);
    series = series * rest + 0.00139819994f;
    series = series * rest + 0.00833345205f;
    series = series * rest + 0.0416657962f;
    series = series * rest + 0.166666657f;
    series = series * rest + 0.5f;
    series = series * (rest * rest) + rest + 1.0f;
    const Floats power = (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
    const Floats y = x > 88.0f ? splat(INFINITY) : series * power;
    return x < -87.0f ? Floats{} : y;
}

inline Floats exact_softplus(Floats x) {
    const Floats z = exact_exp((Floats)((Words)x | 0x80000000u));
    const Floats s = z / (z + 2.0f);
    const Floats square = s * s;
    Floats series = splat(0.0666666701f);
    series = series * square + 0.0769230798f;
    series = series * square + 0.0909090936f;
    series = series * square + 0.111111112f;
    series = series * square + 0.142857149f;
    series = series * square + 0.200000003f;
    series = series * square + 0.333333343f;
    series = series * square + 1.0f;
    const Floats positive = x < 0.0f ? Floats{} : x;
    return positive + series * (s + s);
}

struct StepInputs {
    Input dt;                     // [b, h] as the caller has it
    Input dt_bias;                // [h]; none when null
    const float* A;               // [h]
    int64_t softplus;
};

// Step sizes of every sequence and head, in rows of `stride` floats (nheads rounded up to whole vectors).
struct Steps {
    int64_t stride;
    float *dt, *total, *decay;    // written: dt, dt * A + the sum since the checkpoint, and e to that

    Steps(int64_t batch, int64_t nheads) : stride((nheads + LANES - 1) / LANES * LANES) {
        dt = new float[3 * batch * stride]();
        total = dt + batch * stride;
        decay = total + batch * stride;
    }
    Steps(const Steps&) = delete;
    ~Steps() { delete[] dt; }

    void compute(const StepInputs& in, int64_t batch, int64_t nheads) const {
        for (int64_t b = 0; b < batch; ++b) {
            float *dt = this->dt + b * stride, *total = this->total + b * stride, *decay = this->decay + b * stride;
            for (int64_t head = 0; head < nheads; ++head) {
                dt[head] = in.dt.at(b * in.dt.batch_stride + head * in.dt.head_stride);
                if (in.dt_bias.data) dt[head] += in.dt_bias.at(head);
                decay[head] = in.A[head];
            }
            for (int64_t at = 0; at < stride; at += LANES) {
                Floats step = load<Floats>(dt + at);
                if (in.softplus) step = exact_softplus(step);
                store(dt + at, step);
                // What `total` holds so far is the sum since the checkpoint.
                const Floats sum = load<Floats>(total + at) + step * load<Floats>(decay + at);
                store(total + at, sum);
                store(decay + at, exact_exp(sum));
            }
        }
    }
};

constexpr int BITS = 4;
constexpr int LARGEST = 7;  // codes are -LARGEST .. LARGEST
constexpr int OFFSET = 8;  // what packing adds to a code
constexpr int WIDTH = RUN;  // bytes of a packed row
constexpr float TINY_SCALE = 0x1p-100f;

// Scales as they are stored, in the upper half of each lane: at least TINY_SCALE, rounded to bfloat16, NaN where not
// finite.
inline Words store_scales(Floats scales) {
    const Words stored = to_bfloat16(scales < TINY_SCALE ? splat(TINY_SCALE) : scales);
    return stored >= 0x7f800000u ? Words{} + 0x7fc00000u : stored;
}

// Sum of magnitudes over rows P, P + STEP, P + 2 * STEP, ... as quant.halving_sum adds them.
template <int P, int STEP>
inline Floats sum_rows(const float* column) {
    if constexpr (STEP > 32) {
        return magnitude(load<Floats>(column + P * ROW));
    } else if constexpr (P + STEP < HEADDIM) {
        return sum_rows<P, 2 * STEP>(column) + sum_rows<P + STEP, 2 * STEP>(column);
    } else {
        return sum_rows<P, 2 * STEP>(column);
    }
}

inline Ints clamp(Ints x, int low, int high) { return smaller(larger(x, Ints{} + low), Ints{} + high); }

// quant.dynamic_state_scale of a head's rows, and reciprocals. False if a value is not finite.
inline bool measure_scales(const float* rows, uint16_t* state_scale, float* inverse) {
    constexpr int LOWEST = 562036736, HIGHEST = 1568669696;
    alignas(64) int32_t totals[ROW];  // the bits of floats; zero in pads
    if (TAIL != 0) memset(totals, 0, sizeof totals);
    Ints most = {}, logs = {};
    for (int run = 0; run < RUNS; ++run) {
        for (int j = 0; j < RUN_VECTORS; ++j) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            store_run(totals + run * RUN_VECTORS * LANES, j, (Ints)sum_rows<0, 1>(rows + at));
            most = larger(most, load<Ints>(totals + at));
            logs += clamp(load<Ints>(totals + at), LOWEST, HIGHEST) >> 12;
        }
    }
    const int typical = (sum_lanes(logs) - (ROW - DSTATE) * (LOWEST >> 12)) / DSTATE << 12;
    for (int run = 0; run < RUNS; ++run) {
        for (int j = 0; j < RUN_VECTORS; ++j) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            const Ints total = load<Ints>(totals + at), log2 = clamp(total, LOWEST, HIGHEST), above = log2 - typical;
            const Ints far = above - clamp(above, -20971520, 20971520);
            const Ints halves = (log2 - 1061158912 + far) >> 23;  // of an octave
            const Ints scale = clamp(halves, -64, 64) << 22;
            const Ints stored = total < 0x7f800000 ? scale + 0x3f800000 : Ints{} + 0x7fc00000;
            store_run(state_scale + run * RUN, j, narrow_to_halves((Words)stored >> 16));
            // 1 / 1.5 is less than 0.75. Of NaN some number, which the NaN itself multiplies later.
            const Ints reciprocal = 0x3f800000 - scale - (scale << 9 >> 31 & (0x3f400000 - 0x3f2aaaab));
            store_run(inverse + run * RUN_VECTORS * LANES, j, (Floats)reciprocal);
        }
    }
    return max_lanes(most)[0] < 0x7f800000;
}

// Rows of the block of LANES that begins at row p.
inline int rows_from(int p) { return HEADDIM % LANES == 0 || HEADDIM - p > LANES ? LANES : HEADDIM - p; }

// `count` rows of h / state_scale; `largest` gets the magnitudes of each, NaN unless `finite`.
inline void scale_rows(
    const float* h, int count, const float* inverse, bool finite, float* rows, Ints* largest
) {
    // A store may alias anything: `inverse` itself would be read anew after each.
    Floats inverses[VECTORS];
    for (int j = 0; j < VECTORS; ++j) inverses[j] = load<Floats>(inverse + j * LANES);
    for (int i = 0; i < count; ++i) {
        Ints most = {};
#pragma GCC unroll 16
        for (int at = 0; at < ROW; at += LANES) {
            const Floats scaled = load<Floats>(h + i * ROW + at) * inverses[at / LANES];
            most = larger_magnitude(most, scaled);
            store(rows + i * ROW + at, scaled);
        }
        largest[i] = finite ? most : Ints{} + 0x7fc00000;
    }
}

// Codes plus OFFSET in the low bits of each lane.
// No clamp: bfloat16 rounds a scale down by 2^-9 at most, which lifts LARGEST by less than a half.
inline Ints round_codes(Floats scaled, float inverse) {
    return (Ints)round_product(scaled, splat(inverse), 12582912.0f + OFFSET);
}

// Pack a row of scaled values.
inline void pack_row(const float* row, float inverse, uint8_t* packed) {
#pragma GCC unroll 16
    for (int j = 0; j < RUN_VECTORS; ++j) {
        Ints bytes = {};
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            const Floats scaled = load<Floats>(row + at);
            bytes = add_byte(bytes, round_codes(scaled, inverse), run * BITS);
        }
        store_run(packed, j, narrow(bytes));
    }
}

// Channel scales of `count` rows (LANES at most) from magnitudes of h / state_scale, and their reciprocals.
inline void scale_channels(Ints* largest, int count, uint16_t* channel_scale, float* inverses) {
    for (int i = count; i < LANES; ++i) largest[i] = Ints{};
    const Words scale = store_scales((Floats)largest_each(largest) / (float)LARGEST);
    store_first(channel_scale, narrow_to_halves(scale >> 16), count);
    store(inverses, 1.0f / (Floats)scale);
}

// Pack `count` rows of h / state_scale.
inline void pack_rows(
    const float* rows, int count, const float* inverses,
    uint8_t* packed
) {
    for (int i = 0; i < count; ++i) {
        if (inverses[i] == inverses[i]) {
            pack_row(rows + i * ROW, inverses[i], packed + i * WIDTH);
        } else {
            memset(packed + i * WIDTH, 136, WIDTH);  // what is not finite shows in the scale
        }
    }
}

// What a nibble stands for. At 2 bits it holds two codes, and the lower one counts.
constexpr Floats CODES = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// As launch.py packs it.
struct Call {
    uint8_t* packed;
    uint16_t* channel_scale;
    uint16_t* state_scale;
    int64_t* rng;
    uint16_t *ring_x, *ring_B;
    float* ring_decay;
    int32_t* ring_position;
    float* ring_scale;
    Input x, B, C, D;
    StepInputs step;
    void* y;
    int64_t batch, nheads, ngroups, threads;
};

constexpr int SLOTS = 7;  // of the ring
constexpr int SLOTS_OF_TERM = 1;  // how many slots one operation adds to a state
constexpr int TERMS = (SLOTS + SLOTS_OF_TERM - 1) / SLOTS_OF_TERM;
constexpr int UNIT = 4 * LANES;  // bytes of one vector, so columns of each run in it
constexpr int UNITS = (RUN + UNIT - 1) / UNIT;

struct Arguments : Call {
    Steps steps;
    float* weights;  // [b, SLOTS, heads in rows of steps.stride] of the ring

    explicit Arguments(const Call& call)
        : Call(call), steps(call.batch, call.nheads), weights(new float[call.batch * SLOTS * steps.stride]) {}
    Arguments(const Arguments&) = delete;
    ~Arguments() { delete[] weights; }
};

// Values of a term's slots, one of x or B in each lane.
typedef float Term;
typedef Floats Terms;

inline Floats add_term(Floats sum, Terms B, Terms x) {
    return multiply_add(B, x, sum);
}

inline void put_term(Term* to, int, Floats values) { store(to, values); }

// What multiplies the codes of a head: integers C, their sum, and what one of them is worth.
struct Prepared {
    alignas(64) int8_t C[2 * RUNS * UNITS * UNIT];  // of each run the low bytes, then the high ones
    int sum;
    float unit;
    int64_t head;
};

struct alignas(64) Scratch {
    float B[ROW], dB[ROW], C[ROW], x[HEADDIM + LANES], y[HEADDIM + LANES];
    float state_scale[ROW], inverse[ROW];  // inverse: reciprocals of the state scales
    float rows[HEADDIM * ROW];
    float channel_inverse[HEADDIM + LANES];
    alignas(64) Term ring_x[TERMS][HEADDIM + LANES], ring_B[TERMS][ROW];
    float ring_BC[SLOTS], BC, B_scale;
    Prepared prepared[2];  // of this head and of the next one
    uint16_t B_stored[DSTATE];
    int64_t group = -1;  // the sequence and group that B, C and ring_B belong to
};

// Rows from the one updated to the one fetched; 8 to 128 do not differ. Microseconds a head of 64 x 128 without / with,
// batch 8, 24 layers, one thread of Zen 4: 4 bits dynamic 1.78 / 1.66, calibrated 1.32 / 1.26, 8 bits 2.40 / 2.01; a
// step that stores a ring 2.44 / 2.37. A float32 state, which waits for memory anyhow, gets slower: 1.72 / 2.11.
constexpr int UPDATE_AHEAD = 32;

// Unpack and update COUNT rows from p on; `y` gets the products C . h of each, to be summed.
// They are left in `rows` as h.
template <int COUNT>
inline void update_rows(
    const uint8_t* packed, const uint16_t* channel_scale, float decay, int p, const Scratch& s, float* rows,
    Floats* y
) {
    Floats channel[COUNT], x[COUNT], sums[COUNT] = {};
    Terms ring_x[COUNT][TERMS];
#pragma GCC unroll 2
    for (int r = 0; r < COUNT; ++r) {
        channel[r] = CODES * splat(from_bfloat16(channel_scale[p + r]));
        x[r] = splat(s.x[p + r]);
        const uint8_t* ahead = packed + (p + r + UPDATE_AHEAD) * WIDTH;
        for (int byte = 0; byte < WIDTH; byte += 64) __builtin_prefetch(ahead + byte);
#pragma GCC unroll 7
        for (int term = 0; term < TERMS; ++term) ring_x[r][term] = splat(s.ring_x[term][p + r]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < RUN_VECTORS; ++j) {
        Bytes bytes[COUNT];
#pragma GCC unroll 2
        for (int r = 0; r < COUNT; ++r) bytes[r] = load_run<Bytes>(packed + (p + r) * WIDTH, j);
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            Floats h[COUNT] = {};  // what the inputs since the last store add, then the state
#pragma GCC unroll 7
            for (int term = 0; term < TERMS; ++term) {
                const Terms B = load<Terms>(s.ring_B[term] + at);
#pragma GCC unroll 2
                for (int r = 0; r < COUNT; ++r) h[r] = add_term(h[r], B, ring_x[r][term]);
            }
            const Floats dB = load<Floats>(s.dB + at), C = load<Floats>(s.C + at);
            const Floats scale = load<Floats>(s.state_scale + at);
#pragma GCC unroll 2
            for (int r = 0; r < COUNT; ++r) {
                h[r] = fused_multiply_add(dB, x[r], h[r]);
                // A code times its scales is exact in float32, in any order.
                const Floats old = look_up(channel[r], widen(bytes[r]) >> (run * BITS)) * scale;
                h[r] = fused_multiply_add(old, splat(decay), h[r]);
                sums[r] = multiply_add(h[r], C, sums[r]);
                store(rows + r * ROW + at, h[r]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < COUNT; ++r) {
        y[r] = sums[r];
    }
}

// `count` rows from p on, LANES at most: as update_rows, and s.y becomes C . h.
inline void update_block(
    const uint8_t* packed, const uint16_t* channel_scale, float decay, int p, int count, Scratch& s,
    float* rows
) {
    Floats y[LANES];
    int i = 0;
    for (; i + 2 <= count; i += 2) {
        update_rows<2>(
            packed, channel_scale, decay, p + i, s, rows + i * ROW, y + i
        );
    }
    if (HEADDIM % 2 && i < count) {
        update_rows<1>(
            packed, channel_scale, decay, p + i, s, rows + i * ROW, y + i
        );
    }
    for (int rest = count; rest < LANES; ++rest) y[rest] = Floats{};
    store(s.y + p, sum_each(y));
}

// Rows from the one multiplied to those fetched: the hardware alone stops at the end of a page. Microseconds a head of
// 64 x 128 with an empty ring, batch 32, 24 layers, one thread of Emerald Rapids: 0.54 without, 0.46 with 32 rows to
// the L1 cache alone, 0.44 with 128 to the L2 cache alone, 0.39 with both; past both caches (prefetchnta) 0.60. On
// Zen 4, with three slots filled: 0.32 without, 0.33 with both, 0.29 with those to the L2 cache alone.
constexpr int ROWS_AHEAD = 16;       // to the L1 cache
constexpr int ROWS_FAR_AHEAD = 128;  // to the L2 cache
constexpr int READ_OFFSET = 8;  // what a code is read with, so that it is not negative

typedef uint16_t RingVector __attribute__((vector_size(2 * LANES)));

inline Floats ring_floats(RingVector stored) {
    return (Floats)(widen_halves(stored) << 16);
}

// As the ring keeps a row of `count` values times `factor`; returns what a stored one is worth.
inline float to_ring(const float* values, int count, float factor, uint16_t* stored) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        store(stored + i, narrow_to_halves(to_bfloat16(load<Floats>(values + i) * factor) >> 16));
    }
    for (; i < count; ++i) stored[i] = to_bfloat16(values[i] * factor);
    return 1.0f;
}

// steps.total = the sum of dt * A since the checkpoint.
inline void sum_since_checkpoint(const Arguments& a) {
    for (int64_t b = 0; b < a.batch; ++b) {
        const int filled = a.ring_position[b];
        float* total = a.steps.total + b * a.steps.stride;
        if (filled > 0) {
            memcpy(total, a.ring_decay + (b * SLOTS + filled - 1) * a.nheads, a.nheads * sizeof(float));
        } else {
            memset(total, 0, a.nheads * sizeof(float));
        }
    }
}

// B and C of a group, its slots of the ring, and how each of them meets C.
void read_group(const Arguments& a, int64_t b, int64_t group, int filled, Scratch& s) {
    s.group = b * a.ngroups + group;
    s.prepared[0].head = s.prepared[1].head = -1;
    a.B.read_columns(b * a.B.batch_stride + group * a.B.head_stride, s.B);
    a.C.read_columns(b * a.C.batch_stride + group * a.C.head_stride, s.C);
    Floats BC = {};
    for (int i = 0; i < ROW; i += LANES) BC = multiply_add(load<Floats>(s.B + i), load<Floats>(s.C + i), BC);
    s.BC = sum_lanes(BC);
    for (int slot = 0; slot < filled; ++slot) {
        const uint16_t* B = a.ring_B + ((b * SLOTS + slot) * a.ngroups + group) * DSTATE;
        Floats product = {};
        for (int run = 0; run < RUNS; ++run) {
            for (int j = 0; j < RUN_VECTORS; ++j) {
                const int at = (run * RUN_VECTORS + j) * LANES;
                const Floats values = ring_floats(load_run<RingVector>(B + run * RUN, j));
                put_term(s.ring_B[slot / SLOTS_OF_TERM] + at, slot, values);
                product = multiply_add(values, load<Floats>(s.C + at), product);
            }
        }
        s.ring_BC[slot] = sum_lanes(product);
    }
    if (filled < SLOTS) {
        float B[DSTATE];
        for (int run = 0; run < RUNS; ++run) {
            memcpy(B + run * RUN, s.B + run * RUN_VECTORS * LANES, RUN * sizeof(float));
        }
        s.B_scale = to_ring(B, DSTATE, 1.0f, s.B_stored);
    }
}

// a.weights = exp(S - S_s), what is left of each filled slot's input, times what its codes are worth.
inline void weigh_slots(const Arguments& a) {
    for (int64_t b = 0; b < a.batch; ++b) {
        for (int slot = 0; slot < a.ring_position[b]; ++slot) {
            const int64_t row = b * SLOTS + slot;
            for (int64_t head = 0; head < a.nheads; head += LANES) {
                const int64_t count = a.nheads - head;
                const Floats total = load<Floats>(a.steps.total + b * a.steps.stride + head);
                Floats weight = exact_exp(total - load_first<Floats>(a.ring_decay + row * a.nheads + head, count));
                store(a.weights + row * a.steps.stride + head, weight);
            }
        }
    }
}

// A slot's inputs times its weight, as recurrence.materialize rounds them to be stored.
void read_ring_x(const Arguments& a, int64_t b, int64_t head, int slot, Term* x) {
    const float weight = a.weights[(b * SLOTS + slot) * a.steps.stride + head];
    const uint16_t* stored = a.ring_x + ((b * SLOTS + slot) * a.nheads + head) * HEADDIM;
    for (int p = 0; p < HEADDIM; p += LANES) {
        const Floats weighted = ring_floats(load_first<RingVector>(stored + p, rows_from(p))) * weight;
        put_term(x + p, slot, (Floats)to_bfloat16(weighted));
    }
}

// C * state_scale of a head as integers of 16 bits, laid out for multiply_row.
void prepare_C(const Arguments& a, int64_t b, int64_t head, Scratch& s) {
    Prepared& to = s.prepared[head % 2];
    to.head = head;
    Input{a.state_scale + (b * a.nheads + head) * DSTATE, 1, 0, 0}.read_columns(0, s.state_scale);
    alignas(64) float products[ROW];
    Ints largest = {};
    for (int i = 0; i < ROW; i += LANES) {
        const Floats product = load<Floats>(s.C + i) * load<Floats>(s.state_scale + i);
        store(products + i, product);
        largest = larger(largest, (Ints)magnitude(product));
    }
    const float unit = ((Floats)max_lanes(largest))[0] / 32639.0f, floor = unit < TINY_SCALE ? TINY_SCALE : unit;
    const float inverse = 1.0f / floor;
    Words total = {};
    for (int run = 0; run < RUNS; ++run) {
        for (int j = 0; j < RUN_VECTORS; ++j) {
            // As in round_codes: the low half of the sum is the rounded value.
            const Floats product = load<Floats>(products + (run * RUN_VECTORS + j) * LANES);
            const Ints rounded = (Ints)multiply_add(product, splat(inverse), splat(12582912.0f));
            total += (Words)rounded;
            // A signed low byte, and what is left of the number: 256 * high + low.
            int8_t* digits = to.C + run * 2 * UNITS * UNIT + j * LANES;
            store(digits, narrow(rounded));
            store(digits + UNITS * UNIT, narrow((rounded + 128) >> 8));
        }
    }
    to.sum = sum_lanes((Ints)(total - VECTORS * 0x4b400000u));
    to.unit = floor * a.steps.decay[b * a.steps.stride + head];
}

// Codes of a row, each plus READ_OFFSET, times the integers of C, summed within each lane.
inline Ints multiply_row(const uint8_t* packed, const int8_t* C) {
    Words codes[UNITS][RUNS];
    Ints sum = {};
#pragma GCC unroll 4
    for (int unit = 0; unit < UNITS; ++unit) {
        const uint8_t* from = packed + unit * UNIT;
        Words bytes = unit < UNITS - 1 ? load<Words>(from) : load_bytes<RUN - UNIT * (UNITS - 1)>(from);
        __builtin_prefetch(from + ROWS_AHEAD * WIDTH);
        __builtin_prefetch(from + ROWS_FAR_AHEAD * WIDTH, 0, 2);
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run) codes[unit][run] = (bytes >> (run * BITS)) & 0x0f0f0f0fu;
    }
    // The high bytes, then what they are worth, then the low ones.
#pragma GCC unroll 2
    for (int digit = 1; digit >= 0; --digit) {
#pragma GCC unroll 4
        for (int unit = 0; unit < UNITS; ++unit) {
#pragma GCC unroll 4
            for (int run = 0; run < RUNS; ++run) {
                const int8_t* digits = C + ((2 * run + digit) * UNITS + unit) * UNIT;
                sum = add_bytes(sum, codes[unit][run], load<Words>(digits));
            }
        }
        if (digit == 1) sum <<= 8;
    }
    return sum;
}

void read_head(const Arguments& a, int64_t b, int64_t head, int filled, Scratch& s) {
    const int64_t item = b * a.nheads + head, at = b * a.steps.stride + head, repeats = a.nheads / a.ngroups;
    const float dt = a.steps.dt[at];
    if (s.prepared[head % 2].head != head) prepare_C(a, b, head, s);
    // Before the product and not after: what takes long in it, one operation waiting for another, then costs nothing.
    if ((head + 1) % repeats != 0) prepare_C(a, b, head + 1, s);
    const Prepared& C = s.prepared[head % 2];
    const uint8_t* packed = a.packed + item * HEADDIM * WIDTH;
    const uint16_t* channel_scale = a.channel_scale + item * HEADDIM;
    const uint16_t* ring_x = a.ring_x + (b * SLOTS * a.nheads + head) * HEADDIM;
    float weights[SLOTS];
    for (int slot = 0; slot < filled; ++slot) {
        weights[slot] = a.weights[(b * SLOTS + slot) * a.steps.stride + head] * s.ring_BC[slot];
    }
    for (int p = 0; p < HEADDIM; p += LANES) {
        Ints sums[LANES] = {};
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) {
            if (p + r < HEADDIM) sums[r] = multiply_row(packed + (p + r) * WIDTH, C.C);
        }
        const Floats product = __builtin_convertvector(sum_each(sums) - READ_OFFSET * C.sum, Floats);
        const Floats scale = (Floats)(widen_halves(load_first<Halves>(channel_scale + p, rows_from(p))) << 16);
        store(s.y + p, product * scale * C.unit + load<Floats>(s.x + p) * (dt * s.BC));
    }
    // By slots, with y in registers.
    Floats y[(HEADDIM + LANES - 1) / LANES];
#pragma GCC unroll 16
    for (int i = 0; i * LANES < HEADDIM; ++i) y[i] = load<Floats>(s.y + i * LANES);
    for (int slot = 0; slot < filled; ++slot) {
        const uint16_t* x = ring_x + slot * a.nheads * HEADDIM;
        for (int byte = 0; byte < HEADDIM * 2; byte += 64) __builtin_prefetch((const char*)(x + HEADDIM) + byte);
        const Floats weight = splat(weights[slot]);
#pragma GCC unroll 16
        for (int i = 0; i * LANES < HEADDIM; ++i) {
            const int p = i * LANES;
            y[i] = multiply_add(ring_floats(load_first<RingVector>(x + p, rows_from(p))), weight, y[i]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i * LANES < HEADDIM; ++i) store(s.y + i * LANES, y[i]);
    // The slot that this step fills. Other heads of the group only read the slots before it.
    const int64_t row = b * SLOTS + filled;
    const float x_scale = to_ring(s.x, HEADDIM, dt, a.ring_x + (row * a.nheads + head) * HEADDIM);
    a.ring_decay[row * a.nheads + head] = a.steps.total[at];
    (void)x_scale;
    if (head % repeats == 0) {
        memcpy(a.ring_B + (row * a.ngroups + head / repeats) * DSTATE, s.B_stored, sizeof s.B_stored);
    }
}

void store_head(const Arguments& a, int64_t b, int64_t head, Scratch& s) {
    const int64_t item = b * a.nheads + head;
    const float decay = a.steps.decay[b * a.steps.stride + head];
    for (int i = 0; i < ROW; ++i) s.dB[i] = s.B[i] * a.steps.dt[b * a.steps.stride + head];
    for (int slot = 0; slot < SLOTS; ++slot) {
        read_ring_x(a, b, head, slot, s.ring_x[slot / SLOTS_OF_TERM]);
    }
    uint8_t* packed = a.packed + item * HEADDIM * WIDTH;
    uint16_t* channel_scale = a.channel_scale + item * HEADDIM;
    uint16_t* state_scale = a.state_scale + item * DSTATE;
    Input{state_scale, 1, 0, 0}.read_columns(0, s.state_scale);
    for (int p = 0; p < HEADDIM; p += LANES) {
        update_block(packed, channel_scale, decay, p, rows_from(p), s, s.rows + p * ROW);
    }
    const bool finite = measure_scales(s.rows, state_scale, s.inverse);
    // A block is packed while the scales of the next one are found: they end in long chains of dependent operations.
    for (int p = 0; p < HEADDIM + LANES; p += LANES) {
        if (p < HEADDIM) {
            const int count = rows_from(p);
            Ints largest[LANES];
            scale_rows(s.rows + p * ROW, count, s.inverse, finite, s.rows + p * ROW, largest);
            scale_channels(largest, count, channel_scale + p, s.channel_inverse + p);
        }
        if (p >= LANES) {
            const int first = p - LANES, count = rows_from(first);
            const float* rows = s.rows + first * ROW;
            pack_rows(rows, count, s.channel_inverse + first, packed + first * WIDTH);
        }
    }
}

void update_head(const Arguments& a, int64_t item, Scratch& s) {
    const int64_t b = item / a.nheads, head = item % a.nheads, group = head / (a.nheads / a.ngroups);
    a.x.read_row(b * a.x.batch_stride + head * a.x.head_stride, s.x);
    const int filled = a.ring_position[b];
    if (s.group != b * a.ngroups + group) read_group(a, b, group, filled, s);
    if (filled < SLOTS) {
        read_head(a, b, head, filled, s);
    } else {
        store_head(a, b, head, s);
    }
    if (a.D.data) {
        const float D = a.D.at(head);
        for (int p = 0; p < HEADDIM; ++p) s.y[p] += s.x[p] * D;
    }
    if (a.x.dtype == 0) {
        memcpy((float*)a.y + item * HEADDIM, s.y, HEADDIM * sizeof(float));
    } else {
        uint16_t* y = (uint16_t*)a.y + item * HEADDIM;
        for (int p = 0; p < HEADDIM; ++p) y[p] = to_bfloat16(s.y[p]);
    }
}

}  // namespace

extern "C" void ssm_update_p64_n128_b4_dynamic_nearest_L8_bfloat16_avx512_vnni(const void* packed_arguments) {
    Call call;
    memcpy(&call, packed_arguments, sizeof call);
    const Arguments a(call);
    const int64_t items = a.batch * a.nheads;
    sum_since_checkpoint(a);
    a.steps.compute(a.step, a.batch, a.nheads);
    weigh_slots(a);
    by_threads(a.threads, [&] {
        Scratch scratch = {};
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < items; ++item) update_head(a, item, scratch);
    });
    for (int64_t b = 0; b < a.batch; ++b) {
        const bool stored = a.ring_position[b] == SLOTS;
        a.rng[2 * b + 1] += stored;
        a.ring_position[b] = stored ? 0 : a.ring_position[b] + 1;
    }
}
