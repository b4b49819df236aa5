// What orders two accesses to the same shared memory: a happens-before check with vector clocks.
//
// Every thread has a clock. For each agent of its cluster the clock says how much of what the agent
// did has surely happened before what the thread does next. The agents are the threads and, for
// each barrier, the bulk copies and the messages that complete on it. Arrivals and waits at
// barriers pass clocks on, as do synchronizations of a warp, a block or a cluster. Shuffles do not.
// A wait brings other blocks' messages only at the scope of the cluster. A bulk copy comes after
// what its thread knew at its last fence. If a thread does not know of the last access to some
// bytes, its own access to them is an error, whatever order this run took.
//
// One thing is taken for granted: a message comes after its sender's earlier reads and messages.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace papo {
namespace cuda {
namespace emulator {

constexpr uint32_t kNobody = 0xffffffffu;
constexpr uint32_t kNeverKnown = 0xffffffffu;

// A moment in an agent's time.
struct Stamp {
  uint32_t agent = kNobody, time = 0;
};

// The last known moment of each agent. Of agents beyond the end nothing is known.
class Clock {
 public:
  bool knows(const Stamp& s) const {
    return s.agent == kNobody || (s.agent < times_.size() && s.time <= times_[s.agent]);
  }
  void learn(const Stamp& s) {
    if (s.agent >= times_.size()) times_.resize(s.agent + 1);
    times_[s.agent] = std::max(times_[s.agent], s.time);
  }
  void learn(const Clock& other) {
    if (other.times_.size() > times_.size()) times_.resize(other.times_.size());
    const uint32_t* from = other.times_.data();
    uint32_t* to = times_.data();
    for (size_t i = 0; i < other.times_.size(); ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
  }

 private:
  std::vector<uint32_t> times_;
};

// The accesses to four bytes of shared memory that a later one must come after. No two threads
// store to different halves of them.
struct Cell {
  Stamp write;
  std::vector<Stamp> reads;  // since the write, one per thread

  void note_read(const Stamp& by) {
    for (Stamp& s : reads) {
      if (s.agent == by.agent) {
        s.time = by.time;
        return;
      }
    }
    reads.push_back(by);
  }
  void note_write(const Stamp& by) {
    write = by;
    reads.clear();
  }
};
constexpr uint32_t kCellBytes = 4;

}  // namespace emulator
}  // namespace cuda
}  // namespace papo
