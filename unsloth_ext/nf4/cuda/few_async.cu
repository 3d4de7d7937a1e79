// Up to 8 * GROUPS rows of x. One program a processor stays for the whole call. Every warp brings its own weights, 16 rows x 128
// bytes an item, by cp.async into its own ring of STAGES buffers, looks the bytes up and multiplies, each warp for a fixed 256
// columns, whose x it keeps in registers. Nobody waits for another warp's bytes. Warp n % WARPS adds up sum n one item later.
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
#define STAGES 3
#endif
#ifndef AHEAD  // scales come through the ring too; else they are asked for one item ahead, behind all weights that are on their way
#define AHEAD 0
#endif
#ifndef INNER  // a program takes all slices of its rows, reading x again for each; else it adds to others' sums by way of `parts`
#define INNER 0
#endif
constexpr int WARPS = KW * RG, THREADS = 32 * WARPS, ROWS = 16 * RG, KS = 256 * KW, K = KS * SLICES, PITCH = 128, BUFFER = 16 * PITCH;  // 16-byte pieces are stored at piece ^ 2 * (row & 3): no two lanes of a read share a bank
constexpr int RED = GROUPS * WARPS * 512;
constexpr int SUMMED = INNER ? SLICES : 1;  // items that go into one sum
constexpr uint32_t SCALES = 0x1000, TABLE = 0x8000, FIRST = 0x10000, SUMS = FIRST + STAGES * WARPS * BUFFER;
static_assert(!AHEAD || SCALES + STAGES * WARPS * 128 <= TABLE, "too many scales");
SHARED_MEMORY

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_async(
    const uint16_t* x, const uint8_t* packed, const uint8_t* absmax, const float* code2, const float* absmax2, const float* offset_ptr,
    const uint32_t* pairs, uint16_t* out, float* parts, unsigned* counters, int M, int N, float inverse, const uint16_t* bias) {
  const uint32_t base = shared_at(shared_memory), red_full = base, red_empty = base + 16, codes2 = base + 1024;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int kw = warp % KW, rg = warp / KW;
  const int tiles = (N + ROWS - 1) / ROWS;
  const auto tile_of = [&](int i) { return SLICES == 1 ? i : INNER ? i / SLICES : i % tiles; };
  const auto slice_of = [&](int i) { return SLICES == 1 ? 0 : INNER ? i % SLICES : i / tiles; };
  const int64_t sums_in_all = (int64_t)tiles * (SLICES / SUMMED);
  const int begin = SUMMED * (int)(sums_in_all * blockIdx.x / gridDim.x), end = SUMMED * (int)(sums_in_all * (blockIdx.x + 1) / gridDim.x);
  if (base < 0x400) return;  // the host asks for what lies between 0x400 and the last address; the first use sees that `out` is as it was
  if (thread == 0) {
    for (int i = 0; i < 2; i++) bar_init(red_full + 8 * i, WARPS), bar_init(red_empty + 8 * i, 1);
    bars_are_made();
  }
  for (int i = thread; i < 2048; i += THREADS) sts4(TABLE + 16 * i, pairs[i >> 3]);
  grid_wait();
  grid_launch();

  uint32_t xs[GROUPS][4][8];
  auto load_x = [&](uint32_t (&to_xs)[GROUPS][4][8], int slice) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const int token = 8 * group + g;
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const uint4* from = reinterpret_cast<const uint4*>(x + (int64_t)token * K + slice * KS + kw * 256 + p * 64 + t * 16);
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (token < M) a = from[0], b = from[1];
        uint32_t* to = to_xs[group][p];
        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
      }
    }
  };
  int slice = -1;
  if (AHEAD && begin < end) slice = slice_of(begin), load_x(xs, slice);  // before the weights, which fill the way to memory
  if (!AHEAD)
    for (int i = thread; i < 256; i += THREADS) stsf(codes2 + 4 * i, code2[i]);

  auto fetch = [&](int i) {  // 8 lanes a row: 4 rows an instruction
    if (i < end) {
      const int buffer = (i - begin) % STAGES * WARPS + warp, first = tile_of(i) * ROWS + 16 * rg;
      if (AHEAD) {  // 4 scales for each of 16 rows, and the scale of these 4
        const int block = min(first + (lane & 15), N - 1) * (K / 64) + slice_of(i) * (KS / 64) + kw * 4;
        copy4(SCALES + buffer * 128 + 4 * lane, lane < 16 ? (const void*)(absmax + block) : (const void*)(absmax2 + (block >> 8)));
      }
      const uint32_t to = FIRST + buffer * BUFFER;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int r = 4 * j + (lane >> 3), row = min(first + r, N - 1);
        copy16(to + r * PITCH + 16 * ((lane & 7) ^ 2 * (r & 3)), packed + (int64_t)row * (K / 2) + slice_of(i) * (KS / 2) + kw * 128 + 16 * (lane & 7));
      }
    }
    copy_commit();
  };
  for (int i = begin; i < begin + STAGES - 1; i++) fetch(i);
  if (AHEAD)  // waits for memory: when the weights are on their way
    for (int i = thread; i < 256; i += THREADS) stsf(codes2 + 4 * i, code2[i]);
  const uint32_t mine = TABLE | (4 * lane);
  const float offset = *offset_ptr;
  Scale next, next8;
  auto fetch_scales = [&](int i) {
    const int row = min(tile_of(i) * ROWS + 16 * rg + g, N - 1), row8 = min(tile_of(i) * ROWS + 16 * rg + g + 8, N - 1);
    const int k = slice_of(i) * KS + kw * 256 + 64 * t;
    next = scale_at(absmax, absmax2, row * (K / 64) + k / 64, 8);
    next8 = scale_at(absmax, absmax2, row8 * (K / 64) + k / 64, 8);
  };
  auto add_up = [&](int i, int n) {  // sum n, complete with item i
    const int tile = tile_of(i), part = slice_of(i);
    bar_wait(red_full + 8 * (n & 1), (n / 2) & 1);
    float4 y[GROUPS][RG];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int r = 0; r < RG; r++) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int w = 0; w < KW; w++) {
          const float4 v = lds4(SUMS + (n & 1) * RED + ((group * WARPS + r * KW + w) * 32 + lane) * 16);
          sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        y[group][r] = sum;
      }
    __syncwarp();
    if (lane == 0) bar_arrive(red_empty + 8 * (n & 1));
    bool last = true;
    if (SLICES > SUMMED) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int r = 0; r < RG; r++)
          reinterpret_cast<float4*>(parts)[((((int64_t)part * tiles + tile) * GROUPS + group) * RG + r) * 32 + lane] = y[group][r];
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
          for (int r = 0; r < RG; r++) {
            float4 sum = make_float4(0, 0, 0, 0);
            for (int s = 0; s < SLICES; s++) {
              const float4 v =
                  __ldcg(reinterpret_cast<float4*>(parts) + ((((int64_t)s * tiles + tile) * GROUPS + group) * RG + r) * 32 + lane);
              sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            y[group][r] = sum;
          }
      }
    }
    if (!last) return;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int r = 0; r < RG; r++) {
        const int row = tile * ROWS + 16 * r + g, token = 8 * group + 2 * t;
        const float4 v = y[group][r];
        const float b = bias && row < N ? widened(bias[row]) : 0.f, b8 = bias && row + 8 < N ? widened(bias[row + 8]) : 0.f;
        if (token < M && row < N) out[(int64_t)token * N + row] = rounded(v.x * inverse + b);
        if (token + 1 < M && row < N) out[(int64_t)(token + 1) * N + row] = rounded(v.y * inverse + b);
        if (token < M && row + 8 < N) out[(int64_t)token * N + row + 8] = rounded(v.z * inverse + b8);
        if (token + 1 < M && row + 8 < N) out[(int64_t)(token + 1) * N + row + 8] = rounded(v.w * inverse + b8);
      }
  };
  if (!AHEAD && begin < end) fetch_scales(begin);
  __syncthreads();
  float sums[GROUPS][4];
