// Attention of trees over pages on Hopper: one warp loads, three warpgroups attend.
//
// A program has a tile of 64 query rows (nodes times the query heads of one key-value head), a share of the committed
// tokens, and a multiprocessor for itself. The loader keeps a ring of STAGES tiles of 64 keys and values filled by tensor
// copies; no kernel just ahead writes those, so it begins before that has ended, AHEAD at a time until the queries are in
// place, for what is under way delays the reads of those. Two warpgroups take the tiles in turns. The third, in the
// program of the last share, rotates and writes the step's own nodes and attends to them under their ancestor bits. Each
// keeps an online softmax of its own, and the first takes up the others' at the end.
//
// The programs of a tile are a cluster. Each sends what it found of a row to the program that puts this row together.
//
// The launcher defines STAGES, AHEAD, PDL, GROUP (query heads a key-value head), SPLITS (shares) and PAGE (tokens).
// Shapes: as in attention_kernel.py; the head size is 128.

constexpr int ROWS = 64, TOKENS = 64, SIZE = 128;
constexpr u32 HALF_BYTES = 64 * ROW_BYTES;  // of a tile: 64 of 128 channels
constexpr u32 TILE_BYTES = 2 * HALF_BYTES;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;  // keys and values
constexpr int CACHED = 2, OWN = 2, LOADER = 3;  // warpgroups that take cached tiles; which takes the own nodes; and loads
constexpr int ATTENDING = LOADER * 128, THREADS = ATTENDING + 128;
constexpr int QUERY_STEPS = ROWS * 8 / (CACHED * 128), OWN_STEPS = ROWS * 8 / 128;

// Four threads, a quad, have two rows of what a warpgroup found: of each eight channels, a block, a thread has two.
constexpr int QUADS = ROWS / 2, BLOCKS = SIZE / 8;
constexpr int TAKEN = (QUADS + SPLITS - 1) / SPLITS;  // quads whose rows a program puts together
constexpr u32 BLOCK_BYTES = TAKEN * 64 + 16;          // eight blocks of a quad lie in different banks
constexpr u32 ENDS = BLOCKS * BLOCK_BYTES;            // then the rows' peaks and totals
constexpr u32 PART_BYTES = ENDS + TAKEN * 16;
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(STAGES % CACHED == 0, "who waits for a tile must have had the one before it in the same place");
static_assert((STAGES - 1) * STAGE_BYTES >= SPLITS * PART_BYTES, "rows are put together where the tiles were");

struct Shared {
    u32 ring, query, barriers;  // addresses

    __device__ u32 keys(int stage) const { return ring + stage * STAGE_BYTES; }
    __device__ u32 values(int stage) const { return keys(stage) + TILE_BYTES; }
    __device__ u32 own_keys() const { return query + TILE_BYTES; }
    __device__ u32 own_values() const { return own_keys() + TILE_BYTES; }
    __device__ u32 filled(int stage) const { return barriers + stage * 16; }
    __device__ u32 freed(int stage) const { return barriers + stage * 16 + 8; }
    __device__ u32 released() const { return barriers + STAGES * 16; }

    // What the other warpgroups leave for the first, and the programs of a cluster for one another.
    __device__ u32 left_by(int group) const { return group == 1 ? keys(0) : own_keys(); }
    __device__ u32 ends_left_by(int group) const { return barriers + (STAGES + 1) * 16 + (group - 1) * 128 * 16; }
    __device__ u32 part(int split) const { return keys(1) + split * PART_BYTES; }
};

struct Share {
    long row;
    int start, count, length, low, high, tile, head_kv;
    bool has_own;

    __device__ int num_tiles() const { return (max(high - low, 0) + TOKENS - 1) / TOKENS; }
};

struct Softmax {
    float peak[2], total[2];  // of a thread's two rows
    float found[SIZE / 2];    // [half of channels][eight of them][row][neighbour]
};

// Where unit `unit` (16 bytes) of a row of a half tile lies.
__device__ __forceinline__ u32 swizzled(u32 half_tile, int row, int unit) {
    return half_tile + row * ROW_BYTES + ((unit ^ (row & 7)) << 4);
}

__device__ __forceinline__ void put(u32 to, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ void put(u32 to, float4 value) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
                 : "memory");
}

__device__ __forceinline__ float4 get(u32 from) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(from)
                 : "memory");
    return value;
}

__device__ __forceinline__ float exp2_of(float x) {
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}

__device__ __forceinline__ void warpgroup_meets() {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}

// Barriers of a program's warpgroups but the loader's, of those that take cached tiles, and of a cluster's every thread.
__device__ __forceinline__ void all_attending() { asm volatile("bar.sync 1, %0;" ::"n"(ATTENDING) : "memory"); }
__device__ __forceinline__ void all_cached() { asm volatile("bar.sync 5, %0;" ::"n"(CACHED * 128) : "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The tensor cores find the queries, and for the warpgroup that attends to them the own nodes, which no other waits for.
__device__ __forceinline__ void wait_for_operands(const Share& of) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x < CACHED * 128) {
        if (of.has_own) asm volatile("bar.arrive 6, %0;" ::"n"(ATTENDING) : "memory");
        all_cached();
    } else if (of.has_own) {
        asm volatile("bar.sync 6, %0;" ::"n"(ATTENDING) : "memory");
    }
}

