#include "store/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>

#include "store/file_header.h"

namespace kvpage::store {
namespace {

constexpr char kTemporary[] = ".writing-";
constexpr char kLock[] = ".lock";
// A file is locked right after it is created; if the lock is missing later, its writer has ended.
constexpr double kOrphanSeconds = 60;

bool EndsWith(const std::string& name, const char* suffix) {
  const std::size_t size = std::strlen(suffix);
  return name.size() > size && name.compare(name.size() - size, size, suffix) == 0;
}

// Calls visit(name, status) for each regular file. Returns 0 or an errno.
template <class Visit>
int ForEachFile(int folder, const Visit& visit) {
  // A new descriptor, because duplicates share the position in a directory.
  const int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno;
  const auto shut = [](DIR* list) { closedir(list); };
  const std::unique_ptr<DIR, decltype(shut)> list(fdopendir(fd), shut);
  if (list == nullptr) {
    const int error = errno;
    close(fd);
    return error;
  }
  errno = 0;
  while (const dirent* entry = readdir(list.get())) {
    struct stat status;
    const bool found = fstatat(folder, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0;
    if (found && S_ISREG(status.st_mode)) visit(std::string(entry->d_name), status);
    errno = 0;
  }
  return errno;
}

double Seconds(const timespec& time) { return static_cast<double>(time.tv_sec) + 1e-9 * time.tv_nsec; }

}  // namespace

Status Folder::Open(const std::string& path, Folder* out) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return FileError("make the directory " + path, errno);
  return Find(path, out);
}

Status Folder::Find(const std::string& path, Folder* out) {
  Fd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.ok()) return FileError("open the directory " + path, errno);
  out->path_ = path;
  out->fd_ = std::move(fd);
  return {};
}

Status Folder::List(std::vector<FolderEntry>* out) const {
  out->clear();
  const int error = ForEachFile(fd(), [&](const std::string& name, const struct stat& status) {
    if (!EndsWith(name, kSuffix)) return;
    out->push_back({name, status.st_size, Seconds(status.st_mtim), status.st_ino});
  });
  return error == 0 ? Status() : FileError("list " + path_, error);
}

double Folder::Now() {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return Seconds(now);
}

double Folder::ChangeTime() const {
  struct stat status;
  return fstat(fd(), &status) == 0 ? Seconds(status.st_mtim) : -1;
}

bool Folder::Has(const std::string& name) const {
  struct stat status;
  return fstatat(fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0;
}

Fd Folder::OpenFile(const std::string& name) const {
  // Do not wait if somebody put a pipe there under this name.
  return Fd(openat(fd(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
}

Status Folder::MakeTemporary(std::string* name, Fd* out) const {
  static std::atomic<std::uint64_t> counter{0};
  for (int tries = 0; tries < 100; ++tries) {
    *name = kTemporary + std::to_string(getpid()) + "-" + std::to_string(counter.fetch_add(1));
    Fd made(openat(fd(), name->c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (!made.ok() && errno == EEXIST) continue;  // another process used this number, perhaps in another container
    if (!made.ok()) return FileError("make a file in " + path_, errno);
    flock(made.get(), LOCK_EX | LOCK_NB);
    *out = std::move(made);
    return {};
  }
  return FileError("make a file in " + path_, EEXIST);
}

bool Folder::Remove(const std::string& name) const { return unlinkat(fd(), name.c_str(), 0) == 0 || errno == ENOENT; }

FolderLock Folder::TryLock() const {
  Fd file(openat(fd(), kLock, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (file.ok() && flock(file.get(), LOCK_EX | LOCK_NB) != 0) file.Reset();
  return FolderLock(std::move(file));
}

void FolderLock::Reset() {
  if (file_.ok()) flock(file_.get(), LOCK_UN);
  file_.Reset();
}

void Folder::RemoveOrphans() const {
  std::vector<std::string> found;
  static_cast<void>(ForEachFile(fd(), [&](const std::string& name, const struct stat& status) {
    if (name.rfind(kTemporary, 0) == 0 && Now() - Seconds(status.st_mtim) > kOrphanSeconds) found.push_back(name);
  }));
  for (const std::string& name : found) {
    const Fd file = OpenFile(name);
    if (file.ok() && flock(file.get(), LOCK_EX | LOCK_NB) == 0) static_cast<void>(Remove(name));
  }
}

}  // namespace kvpage::store
