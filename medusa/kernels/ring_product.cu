// A product of up to 128 rows with a large frozen matrix on Hopper: two warps load, the others multiply.
//
// Two warps keep the ring filled (ring.cuh). The others multiply straight from it, 64 rows of X a warpgroup, and keep float32
// sums in registers.
//
// out[m, n] = X[m, :] . W[n, :] (+ bias), or with HALVES = 2, where W is gate above up, silu(gate) * up; or with
// SPLITS > 1 float32 sums of a share of the columns.
//
// The launcher defines WARPGROUPS, ROWS_X (rows of X in a tile; the tensor cores take what lies behind, the matrix, for those
// that a warpgroup's 64 have beyond), FEATURES (rows of W that a program takes, of each half), HALVES, SPLITS, STAGES, AHEAD,
// PDL, HALF_TYPE, IS_BFLOAT, OUT_TYPE and `multiply`, the tensor cores' instruction for 64 rows of X and all rows of a tile.

constexpr int COLUMNS = 64;  // of a tile
constexpr int TILE_ROWS = HALVES * FEATURES;
#include "ring.cuh"
static_assert(STAGE_BYTES >= 64 * WARPGROUPS * ROW_BYTES, "the tensor cores read nothing behind the last tile");

// The tensor cores write the sums while other instructions run: none that reads or writes them may pass here. Without it the
// compiler waits after every instruction of theirs.
__device__ void keep_order(float (&sums)[TILE_ROWS / 2]) {
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ void sum_tiles(const Ring& ring, int num_tiles, int group, float (&sums)[TILE_ROWS / 2]) {
    keep_order(sums);
    for (int i = 0; i < num_tiles; ++i) {
        const int stage = i % STAGES;
        barrier_wait(ring.filled_w(stage), (i / STAGES) & 1);
        barrier_wait(ring.filled_x(stage), (i / STAGES) & 1);
        const u64 x = operand(ring.x(stage) + group * 64 * ROW_BYTES), w = operand(ring.w(stage));
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) multiply(sums, x + k * 2, w + k * 2);  // 16 columns: two units of 16 bytes
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the tile before has been read
        if (i > 0 && threadIdx.x % 32 == 0) barrier_arrive(ring.freed((i - 1) % STAGES));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    keep_order(sums);
}

__device__ void store_pair(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }

__device__ void store_pair(u16* to, float a, float b) {
    *reinterpret_cast<u32*>(to) = packed(a, b);
}

// A thread has two neighbouring columns of eight, of two rows: sums[j * 4 + row * 2 + column]. The up of a gate lies FEATURES
// columns on: in the same thread, or where FEATURES is a multiple of 4 only, in that two lanes away.
__device__ float up_of(const float (&sums)[TILE_ROWS / 2], int j, int i) {
    const int low = (j + FEATURES / 8) * 4 + i;
    if constexpr (FEATURES % 8 == 0) return sums[low];
    const int high = min(low + 4, TILE_ROWS / 2 - 4 + i);
    return __shfl_xor_sync(~0u, threadIdx.x % 4 < 2 ? sums[high] : sums[low], 2);  // the other two lanes' wish
}

__device__ void store(const float (&sums)[TILE_ROWS / 2], OUT_TYPE* out, const u16* bias, int m, int n, int feature, long stride) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < (FEATURES + 7) / 8; ++j) {
        const int of = j * 8 + threadIdx.x % 4 * 2, at = feature + of;
        const bool inside = of < FEATURES && at < n;
        const float bias_a = bias && inside ? widened(bias[at]) : 0.0f, bias_b = bias && inside ? widened(bias[at + 1]) : 0.0f;
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int i = lower * 2;
            float a = sums[j * 4 + i] + bias_a, b = sums[j * 4 + i + 1] + bias_b;
            if constexpr (HALVES == 2) a = silu(a) * up_of(sums, j, i), b = silu(b) * up_of(sums, j, i + 1);
            if (inside && row + lower * 8 < m) store_pair(out + (row + lower * 8) * stride + at, a, b);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPGROUPS * 128 + 64, 1)
    ring_product(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, OUT_TYPE* out, const u16* bias, int m,
            int n, int num_tiles, long stride, long split_stride) {
    extern __shared__ __align__(1024) char tiles[];
    const u32 base = shared_address(tiles);
    if (base % 1024) __trap();
    const Ring ring{base, base + STAGES * STAGE_BYTES};
    const int first = num_tiles * blockIdx.y / SPLITS, last = num_tiles * (blockIdx.y + 1) / SPLITS;
    const int feature = blockIdx.x * FEATURES;
    if (threadIdx.x == WARPGROUPS * 128) init_barriers(ring);
    __syncthreads();
    const int group = common(threadIdx.x / 128);
    if (group == WARPGROUPS) {
        if (threadIdx.x == WARPGROUPS * 128) load_weight(ring, &w, first, last - first, feature);
        if (threadIdx.x == WARPGROUPS * 128 + 32) load_rows(ring, &x, first, last - first);
    } else {
        float sums[TILE_ROWS / 2] = {};
        sum_tiles(ring, last - first, group, sums);
#if PDL
        asm volatile("griddepcontrol.wait;" ::: "memory");  // for a program without tiles: others have waited for X
#endif
        store(sums, out + blockIdx.y * split_stride, bias, m, n, feature, stride);
    }
}
