// y = x_1 W_1 + x_2 W_2 + ..., one sum in one accumulator: dense 16-bit matrices for sm_90, nothing copied side by side. Each x_i and W_i
// has a tensor map of its own, and the loop over K goes from one to the next. What a map has no columns for is read as zeros. A matrix that
// is only to be added goes through the same loop: its x is the tile of it, its W the identity of BN columns.
//
// A program stays for the whole call. Its first warpgroup has one thread that copies tiles of 64 columns of K into a ring of STAGES; the
// two others multiply, each 64 of a tile's 128 rows by all of its 256 columns, and write their results out by way of shared memory while
// the next tiles come. Two programs, a cluster, take tiles below each other: each copies half of W's tile for both. Without that the
// product costs 5% more time on an H200, at whose power limit it runs: all energy spent elsewhere is missing in the tensor cores.
//
// LOW: also low = x_1 D_1 + x_2 D_2 + ..., of at most 64 columns, and low U is part of y. Tiles of low, 256 rows each, are what some clusters
// begin with, those that have the fewest tiles of y; the others take a tile of low up at the end of a tile of y, when it has long been
// written. So x is read for it while others multiply, and not by a kernel of its own. A counter for each program's rows says that a tile is
// there; the last that reads it puts the counter back to zero. `clusters_for_low` is known to the host too (products_hopper.py).
//
// Another kernel may hold processors for as long as it likes, NCCL's until another card has sent something. So nobody waits for what has not
// begun: clusters are numbered as they begin, the first make low, each takes one tile of it after the other as long as there are some, and
// only then a tile of y, for which it may wait. However few are running, they make all of low and then y.
#include "common.cuh"
#ifndef WT  // W_i is [N, K_i], D_i [R, K_i]; else [K_i, N], [K_i, R]
#define WT 1
#endif
#ifndef LOW
#define LOW 0
#endif
constexpr int STAGES = 4, SEGMENTS = 4, BM = 128, BN = 256, BK = 64, XSTAGE = BM * BK * 2, WSTAGE = BN * BK * 2;
#if LOW
constexpr int DSTAGE = 64 * BK * 2;
#endif
constexpr int GROUP = 8;  // pairs of row tiles that go together: what the programs read at one time stays in L2
struct __align__(64) Map { uint64_t words[16]; };
struct Problem {
  Map x[SEGMENTS], w[SEGMENTS], y;
#if LOW
  Map d[SEGMENTS];
#endif
  int columns[SEGMENTS];  // K_i, 0 behind the last
  int M, N;
  int added;  // the segment whose W is the identity, or none: -1
#if LOW
  int of_low, pitch, rank;  // the segment whose x is low, behind all that have a D; low's rows are `pitch` apart, its columns a multiple of 8
  uint16_t* low;
  int* counters;  // zeros: clusters that have begun, tiles of low that have been taken, two unused, and 4 for each pair of row tiles
#endif
};
SHARED_MEMORY