#include "ring_attention_nodes.cuh"
#include "ring_attention_merge.cuh"

__device__ __forceinline__ void load_tile(u32 to, u32 barrier, const TensorMap* map, int token, int head, int page) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to + half * HALF_BYTES),
            "l"(map), "r"(barrier), "r"(half * 64), "r"(token), "r"(head), "r"(page)
            : "memory");
}

// A whole warp: its lanes find the pages, the first of them asks for the tiles.
__device__ __forceinline__ void load(
    const Shared& at, const Share& of, const TensorMap* keys, const TensorMap* values, const int* table, int
    num_pages) {
    const int lane = threadIdx.x % 32;
    bool released = !PDL;
    int pages = 0;
    for (int i = 0; i < of.num_tiles(); ++i) {
        if (i % 32 == 0) pages = table[min((of.low + (i + lane) * TOKENS) / PAGE, num_pages - 1)];
        const int page = __shfl_sync(~0u, pages, i % 32);
        const int stage = i % STAGES, token = of.low + i * TOKENS;
        if (lane > 0) continue;
        if (i >= STAGES) barrier_wait(at.freed(stage), (i / STAGES - 1) & 1);
        else if (i >= AHEAD && !released) {
            while (!(released = barrier_passed(at.released(), 0)) && !barrier_passed(at.filled(i - AHEAD), 0)) {}
        }
        barrier_expect(at.filled(stage), STAGE_BYTES);
        load_tile(at.keys(stage), at.filled(stage), keys, token % PAGE, of.head_kv, page);
        load_tile(at.values(stage), at.filled(stage), values, token % PAGE, of.head_kv, page);
    }
}

// Zeros for what lies past a sequence's end, for a weight of zero times anything else might not be zero.
__device__ __forceinline__ void clear_values(u32 values, int first) {
    for (int unit = threadIdx.x % 128; unit < (TOKENS - first) * 16; unit += 128)
        put(values + unit % 2 * HALF_BYTES + (first + unit / 16) * ROW_BYTES + unit % 16 / 2 * 16, uint4{});
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_meets();
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_and_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

template <int COUNT>
__device__ __forceinline__ void keep_order(float* values) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// One step of the online softmax: `seen(row, column)` says which of the tile's tokens a thread's row (0 or 1) looks at.
template <typename Seen>
__device__ __forceinline__ void attend(Softmax& own, u32 query, u32 keys, u32 values, float scale, Seen seen) {
    float scores[TOKENS / 2];
    keep_order<TOKENS / 2>(scores);
    fence();
#pragma unroll
    for (int k = 0; k < SIZE / 16; ++k) {
        const u32 step = k / 4 * HALF_BYTES + k % 4 * 32;
        multiply_keys(scores, operand(query + step), operand(keys + step), k > 0);
    }
    commit_and_wait();
    keep_order<TOKENS / 2>(scores);
    float shrink[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float peak = own.peak[row];
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float& score = scores[j * 4 + row * 2 + side];
                score = seen(row, j * 8 + threadIdx.x % 4 * 2 + side) ? score * scale : MINUS_INFINITY;
                peak = fmaxf(peak, score);
            }
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        shrink[row] = exp2_of(own.peak[row] - peak);
        own.peak[row] = peak;
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float& score = scores[j * 4 + row * 2 + side];
                score = exp2_of(score - peak);
                total += score;
            }
        own.total[row] = own.total[row] * shrink[row] + total;
    }
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) own.found[i] *= shrink[i / 2 % 2];
    u32 weights[TOKENS / 4];
#pragma unroll
    for (int i = 0; i < TOKENS / 4; ++i) weights[i] = packed(scores[i * 2], scores[i * 2 + 1]);
    keep_order<SIZE / 2>(own.found);
    fence();
#pragma unroll
    for (int k = 0; k < TOKENS / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            multiply_values(own.found + half * (SIZE / 4), weights + k * 4, operand(values + half * HALF_BYTES + k * 16 * ROW_BYTES));
    commit_and_wait();
    keep_order<SIZE / 2>(own.found);
}

__device__ __forceinline__ void attend_own(
    Softmax& own, const Shared& at, const Share& of, int last, float scale, const long* bits_N, int num_words) {
    u64 bits[2];
    const int row = of.tile * ROWS + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        const int node = (row + lower * 8) / GROUP;
        bits[lower] = node < of.count ? bits_N[node * num_words] : 0;
    }
    const auto seen = [&](int lower, int column) { return bits[lower] >> column & 1 && column < last; };
    attend(own, at.query, at.own_keys(), at.own_values(), scale, seen);
}

