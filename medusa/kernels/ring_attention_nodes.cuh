// The step's own part of attention by a ring: queries, keys and values as the projections gave them are rotated, put where
// the tensor cores find them, and, keys and values, written to their pages. Part of ring_attention.cu.

__device__ __forceinline__ float low_of(u32 pair) { return widened((u16)pair); }
__device__ __forceinline__ float high_of(u32 pair) { return widened((u16)(pair >> 16)); }

__device__ __forceinline__ void rotate_pair(u32& low, u32& high, u32 cos, u32 sin) {
    const float a0 = low_of(low), a1 = high_of(low), b0 = low_of(high), b1 = high_of(high);
    const float c0 = low_of(cos), c1 = high_of(cos), s0 = low_of(sin), s1 = high_of(sin);
    low = packed(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
    high = packed(b0 * c0 + a0 * s0, b1 * c1 + a1 * s1);
}

// Eight channels of either half of a head, turned by their angles in float32 and rounded once.
__device__ __forceinline__ void rotate(uint4& low, uint4& high, const uint4& cos, const uint4& sin) {
    rotate_pair(low.x, high.x, cos.x, sin.x);
    rotate_pair(low.y, high.y, cos.y, sin.y);
    rotate_pair(low.z, high.z, cos.z, sin.z);
    rotate_pair(low.w, high.w, cos.w, sin.w);
}

struct Nodes {
    const u16* qkv;  // [M, H + 2G, SIZE]
    const long* position;
    const u16 *cos, *sin;  // [positions, SIZE / 2]
    long angle_stride;
    int heads, groups;

    __device__ const u16* head(long node, int head) const { return qkv + (node * (heads + 2 * groups) + head) * SIZE; }
};

__device__ __forceinline__ uint4 read(const u16* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ __forceinline__ void write(u16* to, uint4 value) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

struct Angles {
    uint4 cos, sin;
};

__device__ __forceinline__ Angles angles_of(const Nodes& nodes, long flat, int unit) {
    const long at = nodes.position[flat] * nodes.angle_stride + unit * 8;
    return {read(nodes.cos + at), read(nodes.sin + at)};
}

// The node of each row that a thread turns: eight threads a row, each with 8 channels of either half.
template <int STEPS>
__device__ __forceinline__ void find_angles(
    Angles (&angles)[STEPS], const Nodes& nodes, const Share& of, int first, int group, int count) {
    const int thread = threadIdx.x % (ROWS * 8 / STEPS);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int node = (first + thread / 8 + step * (ROWS / STEPS)) / group;
        if (node < count) angles[step] = angles_of(nodes, of.start + node, thread % 8);
    }
}

__device__ __forceinline__ void place_queries(
    const Shared& at, const Share& of, const Nodes& nodes, const Angles (&angles)[QUERY_STEPS]) {
#pragma unroll
    for (int step = 0; step < QUERY_STEPS; ++step) {
        const int r = threadIdx.x / 8 + step * (ROWS / QUERY_STEPS), unit = threadIdx.x % 8;
        const int node = (of.tile * ROWS + r) / GROUP;
        uint4 low = {}, high = {};
        if (node < of.count) {
            const u16* from = nodes.head(of.start + node, of.head_kv * GROUP + (of.tile * ROWS + r) % GROUP) + unit * 8;
            low = read(from), high = read(from + SIZE / 2);
            rotate(low, high, angles[step].cos, angles[step].sin);
        }
        put(swizzled(at.query, r, unit), low);
        put(swizzled(at.query + HALF_BYTES, r, unit), high);
    }
}

struct Pages {
    u16 *keys, *values;
    const int* table;  // of the sequence
    long page, token, head;  // strides

    __device__ long of(int position, int head_kv) const {
        return table[position / PAGE] * page + position % PAGE * token + head_kv * head;
    }
};

// The step's own nodes that the tile may look at; it writes those that are the tile's own to their pages.
__device__ __forceinline__ void place_own(
    const Shared& at, const Share& of, const Nodes& nodes, int last, const Angles (&angles)[OWN_STEPS], const Pages& pages) {
    const int unit = threadIdx.x % 8;
#pragma unroll
    for (int step = 0; step < OWN_STEPS; ++step) {
        const int j = threadIdx.x % 128 / 8 + step * (ROWS / OWN_STEPS);
        uint4 low = {}, high = {}, value_low = {}, value_high = {};
        if (j < last) {
            const u16* key = nodes.head(of.start + j, nodes.heads + of.head_kv) + unit * 8;
            const u16* value = key + nodes.groups * SIZE;
            low = read(key), high = read(key + SIZE / 2), value_low = read(value), value_high = read(value + SIZE / 2);
            rotate(low, high, angles[step].cos, angles[step].sin);
            if (j >= of.tile * ROWS / GROUP) {
                const long to = pages.of(of.length + j, of.head_kv) + unit * 8;
                write(pages.keys + to, low), write(pages.keys + to + SIZE / 2, high);
                write(pages.values + to, value_low), write(pages.values + to + SIZE / 2, value_high);
            }
        }
        put(swizzled(at.own_keys(), j, unit), low), put(swizzled(at.own_keys() + HALF_BYTES, j, unit), high);
        put(swizzled(at.own_values(), j, unit), value_low), put(swizzled(at.own_values() + HALF_BYTES, j, unit), value_high);
    }
}
