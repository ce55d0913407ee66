// A ring of tiles in shared memory, of a matrix and of X, and the two warps that keep it filled: part of the products.
//
// They fill it by the hardware's tensor copies (TMA), one warp for the matrix and one for X. The matrix no kernel writes: its
// tiles are asked for before the kernel ahead has ended, but AHEAD at a time until then, for what is under way delays that
// kernel's own reads. Nothing that a kernel writes may be read before `griddepcontrol.wait`, nor may the next kernel be let go:
// the kernel ahead may itself still wait for the one ahead of it (norm.py's `early`).
//
// The includer defines TILE_ROWS (rows of the matrix in a tile, each 128 bytes: a row of the swizzled layout) and COLUMNS (how
// many numbers of a matrix's row that is; as many of X's are COLUMNS / 64 rows of 128 bytes, one block of ROWS_X behind the
// other).

constexpr int BLOCKS = COLUMNS / 64;  // of X in a tile
constexpr u32 BLOCK_BYTES = ROWS_X * ROW_BYTES;
constexpr u32 X_BYTES = BLOCKS * BLOCK_BYTES;
constexpr u32 W_BYTES = TILE_ROWS * ROW_BYTES;
constexpr u32 STAGE_BYTES = X_BYTES + W_BYTES;
static_assert(STAGES >= 2, "a tile is free once the next has been multiplied");
static_assert(AHEAD >= 1, "a tile that has arrived lets another be asked for");
static_assert(TILE_ROWS % 8 == 0 && ROWS_X % 8 == 0, "eight rows are a unit of the swizzled layout");
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
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(ring.x(stage) + block * BLOCK_BYTES),
                "l"(map), "r"(ring.filled_x(stage)), "r"((first + i) * COLUMNS + block * 64), "r"(0), "l"(READ_OFTEN)
                : "memory");
    }
}

// One thread, before any other uses the ring.
__device__ void init_barriers(const Ring& ring) {
    for (int stage = 0; stage < STAGES; ++stage) {
        barrier_init(ring.filled_x(stage), 1);
        barrier_init(ring.filled_w(stage), 1);
        barrier_init(ring.freed(stage), WARPGROUPS * 4);  // each warp
    }
    barrier_init(ring.released(), 1);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