DEV void load(uint32_t to, const Map& map, int x, int y, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(bar) : "memory");
}
DEV void load_for_both(uint32_t to, const Map& map, int x, int y, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(bar), "h"((uint16_t)3) : "memory");
}
DEV void store(const Map& map, uint32_t from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x), "r"(y), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int N> DEV void store_wait() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// No .release.cluster: that is a fence for all memory, which costs a fifth of the speed; what is handed back was only read, and by wgmma.
DEV void arrive_at(uint32_t bar, int program) {
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a]; }" ::"r"(bar), "r"(program) : "memory");
}
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEV int cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void sync_warpgroup(int which) { asm volatile("bar.sync %0, 128;" ::"r"(which + 1) : "memory"); }
DEV uint32_t both(float low, float high) {
  uint32_t v;
#ifdef FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
DEV void stmatrix(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D64(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24), D8(i + 32), D8(i + 40), D8(i + 48), D8(i + 56)
#if WT
#define TRANSPOSED "0"
#else
#define TRANSPOSED "1"
#endif
DEV void wgmma(float (&d)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
               "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"
               "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,"
               "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, " TRANSPOSED "; }"
               : D64(0), D64(64) : "l"(a), "l"(b), "r"(keep));
}

#if LOW
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
DEV void wgmma(float (&d)[32], uint64_t a, uint64_t b, int keep) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "%32, %33, p, 1, 1, 0, " TRANSPOSED "; }"
               : D32(0) : "l"(a), "l"(b), "r"(keep));
}
// How many clusters make low: as many as have a tile of y less, unless those are too few.
DEV int clusters_for_low(int tiles, int pairs, int every) {
  const int idle = tiles % every ? every - tiles % every : every;
  return 3 * idle >= pairs ? idle : every;
}
// The next number; the last leaves zero.
DEV int take(int* counter, int all) {
  int v;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(v) : "l"(counter) : "memory");
  if (v == all - 1) asm volatile("st.relaxed.gpu.global.s32 [%0], 0;" ::"l"(counter) : "memory");
  return v;
}
// What the cluster's first program has at this address, after a cluster_sync.
DEV int said(uint32_t at) {
  int v;
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %1, 0;\nld.shared::cluster.s32 %0, [a]; }" : "=r"(v) : "r"(at) : "memory");
  return v;
}
DEV void count(int* counter) {
  asm volatile("fence.proxy.async;\nfence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
DEV int counted(const int* counter) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}
// Waits for both warpgroups' parts of low; the last of `readers` leaves zeros. Then the copy engine may read it.
DEV void wait_for_low(int* counters, int readers) {
  for (int i = 0; counted(counters) < 2; i++) {
    asm volatile("nanosleep.u32 100;");
    if (i == 1 << 27) asm volatile("trap;");  // some 13 seconds: an error, and not a process that hangs
  }
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counters + 1) : "memory");
  if (before == readers - 1) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], 0;\nst.relaxed.gpu.global.s32 [%0 + 4], 0;" ::"l"(counters) : "memory");
  }
  asm volatile("fence.proxy.async;" ::: "memory");
}
#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) sum_of_products(const __grid_constant__ Problem problem) {
  const uint32_t base = (shared_at(shared_memory) + 1023) & ~1023u, full = base, empty = base + 128;
  [[maybe_unused]] const uint32_t told = base + 256;  // a cluster's number, and in turns at two places the tile of low that it makes
  const uint32_t XS = base + 1024, WS = XS + STAGES * XSTAGE, OUT = WS + STAGES * WSTAGE;
  const int thread = threadIdx.x, group = thread >> 7, rank = cluster_rank();
  const int pairs = (problem.M + 2 * BM - 1) / (2 * BM), across = (problem.N + BN - 1) / BN, tiles = pairs * across, every = gridDim.x / 2;
#if LOW
  const int for_low = clusters_for_low(tiles, pairs, every);
  const auto take_low = [&] { return take(problem.counters + 1, pairs + for_low); };  // each that makes low asks once in vain
#endif
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) bar_init(full + 8 * i, 1), bar_init(empty + 8 * i, 4);  // two warpgroups of two programs
    bars_are_made();
#if LOW
    if (rank == 0) {
      const int number = take(problem.counters, every);
      sts(told, number), sts(told + 4, number < for_low ? take_low() : pairs);
    }
#endif
  }
  cluster_sync();
#if LOW
  const int first = every - 1 - said(told);
  int pair = said(told + 4);
  uint32_t at = told + 4;
  const auto next_low = [&] {
    at ^= 12;  // told + 4 and told + 8, in turns: the tile before is still read
    if (thread == 0 && rank == 0) sts(at, take_low());
    __syncwarp();
    cluster_sync();
    pair = said(at);
  };
#else
  const int first = blockIdx.x / 2;
