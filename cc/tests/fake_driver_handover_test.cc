// Sequences handed over as driver handles between pools on the fake driver: nothing is copied unnecessarily, nothing of
// another request is sent, and whatever is damaged or foreign is refused. Built with KVPAGE_TEST_FAKE_DRIVER.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/handles_util.h"

namespace kvpage::testing {
namespace {

TEST_P(HandlesTest, NothingIsCopiedOfWholeBlocks) {
  End sender(geometry_), receiver(geometry_);
  const std::int32_t slot = sender.BeginHandover(48, 1);
  const std::int64_t copies = Copies();
  const HandoverPtr sent = sender.Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(static_cast<std::int64_t>(sent->handles.size()), 3 * ranges_);
  const HandoverPtr received = Received(*sent);
  const std::int64_t used = Fake().Report().used_bytes;
  const std::int32_t back = receiver.Import(*received);
  EXPECT_EQ(Copies(), copies);
  EXPECT_EQ(Fake().Report().used_bytes, used) << "no memory is taken for what was received";
  EXPECT_EQ(receiver.Stamped(back, 48, 1), 48);
  EXPECT_EQ(receiver.pool->Numbers().blocks_received, 3 * ranges_);
  EXPECT_EQ(receiver.pool->Numbers().physical_bytes, 0);
  // Both continue; the sender copies nothing, because the sequence ended at a block's end.
  WriteStamped(receiver.pool.get(), &receiver.program, back, 10, 1);
  sender.program.Truncate(slot, 48);
  WriteStamped(sender.pool.get(), &sender.program, slot, 10, 2);
  EXPECT_EQ(receiver.Stamped(back, 58, 1), 58);
  EXPECT_EQ(CountStamped(sender.pool.get(), slot, 48, 58, 2), 10);
  sender.Accounts();
  receiver.Accounts();
}

TEST_P(HandlesTest, APartialBlockIsTheReceiversOwnAndOthersAreCopiedOnce) {
  for (const bool owned : {true, false}) {
    End sender(geometry_), receiver(geometry_);
    const std::int32_t slot = owned ? sender.BeginHandover(40, 1) : sender.Begin(40, 1);
    const std::int64_t on_device = Fake().calls(Call::kMemcpyDtoDAsync);
    const HandoverPtr sent = sender.Export(slot);
    ASSERT_NE(sent, nullptr);
    EXPECT_EQ(sent->copied, owned ? 0 : 3 * ranges_ * geometry_.block_bytes);
    // The partial last block goes through the host, where the memory behind its tokens is zeroed.
    EXPECT_EQ(Fake().calls(Call::kMemcpyDtoDAsync) - on_device, owned ? 0 : 2 * ranges_);
    const std::int32_t back = receiver.Import(*Received(*sent));
    EXPECT_EQ(receiver.Stamped(back, 40, 1), 40);
    ForTokens(receiver.pool.get(), back, 40, 48, [](float& at, float) { EXPECT_EQ(at, 0); });
    EXPECT_EQ(receiver.pool->Numbers().handovers.bytes_copied_in, ranges_ * geometry_.block_bytes);
    WriteStamped(receiver.pool.get(), &receiver.program, back, 30, 1);
    EXPECT_EQ(receiver.Stamped(back, 70, 1), 70);
    EXPECT_TRUE(Mentions(receiver.program.SetLength(back, 20), "share"));
    receiver.program.Restart();
    EXPECT_EQ(sender.Stamped(slot, 40, 1), 40);
    const Status write = sender.program.Write(slot, 1);
    EXPECT_EQ(write.ok(), !owned) << write.message();
    if (owned) {
      EXPECT_TRUE(Mentions(write, "share")) << write.message();
      sender.program.Truncate(slot, 40);
      EXPECT_OK(sender.program.Write(slot, 1));
    }
    receiver.program.Truncate(back, 5);
    WriteStamped(receiver.pool.get(), &receiver.program, back, 5, 3);
    EXPECT_EQ(sender.Stamped(slot, 40, 1), 40);
    sender.Accounts();
    receiver.Accounts();
  }
}

TEST_P(HandlesTest, ItOutlivesItsSenderAndIsGivenUpWithItsLastSlot) {
  End receiver(geometry_);
  const std::int64_t before = Fake().Report().used_bytes;
  HandoverPtr sent;
  {
    End sender(geometry_);
    sent = sender.Export(sender.BeginHandover(40, 1));
    ASSERT_NE(sent, nullptr);
  }
  EXPECT_EQ(Fake().Report().imported, 0);
  const std::int32_t back = receiver.Import(*sent);
  sent = nullptr;
  EXPECT_EQ(receiver.Stamped(back, 40, 1), 40);
  const std::int32_t fork = receiver.program.Fork(back);
  receiver.Release(back);
  EXPECT_EQ(Fake().Report().imported, 2 * ranges_);
  EXPECT_EQ(receiver.Stamped(fork, 40, 1), 40);
  receiver.Release(fork);
  EXPECT_EQ(Fake().Report().imported, 0);
  EXPECT_EQ(Fake().Report().used_bytes, before);
}

// What a receiver has cannot change, nor show what the sender's pool does later.
TEST_P(HandlesTest, TheSenderNeverUsesTheMemoryAgain) {
  End sender(geometry_, 0, 8);
  const std::int32_t slot = sender.BeginHandover(48, 1);
  const HandoverPtr sent = sender.Export(slot);
  ASSERT_NE(sent, nullptr);
  const std::string before = Content(*sent);
  sender.Release(slot);
  EXPECT_EQ(sender.pool->Numbers().physical_bytes, 0);
  for (int round = 0; round < 3; ++round) {
    const std::int32_t other = sender.Begin(128, 9);  // every block of the pool
    EXPECT_EQ(Content(*sent), before);
    sender.program.Release(other);
  }
}

TEST_P(HandlesTest, NoByteOfAnotherRequestIsSent) {
  Geometry geometry = geometry_;
  if (GetParam() == Layout::kFused) {  // with padding after the tokens of each block
    ASSERT_OK(Geometry::Make(geometry_.spec(), 8192, &geometry));
  }
  const std::string foreign(32, 'F');
  for (const bool owned : {true, false}) {
    End sender(geometry);
    const auto stain = [&](std::int32_t slot, std::int64_t from_block) {
      for (std::int64_t range = 0; range < geometry.num_ranges(); ++range) {
        std::memset(sender.pool->View().base + geometry.Offset(slot, range, from_block), 'F',
                    static_cast<std::size_t>((3 - from_block) * geometry.block_bytes));
      }
    };
    const std::int32_t earlier = sender.program.Acquire(48);
    stain(earlier, 0);
    sender.program.Release(earlier);
    const std::int32_t slot = owned ? sender.BeginHandover(40, 1, 40) : sender.program.Acquire(40);
    if (!owned) {
      stain(slot, 0);  // the state in which a pool finds new device memory
      WriteStamped(sender.pool.get(), &sender.program, slot, 40, 1);
      // Overwrite each element of the tokens with the request's own data.
      const KVView view = sender.pool->View();
      for (std::int64_t token = 0; token < 40; ++token) {
        for (std::int64_t i = 0; i < 2 * geometry.num_layers; ++i) {
          std::memset(view.At(slot, token, i / 2, i % 2, 0), 1, static_cast<std::size_t>(geometry.row_bytes()));
        }
      }
    } else {
      // Tokens that were rolled back.
      ForTokens(sender.pool.get(), slot, 40, 48, [](float& at, float) { std::memset(&at, 'F', sizeof(at)); });
    }
    const HandoverPtr sent = sender.Export(slot);
    ASSERT_NE(sent, nullptr);
    const std::string content = Content(*sent);
    EXPECT_EQ(content.find(foreign), std::string::npos);
    EXPECT_EQ(content.find("FFFF"), std::string::npos);
    EXPECT_EQ(content.find(std::string(16, '\xFF')), std::string::npos) << "what new memory holds";
    EXPECT_EQ(static_cast<std::int64_t>(content.size()),
              sent->header.begin + 3 * geometry.num_ranges() * geometry.block_bytes);
  }
}

TEST_P(HandlesTest, WhatIsDamagedForeignOrElsewhereIsRefused) {
  End sender(geometry_), receiver(geometry_), far(geometry_, 1);
  const HandoverPtr sent = sender.Export(sender.BeginHandover(40, 1));
  ASSERT_NE(sent, nullptr);
  const std::vector<int> all = Descriptors(*sent);
  const std::vector<std::int64_t> before = receiver.Accounts();
  HandoverPtr out;
  const auto refuses = [&](const std::vector<int>& descriptors, const std::string& words) {
    Status status = handover::Receive(descriptors, &out);
    if (status.ok()) status = receiver.pool->ImportBlocks(*out, "model").status;
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << status.message();
    EXPECT_TRUE(Mentions(status, words)) << status.message();
    EXPECT_EQ(receiver.Accounts(), before);
  };
  refuses({}, "no descriptor");
  refuses({all[0]}, "and 0 came with it");
  refuses({all.begin(), all.end() - 1}, "a descriptor each");
  refuses({all[1], all[2]}, "sealed");
  std::vector<int> wrong = all;
  wrong.push_back(all[1]);
  refuses(wrong, "a descriptor each");
  wrong = all;
  wrong.back() = 1 << 20;
  refuses(wrong, "is not open in this process");
  for (const std::size_t place : {std::size_t{1}, all.size() - 1}) {  // a full block, and the last one
    wrong = all;
    wrong[place] = all[0];
    refuses(wrong, "no memory of this device that its driver has exported");
    const Fd large(memfd_create("fake_driver_device_0", MFD_CLOEXEC));
    ASSERT_EQ(ftruncate(large.get(), 2 * geometry_.block_bytes), 0);
    wrong[place] = large.get();
    refuses(wrong, "no allocation of 4096 bytes");
    const Fd elsewhere(memfd_create("fake_driver_device_1", MFD_CLOEXEC));
    ASSERT_EQ(ftruncate(elsewhere.get(), geometry_.block_bytes), 0);
    wrong[place] = elsewhere.get();
    refuses(wrong, "memory of another device (1)");
  }
  const Status status = far.pool->ImportBlocks(*sent, "model").status;
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(status, "is in 'GPU-66616b65-2047-5055-0000-000000000000'")) << status.message();
  const Status model = receiver.pool->ImportBlocks(*sent, "").status;
  EXPECT_TRUE(Mentions(model, "fingerprint 'model', wanted ''")) << model.message();
  EXPECT_EQ(Fake().Report().imported, 0);
  EXPECT_GE(receiver.Import(*sent), 0);
}

// A header that is valid except for one number, in a sealed file.
TEST_P(HandlesTest, AForgedHeaderIsRefused) {
  End sender(geometry_), receiver(geometry_);
  const HandoverPtr sent = sender.Export(sender.BeginHandover(40, 1));
  ASSERT_NE(sent, nullptr);
  const auto refuses = [&](const handover::Header& header, std::int64_t bytes) {
    handover::Handover forged;
    ASSERT_OK(MemoryFile::Make(bytes, &forged.file));
    ASSERT_OK(handover::WriteHeader(header, forged.file.get()));
    ASSERT_OK(forged.file->Seal());
    std::vector<int> descriptors = Descriptors(*sent);
    descriptors[0] = forged.file->fd();
    HandoverPtr out;
    Status status = handover::Receive(descriptors, &out);
    if (status.ok()) status = receiver.pool->ImportBlocks(*out, "model").status;
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << status.message();
  };
  const handover::Header& good = sent->header;
  const auto with = [&](auto change, std::int64_t bytes) {
    handover::Header header = good;
    change(&header);
    refuses(header, bytes);
  };
  using handover::Header;
  with([](Header* h) { h->stride = h->blocks; }, good.begin);
  with([](Header* h) { h->blocks = 2; }, good.begin);
  with([](Header* h) { h->blocks = 0; }, good.begin);
  with([](Header* h) { h->ranges = std::int64_t{1} << 31; }, good.begin);
  with([](Header* h) { h->ranges *= 3, h->blocks = 1; }, good.begin);
  with([](Header* h) { h->block_bytes *= 2; }, good.begin);
  with([](Header*) {}, good.begin + 4096);
  // Blocks in the file, which has none: mapping them would crash the process.
  with([](Header* h) { h->memory.clear(), h->shape += " memory=", h->stride = 0; }, good.begin);
  with([](Header* h) { h->memory.clear(), h->stride = h->blocks; }, good.begin);
  with([](Header* h) { h->memory += '0'; }, good.begin);
  EXPECT_EQ(Fake().Report().imported, 0);
  EXPECT_GE(receiver.Import(*sent), 0);
}

TEST_P(HandlesTest, PoolsOnCpuAndOnADeviceDoNotMix) {
  End receiver(geometry_);
  handover::Handover host;  // as written by a pool on the CPU
  host.header.tokens = 16;
  host.header.ids.assign(16, 7);
  host.header.blocks = host.header.stride = 1;
  host.header.begin = handover::HeaderBytes(16);
  host.header.block_bytes = geometry_.block_bytes;
  host.header.ranges = ranges_;
  host.header.shape = handover::ShapeOf(geometry_);
  ASSERT_OK(MemoryFile::Make(host.header.file_bytes(), &host.file));
  const std::string zeros(static_cast<std::size_t>(host.header.file_bytes()), '\0');
  ASSERT_OK(host.file->Write(0, zeros.data(), host.header.file_bytes()));
  ASSERT_OK(handover::WriteHeader(host.header, host.file.get()));
  ASSERT_OK(host.file->Seal());
  HandoverPtr received;
  ASSERT_OK(handover::Receive({host.file->fd()}, &received));
  const Status status = receiver.pool->ImportBlocks(*received, "").status;
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(status, "is in memory of the host, this pool's blocks are in 'GPU-")) << status.message();
}

INSTANTIATE_TEST_SUITE_P(Layouts, HandlesTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
