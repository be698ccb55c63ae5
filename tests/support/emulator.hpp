// Just enough of CUDA to run kernels.cu on a CPU: a block is one warp, whose 32 lanes are fibers that take turns.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Dim { unsigned x; };
static Dim threadIdx, blockIdx, blockDim{32}, gridDim;

inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
template <class T> void __stcg(T* at, T value) { *at = value; }
inline void atomicAdd(unsigned* at, unsigned value) { *at += value; }
using std::sqrt;

namespace emulator {
constexpr std::size_t kStack = 1 << 17;
static ucontext_t scheduler, lanes[32];
static std::vector<char> stacks(32 * kStack);
static bool over[32];
static unsigned char exchange[2][32][8];
static unsigned turns[32];
static const std::function<void()>* body;

inline void run() {
  (*body)();
  over[threadIdx.x] = true;
}

inline void give_way() {
  const unsigned lane = threadIdx.x;
  swapcontext(&lanes[lane], &scheduler);
  threadIdx.x = lane;
}

inline void launch(unsigned blocks, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      over[lane] = false, turns[lane] = 0;
      getcontext(&lanes[lane]);
      lanes[lane].uc_stack.ss_sp = stacks.data() + lane * kStack;
      lanes[lane].uc_stack.ss_size = kStack;
      lanes[lane].uc_link = &scheduler;
      makecontext(&lanes[lane], run, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (over[lane]) continue;
        any = true;
        threadIdx.x = lane;
        swapcontext(&scheduler, &lanes[lane]);
      }
    }
  }
}
}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned width) {
  const unsigned lane = threadIdx.x, turn = emulator::turns[lane]++ % 2;
  std::memcpy(emulator::exchange[turn][lane], &value, sizeof value);
  emulator::give_way();
  std::memcpy(&value, emulator::exchange[turn][lane ^ width], sizeof value);
  return value;
}