#endif
  const auto place = [&](int tile, int& m, int& n) {
    const int of_group = GROUP * across, at = tile / of_group * GROUP, in = tile % of_group, size = min(pairs - at, GROUP);
    m = ((at + in % size) * 2 + rank) * BM, n = in / size * BN;
  };
  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] { if (++stage == STAGES) stage = 0, phase ^= 1; };
  if (group == 0) {  // ---- copies
    fewer_registers<LOW ? 40 : 24>();
#if LOW
    for (; pair < pairs; next_low()) {
#pragma unroll 1
      for (int segment = 0; thread == 0 && segment < problem.of_low; segment++) {
#pragma unroll 1
        for (int k = 0; k < problem.columns[segment]; k += BK) {
          bar_wait(empty + 8 * stage, phase ^ 1);
          const uint32_t bar = full + 8 * stage;
          bar_expect(bar, XSTAGE + DSTAGE);
          load(XS + stage * XSTAGE, problem.x[segment], k, (2 * pair + rank) * BM, bar);
          load(WS + stage * WSTAGE, problem.d[segment], WT ? k : 0, WT ? 0 : k, bar);
          advance();
        }
      }
    }
#endif
    if (thread == 0) {
      for (int tile = first; tile < tiles; tile += every) {
        int m, n;
        place(tile, m, n);
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS; segment++) {
          const Map &x = problem.x[segment], &w = problem.w[segment];
          const int columns = problem.columns[segment], first_k = segment == problem.added ? n : 0, of_w = n - first_k;
#if LOW
          if (segment == problem.of_low) wait_for_low(problem.counters + 4 + m / BM * 2, across);
#endif
#pragma unroll 1
          for (int k = 0; k < columns; k += BK) {
            bar_wait(empty + 8 * stage, phase ^ 1);
            const uint32_t bar = full + 8 * stage, to = WS + stage * WSTAGE + rank * (WSTAGE / 2);
            bar_expect(bar, XSTAGE + WSTAGE);
            load(XS + stage * XSTAGE, x, first_k + k, m, bar);
            if (WT) load_for_both(to, w, k, of_w + rank * (BN / 2), bar);
            else {
              load_for_both(to, w, of_w + rank * (BN / 2), k, bar);
              load_for_both(to + WSTAGE / 4, w, of_w + rank * (BN / 2) + BN / 4, k, bar);
            }
            advance();
          }
        }
      }
    }
  } else {  // ---- multiplies
    more_registers<LOW ? 232 : 240>();
    const int mine = group - 1, t = thread & 127, warp = t >> 5, lane = t & 31;
    const uint64_t kind = (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32;
    const uint64_t of_x = kind | (uint64_t)1 << 16 | ((XS + mine * (XSTAGE / 2)) & 0x3ffff) >> 4;
    const uint64_t of_w = kind | (uint64_t)(WT ? 1 : (WSTAGE / 4) >> 4) << 16 | (WS & 0x3ffff) >> 4;
    const uint32_t out = OUT + mine * 2 * 8192;
    constexpr int SLICE = WT ? 2 : 128;  // 16 of K, in W's tile
    int before;
    const auto next = [&] {  // the stage before is free when its multiplications are done
      wgmma_commit();
      wgmma_wait<1>();
      if (before >= 0 && t < 2) arrive_at(empty + 8 * before, t);
      before = stage;
      advance();
    };
    const auto multiply = [&](auto& d, int segments) {  // x_1 W_1 + x_2 W_2 + ..., from the stages as they come
      before = -1;
      int keep = 0;
#pragma unroll 1
      for (int segment = 0; segment < segments; segment++) {
        int columns = problem.columns[segment];
        for (; columns >= BK; columns -= BK) {
          bar_wait(full + 8 * stage, phase);
          const uint64_t a = of_x + stage * (XSTAGE / 16), b = of_w + stage * (WSTAGE / 16);
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < 4; j++) wgmma(d, a + 2 * j, b + SLICE * j, keep | j);
          next();
          keep = 1;
        }
        if (columns > 0) {
          bar_wait(full + 8 * stage, phase);
          const uint64_t a = of_x + stage * (XSTAGE / 16), b = of_w + stage * (WSTAGE / 16);
          wgmma_fence();
          for (int j = 0; 16 * j < columns; j++) wgmma(d, a + 2 * j, b + SLICE * j, keep | j);
          next();
          keep = 1;
        }
      }
      wgmma_wait<0>();
      if (t < 2) arrive_at(empty + 8 * before, t);
#pragma unroll
      for (float& v : d) asm volatile("" : "+f"(v)::"memory");
    };
#if LOW
    for (; pair < pairs; next_low()) {
      float d[32];
      multiply(d, problem.of_low);
      const int m = (2 * pair + rank) * BM, row = m + 64 * mine + 16 * warp + (lane >> 2);
      uint16_t* to = problem.low + (int64_t)row * problem.pitch;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int column = 8 * j + 2 * (lane & 3);
        if (8 * j < problem.rank) {
          if (row < problem.M) *(uint32_t*)(to + column) = both(d[4 * j], d[4 * j + 1]);
          if (row + 8 < problem.M) *(uint32_t*)(to + 8 * problem.pitch + column) = both(d[4 * j + 2], d[4 * j + 3]);
        }
      }
      sync_warpgroup(mine);
      if (t == 0 && tiles) count(problem.counters + 4 + m / BM * 2);
    }
#endif
    float d[128];
    for (int tile = first; tile < tiles; tile += every) {
      multiply(d, SEGMENTS);
      int m, n;
      place(tile, m, n);
      const int row = 16 * warp + (lane & 15);
#pragma unroll
      for (int p = 0; p < 4; p++) {  // 64 columns at a time, in two buffers
        if (t == 0) store_wait<1>();
        sync_warpgroup(mine);
        const uint32_t to = out + (p & 1) * 8192 + row * 128;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float* v = d + 32 * p + 8 * j;
          stmatrix(to + (((2 * j + (lane >> 4)) ^ (row & 7)) << 4), both(v[0], v[1]), both(v[2], v[3]), both(v[4], v[5]), both(v[6], v[7]));
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync_warpgroup(mine);
        if (t == 0) store(problem.y, out + (p & 1) * 8192, n + 64 * p, m + 64 * mine);
      }
    }
    if (t == 0) store_wait<0>();
  }
  __syncwarp();
  cluster_sync();  // nobody leaves while the other still writes into its memory
}
