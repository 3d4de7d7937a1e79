// Runs a kernel of unsloth_ext/nf4/cuda on a CPU and compares it with float64: test_matmul_cuda.py compiles and calls it.
#include <cstdint>
#if KERNEL == 1
#include "../../../unsloth_ext/nf4/cuda/few_async.cu"
#elif KERNEL == 2
#include "../../../unsloth_ext/nf4/cuda/few_stream.cu"
#else
#include "../../../unsloth_ext/nf4/cuda/tile_wgmma.cu"
#endif
#include <random>
static const double CODE[16] = {-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
  0.5626170039176941, 0.7229568362236023, 1.0};
int main(int argc, char** argv) {
  const int M = atoi(argv[1]), N = atoi(argv[2]), blocks = atoi(argv[3]), seed = atoi(argv[4]);
  srand(seed);
  std::mt19937 r(seed);
  std::normal_distribution<float> normal;
  auto aligned = [](size_t n) { return (uint8_t*)aligned_alloc(1024, (n + 1023) / 1024 * 1024); };
  uint16_t* x = (uint16_t*)aligned(2ull * M * K);
  uint8_t *packed = aligned((size_t)N * K / 2), *absmax = aligned((size_t)N * K / 64);
  const int second = (N * (K / 64) + 255) / 256;
  std::vector<float> code2(256), absmax2(second);
  float offset = normal(r) * 0.05f;
  for (int i = 0; i < M * K; i++) x[i] = rounded(normal(r));
  for (size_t i = 0; i < (size_t)N * K / 2; i++) packed[i] = r();
  for (int i = 0; i < N * K / 64; i++) absmax[i] = r();
  for (auto& v : code2) v = normal(r) * 0.05f;
  for (auto& v : absmax2) v = 0.1f + (r() % 1000) / 1000.f;
  const float factor = 1.437006f;
  std::vector<uint32_t> pairs(256);
  for (int b = 0; b < 256; b++) pairs[b] = rounded(CODE[b >> 4] * factor) | (uint32_t)rounded(CODE[b & 15] * factor) << 16;
  std::vector<uint16_t> bias(N);
  for (auto& v : bias) v = rounded(normal(r) * 8);
  const bool biased = r() % 2;
  std::vector<uint16_t> out((size_t)M * N, 0x7fc0);
  std::vector<float> parts(1 << 20, NAN);
  std::vector<unsigned> counters(1 << 14, 0);
  for (int call = 0; call < 2; call++) {
#if KERNEL < 3
#if KERNEL == 1
#define NAME few_async
#else
#define NAME few_stream
#endif
    launch({blocks, 1, 1}, THREADS, [&] {
      NAME(x, packed, absmax, code2.data(), absmax2.data(), &offset, pairs.data(), out.data(), parts.data(), counters.data(), M, N, 1 / factor, biased ? bias.data() : nullptr);
    });
#else
    const int tiles = (M + MT - 1) / MT;
    static uint8_t* xp = aligned((size_t)tiles * MT * K * 2);
    launch({K * MT / 8 / 256 + 1, tiles, 1}, 256, [&] { permute(x, (uint4*)xp, M, MT, K); });
    launch({(N + ROWS - 1) / ROWS, SPLIT, tiles}, THREADS, [&] {
      tile_wgmma(xp, packed, absmax, code2.data(), absmax2.data(), &offset, pairs.data(), out.data(), parts.data(), counters.data(), M, N, 1 / factor, biased ? bias.data() : nullptr);
    });
#endif
    for (auto c : counters) check(c == 0, "a counter is left");
  }
  double wrong = 0, norm = 0;
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double y = biased ? widened(bias[n]) : 0;
      for (int k = 0; k < K; k++) {
        const size_t i = (size_t)n * K + k;
        const int nibble = i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        const float scale = code2[absmax[i / 64]] * absmax2[i / 64 / 256] + offset;
        y += CODE[nibble] * scale * half_of(x[(size_t)m * K + k], 0);
      }
      const double d = half_of(out[(size_t)m * N + n], 0) - y;
      wrong += d * d, norm += y * y;
    }
  const double error = std::sqrt(wrong / norm);
  printf("%s M %d N %d blocks %d: %.2e\n", error < 3e-3 ? "OK" : "WRONG", M, N, blocks, error);
  return error < 3e-3 ? 0 : 1;
}
