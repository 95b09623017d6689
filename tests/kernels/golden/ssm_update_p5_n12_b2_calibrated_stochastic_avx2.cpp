// ssm_update_p5_n12_b2_calibrated_stochastic_avx2:
// one decode step of the SSM on a packed state.
//
//     h = exp(dt * A) * h + (dt * B) x        y = C . h + D x
//
// Tensors (b batch, h nheads, p = 5 headdim, g ngroups, n = 12 dstate; contiguous unless strides are named):
//     packed          [b, h, p, 3] uint8    read, then rewritten
//     channel_scale   [b, h, p] bfloat16      read, then rewritten
//     state_scale     [h, n]                  read; calibrated
//     rng             [b, 2] int64            key and step; step + 1 at a store
//     x               [b, h, p] strides (batch_stride, head_stride, 1)
//     B, C            [b, g, n] strides (batch_stride, head_stride of a group, 1)
//     dt              [b, h] strides (batch_stride, head_stride)
//     A, D, dt_bias   [h]; D and dt_bias may be null
//     y               [b, h, p], x's dtype    written
//
// Work: one (batch, head) at a time, shared among OpenMP threads.
// A row needs nothing from other rows: it is unpacked, updated and packed without leaving the L1 cache.
//
// A byte holds columns c, c + 3, c + 6, c + 9, lowest bits first, each code plus 2.
//
// Promises: the operations of quant.py and recurrence.py in their order, fused where theirs are: codes and scales are
// the reference's, bit for bit. Only y differs, by rounding: its sum is taken in another order, with fused
// multiply-adds.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <immintrin.h>

namespace {

constexpr int HEADDIM = 5;
constexpr int DSTATE = 12;
constexpr int LANES = 8;  // floats of one vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // twice as many lanes
typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));  // half as many lanes

