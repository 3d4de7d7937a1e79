// 17 rows of x and more: tiles of 64 * NWG rows of the weight by MT rows of x. Each warp brings its own 16 rows of the weight by
// cp.async, looks up codes straight into wgmma's register operand, and the tensor cores read x from shared memory: x costs the
// load path nothing. x comes from `permute`, which orders each 64 columns as the lanes hold them and swizzles for wgmma, so one
// bulk copy is a stage. Scales go onto the sums of each 64 columns, in fp32; these are doubled so that decoding and multiplying
// overlap. SPLIT programs share a tile's K; the last to arrive adds their parts, in order.
#include "common.cuh"
#ifndef MT
#define MT 64
#endif
#ifndef NWG
#define NWG 2
#endif
#ifndef PARTS  // of 64 columns in a stage
#define PARTS 4
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef KDIM
#define KDIM 4096
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef BUFFERS  // of sums: with one, a part's sums are taken before the next part's multiplication starts, not while it runs
#define BUFFERS 2
#endif
#ifndef WORDS  // a step's words are read at once, not part by part
#define WORDS 0
#endif
#ifndef LEAN  // two programs a processor: the weight's stages below the table, without padding
#define LEAN 0
#endif
#ifndef DECODED  // buffers of decoded codes: with one, decoding waits for the multiplication before
#define DECODED 2
#endif
constexpr int K = KDIM, WARPS = 4 * NWG, THREADS = 32 * WARPS + 32, ROWS = 64 * NWG, PITCH = 32 * PARTS + (LEAN ? 0 : 32);
constexpr int STEPS = K / (64 * PARTS), XBLOCK = MT * 128, XSTAGE = PARTS * XBLOCK, WSTAGE = ROWS * PITCH;
constexpr uint32_t TABLE = 0x8000, XS = 0x10000, WS = LEAN ? 0x1000 : XS + STAGES * XSTAGE;
static_assert(!LEAN || (PARTS == 2 && WS + STAGES * WSTAGE <= TABLE), "lean: 2 parts, and stages that fit below the table");
static_assert(DECODED == 2 || BUFFERS == 1, "one buffer of codes needs no two of sums");
constexpr int DEEP = STAGES - 1;  // stages of the weight on their way
SHARED_MEMORY

// [M, K] -> [K / 64][MT][64], in the order of the lanes, 16-byte pieces swizzled; rows past M are zeros. One thread a piece.
extern "C" __global__ void permute(const uint16_t* x, uint4* to, int M, int tokens, int columns) {
  grid_wait();
  grid_launch();
  x += (int64_t)blockIdx.y * tokens * columns;  // tile blockIdx.y of x
  M -= blockIdx.y * tokens;
  to += (int64_t)blockIdx.y * tokens * columns / 8;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, piece = i & 7, token = (i >> 3) % tokens, block = (i >> 3) / tokens;
  if (block >= columns / 64) return;
  uint32_t v[4];
#pragma unroll
  for (int t = 0; t < 4; t++)  // piece = 2 j + h: columns 2t, 2t + 1 (+ 8 h) of multiplication j are a lane's 16 t + 4 j + 2 h
    v[t] = token < M ? *reinterpret_cast<const uint32_t*>(x + (int64_t)token * columns + block * 64 + 16 * t + 2 * piece) : 0u;
  to[((int64_t)block * tokens + token) * 8 + (piece ^ (token & 7))] = make_uint4(v[0], v[1], v[2], v[3]);
}

