// A product of up to 128 rows with a large frozen matrix on Hopper: two warps load, the others multiply.
//
// Two warps keep a ring of STAGES tiles filled by the hardware's tensor copies (TMA), one of the matrix and one of X. The
// matrix no kernel writes: its tiles are asked for before the kernel ahead has ended, but AHEAD at a time until then, for
// what is under way delays that kernel's own reads. Nothing else may be read before `griddepcontrol.wait`, nor may the next
// kernel be let go: the kernel ahead may itself still wait for the one ahead of it (norm.py's `early`). The others multiply
// straight from the ring, 64 rows of X a warpgroup, and keep float32 sums in registers.
//
// out[m, n] = X[m, :] . W[n, :] (+ bias), or with HALVES = 2, where W is gate above up, silu(gate) * up; or with
// SPLITS > 1 float32 sums of a share of the columns.
//
// The launcher defines WARPGROUPS, ROWS_X (rows of X in a tile; the tensor cores take what lies behind, the matrix, for those
// that a warpgroup's 64 have beyond), FEATURES (rows of W that a program takes, of each half), HALVES, SPLITS, STAGES, AHEAD,
// PDL, HALF_TYPE, IS_BFLOAT, OUT_TYPE and `multiply`, the tensor cores' instruction for 64 rows of X and all rows of a tile.

constexpr int COLUMNS = 64;  // of a tile: 128 bytes, a row of the swizzled layout
constexpr int TILE_ROWS = HALVES * FEATURES;
constexpr u32 X_BYTES = ROWS_X * ROW_BYTES;
constexpr u32 W_BYTES = TILE_ROWS * ROW_BYTES;
constexpr u32 STAGE_BYTES = X_BYTES + W_BYTES;
static_assert(STAGES >= 2, "a tile is free once the next has been multiplied");
static_assert(AHEAD >= 1, "a tile that has arrived lets another be asked for");
static_assert(TILE_ROWS % 8 == 0 && ROWS_X % 8 == 0, "eight rows are a unit of the swizzled layout");
static_assert(STAGE_BYTES >= 64 * WARPGROUPS * ROW_BYTES, "the tensor cores read nothing behind the last tile");
constexpr u64 READ_ONCE = 0x12F0000000000000;   // policy of L2: evict first
constexpr u64 READ_OFTEN = 0x14F0000000000000;  // evict last

struct Ring {
    u32 tiles, barriers;  // addresses: STAGES times X and W; three barriers a stage, and one more

    __device__ u32 x(int stage) const { return tiles + stage * STAGE_BYTES; }
    __device__ u32 w(int stage) const { return x(stage) + X_BYTES; }
    __device__ u32 filled_x(int stage) const { return barriers + stage * 24; }
    __device__ u32 filled_w(int stage) const { return barriers + stage * 24 + 8; }
    __device__ u32 freed(int stage) const { return barriers + stage * 24 + 16; }
    __device__ u32 released() const { return barriers + STAGES * 24; }  // the kernel ahead has ended
};

__device__ void await_place(const Ring& ring, int i) {
    if (i >= STAGES) barrier_wait(ring.freed(i % STAGES), (i / STAGES - 1) & 1);
}

// Waits until tile i of the matrix has arrived or the kernel ahead has ended, and says whether that has.
__device__ bool await_arrival(const Ring& ring, int i) {
    while (!barrier_passed(ring.released(), 0))
        if (barrier_passed(ring.filled_w(i), 0)) return false;
    return true;
}

__device__ void load_weight(const Ring& ring, const TensorMap* map, int first, int num_tiles, int feature) {
    bool released = !PDL;
    for (int i = 0; i < num_tiles; ++i) {
        const int stage = i % STAGES;
        await_place(ring, i);
        if (AHEAD <= i && i < STAGES && !released) released = await_arrival(ring, i - AHEAD);
        barrier_expect(ring.filled_w(stage), W_BYTES);
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(ring.w(stage)),
            "l"(map), "r"(ring.filled_w(stage)), "r"((first + i) * COLUMNS), "r"(feature), "r"(0), "l"(READ_ONCE)
            : "memory");
    }
}

__device__ void load_rows(const Ring& ring, const TensorMap* map, int first, int num_tiles) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    barrier_arrive(ring.released());
#endif
    for (int i = 0; i < num_tiles; ++i) {
        const int stage = i % STAGES;
        await_place(ring, i);
        barrier_expect(ring.filled_x(stage), X_BYTES);
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(ring.x(stage)),
            "l"(map), "r"(ring.filled_x(stage)), "r"((first + i) * COLUMNS), "r"(0), "l"(READ_OFTEN)
            : "memory");
    }
}

// The tensor cores write the sums while other instructions run: none that reads or writes them may pass here. Without it the
// compiler waits after every instruction of theirs.
__device__ void keep_order(float (&sums)[TILE_ROWS / 2]) {
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ void sum_tiles(const Ring& ring, int num_tiles, float (&sums)[TILE_ROWS / 2]) {
    const u32 group = threadIdx.x / 128;
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

__device__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

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
    if (threadIdx.x == WARPGROUPS * 128) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(ring.filled_x(stage), 1);
            barrier_init(ring.filled_w(stage), 1);
            barrier_init(ring.freed(stage), WARPGROUPS * 4);  // each warp
        }
        barrier_init(ring.released(), 1);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= WARPGROUPS * 128) {
        if (threadIdx.x == WARPGROUPS * 128) load_weight(ring, &w, first, last - first, feature);
        if (threadIdx.x == WARPGROUPS * 128 + 32) load_rows(ring, &x, first, last - first);
    } else {
        float sums[TILE_ROWS / 2] = {};
        sum_tiles(ring, last - first, sums);
#if PDL
        asm volatile("griddepcontrol.wait;" ::: "memory");  // for a program without tiles: others have waited for X
#endif
        store(sums, out + blockIdx.y * split_stride, bias, m, n, feature, stride);
    }
}
