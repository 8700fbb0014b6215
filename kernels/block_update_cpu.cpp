// Optimizer steps whose numbers differ from stage block to stage block, in one pass over the memory of a CPU.
//
// The formulas are those of block_update.py and block_norms.py; block_update_cpu.py says what the tables hold.
// Sums are taken chunk by chunk, chunks are cut by shapes alone and added up in order: no result depends on the
// number of threads, nor, without contraction and with lanes written out, on the processor's vectors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_MSC_VER)
#define INLINE __forceinline
#define INLINED
#define RESTRICT __restrict
#define EXPORT extern "C" __declspec(dllexport)
#else
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // behind a lambda's parameters
#define RESTRICT __restrict__
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// GCC makes the clones and glibc chooses among them; other libraries know no such symbols
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif

namespace {

constexpr int64_t INTERFACE = 1;    // raised when a table or an argument changes
constexpr int64_t POINTERS = 5;     // parameter, gradient, moments
constexpr int64_t SCALARS = 5;      // of a block: rate, decay, and three that depend on the method
constexpr int64_t STRIP = 1024;     // elements updated before they are read again, from the first cache
constexpr int64_t LANES = 32;       // elements whose squares are added up side by side
constexpr int64_t GRAIN = 1 << 15;  // elements worth a thread

struct Tensor {
    int64_t columns, band, block;  // B, the first of its bands, the first of its blocks
};

struct Band {
    int64_t stop, run, last;  // rows up to this element fall into these runs of columns
    int64_t ids, low, high;   // short runs: where the block of each column stands, and the range of these; else -1
};

struct Run {
    int64_t stop, block;  // columns up to this one belong to this block of the tensor
};

struct Chunk {
    int64_t tensor, start, stop, sums, before;  // before: elements of all earlier chunks
};

struct Table {
    const int64_t *pointers;  // (T, POINTERS)
    const Tensor *tensors;    // (T + 1,): the last one holds the ends
    const Band *bands;
    const Run *runs;
    const int32_t *ids;  // of B columns and, the row repeated, STRIP more
    const Chunk *chunks;
    int64_t chunk_count, threads;
    const double *scalars;  // (blocks, SCALARS), then those of all blocks
    const double *ratio;    // (blocks,)
    double *sums, *eta;     // a row of each chunk's blocks
};

struct BFloat16 {
    uint16_t bits;
};

template <class S> struct Arithmetic {
    using type = S;
};
template <> struct Arithmetic<BFloat16> {
    using type = float;
};
template <class S> using Acc = typename Arithmetic<S>::type;

INLINE float load(float x) { return x; }
INLINE double load(double x) { return x; }
INLINE float load(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void store(float &to, float x) { to = x; }
INLINE void store(double &to, double x) { to = x; }
INLINE void store(BFloat16 &to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t(x == x ? even : 0x7fc0);
}

// Elements of a stretch that are updated; all of them, or those of one block among others.
struct All {
    INLINE bool operator()(int64_t) const { return true; }
};

struct Only {
    const int32_t *ids;
    int32_t block;
    INLINE bool operator()(int64_t i) const { return ids[i] == block; }
};

// Eight sums side by side; compilers keep an array of eight in memory and reload it for every addition.
template <class A> struct Eight {
#ifdef __GNUC__
    typedef A Lanes __attribute__((vector_size(8 * sizeof(A))));
    Lanes lanes = {};
    INLINE void add_squares(const A *x) {
        Lanes values;
        std::memcpy(&values, x, sizeof values);
        lanes += values * values;
    }
    INLINE void operator+=(const Eight &other) { lanes += other.lanes; }
#else
    A lanes[8] = {};
    INLINE void add_squares(const A *x) {
        for (int j = 0; j < 8; ++j) lanes[j] += x[j] * x[j];
    }
    INLINE void operator+=(const Eight &other) {
        for (int j = 0; j < 8; ++j) lanes[j] += other.lanes[j];
    }
#endif
    INLINE double total() const {
        return double((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
               double((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
};

// The sum of squares of a stretch: LANES elements a time, then what is left.
template <class A> struct Squares {
    Eight<A> a, b, c, d;  // enough to hide an addition's latency
    INLINE void add(const A *x) {
        a.add_squares(x);
        b.add_squares(x + 8);
        c.add_squares(x + 16);
        d.add_squares(x + 24);
    }
    INLINE double total(const A *x, int64_t n) {
        a += b, c += d, a += c;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) a.add_squares(x + i);
        double total = a.total();
        for (; i < n; ++i) total += double(x[i]) * double(x[i]);
        return total;
    }
};

template <class A> INLINE double squares(const A *x, int64_t n) {
    Squares<A> sum;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum.add(x + i);
    return sum.total(x + i, n - i);
}

// The values that a strip's block now has, where they stand as numbers side by side, and else copied.
template <class S, class Mine> INLINE double squares_of(const S *x, int64_t n, Mine mine) {
    Acc<S> seen[STRIP];
    for (int64_t i = 0; i < n; ++i) seen[i] = mine(i) ? load(x[i]) : Acc<S>(0);
    return squares(seen, n);
}
INLINE double squares_of(const float *x, int64_t n, All) { return squares(x, n); }
INLINE double squares_of(const double *x, int64_t n, All) { return squares(x, n); }

// Updates a stretch of x by `update(first, elements)` and gives the sum of squares of what its block now has there.
// Numbers side by side are added up right behind the step: as one pass over the memory, not a second one.
template <class S, class Mine, class Update>
INLINE double squares_behind(const S *x, int64_t n, Mine mine, const Update &update) {
    update(0, n);
    return squares_of(x, n, mine);
}
template <class A, class Update> INLINE double squares_close_behind(const A *x, int64_t n, const Update &update) {
    Squares<A> sum;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        update(i, LANES);
        sum.add(x + i);
    }
    update(i, n - i);
    return sum.total(x + i, n - i);
}
template <class Update> INLINE double squares_behind(const float *x, int64_t n, All, const Update &update) {
    return squares_close_behind(x, n, update);
}
template <class Update> INLINE double squares_behind(const double *x, int64_t n, All, const Update &update) {
    return squares_close_behind(x, n, update);
}

// Steps every stretch of a chunk that lies in one block, in strips; short runs together, block by block.
template <class Step> INLINE void for_runs(const Table &t, const Chunk &chunk, Step &step) {
    const Tensor *tensor = t.tensors + chunk.tensor;
    const Band *band = std::upper_bound(t.bands + tensor->band, t.bands + tensor[1].band, chunk.start,
                                        [](int64_t at, const Band &one) { return at < one.stop; });
    for (int64_t at = chunk.start; at < chunk.stop; ++band) {
        const int64_t stop = std::min(chunk.stop, band->stop);
        const Run *first = t.runs + band->run, *last = t.runs + band->last, *run = first;
        const bool whole = last - first == 1;  // rows of one block are one stretch
        int64_t column = at % tensor->columns;
        if (band->ids >= 0) {
            for (int64_t n; at < stop; at += n, column = at % tensor->columns) {
                n = std::min(STRIP, stop - at);
                for (int64_t block = band->low; block <= band->high; ++block)
                    step(at, n, block, Only{t.ids + band->ids + column, int32_t(block)});
            }
            continue;
        }
        if (!whole)
            run = std::upper_bound(first, last, column, [](int64_t at, const Run &one) { return at < one.stop; });
        while (at < stop) {
            const int64_t end = whole ? stop : std::min(at + run->stop - column, stop);
            column += end - at;
            for (int64_t n; at < end; at += n) {
                n = std::min(STRIP, end - at);
                step(at, n, run->block, All{});
            }
            if (++run == last) run = first, column = 0;
        }
    }
}

// Without decay an infinite weight stays what it is.
template <class A> INLINE A pull(A decay, A value) { return decay != 0 ? decay * value : A(0); }

template <class S, bool MOMENTUM, bool NESTEROV> struct Sgd {
    using A = Acc<S>;
    const int64_t *pointers;
    const double *scalars, *ratio;
    double *sums;
    A sign, momentum;

    template <class Mine> INLINE void operator()(int64_t at, int64_t n, int64_t block, Mine mine) {
        const double *of = scalars + SCALARS * block;
        const A rate = A(of[0] * ratio[block]), decay = A(of[1]), gain = A(of[2]);
        S *p = reinterpret_cast<S *>(pointers[0]) + at;
        const S *g = reinterpret_cast<const S *>(pointers[1]) + at;
        S *m = reinterpret_cast<S *>(pointers[2]) + at;
        auto update = [=](int64_t first, int64_t n) INLINED {
            stretch(p + first, g + first, m + first, n, rate, decay, gain, [=](int64_t i) { return mine(first + i); });
        };
        if (sums) sums[block] += squares_behind(p, n, mine, update);
        else update(0, n);
    }

    template <class Mine>
    INLINE void stretch(S *RESTRICT p, const S *RESTRICT g, S *RESTRICT m, int64_t n, A rate, A decay, A gain,
                        Mine mine) const {
        for (int64_t i = 0; i < n; ++i) {
            A value = load(p[i]), step = sign * load(g[i]) + pull(decay, value);
            if (MOMENTUM) {
                A before = load(m[i]), held = before * momentum + gain * step;
                store(m[i], mine(i) ? held : before);
                step = NESTEROV ? step + momentum * held : held;
            }
            store(p[i], mine(i) ? value - rate * step : value);
        }
    }
};

template <class S, bool AMSGRAD> struct Adam {
    using A = Acc<S>;
    const int64_t *pointers;
    const double *scalars, *ratio;
    double *sums;
    const double *common;
    A sign, rise1, beta2, rise2;
    bool decoupled;

    template <class Mine> INLINE void operator()(int64_t at, int64_t n, int64_t block, Mine mine) {
        const double *of = scalars + SCALARS * block, scale = of[0] * ratio[block];
        // rate / correction m / (sqrt(v) / root + eps), with one division an element
        const A rate = A(scale / of[2] * of[3]), least = A(common[3] * of[3]);
        const A decay = A(decoupled ? 0 : of[1]), keep = A(decoupled ? 1 - scale * of[1] : 1);
        S *p = reinterpret_cast<S *>(pointers[0]) + at;
        const S *g = reinterpret_cast<const S *>(pointers[1]) + at;
        S *m = reinterpret_cast<S *>(pointers[2]) + at, *v = reinterpret_cast<S *>(pointers[3]) + at;
        S *w = reinterpret_cast<S *>(pointers[4]) + at;
        auto update = [=](int64_t first, int64_t n) INLINED {
            stretch(p + first, g + first, m + first, v + first, AMSGRAD ? w + first : w, n, rate, least, decay, keep,
                    [=](int64_t i) { return mine(first + i); });
        };
        if (sums) sums[block] += squares_behind(p, n, mine, update);
        else update(0, n);
    }

    template <class Mine>
    INLINE void stretch(S *RESTRICT p, const S *RESTRICT g, S *RESTRICT m, S *RESTRICT v, S *RESTRICT w, int64_t n,
                        A rate, A least, A decay, A keep, Mine mine) const {
        for (int64_t i = 0; i < n; ++i) {
            A value = load(p[i]), gradient = sign * load(g[i]) + pull(decay, value);
            A first = load(m[i]), second = load(v[i]);
            A mean = first + rise1 * (gradient - first);
            A square = second * beta2 + rise2 * gradient * gradient;
            store(m[i], mine(i) ? mean : first);
            store(v[i], mine(i) ? square : second);
            if (AMSGRAD) {
                A most = load(w[i]);
                square = most > square ? most : square;
                store(w[i], mine(i) ? square : most);
            }
            A stepped = keep * value - rate * (mean / (std::sqrt(square) + least));
            store(p[i], mine(i) ? stepped : value);
        }
    }
};

template <class S> struct AvaGrad {
    using A = Acc<S>;
    const int64_t *pointers;
    const double *scalars, *ratio;
    double *sums, *eta_sums;
    const double *common;
    A sign, rise1, beta2, rise2;

    template <class Mine> INLINE void operator()(int64_t at, int64_t n, int64_t block, Mine mine) {
        const double *of = scalars + SCALARS * block;
        const A rate = A(of[0] * ratio[block] / of[2] * of[3]), decay = A(of[1]), least = A(common[3] * of[3]);
        const A next = A(of[4]), next_least = A(common[3] * of[4]);
        S *RESTRICT p = reinterpret_cast<S *>(pointers[0]) + at;
        const S *RESTRICT g = reinterpret_cast<const S *>(pointers[1]) + at;
        S *RESTRICT m = reinterpret_cast<S *>(pointers[2]) + at;
        S *RESTRICT v = reinterpret_cast<S *>(pointers[3]) + at;
        A etas[STRIP];
        for (int64_t i = 0; i < n; ++i) {
            A value = load(p[i]), gradient = sign * load(g[i]) + pull(decay, value);
            A first = load(m[i]), second = load(v[i]);
            A mean = first + rise1 * (gradient - first);
            A stepped = value - rate * (mean / (std::sqrt(second) + least));
            store(m[i], mine(i) ? mean : first);
            store(v[i], mine(i) ? second * beta2 + rise2 * gradient * gradient : second);
            store(p[i], mine(i) ? stepped : value);
            etas[i] = mine(i) ? next / (std::sqrt(load(v[i])) + next_least) : A(0);
        }
        eta_sums[block] += squares(etas, n);
        if (sums) sums[block] += squares_of(p, n, mine);
    }
};

// The sums that a step would have left, of the second moments as they are.
template <class S> struct Etas {
    using A = Acc<S>;
    const int64_t *pointers;
    const double *scalars, *common;
    double *eta_sums;

    template <class Mine> INLINE void operator()(int64_t at, int64_t n, int64_t block, Mine mine) {
        const double *of = scalars + SCALARS * block;
        const A root = A(of[3]), least = A(common[3] * of[3]);
        const S *v = reinterpret_cast<const S *>(pointers[3]) + at;
        A etas[STRIP];
        for (int64_t i = 0; i < n; ++i) etas[i] = mine(i) ? root / (std::sqrt(load(v[i])) + least) : A(0);
        eta_sums[block] += squares(etas, n);
    }
};

template <class S> struct Norms {
    const int64_t *pointers;
    double *sums;

    template <class Mine> INLINE void operator()(int64_t at, int64_t n, int64_t block, Mine mine) {
        sums[block] += squares_of(reinterpret_cast<const S *>(pointers[0]) + at, n, mine);
    }
};

// What one chunk of one tensor is updated with.
struct Place {
    const Table &t;
    const Chunk &chunk;
    const int64_t *pointers;
    const double *scalars, *ratio, *common;
    double *sums, *eta;

    Place(const Table &t, const Chunk &chunk, bool norms) : t(t), chunk(chunk) {
        const Tensor *tensor = t.tensors + chunk.tensor;
        const int64_t blocks = tensor[1].block - tensor->block;
        const int64_t total = t.tensors[t.chunks[t.chunk_count - 1].tensor + 1].block;
        pointers = t.pointers + POINTERS * chunk.tensor;
        scalars = t.scalars + SCALARS * tensor->block;
        common = t.scalars + SCALARS * total;
        ratio = t.ratio + tensor->block;
        sums = norms ? t.sums + chunk.sums : nullptr;
        eta = t.eta ? t.eta + chunk.sums : nullptr;
        if (sums) std::fill_n(sums, blocks, 0.0);
        if (eta) std::fill_n(eta, blocks, 0.0);
    }
};

struct Options {
    bool momentum, nesterov, amsgrad, decoupled, maximize, norms;
};

template <class S, bool MOMENTUM, bool NESTEROV> INLINE void sgd_as(const Place &at, const Options &o) {
    Sgd<S, MOMENTUM, NESTEROV> each{at.pointers, at.scalars, at.ratio, at.sums, Acc<S>(o.maximize ? -1 : 1),
                                    Acc<S>(at.common[0])};
    for_runs(at.t, at.chunk, each);
}

template <class S> INLINE void sgd_of(const Place &at, const Options &o) {
    if (!o.momentum) sgd_as<S, false, false>(at, o);
    else if (o.nesterov) sgd_as<S, true, true>(at, o);
    else sgd_as<S, true, false>(at, o);
}

template <class S, bool AMSGRAD> INLINE void adam_as(const Place &at, const Options &o) {
    using A = Acc<S>;
    Adam<S, AMSGRAD> each{at.pointers,      at.scalars,      at.ratio,        at.sums, at.common, A(o.maximize ? -1 : 1),
                          A(at.common[0]), A(at.common[1]), A(at.common[2]), o.decoupled};
    for_runs(at.t, at.chunk, each);
}

template <class S> INLINE void adam_of(const Place &at, const Options &o) {
    if (o.amsgrad) adam_as<S, true>(at, o);
    else adam_as<S, false>(at, o);
}

template <class S> INLINE void avagrad_of(const Place &at, const Options &o) {
    using A = Acc<S>;
    AvaGrad<S> each{at.pointers, at.scalars,       at.ratio,         at.sums,         at.eta,
                    at.common,   A(o.maximize ? -1 : 1), A(at.common[0]), A(at.common[1]), A(at.common[2])};
    for_runs(at.t, at.chunk, each);
}

template <class S> INLINE void etas_of(const Place &at, const Options &) {
    Etas<S> each{at.pointers, at.scalars, at.common, at.eta};
    for_runs(at.t, at.chunk, each);
}

template <class S> INLINE void norms_of(const Place &at, const Options &) {
    Norms<S> each{at.pointers, at.sums};
    for_runs(at.t, at.chunk, each);
}

enum Dtype : int32_t { FLOAT32, FLOAT64, BFLOAT16 };

// each entry is compiled as a whole for every kind of processor: what it calls is inlined
#define CHUNK(method)                                                                     \
    CLONES void method##_chunk(const Place &at, const Options &o, int32_t dtype) {        \
        if (dtype == FLOAT32) method##_of<float>(at, o);                                  \
        else if (dtype == FLOAT64) method##_of<double>(at, o);                            \
        else method##_of<BFloat16>(at, o);                                                \
    }

CHUNK(sgd)
CHUNK(adam)
CHUNK(avagrad)
CHUNK(etas)
CHUNK(norms)

using ChunkStep = void (*)(const Place &, const Options &, int32_t);

// Each thread takes neighbouring chunks of about the same number of elements, the same ones in every step.
void spread(const Table &t, ChunkStep step, const Options &o, int32_t dtype) {
    if (!t.chunk_count) return;
    const Chunk *begin = t.chunks, *end = begin + t.chunk_count;
    const int64_t elements = end[-1].before + end[-1].stop - end[-1].start;
    const int threads = int(std::max<int64_t>(1, std::min(t.threads, elements / GRAIN)));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        int64_t id = 0, of = 1;
#ifdef _OPENMP
        id = omp_get_thread_num(), of = omp_get_num_threads();
#endif
        auto from = [&](int64_t part) {
            return std::lower_bound(begin, end, (elements * part + of - 1) / of,
                                    [](const Chunk &one, int64_t at) { return one.before < at; });
        };
        for (const Chunk *chunk = from(id), *last = from(id + 1); chunk < last; ++chunk)
            step(Place(t, *chunk, o.norms), o, dtype);
    }
}

}  // namespace

EXPORT int64_t block_update_interface() { return INTERFACE; }

EXPORT void block_update_sgd(const Table *t, int32_t dtype, bool momentum, bool nesterov, bool maximize, bool norms) {
    spread(*t, sgd_chunk, {momentum, nesterov, false, false, maximize, norms}, dtype);
}

EXPORT void block_update_adam(const Table *t, int32_t dtype, bool amsgrad, bool decoupled, bool maximize, bool norms) {
    spread(*t, adam_chunk, {false, false, amsgrad, decoupled, maximize, norms}, dtype);
}

EXPORT void block_update_avagrad(const Table *t, int32_t dtype, bool maximize, bool norms) {
    spread(*t, avagrad_chunk, {false, false, false, false, maximize, norms}, dtype);
}

EXPORT void block_update_etas(const Table *t, int32_t dtype) {
    spread(*t, etas_chunk, {false, false, false, false, false, false}, dtype);
}

EXPORT void block_update_norms(const Table *t, int32_t dtype) {
    spread(*t, norms_chunk, {false, false, false, false, false, true}, dtype);
}

// Adds the rows of `partial` up into sums (blocks,); with ratio, what `_finish_kernel` of block_norms.py does.
EXPORT void block_update_finish(const Table *t, const double *partial, const double *counts, double *sums,
                                double *ratio, double *waiting, const int32_t *adapt) {
    const Chunk *chunk = t->chunks, *end = chunk + t->chunk_count;
    while (chunk < end) {
        const int64_t number = chunk->tensor, base = t->tensors[number].block;
        const int64_t blocks = t->tensors[number + 1].block - base;
        std::fill_n(sums + base, blocks, 0.0);
        for (; chunk < end && chunk->tensor == number; ++chunk)
            for (int64_t k = 0; k < blocks; ++k) sums[base + k] += partial[chunk->sums + k];
        if (!ratio) continue;
        const double seed = sums[base], seed_count = counts[base];
        for (int64_t k = base; k < base + blocks; ++k) {
            if (waiting[k] == 2) waiting[k] = sums[k] == 0;
            if (sums[k] * seed_count >= seed * counts[k]) waiting[k] = 0;
            const bool rule = adapt[number] && k > base && waiting[k] == 0 && seed > 0;
            ratio[k] = rule ? std::sqrt(sums[k] / seed) : 1.0;
        }
    }
}

#ifdef _MSC_VER
// setuptools asks the linker for it; the library is loaded by ctypes, never imported
EXPORT void *PyInit__block_update_cpu() { return nullptr; }
#endif
