#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no headers of its own
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t; typedef unsigned long long uint64_t; typedef long long int64_t;
#else
#include <stdint.h>
#endif
#ifdef HOST
#include "on_host.h"
#else
#define DEV __device__ __forceinline__
#define SHARED_MEMORY extern __shared__ __align__(1024) uint8_t shared_memory[];

DEV uint32_t shared_at(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DEV void bar_init(uint32_t b, uint32_t n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
DEV void bar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void bar_expect(uint32_t b, uint32_t n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
DEV void bar_wait(uint32_t b, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 0x989680;\n@p bra done;\nbra again;\ndone: }"
      ::"r"(b), "r"(parity) : "memory");
}
DEV uint64_t evict_first() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
DEV void bulk_copy(uint32_t to, const void* from, uint32_t n, uint32_t bar, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(n), "r"(bar), "l"(policy) : "memory");
}
DEV void bulk_copy(uint32_t to, const void* from, uint32_t n, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(n), "r"(bar) : "memory");
}
DEV void bulk_prefetch(const void* from, uint32_t n) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(n) : "memory");
}
DEV void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void grid_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEV void bars_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void stsf(uint32_t at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }
DEV void sts(uint32_t at, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEV void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEV void copy4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
template <int N> DEV void sync_some() { asm volatile("bar.sync 1, %0;" ::"n"(N) : "memory"); }
template <int N> DEV void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEV void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
DEV uint32_t lds(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
DEV float ldsf(uint32_t at) { return __uint_as_float(lds(at)); }
DEV uint2 lds2(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
DEV float4 lds4(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
  return v;
}
DEV void sts4(uint32_t at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEV void sts4(uint32_t at, uint32_t v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(v) : "memory");
}
#ifdef FP16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
DEV void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV uint16_t rounded(float v) {
  uint16_t h;
#ifdef FP16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
#endif
  return h;
}
DEV float widened(uint16_t h) {
  float v;
#ifdef FP16
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
#else
  v = __uint_as_float((uint32_t)h << 16);
#endif
  return v;
}
DEV float mul_flushing(float a, float b) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
#endif
// Two codes for each of the 4 bytes of a word. `mine` is the table's address, a multiple of 32768, or'ed with 4 * lane.
DEV void lookup(uint32_t word, uint32_t mine, uint32_t (&p)[4]) {
  p[0] = lds(((word << 7) & 0x7f80) | mine);
  p[1] = lds(((word >> 1) & 0x7f80) | mine);
  p[2] = lds(((word >> 9) & 0x7f80) | mine);
  p[3] = lds(((word >> 17) & 0x7f80) | mine);
}
struct Scale { uint32_t index; float second; };
DEV Scale scale_at(const uint8_t* absmax, const float* absmax2, int block, int block2_shift) {
  return {absmax[block], absmax2[block >> block2_shift]};
}
DEV float scale_of(Scale s, uint32_t code2, float offset) {
  return __fadd_rn(mul_flushing(ldsf(code2 + 4 * s.index), s.second), offset);
}
DEV float of_quad(float v, int source) { return __shfl_sync(0xffffffffu, v, source, 4); }
