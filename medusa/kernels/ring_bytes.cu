// A product of up to 128 rows with a large frozen matrix of one byte a value on Hopper: two warps load, the others widen the
// matrix into registers and multiply.
//
// The tensor cores take one operand from registers: 64 rows of the matrix a warpgroup, 16 a warp, which its threads read from
// the ring a pair of columns at a time and widen exactly. X they read from the ring, its rows being the columns of the result.
// Widening waits for one thing after the other, so there should be many warps: SETS of warpgroups share the columns of a tile.
// Their sums, float32 in registers, meet in shared memory at the end, where each row's scale is applied to them.
//
// out[m, n] = scale[n] * X[m, :] . W[n, :] (+ bias), or with HALVES = 2, where W is gate above up, silu(gate) * up; or with
// SPLITS > 1 float32 sums of a share of the columns.
//
// The launcher defines WARPGROUPS, SETS, ROWS_X (rows of X in a tile), FEATURES (rows of W that a program takes, of each half),
// HALVES, SPLITS, STAGES, AHEAD, SUM_STRIDE (between rows of the sums that meet), PDL, IS_E4M3, HALF_TYPE, IS_BFLOAT, OUT_TYPE
// and `multiply`, the tensor cores' instruction for 64 rows of W in registers and all rows of X.

constexpr int COLUMNS = 128;  // of a tile
constexpr int TILE_ROWS = HALVES * FEATURES;
#include "ring.cuh"

constexpr int OWN_BLOCKS = BLOCKS / SETS;  // that a set has of a tile
constexpr int STEPS = 2;                   // of 16 columns, multiplied while the next are widened
constexpr int PARTS = 4 / STEPS;           // of a block
constexpr int SUMS = ROWS_X / 2;           // that a thread has of 64 rows of W
constexpr int THREADS = WARPGROUPS * 128;  // that multiply
static_assert(BLOCKS % SETS == 0 && PARTS == 2, "a set has whole blocks, whose parts take turns");
static_assert(TILE_ROWS <= 64 * WARPGROUPS / SETS, "a warp has 16 rows");
static_assert(SETS * ROWS_X * SUM_STRIDE * 4 <= STAGES * STAGE_BYTES, "sums have room in the ring");

// A constant of which the compiler cannot know that it is one: it would write it anew before every use.
__device__ __forceinline__ u32 hidden(u32 constant, int num_tiles) { return constant + (num_tiles >> 24); }  // there are fewer

// Two bytes as two numbers of 16 bits, of which SCALE times as much is meant. Bytes moved to the right places are tiny numbers,
// which a multiply-add makes large. Where there is a choice numbers are multiplied, not shifted: the units that move bits are
// the busy ones.
struct Widening {
#if IS_E4M3  // exponent and fraction at their places, and the sign: bfloat16's is the value times 2^-120, float16's 2^-8
    static constexpr u32 SHIFT = IS_BFLOAT ? 4 : 7, LARGE = IS_BFLOAT ? 0x7b807b80u : 0x5c005c00u, OFFSET = 0x80008000u;
    static constexpr float SCALE = 1.0f;
    u32 offset, sign_by;
    __device__ explicit Widening(int num_tiles)
        : offset(hidden(OFFSET, num_tiles)), sign_by(hidden(0x100 - (1 << SHIFT), num_tiles)) {}

    __device__ u32 placed(u32 pair) const { return (pair & 0x00800080u) * sign_by + pair * (1 << SHIFT); }
#else  // the value plus 128 has no sign: as bfloat16's last bits it is 2^-133 times that, as float16's 2^-24
    static constexpr u32 LARGE = IS_BFLOAT ? 0x7f007f00u : 0x78007800u, OFFSET = IS_BFLOAT ? 0xc000c000u : 0xb400b400u;
    static constexpr float SCALE = IS_BFLOAT ? 64.0f : 512.0f;
    u32 offset;
    __device__ explicit Widening(int num_tiles) : offset(hidden(OFFSET, num_tiles)) {}

