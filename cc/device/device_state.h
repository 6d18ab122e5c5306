// DeviceState: the state shared by all pools of one CUDA device, for the lifetime of the process.
//
// It owns the table in which kernels look up pool ids (base/device_table.h), the record for faults of unknown pools,
// and a stream for small copies.
//
// The host never synchronises a context or one of XLA's streams, which may be captured or destroyed, and needs no list
// of these streams: running ops on all streams count themselves in the table (kernels/cuda/readers.cuh), and
// the host polls the count with copies on its own stream.
//
// Locks: queue_mutex_ (handlers that queue work), stream_mutex_ (our stream), table_mutex_ (entries). No thread holds
// two of them, and none is held while waiting for work that handlers queued.
#ifndef KVPAGE_DEVICE_DEVICE_STATE_H_
#define KVPAGE_DEVICE_DEVICE_STATE_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/device_table.h"
#include "base/status.h"
#include "device/memory.h"
#include "vmm/cuda_context.h"

namespace kvpage {

class DeviceState {
 public:
  static Status Make(const Driver& driver, int ordinal, std::shared_ptr<DeviceState>* out);
  ~DeviceState();
  DeviceState(const DeviceState&) = delete;
  DeviceState& operator=(const DeviceState&) = delete;

  const Driver& driver() const { return context_->driver(); }
  const std::shared_ptr<CudaContext>& context() const { return context_; }
  // Device address of the table.
  DevicePool* table() const { return reinterpret_cast<DevicePool*>(table_.address()); }
  // Four bytes of device memory that kernels may write and that nobody reads.
  cu::DevicePtr spare_word() const { return table_.address() + kDeviceTableEntries * sizeof(DevicePool); }

  // ---- handlers ----
  // Held by a handler while it queues its launches, so that the launches of one op are consecutive on their stream.
  // Makes the device's context current.
  class Queueing {
   public:
    Queueing(DeviceState* device, cu::Stream stream);
    const Status& status() const { return scope_.status(); }

   private:
    const std::lock_guard<std::mutex> lock_;
    const ContextScope scope_;
  };
  // Returns true once, if handlers alternated between several streams outside of captures: the release of a slot waits
  // only for work on its own stream. A client that replaces another (jax.clear_backends) does not count.
  bool TakeManyStreams();
  // Whether a program that is being queued on `stream` may find slots that share blocks when it runs. Always true
  // during a capture, because the graph may be replayed later. Queries the driver, so the device's context must be
  // current; a Queueing object makes it so.
  bool MayFindRuns(cu::Stream stream) const;

  // Pinned memory through which a handler reads results from the device; later handlers reuse it.
  class Staging {
   public:
    explicit Staging(DeviceState* device) : device_(device) {}
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;
    Status Reserve(std::size_t bytes);
    char* data() const { return memory_.data(); }
    // The device address of `host`, which must point into this memory.
    template <class T>
    T* OnDevice(T* host) const {
      return memory_.OnDevice(host);
    }

   private:
    DeviceState* const device_;
    PinnedMemory memory_;
  };

  // Waits for one of XLA's streams without holding a lock.
  Status Synchronize(cu::Stream stream);
  // Copies pinned memory to the device on one of XLA's streams, and waits for the copy.
  Status Upload(cu::DevicePtr to, const void* from, std::size_t bytes, cu::Stream stream);
  // Queues a copy on one of XLA's streams.
  Status CopyOnDevice(cu::DevicePtr to, cu::DevicePtr from, std::size_t bytes, cu::Stream stream);

  // ---- mirrors ----
  // One small copy between pinned memory and the device.
  struct Copy {
    enum Kind { kToDevice, kToHost, kZero } kind;
    cu::DevicePtr device;
    void* host;  // pinned; null for kZero
    std::size_t bytes;
  };
  // Makes the copies in order on the stream for small copies, and waits only for that stream.
  Status Transfer(const std::vector<Copy>& copies);
  // Changes the number of slots on this device that share blocks with others (run_mirror.h).
  void AddRuns(int change) { runs_.fetch_add(change, std::memory_order_relaxed); }

  // Waits for the ops that were counted in before the caller's last change of the entry; later ops do not pass their
  // check. Fails after a time that no op takes. *waited: whether there were any.
  Status WaitForReaders(std::int32_t entry, bool* waited);
  // For tests.
  void set_wait_limit(std::chrono::milliseconds limit) { wait_limit_ = limit; }

  // Adds a pool to the table; *entry is its index. `image` is in pinned memory and has the id.
  Status AddEntry(DevicePool* image, std::int32_t* entry);
  // Removes the pool from the table and waits for its readers. After a failure they may still use the pool's memory,
  // and the entry is not reused.
  Status RemoveEntry(std::int32_t entry, bool* waited);
  // The device address of a field of an entry: Field(entry, &DevicePool::generation).
  template <class T>
  cu::DevicePtr Field(std::int32_t entry, T DevicePool::* field) const {
    static const DevicePool pool;
    const auto offset = reinterpret_cast<const char*>(&(pool.*field)) - reinterpret_cast<const char*>(&pool);
    return table_.address() + static_cast<cu::DevicePtr>(entry) * sizeof(DevicePool) +
           static_cast<cu::DevicePtr>(offset);
  }
  // If `record` holds a fault, moves it to *out and lets entry `entry` record the next one.
  bool TakeFault(Fault* record, std::int32_t entry, Fault* out);
  // The same for faults of programs whose pool is not in the table.
  bool TakeUnownedFault(Fault* out) { return TakeFault(fault_, kMaxDevicePools, out); }

 private:
  explicit DeviceState(std::shared_ptr<CudaContext> context) : context_(std::move(context)) {}
  Status Start();
  void NoteStream(cu::Stream stream);

  const std::shared_ptr<CudaContext> context_;
  DeviceMemory table_;
  PinnedMemory shared_;               // the members below point into it
  Fault* fault_ = nullptr;            // for programs whose pool is not in the table
  std::uint32_t* zero_ = nullptr;     // always 0; source of the copies that clear `faulted`
  std::int32_t* left_ = nullptr;      // always kLeftEntry
  std::uint32_t* readers_ = nullptr;  // [kMaxDevicePools] counts, as last copied
  cu::Stream stream_ = nullptr;
  std::atomic<std::int64_t> runs_{0};

  std::mutex queue_mutex_;
  cu::Stream last_stream_ = nullptr;            // latest stream of a handler that was not captured
  std::vector<unsigned long long> stream_ids_;  // ids of all such streams, the latest one last
  bool many_streams_ = false, many_told_ = false;
  std::chrono::milliseconds wait_limit_{60000};
  std::mutex stream_mutex_;
  std::mutex table_mutex_;
  std::int32_t ids_[kMaxDevicePools];
  std::mutex staging_mutex_;
  std::vector<PinnedMemory> staging_;
};

// Opens a device with the system's driver when it gets its first pool; it is never closed.
Status OpenDevice(int ordinal, std::shared_ptr<DeviceState>* out);
// Returns null if the process never had a pool there.
DeviceState* FindDevice(int ordinal);

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_DEVICE_STATE_H_
