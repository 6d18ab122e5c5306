// How the threads of a block wait for each other and for their asynchronous copies.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "testing/cuda_emulation/block.h"
#include "testing/cuda_emulation/copy_counter.h"

namespace kvpage::emulation {
namespace {

std::int64_t copied_bytes = 0;

// Usually they are the same literal.
bool Same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

std::string Describe(const Site& site) {
  return std::string(site.what) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

void Finish(std::vector<Copy>* copies) {
  for (const Copy& copy : *copies) {
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
  }
  copies->clear();
}

}  // namespace

void FailStuck(const char* why) {
  std::map<std::string, std::string> places;
  for (int i = 0; i < block().size; ++i) {
    const Thread& thread = *block().threads[i];
    std::string place = "returned";
    if (thread.state == State::kReady) place = "polls in " + Describe(thread.site);
    if (thread.state == State::kBarrier) place = "waits in " + Describe(thread.site);
    if (thread.state == State::kWarp) {
      char mask[32];
      std::snprintf(mask, sizeof(mask), ", mask %08x", thread.mask);
      place = "waits in " + Describe(thread.site) + mask;
    }
    places[place] += " " + std::to_string(i);
  }
  std::string text = std::string(why) + ":";
  for (const auto& [place, threads] : places) text += "\n  " + place + ": threads" + threads;
  Fail(text.c_str());
}

void Park() {
  Thread* const self = block().running;
  block().scheduler->SwitchFrom(self->fiber.get());
}

int SyncBlock(int id, int count, bool predicate, const Site& site) {
  if (id < 0 || id >= kBarriers) Fail("barriers are 0..15");
  Block& b = block();
  Barrier& barrier = b.barriers[id];
  Thread* const self = b.running;
  self->state = State::kBarrier;
  self->barrier = id;
  self->site = site;
  ++barrier.arrived;
  barrier.predicates += predicate;
  if (barrier.arrived == (count < 0 ? b.size : count)) {
    for (int i = 0; i < b.size; ++i) {
      Thread& thread = *b.threads[i];
      if (thread.state != State::kBarrier || thread.barrier != id) continue;
      if (count < 0 && (thread.site.line != site.line || !Same(thread.site.file, site.file))) FailStuck();
      thread.state = State::kReady;
    }
    barrier.result = barrier.predicates;
    barrier.arrived = barrier.predicates = 0;
    b.progress = true;
    return barrier.result;  // nobody passes the next barrier before all have left this one
  }
  Park();
  return barrier.result;
}

void WarpCollective(unsigned mask, const Site& site, void* arg, CollectiveFn run) {
  Block& b = block();
  Thread* const self = b.running;
  const int first = self->index / kWarp * kWarp;
  if ((mask >> (self->index - first) & 1) == 0) {
    Fail((Describe(site) + ": the calling lane is not in the mask").c_str());
  }
  self->state = State::kWarp;
  self->mask = mask;
  self->site = site;
  self->argument = arg;
  void* args[kWarp] = {};
  bool complete = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (first + lane >= b.size || b.threads[first + lane]->state == State::kDone) {
      Fail((Describe(site) + ": lane " + std::to_string(lane) + " is in the mask, but has returned or does not exist")
               .c_str());
    }
    const Thread& other = *b.threads[first + lane];
    // The other lane may wait for other lanes first, but not for this lane in another call.
    if (other.state != State::kWarp || (other.mask >> (self->index - first) & 1) == 0) {
      complete = false;
      continue;
    }
    if (other.mask != mask || !Same(other.site.what, site.what)) FailStuck();
    args[lane] = other.argument;
  }
  if (!complete) {
    Park();
    return;
  }
  run(args, mask);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) b.threads[first + lane]->state = State::kReady;
  }
  b.progress = true;
}

void Yield(const Site& site) {
  block().running->site = site;
  Park();
}

std::int64_t NumCopiedBytes() { return copied_bytes; }

void CopyAsync(void* to, const void* from, int bytes, int valid) {
  copied_bytes += valid;
  if (block().early) Fail("the kernel copies global memory before it waits for the prior kernel, which it may overlap");
  std::memset(to, 0xff, bytes);
  block().running->open.push_back({to, from, bytes, valid});
}

void CommitCopies() {
  Thread& self = *block().running;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void WaitForCopies(int groups_left) {
  Thread& self = *block().running;
  const auto done = std::max<std::int64_t>(static_cast<std::int64_t>(self.groups.size()) - groups_left, 0);
  for (std::int64_t i = 0; i < done; ++i) Finish(&self.groups[i]);
  self.groups.erase(self.groups.begin(), self.groups.begin() + done);
}

}  // namespace kvpage::emulation
