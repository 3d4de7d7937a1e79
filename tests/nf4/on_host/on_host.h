// CUDA on a CPU, as far as the kernels of unsloth_ext/nf4/cuda need it: every thread a fiber, asynchronous copies late and in random
// order, deadlocks found. It shows whether indices, barriers and parities are right; it knows nothing of speed, and multiplications
// of the tensor cores are over at once.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>
#define DEV static inline
#define __global__
#define __launch_bounds__(...)
#define SHARED_MEMORY static uint8_t* shared_memory = nullptr;
struct Dim { int x, y, z; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
static uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {a, b, c, d}; }
static float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static int min(int a, int b) { return a < b ? a : b; }

static uint8_t memory[0x40000];  // shared
struct Bar { int count = 0, pending = 0; int64_t bytes = 0; uint32_t phase = 0; };
static std::map<uint32_t, Bar> bars;
struct Group { int size = 32, arrived = 0; long turn = 0; uint32_t slot[128][8]; float f[128]; };
struct Late { const uint8_t* from; uint32_t to, n, bar; };
struct Fiber {
  ucontext_t context; jmp_buf at; bool begun = false; char* stack; Dim thread; bool done = true;
  std::deque<std::vector<Late>> groups; std::vector<Late> open;
};
static std::vector<Fiber> fibers;
static std::vector<Group> warps, warpgroups;
static std::map<int, Group> named;
static std::vector<Late> bulk;
static Group whole;
static jmp_buf scheduler;
static int current;
static long progress;
static Dim blockIdx, gridDim, blockDim;
#define threadIdx (fibers[current].thread)
// A context is entered once; from then on _setjmp and _longjmp change stacks, without swapcontext's system calls.
static void leave() { _longjmp(scheduler, 1); }
static void yield() { if (!_setjmp(fibers[current].at)) leave(); }
static void resume() {
  if (_setjmp(scheduler)) return;
  Fiber& f = fibers[current];
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  setcontext(&f.context);
}
static void check(bool ok, const char* why) { if (!ok) { printf("FAULT thread %d block %d: %s\n", current, blockIdx.x, why); fflush(stdout); _Exit(3); } }
static void meet(Group& g) {
  const long turn = g.turn;
  progress++;
  if (++g.arrived == g.size) { g.arrived = 0; g.turn++; return; }
  while (g.turn == turn) yield();
}
static Group& my_warp() { return warps[threadIdx.x / 32]; }
static void __syncwarp() { meet(my_warp()); }
static void __syncthreads() { meet(whole); }
template <int N> static void sync_some() { named[1].size = N; meet(named[1]); }
static uint32_t shared_at(const void*) { return 0x400; }
static void settle(Bar& b) { if (b.pending == 0 && b.bytes == 0) { b.phase ^= 1; b.pending = b.count; progress++; } }
static void bar_init(uint32_t b, uint32_t n) { bars[b] = Bar{(int)n, (int)n, 0, 0}; }
static void bars_are_made() {}
static void bar_arrive(uint32_t b) { check(bars.count(b) && bars[b].pending > 0, "one arrival too many"); bars[b].pending--; progress++; settle(bars[b]); }
static void bar_expect(uint32_t b, uint32_t n) { bars[b].bytes += n; bar_arrive(b); }
static void bar_wait(uint32_t b, uint32_t parity) { check(bars.count(b), "no such barrier"); while (bars[b].phase == parity) yield(); }
static uint64_t evict_first() { return 0; }
static void bulk_copy(uint32_t to, const void* from, uint32_t n, uint32_t bar, uint64_t = 0) {
  check(to % 16 == 0 && (uint64_t)from % 16 == 0 && n % 16 == 0 && to + n <= 0x400 + 232448, "bulk copy");
  bulk.push_back({(const uint8_t*)from, to, n, bar});
}
static void bulk_prefetch(const void*, uint32_t n) { check(n % 16 == 0, "prefetch"); }
static void grid_wait() {}
static void grid_launch() {}
static void at_ok(uint32_t at, uint32_t n) { check(at % n == 0 && at >= 0x400 && at + n <= 0x400 + 232448, "shared address"); }
template <class T> static T shared_read(uint32_t at) { at_ok(at, sizeof(T)); T v; memcpy(&v, memory + at, sizeof v); return v; }
static uint32_t lds(uint32_t at) { return shared_read<uint32_t>(at); }
static float ldsf(uint32_t at) { return shared_read<float>(at); }
static uint2 lds2(uint32_t at) { return shared_read<uint2>(at); }
static float4 lds4(uint32_t at) { return shared_read<float4>(at); }
static void sts(uint32_t at, uint32_t v) { at_ok(at, 4); memcpy(memory + at, &v, 4); }
static void stsf(uint32_t at, float v) { at_ok(at, 4); memcpy(memory + at, &v, 4); }
static void sts4(uint32_t at, float a, float b, float c, float d) { at_ok(at, 16); float v[4] = {a, b, c, d}; memcpy(memory + at, v, 16); }
static void sts4(uint32_t at, uint32_t v) { at_ok(at, 16); uint32_t w[4] = {v, v, v, v}; memcpy(memory + at, w, 16); }
static void copy16(uint32_t to, const void* from) {
  at_ok(to, 16); check((uint64_t)from % 16 == 0, "cp.async source");
  memset(memory + to, 0xff, 16);  // NaN codes until it has arrived
  fibers[current].open.push_back({(const uint8_t*)from, to, 16, 0});
}
static void copy4(uint32_t to, const void* from) {
  at_ok(to, 4); check((uint64_t)from % 4 == 0, "cp.async source");
  memset(memory + to, 0xff, 4);
  fibers[current].open.push_back({(const uint8_t*)from, to, 4, 0});
}
static void copy_commit() { auto& f = fibers[current]; f.groups.push_back(f.open); f.open.clear(); }
template <int N> static void copy_wait() {
  auto& f = fibers[current];
  while ((int)f.groups.size() > N) { for (auto& l : f.groups.front()) memcpy(memory + l.to, l.from, l.n); f.groups.pop_front(); }
}
template <int N> static void more_registers() {}
template <int N> static void fewer_registers() {}
static uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static float half_of(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xffff0000u : pair << 16); }  // bfloat16
static float widened(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
static uint16_t rounded(float v) { uint32_t u = __float_as_uint(v); return (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
static float mul_flushing(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
template <class T> static T __shfl_sync(uint32_t, T v, int source, int width = 32) {
  Group& g = my_warp(); const int lane = threadIdx.x % 32;
  memcpy(&g.slot[lane][0], &v, 4); meet(g);
  T r; memcpy(&r, &g.slot[lane / width * width + source % width][0], 4); meet(g); return r;
}
static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Group& w = my_warp(); const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1}; memcpy(w.slot[lane], mine, sizeof mine); meet(w);
  for (int i = 0; i < 4; i++) {
    const int high = i >> 1, column = 2 * t + (i & 1);
    for (int k = 0; k < 16; k++) {
      const int s = k % 8 / 2, h = k / 8;
      d[i] += half_of(w.slot[4 * g + s][high + 2 * h], k & 1) * half_of(w.slot[4 * column + s][4 + h], k & 1);
    }
  }
  meet(w);
}
static void wgmma_fence() {}
static void wgmma_commit() {}
template <int N> static void wgmma_wait() {}
template <size_t D> static void wgmma(float (&d)[D], const uint32_t* a, uint64_t b, int keep) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Group& own = my_warp(); Group& all = warpgroups[warp / 4];
  memcpy(own.slot[lane], a, 16); meet(all);
  const uint32_t start = (b & 0x3fff) << 4, stride = ((b >> 32) & 0x3fff) << 4;
  check(b >> 62 == 1, "swizzle");
  for (size_t i = 0; i < D; i++) {
    const int high = (i >> 1) & 1, column = 8 * (i / 4) + 2 * t + (i & 1);
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      uint32_t at = start + column / 8 * stride + column % 8 * 128 + 2 * k;
      at ^= (at >> 3) & 0x70;
      sum += half_of(own.slot[4 * g + k % 8 / 2][high + 2 * (k / 8)], k & 1) * half_of(lds(at & ~3u), (at >> 1) & 1);
    }
    d[i] = keep ? d[i] + sum : sum;
  }
  meet(all);
}
static unsigned atomicAdd(unsigned* p, unsigned v) { unsigned old = *p; *p += v; return old; }
static void __threadfence() {}
template <class T> static T __ldcg(const T* p) { return *p; }
static void __trap() { check(false, "trap"); }

