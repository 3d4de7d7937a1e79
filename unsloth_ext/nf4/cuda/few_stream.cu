// Up to 8 * GROUPS rows of x. One program a processor stays for the whole call. A producer warp brings weights into shared memory
// by bulk copies, STAGES items ahead; an item is 16 * RG rows of the weight times 256 * KW columns. KW * RG warps look bytes up and
// multiply, each for a fixed 256 columns, whose x it keeps in registers; a last warp adds what the KW warps found and writes it.
// Nobody waits for the whole program after the start: stages and sums go round by mbarriers.
#include "common.cuh"
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef KW
#define KW 16
#endif
#ifndef RG
#define RG 1
#endif
#ifndef SLICES  // of K, each of 256 * KW columns
#define SLICES 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef AHEAD  // scales come STAGES items ahead too; else one, behind all weights that are on their way
#define AHEAD 0
#endif
#ifndef EARLY  // weights may be read before the kernel before this one has ended
#define EARLY 0
#endif
// 18 warps would get 96 registers each; a fifth group of four gives most of its own away. 512 * 104 + 128 * 56 <= 640 * 96.
#define MORE_REGISTERS (KW * RG == 16)
constexpr int WARPS = KW * RG, THREADS = 32 * WARPS + (MORE_REGISTERS ? 128 : 64), ROWS = 16 * RG, KS = 256 * KW, K = KS * SLICES, PITCH = KS / 2 + 32, STAGE = ROWS * PITCH;
constexpr int RED = GROUPS * WARPS * 512;  // bytes of sums, one buffer
constexpr uint32_t SCALES = 0x1000, TABLE = 0x8000, FIRST_STAGE = 0x10000, SUMS = FIRST_STAGE + STAGES * STAGE;

