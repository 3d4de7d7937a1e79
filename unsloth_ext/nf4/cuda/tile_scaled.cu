// 17 rows of x and more: tiles of 64 * NWG rows of the weight by MT rows of x, like `tile_wgmma`, but a weight is scaled before it is
// multiplied, in fp32, and then rounded, as a dense weight is. So one set of sums in registers is all there is (MT may be 256), nothing
// but wgmma touches it, and a multiplication runs while the next 64 columns are decoded, from one step into the next. KWG groups of
// warps share a tile's K inside a program: more warps to hide the table's latency. CLUSTER programs, side by side, share what they
// read of x. Results leave by way of shared memory, 16 bytes a thread. SPLIT programs share a tile's K too.
#ifndef MT
#define MT 64
#endif
#include "tile.cuh"
#ifndef NWG
#define NWG 2
#endif
#ifndef KWG
#define KWG 1
#endif
#ifndef STAGES  // of 64 columns of x, for each of the KWG groups
#define STAGES 4
#endif
#ifndef RING  // steps of 256 columns of the weight, for each warp
#define RING 2
#endif
#ifndef KDIM
#define KDIM 4096
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef WIDE  // the table holds pairs of fp32 codes: exact, two reads; else of fp16 codes, times a factor: 3e-5 off, one read
#define WIDE 0
#endif
#ifndef WORDS  // a step's words are read at once, not part by part
#define WORDS 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
constexpr int K = KDIM, GROUP = 128 * NWG, WARPS = 4 * NWG * KWG, THREADS = 32 * WARPS + 128, ROWS = 64 * NWG;
// The last four warps, one of which works, give most of their registers away: 256 * 240 + 128 * 24 <= 384 * 168, 512 * 112 + 128 * 32 <= 640 * 96.
constexpr int MORE = WARPS == 8 ? 240 : WARPS == 16 ? 112 : 0, FEWER = WARPS == 8 ? 24 : 32;
constexpr int PARTS = 4, STEPS = K / (64 * PARTS), PITCH = 32 * PARTS, BUFFER = 16 * PITCH, XBLOCK = MT * 128;
constexpr uint32_t TABLE = 0x8000, XS = 0x10000, WS = XS + KWG * STAGES * XBLOCK;
constexpr uint32_t OUT_PITCH = 2 * ROWS + 16;  // a row of x's results: no two lanes of a write share a bank
static_assert(K % (64 * PARTS) == 0 && KWG * STAGES <= 16, "whole steps, and room for the barriers");
static_assert(MT * OUT_PITCH <= KWG * STAGES * XBLOCK + WARPS * RING * BUFFER, "results take the place of the stages");
static_assert((KWG - 1) * ROWS * MT * 4 <= KWG * STAGES * XBLOCK + WARPS * RING * BUFFER, "sums take the place of the stages");
SHARED_MEMORY

#ifdef HOST
#define CLUSTER_SIZE
#else
#if CLUSTER > 1
#define CLUSTER_SIZE __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_SIZE
#endif
DEV uint32_t both(float first, float second) {  // rounded, the first in the low half
  uint32_t pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
DEV float2 halves(uint32_t pair) {
  float2 v;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(v.x), "=f"(v.y) : "r"(pair));
  return v;
}
DEV uint32_t rank_in_cluster() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEV void arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }"
               ::"r"(bar), "r"(rank) : "memory");
}
DEV void bulk_copy_to_all(uint32_t to, const void* from, uint32_t n, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(n), "r"(bar), "h"((uint16_t)((1 << CLUSTER) - 1)) : "memory");
}
#endif