#if INNER
  uint32_t coming[GROUPS][4][8];
#endif
  int n = 0;  // the sum that is being made
  for (int i = begin; i < end; i++) {
    const int stage = (i - begin) % STAGES;
    fetch(i + STAGES - 1);  // into the buffer that was read one item ago: __syncwarp below
#if INNER
    if (!AHEAD && i == begin) load_x(xs, 0);
    if (i + 1 < end) load_x(coming, slice_of(i + 1));
#else
    if (slice_of(i) != slice) slice = slice_of(i), load_x(xs, slice);
#endif
    float f, f8;
    if (!AHEAD) {
      const Scale now = next, now8 = next8;
      if (i + 1 < end) fetch_scales(i + 1);
      f = scale_of(now, codes2, offset), f8 = scale_of(now8, codes2, offset);
    }
    if (SUMMED == 1 || slice_of(i) == 0) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[group][j] = 0.f;
    }
    copy_wait<STAGES - 1>();
    __syncwarp();
    if (AHEAD) {
      const uint32_t scales = SCALES + (stage * WARPS + warp) * 128 + 4 * g;
      f = scale_of({lds(scales) >> (8 * t) & 0xff, ldsf(scales + 64)}, codes2, offset);
      f8 = scale_of({lds(scales + 32) >> (8 * t) & 0xff, ldsf(scales + 96)}, codes2, offset);
    }
    const uint32_t at = FIRST + (stage * WARPS + warp) * BUFFER + g * PITCH + 8 * (t & 1);
    uint2 low[4], high[4];
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const uint32_t piece = 16 * ((2 * p + (t >> 1)) ^ 2 * (g & 3));
      low[p] = lds2(at + piece), high[p] = lds2(at + 8 * PITCH + piece);
    }
    __syncwarp();
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
      const float fp = of_quad(f, p), fp8 = of_quad(f8, p);
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        sums[group][0] += fp * products[group][0], sums[group][1] += fp * products[group][1];
        sums[group][2] += fp8 * products[group][2], sums[group][3] += fp8 * products[group][3];
      }
    }
#if INNER
#pragma unroll
    for (int j = 0; j < 32 * GROUPS; j++) (&xs[0][0][0])[j] = (&coming[0][0][0])[j];
#endif
    if (SUMMED > 1 && slice_of(i) != SLICES - 1) continue;
    if (n >= 2) bar_wait(red_empty + 8 * (n & 1), (n / 2 - 1) & 1);
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
      sts4(SUMS + (n & 1) * RED + ((group * WARPS + warp) * 32 + lane) * 16, sums[group][0], sums[group][1], sums[group][2],
           sums[group][3]);
    __syncwarp();
    if (lane == 0) bar_arrive(red_full + 8 * (n & 1));
    if (n > 0 && warp == (n - 1) % WARPS) add_up(i - SUMMED, n - 1);
    n++;
  }
  if (begin < end && warp == (n - 1) % WARPS) add_up(end - 1, n - 1);
}