    __device__ u32 placed(u32 pair) const { return pair ^ 0x00800080u; }
#endif

    __device__ __forceinline__ u32 pair_at(u32 from) const {
        u32 bytes, pair, wide;
        asm volatile("ld.shared.u16 %0, [%1];" : "=r"(bytes) : "r"(from) : "memory");
        asm("prmt.b32 %0, %1, 0, 0x4140;" : "=r"(pair) : "r"(bytes));
        asm("fma.rn." HALF_TYPE "x2 %0, %1, %2, %3;" : "=r"(wide) : "r"(placed(pair)), "r"(LARGE), "r"(offset));
        return wide;
    }

    // 16 columns of the warp's 16 rows, as the tensor cores want them from its threads: two columns and two of two rows.
    __device__ __forceinline__ void rows_at(u32 (&pairs)[4], u32 upper, u32 lower) const {
        pairs[0] = pair_at(upper), pairs[1] = pair_at(lower), pairs[2] = pair_at(upper + 8), pairs[3] = pair_at(lower + 8);
    }
};

// None that reads or writes these may pass here: the tensor cores use them while other instructions run.
__device__ __forceinline__ void keep_order(float (&sums)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ void keep_order(u32 (&pairs)[STEPS][4]) {
#pragma unroll
    for (int i = 0; i < STEPS * 4; ++i) asm volatile("" : "+r"(pairs[i / 4][i % 4])::"memory");
}

// An operand so many bytes on: an address has 14 bits, of which none is carried to the others.
__device__ __forceinline__ u64 further(u64 operand, u32 bytes) {
    return operand & ~0xffffffffull | static_cast<u32>(operand) + (bytes >> 4);
}

// `rows`: where the warp's 16 rows of W begin in a tile. Those beyond its last are multiplied, and stored by nobody.
__device__ void sum_tiles(const Ring& ring, int num_tiles, int set, int rows, float (&sums)[SUMS]) {
    const Widening widening(num_tiles);
    u32 pairs[2][STEPS][4] = {};
    const int row = rows + threadIdx.x % 32 / 4;
    // 16 columns are a unit, swizzled by rows.
    const u32 from = row * ROW_BYTES + ((set * OWN_BLOCKS * 4 ^ row % 8) << 4) + threadIdx.x % 4 * 2;
    const u32 below = TILE_ROWS % 16 == 0 || row + 8 < TILE_ROWS ? 8 * ROW_BYTES : 0;
    keep_order(sums);
    for (int i = 0, stage = 0, parity = 0, before = 0; i < num_tiles; ++i) {
        const u64 x = operand(ring.x(stage) + set * OWN_BLOCKS * BLOCK_BYTES);
        const u32 w = ring.w(stage) + from;
        barrier_wait(ring.filled_w(stage), parity);
        barrier_wait(ring.filled_x(stage), parity);
#pragma unroll
        for (int part = 0; part < OWN_BLOCKS * PARTS; ++part) {
            u32(&own)[STEPS][4] = pairs[part % 2];
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // what used these registers has ended
            if (part == 1 && i > 0 && threadIdx.x % 32 == 0) barrier_arrive(ring.freed(before));
            keep_order(own);
            if (rows < TILE_ROWS) {
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    const u32 upper = w ^ part * STEPS + k << 4;
                    widening.rows_at(own[k], upper, upper + below);
                }
            }
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                multiply(sums, own[k], further(x, part / PARTS * BLOCK_BYTES + (part % PARTS * STEPS + k) * 32));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    keep_order(sums);
}

__device__ void await_others() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// A thread has two rows of W, eight apart, and of every eight rows of X two neighbours: sums[j * 4 + (row of W) * 2 + row of X].
__device__ void leave(const float (&sums)[SUMS], float* to, int m, int rows) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const int x = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, w = rows + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        if (x < m && w < TILE_ROWS) to[x * SUM_STRIDE + w] = sums[i];
    }
}