static std::function<void()> body;
static void enter() { body(); fibers[current].done = true; progress++; leave(); }
static void launch(Dim grid, int threads, std::function<void()> what) {
  gridDim = grid; blockDim = {threads, 1, 1}; body = what;
  if ((int)fibers.size() < threads) {
    const size_t old = fibers.size(); fibers.resize(threads);
    for (size_t i = old; i < fibers.size(); i++) fibers[i].stack = (char*)malloc(1 << 16);
  }
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
        memset(memory, 0xff, sizeof memory); bars.clear(); named.clear(); bulk.clear();
        warps.assign(threads / 32, Group()); warpgroups.assign((threads + 127) / 128, Group()); whole = Group(); whole.size = threads;
        for (auto& g : warpgroups) g.size = 128;
        for (int i = 0; i < threads; i++) {
          Fiber& f = fibers[i]; f.done = f.begun = false; f.thread = {i, 0, 0}; f.groups.clear(); f.open.clear();
          getcontext(&f.context); f.context.uc_stack = {f.stack, 0, 1 << 16}; f.context.uc_link = nullptr; makecontext(&f.context, enter, 0);
        }
        for (int idle = 0;;) {
          const long before = progress; int left = 0;
          const int offset = rand() % threads;
          for (int i = 0; i < threads; i++) {
            current = (i + offset) % threads;
            if (!fibers[current].done) { left++; resume(); }
          }
          for (size_t i = 0; i < bulk.size();) {
            if (rand() % 3 == 0 || idle > 2) {
              const Late l = bulk[i]; bulk.erase(bulk.begin() + i);
              memcpy(memory + l.to, l.from, l.n); bars[l.bar].bytes -= l.n; progress++; settle(bars[l.bar]);
            } else i++;
          }
          if (!left) break;
          idle = progress == before && bulk.empty() ? idle + 1 : progress == before ? 3 : 0;
          if (idle > 50) { printf("DEADLOCK block %d, %d threads left\n", blockIdx.x, left); fflush(stdout); _Exit(4); }
        }
        check(bulk.empty(), "copies after the end");
      }
}
