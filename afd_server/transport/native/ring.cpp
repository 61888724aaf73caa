// Records between two processes through memory that both have mapped: one ring for each direction,
// one writer and one reader for each ring, and the wait for records.
//
// A process keeps its own counters in its own memory. What the other side can write (its counters,
// the words before its records) is checked before it is used: a peer gone mad can spoil its own
// records, but cannot make this process read or write outside of the mapping.
//
// The first page holds, for each direction, counters and a ring of slots. A slot says where in the
// direction's bytes a record lies and how long it is. The writer alone decides where: after the
// record before, or at the beginning once everything is read, so a quiet link stays in the caches.

#include <atomic>
#include <cstdint>
#include <ctime>
#include <new>

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kLine = 64;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kSlots = 64;  // unread records of a direction: the credits
constexpr int kPausesBetweenYields = 64;  // about 2 us: the peer may wait for this very core

enum : int64_t { kNothing = 0, kFull = -1, kAsleep = -2, kClosed = -3, kBroken = -4 };

struct Shared {
  // Written by the writer.
  alignas(kLine) std::atomic<uint64_t> written;  // records, ever
  std::atomic<uint32_t> closed;
  // Written by the reader.
  alignas(kLine) std::atomic<uint64_t> read;  // records, ever
  // Set by the reader, taken back by either.
  alignas(kLine) std::atomic<uint32_t> sleeping;
  // Written by the writer: place << 32 | length.
  alignas(kLine) std::atomic<uint64_t> slots[kSlots];
};

static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared counters need lock-free words");
static_assert(2 * sizeof(Shared) <= kPage - 16, "both directions and the token share a page");

struct Extent {
  uint64_t begin, end;
};

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Ring {
  Shared* out;
  Shared* in;
  uint64_t out_at, in_at;  // where each direction's bytes begin in the mapping
  uint64_t capacity;       // bytes of a direction
  uint64_t written, read;  // records, ever
  Extent extents[kSlots];  // of the records written; those of unread ones are in use
};

namespace {

bool is_due(const Ring* ring) {
  return ring->in->written.load(std::memory_order_acquire) != ring->read ||
         ring->in->closed.load(std::memory_order_acquire);
}

bool any_due(Ring* const* rings, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (is_due(rings[i])) return true;
  return false;
}

// Returns where in the mapping `length` bytes may be written, whether their reader sleeps or not.
int64_t reserve(Ring* ring, uint64_t length) {
  const uint64_t unread = ring->written - ring->out->read.load(std::memory_order_acquire);
  if (unread > kSlots) return kBroken;
  if (unread == kSlots) return kFull;
  const uint64_t size = (length + kLine - 1) / kLine * kLine;
  uint64_t begin = 0, limit = ring->capacity;
  if (unread) {
    const uint64_t oldest = ring->extents[(ring->written - unread) % kSlots].begin;
    begin = ring->extents[(ring->written - 1) % kSlots].end;
    if (begin <= oldest) {  // wrapped around already, and up to the oldest is free
      limit = oldest;
    } else if (begin + size > limit) {
      begin = 0;
      limit = oldest;
    }
  }
  if (length > ring->capacity || begin + size > limit) return kFull;
  ring->extents[ring->written % kSlots] = {begin, begin + size};
  return static_cast<int64_t>(ring->out_at + begin);
}

}  // namespace

extern "C" {

// Raised with every change of what a function of this library takes or gives, or of a struct that it
// shares with Python: another library is refused.
int32_t afd_ring_interface() { return 3; }

// Takes one end of zeroed memory of kPage + 2 * capacity bytes; `side` is 0 or 1.
Ring* afd_ring_open(char* base, uint64_t capacity, int64_t side) {
  Shared* shared = reinterpret_cast<Shared*>(base);
  return new (std::nothrow) Ring{&shared[side],
                                 &shared[1 - side],
                                 kPage + side * capacity,
                                 kPage + (1 - side) * capacity,
                                 capacity,
                                 0,
                                 0,
                                 {}};
}

// Tells the other side that this one will neither write nor read any more. The mapping stays.
void afd_ring_close(Ring* ring) {
  ring->out->closed.store(1, std::memory_order_release);
  delete ring;
}

// Returns where in the mapping `length` bytes may be written, to be followed by a commit. There is
// no use in writing for a sleeper: what wakes it may as well be the message.
int64_t afd_ring_reserve(Ring* ring, uint64_t length) {
  if (ring->in->closed.load(std::memory_order_acquire)) return kClosed;
  return ring->out->sleeping.load(std::memory_order_relaxed) ? kAsleep : reserve(ring, length);
}

// Publishes the `length` bytes last reserved; returns whether the reader has gone to sleep meanwhile
// and must be woken.
int64_t afd_ring_commit(Ring* ring, uint64_t length) {
  const uint64_t slot = ring->written % kSlots;
  ring->out->slots[slot].store(ring->extents[slot].begin << 32 | length, std::memory_order_relaxed);
  ring->out->written.store(++ring->written, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // against afd_ring_doze
  return ring->out->sleeping.load(std::memory_order_relaxed) && ring->out->sleeping.exchange(0);
}

// Returns the next record as place << 32 | length; it stays until afd_ring_advance.
int64_t afd_ring_peek(const Ring* ring) {
  const uint64_t due = ring->in->written.load(std::memory_order_acquire) - ring->read;
  if (due == 0) return ring->in->closed.load(std::memory_order_acquire) ? kClosed : kNothing;
  if (due > kSlots) return kBroken;
  const uint64_t slot = ring->in->slots[ring->read % kSlots].load(std::memory_order_relaxed);
  const uint64_t begin = slot >> 32, length = slot & 0xffffffff;
  if (length == 0 || begin + length > ring->capacity) return kBroken;
  return static_cast<int64_t>((ring->in_at + begin) << 32 | length);
}

// Gives the record that was peeked at back to the writer.
void afd_ring_advance(Ring* ring) {
  ring->in->read.store(++ring->read, std::memory_order_release);
}

// Watches all rings until something is due or the time is over, and gives its core to whoever wants
// it every few microseconds. Returns whether something is due.
int64_t afd_ring_watch(Ring* const* rings, int64_t count, int64_t longest_ns) {
  const int64_t until = now_ns() + longest_ns;
  do {
    for (int i = 0; i < kPausesBetweenYields; ++i) {
      if (any_due(rings, count)) return 1;
      pause_briefly();
    }
    sched_yield();
  } while (now_ns() < until);
  return any_due(rings, count);
}

// Takes the announcement of afd_ring_doze back.
void afd_ring_wake(Ring* const* rings, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    rings[i]->in->sleeping.store(0, std::memory_order_relaxed);
}

// Announces to all writers that this reader is about to sleep; returns whether it must not,
// since something is due. Either this sees a record or its writer sees the announcement.
int64_t afd_ring_doze(Ring* const* rings, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    rings[i]->in->sleeping.store(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // against afd_ring_commit
  if (!any_due(rings, count)) return 0;
  afd_ring_wake(rings, count);
  return 1;
}

}  // extern "C"

#include "sockets.h"
#include "calls.h"
