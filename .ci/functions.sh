# Functions of .ci/run, which sources this file. They read its `full`.

step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }

find_python() { # the first Python among the given versions, from PATH or pyenv
  local version root
  root=$(command -v pyenv >/dev/null && pyenv root || true)
  for version in "$@"; do
    for candidate in "python$version" "$root"/versions/"$version"*/bin/python; do
      if "$candidate" -c 'import venv' 2>/dev/null; then
        command -v "$candidate"
        return
      fi
    done
  done
}

need() { # program or file, Debian package
  command -v "$1" >/dev/null || [ -e "$1" ] && return
  apt-get update -qq && apt-get install -qq -y "$2" >/dev/null
}

# Sets `chosen` to one of several equal parts of the given names, or to all with --full, and `others` to the rest.
choose() { # number of parts, names
  local parts=$1 part file index=0
  shift
  part=$((0x$(git rev-parse HEAD | cut -c1-8) % parts))
  chosen=() others=()
  for file in "$@"; do
    if [ -n "$full" ] || [ $((index++ % parts)) = $part ]; then chosen+=("$file"); else others+=("$file"); fi
  done
}

# pytest, a process per core. A file stays in one process, which shares its fixtures and compiled programs; files start
# in alphabetical order, because the largest by count are not those that take longest.
tests_in_parallel() { # bin folder of an environment, arguments of pytest
  local bin=$1
  shift
  "$bin/pytest" -n "$(nproc)" --dist loadfile --no-loadscope-reorder "$@"
}
