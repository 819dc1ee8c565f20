"""The calls as C sees them: ctypes cuts a pointer to 32 bits if an argument has no type."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from care_compress.device.cuda import Cuda
from care_compress.device.problems import NoGpuError

# Handles are far above 4 GiB, as on a real machine; each call checks that it got the right one.
STUB = r"""
#include <stdlib.h>
#include <string.h>
#define STREAM ((void *)0x7f1234567890)
#define START ((void *)0x7f2234567890)
#define GRAPH ((void *)0x7f4234567890)
#define RUNNABLE ((void *)0x7f5234567890)
#define CALL(name, ...) int name(__VA_ARGS__)
static int events, alive;
int leaks(void) { return alive; }
const char *cudaGetErrorString(int s) { return s == 1 ? "wrong argument" : "another error"; }
CALL(cudaSetDeviceFlags, unsigned f) { return f != 1; }
CALL(cudaSetDevice, int d) { return d; }
CALL(cudaMalloc, void **p, size_t n) { *p = malloc(n); ++alive; return !*p; }
CALL(cudaFree, void *p) { free(p); --alive; return 0; }
CALL(cudaMemcpyAsync, void *to, const void *from, size_t n, int kind, void *s) {
  if (s != STREAM || (kind != 1 && kind != 2)) return 1;
  memcpy(to, from, n);
  return 0;
}
CALL(cudaStreamCreateWithFlags, void **s, unsigned f) { *s = STREAM; ++alive; return f != 1; }
CALL(cudaStreamDestroy, void *s) { --alive; return s != STREAM; }
CALL(cudaStreamSynchronize, void *s) { return s != STREAM; }
CALL(cudaEventCreateWithFlags, void **e, unsigned f) {
  *e = (char *)START + 16 * events++; ++alive;
  return f;
}
CALL(cudaEventRecord, void *e, void *s) { return e < START || s != STREAM; }
CALL(cudaEventSynchronize, void *e) { return e < START; }
CALL(cudaEventElapsedTime, float *t, void *a, void *b) {
  *t = 1.5f;
  return a != START || b != (char *)START + 16;
}
CALL(cudaEventDestroy, void *e) { --alive; return e < START; }
CALL(cudaStreamBeginCapture, void *s, int mode) { return s != STREAM || mode < 0 || mode > 2; }
CALL(cudaStreamEndCapture, void *s, void **g) { *g = GRAPH; ++alive; return s != STREAM; }
CALL(cudaGraphInstantiateWithFlags, void **x, void *g, unsigned long long f) {
  *x = RUNNABLE; ++alive;
  return g != GRAPH || f != 0;
}
CALL(cudaGraphDestroy, void *g) { --alive; return g != GRAPH; }
CALL(cudaGraphLaunch, void *x, void *s) { return x != RUNNABLE || s != STREAM; }
CALL(cudaGraphExecDestroy, void *x) { --alive; return x != RUNNABLE; }
CALL(cudaDeviceGetAttribute, int *v, int which, int d) { *v = which == 75 ? 11 : 0; return d; }
CALL(cudaRuntimeGetVersion, int *v) { *v = 13000; return 0; }
CALL(cudaDriverGetVersion, int *v) { *v = 12080; return 0; }
/* CUDA 12 has both layouts; the plain name is the old one. */
CALL(cudaGetDeviceProperties_v2, char *p, int d) {
  memset(p, 'x', 1032); strcpy(p, "NVIDIA Thor");
  return d;
}
CALL(cudaGetDeviceProperties, char *p, int d) { return 1; }
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    source, library = folder / "stub.c", folder / "libcudart.so"
    source.write_text(STUB)
    command = [compiler, "-shared", "-fPIC", "-w", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def test_every_call_reaches_c_whole(runtime: ctypes.CDLL) -> None:
    cuda = Cuda(runtime)
    assert cuda.gpu().name == "NVIDIA Thor"
    assert cuda.gpu().compute_capability == "11.0"
    assert cuda.versions() == {"runtime": "13.0", "driver": "12.8"}
    stream = cuda.new_stream()
    values = np.arange(1000, dtype=np.float32)
    address = cuda.allocate(values.nbytes)
    assert address > 1 << 32
    back = np.zeros_like(values)
    cuda.upload(address, values, stream)
    cuda.download(back, address, stream)
    cuda.wait(stream)
    assert np.array_equal(back, values)
    cuda.begin_capture(stream)
    graph = cuda.end_capture(stream)
    start, end = cuda.new_event(), cuda.new_event()
    cuda.record(start, stream)
    cuda.launch(graph, stream)
    cuda.record(end, stream)
    cuda.wait_event(end)
    assert cuda.milliseconds(start, end) == 1.5
    for event in (start, end):
        cuda.drop_event(event)
    cuda.drop_graph(graph)
    cuda.free(address)
    cuda.drop_stream(stream)
    assert runtime.leaks() == 0


def test_an_error_is_told_in_cudas_words(runtime: ctypes.CDLL) -> None:
    with pytest.raises(NoGpuError, match=r"wrong argument \(cudaStreamSynchronize, error 1\)"):
        Cuda(runtime).wait(0x7F0000000001)


def test_the_runtime_installed_here_has_every_call() -> None:
    from care_compress.device.cuda import runtime_candidates

    for name in runtime_candidates():
        try:
            real = ctypes.CDLL(name)
        except OSError:
            continue
        source = Path(__file__).read_text()
        names = {word for word in source.replace("(", " ").replace(",", " ").split()}
        wanted = {word for word in names if word.startswith("cuda") and word[4:5].isupper()}
        wanted -= {"cudaGetDeviceProperties_v2"}  # CUDA 12 only
        assert len(wanted) > 20
        assert [word for word in sorted(wanted) if not hasattr(real, word)] == []
        return
    pytest.skip("no CUDA runtime is installed")
