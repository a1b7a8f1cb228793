// Bit-packed masks on CUDA. Bound by reading and writing the tensors; a mask adds one bit an
// element. apply() takes its tensors as a table in the kernel's parameters, so that a model is a
// few launches and nothing is allocated or copied for them. A tile of 16 KB goes to a block: memory
// that is contiguous and aligned moves by 16 bytes, four loads of every thread in flight; what is
// alive as a whole is not read, and what is zero already is not written. Any other layout goes by
// elements.
#include "common/kernels.cuh"
#include "mask/mask.h"

namespace secateur::mask::CUDA {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kTile = kThreads * kUnroll;  // elements, or vectors of 16 bytes

// Eight bools, each 0 or 1, to the bits of one byte: the product moves byte i's low bit to bit
// 56 + i.
__device__ uint8_t gather_bits(uint64_t bools) {
  return static_cast<uint8_t>((bools & 0x0101010101010101u) * 0x0102040810204080u >> 56);
}

// The low four bits to four bools: copies shifted by 7 put bit i at bit 8 * i.
__device__ uint32_t spread_bits(uint32_t bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }

// A thread makes two bytes of the mask at a time.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* bools, int64_t numel, uint8_t* bits, bool vectors) {
  const int64_t step = int64_t{gridDim.x} * kThreads * kLoadBytes;
  int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLoadBytes;
  for (; i < numel; i += step) {
    uint64_t low = 0, high = 0;
    if (vectors && i + kLoadBytes <= numel) {
      const uint4 v = *reinterpret_cast<const uint4*>(bools + i);
      low = uint64_t{v.y} << 32 | v.x;
      high = uint64_t{v.w} << 32 | v.z;
    } else {
      for (int j = 0; j < 8; ++j) {
        if (i + j < numel) low |= uint64_t{bools[i + j]} << 8 * j;
        if (i + 8 + j < numel) high |= uint64_t{bools[i + 8 + j]} << 8 * j;
      }
    }
    bits[i / 8] = gather_bits(low);
    if (i + 8 < numel) bits[i / 8 + 1] = gather_bits(high);
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* bits, int64_t numel, uint8_t* bools) {
  const int64_t step = int64_t{gridDim.x} * kThreads * kLoadBytes;
  int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLoadBytes;
  for (; i < numel; i += step) {
    const uint32_t low = bits[i / 8];
    const uint32_t high = i + 8 < numel ? bits[i / 8 + 1] : 0;
    if (i + kLoadBytes <= numel) {
      *reinterpret_cast<uint4*>(bools + i) = {spread_bits(low), spread_bits(low >> 4),
                                              spread_bits(high), spread_bits(high >> 4)};
    } else {
      for (int j = 0; i + j < numel; ++j) bools[i + j] = (high << 8 | low) >> j & 1u;
    }
  }
}

// A tensor that is contiguous and aligned to 16 bytes.
struct Flat {
  void* data;
  const uint8_t* bits;
  int64_t numel;
  int64_t first_tile;
  int32_t element_bytes;
  int32_t flag;  // the index of the tensor's flag
};

// Any other.
struct Strided {
  View view;
  const uint8_t* bits;
  int64_t numel;
  int64_t first_tile;
  int32_t flag;
};

template <typename Entry>
struct Table {
  // A kernel has 4 KB of parameters, of which the rest of the table takes 24 bytes.
  static constexpr int kCapacity = (4096 - 24) / sizeof(Entry);
  uint32_t* flags;
  int64_t tiles;
  int32_t count;
  Entry entries[kCapacity];
};

__device__ bool alive(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

// Zeroes *p; whether it was not.
template <typename T>
__device__ bool revived(T* p) {
  const bool was = *p != 0;
  if (was) *p = 0;
  return was;
}

// The elements of type T in `v` whose bits are set; zero where they are not.
template <typename T>
__device__ uint4 kept(uint4 v, uint32_t bits) {
  const auto word = [&](int j) -> uint32_t {
    if constexpr (sizeof(T) == 2)
      return (bits >> 2 * j & 1u) * 0xffffu | (bits >> (2 * j + 1) & 1u) * 0xffff0000u;
    else
      return (bits >> j * 4 / static_cast<int>(sizeof(T)) & 1u) * 0xffffffffu;
  };
  return {v.x & word(0), v.y & word(1), v.z & word(2), v.w & word(3)};
}

// Whether something dead in the tile was not zero; T is any type of the elements' size, as zero is
// all bits clear in every dtype.
template <typename T>
__device__ bool apply_vectors(const Flat& t, int64_t tile) {
  constexpr int n = kLoadBytes / sizeof(T);
  constexpr uint32_t all = (1u << n) - 1;
  uint4* const data = static_cast<uint4*>(t.data);
  const int64_t whole = t.numel / n;
  const int64_t first = tile * kTile + threadIdx.x;
  bool found = false;
  uint32_t bits[kUnroll];
  uint4 v[kUnroll] = {};
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t i = first + k * kThreads;
    bits[k] = i < whole ? t.bits[i * n / 8] >> (i * n % 8) & all : all;
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k)
    if (bits[k] != all) v[k] = data[first + k * kThreads];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const uint4 dead = kept<T>(v[k], ~bits[k]);
    if (dead.x | dead.y | dead.z | dead.w) {
      data[first + k * kThreads] = kept<T>(v[k], bits[k]);
      found = true;
    }
  }
  // The elements after the last whole vector belong to the last tile.
  const int64_t i = whole * n + threadIdx.x;
  if (whole / kTile == tile && i < t.numel && !alive(t.bits, i))
    found |= revived(static_cast<T*>(t.data) + i);
  return found;
}

