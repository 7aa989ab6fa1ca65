#!/usr/bin/env bash
# SGLang on a CPU, for tests only: bash tests/sglang/install.sh PYTHON [ARGUMENT of pip install...]
# The package index has no CPU builds of SGLang's kernels and of torchvision; the folder stand_ins provides the names
# that SGLang imports from them. What they would compute is not tested here.
set -euo pipefail
python=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("$python" -m pip --disable-pip-version-check)

"${pip[@]}" install --quiet torch==2.13.0 --requirement "$here/requirements.txt" "$@"
"${pip[@]}" install --quiet --no-deps sglang==0.5.12
echo "$here/stand_ins" >"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/stand_ins.pth"