__device__ __forceinline__ void attend_cached(Softmax& own, const Shared& at, const Share& of, float scale) {
    const int first = threadIdx.x / 128;  // of the third, which takes none, past the last
    for (int i = first < CACHED ? first : of.num_tiles(); i < of.num_tiles(); i += CACHED) {
        const int stage = i % STAGES, left = of.high - of.low - i * TOKENS;
        barrier_wait(at.filled(stage), (i / STAGES) & 1);
        if (left < TOKENS) clear_values(at.values(stage), left);
        attend(own, at.query, at.keys(stage), at.values(stage), scale, [&](int, int column) { return column < left; });
        if (threadIdx.x % 32 == 0) barrier_arrive(at.freed(stage));
    }
}

constexpr u32 QUERY_AT = STAGES * STAGE_BYTES;
constexpr u32 BARRIERS_AT = QUERY_AT + 3 * TILE_BYTES;  // the queries, and the own keys and values

#if SPLITS > 1
#define CLUSTER __cluster_dims__(1, 1, SPLITS)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1) ring_attention(
    const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map, const u16* qkv, const long* position_M,
    const u16* cos, const u16* sin, long angle_stride, int heads, int groups, u16* keys, u16* values,
    const int* rows_B, const int* start_B, const int* count_B, const long* length_R, const int* tables_RP, const long* bits_RN,
    u16* out, float scale, long out_node, long out_head, long page_stride, long token_stride,
    long head_stride, long table_stride, int num_kept, int num_words, int tiles) {
    extern __shared__ __align__(1024) char memory[];
    const u32 base = shared_address(memory);
    if (base % 1024) __trap();
    const Shared at{base, base + QUERY_AT, base + BARRIERS_AT};
    const int b = blockIdx.x / tiles;
    Share of;
    of.tile = blockIdx.x % tiles, of.head_kv = blockIdx.y, of.has_own = blockIdx.z == SPLITS - 1;
    of.row = rows_B[b], of.start = start_B[b], of.count = count_B[b], of.length = (int)length_R[of.row];
    const int share = ((of.length + SPLITS - 1) / SPLITS + TOKENS - 1) / TOKENS * TOKENS;
    of.low = SPLITS == 1 ? 0 : blockIdx.z * share, of.high = SPLITS == 1 ? of.length : min(of.low + share, of.length);
    const int* table = tables_RP + of.row * table_stride;
    if (threadIdx.x == ATTENDING) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(at.filled(stage), 1);
            barrier_init(at.freed(stage), 4);  // each warp of the warpgroup that took it
        }
        barrier_init(at.released(), 1);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    const bool is_needed = of.tile * ROWS < of.count * GROUP;
    if (threadIdx.x >= ATTENDING) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");  // for the others, who get 24 each
        if (is_needed && threadIdx.x < ATTENDING + 32) load(at, of, &key_map, &value_map, table, (int)table_stride);
        if (SPLITS > 1 && is_needed) cluster_arrive(), cluster_wait(), cluster_arrive(), cluster_wait();  // as the others do
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    const Nodes nodes{qkv, position_M, cos, sin, angle_stride, heads, groups};
    const int group = threadIdx.x / 128, last = min(of.count, ((of.tile + 1) * ROWS - 1) / GROUP + 1);
    const bool has_queries = group < CACHED, has_own = of.has_own && group == OWN;
    Angles query_angles[QUERY_STEPS], own_angles[OWN_STEPS];
    if (has_queries) find_angles(query_angles, nodes, of, of.tile * ROWS, GROUP, of.count);
    if (has_own) find_angles(own_angles, nodes, of, 0, 1, last);
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    if (!is_needed) return;  // its loader has not begun: none waits to be released
    if (has_queries) place_queries(at, of, nodes, query_angles);
    if (has_own) place_own(at, of, nodes, last, own_angles, {keys, values, table, page_stride, token_stride, head_stride});
    wait_for_operands(of);
#if PDL
    if (threadIdx.x == 0) barrier_arrive(at.released());
#endif
    Softmax own{{-1e30f, -1e30f}, {}, {}};
    if (has_own) {
        attend_own(own, at, of, last, scale, bits_RN + of.row * num_kept * num_words, num_words);
        warpgroup_meets();
        leave(own, at);  // where its tile was
    } else {
        attend_cached(own, at, of, scale);
    }
    if (SPLITS > 1) cluster_arrive();
    all_attending();  // every tile has been read
    if (group == 1) leave(own, at);
    if (group == 0 && of.has_own) take_up(own, at, OWN);
    if (group < CACHED) all_cached();
    if (group == 0) take_up(own, at, 1);
    if (SPLITS > 1) cluster_wait();  // the other programs' too
    if (group == 0) send(own, at, of);
    if (SPLITS > 1) cluster_arrive(), cluster_wait();
    else all_attending();
    write_found(at, of, out, out_node, out_head);
}