template <typename T>
__device__ bool apply_elements(const Strided& t, int64_t tile) {
  T* const data = static_cast<T*>(t.view.data);
  bool found = false;
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t i = tile * kTile + k * kThreads + threadIdx.x;
    if (i < t.numel && !alive(t.bits, i)) found |= revived(data + locate(t.view, i).offset);
  }
  return found;
}

__device__ bool apply_tile(const Flat& t, int64_t tile) {
  if (t.element_bytes == 2) return apply_vectors<uint16_t>(t, tile);
  if (t.element_bytes == 4) return apply_vectors<uint32_t>(t, tile);
  return apply_vectors<uint64_t>(t, tile);
}

__device__ bool apply_tile(const Strided& t, int64_t tile) {
  if (t.view.dtype == Dtype::Double) return apply_elements<uint64_t>(t, tile);
  if (t.view.dtype == Dtype::Float) return apply_elements<uint32_t>(t, tile);
  return apply_elements<uint16_t>(t, tile);
}

// Called by all threads of a block. Four flags lie in a word.
__device__ void report_flag(uint32_t* flags, int flag, bool found) {
  report(flags + flag / 4, 1u << flag % 4 * 8, found);
}

template <typename Entry>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ Table<Entry> table) {
  int current = -1;
  bool found = false;
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const int next = find<&Entry::first_tile>(table.entries, table.count, tile);
    if (next != current && current >= 0) {
      report_flag(table.flags, table.entries[current].flag, found);
      found = false;
    }
    current = next;
    const Entry& entry = table.entries[current];
    found |= apply_tile(entry, tile - entry.first_tile);
  }
  report_flag(table.flags, table.entries[current].flag, found);
}

// Collects tensors and launches as the table fills.
template <typename Entry>
class Launcher {
 public:
  Launcher(uint8_t* flags, void* stream) : stream_(stream) {
    static_assert(sizeof(table_) <= 4096);
    table_.flags = reinterpret_cast<uint32_t*>(flags);
  }

  void add(Entry entry, int64_t tiles) {
    if (table_.count == Table<Entry>::kCapacity) launch();
    entry.first_tile = table_.tiles;
    table_.tiles += tiles;
    table_.entries[table_.count++] = entry;
  }

  void launch() {
    if (table_.count == 0) return;
    SECATEUR_LAUNCH(apply_kernel<Entry>, blocks_for(table_.tiles), kThreads, 0, stream_, table_);
    table_.tiles = table_.count = 0;
  }

 private:
  Table<Entry> table_{};
  void* stream_;
};

int element_bytes(Dtype dtype) {
  return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2;
}

}  // namespace

int pack(const uint8_t* bools, int64_t numel, uint8_t* bits, void* stream) {
  const unsigned blocks = blocks_for(ceil_div(numel, kThreads * kLoadBytes));
  SECATEUR_LAUNCH(pack_kernel, blocks, kThreads, 0, stream, bools, numel, bits, aligned(bools));
  return cudaGetLastError();
}

int unpack(const uint8_t* bits, int64_t numel, uint8_t* bools, void* stream) {
  const unsigned blocks = blocks_for(ceil_div(numel, kThreads * kLoadBytes));
  SECATEUR_LAUNCH(unpack_kernel, blocks, kThreads, 0, stream, bits, numel, bools);
  return cudaGetLastError();
}

int apply(const Target* targets, int64_t count, uint8_t* flags, void* stream) {
  Launcher<Flat> flat(flags, stream);
  Launcher<Strided> strided(flags, stream);
  for (int i = 0; i < count; ++i) {
    const auto& [tensor, numel, bits] = targets[i];
    if (numel == 0) continue;
    const int size = element_bytes(tensor.dtype);
    if (tensor.ndim == 1 && tensor.stride[0] == 1 && aligned(tensor.data))
      flat.add({tensor.data, bits, numel, 0, size, i}, ceil_div(numel * size, kTile * kLoadBytes));
    else
      strided.add({tensor, bits, numel, 0, i}, ceil_div(numel, kTile));
  }
  flat.launch();
  strided.launch();
  return cudaGetLastError();
}

}  // namespace secateur::mask::CUDA