#ifndef HOST
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
DEV void wgmma(float (&d)[MT / 2], const uint32_t* a, uint64_t b, int keep) {
#if MT == 16
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %13, 0;\nwgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0; }"
               : D8(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#elif MT == 32
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0; }"
               : D8(0), D8(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#elif MT == 64
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
               " {%32,%33,%34,%35}, %36, p, 1, 1, 0; }"
               : D8(0), D8(8), D8(16), D8(24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#else
  static_assert(MT == 128, "16, 32, 64 or 128");
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
               "%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0; }"
               : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#endif
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, LEAN ? 2 : 1) tile_wgmma(
    const uint8_t* permuted, const uint8_t* packed, const uint8_t* absmax, const float* code2, const float* absmax2,
    const float* offset_ptr, const uint32_t* pairs, uint16_t* out, float* parts, unsigned* counters, int M, int N, float inverse, const uint16_t* bias) {
  const uint32_t base = shared_at(shared_memory), full = base, empty = base + 64, flag = base + 128, codes2 = base + 1024;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x, split = blockIdx.y, tile_m = blockIdx.z;
  const int first = STEPS * split / SPLIT, last = STEPS * (split + 1) / SPLIT;
  if (base < 0x400) return;  // the host asks for what lies between 0x400 and the last address; nothing is written: the first-use check sees it
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) bar_init(full + 8 * i, 1), bar_init(empty + 8 * i, WARPS);
    bars_are_made();
  }
  for (int i = thread; i < 2048; i += THREADS) sts4(TABLE + 16 * i, pairs[i >> 3]);
  grid_wait();
  grid_launch();
  for (int i = thread; i < 256; i += THREADS) stsf(codes2 + 4 * i, code2[i]);
  __syncthreads();

  if (warp == WARPS) {  // ---- the producer of x
    if (lane == 0) {
      for (int step = first; step < last; step++) {
        const int n = step - first, stage = n % STAGES;
        if (n >= STAGES) bar_wait(empty + 8 * stage, (n / STAGES - 1) & 1);
        bar_expect(full + 8 * stage, XSTAGE);
        bulk_copy(XS + stage * XSTAGE, permuted + ((int64_t)tile_m * STEPS + step) * XSTAGE, XSTAGE, full + 8 * stage);
      }
    }
    return;
  }
  const int first_row = tile * ROWS + 16 * warp, row = min(first_row + g, N - 1), row8 = min(first_row + g + 8, N - 1);
  const uint32_t mine = TABLE | (4 * lane);
  const float offset = *offset_ptr;
  constexpr int LANES = 2 * PARTS, AT_ONCE = 32 / LANES;  // lanes a row, rows an instruction
  const uint8_t* from[16 / AT_ONCE];
#pragma unroll
  for (int j = 0; j < 16 / AT_ONCE; j++)
    from[j] = packed + (int64_t)min(first_row + j * AT_ONCE + lane / LANES, N - 1) * (K / 2) + 16 * (lane % LANES);
  auto fetch = [&](int step) {
    if (step < last) {
      // Without padding, 16-byte pieces of every other two rows change places: no two lanes of a read share a bank.
      const int piece = LEAN ? (lane % LANES) ^ (lane / LANES & 2) : lane % LANES;
      const uint32_t to = WS + (step - first) % STAGES * WSTAGE + (16 * warp + lane / LANES) * PITCH + 16 * piece;
#pragma unroll
      for (int j = 0; j < 16 / AT_ONCE; j++) copy16(to + j * AT_ONCE * PITCH, from[j] + step * (32 * PARTS));
    }
    copy_commit();
  };
  Scale next, next8;
  auto fetch_scales = [&](int step) {
    const int block = step * PARTS + t % PARTS;
    next = scale_at(absmax, absmax2, row * (K / 64) + block, 8);
    next8 = scale_at(absmax, absmax2, row8 * (K / 64) + block, 8);
  };
  uint32_t a[DECODED][16];
  float total[MT / 2], products[BUFFERS][MT / 2];
