// DeviceState: the state that all pools of one CUDA device share, for the lifetime of the process.
//
// It has the table in which kernels look up pool ids (base/device_table.h), the record for faults of unknown pools, and
// a stream for small copies.
//
// The host never synchronises a context, or a stream of XLA's that may be captured or destroyed, and needs no list of
// such streams: running ops count themselves in the table (kernels/cuda/readers.cuh), wherever they run, and the host
// polls the count with copies on its stream.
//
// Locks: queue_mutex_ (handlers queueing), stream_mutex_ (our stream), table_mutex_ (entries). None is taken while
// another is held, and none is held while waiting for work that handlers queued.
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
  // The table: a device address.
  DevicePool* table() const { return reinterpret_cast<DevicePool*>(table_.address()); }
  // Four bytes of device memory that kernels may write and that are never read.
  cu::DevicePtr spare_word() const { return table_.address() + kDeviceTableEntries * sizeof(DevicePool); }

  // ---- handlers ----
  // Held by a handler while it queues its launches, so that those of one op follow each other on their stream. Makes
  // the device's context current.
  class Queueing {
   public:
    Queueing(DeviceState* device, cu::Stream stream);
    const Status& status() const { return scope_.status(); }

   private:
    const std::lock_guard<std::mutex> lock_;
    const ContextScope scope_;
  };
  // Whether handlers came by turns on several streams outside of captures, asked for the first time: the release of a
  // slot waits for its own stream's work only. A client that replaces another (jax.clear_backends) does not count.
  bool TakeManyStreams();
  // Whether a program that is queued on `stream` now may find slots that share blocks when it runs. A captured call
  // runs again later, so it may. The device's context is current, as under Queueing: the driver is asked in every call.
  bool MayFindRuns(cu::Stream stream) const;

  // Pinned memory through which a handler reads results from the device; reused by later handlers.
  class Staging {
   public:
    explicit Staging(DeviceState* device) : device_(device) {}
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;
    Status Reserve(std::size_t bytes);
    char* data() const { return memory_.data(); }
    // The device address of `host`, which points into it.
    template <class T>
    T* OnDevice(T* host) const {
      return memory_.OnDevice(host);
    }

   private:
    DeviceState* const device_;
    PinnedMemory memory_;
  };

  // Waits for one of XLA's streams, holding no lock.
  Status Synchronize(cu::Stream stream);
  // Copies pinned memory to the device on one of XLA's streams, and waits for it.
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
  // Makes the copies in order on the stream for small copies, and waits for that stream only.
  Status Transfer(const std::vector<Copy>& copies);
  // That many more slots of the device's pools have blocks in common with others, or fewer (run_mirror.h).
  void AddRuns(int change) { runs_.fetch_add(change, std::memory_order_relaxed); }

  // Waits for the ops that were counted in before the caller's last change of the entry: none that comes later passes
  // its check. Fails after a time that no op takes. `waited`: whether there was any.
  Status WaitForReaders(std::int32_t entry, bool* waited);
  // For tests.
  void set_wait_limit(std::chrono::milliseconds limit) { wait_limit_ = limit; }

  // Adds a pool to the table, at *entry; `image` is pinned and has the id.
  Status AddEntry(DevicePool* image, std::int32_t* entry);
  // Takes the pool off the table and waits for its readers. After a failure they may still use the pool's memory, and
  // the entry is not used again.
  Status RemoveEntry(std::int32_t entry, bool* waited);
  // The device address of a field of an entry: Field(entry, &DevicePool::generation).
  template <class T>
  cu::DevicePtr Field(std::int32_t entry, T DevicePool::* field) const {
    static const DevicePool pool;
    const auto offset = reinterpret_cast<const char*>(&(pool.*field)) - reinterpret_cast<const char*>(&pool);
    return table_.address() + static_cast<cu::DevicePtr>(entry) * sizeof(DevicePool) +
           static_cast<cu::DevicePtr>(offset);
  }
  // If `record` holds a fault: moves it to *out and lets entry `entry` record the next one.
  bool TakeFault(Fault* record, std::int32_t entry, Fault* out);
  // The same for programs whose pool is not in the table.
  bool TakeUnownedFault(Fault* out) { return TakeFault(fault_, kMaxDevicePools, out); }

 private:
  explicit DeviceState(std::shared_ptr<CudaContext> context) : context_(std::move(context)) {}
  Status Start();
  void NoteStream(cu::Stream stream);

  const std::shared_ptr<CudaContext> context_;
  DeviceMemory table_;
  PinnedMemory shared_;               // the members below point into it
  Fault* fault_ = nullptr;            // of programs whose pool is not in the table
  std::uint32_t* zero_ = nullptr;     // stays 0; source of the copies that clear `faulted`
  std::int32_t* left_ = nullptr;      // stays kLeftEntry
  std::uint32_t* readers_ = nullptr;  // [kMaxDevicePools] counts, as last copied
  cu::Stream stream_ = nullptr;
  std::atomic<std::int64_t> runs_{0};

  std::mutex queue_mutex_;
  cu::Stream last_stream_ = nullptr;            // of a handler that was not captured
  std::vector<unsigned long long> stream_ids_;  // of all such streams, the last one's at the end
  bool many_streams_ = false, many_told_ = false;
  std::chrono::milliseconds wait_limit_{60000};
  std::mutex stream_mutex_;
  std::mutex table_mutex_;
  std::int32_t ids_[kMaxDevicePools];
  std::mutex staging_mutex_;
  std::vector<PinnedMemory> staging_;
};

// Opens a device with the system's driver at its first pool; it is never closed.
Status OpenDevice(int ordinal, std::shared_ptr<DeviceState>* out);
// Null if the process never had a pool there.
DeviceState* FindDevice(int ordinal);

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_DEVICE_STATE_H_
