#pragma once
// What the kernels of tiles share: x in the order of the lanes, and the multiplication of 64 rows of the weight, in registers, by MT
// rows of x, in shared memory.
#include "common.cuh"
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
#elif MT == 128
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
               "%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0; }"
               : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#else
  static_assert(MT == 256, "16, 32, 64, 128 or 256");
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %133, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
               "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
               "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"
               "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"
               "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
               "}, {%128,%129,%130,%131}, %132, p, 1, 1, 0; }"
               : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56),
                 D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#endif
}

#endif