extern "C" __global__ void CLUSTER_SIZE __launch_bounds__(THREADS, 1) tile_scaled(
    const uint8_t* permuted, const uint8_t* packed, const uint8_t* absmax, const float* code2, const float* absmax2,
    const float* offset_ptr, const uint32_t* pairs, uint16_t* out, float* parts, unsigned* counters, int M, int N, float inverse, const uint16_t* bias) {
  const uint32_t base = shared_at(shared_memory), full = base, empty = base + 128, flag = base + 256, codes2 = base + 1024;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x, split = blockIdx.y, tile_m = blockIdx.z;
  const int first = STEPS * split / SPLIT, steps = STEPS * (split + 1) / SPLIT - first;
  if (base < 0x400) return;  // as in `tile_wgmma`
  if (thread == 0) {
    for (int i = 0; i < KWG * STAGES; i++) bar_init(full + 8 * i, 1), bar_init(empty + 8 * i, CLUSTER * 4 * NWG);
    bars_are_made();
  }
#if WIDE
  for (int i = thread; i < 2048; i += THREADS) {  // 16 copies of 8 bytes
    const float a = __uint_as_float(pairs[i >> 3 << 1]), b = __uint_as_float(pairs[(i >> 3 << 1) + 1]);
    sts4(TABLE + 16 * i, a, b, a, b);
  }
#else
  for (int i = thread; i < 2048; i += THREADS) sts4(TABLE + 16 * i, pairs[i >> 3]);
#endif
  grid_wait();
  grid_launch();
  for (int i = thread; i < 256; i += THREADS) stsf(codes2 + 4 * i, code2[i]);
  __syncthreads();
#if CLUSTER > 1
  sync_cluster();  // everybody's barriers are made
#endif
  const int kg = warp / (4 * NWG), own = warp % (4 * NWG);  // group, and warp in it; it takes every KWG-th step
  float total[MT / 2];

  if (warp >= WARPS) {  // ---- the producer of x
    if (MORE) fewer_registers<FEWER>();
    if (warp == WARPS && lane == 0) {
      const uint8_t* from = permuted + ((int64_t)tile_m * STEPS + first) * PARTS * XBLOCK;
      for (int m = 0; m / PARTS * KWG < steps; m++)  // part m of each group
        for (int group = 0; group < KWG; group++) {
          const int step = m / PARTS * KWG + group, stage = group * STAGES + m % STAGES;
          if (step >= steps) continue;
          if (m >= STAGES) bar_wait(empty + 8 * stage, (m / STAGES - 1) & 1);
          bar_expect(full + 8 * stage, XBLOCK);
          const uint8_t* block = from + (int64_t)(step * PARTS + m % PARTS) * XBLOCK;
#if CLUSTER > 1
          const uint32_t mine = rank_in_cluster() * (XBLOCK / CLUSTER);
          bulk_copy_to_all(XS + stage * XBLOCK + mine, block + mine, XBLOCK / CLUSTER, full + 8 * stage);
#else
          bulk_copy(XS + stage * XBLOCK, block, XBLOCK, full + 8 * stage);
#endif
        }
    }
    __syncwarp();
#if CLUSTER > 1
    sync_cluster();
#endif
    return;
  }
  {
    if (MORE) more_registers<MORE ? MORE : 24>();
#pragma unroll
    for (int i = 0; i < MT / 2; i++) total[i] = 0.f;
    const int first_row = tile * ROWS + 16 * own, row = min(first_row + g, N - 1), row8 = min(first_row + g + 8, N - 1);
    const uint32_t mine = TABLE | (WIDE ? 8 * (lane & 15) : 4 * lane), ring = WS + warp * RING * BUFFER;
    const float offset = *offset_ptr;
    const uint8_t* from[4];  // 8 lanes a row: 4 rows an instruction
#pragma unroll
    for (int j = 0; j < 4; j++)
      from[j] = packed + (int64_t)min(first_row + 4 * j + (lane >> 3), N - 1) * (K / 2) + first * PITCH + 16 * (lane & 7);
    auto fetch = [&](int n) {
      if (n < steps) {
        // 16-byte pieces are stored at piece ^ 2 * (row & 3): no two lanes of a read share a bank
        const uint32_t to = ring + n / KWG % RING * BUFFER + (lane >> 3) * PITCH + 16 * ((lane & 7) ^ 2 * (lane >> 3));
#pragma unroll
        for (int j = 0; j < 4; j++) copy16(to + 4 * j * PITCH, from[j] + n * PITCH);
      }
      copy_commit();
    };
    Scale next, next8;
    auto fetch_scales = [&](int n) {
      const int block = (first + n) * PARTS + t;
      next = scale_at(absmax, absmax2, row * (K / 64) + block, 8);
      next8 = scale_at(absmax, absmax2, row8 * (K / 64) + block, 8);
    };
    auto release = [&](int stage) {
#if CLUSTER > 1
      if (lane < CLUSTER) arrive_at(empty + 8 * stage, lane);
#else
      if (lane == 0) bar_arrive(empty + 8 * stage);
#endif
    };
    uint32_t a[2][16];
    int stage = kg * STAGES, before = stage;
    uint32_t phase = 0;
    for (int i = 0; i < RING - 1; i++) fetch(kg + i * KWG);
    if (kg < steps) fetch_scales(kg);
    for (int n = kg; n < steps; n += KWG) {
      __syncwarp();  // all lanes have read the buffer that is filled now
      fetch(n + (RING - 1) * KWG);
      const Scale now = next, now8 = next8;
      if (n + KWG < steps) fetch_scales(n + KWG);
      const float f = scale_of(now, codes2, offset) * (WIDE ? 1.f : inverse), f8 = scale_of(now8, codes2, offset) * (WIDE ? 1.f : inverse);
      copy_wait<RING - 1>();
      __syncwarp();
      const uint32_t at = ring + n / KWG % RING * BUFFER + g * PITCH + 8 * (t & 1);
      uint2 low[PARTS], high[PARTS];
      const auto read_words = [&](int p) {
        const uint32_t piece = 16 * ((2 * p + (t >> 1)) ^ 2 * (g & 3));
        low[p] = lds2(at + piece), high[p] = lds2(at + 8 * PITCH + piece);
      };
      if (WORDS) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) read_words(p);
      }
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        if (!WORDS) read_words(p);
        const float fp = of_quad(f, p), fp8 = of_quad(f8, p);
        const auto decode = [&](uint32_t word, float scale, uint32_t* to) {  // 8 columns of a row into every other register
#if WIDE
          const uint2 u[4] = {lds2(((word << 7) & 0x7f80) | mine), lds2(((word >> 1) & 0x7f80) | mine),
                              lds2(((word >> 9) & 0x7f80) | mine), lds2(((word >> 17) & 0x7f80) | mine)};
#pragma unroll
          for (int i = 0; i < 4; i++)
            to[2 * i] = both(mul_flushing(__uint_as_float(u[i].x), scale), mul_flushing(__uint_as_float(u[i].y), scale));
#else
          uint32_t u[4];
          lookup(word, mine, u);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 v = halves(u[i]);
            to[2 * i] = both(v.x * scale, v.y * scale);
          }
#endif
        };
        uint32_t* to = a[p & 1];
        decode(low[p].x, fp, to), decode(high[p].x, fp8, to + 1);
        decode(low[p].y, fp, to + 8), decode(high[p].y, fp8, to + 9);
        bar_wait(full + 8 * stage, phase);
        wgmma_fence();
        const uint64_t description = (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (XS + stage * XBLOCK) >> 4;
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(total, to + 4 * j, description + 2 * j, 1);
        wgmma_commit();
        wgmma_wait<1>();  // the part before this one: its registers and its stage are free
        if (p > 0 || n > kg) release(before);
        before = stage;
        if (++stage == (kg + 1) * STAGES) stage = kg * STAGES, phase ^= 1;
      }
    }
    wgmma_wait<0>();
  }