static_assert(!AHEAD || SCALES + STAGES * WARPS * 128 <= TABLE, "too many scales");
SHARED_MEMORY

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_stream(
    const uint16_t* x, const uint8_t* packed, const uint8_t* absmax, const float* code2, const float* absmax2, const float* offset_ptr,
    const uint32_t* pairs, uint16_t* out, float* parts, unsigned* counters, int M, int N, float inverse, const uint16_t* bias) {
  const uint32_t base = shared_at(shared_memory);  // below TABLE
  const uint32_t full = base, empty = base + 64, red_full = base + 128, red_empty = base + 144, codes2 = base + 1024;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int tiles = (N + ROWS - 1) / ROWS;
  const auto tile_of = [&](int i) { return SLICES == 1 ? i : i % tiles; };
  const auto slice_of = [&](int i) { return SLICES == 1 ? 0 : i / tiles; };
  const int64_t items = (int64_t)tiles * SLICES;
  const int begin = (int)(items * blockIdx.x / gridDim.x), end = (int)(items * (blockIdx.x + 1) / gridDim.x);
  if (base < 0x400) return;  // the host asks for what lies between 0x400 and the last address; nothing is written: the first-use check sees it
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) bar_init(full + 8 * i, 1), bar_init(empty + 8 * i, WARPS);
    for (int i = 0; i < 2; i++) bar_init(red_full + 8 * i, WARPS), bar_init(red_empty + 8 * i, 1);
    bars_are_made();
  }
  if (warp == WARPS && lane < ROWS && !EARLY) {  // what is only brought into L2 cannot be stale
    for (int i = begin; i < min(begin + STAGES, end); i++) {
      const int row = min(tile_of(i) * ROWS + lane, N - 1);
      bulk_prefetch(packed + (int64_t)row * (K / 2) + slice_of(i) * (KS / 2), KS / 2);
    }
  }
  const bool preparing = !AHEAD || warp != WARPS;  // the producer only waits for its barriers
  constexpr int PREPARING = THREADS - (AHEAD ? 32 : 0);
  if (AHEAD) __syncthreads();
  if (preparing)
    for (int i = warp > WARPS && AHEAD ? thread - 32 : thread; i < 2048; i += PREPARING) sts4(TABLE + 16 * i, pairs[i >> 3]);
  if (!EARLY || warp != WARPS) grid_wait();
  const int kw = warp % KW, rg = warp / KW, g = lane >> 2, t = lane & 3;  // of those that multiply
  uint32_t xs[GROUPS][4][8];
  int slice = -1;
  auto load_x = [&](int of_slice) {
    slice = of_slice;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const int token = 8 * group + g;
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const uint4* from = reinterpret_cast<const uint4*>(x + (int64_t)token * K + slice * KS + kw * 256 + p * 64 + t * 16);
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (token < M) a = from[0], b = from[1];
        uint32_t* to = xs[group][p];
        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
      }
    }
  };
  auto fetch_ahead = [&](int i) {  // 4 scales for each of a warp's 16 rows, and the scale of these 4
    if (i < end) {
      const int block = min(tile_of(i) * ROWS + 16 * rg + (lane & 15), N - 1) * (K / 64) + slice_of(i) * (KS / 64) + kw * 4;
      copy4(SCALES + ((i - begin) % STAGES * WARPS + warp) * 128 + 4 * lane,
            lane < 16 ? (const void*)(absmax + block) : (const void*)(absmax2 + (block >> 8)));
    }
    copy_commit();
  };
  if (AHEAD && warp < WARPS && begin < end) {
    load_x(slice_of(begin));
    for (int i = begin; i < begin + STAGES - 1; i++) fetch_ahead(i);
  }
  if (preparing) {
    for (int i = warp > WARPS && AHEAD ? thread - 32 : thread; i < 256; i += PREPARING) stsf(codes2 + 4 * i, code2[i]);
    if (AHEAD)
      sync_some<PREPARING>();
    else
      __syncthreads();
  }
  if (thread == 0) grid_launch();

  if (warp < WARPS) {  // ---- those that multiply
#if MORE_REGISTERS
    more_registers<104>();
#endif
    const uint32_t mine = TABLE | (4 * lane);
    const float offset = *offset_ptr;
    Scale next, next8;
    auto fetch_scales = [&](int i) {
      const int row = min(tile_of(i) * ROWS + 16 * rg + g, N - 1), row8 = min(tile_of(i) * ROWS + 16 * rg + g + 8, N - 1);
      const int k = slice_of(i) * KS + kw * 256 + 64 * t;
      next = scale_at(absmax, absmax2, row * (K / 64) + k / 64, 8);
      next8 = scale_at(absmax, absmax2, row8 * (K / 64) + k / 64, 8);
    };
    if (!AHEAD && begin < end) fetch_scales(begin);
    for (int i = begin; i < end; i++) {
      const int n = i - begin, stage = n % STAGES;
      if (AHEAD) fetch_ahead(i + STAGES - 1);
      if (slice_of(i) != slice) load_x(slice_of(i));
      float f, f8;
      if (AHEAD) {
        copy_wait<STAGES - 1>();
        __syncwarp();
        const uint32_t scales = SCALES + (stage * WARPS + warp) * 128 + 4 * g;
        f = scale_of({lds(scales) >> (8 * t) & 0xff, ldsf(scales + 64)}, codes2, offset);
        f8 = scale_of({lds(scales + 32) >> (8 * t) & 0xff, ldsf(scales + 96)}, codes2, offset);
      } else {
        const Scale now = next, now8 = next8;
        if (i + 1 < end) fetch_scales(i + 1);
        f = scale_of(now, codes2, offset), f8 = scale_of(now8, codes2, offset);
      }
      float sums[GROUPS][4];
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[group][j] = 0.f;
      bar_wait(full + 8 * stage, (n / STAGES) & 1);
      const uint32_t at = FIRST_STAGE + stage * STAGE + (16 * rg + g) * PITCH + kw * 128 + 8 * t;
      uint2 low[4], high[4];
#pragma unroll
      for (int p = 0; p < 4; p++) low[p] = lds2(at + 32 * p), high[p] = lds2(at + 8 * PITCH + 32 * p);
#pragma unroll
      for (int p = 0; p < 4; p++) {
        float products[GROUPS][4];
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
          for (int j = 0; j < 4; j++) products[group][j] = 0.f;
#pragma unroll
        for (int word = 0; word < 2; word++) {
          uint32_t a[4], b[4];
          lookup(word ? low[p].y : low[p].x, mine, a);
          lookup(word ? high[p].y : high[p].x, mine, b);
#pragma unroll
          for (int group = 0; group < GROUPS; group++) {
            const uint32_t* v = xs[group][p] + 4 * word;
            mma(products[group], a[0], b[0], a[1], b[1], v[0], v[1]);
            mma(products[group], a[2], b[2], a[3], b[3], v[2], v[3]);
          }
        }
        if (p == 3) {
          __syncwarp();
          if (lane == 0) bar_arrive(empty + 8 * stage);
        }
        const float fp = of_quad(f, p), fp8 = of_quad(f8, p);
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          sums[group][0] += fp * products[group][0], sums[group][1] += fp * products[group][1];
          sums[group][2] += fp8 * products[group][2], sums[group][3] += fp8 * products[group][3];
        }
      }
      if (n >= 2) bar_wait(red_empty + 8 * (n & 1), (n / 2 - 1) & 1);
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
        sts4(SUMS + (n & 1) * RED + ((group * WARPS + warp) * 32 + lane) * 16, sums[group][0], sums[group][1], sums[group][2],
             sums[group][3]);
      __syncwarp();
      if (lane == 0) bar_arrive(red_full + 8 * (n & 1));
    }
    return;
  }
