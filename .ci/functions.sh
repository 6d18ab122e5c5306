# Functions for .ci/run, which sources this file and sets `full`.

step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }

find_python() { # prints the first Python among the given versions that is found on PATH or in pyenv
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

need() { # program or file, Debian package that provides it
  command -v "$1" >/dev/null || [ -e "$1" ] && return
  apt-get update -qq && apt-get install -qq -y "$2" >/dev/null
}

# Sets `chosen` to one of several equal parts of the given names (to all of them with --full), and `others` to the rest.
choose() { # number of parts, names
  local parts=$1 part file index=0
  shift
  part=$(part_of "$parts")
  chosen=() others=()
  for file in "$@"; do
    if [ -n "$full" ] || [ $((index++ % parts)) = "$part" ]; then chosen+=("$file"); else others+=("$file"); fi
  done
}

# Like `choose`, but neighbours stay together: names that begin alike need the same libraries.
choose_neighbours() { # number of parts, names
  local parts=$1 part begin end
  shift
  part=$(part_of "$parts")
  begin=$((part * $# / parts)) end=$(((part + 1) * $# / parts))
  if [ -n "$full" ]; then begin=0 end=$#; fi
  chosen=("${@:begin + 1:end - begin}")
}

part_of() { # number of parts; the commit's hash selects one
  echo $((0x$(git rev-parse HEAD | cut -c1-8) % $1))
}

# Runs pytest with one process per core. Each file runs in a single process, so that its tests share fixtures and
# compiled programs. Files start in alphabetical order, because the files with the most tests are not those that take
# longest.
tests_in_parallel() { # bin folder of an environment, arguments for pytest
  local bin=$1
  shift
  "$bin/pytest" -n "$(nproc)" --dist loadfile --no-loadscope-reorder "$@"
}
