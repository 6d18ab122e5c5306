// A page table that fails on demand.
#ifndef KVPAGE_TESTS_FAULTY_VMM_H_
#define KVPAGE_TESTS_FAULTY_VMM_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "vmm/vmm.h"

namespace kvpage::testing {

enum class Verb {
  kNone,
  kCreate,
  kMap,
  kUnmap,
  kMove,
  kDestroy,
  kFill,
  kMapReadOnly,
  kRemap,
  kCopy,
  kWindow,
  kExchange,
  kCollapse,
  kLend,
  kSeal
};

// Forwards to a real page table, but fails the n-th call of one verb, with no partial effect. Before the first call of
// a verb it can run a callback, such as another thread's action at that moment.
class FaultyVmm final : public Vmm {
 public:
  explicit FaultyVmm(std::unique_ptr<Vmm> inner) : inner_(std::move(inner)) {}
  void FailAt(Verb verb, int call) {
    verb_ = verb;
    calls_left_ = call;
  }
  bool failed() const { return calls_left_ < 0; }
  void Before(Verb verb, std::function<void()> meanwhile) {
    meanwhile_verb_ = verb;
    meanwhile_ = std::move(meanwhile);
  }

  char* base() const override { return inner_->base(); }
  Status Window(char** out) override { return Fails(Verb::kWindow) ? Fault() : inner_->Window(out); }
  Status Grow(std::int64_t n) override { return inner_->Grow(n); }
  Status Create(const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kCreate) ? Fault() : inner_->Create(b, n);
  }
  Status Destroy(const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kDestroy) ? Fault() : inner_->Destroy(b, n);
  }
  Status Map(std::int64_t o, const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kMap) ? Fault() : inner_->Map(o, b, n);
  }
  Status MapReadOnly(std::int64_t o, const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kMapReadOnly) ? Fault() : inner_->MapReadOnly(o, b, n);
  }
  Status Remap(std::int64_t o, const std::int32_t* a, const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kRemap) ? Fault() : inner_->Remap(o, a, b, n);
  }
  Status Exchange(std::int64_t o, std::int32_t a, std::int32_t b, bool writable) override {
    return Fails(Verb::kExchange) ? Fault() : inner_->Exchange(o, a, b, writable);
  }
  Status Copy(const std::int32_t* a, const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kCopy) ? Fault() : inner_->Copy(a, b, n);
  }
  std::int64_t huge_page_bytes() const override { return inner_->huge_page_bytes(); }
  Status Collapse(std::int32_t b, std::int64_t n) override {
    return Fails(Verb::kCollapse) ? Fault() : inner_->Collapse(b, n);
  }
  Status Unmap(std::int64_t o, const std::int32_t* b, std::int64_t n) override {
    return Fails(Verb::kUnmap) ? Fault() : inner_->Unmap(o, b, n);
  }
  Status Move(std::int64_t a, std::int64_t b, const std::int32_t* blocks, std::int64_t n) override {
    return Fails(Verb::kMove) ? Fault() : inner_->Move(a, b, blocks, n);
  }
  Status Fill(std::int64_t o, std::int64_t bytes, int byte) override {
    return Fails(Verb::kFill) ? Fault() : inner_->Fill(o, bytes, byte);
  }
  Status Lend(const std::shared_ptr<MemoryFile>& file, const std::int32_t* b, const std::int64_t* o,
              std::int64_t n) override {
    return Fails(Verb::kLend) ? Fault() : inner_->Lend(file, b, o, n);
  }
  void Return(std::int32_t b) override { inner_->Return(b); }
  std::int64_t LentOffset(const MemoryFile& file, std::int32_t b) const override { return inner_->LentOffset(file, b); }
  std::int64_t NumLent(const MemoryFile& file) const override { return inner_->NumLent(file); }
  Status Seal(const std::shared_ptr<MemoryFile>& file) override {
    return Fails(Verb::kSeal) ? Fault() : inner_->Seal(file);
  }
  bool shares_handles() const override { return inner_->shares_handles(); }
  Status MemoryName(std::string* out) override { return inner_->MemoryName(out); }
  Status Export(const std::int32_t* b, std::int64_t n, std::vector<Fd>* out) override {
    return inner_->Export(b, n, out);
  }
  Status ExportCopies(const std::vector<CopySource>& b, std::int64_t payload, std::vector<Fd>* out) override {
    return inner_->ExportCopies(b, payload, out);
  }
  Status Import(const std::vector<int>& fds, const std::int32_t* b) override { return inner_->Import(fds, b); }
  Status ImportCopies(const std::vector<int>& fds, const std::int32_t* b) override {
    return inner_->ImportCopies(fds, b);
  }
  // Null, unless a test sets one.
  Status Mover(std::shared_ptr<BlockMover>* out) override {
    *out = mover_;
    return {};
  }
  void set_mover(std::shared_ptr<BlockMover> mover) { mover_ = std::move(mover); }
  std::int64_t PhysicalBytes() const override { return inner_->PhysicalBytes(); }
  std::int64_t system_calls() const override { return inner_->system_calls(); }

 private:
  bool Fails(Verb verb) {
    if (verb == meanwhile_verb_ && meanwhile_ != nullptr) std::exchange(meanwhile_, nullptr)();
    return verb == verb_ && calls_left_ >= 0 && calls_left_-- == 0;
  }
  static Status Fault() { return ResourceExhausted("injected fault"); }

  std::unique_ptr<Vmm> inner_;
  std::shared_ptr<BlockMover> mover_;
  Verb verb_ = Verb::kNone;
  int calls_left_ = -1;
  Verb meanwhile_verb_ = Verb::kNone;
  std::function<void()> meanwhile_;
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_FAULTY_VMM_H_