#if MORE_REGISTERS
  fewer_registers<56>();
#endif
  if (warp == WARPS) {  // ---- the producer
    const uint64_t policy = evict_first();
    for (int i = begin; i < end; i++) {
      const int n = i - begin, stage = n % STAGES;
      if (n >= STAGES) bar_wait(empty + 8 * stage, (n / STAGES - 1) & 1);
      if (lane == 0) bar_expect(full + 8 * stage, ROWS * (KS / 2));
      __syncwarp();
      for (int r = lane; r < ROWS; r += 32) {
        const int row = min(tile_of(i) * ROWS + r, N - 1);
        bulk_copy(FIRST_STAGE + stage * STAGE + r * PITCH, packed + (int64_t)row * (K / 2) + slice_of(i) * (KS / 2), KS / 2,
                  full + 8 * stage, policy);
      }
    }
  } else if (warp == WARPS + 1) {  // ---- the one that adds
    for (int i = begin; i < end; i++) {
      const int n = i - begin, tile = tile_of(i), part = slice_of(i);
      bar_wait(red_full + 8 * (n & 1), (n / 2) & 1);
      float4 y[GROUPS][RG];
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int rg = 0; rg < RG; rg++) {
          float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 2
          for (int kw = 0; kw < KW; kw++) {
            const float4 v = lds4(SUMS + (n & 1) * RED + ((group * WARPS + rg * KW + kw) * 32 + lane) * 16);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
          }
          y[group][rg] = sum;
        }
      __syncwarp();
      if (lane == 0) bar_arrive(red_empty + 8 * (n & 1));
      bool last = true;
      if (SLICES > 1) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
          for (int rg = 0; rg < RG; rg++)
            reinterpret_cast<float4*>(parts)[((((int64_t)part * tiles + tile) * GROUPS + group) * RG + rg) * 32 + lane] = y[group][rg];
        __threadfence();
        __syncwarp();
        unsigned arrived = 0;
        if (lane == 0) arrived = atomicAdd(counters + tile, 1);
        last = __shfl_sync(0xffffffffu, arrived, 0) == SLICES - 1;
        if (last) {
          if (lane == 0) counters[tile] = 0;  // ready for the next call
          __threadfence();
#pragma unroll
          for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int rg = 0; rg < RG; rg++) {
              float4 sum = make_float4(0, 0, 0, 0);
              for (int s = 0; s < SLICES; s++) {
                const float4 v =
                    __ldcg(reinterpret_cast<float4*>(parts) + ((((int64_t)s * tiles + tile) * GROUPS + group) * RG + rg) * 32 + lane);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
              }
              y[group][rg] = sum;
            }
        }
      }
      if (last) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
          for (int rg = 0; rg < RG; rg++) {
            const int row = tile * ROWS + 16 * rg + g, token = 8 * group + 2 * t;
            const float4 v = y[group][rg];
            const float b = bias && row < N ? widened(bias[row]) : 0.f, b8 = bias && row + 8 < N ? widened(bias[row + 8]) : 0.f;
            if (token < M && row < N) out[(int64_t)token * N + row] = rounded(v.x * inverse + b);
            if (token + 1 < M && row < N) out[(int64_t)(token + 1) * N + row] = rounded(v.y * inverse + b);
            if (token < M && row + 8 < N) out[(int64_t)token * N + row + 8] = rounded(v.z * inverse + b8);
            if (token + 1 < M && row + 8 < N) out[(int64_t)(token + 1) * N + row + 8] = rounded(v.w * inverse + b8);
          }
      }
    }
  }
}