__device__ float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ void store_four(float* to, float4 found) { *reinterpret_cast<float4*>(to) = found; }
__device__ void store_four(u16* to, float4 found) {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed(found.x, found.y), packed(found.z, found.w));
}

// Four neighbouring columns of a row of the result: of all sets, and times their scales.
__device__ float4 whole(const float* sums, float4 scale) {
    float4 sum = four(sums);
    if constexpr (SETS == 2) {
        const float4 other = four(sums + ROWS_X * SUM_STRIDE);
        sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
    }
    return make_float4(sum.x * scale.x, sum.y * scale.y, sum.z * scale.z, sum.w * scale.w);
}

// A warp has every so many rows of X, a thread four columns.
__device__ void store(const float* sums, const float* scales, OUT_TYPE* out, const u16* bias, int m, int n, int feature,
                      long stride) {
    for (int of = threadIdx.x % 32 * 4; of < FEATURES && feature + of < n; of += 128) {
        const int at = feature + of;
        const float4 scale = four(scales + of), up_scale = four(scales + TILE_ROWS - FEATURES + of);
        float4 added = {};
        if (bias) added = make_float4(widened(bias[at]), widened(bias[at + 1]), widened(bias[at + 2]), widened(bias[at + 3]));
        for (int x = threadIdx.x / 32; x < m; x += THREADS / 32) {
            float4 found = whole(sums + x * SUM_STRIDE + of, scale);
            found = make_float4(found.x + added.x, found.y + added.y, found.z + added.z, found.w + added.w);
            if constexpr (HALVES == 2) {
                const float4 up = whole(sums + x * SUM_STRIDE + FEATURES + of, up_scale);
                found = make_float4(silu(found.x) * up.x, silu(found.y) * up.y, silu(found.z) * up.z, silu(found.w) * up.w);
            }
            store_four(out + x * stride + at, found);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1)
    ring_bytes(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, OUT_TYPE* out, const float* scale,
            const u16* bias, int m, int n, int num_tiles, long stride, long split_stride) {
    extern __shared__ __align__(1024) char tiles[];
    const u32 base = shared_address(tiles);
    if (base % 1024) __trap();
    float* scales = reinterpret_cast<float*>(tiles + STAGES * STAGE_BYTES);
    const Ring ring{base, base + STAGES * STAGE_BYTES + TILE_ROWS * 4};
    const int first = num_tiles * blockIdx.y / SPLITS, last = num_tiles * (blockIdx.y + 1) / SPLITS;
    const int feature = blockIdx.x * FEATURES;
    if (threadIdx.x == THREADS) init_barriers(ring);
    __syncthreads();
    const int warp = common(threadIdx.x / 32);
    if (warp >= THREADS / 32) {
        if (threadIdx.x == THREADS) load_weight(ring, &w, first, last - first, feature);
        if (threadIdx.x == THREADS + 32) load_rows(ring, &x, first, last - first);
        return;
    }
    for (int i = threadIdx.x; i < TILE_ROWS; i += THREADS) {  // no kernel writes these either, and memory is far
        const int at = feature + i % FEATURES;
        scales[i] = at < n ? scale[i / FEATURES * n + at] * Widening::SCALE : 0.0f;
    }
    // Where a set's last warpgroup has warps without rows, those of the next set are others of its four.
    const int warps = THREADS / 32 / SETS, set = warp / warps, rows = (warp % warps ^ set * 2) * 16;
    float sums[SUMS] = {};
    sum_tiles(ring, last - first, set, rows, sums);
    await_others();  // the ring is free
    float* left = reinterpret_cast<float*>(tiles);
    leave(sums, left + set * ROWS_X * SUM_STRIDE, m, rows);
    await_others();
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for a program without tiles: others have waited for X
#endif
    store(left, scales, out + blockIdx.y * split_stride, bias, m, n, feature, stride);
}