#if CLUSTER > 1
  sync_cluster();  // nothing arrives here any more, no barrier of this program is asked for
#endif
  sync_some<32 * WARPS>();  // all stages have been read: sums and results take their place
  const int in_group = thread % GROUP;
  if (KWG > 1) {
#pragma unroll
    for (int i = 0; i < MT / 2; i++)
      if (kg > 0) stsf(XS + 4 * (((kg - 1) * (MT / 2) + i) * GROUP + in_group), total[i]);
    sync_some<32 * WARPS>();
    if (kg > 0) return;
#pragma unroll
    for (int i = 0; i < MT / 2; i++)
#pragma unroll
      for (int group = 1; group < KWG; group++) total[i] += ldsf(XS + 4 * (((group - 1) * (MT / 2) + i) * GROUP + in_group));
    sync_some<GROUP>();
  }
  if (SPLIT > 1) {
    const int unit = tile_m * gridDim.x + tile, units = gridDim.z * gridDim.x;
#pragma unroll
    for (int i = 0; i < MT / 2; i++) parts[(((int64_t)split * units + unit) * (MT / 2) + i) * GROUP + thread] = total[i];
    __threadfence();
    sync_some<GROUP>();
    if (thread == 0) {
      const unsigned arrived = atomicAdd(counters + unit, 1);
      if (arrived == SPLIT - 1) counters[unit] = 0;
      sts(flag, arrived);
    }
    sync_some<GROUP>();
    if (lds(flag) != SPLIT - 1) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < MT / 2; i++) {
      float sum = 0.f;
#pragma unroll
      for (int s = 0; s < SPLIT; s++) sum += __ldcg(parts + (((int64_t)s * units + unit) * (MT / 2) + i) * GROUP + thread);
      total[i] = sum;
    }
  }
  const int in_tile = 16 * own + g, last_row = N - 1 - tile * ROWS;
  const float b = bias ? widened(bias[min(tile * ROWS + in_tile, N - 1)]) : 0.f, b8 = bias ? widened(bias[min(tile * ROWS + in_tile + 8, N - 1)]) : 0.f;
#pragma unroll
  for (int i = 0; i < MT / 2; i += 2) {  // rows of x 8 * (i / 4) + 2 * t and the next: a lane takes one of both, for two rows of the weight
    const float v = total[i] + (i & 2 ? b8 : b), w = total[i + 1] + (i & 2 ? b8 : b);
    const float got = __shfl_sync(0xffffffffu, g & 1 ? v : w, lane ^ 4);
    sts(XS + (8 * (i / 4) + 2 * t + (g & 1)) * OUT_PITCH + 2 * (in_tile - (g & 1) + (i & 2 ? 8 : 0)), g & 1 ? both(got, w) : both(v, got));
  }
  sync_some<GROUP>();
  constexpr int PIECES = ROWS / 8;  // 8 rows of the weight: 16 bytes
  for (int i = thread; i < MT * PIECES; i += GROUP) {
    const int in_x = i / PIECES, token = tile_m * MT + in_x, r = 8 * (i % PIECES);
    if (token >= M || r > last_row) continue;
    const float4 v = lds4(XS + in_x * OUT_PITCH + 2 * r);
    uint16_t* to = out + (int64_t)token * N + tile * ROWS + r;
    if (N % 8 == 0) {
      *reinterpret_cast<float4*>(to) = v;
    } else {
      const uint32_t words[4] = {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (r + j <= last_row) to[j] = (uint16_t)(words[j / 2] >> 16 * (j & 1));
    }
  }
}