inline __m128i in_low_half(Bytes bytes) {
    int64_t word;
    memcpy(&word, &bytes, sizeof word);
    return _mm_cvtsi64_si128(word);
}
inline Ints widen(Bytes bytes) { return (Ints)_mm256_cvtepu8_epi32(in_low_half(bytes)); }
inline Ints widen_signed(Bytes bytes) { return (Ints)_mm256_cvtepi8_epi32(in_low_half(bytes)); }
inline Bytes narrow(Ints lanes) {
    const __m256i low_bytes = (__m256i)(lanes & 0xff);
    const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
    const int64_t word = _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs));
    Bytes bytes;
    memcpy(&bytes, &word, sizeof bytes);
    return bytes;
}
inline Ints larger(Ints a, Ints b) { return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return multiply_add(a, b, c); }
inline Ints round_down(Floats x) { return (Ints)_mm256_cvtps_epi32(_mm256_floor_ps(x)); }
inline Longs wide_product(Longs a, uint32_t b) { return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
inline Words widen_halves(Halves halves) { return (Words)_mm256_cvtepu16_epi32((__m128i)halves); }
inline Halves narrow_to_halves(Words words) {
    const __m256i low_halves = (__m256i)(words & 0xffff), pairs = _mm256_packus_epi32(low_halves, low_halves);
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
inline Ints smaller(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
inline Floats round_product(Floats a, Floats b, float base) { return multiply_add(a, b, Floats{} + base); }
inline Ints larger_magnitude(Ints most, Floats x) { return larger(most, (Ints)x & 0x7fffffff); }
// sum + (codes << shift) in the low byte of each lane.
inline Ints add_byte(Ints sum, Ints codes, int shift) {
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
constexpr int RUNS = 4;
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
    x += ROTATED(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += ROTATED(x, 2, 3, 4, 5, 6, 7, 0, 1);
    x += ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 0);
    return x[0];
}

inline int sum_lanes(Ints x) {
    x += ROTATED(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += ROTATED(x, 2, 3, 4, 5, 6, 7, 0, 1);
    x += ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 0);
    return x[0];
}

// The largest of all lanes, in every lane.
inline Ints max_lanes(Ints x) {
    x = larger(x, ROTATED(x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = larger(x, ROTATED(x, 2, 3, 4, 5, 6, 7, 0, 1));
    x = larger(x, ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 0));
    return x;
}

// Lane i of the result is vector i reduced over its lanes; merge(a, b) reduces two lanes.
template <class Vector, class Merge>
inline Vector reduce_each(Vector* vectors, Merge merge) {
    for (int i = 0; i < 4; ++i) {
        const Vector a = vectors[i], b = vectors[i + 4];
        vectors[i] = merge(
            SHUFFLED(a, b, 0, 1, 2, 3, 12, 13, 14, 15),
            SHUFFLED(a, b, 4, 5, 6, 7, 8, 9, 10, 11)
        );
    }
    for (int i = 0; i < 2; ++i) {
        const Vector a = vectors[i], b = vectors[i + 2];
        vectors[i] = merge(
            SHUFFLED(a, b, 0, 1, 10, 11, 4, 5, 14, 15),
            SHUFFLED(a, b, 2, 3, 8, 9, 6, 7, 12, 13)
        );
    }
    for (int i = 0; i < 1; ++i) {
        const Vector a = vectors[i], b = vectors[i + 1];
        vectors[i] = merge(
            SHUFFLED(a, b, 0, 9, 2, 11, 4, 13, 6, 15),
            SHUFFLED(a, b, 1, 8, 3, 10, 5, 12, 7, 14)
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
    float *dt, *total, *decay;    // written: dt, dt * A, and e to that

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
                const Floats sum = step * load<Floats>(decay + at);
                store(total + at, sum);
                store(decay + at, exact_exp(sum));
            }
        }
    }
};

constexpr int BITS = 2;
constexpr int LARGEST = 1;  // codes are -LARGEST .. LARGEST
constexpr int OFFSET = 2;  // what packing adds to a code
constexpr int WIDTH = RUN;  // bytes of a packed row
constexpr float TINY_SCALE = 0x1p-100f;

// Scales as they are stored, in the upper half of each lane: at least TINY_SCALE, rounded to bfloat16, NaN where not
// finite.
inline Words store_scales(Floats scales) {
    const Words stored = to_bfloat16(scales < TINY_SCALE ? splat(TINY_SCALE) : scales);
    return stored >= 0x7f800000u ? Words{} + 0x7fc00000u : stored;
}

// The calibrated scales of a head and their reciprocals.
inline void read_calibrated(const Input& calibrated, int64_t head, float* state_scale, float* inverse) {
    calibrated.read_columns(head * DSTATE, state_scale);
    for (int at = 0; at < ROW; at += RUN_VECTORS * LANES) {
        for (int j = 0; j < RUN_VECTORS; ++j) {
            store_run(inverse + at, j, 1.0f / load<Floats>(state_scale + at + j * LANES));
        }
    }
}

// Rows of the block of LANES that begins at row p.
inline int rows_from(int p) { return HEADDIM % LANES == 0 || HEADDIM - p > LANES ? LANES : HEADDIM - p; }

// `count` rows of h / state_scale; `largest` gets the magnitudes of each.
inline void scale_rows(
    const float* h, int count, const float* inverse, float* rows, Ints* largest
) {
    // A store may alias anything: `inverse` itself would be read anew after each.
    Floats inverses[VECTORS];
    for (int j = 0; j < VECTORS; ++j) inverses[j] = load<Floats>(inverse + j * LANES);
    for (int i = 0; i < count; ++i) {
        Ints most = {};
#pragma GCC unroll 16
        for (int at = 0; at < ROW; at += LANES) {
            const Floats scaled = load<Floats>(h + i * ROW + at) * inverses[at / LANES];
            // Magnitudes compare as integers do, with NaN above infinity: a NaN is never lost.
            most = larger(most, (Ints)magnitude(scaled));
            store(rows + i * ROW + at, scaled);
        }
        largest[i] = most;
    }
}

constexpr int OCTANT = (DSTATE + 7) / 8;
constexpr int OCTANT_LANES = (OCTANT + LANES - 1) / LANES * LANES;
constexpr int NOISE = 8 * OCTANT + 2 * LANES;  // with room for a last vector that runs over

struct Philox {
    Longs c0, c1, c2, c3;

    // The upper halves of the counters hold garbage from here on: products read lower halves, and so does the result.
    void round(uint32_t k0, uint32_t k1) {
        const Longs product0 = wide_product(c0, 0xD2511F53u), product1 = wide_product(c2, 0xCD9E8D57u);
        c0 = (product1 >> 32) ^ c1 ^ (uint64_t)k0;
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ (uint64_t)k1;
        c3 = product0;
    }
};

inline Words interleave(Longs even, Longs odd) { return (Words)((even & 0xffffffffu) | (odd << 32)); }

// The Philox words of COUNT rows from `row` (counted over heads and channels) on, before they turn with the step.
template <int COUNT>
inline void draw_words(uint64_t key, uint64_t step, uint64_t row, uint32_t (*words)[4][OCTANT_LANES]) {
    constexpr Longs EVEN = {0, 2, 4, 6};
    const Longs start_low = Longs{} + (step >> 16 & 0xffffffffu), start_high = Longs{} + (step >> 48);
    for (int j = 0; j < OCTANT; j += LANES) {
        Philox even[COUNT], odd[COUNT];
        for (int r = 0; r < COUNT; ++r) {
            const Longs counter = EVEN + ((row + r) * OCTANT + j);
            even[r] = {counter, Longs{}, start_low, start_high};
            odd[r] = {counter + 1, Longs{}, start_low, start_high};
        }
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            for (int r = 0; r < COUNT; ++r) {
                even[r].round(k0, k1);
                odd[r].round(k0, k1);
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int r = 0; r < COUNT; ++r) {
            store(words[r][0] + j, interleave(even[r].c0, odd[r].c0));
            store(words[r][1] + j, interleave(even[r].c1, odd[r].c1));
            store(words[r][2] + j, interleave(even[r].c2, odd[r].c2));
            store(words[r][3] + j, interleave(even[r].c3, odd[r].c3));
        }
    }
}

// quant.uniform_noise of a row from its words, in column order.
inline void turn_words(const uint32_t (*words)[OCTANT_LANES], uint64_t step, float* noise) {
    const Shorts turn = Shorts{} + (int16_t)(step * 40503u);
    // In this order the last vector of a part may run over into the next part, which is written after it.
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
        for (int j = 0; j < OCTANT; j += LANES) {
            // (half + 0.5) / 2^16 as the fraction of a number from 1 to 2.
            const Words turned = (Words)(load<Shorts>(words[part / 2] + j) + turn);
            const Words fraction = (part % 2 ? turned >> 9 : turned << 7) & 0x7fff80u;
            store(noise + part * OCTANT + j, (Floats)(fraction | 0x3f800040u) - 1.0f);
        }
    }
}

// quant.uniform_noise of `count` rows from `row` on. Two at a time hide each other's latencies.
inline void fill_noise(uint64_t key, uint64_t step, uint64_t row, int count, float (*noise)[NOISE]) {
    alignas(64) uint32_t words[2][4][OCTANT_LANES];
    for (int i = 0; i < count; i += 2) {
        if (i + 1 < count) {
            draw_words<2>(key, step, row + i, words);
            turn_words(words[1], step, noise[i + 1]);
        } else {
            draw_words<1>(key, step, row + i, words);
        }
        turn_words(words[0], step, noise[i]);
    }
}

// Codes: floor(scaled + noise), clamped since noise can lift the largest code.
inline Ints round_codes(Floats scaled, Floats noise) {
    return smaller(larger(round_down(scaled + noise), Ints{} - LARGEST), Ints{} + LARGEST);
}

// Pack a row of scaled values.
inline void pack_row(const float* row, float inverse, const float* noise, uint8_t* packed) {
#pragma GCC unroll 16
    for (int j = 0; j < RUN_VECTORS; ++j) {
        Ints bytes = Ints{} + 170;  // OFFSET of each code
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            const Floats scaled = load<Floats>(row + at);
            const Ints codes = round_codes(scaled * inverse, load<Floats>(noise + run * RUN + j * LANES));
            bytes = add_byte(bytes, codes, run * BITS);
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
    const float* rows, int count, const float* inverses, const float (*noise)[NOISE],
    uint8_t* packed
) {
    for (int i = 0; i < count; ++i) {
        if (inverses[i] == inverses[i]) {
            pack_row(rows + i * ROW, inverses[i], noise[i], packed + i * WIDTH);
        } else {
            memset(packed + i * WIDTH, 170, WIDTH);  // what is not finite shows in the scale
        }
    }
}

// Codes of one run.
inline Floats unpack(Bytes bytes, int run) {
    const Ints code = (widen(bytes) >> (run * BITS)) & 3;
    return __builtin_convertvector(code - OFFSET, Floats);
}

// As launch.py packs it.
struct Call {
    uint8_t* packed;
    uint16_t* channel_scale;
    Input state_scale;
    int64_t* rng;
    Input x, B, C, D;
    StepInputs step;
    void* y;
    int64_t batch, nheads, ngroups, threads;
};

struct Arguments : Call {
    Steps steps;

    explicit Arguments(const Call& call) : Call(call), steps(call.batch, call.nheads) {}
};

struct alignas(64) Scratch {
    float B[ROW], dB[ROW], C[ROW], x[HEADDIM + LANES], y[HEADDIM + LANES];
    float state_scale[ROW], inverse[ROW];  // inverse: reciprocals of the state scales
    float noise[LANES][NOISE];
    float rows[2 * LANES * ROW];
    float channel_inverse[HEADDIM + LANES];
};

// Rows from the one updated to the one fetched; 8 to 128 do not differ. Microseconds a head of 64 x 128 without / with,
// batch 8, 24 layers, one thread of Zen 4: 4 bits dynamic 1.78 / 1.66, calibrated 1.32 / 1.26, 8 bits 2.40 / 2.01; a
// step that stores a ring 2.44 / 2.37. A float32 state, which waits for memory anyhow, gets slower: 1.72 / 2.11.
constexpr int UPDATE_AHEAD = 32;

// Unpack and update COUNT rows from p on; `y` gets the products C . h of each, to be summed.
// They are left in `rows` as h / state_scale, and their magnitudes in `largest`.
template <int COUNT>
inline void update_rows(
    const uint8_t* packed, const uint16_t* channel_scale, float decay, int p, const Scratch& s, float* rows,
    Floats* y, Ints* largest
) {
    Floats channel[COUNT], x[COUNT], sums[COUNT] = {};
    Ints most[COUNT] = {};
#pragma GCC unroll 2
    for (int r = 0; r < COUNT; ++r) {
        channel[r] = splat(from_bfloat16(channel_scale[p + r]));
        x[r] = splat(s.x[p + r]);
        const uint8_t* ahead = packed + (p + r + UPDATE_AHEAD) * WIDTH;
        for (int byte = 0; byte < WIDTH; byte += 64) __builtin_prefetch(ahead + byte);
    }
#pragma GCC unroll 16
    for (int j = 0; j < RUN_VECTORS; ++j) {
        Bytes bytes[COUNT];
#pragma GCC unroll 2
        for (int r = 0; r < COUNT; ++r) bytes[r] = load_run<Bytes>(packed + (p + r) * WIDTH, j);
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run) {
            const int at = (run * RUN_VECTORS + j) * LANES;
            Floats h[COUNT];  // what the inputs since the last store add, then the state
            const Floats dB = load<Floats>(s.dB + at), C = load<Floats>(s.C + at);
            const Floats scale = load<Floats>(s.state_scale + at);
#pragma GCC unroll 2
            for (int r = 0; r < COUNT; ++r) {
                h[r] = dB * x[r];
                // A code times its scales is exact in float32, in any order.
                const Floats old = unpack(bytes[r], run) * scale * channel[r];
                h[r] = fused_multiply_add(old, splat(decay), h[r]);
                sums[r] = multiply_add(h[r], C, sums[r]);
                h[r] *= load<Floats>(s.inverse + at);
                most[r] = larger(most[r], (Ints)magnitude(h[r]));
                store(rows + r * ROW + at, h[r]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < COUNT; ++r) {
        y[r] = sums[r];
        largest[r] = most[r];
    }
}

// `count` rows from p on, LANES at most: as update_rows, and s.y becomes C . h.
inline void update_block(
    const uint8_t* packed, const uint16_t* channel_scale, float decay, int p, int count, Scratch& s,
    float* rows, Ints* largest
) {
    Floats y[LANES];
    int i = 0;
    for (; i + 2 <= count; i += 2) {
        update_rows<2>(
            packed, channel_scale, decay, p + i, s, rows + i * ROW, y + i, largest + i
        );
    }
    if (HEADDIM % 2 && i < count) {
        update_rows<1>(
            packed, channel_scale, decay, p + i, s, rows + i * ROW, y + i, largest + i
        );
    }
    for (int rest = count; rest < LANES; ++rest) y[rest] = Floats{};
    store(s.y + p, sum_each(y));
}

void store_head(const Arguments& a, int64_t b, int64_t head, Scratch& s) {
    const int64_t item = b * a.nheads + head;
    const float decay = a.steps.decay[b * a.steps.stride + head];
    for (int i = 0; i < ROW; ++i) s.dB[i] = s.B[i] * a.steps.dt[b * a.steps.stride + head];
    uint8_t* packed = a.packed + item * HEADDIM * WIDTH;
    uint16_t* channel_scale = a.channel_scale + item * HEADDIM;
    read_calibrated(a.state_scale, head, s.state_scale, s.inverse);
    // A block is packed while the scales of the next one are found: they end in long chains of dependent operations.
    for (int p = 0; p < HEADDIM + LANES; p += LANES) {
        if (p < HEADDIM) {
            const int count = rows_from(p);
            Ints largest[LANES];
            update_block(packed, channel_scale, decay, p, count, s, s.rows + p % (2 * LANES) * ROW, largest);
            scale_channels(largest, count, channel_scale + p, s.channel_inverse + p);
        }
        if (p >= LANES) {
            const int first = p - LANES, count = rows_from(first);
            const float* rows = s.rows + first % (2 * LANES) * ROW;
            fill_noise(a.rng[2 * b], a.rng[2 * b + 1], head * HEADDIM + first, count, s.noise);
            pack_rows(rows, count, s.channel_inverse + first, s.noise, packed + first * WIDTH);
        }
    }
}

void update_head(const Arguments& a, int64_t item, Scratch& s) {
    const int64_t b = item / a.nheads, head = item % a.nheads, group = head / (a.nheads / a.ngroups);
    a.x.read_row(b * a.x.batch_stride + head * a.x.head_stride, s.x);
    a.B.read_columns(b * a.B.batch_stride + group * a.B.head_stride, s.B);
    a.C.read_columns(b * a.C.batch_stride + group * a.C.head_stride, s.C);
    store_head(a, b, head, s);
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

extern "C" void ssm_update_p5_n12_b2_calibrated_stochastic_avx2(const void* packed_arguments) {
    Call call;
    memcpy(&call, packed_arguments, sizeof call);
    const Arguments a(call);
    const int64_t items = a.batch * a.nheads;
    a.steps.compute(a.step, a.batch, a.nheads);
    by_threads(a.threads, [&] {
        Scratch scratch = {};
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < items; ++item) update_head(a, item, scratch);
    });
    for (int64_t b = 0; b < a.batch; ++b) a.rng[2 * b + 1] += 1;
}
