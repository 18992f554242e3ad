// Programmatic dependent launch: a kernel of these sources begins while the one in front of it ends.
//
// It calls await_previous before it touches what another may read or write, and may have read its weights before: they
// never change. Every kernel waits, even where it would need nothing, so that what is in front of the one in front has
// ended too.
#pragma once

#ifdef ON_CPU
inline void await_previous() {}
#else
// Until the kernels in front have ended and all they wrote can be read; then the next one may take multiprocessors that
// are free.
__device__ __forceinline__ void await_previous() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#endif