#pragma unroll
  for (int i = 0; i < MT / 2; i++) total[i] = 0.f, products[0][i] = 0.f, products[BUFFERS - 1][i] = 0.f;
  for (int i = 0; i < DEEP; i++) fetch(first + i);
  fetch_scales(first);
  for (int step = first; step < last; step++) {
    const int n = step - first, stage = n % STAGES;
    __syncwarp();  // all lanes have read the buffer that is filled now
    fetch(step + DEEP);
    const Scale now = next, now8 = next8;
    if (step + 1 < last) fetch_scales(step + 1);
    const float f = scale_of(now, codes2, offset), f8 = scale_of(now8, codes2, offset);
    copy_wait<DEEP>();
    __syncwarp();
    bar_wait(full + 8 * stage, (n / STAGES) & 1);
    const uint32_t at = WS + stage * WSTAGE + (16 * warp + g) * PITCH + (LEAN ? 0 : 8 * t);
    const uint64_t description = (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (XS + stage * XSTAGE) >> 4;
    uint2 low[PARTS], high[PARTS];
    const auto read_words = [&](int p) {
      const uint32_t part = LEAN ? (32 * p + 8 * t) ^ 16 * (g & 2) : 32 * p;
      low[p] = lds2(at + part), high[p] = lds2(at + 8 * PITCH + part);
    };
    if (WORDS) {
#pragma unroll
      for (int p = 0; p < PARTS; p++) read_words(p);
    }
    const auto add_part = [&](const float (&d)[MT / 2], int p) {
      const float fp = of_quad(f, p), fp8 = of_quad(f8, p);
#pragma unroll
      for (int i = 0; i < MT / 2; i++) total[i] += (i & 2 ? fp8 : fp) * d[i];
    };
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      if (!WORDS) read_words(p);
#pragma unroll
      for (int word = 0; word < 2; word++) {
        uint32_t u[4], v[4], *to = a[p % DECODED] + 8 * word;
        lookup(word ? low[p].y : low[p].x, mine, u);
        lookup(word ? high[p].y : high[p].x, mine, v);
        to[0] = u[0], to[1] = v[0], to[2] = u[1], to[3] = v[1], to[4] = u[2], to[5] = v[2], to[6] = u[3], to[7] = v[3];
      }
      if (BUFFERS == 1 && DECODED == 2 && p > 0) {
        wgmma_wait<0>();
        add_part(products[0], p - 1);
      }
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; j++)
        wgmma(products[p % BUFFERS], a[p % DECODED] + 4 * j, description + (p * XBLOCK + 32 * j) / 16, j > 0);
      wgmma_commit();
      if (BUFFERS == 2 && p > 0) {
        wgmma_wait<1>();
        add_part(products[(p - 1) % BUFFERS], p - 1);
      }
      if (DECODED == 1) {
        wgmma_wait<0>();
        add_part(products[0], p);
      }
    }
    wgmma_wait<0>();
    if (lane == 0) bar_arrive(empty + 8 * stage);
    if (DECODED == 2) add_part(products[(PARTS - 1) % BUFFERS], PARTS - 1);
  }
  if (SPLIT > 1) {
    const int unit = tile_m * gridDim.x + tile, units = gridDim.z * gridDim.x;
#pragma unroll
    for (int i = 0; i < MT / 2; i++) parts[(((int64_t)split * units + unit) * (MT / 2) + i) * (32 * WARPS) + thread] = total[i];
    __threadfence();
    sync_some<32 * WARPS>();
    if (thread == 0) {
      const unsigned arrived = atomicAdd(counters + unit, 1);
      if (arrived == SPLIT - 1) counters[unit] = 0;
      sts(flag, arrived);
    }
    sync_some<32 * WARPS>();
    if (lds(flag) != SPLIT - 1) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < MT / 2; i++) {
      float sum = 0.f;
#pragma unroll
      for (int s = 0; s < SPLIT; s++) sum += __ldcg(parts + (((int64_t)s * units + unit) * (MT / 2) + i) * (32 * WARPS) + thread);
      total[i] = sum;
    }
  }
  const float b = bias ? widened(bias[row]) : 0.f, b8 = bias ? widened(bias[row8]) : 0.f;
#pragma unroll
  for (int i = 0; i < MT / 2; i++) {
    const int r = first_row + g + (i & 2 ? 8 : 0), token = tile_m * MT + 8 * (i / 4) + 2 * t + (i & 1);
    if (r < N && token < M) out[(int64_t)token * N + r] = rounded(total[i] * inverse + (i & 2 ? b8 : b));
  }
}
