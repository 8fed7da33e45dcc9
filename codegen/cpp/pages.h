// Weights are read from end to end in every call. With pages of 4 kB the processor looks up an
// address for each, in a virtual machine twice over; so Linux is asked, once for each weight, to
// gather them in pages of 2 MB. Where it has none, or memory is a file's, all stays as it was.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

static void gather(const void* from, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t LARGE = 2 << 20;
  constexpr size_t MOST = 1 << 14;  // should someone make weights anew for every call
  constexpr int COLLAPSE = 25;      // MADV_COLLAPSE, Linux 6.1; before it, a thread does so in time
  if (!from || bytes < int64_t(LARGE / 4)) return;  // a page of its own would be a waste
  static std::vector<const void*> done;
  static std::shared_mutex lock;
  {
    std::shared_lock<std::shared_mutex> reading(lock);
    if (done.size() == MOST || std::binary_search(done.begin(), done.end(), from)) return;
  }
  {
    std::unique_lock<std::shared_mutex> writing(lock);
    const auto place = std::lower_bound(done.begin(), done.end(), from);
    if (place != done.end() && *place == from) return;
    done.insert(place, from);
  }
  // Outwards: tensors lie side by side, and one page of two is of a neighbour too.
  const uintptr_t end = (uintptr_t(from) + bytes + LARGE - 1) / LARGE * LARGE;
  for (uintptr_t page = uintptr_t(from) / LARGE * LARGE; page < end; page += LARGE) {
    madvise((void*)page, LARGE, MADV_HUGEPAGE);
    madvise((void*)page, LARGE, COLLAPSE);
  }
#endif
}
